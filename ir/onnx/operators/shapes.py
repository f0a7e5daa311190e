"""Operators that make tensors of a shape, change shapes, or read them."""

import math
import operator
from functools import reduce
from typing import Any

import numpy as np
import torch

from ..builder import Unsupported, Value, aten
from ..registry import Call, reader
from ..sizes import Size, known, maximum, provably_not, same
from .fitting import misfit

_LAST = 2**63 - 1


@reader("Constant")
def constant(call: Call) -> Value:
    for name in ("value", "value_float", "value_int"):
        if name in call.attributes:
            value = call.get(name)
            dtype = torch.float32 if name == "value_float" else torch.int64
            return value if isinstance(value, torch.Tensor) else torch.tensor(value, dtype=dtype)
    for name, dtype in (("value_floats", torch.float32), ("value_ints", torch.int64)):
        if name in call.attributes:
            return torch.tensor(call.get(name), dtype=dtype)
    raise Unsupported("a constant of strings or of few elements that are not 0 has no place in the IR")


@reader("ConstantOfShape")
def constant_of_shape(call: Call, shape: Value) -> Value:
    sizes = call.builder.sizes(shape)
    if sizes is None:
        raise call.builder.depends(shape, "shape")
    value = call.get("value")
    fill = torch.zeros(1) if value is None else value
    return call.builder.full(list(sizes), fill.item(), fill.dtype)


@reader("Shape")
def shape(call: Call, x: Value) -> Value:
    sizes = call.builder.shape(x)[slice(call.get("start", 0), call.get("end"))]
    result = np.empty(len(sizes), object)
    result[:] = sizes
    return _settled(result)


@reader("Size")
def size(call: Call, x: Value) -> Value:
    return _settled(np.array(reduce(operator.mul, call.builder.shape(x), 1), dtype=object))


def _settled(sizes: np.ndarray) -> Value:
    return sizes if any(isinstance(each, Size) for each in sizes.reshape(-1)) else known(sizes)


@reader("Reshape")
def reshape(call: Call, x: Value, shape: Value) -> Value:
    builder = call.builder
    target = builder.sizes(shape)
    if target is None:
        raise builder.depends(shape, "shape")
    if isinstance(x, np.ndarray):
        return x.reshape([int(each) for each in target])
    given = list(target)
    if not call.get("allowzero", 0) and any(not isinstance(each, Size) and each == 0 for each in given):
        old = builder.shape(x)
        given = [old[dim] if not isinstance(each, Size) and each == 0 else each for dim, each in enumerate(given)]
    return viewed(call, x, given)


def viewed(call: Call, x: Value, sizes: list[Any]) -> Value:
    """x in another shape: a view where its strides allow one."""
    try:
        return call.builder.call(aten.view.default, x, sizes)
    except Unsupported:
        try:
            return call.builder.call(aten.reshape.default, x, sizes)
        except Unsupported as error:
            raise misfit(call.builder, x, sizes) or error from None


@reader("Flatten")
def flatten(call: Call, x: Value) -> Value:
    builder, rank = call.builder, call.builder.rank(x)
    axis = call.get("axis", 1)
    axis = axis + rank if axis < 0 else axis
    sizes = builder.shape(x)
    outer, inner = (reduce(operator.mul, part, 1) for part in (sizes[:axis], sizes[axis:]))
    return viewed(call, x, [outer, inner])


@reader("Transpose")
def transpose(call: Call, x: Value) -> Value:
    rank = call.builder.rank(x)
    return call.builder.permute(x, call.get("perm", list(reversed(range(rank)))))


def axes_of(call: Call, axes: Value) -> list[int] | None:
    """Axes, an attribute of old versions and an input of new ones."""
    if axes is not None:
        return call.builder.integers(axes, "axes")
    return call.get("axes")


@reader("Unsqueeze")
def unsqueeze(call: Call, x: Value, axes: Value = None) -> Value:
    builder, dims = call.builder, axes_of(call, axes) or []
    dims = builder.dims(dims, builder.rank(x) + len(dims))
    if isinstance(x, np.ndarray):
        return np.expand_dims(x, tuple(dims))
    return builder.unsqueeze(x, dims)


