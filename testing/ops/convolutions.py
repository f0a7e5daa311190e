"""Convolutions over one to three dims, pooling and resampling."""

import torch

from ..builder import Builder, Rejected
from ..values import Value
from .products import fitting, sum_bound
from .registry import maker

aten = torch.ops.aten
_CONVOLUTIONS = {3: aten.conv1d.default, 4: aten.conv2d.default, 5: aten.conv3d.default}
_PADDED = {3: aten.conv1d.padding, 4: aten.conv2d.padding, 5: aten.conv3d.padding}
_TRANSPOSED = {3: aten.conv_transpose1d.default, 4: aten.conv_transpose2d.input, 5: aten.conv_transpose3d.input}


def image(b: Builder, dims: int | None = None) -> Value:
    """A value [B, C, *s] with elements and channels that are known."""
    rank = 2 + (dims or b.choices.pick((2, 2, 1, 3)))
    known = [v for v in b.values if v.rank == rank and v.is_float and isinstance(v.shape[1], int) and 0 not in v.shape]
    if known and b.choices.chance(80):
        return b.choices.pick(known[-3:])
    sizes = [b.choices.pick((6, 4, 5, 7, 8)) for _ in range(rank - 2)]
    return b.leaf((b.choices.pick((1, 2, 3, 2, 0)), b.choices.pick((4, 8, 2, 6)), *sizes), torch.float32)


def convolution(b: Builder, x: Value, channels: int, *, bias: bool | None = None, plain: bool = False) -> Value:
    """A convolution of `x` to `channels`; `plain`: of stride and dilation 1, which keeps sizes."""
    dims, inner = x.rank - 2, b.static(x.shape[1])
    kernel = b.choices.pick((3, 1, 2) if not plain else (3, 1))
    groups = b.choices.pick([g for g in (1, 1, 2, inner) if inner % g == 0 and channels % g == 0]) if not plain else 1
    weight = b.weight((channels, inner // groups, *[kernel] * dims), x.dtype)
    offset = b.weight((channels,), x.dtype) if (b.choices.chance(60) if bias is None else bias) else None
    small = fitting(b, x, inner // groups * kernel**dims)
    bound = sum_bound(small, inner // groups * kernel**dims)
    ends = {"low": -bound, "high": bound}
    ones = [1] * dims
    if b.choices.chance(15):
        padding = "same" if plain else b.choices.pick(("same", "valid"))
        return b.call(_PADDED[x.rank], small, weight, offset, ones, padding, ones, groups, **ends)
    if plain:
        return b.call(_CONVOLUTIONS[x.rank], small, weight, offset, ones, [kernel // 2] * dims, ones, groups, **ends)
    stride, amount, dilation = ([b.choices.pick(numbers)] * dims for numbers in ((1, 2), (0, 1), (1, 1, 2)))
    return b.call(_CONVOLUTIONS[x.rank], small, weight, offset, stride, amount, dilation, groups, **ends)


@maker("convolutions", weight=3)
def convolved(b: Builder) -> Value:
    return convolution(b, image(b), b.choices.pick((4, 8, 2, 6)))


@maker("convolutions")
def transposed(b: Builder) -> Value:
    x = image(b)
    inner, dims = b.static(x.shape[1]), x.rank - 2
    kernel, stride = b.choices.pick((2, 3)), b.choices.pick((1, 2))
    weight = b.weight((inner, b.choices.pick((4, 2)), *[kernel] * dims), x.dtype)
    small, padding = fitting(b, x, inner * kernel**dims), b.choices.pick((0, 1))
    if any(isinstance(size, int) and (size - 1) * stride + kernel <= 2 * padding for size in x.shape[2:]):
        raise Rejected  # nothing is left, which ATen refuses at the call and not where types are inferred
    return b.call(_TRANSPOSED[x.rank], small, weight, None, [stride] * dims, [padding] * dims)


@maker("convolutions", weight=2)
def pooled(b: Builder) -> Value:
    x = image(b, 2)
    kind = b.choices.pick(("max", "average", "adaptive"))
    if kind == "adaptive":
        return b.call(aten.adaptive_avg_pool2d.default, x, [b.choices.pick((1, 2))] * 2, low=x.low, high=x.high)
    kernel, stride, padding = [b.choices.pick((2, 3))] * 2, [b.choices.pick((2, 1))] * 2, [b.choices.pick((0, 1))] * 2
    if kind == "average":
        return b.call(aten.avg_pool2d.default, x, kernel, stride, padding, low=min(x.low, 0.0), high=max(x.high, 0.0))
    return b.call(aten.max_pool2d.default, x, kernel, stride, padding, low=x.low, high=x.high)


@maker("convolutions")
def resampled(b: Builder) -> Value:
    x = image(b, 2)
    sizes = [2 * b.static(size) for size in x.shape[2:]]
    kind = b.choices.pick(("nearest", "bilinear", "shuffle"))
    if kind == "nearest":
        return b.call(aten.upsample_nearest2d.vec, x, sizes, None, low=x.low, high=x.high)
    if kind == "bilinear":
        return b.call(aten.upsample_bilinear2d.vec, x, sizes, b.choices.chance(50), None, low=x.low, high=x.high)
    if b.static(x.shape[1]) % 4:
        raise Rejected
    return b.call(aten.pixel_shuffle.default, x, 2, low=x.low, high=x.high)
