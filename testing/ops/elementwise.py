"""Operations on single elements: functions of one value, arithmetic with broadcasting and promotion, comparisons, bits, casts, copies."""

from typing import Any

import torch

from ..builder import Builder
from ..values import LIMIT, Value
from .registry import maker

aten = torch.ops.aten

# Where each is defined, or far enough from a pole or an overflow; their images are those of the interval's ends.
_MONOTONE: dict[Any, tuple[float, float]] = {
    aten.exp.default: (-8.0, 8.0),
    aten.expm1.default: (-8.0, 8.0),
    aten.log.default: (0.125, LIMIT),
    aten.log1p.default: (0.0, LIMIT),
    aten.log2.default: (0.125, LIMIT),
    aten.sqrt.default: (0.0, LIMIT),
    aten.rsqrt.default: (0.125, LIMIT),
    aten.reciprocal.default: (0.125, LIMIT),
    aten.neg.default: (-LIMIT, LIMIT),
    aten.relu.default: (-LIMIT, LIMIT),
    aten.tanh.default: (-LIMIT, LIMIT),
    aten.sigmoid.default: (-LIMIT, LIMIT),
    aten.erf.default: (-LIMIT, LIMIT),
    aten.atan.default: (-LIMIT, LIMIT),
    aten.asinh.default: (-LIMIT, LIMIT),
    aten.softplus.default: (-LIMIT, LIMIT),
    aten.elu.default: (-LIMIT, LIMIT),
    aten.leaky_relu.default: (-LIMIT, LIMIT),
    aten.hardtanh.default: (-LIMIT, LIMIT),
    aten.hardsigmoid.default: (-LIMIT, LIMIT),
    aten.floor.default: (-LIMIT, LIMIT),
    aten.ceil.default: (-LIMIT, LIMIT),
    aten.round.default: (-LIMIT, LIMIT),
    aten.trunc.default: (-LIMIT, LIMIT),
    aten.sign.default: (-LIMIT, LIMIT),
    aten.log_sigmoid.default: (-LIMIT, LIMIT),
}
_DIPPING = (aten.gelu.default, aten.silu.default, aten.mish.default, aten.hardswish.default)  # never below -0.5
_COMPARISONS = (aten.gt, aten.lt, aten.ge, aten.le, aten.eq, aten.ne)
_BITS = (aten.bitwise_and.Tensor, aten.bitwise_or.Tensor, aten.bitwise_xor.Tensor)
_LOGIC = (aten.logical_and.default, aten.logical_or.default, aten.logical_xor.default)
_SCALARS = (2, 1, 0, 0.5, 1.0, -1.0, 0.0, -0.0, 3, 1e-5, -2.5)
_COPIES = (aten.clone.default, aten.alias.default, aten.detach.default, aten.contiguous.default, aten.lift_fresh_copy.default)


@maker("elementwise", weight=3)
def function_of_one(b: Builder) -> Value:
    target = b.choices.pick(tuple(_MONOTONE))
    low, high = _MONOTONE[target]
    x = b.operand()
    if low > 0:
        x = b.positive(x, low)
    elif low == 0 and x.low < 0:
        x = b.call(aten.abs.default, x, low=0.0, high=x.bound)
    elif high < LIMIT:
        x = b.within(x, high)
    ends = target(torch.tensor([x.low, x.high], dtype=torch.float64)).tolist()
    return b.call(target, x, low=min(ends), high=max(ends))


@maker("elementwise", weight=2)
def activation(b: Builder) -> Value:
    target, x = b.choices.pick(_DIPPING), b.operand()
    options = {"approximate": "tanh"} if target is aten.gelu.default and b.choices.chance(40) else {}
    return b.call(target, x, low=-0.5, high=max(x.high, 0.0), **options)


@maker("elementwise")
def wave(b: Builder) -> Value:
    return b.call(b.choices.pick((aten.sin.default, aten.cos.default)), b.within(b.operand(), 100.0), low=-1.0, high=1.0)