@reader("Squeeze")
def squeeze(call: Call, x: Value, axes: Value = None) -> Value:
    builder, given = call.builder, axes_of(call, axes)
    sizes = builder.shape(x)
    dims = [dim for dim in range(len(sizes)) if not provably_not(sizes[dim], 1)] if given is None else builder.dims(given, len(sizes))
    for dim in dims:
        if isinstance(sizes[dim], Size):
            raise builder.depends(np.array([sizes[dim]], object), f"dim {dim}, which goes where it is 1,")
    if isinstance(x, np.ndarray):
        return np.squeeze(x, tuple(dims))
    return x if not dims else builder.call(aten.squeeze.dims, x, dims)


@reader("Concat")
def concat(call: Call, *inputs: Value) -> Value:
    builder = call.builder
    if any(isinstance(each, np.ndarray) for each in inputs):
        parts = [builder.sizes(each) for each in inputs]
        if all(part is not None for part in parts):
            return np.concatenate(parts, call.get("axis"))
    return inputs[0] if len(inputs) == 1 else builder.cat(inputs, call.get("axis"))


@reader("Split")
def split(call: Call, x: Value, sizes: Value = None) -> Any:
    builder = call.builder
    axis = builder.dims([call.get("axis", 0)], builder.rank(x))[0]
    given = call.get("split") if sizes is None else builder.sizes(sizes)
    if sizes is not None and given is None:
        raise builder.depends(sizes, "list of sizes")
    if given is None:
        count = call.get("num_outputs", len(call.outputs))
        whole = builder.shape(x)[axis]
        each = (whole + (count - 1)) // count
        given = [each] * (count - 1) + [whole - each * (count - 1)]
    parts, start = [], 0
    for length in list(given):
        if isinstance(x, np.ndarray):
            parts.append(x[start : start + int(length)])
        else:
            parts.append(builder.narrow(x, axis, start, length))
        start = start + length
    return tuple(parts)


@reader("Slice")
def slice_(call: Call, x: Value, starts: Value = None, ends: Value = None, axes: Value = None, steps: Value = None) -> Value:
    """Before opset 10 the places are attributes."""
    builder, rank = call.builder, call.builder.rank(x)
    if call.version < 10:
        starts, ends, axes = (_vector(call.get(name)) for name in ("starts", "ends", "axes"))
    begins, stops = builder.sizes(starts), builder.sizes(ends)
    if begins is None or stops is None:
        raise builder.depends(starts if begins is None else ends, "place")
    dims = list(range(len(begins))) if axes is None else builder.dims(builder.integers(axes, "axes"), rank)
    strides = [1] * len(dims) if steps is None else builder.integers(steps, "steps")
    for dim, begin, stop, step in zip(dims, list(begins), list(stops), strides, strict=True):
        x = _sliced(call, x, dim, begin, stop, step)
    return x


def _vector(integers: list[int] | None) -> torch.Tensor | None:
    return None if integers is None else torch.tensor(integers, dtype=torch.int64)


def _sliced(call: Call, x: Value, dim: int, begin: Any, stop: Any, step: int) -> Value:
    builder = call.builder
    if isinstance(x, np.ndarray):
        numbers = [None if isinstance(each, Size) else int(each) for each in (begin, stop)]
        if None in numbers:
            raise Unsupported("sizes are sliced at a symbolic place")
        index = [slice(None)] * x.ndim
        low = numbers[1] if step > 0 or numbers[1] >= -x.shape[dim] else None
        index[dim] = slice(numbers[0], low, step)
        return x[tuple(index)]
    if step > 0:
        whole = not isinstance(stop, Size) and stop >= _LAST // 4
        if not isinstance(begin, Size) and begin == 0 and whole and step == 1:
            return x
        return builder.call(aten.slice.Tensor, x, dim, begin, _LAST if whole else stop, step)
    turned = builder.call(aten.flip.default, x, [dim])
    length = builder.shape(x)[dim]
    first, last = _from_the_end(begin, length), _from_the_end(stop, length)
    return builder.call(aten.slice.Tensor, turned, dim, first, last, -step)


