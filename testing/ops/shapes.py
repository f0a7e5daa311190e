"""Views and rearrangements: what changes places of elements and not their values."""

from typing import Any

import torch

from ...ir.symbols import hint
from ..builder import Builder, Rejected
from ..values import Value
from .registry import maker

aten = torch.ops.aten
_RESHAPES = (aten.view.default, aten.reshape.default, aten._unsafe_view.default)


def _any(b: Builder, low: int = 0, high: int = 6) -> Value:
    return b.operand(lambda value: True, low=low, high=high)


def _moved(b: Builder, target: Any, x: Value, *args: Any, **kwargs: Any) -> Value:
    return b.call(target, x, *args, low=x.low, high=x.high, **kwargs)


def _sizes(b: Builder, x: Value) -> list[Any]:
    return [b.size(x, dim) for dim in range(x.rank)]


@maker("shapes", weight=3)
def reshape(b: Builder) -> Value:
    x = _any(b)
    target, sizes = b.choices.pick(_RESHAPES), _sizes(b, x)
    kind = b.choices.pick(("same", "flat", "merge", "split", "one more", "as if turned"))
    if kind == "as if turned":
        one, other = b.dim(x), b.dim(x)
        sizes[one], sizes[other] = sizes[other], sizes[one]
    elif kind == "merge" and x.rank > 1:
        at = b.choices.integer(0, x.rank - 2)
        both = x.shape[at] * x.shape[at + 1]
        sizes[at : at + 2] = [both if isinstance(both, int) else -1]
    elif kind == "split" and x.rank:
        at = b.choices.integer(0, x.rank - 1)
        size = b.static(x.shape[at])
        factor = b.choices.pick([f for f in (2, 1, 3, 4, 8) if size % f == 0])
        sizes[at : at + 1] = b.choices.pick(([factor, size // factor], [size // factor, factor]))
    elif kind == "one more":
        sizes.insert(b.choices.integer(0, x.rank), 1)
    elif kind == "flat":
        sizes = [-1] if all(isinstance(n, int) and n for n in x.shape) else sizes
    return _moved(b, target, x, sizes)


@maker("shapes", weight=2)
def flatten(b: Builder) -> Value:
    x = _any(b, low=1)
    if b.choices.chance(50):
        first = b.choices.integer(0, x.rank - 1)
        return _moved(b, aten.flatten.using_ints, x, first, b.choices.integer(first, x.rank - 1))
    dim = b.choices.integer(0, x.rank - 1)
    size = b.static(x.shape[dim])
    factor = b.choices.pick([f for f in (2, 1, 3, 4) if size % f == 0])
    return _moved(b, aten.unflatten.int, x, dim, [factor, size // factor])


@maker("shapes", weight=3)
def permute(b: Builder) -> Value:
    x = _any(b, low=1)
    kind = b.choices.pick(("transpose", "permute", "t", "movedim"))
    if kind == "t":
        matrix = _any(b, low=1, high=2)
        return _moved(b, aten.t.default, matrix)
    if kind == "transpose":
        return _moved(b, aten.transpose.int, x, b.dim(x), b.dim(x))
    if kind == "movedim":
        return _moved(b, aten.movedim.int, x, b.dim(x), b.dim(x))
    left, order = list(range(x.rank)), []
    while left:
        order.append(left.pop(b.choices.integer(0, len(left) - 1)))
    return _moved(b, aten.permute.default, x, [dim - x.rank if b.choices.chance(20) else dim for dim in order])


@maker("shapes", weight=2)
def squeeze(b: Builder) -> Value:
    x = _any(b)
    kind = b.choices.pick(("unsqueeze", "dim", "dims", "all"))
    if kind == "unsqueeze":
        return _moved(b, aten.unsqueeze.default, x, b.choices.integer(-1, x.rank))
    if kind == "dim":
        return _moved(b, aten.squeeze.dim, x, b.dim(x))
    if kind == "dims":
        return _moved(b, aten.squeeze.dims, x, b.choices.subset(range(x.rank)))
    return _moved(b, aten.squeeze.default, x)


@maker("shapes", weight=2)
def expand(b: Builder) -> Value:
    x = _any(b)
    kind = b.choices.pick(("expand", "new dim", "repeat", "interleave"))
    if kind == "repeat":
        return _moved(b, aten.repeat.default, x, [*([2] if b.choices.chance(30) else []), *(b.choices.pick((1, 2)) for _ in x.shape)])
    if kind == "interleave":
        return _moved(b, aten.repeat_interleave.self_int, x, b.choices.pick((2, 1, 3)), b.dim(x))
    sizes = [3 if size == 1 and b.choices.chance(60) else -1 if b.choices.chance(20) else own for size, own in zip(x.shape, _sizes(b, x))]
    if kind == "new dim":
        sizes = [b.choices.pick((2, 1, 4)), *sizes]
    return _moved(b, aten.expand.default, x, sizes)


@maker("shapes", weight=3)
def slices(b: Builder) -> Value:
    x = _any(b, low=1)
    dim = b.dim(x)
    size = hint(x.shape[dim])
    kind = b.choices.pick(("slice", "select", "narrow", "rest"))
    if kind == "select":
        if not size:
            raise Rejected
        return _moved(b, aten.select.int, x, dim, b.choices.integer(-1 if isinstance(x.shape[dim], int) else 0, min(size, 2) - 1))
    if kind == "rest" or not isinstance(x.shape[dim], int):
        return _moved(b, aten.slice.Tensor, x, dim, b.choices.pick((0, 1)), 2**63 - 1, b.choices.pick((1, 2)))
    begin = b.choices.integer(0, size)
    end = b.choices.integer(begin, size)
    if kind == "narrow":
        return _moved(b, aten.narrow.default, x, dim, begin, end - begin)
    return _moved(
        b, aten.slice.Tensor, x, dim, begin, end - size if b.choices.chance(20) and end < size else end, b.choices.pick((1, 2, 3))
    )


@maker("shapes", weight=2)
def parts(b: Builder) -> list[Value]:
    x = _any(b, low=1)
    dim = b.dim(x)
    size = b.static(x.shape[dim])
    bounds = [(x.low, x.high)]
    kind = b.choices.pick(("chunk", "split", "split_with_sizes", "unbind"))
    if kind == "chunk":
        return b.calls_of(aten.chunk.default, x, b.choices.pick((2, 3, 1)), dim, bounds=bounds)
    if kind == "split":
        return b.calls_of(aten.split.Tensor, x, max(1, size // 2), dim, bounds=bounds)
    if kind == "unbind" and size <= 8:
        return b.calls_of(aten.unbind.int, x, dim, bounds=bounds)
    first = b.choices.integer(0, size)
    return b.calls_of(aten.split_with_sizes.default, x, [first, size - first], dim, bounds=bounds)


@maker("shapes", weight=2)
def joined(b: Builder) -> Value:
    x = _any(b, low=1)
    others = [b.like(x) for _ in range(b.choices.pick((1, 2)))]
    low, high = min(v.low for v in (x, *others)), max(v.high for v in (x, *others))
    if b.choices.chance(40):
        return b.call(aten.stack.default, [x, *others], b.dim(x), low=low, high=high)
    dim = b.dim(x)
    if b.choices.chance(40):  # of another length there
        shape = list(x.shape)
        shape[dim] = b.choices.pick((1, 2, 0, 5))
        others.append(b.leaf(shape, x.dtype))
        low, high = min(low, others[-1].low), max(high, others[-1].high)
    return b.call(aten.cat.default, [x, *others], dim, low=low, high=high)


@maker("shapes")
def padded(b: Builder) -> Value:
    x = b.operand(low=1, high=5)
    places = b.choices.integer(1, min(x.rank, 2))
    amounts = [b.choices.pick((1, 0, 2)) for _ in range(2 * places)]
    mode = b.choices.pick(("constant", "constant", "reflect", "replicate"))
    number = b.choices.pick((0.0, 1.5))
    if mode == "constant":
        return b.call(aten.constant_pad_nd.default, x, amounts, number, low=min(x.low, number), high=max(x.high, number))
    return _moved(b, aten.pad.default, x, amounts, mode)


@maker("shapes")
def turned(b: Builder) -> Value:
    x = _any(b, low=1)
    kind = b.choices.pick(("flip", "roll", "tril", "triu", "diagonal", "unfold"))
    if kind == "flip":
        return _moved(b, aten.flip.default, x, [b.dim(x)])
    if kind == "roll":
        return _moved(b, aten.roll.default, x, [b.choices.pick((1, -1, 2))], [b.dim(x)])
    if kind == "unfold":
        return _moved(b, aten.unfold.default, x, b.dim(x), b.choices.pick((2, 1)), b.choices.pick((1, 2)))
    matrix = _any(b, low=2)
    offset = b.choices.pick((0, 1, -1))
    if kind == "diagonal":
        return _moved(b, aten.diagonal.default, matrix, offset, -2, -1)
    target = aten.tril.default if kind == "tril" else aten.triu.default
    return b.call(target, matrix, offset, low=min(matrix.low, 0.0), high=max(matrix.high, 0.0))
