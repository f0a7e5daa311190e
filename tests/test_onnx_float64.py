"""Float64 programs as ONNX models: numbers that a float32 does not hold arrive as they are, in functions of the dialect and out of them.

Inputs are small, so that what stands beside them in a sum counts."""

import numpy as np
import onnx_ir
import onnxruntime
import pytest
import torch
import torch.nn.functional as F

import graphwright as gw
from graphwright.ir.onnx.export import to_onnx
from graphwright.ir.run import run

# Float64 kernels of two libraries sum in different orders: 1e-13 is some hundred roundings, and a float32 eps is off by 1e-8 of itself.
ROUNDINGS = 1e-13

NORMS = {
    "layer_norm, eps 1e-5": lambda x: F.layer_norm(x, (8,), eps=1e-5),
    "layer_norm, eps 1e-12": lambda x: F.layer_norm(x, (4, 8), eps=1e-12),
    "layer_norm with a weight": lambda x: F.layer_norm(x, (8,), x[0, 0], x[1, 1], 1e-5),
    "rms_norm": lambda x: F.rms_norm(x, (8,), x[0, 0], 1e-5),
    "rms_norm, torch's own eps": lambda x: F.rms_norm(x, (8,)),
    "group_norm": lambda x: F.group_norm(x, 2, x[0, :, 0], None, 1e-5),
    "instance_norm": lambda x: F.instance_norm(x, eps=1e-5),
    "batch_norm": lambda x: F.batch_norm(x, x[0, :, 0], x[1, :, 1].abs(), eps=1e-5),
    "norm_apply of the dialect": lambda x: torch.ops.gw.norm_apply(x, torch.ops.gw.norm_stats(x, 2), None, None, 2, 1e-5),
}
OTHERS = {
    "elu": lambda x: F.elu(x, 0.3),
    "celu": lambda x: F.celu(x, 0.3),
    "selu": F.selu,
    "leaky_relu, its own slope": F.leaky_relu,
    "softplus": lambda x: F.softplus(x, 0.3),
    "hardsigmoid": F.hardsigmoid,
    "hardswish": F.hardswish,
    "gelu by tanh": lambda x: F.gelu(x, approximate="tanh"),
    "softshrink": lambda x: F.softshrink(x, 0.013),
    "hardshrink": lambda x: F.hardshrink(x, 0.013),
    "threshold": lambda x: F.threshold(x, 0.013, 0.3),
    "a sum with alpha": lambda x: torch.add(x, x * x, alpha=0.3),
    "rsub": lambda x: torch.rsub(x, 0.3),
    "addcmul": lambda x: torch.addcmul(x, x, x, value=0.3),
    "addmm": lambda x: torch.addmm(x[0, 0], x[0, :, :4], x[1], alpha=0.3, beta=0.7),
    "lerp": lambda x: torch.lerp(x, x * x, 0.3),
    "where": lambda x: torch.where(x > 0.013, x, 0.1),
    "a number to a power": lambda x: torch.pow(1.1, x),
    "a norm of order 3": lambda x: x.norm(p=3, dim=-1),
    "cosine_similarity": lambda x: F.cosine_similarity(x, x * x, eps=1e-9),
    "attention with a scale": lambda x: F.scaled_dot_product_attention(x[:, None], x[:, None], x[:, None], scale=0.3),
    "causal_attention of the dialect": lambda x: torch.ops.gw.causal_attention(x[None], x[None], x[None], torch.arange(4), 0.3, False),
}


class Side(torch.nn.Module):
    """What each function makes of x, side by side."""

    def __init__(self, functions):
        super().__init__()
        self.functions = functions

    def forward(self, x):
        return tuple(function(x) for function in self.functions.values())


def small_numbers(*shape):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 0.01


def in_onnxruntime(path, x):
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return [torch.from_numpy(each) for each in session.run(None, {session.get_inputs()[0].name: x.numpy()})]


def far(functions, found, x):
    """Which results are not those of the functions, and by how much of the largest number."""
    errors = {}
    for (name, function), result in zip(functions.items(), found, strict=True):
        expected = function(x)
        errors[name] = float((result - expected).abs().max() / expected.abs().max())
    return {name: error for name, error in errors.items() if not error <= ROUNDINGS}


OF_THE_DIALECT = {name: function for name, function in (NORMS | OTHERS).items() if "of the dialect" in name}


@pytest.mark.parametrize("functions, dialect", [(NORMS | OTHERS, "function"), (OF_THE_DIALECT, "inline")], ids=["function", "inline"])
def test_numbers_of_float64_programs_arrive_as_they_are(functions, dialect, tmp_path):
    x = small_numbers(2, 4, 8)
    program = gw.compile(Side(functions), example_inputs=(x,), backend="aten", cache=False).program
    onnx_ir.save(to_onnx(program, "main", dialect=dialect, regions_as="loop", opset=21), tmp_path / "m.onnx")
    assert not far(functions, in_onnxruntime(tmp_path / "m.onnx", x), x)
    assert not far(functions, run(gw.from_onnx(tmp_path / "m.onnx"), [x])[0], x)


def test_a_norm_of_float64_serves_every_size(tmp_path):
    """And the file has passed the check that an export makes."""
    functions = {name: NORMS[name] for name in ("layer_norm, eps 1e-5", "group_norm", "norm_apply of the dialect")}
    compiled = gw.compile(
        Side(functions), example_inputs=(small_numbers(3, 4, 8),), dynamic_shapes=({0: torch.export.Dim("batch", max=9)},), backend="aten"
    )
    compiled.export_onnx(tmp_path / "m.onnx")
    for size in (1, 5):
        x = small_numbers(size, 4, 8)
        assert not far(functions, in_onnxruntime(tmp_path / "m.onnx", x), x)
        assert not far(functions, run(gw.from_onnx(tmp_path / "m.onnx"), [x])[0], x)


def test_norms_of_float32_stay_whole():
    x = small_numbers(2, 4, 8).float()
    program = gw.compile(Side({"norm": NORMS["layer_norm, eps 1e-5"]}), example_inputs=(x,), backend="aten", cache=False).program
    model = to_onnx(program, "main", dialect="function", regions_as="loop", opset=21)
    assert [node.op_type for node in model.graph] == ["Constant", "Shape", "Expand", "LayerNormalization"]


def test_the_bar_tells_a_float32_number_from_a_float64_one():
    assert abs(float(np.float32(1e-5)) / 1e-5 - 1) > 1e5 * ROUNDINGS
