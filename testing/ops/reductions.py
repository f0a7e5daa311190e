"""Operations along dims: sums, extremes and where they are, spreads, running sums, softmax."""

import torch

from ...ir.symbols import hint
from ..builder import Builder
from ..values import LIMIT, Value, numel
from .registry import maker

aten = torch.ops.aten

_FIRST = (aten.argmax.default, aten.argmin.default)
_SOFT = (aten.softmax.int, aten._softmax.default, aten.log_softmax.int, aten._log_softmax.default)


@maker("reductions", weight=3)
def sums(b: Builder) -> Value:
    x = b.operand(low=1)
    count = max(numel(x.shape), 1) * 4  # sizes at the call may be larger
    small = b.within(x, LIMIT / count)
    bound = small.bound * count
    keep = b.choices.chance(50)
    dims = _dims(b, small)
    kind = b.choices.pick(("sum", "mean", "sum of all", "mean of all", "sum of none"))
    if kind == "sum of all":
        return b.call(aten.sum.default, small, low=-bound, high=bound)
    if kind == "mean of all":
        return b.call(aten.mean.default, _filled(b, small), low=small.low, high=small.high)
    if kind == "sum of none":
        return b.call(aten.sum.dim_IntList, small, b.choices.pick(([], None)), keep, low=-bound, high=bound)
    if kind == "sum":
        dtype = {"dtype": b.float_dtype()} if b.choices.chance(15) else {}
        return b.call(aten.sum.dim_IntList, small, dims, keep, low=-bound, high=bound, **dtype)
    return b.call(aten.mean.dim, _filled(b, small), dims, keep, low=small.low, high=small.high)


@maker("reductions")
def extremes(b: Builder) -> Value:
    x = _filled(b, b.operand(low=1))
    target = b.choices.pick((aten.amax.default, aten.amin.default))
    return b.call(target, x, _dims(b, x), b.choices.chance(50), low=x.low, high=x.high)


@maker("reductions")
def extremes_and_places(b: Builder) -> list[Value]:
    x = _filled(b, b.operand(low=1))
    target, dim = b.choices.pick((aten.max.dim, aten.min.dim)), b.dim(x)
    return b.calls_of(target, x, dim, b.choices.chance(50), bounds=[(x.low, x.high), (0.0, float(hint(x.shape[dim])))])


@maker("reductions")
def places(b: Builder) -> Value:
    x = _filled(b, b.operand(low=1))
    dim = b.dim(x)
    return b.call(b.choices.pick(_FIRST), x, dim, b.choices.chance(50), low=0.0, high=float(hint(x.shape[dim])))


@maker("reductions")
def spread(b: Builder) -> Value | list[Value]:
    x = b.within(_filled(b, b.operand(low=1)), 50.0)
    dims, keep = _dims(b, x), b.choices.chance(50)
    kind = b.choices.pick(("var", "var_mean", "std", "norm", "logsumexp"))
    if kind == "norm":
        return b.call(aten.linalg_vector_norm.default, x, b.choices.pick((2, 1, float("inf"))), dims, keep, low=0.0, high=LIMIT)
    if kind == "logsumexp":
        return b.call(aten.logsumexp.default, x, dims, keep, low=-60.0, high=70.0)
    correction = {"correction": 0}  # of one element the unbiased variance is NaN
    if kind == "var_mean":
        return b.calls_of(aten.var_mean.correction, x, dims, correction=0, keepdim=keep, bounds=[(0.0, 2500.0), (x.low, x.high)])
    target = aten.var.correction if kind == "var" else aten.std.correction
    return b.call(target, x, dims, keepdim=keep, low=0.0, high=2500.0, **correction)


@maker("reductions")
def truth(b: Builder) -> Value:
    x = b.operand(lambda value: value.dtype == torch.bool, low=1, dtype=torch.bool)
    kind = b.choices.pick(("any", "all", "count"))
    if kind == "count":
        return b.call(aten.sum.dim_IntList, x, _dims(b, x), b.choices.chance(50), low=0.0, high=float(numel(x.shape)))
    return b.call(getattr(aten, kind).dim, x, b.dim(x), b.choices.chance(50), low=0.0, high=1.0)


@maker("reductions")
def running(b: Builder) -> Value:
    x = b.operand(low=1)
    dim = b.dim(x)
    if b.choices.chance(30):
        return b.call(aten.cumprod.default, b.within(x, 1.0), dim, low=-1.0, high=1.0)
    bound = LIMIT / max(4 * hint(x.shape[dim]), 1)
    return b.call(aten.cumsum.default, b.within(x, bound), dim)


@maker("reductions", weight=2)
def soft(b: Builder) -> Value:
    x = b.within(b.operand(low=1), 50.0)
    target, dim = b.choices.pick(_SOFT), b.dim(x)
    more = (False,) if "_softmax.default" in str(target) and str(target).startswith("aten._") else ()
    is_log = "log" in str(target)
    return b.call(target, x, dim, *more, low=-LIMIT if is_log else 0.0, high=0.0 if is_log else 1.0)


def _dims(b: Builder, x: Value) -> list[int]:
    """One dim or several, counted from either end."""
    chosen = b.choices.subset(range(x.rank), 40) or [b.dim(x)]
    return [dim - x.rank if b.choices.chance(30) and dim >= 0 else dim for dim in chosen]


def _filled(b: Builder, x: Value) -> Value:
    """`x`, which has elements, or another value that has: means and extremes of nothing are not defined."""
    if not any(isinstance(size, int) and size == 0 for size in x.shape):
        return x
    return b.leaf((2, 3), x.dtype)
