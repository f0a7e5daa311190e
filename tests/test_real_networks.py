"""Real architectures of transformers and diffusers go through capture, print, parse, verify and run, bit for bit."""

import sys
from pathlib import Path

import pytest
import torch
import torch.utils._pytree as pytree

from graphwright.ir import capture, parse, verify
from graphwright.ir.run import run
from graphwright.passes.experts.blocks import find_blocks

sys.path.insert(0, str(Path(__file__).parent))
from real_networks import NETWORKS

pytest.importorskip("transformers", reason="install the test extra: pip install graphwright[test]")
pytest.importorskip("diffusers", reason="install the test extra: pip install graphwright[test]")


@pytest.mark.parametrize("name", NETWORKS)
def test_captures_prints_parses_verifies_and_runs_as_eager_does(name: str) -> None:
    torch.manual_seed(0)
    model, args, kwargs, dynamic_shapes = NETWORKS[name]()
    program = capture(model, args, kwargs, dynamic_shapes=dynamic_shapes)
    verify(program)
    assert find_blocks(program.main) == ([], []), "none of these has experts"

    text = str(program)
    again = parse(text, weights=program.weights)
    verify(again)
    assert str(again) == text
    assert parse(text) == program

    with torch.no_grad():
        expected = pytree.tree_leaves(model(*args, **kwargs))
    outputs, _ = run(again, pytree.tree_leaves((args, kwargs)))
    for ours, theirs in zip(outputs, expected, strict=True):
        assert ours.dtype == theirs.dtype and ours.stride() == theirs.stride()
        assert torch.equal(ours, theirs)


def test_every_user_line_is_known() -> None:
    model, args, kwargs, _ = NETWORKS["unet_motion"]()
    calls = capture(model, args, kwargs).main.calls
    known = [node for node in calls if node.meta["where"].file.startswith("diffusers/")]
    assert len(known) >= 0.99 * len(calls)
    assert any(node.meta["where"].module == "conv_in" for node in calls)
