"""Normalisations."""

from typing import Any

import torch

from ..builder import Builder, Unsupported, Value, aten
from ..registry import Call, reader
from ..sizes import Size
from .shapes import viewed


@reader("LayerNormalization")
def layer_norm(call: Call, x: Value, scale: Value, bias: Value = None) -> Any:
    builder = call.builder
    axis = builder.dims([call.get("axis", -1)], builder.rank(x))[0]
    sizes, eps = builder.shape(x), call.get("epsilon", 1e-5)
    tail = sizes[axis:]
    if call.wants(1) or call.wants(2):
        return _with_statistics(call, x, scale, bias, axis)
    if any(isinstance(size, Size) for size in tail) or not _is_whole(builder, scale, tail) or not _is_whole(builder, bias, tail):
        return _with_statistics(call, x, scale, bias, axis)[0]
    return builder.call(aten.layer_norm.default, x, tail, scale, bias, eps)


def _is_whole(builder: Builder, weight: Value, tail: list[Any]) -> bool:
    return weight is None or builder.shape(weight) == tail


def _with_statistics(call: Call, x: Value, scale: Value, bias: Value, axis: int) -> tuple[Value, Value, Value]:
    """The result, the mean and 1 / the standard deviation, in float32 for halves."""
    builder, dtype = call.builder, call.builder.dtype(x)
    wide = builder.cast(x, torch.float32) if dtype in (torch.float16, torch.bfloat16) else x
    dims = list(range(axis, builder.rank(x)))
    mean = builder.call(aten.mean.dim, wide, dims, True)
    centred = builder.sub(wide, mean)
    variance = builder.call(aten.mean.dim, builder.call(aten.mul.Tensor, centred, centred), dims, True)
    inverse = builder.call(aten.rsqrt.default, builder.call(aten.add.Scalar, variance, call.get("epsilon", 1e-5)))
    result = builder.mul(builder.cast(builder.mul(centred, inverse), dtype), scale)
    return (result if bias is None else builder.add(result, bias)), mean, inverse


@reader("RMSNormalization")
def rms_norm(call: Call, x: Value, scale: Value) -> Value:
    builder, dtype = call.builder, call.builder.dtype(x)
    axis = builder.dims([call.get("axis", -1)], builder.rank(x))[0]
    tail, eps = builder.shape(x)[axis:], call.get("epsilon", 1e-5)
    if not any(isinstance(size, Size) for size in tail) and builder.shape(scale) == tail and builder.dtype(scale) == dtype:
        return builder.call(aten.rms_norm.default, x, tail, scale, eps)
    wide = builder.cast(x, torch.float32) if dtype in (torch.float16, torch.bfloat16) else x
    dims = list(range(axis, builder.rank(x)))
    squares = builder.call(aten.mean.dim, builder.call(aten.mul.Tensor, wide, wide), dims, True)
    inverse = builder.call(aten.rsqrt.default, builder.call(aten.add.Scalar, squares, eps))
    return builder.mul(builder.cast(builder.mul(wide, inverse), builder.dtype(scale)), scale)


@reader("BatchNormalization")
def batch_norm(call: Call, x: Value, scale: Value, bias: Value, mean: Value, variance: Value) -> Any:
    builder, eps, momentum = call.builder, call.get("epsilon", 1e-5), call.get("momentum", 0.9)
    if call.version < 9 and not call.get("spatial", 1):
        raise Unsupported("it has statistics of each element")
    if not call.get("training_mode", 0):
        return builder.call(aten.batch_norm.default, x, scale, bias, mean, variance, False, 1 - momentum, eps, False)
    dims = [dim for dim in range(builder.rank(x)) if dim != 1]
    now = builder.call(aten.mean.dim, x, dims)
    spread = builder.call(aten.var.correction, x, dims, correction=0)
    result = builder.call(aten.batch_norm.default, x, scale, bias, now, spread, False, 1 - momentum, eps, False)
    old_share, new_share = momentum, 1 - momentum
    running = [
        builder.add(builder.call(aten.mul.Scalar, old, old_share), builder.call(aten.mul.Scalar, new, new_share))
        for old, new in ((mean, now), (variance, spread))
    ]
    return (result, *running)


@reader("InstanceNormalization")
def instance_norm(call: Call, x: Value, scale: Value, bias: Value) -> Value:
    """A group norm whose groups are channels."""
    builder, channels = call.builder, call.builder.shape(x)[1]
    if isinstance(channels, Size):
        raise Unsupported("the number of channels is symbolic")
    return builder.call(aten.group_norm.default, x, channels, scale, bias, call.get("epsilon", 1e-5))


@reader("GroupNormalization")
def group_norm(call: Call, x: Value, scale: Value, bias: Value) -> Value:
    builder, groups, eps = call.builder, call.get("num_groups"), call.get("epsilon", 1e-5)
    if call.version >= 21:
        return builder.call(aten.group_norm.default, x, groups, scale, bias, eps)
    sizes = builder.shape(x)  # one scale a group
    channels = sizes[1] // groups
    weights = [builder.call(aten.repeat_interleave.self_int, each, channels) for each in (scale, bias)]
    return builder.call(aten.group_norm.default, x, groups, *weights, eps)


@reader("LpNormalization")
def lp_norm(call: Call, x: Value) -> Value:
    """A row of zeros stays one."""
    builder, p = call.builder, call.get("p", 2)
    axis = builder.dims([call.get("axis", -1)], builder.rank(x))[0]
    norm = builder.call(aten.linalg_vector_norm.default, x, p, [axis], True)
    is_zero = builder.call(aten.eq.Scalar, norm, 0)
    return builder.call(aten.where.self, is_zero, builder.call(aten.zeros_like.default, x), builder.div(x, norm))


@reader("LRN")
def local_response_norm(call: Call, x: Value) -> Value:
    """x / (bias + alpha / size * sum of squares of the channels around)^beta"""
    builder, size = call.builder, call.get("size")
    sizes = builder.shape(x)
    squares = builder.unsqueeze(viewed(call, builder.call(aten.mul.Tensor, x, x), [sizes[0], sizes[1], -1]), [1])
    before = (size - 1) // 2
    padded = builder.call(aten.constant_pad_nd.default, squares, [0, 0, before, size - 1 - before], 0)
    means = builder.call(aten.avg_pool2d.default, padded, [size, 1], [1, 1])
    means = viewed(call, builder.call(aten.squeeze.dims, means, [1]), sizes)
    scaled = builder.call(aten.add.Scalar, builder.call(aten.mul.Scalar, means, call.get("alpha", 1e-4)), call.get("bias", 1.0))
    return builder.div(x, builder.call(aten.pow.Tensor_Scalar, scaled, call.get("beta", 0.75)))
