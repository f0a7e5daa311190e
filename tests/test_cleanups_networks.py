"""The clean-ups on whole networks with random weights: each pass is right, the second run changes nothing, the text parses back."""

import functools
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.utils._pytree as pytree
from graphwright.ir import capture, parse
from graphwright.ir.calls import name_of
from graphwright.passes import CLEANUPS, PassManager, PipelineResult, check_exact

sys.path.insert(0, str(Path(__file__).parent))
from real_networks import NETWORKS

pytest.importorskip("transformers", reason="install the test extra: pip install graphwright[test]")
pytest.importorskip("diffusers", reason="install the test extra: pip install graphwright[test]")

# Network -> the rules that must fire on it; a pattern that silently stops matching when a library changes is a defect.
FIRES = {
    "llama": {"remove-no-op", "share", "fold"},
    "bert": {"remove-no-op", "share", "fold"},
    "unet_2d": {"remove-no-op", "share", "fold"},
    "resnet": {"fold-batch-norm"},  # of dynamic batch
}


@functools.cache
def cleaned(name: str) -> tuple[PipelineResult, list[Any]]:
    """The clean-ups' result on a network, and its example inputs."""
    torch.manual_seed(0)
    model, args, kwargs, dynamic_shapes = NETWORKS[name]()
    original = capture(model, args, kwargs, dynamic_shapes=dynamic_shapes)
    return PassManager(CLEANUPS).run(original), pytree.tree_leaves((args, kwargs))


@pytest.mark.parametrize("name", FIRES)
def test_clean_ups_keep_their_contract_settle_and_print(name: str) -> None:
    result, inputs = cleaned(name)
    fired = {record.rule for report in result.reports for record in report.records}
    assert FIRES[name] <= fired
    verdict = check_exact(result.history[0], result.program, inputs)
    assert verdict.kind == "right", verdict

    again = PassManager(CLEANUPS).run(result.program)
    assert [record for report in again.reports for record in report.records] == []
    assert parse(str(result.program), weights=result.program.weights) == result.program


def test_nothing_of_llamas_mask_and_rotary_arithmetic_is_left() -> None:
    result, _ = cleaned("llama")
    left = {name_of(node.target) for node in result.program.main.calls}
    assert left.isdisjoint({"aten.arange.default", "aten.cos.default", "aten.sin.default", "aten.le.Tensor", "aten.index.Tensor"})
