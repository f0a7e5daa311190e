"""Operators whose form or meaning is another in older opsets: each is what onnxruntime makes of it, and on ATen where it has a form there."""

import numpy as np
import onnx
import pytest
import torch
from onnx import helper

import graphwright as gw
from graphwright.ir.run import run
from graphwright.tests.onnx_models import model_of, onnxruntime_results, results

_RANDOM = np.random.default_rng(0)


def floats(*shape):
    return _RANDOM.standard_normal(shape).astype(np.float32)


X, IMAGE = floats(2, 3, 4), floats(1, 4, 8, 8)
STATISTICS = {"s": floats(3), "b": floats(3), "m": floats(3), "v": np.abs(floats(3))}


def case(opset, op, x=X, constants=None, outputs=1, **attributes):
    """The operator on x, then on `constants`, of which those that are None are left out."""
    constants = constants or {}
    inputs = ["x", *("" if value is None else name for name, value in constants.items())]
    node = helper.make_node(op, inputs, [f"y{place}" for place in range(outputs)], **attributes)
    kept = {name: value for name, value in constants.items() if value is not None}
    shown = " ".join(f"{name}={value}" for name, value in attributes.items())
    return pytest.param(opset, node, x, kept, id=f"{op}-{opset} {shown}")


def model(opset, node, x, constants):
    x_type = (helper.np_dtype_to_tensor_dtype(x.dtype), list(x.shape))
    made = model_of([node], {"x": x_type}, dict.fromkeys(node.output), constants, opset=opset)
    del made.graph.output[:]
    made.graph.output.extend(onnx.ValueInfoProto(name=name) for name in node.output)
    return onnx.shape_inference.infer_shapes(made)


def scales(*numbers):
    return {"scales": np.float32(numbers)}


ON_ATEN = [
    *(case(opset, "Clip", min=-0.5, max=0.5) for opset in (7, 10)),
    case(10, "Clip"),
    case(7, "Clip", min=0.0),
    case(11, "Clip", constants={"low": None, "high": np.float32(0.2)}),
    case(7, "Pad", pads=[0, 1, 0, 0, 0, 2], value=1.5),
    case(10, "Pad", pads=[0, 1, 0, 0, 0, 2], mode="reflect"),
    case(11, "Pad", constants={"pads": np.array([0, 1, 0, 0, 0, 2]), "value": np.float32(1.5)}),
    case(7, "Slice", starts=[1, 0], ends=[3, -1], axes=[1, 2]),
    case(9, "Slice", starts=[0, 1], ends=[2, 9]),
    case(10, "Slice", constants={"s": np.array([2]), "e": np.array([-9]), "a": np.array([1]), "t": np.array([-1])}),
    case(7, "Squeeze", IMAGE, axes=[0]),
    case(13, "Squeeze", IMAGE, {"axes": np.array([0])}),
    case(11, "Unsqueeze", axes=[-1, 0]),
    case(13, "Unsqueeze", constants={"axes": np.array([-1, 0])}),
    *(case(opset, "ReduceSum", axes=[1], keepdims=0) for opset in (7, 11)),
    *(case(opset, "ReduceMean", axes=[1], keepdims=0) for opset in (7, 13)),
    *(case(18, op, constants={"axes": np.array([1])}, keepdims=0) for op in ("ReduceSum", "ReduceMean", "ReduceLogSumExp")),
    case(13, "ReduceSum", noop_with_empty_axes=1),
    case(9, "Upsample", IMAGE, scales(1, 1, 1.5, 2.3), mode="nearest"),
    case(9, "Upsample", IMAGE, scales(1, 1, 3, 2), mode="linear"),
    case(10, "Resize", IMAGE, scales(1, 1, 3, 2), mode="nearest"),
    case(10, "Resize", IMAGE, scales(1, 1, 2.5, 0.6), mode="linear"),
    case(
        11,
        "Resize",
        IMAGE,
        {"roi": np.zeros(0, np.float32), **scales(1, 1, 0.6, 1.7)},
        coordinate_transformation_mode="tf_half_pixel_for_nn",
        nearest_mode="floor",
    ),  # fmt: skip
    *(case(13, "Resize", IMAGE, {"roi": None, **scales(1, 1, 0.6, 1.7)}, mode=mode) for mode in ("nearest", "linear", "cubic")),
    *(case(opset, "Dropout", ratio=0.5) for opset in (7, 10)),
    case(13, "Dropout", constants={"ratio": np.float32(0.5)}),
    *(case(opset, "BatchNormalization", constants=STATISTICS, epsilon=1e-3) for opset in (7, 9, 14, 15)),
    case(7, "BatchNormalization", constants=STATISTICS, spatial=1),
    case(11, "Split", outputs=2, axis=2, split=[1, 3]),
    case(13, "Split", constants={"split": np.array([1, 3])}, outputs=2, axis=2),
    case(18, "Split", outputs=2, axis=1, num_outputs=2),
    *(case(opset, "Cast", to=onnx.TensorProto.INT64) for opset in (7, 13)),
    case(7, "Gemm", X[0], {"w": floats(5, 4), "b": floats(5)}, transB=1, alpha=0.5, beta=2.0),
    case(7, "Pow", np.abs(X), {"e": np.float32(2.5)}),
    case(12, "Pow", constants={"e": np.array(3)}),
    *(case(opset, "MaxPool", IMAGE, kernel_shape=[3, 3], strides=[2, 2], pads=[1, 1, 1, 1]) for opset in (7, 10, 12)),
    case(7, "AveragePool", IMAGE, kernel_shape=[3, 3], strides=[2, 2], pads=[1, 1, 1, 1]),
    case(19, "AveragePool", IMAGE, kernel_shape=[3, 3], strides=[2, 2], ceil_mode=1),
    case(18, "GroupNormalization", IMAGE, {"s": floats(2), "b": floats(2)}, num_groups=2),
    case(21, "GroupNormalization", IMAGE, {"s": floats(4), "b": floats(4)}, num_groups=2),
    *(case(opset, "GridSample", IMAGE, {"g": floats(1, 3, 3, 2)}, mode=mode) for opset, mode in ((16, "bicubic"), (20, "cubic"))),
    *(case(opset, "LpPool", IMAGE, kernel_shape=[2, 2], p=3) for opset in (7, 18)),
    case(7, "DepthToSpace", IMAGE, blocksize=2),
    case(11, "DepthToSpace", IMAGE, blocksize=2, mode="CRD"),
]
OPAQUE = [
    case(10, "Dropout", outputs=2),  # what the mask holds
    case(10, "Resize", IMAGE, scales(1, 1, 0.5, 0.6), mode="nearest"),  # which elements are the nearest
    case(7, "BatchNormalization", constants={name: np.abs(floats(3, 4)) for name in "sbmv"}, spatial=0),
    *(case(opset, "RoiAlign", IMAGE, {"r": np.float32([[1, 1, 5, 6]]), "b": np.array([0])}, output_height=2) for opset in (10, 16)),
]


