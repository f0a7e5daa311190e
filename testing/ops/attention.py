"""Attention whole, with each kind of mask, shared key heads, and causal attention that is told its rows."""

import torch

from ...ir.symbols import hint
from ..builder import Builder
from ..values import Value
from .registry import maker

aten, gw = torch.ops.aten, torch.ops.gw


def heads(b: Builder) -> Value:
    """Queries [B, H, L, E] that are small enough for scores to be so."""
    known = [v for v in b.values if v.rank == 4 and v.is_float and isinstance(v.shape[-1], int) and 0 not in v.shape]
    if known and b.choices.chance(60):
        return b.within(b.choices.pick(known), 10.0)
    length = b.choices.pick((5, 8, 3, 1, 16))
    batch = b.choices.pick((2, 1))
    return b.within(b.leaf((batch, b.choices.pick((2, 4, 1)), length, b.choices.pick((4, 8, 16))), torch.float32), 10.0)


def keys_for(b: Builder, q: Value, count: int | None = None) -> tuple[Value, Value, bool]:
    """Keys and values for `q`, of `count` heads or fewer than it has, and whether they are fewer."""
    batch, own, length, depth = q.shape
    shared = isinstance(own, int) and own % 2 == 0 and b.choices.chance(25)
    sizes = (batch, own // 2 if shared else own, length if b.choices.chance(60) else b.choices.pick((6, 3, 1)), depth)
    k, v = (b.leaf(sizes, q.dtype) for _ in range(2))
    return b.within(k, 10.0), v, shared


@maker("attention", weight=4)
def scaled_dot_product(b: Builder) -> Value:
    q = heads(b)
    k, v, shared = keys_for(b, q)
    kind = b.choices.pick(("none", "causal", "boolean", "additive"))
    options = {"enable_gqa": True} if shared else {}
    if b.choices.chance(30):
        options["scale"] = b.choices.pick((0.5, 1.0, 0.125))  # type: ignore[assignment]
    mask = None if kind in ("none", "causal") else _mask(b, q, k, boolean=kind == "boolean")
    return b.call(aten.scaled_dot_product_attention.default, q, k, v, mask, 0.0, kind == "causal", low=v.low, high=v.high, **options)


def _mask(b: Builder, q: Value, k: Value, *, boolean: bool) -> Value:
    """[L, S], or with dims of heads and batch that broadcast. Rows that see nothing give NaN, which is another kind of test."""
    shape = (*b.choices.pick(((), (1, 1), q.shape[:1] + (1,), q.shape[:2])), q.shape[2], k.shape[2])
    if not boolean:
        return b.within(b.leaf(shape, q.dtype), 20.0)
    seen = b.leaf(shape, torch.bool)
    column = b.call(aten.full.default, [1], True, dtype=torch.bool, low=1.0, high=1.0)
    return b.call(aten.logical_or.default, seen, column, low=0.0, high=1.0) if b.choices.chance(20) else _first_seen(b, seen)


def _first_seen(b: Builder, mask: Value) -> Value:
    """The mask with the first key seen by all."""
    first = b.call(aten.slice.Tensor, mask, -1, 0, 1, low=0.0, high=1.0)
    ones = b.call(aten.ones_like.default, first, low=1.0, high=1.0)
    return b.call(aten.slice_scatter.default, mask, ones, mask.rank - 1, 0, 1, low=0.0, high=1.0)


@maker("attention", weight=2)
def causal_by_rows(b: Builder) -> Value:
    q = heads(b)
    k, v, shared = keys_for(b, q)
    argument = b.size(q, 2)
    rows = b.call(aten.arange.default, argument, low=0.0, high=float(hint(q.shape[2])))
    return b.call(gw.causal_attention.default, q, k, v, rows, b.choices.pick((None, 0.5)), shared, low=v.low, high=v.high)


@maker("attention")
def spelled_out(b: Builder) -> Value:
    q = heads(b)
    k, v, shared = keys_for(b, q)
    if shared:
        k, v = (b.call(aten.repeat_interleave.self_int, x, 2, 1, low=x.low, high=x.high) for x in (k, v))
    turned = b.call(aten.transpose.int, k, -2, -1, low=k.low, high=k.high)
    scores = b.call(aten.matmul.default, q, turned)
    scaled = b.call(aten.mul.Scalar, scores, 1 / max(hint(q.shape[-1]), 1) ** 0.5, low=-100.0, high=100.0)
    if b.choices.chance(40):
        mask = _mask(b, q, k, boolean=True)
        hidden = b.call(aten.logical_not.default, mask, low=0.0, high=1.0)
        scaled = b.call(aten.masked_fill.Scalar, scaled, hidden, b.choices.pick((float("-inf"), -1e4)), low=-1e4, high=100.0)
    weights = b.call(aten.softmax.int, scaled, -1, low=0.0, high=1.0)
    return b.call(aten.matmul.default, weights, v, low=v.low, high=v.high)