def _from_the_end(place: Any, length: Any) -> Any:
    """How far before the last element `place` is, at least 0: where it stands in the tensor turned round."""
    if not isinstance(place, Size):
        if place < 0:
            return min(-1 - place, _LAST)
        if isinstance(length, Size) and place >= _LAST // 4:
            return 0
    return maximum(length - 1 - place, 0)


@reader("Expand")
def expand(call: Call, x: Value, shape: Value) -> Value:
    builder = call.builder
    target = builder.sizes(shape)
    if target is None:
        raise builder.depends(shape, "shape")
    old, new = builder.shape(x), list(target)
    old, new = [1] * (len(new) - len(old)) + old, [1] * (len(old) - len(new)) + new
    sizes = [_broadcast(a, b) for a, b in zip(old, new, strict=True)]
    if len(sizes) == builder.rank(x) and all(same(a, b) for a, b in zip(old, sizes, strict=True)):
        return x
    return builder.call(aten.expand.default, builder.node(x) if isinstance(x, np.ndarray) else x, sizes)


def _broadcast(a: Any, b: Any) -> Any:
    if not isinstance(b, Size) and b == 1:
        return a
    if not isinstance(a, Size) and a != 1:
        return a
    return b


@reader("Tile")
def tile(call: Call, x: Value, repeats: Value) -> Value:
    counts = call.builder.sizes(repeats)
    if counts is None:
        raise call.builder.depends(repeats, "number of times")
    return call.builder.call(aten.repeat.default, x, list(counts))


@reader("Range")
def range_(call: Call, start: Value, limit: Value, delta: Value) -> Value:
    builder = call.builder
    dtype = builder.dtype(start)
    if dtype.is_floating_point:
        first, last, step = (builder.constant(each, "bound").item() for each in (start, limit, delta))
        count = max(math.ceil((last - first) / step), 0)
        steps = builder.call(aten.arange.default, count, dtype=torch.float64)
        return builder.cast(builder.call(aten.add.Scalar, builder.call(aten.mul.Scalar, steps, step), first), dtype)
    bounds = [builder.sizes(each) for each in (start, limit, delta)]
    for bound, given in zip(bounds, (start, limit, delta), strict=True):
        if bound is None:
            raise builder.depends(given, "bound")
    return builder.call(aten.arange.start_step, *(each.reshape(-1)[0] for each in bounds), dtype=dtype)


@reader("EyeLike")
def eye_like(call: Call, x: Value) -> Value:
    from ..dtypes import torch_dtype

    builder = call.builder
    dtype = torch_dtype(call.get("dtype")) if call.get("dtype") else builder.dtype(x)
    rows, columns = (builder.call(aten.arange.default, each) for each in builder.shape(x))
    below = builder.call(aten.add.Scalar, builder.unsqueeze(rows, [1]), call.get("k", 0))
    return builder.cast(builder.call(aten.eq.Tensor, below, columns), dtype)


@reader("Trilu")
def trilu(call: Call, x: Value, k: Value = None) -> Value:
    diagonal = 0 if k is None else call.builder.integers(k, "diagonal")[0]
    return call.builder.call(aten.triu.default if call.get("upper", 1) else aten.tril.default, x, diagonal)


