"""What one rule looks for, as small as it can be, and often a *near miss* of it, which the rule must leave alone.

`testing/themes.py` says which rule each is for. Source: specs/trust.md, section 3.5.
"""

import torch

from ..builder import Builder
from ..values import Value
from .creation import drawn
from .motifs import constant_expression, tokens_of
from .products import fitting, layer, sum_bound
from .registry import maker

aten = torch.ops.aten

_MISSES = 45  # percent that are near misses
_NORMED = 300.0  # sqrt of how many elements are normalised together, times a weight
_VIEWS = (aten.view.default, aten.reshape.default)
_MAPS = (aten.relu.default, aten.neg.default, aten.abs.default)


def _mapped(b: Builder, x: Value) -> Value:
    return b.call(b.choices.pick(_MAPS), x, low=-x.bound, high=x.bound)


def _matrix(b: Builder) -> Value:
    """A value of two dims and at least four elements."""
    known = [v for v in b.values if v.rank == 2 and v.is_float and v.is_static and min(v.shape) > 1]
    if known and b.choices.chance(60):
        return b.choices.pick(known[-3:])
    return b.leaf((b.choices.pick((3, 2, 8)), b.choices.pick((4, 6, 5))), b.float_dtype())


# --- clean-ups ---


@maker("motifs")
def view_of_a_view(b: Builder) -> Value:
    """Near misses: the view between is read twice; it is of a transposed matrix, and so copies."""
    x = _matrix(b)
    same = {"low": x.low, "high": x.high}
    rows, columns = x.shape
    miss = b.choices.pick(("read twice", "copies")) if b.choices.chance(_MISSES) else ""
    if miss == "copies":
        x = b.call(aten.transpose.int, x, 0, 1, **same)
    first = aten.reshape.default if miss == "copies" else b.choices.pick(_VIEWS)
    between = b.call(first, x, b.choices.pick(([-1], [rows * columns], [1, columns, rows])), **same)
    if miss == "read twice":
        b.returned.append(_mapped(b, between))
    sizes = b.choices.pick(([columns * rows, 1], [1, rows * columns], [columns, 1, rows]))
    return _mapped(b, b.call(b.choices.pick(_VIEWS), between, sizes, **same))


@maker("motifs")
def permutation_of_a_permutation(b: Builder) -> Value:
    """Near miss: the one between is read twice."""
    x = b.operand(low=2, high=4)
    same = {"low": x.low, "high": x.high}
    turned = [x.rank - 1, *range(x.rank - 1)]
    between = b.call(aten.permute.default, x, turned, **same)
    if b.choices.chance(_MISSES):
        b.returned.append(_mapped(b, between))
    return _mapped(b, b.call(aten.transpose.int, between, 0, b.choices.pick((1, -1)), **same))


@maker("motifs")
def copy_of_what_a_caller_has(b: Builder) -> Value:
    """Near misses: the caller receives it, so that the copy must be one; 0.0 is added."""
    x = b.input((b.choices.pick((3, 2)), 4), b.float_dtype())
    same = {"low": x.low, "high": x.high}
    if b.choices.chance(20):
        return b.call(aten.add.Scalar, x, 0.0, **same)
    copied = b.choices.pick(((aten.clone.default,), (aten.mul.Scalar, 1), (aten.sub.Scalar, 0.0)))
    again = b.call(copied[0], x, *copied[1:], **same)
    if b.choices.chance(_MISSES):
        b.returned.append(again)
    return _mapped(b, again)


@maker("motifs")
def equal_calls(b: Builder) -> Value:
    """Near miss: the caller receives both, and may write into one."""
    x = b.within(b.operand(), 1000.0)
    target = b.choices.pick(_MAPS)
    pair = [b.call(target, x, low=-x.bound, high=x.bound) for _ in range(2)]
    if b.choices.chance(_MISSES):
        b.returned += pair
        return pair[1]
    return b.call(b.choices.pick((aten.add.Tensor, aten.maximum.default)), *pair, low=-2 * x.bound, high=2 * x.bound)


@maker("motifs")
def unused_call(b: Builder) -> Value:
    """Near miss: it draws random numbers, and those behind it would be others without it."""
    b.keeps_unused = True
    if b.choices.chance(_MISSES):
        drawn(b)
    else:
        _mapped(b, b.operand())
    return _mapped(b, b.operand(lambda value: value.is_float and value.node.op != "call_function"))


@maker("motifs")
def constant_for_a_caller(b: Builder) -> object:
    """Near miss: the caller receives it, and would receive the weight itself."""
    if not b.choices.chance(_MISSES):
        return constant_expression(b)
    value = b.call(aten.tanh.default, b.weight((b.choices.pick((4, 3)),), b.float_dtype()), low=-1.0, high=1.0)
    b.returned.append(value)
    return _mapped(b, value)


# --- layers ---


def _rows(b: Builder, depth: int) -> Value:
    """[.., depth]"""
    known = [v for v in b.values if 2 <= v.rank <= 3 and v.is_float and v.is_static and v.shape[-1] == depth and 0 not in v.shape]
    if known and b.choices.chance(50):
        return b.choices.pick(known[-3:])
    return b.leaf((*b.choices.pick(((5,), (2, 3))), depth), b.choices.pick((torch.float32, torch.float32, torch.float64)))


