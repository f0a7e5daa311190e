"""Arithmetic on sizes that are known at the call only, values made of it, and assertions on them."""

import operator

import torch

from ...ir.symbols import hint
from ..builder import Builder, Rejected
from ..values import Value
from .registry import maker

aten = torch.ops.aten


def _dynamic(b: Builder) -> tuple[Value, int]:
    """A value with a symbolic size, and its dim.

    Raises:
        Rejected: there is none.
    """
    found = [(value, dim) for value in b.values for dim, size in enumerate(value.shape) if not isinstance(size, int)]
    if not found:
        raise Rejected
    return b.choices.pick(found)


@maker("sizes", weight=2)
def made_of_a_size(b: Builder) -> Value:
    value, dim = _dynamic(b)
    size = b.size(value, dim)
    kind = b.choices.pick(("arange", "full", "longer", "twice", "half", "mask"))
    if kind == "full":
        return b.call(aten.full.default, [size, 2], 0.5, low=0.5, high=0.5)
    derived = size
    if kind == "longer":
        derived = b.size_call(operator.add, size, 1)
    elif kind == "twice":
        derived = b.size_call(operator.mul, size, 2)
    elif kind == "half":
        derived = b.size_call(operator.floordiv, size, 2)
    places = b.call(aten.arange.default, derived, low=0.0, high=float(2 * hint(value.shape[dim])))
    if kind != "mask":
        return places
    column = b.call(aten.unsqueeze.default, places, 1, low=places.low, high=places.high)
    return b.call(aten.le.Tensor, places, column, low=0.0, high=1.0)


@maker("sizes")
def scaled_by_a_size(b: Builder) -> Value:
    value, dim = _dynamic(b)
    x = b.within(b.operand(), 50.0)
    return b.call(aten.mul.Tensor, x, b.size(value, dim), low=-5000.0, high=5000.0)


@maker("sizes", weight=2)
def assertion(b: Builder) -> None:
    """One that the ranges of symbols prove, or only the sizes of the call do."""
    value, dim = _dynamic(b)
    size = b.size(value, dim)
    kind = b.choices.pick(("range", "bound", "half"))
    if kind == "range":
        b.check(aten.sym_constrain_range_for_size.default, size, min=b.choices.pick((0, 2)), max=b.choices.pick((None, 2**62)))
        return
    if kind == "half":  # no range tells that a half is the smaller
        half = b.size_call(operator.floordiv, size, 2)
        b.check(aten._assert_scalar.default, b.size_call(operator.le, half, size), "a half is too large")
        return
    compare, number = b.choices.pick(((operator.ge, 2), (operator.ge, 0), (operator.ne, 1), (operator.le, 2**62)))
    b.check(aten._assert_scalar.default, b.size_call(compare, size, number), "a size is out of range")
