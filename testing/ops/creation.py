"""Values that come from nothing or from a value's shape alone, which constant folding computes; and those drawn at random."""

import torch

from ..builder import Builder
from ..values import Value
from .registry import maker

aten = torch.ops.aten


@maker("creation", weight=2)
def counted(b: Builder) -> Value:
    count = b.choices.pick((5, 3, 1, 8, 0))
    kind = b.choices.pick(("arange", "float arange", "linspace", "steps"))
    if kind == "linspace":
        return b.call(aten.linspace.default, -1.0, 1.0, count, low=-1.0, high=1.0)
    if kind == "steps":
        return b.call(aten.arange.start_step, 1, 1 + 2 * count, 2, low=0.0, high=20.0)
    dtype = {"dtype": b.float_dtype()} if kind == "float arange" else {}
    return b.call(aten.arange.default, count, low=0.0, high=8.0, **dtype)


@maker("creation", weight=2)
def filled(b: Builder) -> Value:
    x = b.operand(lambda value: True)
    kind = b.choices.pick(("full", "full_like", "zeros_like", "ones", "new_zeros", "scalar_tensor", "eye"))
    number = b.choices.pick((0.5, 0.0, -2.5))
    if kind == "full_like":
        return b.call(aten.full_like.default, x, number, dtype=b.float_dtype(), low=number, high=number)
    if kind == "zeros_like":
        return b.call(aten.zeros_like.default, x, low=0.0, high=0.0)
    if kind == "new_zeros":
        return b.call(aten.new_zeros.default, x, [2, 3], low=0.0, high=0.0)
    if kind == "scalar_tensor":
        return b.call(aten.scalar_tensor.default, number, dtype=b.float_dtype(), low=number, high=number)
    if kind == "eye":
        return b.call(aten.eye.default, b.choices.pick((3, 1, 4)), low=0.0, high=1.0)
    sizes = [b.size(x, dim) for dim in range(x.rank)]
    if kind == "ones":
        return b.call(aten.ones.default, sizes, low=1.0, high=1.0)
    return b.call(aten.full.default, sizes, number, dtype=b.float_dtype(), low=number, high=number)


@maker("creation")
def causal_mask(b: Builder) -> Value:
    """What transformers compute anew at each call."""
    length = b.choices.pick((5, 4, 8))
    ones = b.call(aten.ones.default, [length, length], dtype=torch.bool, low=1.0, high=1.0)
    kept = b.call(aten.tril.default, ones, low=0.0, high=1.0)
    if b.choices.chance(50):
        return kept
    hidden = b.call(aten.logical_not.default, kept, low=0.0, high=1.0)
    zeros = b.call(aten.zeros.default, [length, length], low=0.0, high=0.0)
    return b.call(aten.masked_fill.Scalar, zeros, hidden, -100.0, low=-100.0, high=0.0)


@maker("creation")
def table_of_angles(b: Builder) -> Value:
    """Rotary frequencies from constants alone."""
    places = b.call(aten.arange.default, b.choices.pick((5, 8, 3)), dtype=torch.float32, low=0.0, high=8.0)
    rates = b.weight((b.choices.pick((4, 2)),), torch.float32, low=0.01, high=1.0, kind="buffer")
    column = b.call(aten.unsqueeze.default, places, 1, low=0.0, high=8.0)
    angles = b.call(aten.mul.Tensor, column, rates, low=0.0, high=8.0)
    both = b.call(aten.cat.default, [angles, angles], -1, low=0.0, high=8.0)
    return b.call(b.choices.pick((aten.cos.default, aten.sin.default)), both, low=-1.0, high=1.0)


@maker("random")
def drawn(b: Builder) -> Value:
    x = b.operand()
    kind = b.choices.pick(("rand_like", "dropout", "randn_like", "rand"))
    if kind == "dropout":
        return b.call(aten.dropout.default, b.within(x, 1000.0), 0.5, True, low=-2000.0, high=2000.0)
    if kind == "rand":
        return b.call(aten.rand.default, [b.choices.pick((3, 4))], low=0.0, high=1.0)
    target = aten.rand_like.default if kind == "rand_like" else aten.randn_like.default
    return b.call(target, x, low=-8.0, high=8.0)