def is_opaque(program):
    return any("onnx_node" in str(node.target) for node in program.main.calls)


def agreed(opset, node, x, constants):
    """The program of a model of one node, whose results are those of onnxruntime."""
    made, tensor = model(opset, node, x, constants), torch.from_numpy(x)
    program = gw.from_onnx(made)
    for found, wanted in zip(run(program, [tensor])[0], onnxruntime_results(made, tensor), strict=True):
        torch.testing.assert_close(found, torch.from_numpy(wanted), rtol=1e-4, atol=1e-5)  # float32 sums of hundreds in another order
    return program


@pytest.mark.parametrize(("opset", "node", "x", "constants"), ON_ATEN)
def test_an_operator_is_what_it_is_in_its_opset(opset, node, x, constants):
    assert not is_opaque(agreed(opset, node, x, constants))


@pytest.mark.parametrize(("opset", "node", "x", "constants"), OPAQUE)
def test_what_an_old_opset_leaves_open_is_left_to_onnxruntime(opset, node, x, constants):
    assert is_opaque(agreed(opset, node, x, constants))


def test_sizes_are_scaled_by_an_old_resize():
    node = helper.make_node("Resize", ["x", "scales"], ["y"], mode="nearest")
    made = model_of([node], {"x": [1, 2, "h", "w"]}, {"y": [1, 2, None, None]}, scales(1, 1, 2, 2), opset=10)
    image = torch.from_numpy(floats(1, 2, 3, 5))
    torch.testing.assert_close(results(made, image)[0], torch.from_numpy(onnxruntime_results(made, image)[0]))


@pytest.mark.parametrize("opset", [6, 29])
def test_opsets_that_the_readers_were_not_written_for_are_refused(opset):
    made = model_of([helper.make_node("Relu", ["x"], ["y"])], {"x": [2]}, {"y": [2]}, opset=opset)
    with pytest.raises(gw.CaptureError, match=rf"the model is of opset {opset}, and 7 to 28 are read"):
        gw.from_onnx(made)
