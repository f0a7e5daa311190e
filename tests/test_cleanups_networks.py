"""The clean-ups on whole networks with random weights: each pass is right, the second run changes nothing, the text parses back."""

import sys
from pathlib import Path

import pytest
import torch
import torch.utils._pytree as pytree

from graphwright.ir import capture, parse
from graphwright.ir.calls import name_of
from graphwright.passes import CLEANUPS, PassManager, check_exact

sys.path.insert(0, str(Path(__file__).parent))
from real_networks import NETWORKS

pytest.importorskip("transformers", reason="install the test extra: pip install graphwright[test]")
pytest.importorskip("diffusers", reason="install the test extra: pip install graphwright[test]")

# Network -> the rules that must fire on it; a pattern that silently stops matching when a library changes is a defect.
FIRES = {
    "llama": {"remove-no-op", "share", "fold"},
    "llama_dynamic": {"remove-no-op", "share"},
    "bert": {"remove-no-op", "share", "fold"},
    "unet_2d": {"remove-no-op", "share", "fold"},
    "resnet": {"fold-batch-norm"},
}


@pytest.mark.parametrize("name", FIRES)
def test_clean_ups_keep_their_contract_settle_and_print(name: str) -> None:
    torch.manual_seed(0)
    model, args, kwargs, dynamic_shapes = NETWORKS[name]()
    original = capture(model, args, kwargs, dynamic_shapes=dynamic_shapes)
    inputs = pytree.tree_leaves((args, kwargs))

    result = PassManager(CLEANUPS).run(original)
    fired = {record.rule for report in result.reports for record in report.records}
    assert FIRES[name] <= fired
    verdict = check_exact(original, result.program, inputs)
    assert verdict.kind == "right", verdict

    again = PassManager(CLEANUPS).run(result.program)
    assert [record for report in again.reports for record in report.records] == []
    assert parse(str(result.program), weights=result.program.weights) == result.program


def test_nothing_of_llamas_mask_and_rotary_arithmetic_is_left() -> None:
    torch.manual_seed(0)
    model, args, kwargs, _ = NETWORKS["llama"]()
    program = PassManager(CLEANUPS).run(capture(model, args, kwargs)).program
    left = {name_of(node.target) for node in program.main.calls}
    assert left.isdisjoint({"aten.arange.default", "aten.cos.default", "aten.sin.default", "aten.le.Tensor", "aten.index.Tensor"})
