"""A network through a pass, out to ONNX and in again: the same numbers, within what the program's own rounding explains."""

import pytest
import torch

import graphwright as gw
from graphwright.ir import verify
from graphwright.ir.run import run
from graphwright.passes.check import Reference
from graphwright.passes.inputs import random_inputs

SLICED = "slice-groups{memory_budget=60%}"
LOW_BIT = "weight=int4-g16,min_numel=0,budget=1.0"
PASSES = [SLICED, "smooth", "split-low-rank{rank=4,min_numel=0}", f"quantize{{{LOW_BIT}}}", f"absorb-outliers{{{LOW_BIT},rank=4}}"]
CASES = [("vit", passes) for passes in PASSES] + [
    ("dit", SLICED),
    ("decoder", SLICED),
    ("decoder", "quantize{weight=int8-channel,act=int8-token,min_numel=0,budget=1.0}"),
]


def operators(program):
    return {str(node.target) for node in program.nodes() if node.op == "call_function"}


@pytest.mark.parametrize(("network", "passes"), CASES)
def test_a_program_comes_back(network, passes, tmp_path):
    torch.manual_seed(0)
    module, args, kwargs = gw.models.load(network, "tiny")
    if passes == "smooth":
        passes = [gw.Smooth(calibration=[(args, kwargs)])]
    compiled = gw.compile(module, passes, example_inputs=args, example_kwargs=kwargs, backend="aten", cache=False)
    assert compiled.export_onnx(tmp_path / "m.onnx").verdict.kind == "right"
    again = gw.from_onnx(tmp_path / "m.onnx")
    verify(again)
    inputs = random_inputs(compiled.program, seed=3)
    results, _ = run(again, [value for value in inputs if isinstance(value, torch.Tensor)])
    verdict = Reference(compiled.program, inputs).judge_values({f"output {place}": value for place, value in enumerate(results)})
    assert verdict.kind == "right", verdict


@pytest.mark.parametrize("dialect", ["function", "custom"])
def test_operators_of_the_dialect_are_read_as_what_they_were(dialect, tmp_path):
    module, _, _ = gw.models.load("decoder", "tiny")
    compiled = gw.compile_decoder(module, backend="aten", cache=False)
    compiled.export_onnx(tmp_path / "m.onnx", functions=["decode"], dialect=dialect)
    again = gw.from_onnx(tmp_path / "m.decode.onnx")
    cached = {name for name in operators(again) if name.startswith("gw.")}
    assert cached == {"gw.kv_append.default", "gw.cached_attention.default"}
    scales = {node.kwargs["scale"] for node in again.nodes() if "cached_attention" in str(node.target)}
    wanted = {node.kwargs["scale"] for node in compiled.program.functions["decode"].calls if "cached_attention" in str(node.target)}
    assert scales == wanted  # to the last bit of a float64


def test_a_function_that_is_not_what_it_says_is_read_by_its_body(tmp_path):
    import onnx

    compiled = gw.compile(
        torch.nn.Linear(32, 48), f"quantize{{{LOW_BIT}}}", example_inputs=(torch.randn(2, 32),), backend="aten", cache=False
    )
    compiled.export_onnx(tmp_path / "m.onnx")
    model = onnx.load(tmp_path / "m.onnx")
    (function,) = model.functions
    (said,) = [entry for entry in function.metadata_props if entry.key == "graphwright.op"]
    assert "gw.lowrank_linear.default" in operators(gw.from_onnx(model))
    said.value = "gw.no_such_operator"
    x = torch.randn(2, 32)
    program = gw.from_onnx(model)
    assert not any(name.startswith("gw.") for name in operators(program))
    torch.testing.assert_close(run(program, [x])[0][0], compiled(x))