@maker("elementwise")
def even(b: Builder) -> Value:
    x = b.operand()
    if b.choices.chance(50):
        return b.call(aten.abs.default, x, low=0.0, high=x.bound)
    small = b.within(x, 100.0)
    target, more = b.choices.pick(((aten.square.default, ()), (aten.pow.Tensor_Scalar, (2,)), (aten.pow.Tensor_Scalar, (2.0,))))
    return b.call(target, small, *more, low=0.0, high=small.bound**2)


@maker("elementwise", weight=4)
def arithmetic(b: Builder) -> Value:
    x = b.within(b.operand(), 1000.0)
    y = b.within(b.partner(x), 1000.0)
    kind = b.choices.pick(("add", "mul", "sub", "div", "maximum", "minimum", "atan2"))
    if b.choices.chance(50):
        x, y = y, x
    if kind in ("add", "sub"):
        alpha = {"alpha": b.choices.pick((2, 1, -1, 0.5))} if b.choices.chance(15) else {}
        bound = x.bound + 2 * y.bound
        return b.call(aten.add.Tensor if kind == "add" else aten.sub.Tensor, x, y, low=-bound, high=bound, **alpha)
    if kind == "mul":
        small, other = b.within(x, 100.0), b.within(y, 100.0)
        bound = small.bound * other.bound
        return b.call(aten.mul.Tensor, small, other, low=-bound, high=bound)
    if kind == "div":
        y = b.positive(y)
        return b.call(aten.div.Tensor, x, y, low=-x.bound / y.low, high=x.bound / y.low)
    if kind == "atan2":
        return b.call(aten.atan2.default, x, b.positive(y), low=-1.6, high=1.6)
    bound = max(x.bound, y.bound)
    return b.call(aten.maximum.default if kind == "maximum" else aten.minimum.default, x, y, low=-bound, high=bound)


@maker("elementwise", weight=3)
def arithmetic_with_a_number(b: Builder) -> Value:
    x, number = b.within(b.operand(), 1000.0), b.choices.pick(_SCALARS)
    kind = b.choices.pick(("add", "mul", "sub", "div", "rsub", "pow"))
    form = "Scalar" if b.choices.chance(50) else "Tensor"  # torch.export writes numbers into both
    if kind == "div":
        number = number or 2
        bound = x.bound / abs(number)
        small = b.within(x, x.bound * LIMIT / bound) if bound > LIMIT else x
        return b.call(getattr(aten.div, form), small, number, low=-min(bound, LIMIT), high=min(bound, LIMIT))
    if kind == "pow":
        return b.call(aten.pow.Tensor_Scalar, x, 1, low=x.low, high=x.high)
    if kind == "rsub":
        bound = x.bound + abs(number)
        return b.call(aten.rsub.Scalar, x, number, low=-bound, high=bound)
    bound = x.bound * abs(number) if kind == "mul" else x.bound + abs(number)
    return b.call(getattr(getattr(aten, kind), form), x, number, low=-bound, high=bound)


@maker("elementwise")
def arithmetic_on_integers(b: Builder) -> Value:
    x = b.integer()
    kind = b.choices.pick(("add", "mul", "sub", "floor_divide", "remainder", "neutral"))
    if kind == "neutral":
        target, number = b.choices.pick(((aten.add.Tensor, 0), (aten.mul.Tensor, 1), (aten.sub.Tensor, 0), (aten.add.Scalar, 0)))
        return b.call(target, x, number, low=x.low, high=x.high)
    if kind in ("floor_divide", "remainder"):
        number = b.choices.pick((2, 3, 7))
        return b.call(aten.floor_divide.default if kind == "floor_divide" else aten.remainder.Scalar, x, number)
    y = b.partner(x, lambda other: other.is_integer)
    return b.call(getattr(aten, kind).Tensor, x, b.cast(y, x.dtype) if y.is_float else y)


@maker("elementwise", weight=2)
def comparison(b: Builder) -> Value:
    x, packet = b.operand(), b.choices.pick(_COMPARISONS)
    if b.choices.chance(50):
        return b.call(packet.Scalar, x, b.choices.pick((0.5, 0, 1.25, -0.75)), low=0.0, high=1.0)
    return b.call(packet.Tensor, x, b.partner(x), low=0.0, high=1.0)


