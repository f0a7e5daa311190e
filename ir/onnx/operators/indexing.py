"""Operators that read or write at indices, sort, and compare along a dim."""

from typing import Any

import numpy as np
import torch

from ..builder import Unsupported, Value, aten
from ..registry import Call, reader
from ..sizes import Size
from .reductions import along_axis
from .shapes import viewed


@reader("Gather")
def gather(call: Call, x: Value, index: Value) -> Value:
    builder = call.builder
    axis = builder.dims([call.get("axis", 0)], builder.rank(x))[0]
    if isinstance(x, np.ndarray) and isinstance(index, torch.Tensor):
        return np.asarray(np.take(x, index.numpy(), axis), dtype=object)
    if isinstance(index, torch.Tensor) and index.dim() == 0:
        return builder.call(aten.select.int, x, axis, int(index))
    if isinstance(x, torch.Tensor) and x.is_floating_point() and x.dim() == 2 and axis == 0 and not isinstance(index, torch.Tensor):
        # The table of an embedding. A negative index, which ONNX counts from the end, raises there.
        return builder.call(aten.embedding.default, x, index)
    return builder.call(aten.index.Tensor, x, [None] * axis + [_integers(call, index)])


def _integers(call: Call, index: Value) -> Value:
    return index if call.builder.dtype(index) in (torch.int64, torch.int32) else call.builder.cast(index, torch.int64)


def _from_start(call: Call, index: Value, length: Any) -> Value:
    """Indices, of which negative ones count from the end, as such from the start."""
    builder = call.builder
    index = builder.cast(index, torch.int64)
    if isinstance(index, torch.Tensor) and not isinstance(length, Size):
        return torch.where(index < 0, index + length, index)
    moved = builder.call(aten.add.Scalar, index, length.node if isinstance(length, Size) else length)
    return builder.call(aten.where.self, builder.call(aten.lt.Scalar, index, 0), moved, index)


@reader("GatherElements")
def gather_elements(call: Call, x: Value, index: Value) -> Value:
    builder = call.builder
    axis = builder.dims([call.get("axis", 0)], builder.rank(x))[0]
    return builder.call(aten.gather.default, x, axis, _from_start(call, index, builder.shape(x)[axis]))


@reader("GatherND")
def gather_nd(call: Call, x: Value, index: Value) -> Value:
    return call.builder.call(aten.index.Tensor, x, _columns(call, x, index, call.get("batch_dims", 0)))


def _columns(call: Call, x: Value, index: Value, batch_dims: int) -> list[Value]:
    """The last dim of `index` as one index a dim of x, behind those that count through the batch dims."""
    builder = call.builder
    sizes = builder.shape(index)
    if isinstance(sizes[-1], Size):
        raise Unsupported("how many dims it indexes is a symbolic size")
    rest = len(sizes) - 1
    counters = []
    for dim in range(batch_dims):
        counter = builder.call(aten.arange.default, sizes[dim])
        counters.append(viewed(call, counter, [sizes[dim] if other == dim else 1 for other in range(rest)]))
    columns = [builder.call(aten.select.int, index, rest, place) for place in range(sizes[-1])]
    return counters + [_integers(call, column) for column in columns]


_REDUCE = {"add": "sum", "mul": "prod", "max": "amax", "min": "amin"}


@reader("ScatterElements", "Scatter")
def scatter_elements(call: Call, x: Value, index: Value, updates: Value) -> Value:
    builder = call.builder
    axis = builder.dims([call.get("axis", 0)], builder.rank(x))[0]
    index = _from_start(call, index, builder.shape(x)[axis])
    reduction = call.get("reduction", "none")
    if reduction == "none":
        return builder.call(aten.scatter.src, x, axis, index, updates)
    return builder.call(aten.scatter_reduce.two, x, axis, index, updates, _REDUCE[reduction])


@reader("ScatterND")
def scatter_nd(call: Call, x: Value, index: Value, updates: Value) -> Value:
    builder, reduction = call.builder, call.get("reduction", "none")
    if reduction in ("none", "add"):
        return builder.call(aten.index_put.default, x, _columns(call, x, index, 0), updates, reduction == "add")
    return _scatter_reduced(call, x, index, updates, _REDUCE[reduction])


def _scatter_reduced(call: Call, x: Value, index: Value, updates: Value, reduction: str) -> Value:
    """By places in x laid out flat, since torch reduces along one dim."""
    builder = call.builder
    sizes, width = builder.shape(x), builder.shape(index)[-1]
    if any(isinstance(each, Size) for each in [*sizes, width]):
        raise Unsupported(f"scattering by {reduction} has a symbolic size")
    inner = int(np.prod(sizes[width:], dtype=np.int64))
    place: Value = torch.zeros((), dtype=torch.int64)
    for dim in range(width):
        column = _from_start(call, builder.call(aten.select.int, index, builder.rank(index) - 1, dim), sizes[dim])
        place = builder.add(builder.call(aten.mul.Scalar, place, sizes[dim]), column)
    flat = builder.call(aten.mul.Scalar, viewed(call, place, [-1, 1]), inner)
    flat = builder.add(flat, torch.arange(inner))
    result = builder.call(
        aten.scatter_reduce.two, viewed(call, x, [-1]), 0, viewed(call, flat, [-1]), viewed(call, updates, [-1]), reduction
    )
    return viewed(call, result, sizes)


