"""Products of matrices: layers, plain and batched products, with biases and weights that several calls share."""

import torch

from ...ir.symbols import hint
from ..builder import Builder, Rejected
from ..values import LIMIT, Value
from .registry import maker

aten = torch.ops.aten


def fitting(b: Builder, x: Value, terms: int, other: float = 3.0) -> Value:
    """`x` scaled so that sums over `terms` products with factors up to `other` stay in range."""
    return b.within(x, LIMIT / max(4 * terms * other, 1))


def sum_bound(x: Value, terms: int) -> float:
    """What a sum over `terms` products of elements of `x` with weights, and a bias, stays within."""
    return min(3.0 * terms * x.bound + 3.0, LIMIT)


@maker("products", weight=4)
def linear(b: Builder) -> Value:
    x = b.operand(low=1)
    depth = b.static(x.shape[-1])
    return layer(b, x, b.choices.pick((4, 8, 1, 3, 16, depth)))


def layer(b: Builder, x: Value, width: int) -> Value:
    """x @ W.T + bias, on a weight of its own or, at times, on one that another layer has."""
    depth = b.static(x.shape[-1])
    small = fitting(b, x, depth)
    shared = [v for v in b.values if v.node.op == "get_attr" and v.dtype == x.dtype and v.shape == (width, depth)]
    weight = b.choices.pick(shared) if shared and b.choices.chance(40) else b.weight((width, depth), x.dtype)
    bias = [b.weight((width,), x.dtype)] if b.choices.chance(60) else []
    bound = sum_bound(small, depth)
    return b.call(aten.linear.default, small, weight, *bias, low=-bound, high=bound)


@maker("products", weight=2)
def matmul(b: Builder) -> Value:
    x = b.operand(low=2)
    depth = x.shape[-1]
    small = fitting(b, x, hint(depth), 128.0)
    known = [v for v in b.values if v.dtype == x.dtype and v.rank >= 2 and b.same_shape(v.shape[-2:-1], (depth,))]
    other = b.choices.pick(known) if known and b.choices.chance(50) else b.leaf((*x.shape[:-2], depth, b.choices.pick((3, 1, 8))), x.dtype)
    if b.choices.chance(30):  # by a transposed operand, as attention has it
        turned = b.leaf((*other.shape[:-2], other.shape[-1], depth), x.dtype)
        other = b.call(aten.transpose.int, turned, -2, -1, low=turned.low, high=turned.high)
    return b.call(aten.matmul.default, small, b.within(other, 128.0))


@maker("products", weight=2)
def plain(b: Builder) -> Value:
    x = b.operand(low=2, high=3)
    depth, width = x.shape[-1], b.choices.pick((4, 1, 8, 5))
    small = fitting(b, x, hint(depth), 128.0)
    other = b.leaf((*x.shape[:-2], depth, width), x.dtype)
    if x.rank == 3:
        if b.choices.chance(30):
            return b.call(aten.baddbmm.default, b.leaf((*x.shape[:-1], width), x.dtype), small, other)
        return b.call(aten.bmm.default, small, other)
    if b.choices.chance(50):
        return b.call(aten.mm.default, small, other)
    start = b.leaf(b.choices.pick(((width,), (1, width))), x.dtype)
    scales = {"alpha": 0.5, "beta": 2} if b.choices.chance(20) else {}
    return b.call(aten.addmm.default, start, small, other, **scales)


@maker("products")
def einsum(b: Builder) -> Value:
    x = b.operand(low=3, high=3)
    small = fitting(b, x, hint(x.shape[-1]), 128.0)
    other = b.leaf((x.shape[0], b.choices.pick((3, 1, 4)), x.shape[-1]), x.dtype)
    return b.call(aten.einsum.default, "bik,bjk->bij", [small, other])


@maker("products")
def outer(b: Builder) -> Value:
    x = b.within(b.operand(low=1, high=1), 50.0)
    y = b.within(b.operand(lambda v: v.is_float and v.dtype == x.dtype, low=1, high=1, dtype=x.dtype), 50.0)
    if x.rank != 1 or y.rank != 1:
        raise Rejected
    return b.call(aten.outer.default, x, y)
