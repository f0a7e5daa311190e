"""Operations whose places are data: look-ups, gathers and scatters, writes into part of a value, order."""

import torch

from ...ir.symbols import hint
from ..builder import Builder, Rejected
from ..values import LIMIT, Value
from .registry import maker

aten = torch.ops.aten


def _table(b: Builder, low: int = 1) -> Value:
    """A value with elements along each dim."""
    x = b.operand(lambda value: value.is_float and 0 not in value.shape, low=low)
    if 0 in x.shape:
        raise Rejected
    return x


@maker("indexing", weight=2)
def embedding(b: Builder) -> Value:
    count = b.choices.pick((8, 16, 1, 33))
    table = b.weight((count, b.choices.pick((4, 8, 1))), b.float_dtype())
    return b.call(aten.embedding.default, table, b.index(b.integer(high=3), count), low=table.low, high=table.high)


@maker("indexing", weight=2)
def selected(b: Builder) -> Value:
    x = _table(b)
    dim = b.dim(x)
    index = b.index(b.integer(low=1, high=1), x.shape[dim])
    return b.call(aten.index_select.default, x, dim, index, low=x.low, high=x.high)


@maker("indexing", weight=2)
def gathered(b: Builder) -> Value:
    x = _table(b)
    dim = b.dim(x)
    index = b.index(b.leaf(x.shape, torch.int64), x.shape[dim])
    kind = b.choices.pick(("gather", "take_along_dim"))
    if kind == "take_along_dim":
        return b.call(aten.take_along_dim.default, x, index, dim, low=x.low, high=x.high)
    return b.call(aten.gather.default, x, dim, index, low=x.low, high=x.high)


@maker("indexing", weight=2)
def indexed(b: Builder) -> Value:
    x = _table(b)
    dims = b.choices.subset(range(x.rank), 40) or [0]
    shape = b.choices.pick(((3,), (2, 1), (1,)))
    indices: list[Value | None] = [b.index(b.leaf(shape, torch.int64), x.shape[d]) if d in dims else None for d in range(max(dims) + 1)]
    return b.call(aten.index.Tensor, x, indices, low=x.low, high=x.high)


@maker("indexing", weight=2)
def scattered(b: Builder) -> Value:
    """Adding, whose order of sums is open, or one number at all places, for which duplicates do not matter."""
    x = b.within(_table(b), 100.0)
    dim = b.dim(x)
    kind = b.choices.pick(("add", "number", "reduce"))
    index = b.index(b.leaf(x.shape, torch.int64), x.shape[dim])
    if kind == "number":
        return b.call(aten.scatter.value, x, dim, index, 0.5, low=min(x.low, 0.5), high=max(x.high, 0.5))
    source = b.within(b.like(x), LIMIT / (2 * max(hint(x.shape[dim]), 1)))
    if kind == "add":
        return b.call(aten.scatter_add.default, x, dim, index, source)
    mode = b.choices.pick(("sum", "amax", "amin"))
    return b.call(aten.scatter_reduce.two, x, dim, index, source, mode, include_self=b.choices.chance(70))


@maker("indexing", weight=2)
def written(b: Builder) -> Value:
    """`index_put`, `index_add`, `index_copy` and `index_fill`; where values would be overwritten, places differ."""
    x = b.within(_table(b), 100.0)
    kind = b.choices.pick(("put", "accumulate", "add", "fill", "copy"))
    size = b.static(x.shape[0])
    if kind == "add":
        index = b.index(b.leaf((3,), torch.int64), size)
        return b.call(aten.index_add.default, x, 0, index, b.within(b.leaf((3, *x.shape[1:]), x.dtype), 100.0), low=-500.0, high=500.0)
    if kind == "fill":
        return b.call(
            aten.index_fill.int_Scalar, x, 0, b.index(b.leaf((2,), torch.int64), size), 0.25, low=min(x.low, 0.25), high=max(x.high, 0.25)
        )
    if kind == "accumulate":
        index = b.index(b.leaf((3,), torch.int64), size)
        return b.call(aten.index_put.default, x, [index], b.within(b.leaf((3, *x.shape[1:]), x.dtype), 100.0), True, low=-500.0, high=500.0)
    count = min(size, 3)
    apart = b.constant(torch.arange(size)[:count], 0.0, float(size - 1))
    source = b.leaf((count, *x.shape[1:]), x.dtype)
    low, high = min(x.low, source.low), max(x.high, source.high)
    if kind == "put":
        return b.call(aten.index_put.default, x, [apart], source, low=low, high=high)
    return b.call(aten.index_copy.default, x, 0, apart, source, low=low, high=high)


@maker("indexing", weight=2)
def part_written(b: Builder) -> Value:
    x = _table(b)
    dim = b.choices.integer(0, x.rank - 1)
    size = b.static(x.shape[dim])
    if b.choices.chance(40):
        place = b.choices.integer(0, size - 1)
        source = b.leaf([n for d, n in enumerate(x.shape) if d != dim], x.dtype)
        return b.call(aten.select_scatter.default, x, source, dim, place, low=min(x.low, source.low), high=max(x.high, source.high))
    begin = b.choices.integer(0, size - 1)
    end = b.choices.integer(begin, size)
    source = b.leaf([end - begin if d == dim else n for d, n in enumerate(x.shape)], x.dtype)
    return b.call(aten.slice_scatter.default, x, source, dim, begin, end, low=min(x.low, source.low), high=max(x.high, source.high))


@maker("indexing")
def ordered(b: Builder) -> list[Value] | Value:
    x = _table(b)
    dim = b.dim(x)
    size = b.static(x.shape[dim])
    kind = b.choices.pick(("topk", "sort", "argsort"))
    bounds = [(x.low, x.high), (0.0, float(size - 1))]
    if kind == "topk":
        return b.calls_of(aten.topk.default, x, b.choices.integer(1, min(size, 4)), dim, b.choices.chance(80), True, bounds=bounds)
    if kind == "sort":
        return b.calls_of(aten.sort.stable, x, stable=True, dim=dim, descending=b.choices.chance(50), bounds=bounds)
    return b.call(aten.argsort.stable, x, stable=True, dim=dim, low=0.0, high=float(size - 1))


@maker("indexing")
def one_hot(b: Builder) -> Value:
    count = b.choices.pick((4, 8))
    wide = b.call(aten.unsqueeze.default, b.index(b.integer(high=3), count), -1, low=0.0, high=float(count))
    classes = b.call(aten.arange.default, count, low=0.0, high=float(count))
    return b.call(aten.eq.Tensor, wide, classes, low=0.0, high=1.0)