@reader("TensorScatter")
def tensor_scatter(call: Call, cache: Value, update: Value, indices: Value = None) -> Value:
    """New entries of a cache, from indices[b] on along the axis; in circles with mode "circular"."""
    builder, axis = call.builder, call.get("axis", -2)
    rank = builder.rank(cache)
    axis = builder.dims([axis], rank)[0]
    sizes, length = builder.shape(update), builder.shape(cache)[axis]
    steps = builder.call(aten.arange.default, sizes[axis])
    place = steps if indices is None else builder.add(builder.unsqueeze(builder.cast(indices, torch.int64), [1]), steps)
    if call.get("mode", "linear") == "circular":
        if isinstance(length, Size):
            raise Unsupported("a circular cache has a symbolic size")
        place = builder.call(aten.remainder.Scalar, place, length)
    shape = [1] * rank
    shape[axis] = sizes[axis]
    if indices is not None:
        shape[0] = sizes[0]
    where = builder.call(aten.expand.default, viewed(call, place, shape), sizes)
    return builder.call(aten.scatter.src, cache, axis, where, update)


@reader("OneHot")
def one_hot(call: Call, index: Value, depth: Value, values: Value) -> Value:
    builder = call.builder
    count = builder.integers(depth, "depth")[0]
    axis = call.get("axis", -1)
    axis = axis + builder.rank(index) + 1 if axis < 0 else axis
    places = _from_start(call, index, count)
    shape = [1] * (builder.rank(index) + 1)
    shape[axis] = count
    hot = builder.call(aten.eq.Tensor, builder.unsqueeze(places, [axis]), torch.arange(count).reshape(shape))
    off, on = (builder.call(aten.select.int, values, 0, place) for place in (0, 1))
    return builder.call(aten.where.self, hot, on, off)


@reader("NonZero")
def nonzero(call: Call, x: Value) -> Value:
    return call.builder.permute(call.builder.call(aten.nonzero.default, x), [1, 0])


@reader("Compress")
def compress(call: Call, x: Value, condition: Value) -> Value:
    builder, axis = call.builder, call.get("axis")
    if axis is None:
        x, axis = viewed(call, x, [-1]), 0
    axis = builder.dims([axis], builder.rank(x))[0]
    kept = viewed(call, builder.call(aten.nonzero.default, condition), [-1])
    return builder.call(aten.index_select.default, x, axis, kept)


@reader("ReverseSequence")
def reverse_sequence(call: Call, x: Value, lengths: Value) -> Value:
    builder, batch, time = call.builder, call.get("batch_axis", 1), call.get("time_axis", 0)
    sizes = builder.shape(x)
    steps = builder.call(aten.arange.default, sizes[time])
    ends = builder.unsqueeze(builder.cast(lengths, torch.int64), [1])
    turned = builder.call(aten.sub.Tensor, builder.call(aten.sub.Scalar, ends, 1), steps)
    place = builder.call(aten.where.self, builder.call(aten.lt.Tensor, steps, ends), turned, steps)  # [batch, time]
    place = place if batch < time else builder.permute(place, [1, 0])
    shape = [sizes[dim] if dim in (batch, time) else 1 for dim in range(len(sizes))]
    return builder.call(aten.gather.default, x, time, builder.call(aten.expand.default, viewed(call, place, shape), sizes))


# --- along a dim ---------------------------------------------------------------------------------------------------------------


@reader("ArgMax", "ArgMin")
def extreme_place(call: Call, x: Value) -> Value:
    builder = call.builder
    axis = builder.dims([call.get("axis", 0)], builder.rank(x))[0]
    target = aten.argmax.default if call.op_type == "ArgMax" else aten.argmin.default
    keep = bool(call.get("keepdims", 1))
    if not call.get("select_last_index", 0):
        return builder.call(target, x, axis, keep)
    from_end = builder.call(target, builder.call(aten.flip.default, x, [axis]), axis, keep)
    last = builder.shape(x)[axis] - 1
    return builder.call(aten.rsub.Scalar, from_end, last)


@reader("TopK")
def top_k(call: Call, x: Value, k: Value = None) -> Any:
    """Equal elements in the order of their places, which torch.topk does not promise. Before opset 10 k is an attribute."""
    builder = call.builder
    count = np.array(call.get("k"), object) if call.version < 10 else builder.sizes(k)
    if count is None:
        raise builder.depends(k, "k")
    axis = builder.dims([call.get("axis", -1)], builder.rank(x))[0]
    ordered = builder.call(aten.sort.stable, x, stable=True, dim=axis, descending=bool(call.get("largest", 1)))
    return tuple(builder.narrow(each, axis, 0, count.reshape(-1)[0]) for each in ordered)


@reader("CumSum", "CumProd")
def cumulative(call: Call, x: Value, axis: Value) -> Value:
    builder, dtype = call.builder, call.builder.dtype(x)
    dim = builder.dims(builder.integers(axis, "axis"), builder.rank(x))[0]
    reverse, exclusive = call.get("reverse", 0), call.get("exclusive", 0)
    x = builder.call(aten.flip.default, x, [dim]) if reverse else x
    if exclusive:
        widths = [0, 0] * (builder.rank(x) - 1 - dim) + [1, -1]
        x = builder.call(aten.constant_pad_nd.default, x, widths, 0 if call.op_type == "CumSum" else 1)
    target = aten.cumsum.default if call.op_type == "CumSum" else aten.cumprod.default
    result = builder.call(target, x, dim, dtype=dtype)
    return builder.call(aten.flip.default, result, [dim]) if reverse else result


@reader("Hardmax")
def hardmax(call: Call, x: Value) -> Value:
    builder = call.builder

    def first_largest(x: Value, axis: int) -> Value:
        place = builder.call(aten.argmax.default, x, axis, True)
        steps = builder.call(aten.arange.default, builder.shape(x)[axis])
        shape = [1] * builder.rank(x)
        shape[axis] = -1
        return builder.cast(builder.call(aten.eq.Tensor, place, viewed(call, steps, shape)), builder.dtype(x))

    return along_axis(call, x, first_largest)