@maker("elementwise")
def logic(b: Builder) -> Value:
    x = b.operand(lambda value: value.dtype == torch.bool, dtype=torch.bool)
    if b.choices.chance(30):
        return b.call(b.choices.pick((aten.logical_not.default, aten.bitwise_not.default)), x, low=0.0, high=1.0)
    y = b.partner(x, lambda other: other.dtype == torch.bool)
    return b.call(b.choices.pick((*_LOGIC, *_BITS)), x, b.cast(y, torch.bool), low=0.0, high=1.0)


@maker("elementwise", weight=2)
def choice_by_mask(b: Builder) -> Value:
    x = b.operand()
    mask = b.mask(x.shape)
    kind = b.choices.pick(("where", "masked_fill", "where scalar"))
    if kind == "where":
        y = b.partner(x)
        return b.call(aten.where.self, mask, x, y, low=min(x.low, y.low), high=max(x.high, y.high))
    number = b.choices.pick((0.0, 1.0, -2.5))
    bounds = {"low": min(x.low, number), "high": max(x.high, number)}
    if kind == "masked_fill":
        return b.call(aten.masked_fill.Scalar, x, mask, number, **bounds)
    return b.call(aten.where.ScalarOther, mask, x, number, **bounds)


@maker("elementwise")
def clamped(b: Builder) -> Value:
    x = b.operand()
    low, high = b.choices.pick(((-1.0, 1.0), (None, 0.5), (0.0, None), (-2, 2)))
    return b.call(
        aten.clamp.default, x, low, high, low=x.low if low is None else min(float(low), x.high), high=x.high if high is None else high
    )


@maker("elementwise")
def three_operands(b: Builder) -> Value:
    x = b.within(b.operand(), 50.0)
    y, z = b.within(b.cast(b.like(x), x.dtype), 50.0), b.within(b.cast(b.partner(x), x.dtype), 50.0)
    kind = b.choices.pick(("addcmul", "addcdiv", "lerp", "lerp number"))
    if kind == "addcmul":
        return b.call(aten.addcmul.default, x, y, z, value=b.choices.pick((1, -0.5)), low=-3000.0, high=3000.0)
    if kind == "addcdiv":
        return b.call(aten.addcdiv.default, x, y, b.positive(z), low=-1000.0, high=1000.0)
    if kind == "lerp":
        return b.call(aten.lerp.Tensor, x, y, b.cast(z, x.dtype), low=-6000.0, high=6000.0)
    return b.call(aten.lerp.Scalar, x, y, 0.25, low=-100.0, high=100.0)


@maker("elementwise", weight=2)
def cast(b: Builder) -> Value:
    if b.choices.chance(25):
        return b.cast(b.integer(), b.choices.pick((b.integer_dtype(), b.float_dtype(), torch.bool)))
    return b.cast(b.operand(), b.float_dtype() if b.choices.chance(80) else b.integer_dtype())


@maker("elementwise", weight=3)
def copy(b: Builder) -> Value:
    """What only copies, or only seems to: the food of clean-ups."""
    x = b.operand(lambda value: True)
    kind = b.choices.pick(("plain", "same dtype", "into another", "memory format", "dropout"))
    if kind == "plain":
        return b.call(b.choices.pick(_COPIES), x, low=x.low, high=x.high)
    if kind == "same dtype":
        target = b.choices.pick((aten._to_copy.default, aten.to.dtype))
        arguments, options = ((x,), {"dtype": x.dtype}) if target is aten._to_copy.default else ((x, x.dtype), {})
        return b.call(target, *arguments, low=x.low, high=x.high, **options)
    if kind == "into another":
        return b.call(aten.copy.default, b.like(x), x, low=x.low, high=x.high)
    if kind == "memory format":
        formats = (torch.contiguous_format, torch.preserve_format, *((torch.channels_last,) if x.rank == 4 else ()))
        return b.call(aten.clone.default, x, memory_format=b.choices.pick(formats), low=x.low, high=x.high)
    return b.call(aten.dropout.default, x, b.choices.pick((0.5, 0.0)), False, low=x.low, high=x.high)
