"""Pooling."""

from typing import Any

import torch

from ..builder import Unsupported, Value, aten
from ..registry import Call, reader
from ..sizes import Size
from .linear import pads_of

_MAX = {1: aten.max_pool1d.default, 2: aten.max_pool2d.default, 3: aten.max_pool3d.default}
_AVERAGE = {1: aten.avg_pool1d.default, 2: aten.avg_pool2d.default, 3: aten.avg_pool3d.default}


@reader("GlobalAveragePool")
def global_average(call: Call, x: Value) -> Value:
    return call.builder.call(aten.mean.dim, x, list(range(2, call.builder.rank(x))), True)


@reader("GlobalMaxPool")
def global_max(call: Call, x: Value) -> Value:
    return call.builder.call(aten.amax.default, x, list(range(2, call.builder.rank(x))), True)


def _window(call: Call, x: Value) -> tuple[list[int], list[int], list[int], list[int], list[int]]:
    """Kernel, strides, dilations, and what is padded before and after each dim."""
    dims = call.builder.rank(x) - 2
    if dims not in _MAX:
        raise Unsupported(f"torch pools over one to three dims, not {dims}")
    kernel = call.get("kernel_shape")
    strides, dilations = call.get("strides", [1] * dims), call.get("dilations", [1] * dims)
    before, after = pads_of(call, call.builder.shape(x)[2:], kernel, strides, dilations)
    return kernel, strides, dilations, before, after


