"""Operations that are neither pointwise nor reductions: what they are at one position of their result.

Each takes the tracer, the node and the position, and returns a value of the plan.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from ...ir import Node
from .index import Index, Size
from .pointwise import NotFusible, arguments_of
from .values import Condition, Value, compute_dtype, packet_of
from .views import Indices, shape_of

if TYPE_CHECKING:
    from .plan import Tracer

aten, gw = torch.ops.aten, torch.ops.gw

MAX_PARTIALS = 8  # of merged statistics, a loop unrolled in the text


def _stack(tracer: "Tracer", node: Node, index: Indices) -> Any:
    """A concatenation of pieces that have one element along the new dim."""
    arguments = arguments_of(node)
    dim = arguments["dim"] % len(index)
    pieces = [(1, lambda position, piece=piece: (piece, (*index[:dim], *index[dim + 1 :]))) for piece in arguments["tensors"]]
    return _joined(tracer, node, index[dim], pieces)


def _cat(tracer: "Tracer", node: Node, index: Indices) -> Any:
    arguments = arguments_of(node)
    dim = arguments["dim"] % len(index)
    pieces = [
        (shape_of(piece)[dim], lambda position, piece=piece: (piece, (*index[:dim], position, *index[dim + 1 :])))
        for piece in arguments["tensors"]
        if piece.meta["val"].dim() == len(index)
    ]
    return _joined(tracer, node, index[dim], pieces)


def _joined(tracer: "Tracer", node: Node, at: Index, pieces: Sequence[tuple[Size, Any]]) -> Any:
    """The piece that the position `at` falls in: each is loaded there, and nowhere else."""
    dtype = compute_dtype(node.meta["val"].dtype)
    if len(pieces) > 8:
        raise NotFusible("a concatenation of more than 8")
    start: Size = 0
    parts: list[tuple[Size, Any]] = []
    outer = tracer.guard
    for number, (size, locate) in enumerate(pieces):
        is_last = number == len(pieces) - 1
        tracer.guard = (*outer, Condition(at, start if number else None, None if is_last else start + size))
        try:
            parts.append((start + size, tracer.cast(tracer.value(*locate(at + (start * -1))), dtype, node)))
        finally:
            tracer.guard = outer
        start = start + size
    result = parts[-1][1]
    for end, value in reversed(parts[:-1]):
        before = tracer.add(Value("inside", torch.bool, guard=(Condition(at, None, end),), name="before", node=node))
        result = tracer.apply("tl.where({0}, {1}, {2})", [before, value, result], dtype, node)
    return result


def _arange(tracer: "Tracer", node: Node, index: Indices) -> Any:
    arguments = arguments_of(node)
    start, step = arguments.get("start", 0), arguments.get("step", 1)
    dtype = node.meta["val"].dtype
    if isinstance(start, Node) or isinstance(step, Node) or not index[0].terms:
        raise NotFusible("a range that starts at a size")
    position = tracer.add(Value("index", torch.int64, index=index[0], name="position", node=node))
    wide = compute_dtype(dtype)
    value = tracer.cast(position, wide, node)
    if (start, step) == (0, 1):
        return value
    return tracer.apply("{1} + {2} * {0}", [value, tracer.number(start, wide), tracer.number(step, wide)], wide, node)


def _full(tracer: "Tracer", node: Node, index: Indices) -> Any:
    arguments = arguments_of(node)
    value = arguments.get("fill_value", 0 if "zeros" in packet_of(node) else 1)
    return tracer.number(value, compute_dtype(node.meta["val"].dtype))


def _norm_apply(tracer: "Tracer", node: Node, index: Indices) -> Any:
    """(x - mean) * rsqrt(M2 / k + eps) * weight + bias; the partial statistics are merged as `ir.ops.norm.merge_stats` does."""
    x, stats, weight, bias, groups, eps = (arguments_of(node)[n] for n in ("x", "stats", "weight", "bias", "groups", "eps"))
    channels, partials = shape_of(x)[1], shape_of(stats)[0]
    if not isinstance(channels, int) or not isinstance(partials, int) or partials > MAX_PARTIALS:
        raise NotFusible("statistics of unknown number")
    group = index[1].divided(channels // groups)[0]
    dtype = stats.meta["val"].dtype

    def part(p: int, which: int) -> Any:
        return tracer.cast(tracer.value(stats, (Index((), p), index[0], group, Index((), which))), dtype, node)

    def apply(text: str, operands: list[Any], name: str = "") -> Any:
        return tracer.apply(text, operands, dtype, node, name=name)

    count, mean, m2 = (part(0, which) for which in range(3))
    for p in range(1, partials):
        count_b, mean_b, m2_b = (part(p, which) for which in range(3))
        total = apply("{0} + {1}", [count, count_b], "count")
        delta = apply("{0} - {1}", [mean_b, mean], "delta")
        m2 = apply("{0} + {1} + {2} * {2} * ({3} * {4} / {5})", [m2, m2_b, delta, count, count_b, total], "m2")
        mean = apply("{0} + {1} * ({2} / {3})", [mean, delta, count_b, total], "mean")
        count = total
    rstd = apply("tl.rsqrt({0} / {1} + {2})", [m2, count, float(eps)], "rstd")
    result = apply("({0} - {1}) * {2}", [tracer.cast(tracer.value(x, index), dtype, node), mean, rstd])
    for parameter, text in ((weight, "{0} * {1}"), (bias, "{0} + {1}")):
        if parameter is not None:
            result = apply(text, [result, tracer.cast(tracer.value(parameter, index[1:2]), dtype, node)])
    return tracer.cast(result, compute_dtype(node.meta["val"].dtype), node)


SPECIAL: dict[Any, Any] = {
    aten.cat.default: _cat,
    aten.stack.default: _stack,
    aten.arange.default: _arange,
    aten.arange.start: _arange,
    aten.arange.start_step: _arange,
    aten.full.default: _full,
    aten.zeros.default: _full,
    aten.ones.default: _full,
    aten.zeros_like.default: _full,
    aten.ones_like.default: _full,
    aten.full_like.default: _full,
    gw.norm_apply.default: _norm_apply,
}