@maker("motifs")
def large_layer(b: Builder) -> Value:
    """One that a branch of a few directions is smaller than. Near misses: its weight is read twice, or does not pay for a branch."""
    miss = b.choices.pick(("read twice", "narrow")) if b.choices.chance(_MISSES) else ""
    depth, width = b.choices.pick(((32, 32), (16, 64), (64, 24))) if miss != "narrow" else b.choices.pick(((32, 3), (4, 64)))
    x = fitting(b, _rows(b, depth), depth)
    weight = b.weight((width, depth), x.dtype, low=-1.0, high=1.0)
    bias = [b.weight((width,), x.dtype)] if b.choices.chance(50) else []
    bound = sum_bound(x, depth)
    after = b.call(aten.linear.default, x, weight, *bias, low=-bound, high=bound)
    if miss == "read twice":
        b.returned.append(b.call(aten.linear.default, _mapped(b, x), weight, low=-bound, high=bound))
    return after


@maker("motifs")
def layer_behind_what_takes_factors(b: Builder) -> Value:
    """Norm, layer, gate or product with a weight, then a layer. Near misses: something else reads what is between, or an activation
    stands there, or the norm has no weight."""
    depth = b.choices.pick((8, 4))
    x = b.within(_rows(b, depth), 50.0)
    miss = b.choices.pick(("read twice", "activation", "no weight")) if b.choices.chance(_MISSES) else ""
    kind = b.choices.pick(("norm", "layer", "product", "gate")) if miss != "no weight" else "norm"
    if kind == "norm":
        affine = [] if miss == "no weight" else [b.weight((depth,), x.dtype) for _ in range(b.choices.pick((2, 1)))]
        between = b.call(aten.layer_norm.default, x, [depth], *affine, low=-50.0, high=50.0)
    elif kind == "layer":
        between = _own_layer(b, x, depth)
    elif kind == "product":
        between = b.call(aten.mul.Tensor, x, b.weight((depth,), x.dtype), low=-3 * x.bound, high=3 * x.bound)
    else:
        gate, up = (b.within(_own_layer(b, x, depth), 30.0) for _ in range(2))
        between = b.call(aten.mul.Tensor, b.call(aten.silu.default, gate, low=-0.5, high=30.0), up, low=-900.0, high=900.0)
    if miss == "activation":
        between = b.call(aten.gelu.default, between, low=-0.5, high=max(between.high, 0.0))
    if miss == "read twice":
        b.returned.append(_mapped(b, between))
    return _own_layer(b, between, b.choices.pick((4, 3, 8)))


def _own_layer(b: Builder, x: Value, width: int) -> Value:
    """A layer that reads `x` itself where it is small enough, on a weight that no other has."""
    depth = b.static(x.shape[-1])
    small = fitting(b, x, depth)
    bias = [b.weight((width,), x.dtype)] if b.choices.chance(60) else []
    bound = sum_bound(small, depth)
    return b.call(aten.linear.default, small, b.weight((width, depth), x.dtype), *bias, low=-bound, high=bound)


@maker("motifs")
def layer_of_an_activation(b: Builder) -> Value:
    """Factors can only be multiplied in. Near miss: its weight is read twice."""
    x = b.within(tokens_of(b), 50.0)
    active = b.call(b.choices.pick((aten.relu.default, aten.gelu.default)), x, low=-0.5, high=x.high)
    after = _own_layer(b, active, b.choices.pick((4, 8)))
    if b.choices.chance(_MISSES):
        weight = after.node.args[1]
        other = b.call(aten.linear.default, active, weight, low=after.low, high=after.high)
        return b.call(aten.add.Tensor, after, other, low=2 * after.low, high=2 * after.high)
    return after


# --- what is sliced ---


@maker("motifs")
def norm_of_a_wide_image(b: Builder) -> Value:
    """Many channels between few, of one image, so that rows of it are what can be sliced. Near miss: many images, which are sliced."""
    many = b.choices.chance(25)
    shape = (16, 2, 4, 4) if many else (1, 2, b.choices.pick((16, 32)), 8)
    x, channels = b.within(b.input(shape, torch.float32), 8.0), b.choices.pick((16, 12))
    wide = _convolved(b, x, channels)
    groups = b.choices.pick((2, 4)) if not many else b.choices.pick((2, 1))
    affine = [b.weight((channels,), x.dtype) for _ in range(2)] if b.choices.chance(70) else []
    norm = b.call(aten.group_norm.default, wide, groups, *affine, low=-_NORMED, high=_NORMED)
    return _convolved(b, b.call(aten.silu.default, norm, low=-0.5, high=_NORMED), 2)


def _convolved(b: Builder, x: Value, channels: int) -> Value:
    inner = b.static(x.shape[1])
    bound = sum_bound(x, inner)
    return b.call(aten.conv2d.default, x, b.weight((channels, inner, 1, 1), x.dtype), low=-bound, high=bound)


@maker("motifs")
def long_causal_attention(b: Builder) -> Value:
    """Scores outweigh all else, and only queries can be sliced. Near miss: a batch, which is sliced instead."""
    batch, heads, length = (8, 2, 8) if b.choices.chance(_MISSES) else (1, b.choices.pick((1, 2)), b.choices.pick((32, 48)))
    q, k, v = (b.within(b.input((batch, heads, length, 4), torch.float32), 10.0) for _ in range(3))
    if b.choices.chance(50):
        q = b.call(aten.tanh.default, q, low=-1.0, high=1.0)
    together = b.call(aten.scaled_dot_product_attention.default, q, k, v, None, 0.0, True, low=v.low, high=v.high)
    return _mapped(b, together)


@maker("motifs")
def narrow_between_wide(b: Builder) -> Value:
    """Calls on many rows, of which each needs its own row alone: wide between narrow ends, so that slices of rows save memory."""
    rows, depth = b.choices.pick((64, 33, 16)), b.choices.pick((4, 2))
    x = b.within(b.input((rows, depth), torch.float32), 8.0)
    wide = b.within(layer(b, x, 32), 30.0)
    active = b.call(b.choices.pick((aten.gelu.default, aten.silu.default)), wide, low=-0.5, high=30.0)
    return layer(b, active, depth)
