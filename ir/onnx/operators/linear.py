"""Products of matrices and convolutions."""

from typing import Any

import torch

from ..builder import Builder, Unsupported, Value, aten
from ..registry import Call, reader
from ..sizes import Size


@reader("MatMul")
def matmul(call: Call, a: Value, b: Value) -> Value:
    builder = call.builder
    if isinstance(b, torch.Tensor) and b.dim() == 2 and b.is_floating_point() and builder.rank(a) >= 1 and not isinstance(a, torch.Tensor):
        return builder.call(aten.linear.default, a, builder.turned(b))
    return builder.call(aten.matmul.default, a, b)


@reader("Gemm")
def gemm(call: Call, a: Value, b: Value, c: Value = None) -> Value:
    """alpha a' b' + beta c"""
    builder, alpha, beta = call.builder, call.get("alpha", 1.0), call.get("beta", 1.0)
    a = builder.permute(a, [1, 0]) if call.get("transA", 0) else a
    if call.get("transB", 0):
        weight = builder.placed(b) if isinstance(b, torch.Tensor) else b
    else:
        weight = builder.turned(b) if isinstance(b, torch.Tensor) else builder.permute(b, [1, 0])
    is_bias = c is not None and builder.rank(c) == 1 and beta == 1.0 and _fits(builder.shape(c)[0], builder.shape(weight)[0])
    if alpha == 1.0 and (c is None or is_bias) and builder.dtype(a).is_floating_point:
        return builder.call(aten.linear.default, a, weight, c)
    product = builder.call(aten.mm.default, a, builder.permute(weight, [1, 0]))
    product = product if alpha == 1.0 else builder.call(aten.mul.Scalar, product, _number(builder, a, alpha))
    if c is None or beta == 0.0:
        return product
    return builder.add(product, c if beta == 1.0 else builder.call(aten.mul.Scalar, c, _number(builder, c, beta)))


def _fits(a: Any, b: Any) -> bool:
    return not isinstance(a, Size) and not isinstance(b, Size) and a == b


def _number(builder: Builder, like: Value, factor: float) -> float | int:
    return factor if builder.dtype(like).is_floating_point else int(factor)


@reader("Einsum")
def einsum(call: Call, *inputs: Value) -> Value:
    return call.builder.call(aten.einsum.default, call.get("equation").replace(" ", ""), list(inputs))


@reader("Det")
def determinant(call: Call, x: Value) -> Value:
    return call.builder.call(aten.linalg_det.default, x)


# --- integers ------------------------------------------------------------------------------------------------------------------


@reader("MatMulInteger")
def matmul_integer(call: Call, a: Value, b: Value, a_zero: Value = None, b_zero: Value = None) -> Value:
    builder = call.builder
    return builder.call(aten.matmul.default, without_zero(builder, a, a_zero, rows=True), without_zero(builder, b, b_zero))


def without_zero(builder: Builder, x: Value, zero: Value, *, rows: bool = False) -> Value:
    """x - zero as int32; a zero point for each row where `rows`."""
    wide = builder.cast(x, torch.int32)
    if zero is None:
        return wide
    shift = builder.cast(zero, torch.int32)
    if rows and builder.rank(zero) == 1 and builder.shape(zero) != [1]:
        shift = builder.unsqueeze(shift, [-1])
    return builder.sub(wide, shift)


@reader("ConvInteger")
def conv_integer(call: Call, x: Value, weight: Value, x_zero: Value = None, weight_zero: Value = None) -> Value:
    """Sums of 8-bit products are exact in float64, which torch convolves on every device."""
    builder = call.builder
    wide = builder.cast(without_zero(builder, x, x_zero), torch.float64)
    if weight_zero is not None and builder.rank(weight_zero) == 1 and builder.shape(weight_zero) != [1]:
        weight_zero = builder.reshape(weight_zero, [-1] + [1] * (builder.rank(weight) - 1))
    kernel = builder.cast(without_zero(builder, weight, weight_zero), torch.float64)
    return builder.cast(convolve(call, wide, kernel, None), torch.int32)


# --- convolutions --------------------------------------------------------------------------------------------------------------

_CONV = {1: aten.conv1d.default, 2: aten.conv2d.default, 3: aten.conv3d.default}
_TRANSPOSED = {1: aten.conv_transpose1d.default, 2: aten.conv_transpose2d.input, 3: aten.conv_transpose3d.input}


@reader("Conv")
def conv(call: Call, x: Value, weight: Value, bias: Value = None) -> Value:
    return convolve(call, x, weight, bias)