@reader("DepthToSpace")
def depth_to_space(call: Call, x: Value) -> Value:
    builder, block = call.builder, call.get("blocksize")
    batch, channels, height, width = builder.shape(x)
    if call.get("mode", "DCR") == "DCR":
        parts = viewed(call, x, [batch, block, block, channels // (block * block), height, width])
        moved = builder.permute(parts, [0, 3, 4, 1, 5, 2])
    else:
        parts = viewed(call, x, [batch, channels // (block * block), block, block, height, width])
        moved = builder.permute(parts, [0, 1, 4, 2, 5, 3])
    return viewed(call, moved, [batch, channels // (block * block), height * block, width * block])


@reader("SpaceToDepth")
def space_to_depth(call: Call, x: Value) -> Value:
    builder, block = call.builder, call.get("blocksize")
    batch, channels, height, width = builder.shape(x)
    parts = viewed(call, x, [batch, channels, height // block, block, width // block, block])
    order = [0, 3, 5, 1, 2, 4] if call.get("mode", "DCR") == "DCR" else [0, 1, 3, 5, 2, 4]
    return viewed(call, builder.permute(parts, order), [batch, channels * block * block, height // block, width // block])


# --- padding -----------------------------------------------------------------------------------------------------------------------


@reader("Pad")
def pad(call: Call, x: Value, pads: Value = None, value: Value = None, axes: Value = None) -> Value:
    """Before opset 11 widths and fill value are attributes."""
    builder, rank = call.builder, call.builder.rank(x)
    if call.version < 11:
        pads, value = _vector(call.get("pads")), torch.tensor(call.get("value", 0.0))
    given = builder.sizes(pads)
    if given is None:
        raise builder.depends(pads, "width")
    dims = list(range(rank)) if axes is None else builder.dims(builder.integers(axes, "axes"), rank)
    before, after = dict.fromkeys(range(rank), 0), dict.fromkeys(range(rank), 0)
    for index, dim in enumerate(dims):
        before[dim], after[dim] = given[index], given[len(dims) + index]
    mode = call.get("mode", "constant")
    if mode == "constant":
        widths = [each for dim in reversed(range(rank)) for each in (before[dim], after[dim])]
        fill = 0 if value is None else builder.constant(value, "fill value").item()
        return builder.call(aten.constant_pad_nd.default, x, widths, fill)
    for dim in dims:
        if provably_not(before[dim], 0) or provably_not(after[dim], 0):
            x = _padded_from_itself(call, x, dim, before[dim], after[dim], mode)
    return x


def _padded_from_itself(call: Call, x: Value, dim: int, before: Any, after: Any, mode: str) -> Value:
    builder, length = call.builder, call.builder.shape(x)[dim]
    index = builder.call(aten.arange.start_step, -before, length + after, 1)
    last = builder.node_or_number(length - 1)
    if mode == "edge":
        index = builder.call(aten.clamp.default, index, 0, last)
    elif mode == "wrap":
        index = builder.call(aten.remainder.Scalar, index, builder.node_or_number(length))
    else:  # |i| before the first, 2 (n - 1) - i behind the last; period 2 (n - 1), or 1 for a single element
        index = builder.call(aten.remainder.Scalar, index, builder.node_or_number(maximum((length - 1) * 2, 1)))
        turned = builder.call(aten.abs.default, builder.call(aten.sub.Scalar, index, last))
        index = builder.call(aten.sub.Tensor, builder.call(aten.full_like.default, index, last), turned)
    return builder.call(aten.index_select.default, x, dim, index)


@reader("CenterCropPad")
def center_crop_pad(call: Call, x: Value, shape: Value) -> Value:
    builder = call.builder
    targets = builder.sizes(shape)
    if targets is None:
        raise builder.depends(shape, "shape")
    dims = builder.dims(call.get("axes", list(range(builder.rank(x)))), builder.rank(x))
    for dim, target in zip(dims, list(targets), strict=True):
        length = builder.shape(x)[dim]
        if isinstance(length, Size) or isinstance(target, Size):
            raise Unsupported("it crops to a symbolic size")
        if target < length:
            x = builder.narrow(x, dim, (length - target) // 2, target)
        elif target > length:
            before = (target - length) // 2
            widths = [0, 0] * (builder.rank(x) - 1 - dim) + [before, target - length - before]
            x = builder.call(aten.constant_pad_nd.default, x, widths, 0)
    return x


@reader("Col2Im")
def col2im(call: Call, x: Value, image: Value, block: Value) -> Value:
    builder = call.builder
    sizes, blocks = builder.integers(image, "image shape"), builder.integers(block, "block shape")
    pads = call.get("pads", [0] * 2 * len(sizes))
    if len(sizes) != 2 or pads[:2] != pads[2:]:
        raise Unsupported("torch has it for two dims and even padding")
    return builder.call(aten.col2im.default, x, sizes, blocks, call.get("dilations", [1, 1]), pads[:2], call.get("strides", [1, 1]))
