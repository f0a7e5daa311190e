"""Regions as loops: a round runs the body on a slice, and gives its results to sequences, which are joined behind the loop."""

from typing import Any

import torch

from ...infer import contiguous_stride, fake_like
from ...program import Node
from ...region_call import RegionCall
from ...symbols import Symbol
from ..dtypes import element_type
from .lower import Lowering, Site, region_size
from .own_sizes import new_symbol, of_own_sizes
from .translate import Piece, Translated


def body(lowering: Lowering, site: Site) -> Piece:
    """The piece of a region's body at the sizes of a slice: numbers where all slices are equal, else those of a symbol's length."""
    call = RegionCall.of(site.call)
    units, count = region_size(call)
    count = max(1, min(count, units))
    symbols = lowering.symbols
    length: Any = units // count
    if units % count:
        length = new_symbol(symbols, Symbol("slice", 1, units, -(-units // count)))
    types = []
    for operand, dim in zip(call.operands, call.in_dims, strict=True):
        value = operand.meta["val"]
        shape = list(value.shape)
        if dim >= 0 and units:
            shape[dim] = shape[dim] // units * length
        types.append(fake_like(symbols, value.dtype, shape, contiguous_stride(shape), value.device))
    return lowering.body(call, of_own_sizes(symbols, types))


def loop(site: Site, inputs: dict[Node, Any], part: Translated, nodes: list[Any]) -> tuple[list[Any], list[Any]]:
    """The nodes of the loop, and the region's results. Slice k of n is the units [k N // n, (k + 1) N // n)."""
    import onnx_ir as ir

    call = RegionCall.of(site.call)
    units, count = region_size(call)
    count = max(1, min(count, units))
    number = ir.Value(name=None, type=ir.TensorType(ir.DataType.INT64), shape=ir.Shape([]))
    going = ir.Value(name=None, type=ir.TensorType(ir.DataType.BOOL), shape=ir.Shape([]))
    inner: list[Any] = []
    make = _Maker(inner)
    begin, end = (make.units(number, step, units, count) for step in (0, 1))
    for value, operand, dim in zip(part.inputs, site.args[4:], call.in_dims, strict=True):
        outer = inputs[operand]
        per_unit = operand.meta["val"].size(dim) // units if dim >= 0 and units else 0
        narrowed = make.slice(outer, dim, begin, end, per_unit) if per_unit else outer
        ir.convenience.replace_all_uses_with(value, narrowed)
        part.outputs[:] = [narrowed if each is value else each for each in part.outputs]
    inner += nodes
    kinds = [ir.SequenceType(ir.TensorType(output.dtype)) for output in part.outputs]
    before = [ir.Value(name=None, type=kind) for kind in kinds]
    after = [
        make("SequenceInsert", [sequence, output], type=kind) for sequence, output, kind in zip(before, part.outputs, kinds, strict=True)
    ]
    again = make("Identity", [going], type=ir.TensorType(ir.DataType.BOOL))
    graph = ir.Graph([number, going, *before], [again, *after], nodes=inner, name="slices")
    made: list[Any] = []
    outside = _Maker(made)
    empty = [outside("SequenceEmpty", [], {"dtype": int(element_type(whole.dtype))}) for whole in call.outputs]
    rounds = outside.constant(count)
    runs = ir.Node("", "Loop", [rounds, None, *empty], [ir.AttrGraph("body", graph)], num_outputs=len(empty))
    made.append(runs)
    results = [outside("ConcatFromSequence", [parts], {"axis": dim}) for parts, dim in zip(runs.outputs, call.out_dims, strict=True)]
    return made, results


class _Maker:
    """Adds nodes to a list."""

    def __init__(self, nodes: list[Any]):
        self.nodes = nodes

    def __call__(self, op_type: str, inputs: list[Any], attributes: dict[str, Any] | None = None, type: Any = None) -> Any:
        import onnx_ir as ir

        node = ir.node(op_type, inputs, attributes or {})
        self.nodes.append(node)
        if type is not None:
            node.outputs[0].type = type
        return node.outputs[0]

    def constant(self, value: Any) -> Any:
        import onnx_ir as ir

        return self("Constant", [], {"value": ir.tensor(torch.tensor(value, dtype=torch.int64).numpy())})

    def units(self, number: Any, step: int, units: int, count: int) -> Any:
        """(number + step) * units // count, as i64[1]."""
        later = self("Add", [number, self.constant(step)]) if step else number
        unit = self("Div", [self("Mul", [later, self.constant(units)]), self.constant(count)])
        return self("Reshape", [unit, self.constant([1])])

    def slice(self, value: Any, dim: int, begin: Any, end: Any, per_unit: int) -> Any:
        if per_unit != 1:
            begin, end = (self("Mul", [each, self.constant(per_unit)]) for each in (begin, end))
        return self("Slice", [value, begin, end, self.constant([dim])])