def _missing(call: Call, x: Value, before: list[int], after: list[int]) -> list[int]:
    """How much more than is padded the last windows reach, where ceil_mode adds one that begins inside."""
    kernel, strides = call.get("kernel_shape"), call.get("strides", [1] * len(before))
    dilations, sizes = call.get("dilations", [1] * len(before)), call.builder.shape(x)[2:]
    if not call.get("ceil_mode", 0):
        return [0] * len(before)
    extra = []
    for dim, size in enumerate(sizes):
        if isinstance(size, Size):
            raise Unsupported("ceil_mode has a symbolic size")
        reach = dilations[dim] * (kernel[dim] - 1) + 1
        padded = size + before[dim] + after[dim]
        count = -(-(padded - reach) // strides[dim]) + 1
        if (count - 1) * strides[dim] >= size + before[dim]:  # it would begin in the padding
            count -= 1
        extra.append(max((count - 1) * strides[dim] + reach - padded, 0))
    return extra


def _padded(call: Call, x: Value, before: list[int], after: list[int], fill: float) -> Value:
    widths = [width for pair in zip(reversed(before), reversed(after), strict=True) for width in pair]
    return call.builder.call(aten.constant_pad_nd.default, x, widths, fill) if any(widths) else x


def _lowest(dtype: torch.dtype) -> Any:
    return float("-inf") if dtype.is_floating_point else torch.iinfo(dtype).min


@reader("MaxPool")
def max_pool(call: Call, x: Value) -> Any:
    builder, dtype = call.builder, call.builder.dtype(x)
    kernel, strides, dilations, before, after = _window(call, x)
    extra = _missing(call, x, before, after)
    if call.wants(1):
        return _with_places(call, x, kernel, strides, dilations, before, [a + e for a, e in zip(after, extra, strict=True)])
    if dtype in (torch.int8, torch.uint8):
        x = builder.cast(x, torch.float32)
    if before == after and not any(extra) and all(2 * p <= k for p, k in zip(before, kernel, strict=True)):
        result = builder.call(_MAX[len(kernel)], x, kernel, strides, before, dilations, False)
    else:
        x = _padded(call, x, before, [a + e for a, e in zip(after, extra, strict=True)], _lowest(builder.dtype(x)))
        result = builder.call(_MAX[len(kernel)], x, kernel, strides, [0] * len(kernel), dilations, False)
    return builder.cast(result, dtype)


def _with_places(
    call: Call, x: Value, kernel: list[int], strides: list[int], dilations: list[int], before: list[int], after: list[int]
) -> tuple[Value, Value]:
    """The maxima, and where they stand in the whole tensor laid out flat."""
    builder, sizes = call.builder, call.builder.shape(x)
    if len(kernel) != 2 or any(isinstance(size, Size) for size in sizes):
        raise Unsupported("places of maxima are known for two dims of numbers")
    if call.get("storage_order", 0):
        raise Unsupported("places are counted by columns")
    padded = _padded(call, x, before, after, _lowest(builder.dtype(x)))
    values, places = builder.call(aten.max_pool2d_with_indices.default, padded, kernel, strides, [0, 0], dilations)
    width = sizes[3] + before[1] + after[1]
    row = builder.call(aten.sub.Scalar, builder.call(aten.floor_divide.Scalar, places, width), before[0])
    column = builder.call(aten.sub.Scalar, builder.call(aten.remainder.Scalar, places, width), before[1])
    inside = builder.add(builder.call(aten.mul.Scalar, row, sizes[3]), column)
    image = torch.arange(sizes[0] * sizes[1]).reshape(sizes[0], sizes[1], 1, 1) * (sizes[2] * sizes[3])
    return values, builder.add(inside, image)


@reader("AveragePool")
def average_pool(call: Call, x: Value) -> Value:
    """Sums over windows, over how many elements of each count."""
    builder = call.builder
    kernel, strides, dilations, before, after = _window(call, x)
    extra, counts_pads = _missing(call, x, before, after), bool(call.get("count_include_pad", 0))
    even = before == after and not any(extra) and all(2 * p <= k for p, k in zip(before, kernel, strict=True))
    if even and all(d == 1 for d in dilations):
        return builder.call(_AVERAGE[len(kernel)], x, kernel, strides, before, False, counts_pads)
    if any(isinstance(size, Size) for size in builder.shape(x)[2:]):
        raise Unsupported("uneven windows over a symbolic size")
    whole = [a + e for a, e in zip(after, extra, strict=True)]
    ones = torch.ones([1, 1, *builder.shape(x)[2:]], dtype=builder.dtype(x))
    if counts_pads:
        ones = _padded(call, ones, before, after, 1.0)
        ones = _padded(call, ones, [0] * len(before), extra, 0.0)
    else:
        ones = _padded(call, ones, before, whole, 0.0)
    sums = _window_sums(call, _padded(call, x, before, whole, 0.0), kernel, strides, dilations)
    return builder.div(sums, _window_sums(call, ones, kernel, strides, dilations))


def _window_sums(call: Call, x: Value, kernel: list[int], strides: list[int], dilations: list[int]) -> Value:
    """A convolution of each channel with ones."""
    from .linear import _CONV

    builder, sizes = call.builder, call.builder.shape(x)
    ones = torch.ones([1, 1, *kernel], dtype=builder.dtype(x))
    flat = builder.reshape(x, [-1, 1, *sizes[2:]])
    sums = builder.call(_CONV[len(kernel)], flat, ones, None, strides, [0] * len(kernel), dilations, 1)
    return builder.reshape(sums, [sizes[0], sizes[1], *builder.shape(sums)[2:]])


@reader("LpPool")
def lp_pool(call: Call, x: Value) -> Value:
    builder, p = call.builder, call.get("p", 2)
    kernel, strides, dilations, before, after = _window(call, x)
    extra = _missing(call, x, before, after)
    powers = builder.call(aten.pow.Tensor_Scalar, builder.call(aten.abs.default, x), p)
    padded = _padded(call, powers, before, [a + e for a, e in zip(after, extra, strict=True)], 0.0)
    return builder.call(aten.pow.Tensor_Scalar, _window_sums(call, padded, kernel, strides, dilations), 1.0 / p)


@reader("GlobalLpPool")
def global_lp_pool(call: Call, x: Value) -> Value:
    builder = call.builder
    return builder.call(aten.linalg_vector_norm.default, x, call.get("p", 2), list(range(2, builder.rank(x))), True)


@reader("MaxUnpool")
def max_unpool(call: Call, x: Value, places: Value, shape: Value = None) -> Value:
    """Each element to its place in the whole result laid out flat, zeros elsewhere."""
    builder, sizes = call.builder, call.builder.shape(x)
    dims = len(sizes) - 2
    kernel, strides, pads = call.get("kernel_shape"), call.get("strides", [1] * dims), call.get("pads", [0] * 2 * dims)
    if any(isinstance(size, Size) for size in sizes):
        raise Unsupported("it has a symbolic size")
    small = sizes[:2] + [(sizes[2 + d] - 1) * strides[d] + kernel[d] - pads[d] - pads[dims + d] for d in range(dims)]
    flat = builder.full([int(torch.Size(small).numel())], 0, builder.dtype(x))
    spread = builder.call(aten.scatter.src, flat, 0, builder.reshape(places, [-1]), builder.reshape(x, [-1]))
    result = builder.reshape(spread, small)
    if shape is None:
        return result
    wanted = builder.integers(shape, "output shape")
    widths = [width for a, b in reversed(list(zip(small, wanted, strict=True))) for width in (0, b - a)]
    return builder.call(aten.constant_pad_nd.default, result, widths, 0) if any(widths) else result
