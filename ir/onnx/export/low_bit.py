"""Low-bit weights as the standard has them: DequantizeLinear of INT4 or INT8 codes with a scale a block, as large as in the artifact."""

from typing import Any

import torch

from ...low_bit.formats import Format, format_of
from ...program import Node
from ...symbols import SymbolTable  # noqa: F401
from ..dtypes import element_type


def _format(node: Node) -> Format:
    return format_of(node.kwargs["weight_format"])


def has_standard_weight(node: Node) -> bool:
    """Whether a call is a layer whose weight is one of the program's, of integers that the standard has, with scales that it has."""
    if node.target is not torch.ops.gw.lowrank_linear.default or node.kwargs.get("weight_format") == "none":
        return False
    if node.args[0].meta["val"].dtype == torch.float64 or any(each is None or each.op != "get_attr" for each in node.args[1:3]):
        return False
    form = _format(node)
    return form.element == "int" and form.bits in (4, 8) and form.scale in ("model", "f32")


def weight_shape(node: Node) -> tuple[int, int]:
    """[N, K] of the weight."""
    rows, columns = node.args[1].meta["val"].shape
    return int(rows), int(columns) * (2 if _format(node).is_packed else 1)


def codes(node: Node, tensor: torch.Tensor, name: str) -> Any:
    """The codes of a layer's weight as an ONNX tensor: as they lie in the program, the even column in the low half of a byte."""
    import onnx_ir as ir

    if not _format(node).is_packed:
        return ir.tensor(tensor.contiguous(), name=name)
    packed = tensor.contiguous().numpy().reshape(-1)
    return ir.PackedTensor(packed, ir.DataType.INT4, shape=ir.Shape(weight_shape(node)), name=name)


def dequantized(node: Node, inputs: list[Any]) -> list[Any]:
    """The nodes that make float32 weights of codes and scales; the last gives them. Scales [N, K/g] of a whole row are [N]."""
    import onnx_ir as ir

    values, scale = inputs[:2]
    wide = ir.node("Cast", [scale], {"to": element_type(torch.float32)})
    # A row with one scale is a block too. As a scale for each index of dim 0, onnxruntime 1.32 reads it right without its optimizer
    # alone: with it, the product behind becomes one that quantizes its other operand.
    block = _format(node).group_of(weight_shape(node)[1])
    return [wide, ir.node("DequantizeLinear", [values, wide.outputs[0]], {"axis": 1, "block_size": block})]
