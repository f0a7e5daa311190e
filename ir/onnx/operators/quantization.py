"""Quantization: codes and scales, products of quantized operands."""

import torch

from ..builder import Builder, Unsupported, Value, aten
from ..dtypes import torch_dtype
from ..registry import Call, reader
from .linear import without_zero

_CODES = (torch.int8, torch.uint8, torch.int16, torch.uint16, torch.int32)


def _spread(call: Call, parameter: Value, x: Value) -> Value:
    """A scale or zero point as it broadcasts to x: one for all, for each place of the axis, or for each block along it."""
    builder, rank, block = call.builder, call.builder.rank(x), call.get("block_size", 0)
    if builder.rank(parameter) == 0:
        return parameter
    axis = builder.dims([call.get("axis", 1)], rank)[0]
    if block:
        sizes = builder.shape(x)
        repeated = builder.call(aten.repeat_interleave.self_int, parameter, block, axis)
        return builder.narrow(repeated, axis, 0, sizes[axis])
    if builder.shape(parameter) == [1]:
        return builder.reshape(parameter, [])
    return builder.reshape(parameter, [-1 if dim == axis else 1 for dim in range(rank)])


@reader("DequantizeLinear")
def dequantize_linear(call: Call, x: Value, scale: Value, zero: Value = None) -> Value:
    """(x - zero) * scale"""
    builder = call.builder
    dtype = torch_dtype(call.get("output_dtype")) if call.get("output_dtype") else builder.dtype(scale)
    if builder.dtype(x) == torch.int32 and zero is None:
        wide = builder.cast(x, torch.float32)
    elif builder.dtype(x) in _CODES:
        wide = x if zero is None else without_zero(builder, x, _spread(call, zero, x))
        wide = builder.cast(wide, torch.float32)
    else:
        wide = builder.cast(x, torch.float32)
    return builder.cast(builder.mul(wide, _spread(call, builder.cast(scale, torch.float32), x)), dtype)


@reader("QuantizeLinear")
def quantize_linear(call: Call, x: Value, scale: Value, zero: Value = None) -> Value:
    """clamp(round(x / scale) + zero), halves to even"""
    builder = call.builder
    wanted = torch_dtype(call.get("output_dtype")) if call.get("output_dtype") else torch.uint8
    dtype = builder.dtype(zero) if zero is not None else wanted
    if dtype not in _CODES or call.get("precision", 0) not in (0, 1):
        raise Unsupported(f"torch and ONNX round to {str(dtype).removeprefix('torch.')} in different ways")
    return quantized(call, x, _spread(call, scale, x), None if zero is None else _spread(call, zero, x), dtype)


def quantized(call: Call, x: Value, scale: Value, zero: Value, dtype: torch.dtype) -> Value:
    builder = call.builder
    rounded = builder.call(aten.round.default, builder.div(builder.cast(x, torch.float32), builder.cast(scale, torch.float32)))
    shifted = rounded if zero is None else builder.add(rounded, builder.cast(zero, torch.float32))
    limits = torch.iinfo(dtype)
    inside = builder.call(aten.clamp.default, shifted, limits.min, limits.max)
    return builder.cast(builder.cast(inside, torch.int32), dtype)


@reader("DynamicQuantizeLinear")
def dynamic_quantize_linear(call: Call, x: Value) -> tuple[Value, Value, Value]:
    """Codes u8, their scale and zero point, of a range that holds 0."""
    builder = call.builder
    zero = torch.zeros(())
    low, high = (builder.call(target, x, []) for target in (aten.amin.default, aten.amax.default))
    low, high = builder.call(aten.minimum.default, low, zero), builder.call(aten.maximum.default, high, zero)
    span = builder.sub(high, low)
    scale = builder.call(aten.div.Scalar, span, 255)
    scale = builder.call(aten.where.self, builder.call(aten.eq.Scalar, scale, 0), torch.ones(()), scale)
    place = builder.call(aten.round.default, builder.call(aten.neg.default, builder.div(low, scale)))
    point = builder.cast(builder.call(aten.clamp.default, place, 0, 255), torch.uint8)
    return quantized(call, x, scale, point, torch.uint8), scale, point


@reader("QLinearMatMul")
def qlinear_matmul(
    call: Call, a: Value, a_scale: Value, a_zero: Value, b: Value, b_scale: Value, b_zero: Value, y_scale: Value, y_zero: Value
) -> Value:
    builder = call.builder
    sums = builder.call(aten.matmul.default, without_zero(builder, a, a_zero, rows=True), without_zero(builder, b, b_zero))
    scale = builder.mul(_by_row(builder, builder.cast(a_scale, torch.float32)), builder.cast(b_scale, torch.float32))
    real = builder.mul(builder.cast(sums, torch.float32), scale)
    return quantized(call, real, y_scale, y_zero, builder.dtype(y_zero))


def _by_row(builder: Builder, scale: Value) -> Value:
    return builder.unsqueeze(scale, [-1]) if builder.rank(scale) == 1 and builder.shape(scale) != [1] else scale


@reader("QLinearConv")
def qlinear_conv(
    call: Call,
    x: Value,
    x_scale: Value,
    x_zero: Value,
    weight: Value,
    weight_scale: Value,
    weight_zero: Value,
    y_scale: Value,
    y_zero: Value,
    bias: Value = None,
) -> Value:
    """Sums of 8-bit products are exact in float64."""
    from .linear import convolve

    builder, rank = call.builder, call.builder.rank(x)
    column = [-1] + [1] * (rank - 1)
    if builder.rank(weight_zero) == 1:
        weight_zero = builder.reshape(weight_zero, column)
    if builder.rank(weight_scale) == 1:
        weight_scale = builder.reshape(weight_scale, [1, -1] + [1] * (rank - 2))
    wide = [builder.cast(without_zero(builder, each, zero), torch.float64) for each, zero in ((x, x_zero), (weight, weight_zero))]
    sums = convolve(call, wide[0], wide[1], None if bias is None else builder.cast(bias, torch.float64))
    real = builder.mul(builder.cast(sums, torch.float32), builder.mul(x_scale, weight_scale))
    return quantized(call, real, y_scale, y_zero, builder.dtype(y_zero))
