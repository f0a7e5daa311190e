"""Low-bit weights as the standard has them: DequantizeLinear of INT4, INT8 or FLOAT8E4M3FN codes with a scale a block, as large as in the
artifact.

The standard has FLOAT4E2M1 too, from opset 23 on, of which onnxruntime 1.32 has no kernel on a CPU: such codes are UINT4, which a table
reads.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from ...low_bit.elements import E2M1_VALUES
from ...low_bit.formats import Format, format_of
from ...program import Node
from ..dtypes import element_type

_E2M1 = np.array([*E2M1_VALUES, *(-value for value in E2M1_VALUES)], np.float32) + 0.0  # no -0


def _format(node: Node) -> Format:
    return format_of(node.kwargs["weight_format"])


def has_standard_weight(node: Node) -> bool:
    """Whether a call is a layer whose weight is one of the program's, of codes that the standard has."""
    if node.target is not torch.ops.gw.lowrank_linear.default or node.kwargs.get("weight_format") == "none":
        return False
    if node.args[0].meta["val"].dtype == torch.float64 or any(each is None or each.op != "get_attr" for each in node.args[1:3]):
        return False
    form = _format(node)
    return (form.element, form.bits) in (("int", 4), ("int", 8), ("e4m3", 8), ("e2m1", 4))


def weight_shape(node: Node) -> tuple[int, int]:
    """[N, K] of the weight."""
    rows, columns = node.args[1].meta["val"].shape
    return int(rows), int(columns) * (2 if _format(node).is_packed else 1)


def codes(node: Node, tensor: torch.Tensor, name: str) -> Any:
    """The codes of a layer's weight as an ONNX tensor: as they lie in the program, the even column in the low half of a byte."""
    import onnx_ir as ir

    if not _format(node).is_packed:
        return ir.tensor(tensor.contiguous(), name=name)
    packed, kind = tensor.contiguous().numpy().reshape(-1), ir.DataType.INT4 if _format(node).element == "int" else ir.DataType.UINT4
    return ir.PackedTensor(packed, kind, shape=ir.Shape(weight_shape(node)), name=name)


def dequantized(node: Node, inputs: list[Any]) -> list[Any]:
    """The nodes that make float32 weights of codes, scales and the tensor's scale, where there is one; the last gives them."""

    make = _Maker([])
    scales = _scales(make, _format(node), *inputs[1:])
    rows, columns = weight_shape(node)
    # A row with one scale is a block too. As a scale for each index of dim 0, onnxruntime 1.32 reads it right without its optimizer
    # alone: with it, the product behind becomes one that quantizes its other operand.
    block = _format(node).group_of(columns)
    if _format(node).element != "e2m1":
        make("DequantizeLinear", inputs[0], scales, axis=1, block_size=block)
        return make.nodes
    numbers = make("Gather", make.constant(_E2M1), make("Cast", inputs[0], to=element_type(torch.int64)))
    blocks = make("Reshape", numbers, make.constant(np.array([rows, columns // block, block])))
    weights = make("Mul", blocks, make("Unsqueeze", scales, make.constant(np.array([2]))))
    make("Reshape", weights, make.constant(np.array([rows, columns])))
    return make.nodes


def _scales(make: "_Maker", form: Format, scale: Any, scale2: Any = None) -> Any:
    """Float32 scales [N, K/g] of stored ones."""
    if form.scale == "e8m0":  # 2^(e - 127) from a table: Pow may be off
        powers = make.constant(np.exp2(np.arange(256) - 127.0).astype(np.float32))
        return make("Gather", powers, make("Cast", scale, to=element_type(torch.int64)))
    wide = make("Cast", scale, to=element_type(torch.float32))
    if form.scale != "nv" or scale2 is None:
        return wide
    return make("Mul", wide, make("Reshape", scale2, make.constant(np.array([-1, 1]))))  # one for all rows, or one each


@dataclass(frozen=True)
class _Maker:
    """Adds nodes to a list."""

    nodes: list[Any]

    def __call__(self, op_type: str, *inputs: Any, **attributes: Any) -> Any:
        import onnx_ir as ir

        self.nodes.append(ir.node(op_type, inputs, attributes))
        return self.nodes[-1].outputs[0]

    def constant(self, value: np.ndarray) -> Any:
        import onnx_ir as ir

        return self("Constant", value=ir.tensor(value))
