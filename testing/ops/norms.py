"""Normalisations, with and without weights, with statistics that are known and that the input gives."""

import torch

from ..builder import Builder, Rejected
from ..values import LIMIT, Value
from .convolutions import image
from .registry import maker

aten = torch.ops.aten
_EPS = (1e-5, 1e-6, 1e-3, 0.1)
_BOUND = 300.0  # sqrt of how many elements are normalised together, times a weight


def _affine(b: Builder, shape: list[int], dtype: torch.dtype) -> list[Value | None]:
    return [b.weight(shape, dtype) if b.choices.chance(75) else None for _ in range(2)]


@maker("norms", weight=2)
def layer_norm(b: Builder) -> Value:
    x = b.operand(low=1)
    shape = [b.static(size) for size in x.shape[-b.choices.pick((1, 1, min(2, x.rank))) :]]
    if 0 in shape:
        raise Rejected
    return b.call(aten.layer_norm.default, x, shape, *_affine(b, shape, x.dtype), b.choices.pick(_EPS), low=-_BOUND, high=_BOUND)


@maker("norms")
def rms_norm(b: Builder) -> Value:
    x = b.operand(low=1)
    shape = [b.static(x.shape[-1])]
    return b.call(aten.rms_norm.default, x, shape, _affine(b, shape, x.dtype)[0], b.choices.pick((*_EPS, None)), low=-_BOUND, high=_BOUND)


@maker("norms", weight=2)
def group_norm(b: Builder) -> Value:
    x = image(b)
    channels = b.static(x.shape[1])
    groups = b.choices.pick([g for g in (2, 1, 4, channels) if channels % g == 0])
    return b.call(aten.group_norm.default, x, groups, *_affine(b, [channels], x.dtype), b.choices.pick(_EPS), low=-_BOUND, high=_BOUND)


@maker("norms", weight=2)
def batch_norm(b: Builder) -> Value | list[Value]:
    x = image(b) if b.choices.chance(70) else b.operand(low=2, high=3)
    return normalised(b, x)


def normalised(b: Builder, x: Value) -> Value | list[Value]:
    """A batch norm of `x` with fixed statistics."""
    channels = b.static(x.shape[1])
    statistics = [b.weight((channels,), x.dtype, kind="buffer"), b.weight((channels,), x.dtype, low=0.125, high=4.0, kind="buffer")]
    affine, eps = _affine(b, [channels], x.dtype), b.choices.pick(_EPS)
    small = b.within(x, 1000.0)
    bounds = (-LIMIT, LIMIT)  # weights are at most 3 and variances at least 1/8
    if b.choices.chance(20):
        target = aten._native_batch_norm_legit_no_training.default
        return b.calls_of(target, small, *affine, *statistics, 0.1, eps, bounds=[bounds])
    return b.call(aten.batch_norm.default, small, *affine, *statistics, False, 0.1, eps, False, low=bounds[0], high=bounds[1])


@maker("norms")
def instance_norm(b: Builder) -> Value:
    x = image(b)
    channels = b.static(x.shape[1])
    affine = _affine(b, [channels], x.dtype)
    return b.call(aten.instance_norm.default, x, *affine, None, None, True, 0.1, b.choices.pick(_EPS), False, low=-_BOUND, high=_BOUND)