def convolve(call: Call, x: Value, weight: Value, bias: Value) -> Value:
    builder = call.builder
    dims = builder.rank(x) - 2
    if dims not in _CONV:
        raise Unsupported(f"torch convolves over one to three dims, not {dims}")
    kernel = call.get("kernel_shape") or builder.shape(weight)[2:]
    strides, dilations = call.get("strides", [1] * dims), call.get("dilations", [1] * dims)
    before, after = pads_of(call, builder.shape(x)[2:], kernel, strides, dilations)
    if before != after:
        x = builder.call(aten.constant_pad_nd.default, x, [w for pair in zip(reversed(before), reversed(after)) for w in pair], 0)
        before = [0] * dims
    return builder.call(_CONV[dims], x, weight, bias, strides, before, dilations, call.get("group", 1))


def pads_of(call: Call, sizes: list[Any], kernel: list[int], strides: list[int], dilations: list[int]) -> tuple[list[int], list[int]]:
    """How much is padded before and after each dim."""
    dims, mode = len(kernel), call.get("auto_pad", "NOTSET")
    if mode in ("NOTSET", ""):
        pads = call.get("pads", [0] * 2 * dims)
        return list(pads[:dims]), list(pads[dims:])
    if mode == "VALID":
        return [0] * dims, [0] * dims
    totals = []
    for size, k, stride, dilation in zip(sizes, kernel, strides, dilations, strict=True):
        if isinstance(size, Size):
            if stride != 1:
                raise Unsupported(f"auto_pad {mode} has a symbolic size")
            totals.append(dilation * (k - 1))
            continue
        totals.append(max((-(-size // stride) - 1) * stride + dilation * (k - 1) + 1 - size, 0))
    small, large = [total // 2 for total in totals], [total - total // 2 for total in totals]
    return (small, large) if mode == "SAME_UPPER" else (large, small)


@reader("ConvTranspose")
def conv_transpose(call: Call, x: Value, weight: Value, bias: Value = None) -> Value:
    builder = call.builder
    dims = builder.rank(x) - 2
    if dims not in _TRANSPOSED:
        raise Unsupported(f"torch convolves over one to three dims, not {dims}")
    kernel = call.get("kernel_shape") or builder.shape(weight)[2:]
    strides, dilations = call.get("strides", [1] * dims), call.get("dilations", [1] * dims)
    extra = call.get("output_padding", [0] * dims)
    before, after = _cut(call, builder.shape(x)[2:], kernel, strides, dilations, extra)
    # torch cuts both sides alike and adds `extra` at the end: what differs is cut, or is padded, afterwards.
    common = [min(a, b) if min(a, b) > 0 else 0 for a, b in zip(before, after, strict=True)]
    padding_fits = all(e < max(s, d) for e, s, d in zip(extra, strides, dilations, strict=True))
    inside = extra if padding_fits else [0] * dims
    result = builder.call(_TRANSPOSED[dims], x, weight, bias, strides, common, inside, call.get("group", 1), dilations)
    widths = [
        width
        for a, b, c, e, i in reversed(list(zip(before, after, common, extra, inside, strict=True)))
        for width in (c - a, c - b + e - i)
    ]
    if not any(widths):
        return result
    if bias is not None and any(width > 0 for width in widths):
        raise Unsupported("its output is larger than what the kernel reaches")
    return builder.call(aten.constant_pad_nd.default, result, widths, 0)


def _cut(
    call: Call, sizes: list[Any], kernel: list[int], strides: list[int], dilations: list[int], extra: list[int]
) -> tuple[list[int], list[int]]:
    """How much of the full result is cut off before and after each dim."""
    dims, mode, wanted = len(kernel), call.get("auto_pad", "NOTSET"), call.get("output_shape")
    if wanted is None and mode in ("NOTSET", ""):
        pads = call.get("pads", [0] * 2 * dims)
        return list(pads[:dims]), list(pads[dims:])
    if wanted is None and mode == "VALID":
        return [0] * dims, [0] * dims
    before, after = [], []
    for dim in range(dims):
        reach = dilations[dim] * (kernel[dim] - 1) + 1
        if wanted is not None:
            if isinstance(sizes[dim], Size):
                raise Unsupported("output_shape has a symbolic size")
            total = strides[dim] * (sizes[dim] - 1) + extra[dim] + reach - wanted[-dims:][dim]
        else:
            total = reach + extra[dim] - strides[dim]
        small, large = total // 2, total - total // 2
        if mode == "SAME_UPPER":
            small, large = large, small
            small, large = min(small, large), max(small, large)
        else:
            small, large = max(small, large), min(small, large)
        before.append(small)
        after.append(large)
    return before, after
