"""Regions as loops: a round runs the body on a slice, and gives its results to sequences, which are joined behind the loop."""

from typing import Any

import sympy
import torch

from ...infer import contiguous_stride, fake_like
from ...program import Node
from ...region_call import RegionCall
from ...symbols import UNBOUNDED, Symbol, SymbolTable, hint
from ..dtypes import element_type
from .lower import Lowering, Site, units_of, value_of
from .own_sizes import new_symbol, of_own_sizes
from .translate import Piece, Translated


def body(lowering: Lowering, site: Site) -> Piece:
    """The piece of a region's body at the sizes of a slice: numbers where all slices are equal, else those of a symbol's length."""
    call = RegionCall.of(site.call)
    units, count, symbols = units_of(call), value_of(call.count), lowering.symbols
    length = _length(symbols, units, count)
    types: list[Any] = []
    for operand, dim in zip(call.operands, call.in_dims, strict=True):
        value = operand.meta["val"]
        if not isinstance(value, torch.Tensor):
            types.append(value)
            continue
        shape = list(value.shape)
        if dim >= 0 and not (isinstance(units, int) and units == 0):
            shape[dim] = _per_unit(shape[dim], units) * length
        types.append(fake_like(symbols, value.dtype, shape, contiguous_stride(shape), value.device))
    return lowering.body(call, of_own_sizes(symbols, types))


def _length(symbols: SymbolTable, units: Any, count: Any) -> Any:
    """Units of a slice."""
    if not isinstance(units, int) or not isinstance(count, int):
        return new_symbol(symbols, Symbol("slice", 1, UNBOUNDED, max(1, hint(units) // max(1, hint(count)))))
    count = max(1, min(count, units))
    if units % count == 0:
        return units // count
    return new_symbol(symbols, Symbol("slice", 1, units, -(-units // count)))


def _per_unit(size: Any, units: Any) -> Any:
    """Elements of a unit along a dim of `size`, which is so many times `units`."""
    if isinstance(size, int) and isinstance(units, int):
        return size // units
    ratio = sympy.cancel(_expression(size) / _expression(units))
    return int(ratio) if ratio.is_Integer else size // units


def _expression(size: Any) -> sympy.Basic:
    return size.node.expr if isinstance(size, torch.SymInt) else sympy.Integer(size)


def loop(site: Site, inputs: dict[Node, Any], part: Translated, nodes: list[Any]) -> tuple[list[Any], list[Any]]:
    """The nodes of the loop, and the region's results. Slice k of n is the units [k N // n, (k + 1) N // n)."""
    import onnx_ir as ir

    call = RegionCall.of(site.call)
    made: list[Any] = []
    outside = _Maker(made)
    units = units_of(call)
    total, count = _units(outside, site, call, inputs), outside.number(inputs, site.args[3])
    rounds = outside.number(inputs, max(1, min(call.count, units))) if _are_known(units, call.count) else outside.at_most(count, total)
    number = ir.Value(name=None, type=ir.TensorType(ir.DataType.INT64), shape=ir.Shape([]))
    going = ir.Value(name=None, type=ir.TensorType(ir.DataType.BOOL), shape=ir.Shape([]))
    inner: list[Any] = []
    make = _Maker(inner)
    begin, end = (make.units(number, step, total, rounds) for step in (0, 1))
    for value, operand, dim in zip(part.inputs, site.args[4:], call.in_dims, strict=True):
        outer = inputs[operand]
        narrowed = outer
        if dim >= 0 and not (isinstance(units, int) and units == 0):
            per_unit = _per_unit(operand.meta["val"].size(dim), units)
            if not isinstance(per_unit, int):
                per_unit = outside("Div", [outside.size(outer, dim), total])
            narrowed = make.slice(outer, dim, begin, end, per_unit)
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
    empty = [outside("SequenceEmpty", [], {"dtype": int(element_type(whole.dtype))}) for whole in call.outputs]
    runs = ir.Node("", "Loop", [rounds, None, *empty], [ir.AttrGraph("body", graph)], num_outputs=len(empty))
    made.append(runs)
    results = [outside("ConcatFromSequence", [parts], {"axis": dim}) for parts, dim in zip(runs.outputs, call.out_dims, strict=True)]
    return made, results


def _are_known(units: Any, count: Any) -> bool:
    return isinstance(units, int) and isinstance(count, int)


def _units(make: "_Maker", site: Site, call: RegionCall, inputs: dict[Node, Any]) -> Any:
    """N, as i64[]: as declared, or read off an operand."""
    units = site.kwargs.get("units")
    if units is not None:
        return make.number(inputs, units)
    known = units_of(call)
    if isinstance(known, int):
        return make.constant(known)
    operand, dim = next((operand, dim) for operand, dim in zip(site.args[4:], call.in_dims, strict=True) if dim >= 0)
    return make.size(inputs[operand], dim)


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

    def number(self, inputs: dict[Node, Any], number: Any) -> Any:
        """A number, or a node of a size, as i64[]."""
        return self.constant(number) if isinstance(number, int) else inputs[number]

    def at_most(self, count: Any, units: Any) -> Any:
        """max(1, min(count, units))"""
        return self("Max", [self("Min", [count, units]), self.constant(1)])

    def size(self, value: Any, dim: int) -> Any:
        """The size of a dim, as i64[]."""
        return self("Squeeze", [self("Shape", [value], {"start": dim, "end": dim + 1})])

    def units(self, number: Any, step: int, units: Any, count: Any) -> Any:
        """(number + step) * units // count, as i64[1]."""
        later = self("Add", [number, self.constant(step)]) if step else number
        unit = self("Div", [self("Mul", [later, units]), count])
        return self("Reshape", [unit, self.constant([1])])

    def slice(self, value: Any, dim: int, begin: Any, end: Any, per_unit: Any) -> Any:
        if not isinstance(per_unit, int) or per_unit != 1:
            step = self.constant(per_unit) if isinstance(per_unit, int) else per_unit
            begin, end = (self("Mul", [each, step]) for each in (begin, end))
        return self("Slice", [value, begin, end, self.constant([dim])])
