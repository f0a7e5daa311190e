"""ONNX files of some hundred bytes that claim gigabytes: what they name would take at least `CLAIMED` bytes."""

from collections.abc import Iterator
from typing import Any

import numpy as np
from onnx import TensorProto, helper, numpy_helper

CLAIMED = 2**31
_COUNT = 2**29  # float32 elements of that many bytes


def files() -> Iterator[tuple[str, Any]]:
    """Each with its name."""
    yield "an input of more elements than an address holds", _model([("Relu", "x", {})], x=[2**62, 4])
    for count in (_COUNT, 2**40, 2**62):
        yield f"{count} elements of one number", _model([("ConstantOfShape", "n", {})], n=[count])
        yield f"one number expanded to {count}", _model([("Expand", "one n", {})], one=np.ones(1, np.float32), n=[count])
        yield (
            f"one number {count} times, and once more",
            _model([("Tile", "one n", {}), ("Neg", "y0", {})], one=np.ones(1, np.float32), n=[count]),
        )
        yield f"{count} numbers in a row", _model([("Range", "zero n step", {})], zero=np.int64(0), n=np.int64(count), step=np.int64(1))
        yield f"{count} numbers around one", _model([("Pad", "one n", {})], one=np.ones(1, np.float32), n=[0, count])
        yield (
            f"one of {count}",
            _model([("OneHot", "zero n two", {})], zero=np.zeros(1, np.int64), n=np.int64(count), two=np.zeros(2, np.float32)),
        )
        yield (
            f"an image of {count} points",
            _model([("Resize", "x none none n", {})], x=[1, 1, 1, 1], none=np.zeros(0, np.float32), n=[1, 1, 1, count]),
        )
        yield f"random numbers, {count}", _model([("RandomNormal", "", {"shape": [count]})])
        yield f"a window of {count}", _model([("HannWindow", "n", {})], n=np.int64(count))
    yield "a square", _model([("Expand", "x n", {}), ("MatMul", "y0 y0", {})], x=[1], n=[2**20, 2**20])
    yield "a matrix of one number", _model([("ConstantOfShape", "n", {}), ("NonZero", "y0", {})], n=[2**15, 2**15])
    yield "a vector whose values onnx's shape inference would follow", _of_integers(2**63 - 1)
    yield "a branch that data choose", _branching()
    yield "an initializer without bytes", _claiming([_COUNT])


def _model(steps: list[tuple[str, str, dict[str, Any]]], **given: Any) -> Any:
    """Operators one after another, each of the names of its operands; of `given`, a list of floats' dims makes x an input."""
    inputs = [helper.make_tensor_value_info("x", TensorProto.FLOAT, given.pop("x"))] if "x" in given else []
    constants = [numpy_helper.from_array(np.asarray(value), name) for name, value in given.items()]
    nodes = [helper.make_node(op, operands.split(), [f"y{place}"], **attributes) for place, (op, operands, attributes) in enumerate(steps)]
    outputs = [helper.make_tensor_value_info(f"y{len(steps) - 1}", TensorProto.FLOAT, None)]
    return helper.make_model(helper.make_graph(nodes, "g", inputs, outputs, constants), opset_imports=[helper.make_opsetid("", 18)])


def _branching() -> Any:
    model = _model([("If", "x", {})], x=[])
    model.graph.input[0].type.tensor_type.elem_type = TensorProto.BOOL
    for name, count in (("then_branch", _COUNT), ("else_branch", 1)):
        branch = _model([("ConstantOfShape", "n", {})], n=[count]).graph
        branch.node[0].output[0] = branch.output[0].name = name
        model.graph.node[0].attribute.append(helper.make_attribute(name, branch))
    return model


def _of_integers(count: int) -> Any:
    model = _model([("Sub", "x n", {})], x=[count], n=[1])
    for value in (*model.graph.input, *model.graph.output):
        value.type.tensor_type.elem_type = TensorProto.INT64
    return model


def _claiming(dims: list[int]) -> Any:
    model = _model([("Neg", "one", {})], one=np.ones(1, np.float32))
    model.graph.initializer[0].dims[:] = dims
    return model
