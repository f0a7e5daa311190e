"""Operators that reduce dims, and softmax."""

import operator
from collections.abc import Callable
from functools import reduce
from typing import Any

import numpy as np
import torch

from ..builder import Builder, Unsupported, Value, aten
from ..registry import Call, reader
from ..sizes import Size
from .shapes import axes_of, viewed


def _dims(call: Call, x: Value, axes: Value) -> list[int] | None:
    """The dims to reduce; None: x stays as it is."""
    builder, given = call.builder, axes_of(call, axes)
    if not given:
        return None if call.get("noop_with_empty_axes", 0) else list(range(builder.rank(x)))
    return builder.dims(given, builder.rank(x))


@reader(
    "ReduceSum", "ReduceMean", "ReduceMax", "ReduceMin", "ReduceProd", "ReduceL1", "ReduceL2", "ReduceLogSum", "ReduceLogSumExp",
    "ReduceSumSquare",
)  # fmt: skip
def reduced(call: Call, x: Value, axes: Value = None) -> Value:
    builder, kind = call.builder, call.op_type.removeprefix("Reduce")
    if isinstance(x, np.ndarray):
        return _of_sizes(call, kind, x)
    dims, keep, dtype = _dims(call, x, axes), bool(call.get("keepdims", 1)), builder.dtype(x)
    x = _prepared(builder, kind, x)
    if dims is not None and builder.rank(x):
        x = _REDUCERS[kind](builder, x, dims, keep)
    x = _finished(builder, kind, x)
    return builder.cast(x, dtype)


def _of_sizes(call: Call, kind: str, x: np.ndarray) -> np.ndarray:
    functions = {"Prod": (operator.mul, 1), "Sum": (operator.add, 0)}
    if kind not in functions or x.ndim > 1:
        raise Unsupported("sizes are added and multiplied alone")
    function, first = functions[kind]
    total = np.array(reduce(function, x.reshape(-1), first), dtype=object)
    return total.reshape(1) if call.get("keepdims", 1) and x.ndim else total


def _prepared(builder: Builder, kind: str, x: Value) -> Value:
    if kind == "L1":
        return builder.call(aten.abs.default, x)
    if kind in ("L2", "SumSquare"):
        return builder.call(aten.mul.Tensor, x, x)
    if kind == "LogSumExp" and not builder.dtype(x).is_floating_point:
        return builder.cast(x, torch.float64)
    return x


def _finished(builder: Builder, kind: str, x: Value) -> Value:
    """What follows the sum. Of integers, logarithms and roots are those of floats."""
    if kind in ("LogSum", "L2") and not builder.dtype(x).is_floating_point:
        x = builder.cast(x, torch.float64)
    if kind == "LogSum":
        return builder.call(aten.log.default, x)
    return builder.call(aten.sqrt.default, x) if kind == "L2" else x


def _sum(builder: Builder, x: Value, dims: list[int], keep: bool) -> Value:
    return builder.call(aten.sum.dim_IntList, x, dims, keep)


def _mean(builder: Builder, x: Value, dims: list[int], keep: bool) -> Value:
    if builder.dtype(x).is_floating_point:
        return builder.call(aten.mean.dim, x, dims, keep)
    count = reduce(operator.mul, (builder.shape(x)[dim] for dim in dims), 1)
    if isinstance(count, Size):
        raise Unsupported("the mean of integers over a symbolic size")
    return builder.call(aten.div.Scalar_mode, _sum(builder, x, dims, keep), count, rounding_mode="trunc")


def _product(builder: Builder, x: Value, dims: list[int], keep: bool) -> Value:
    for dim in sorted(dims, reverse=True):
        x = builder.call(aten.prod.dim_int, x, dim, keep)
    return x


def _log_sum_exp(builder: Builder, x: Value, dims: list[int], keep: bool) -> Value:
    return builder.call(aten.logsumexp.default, x, dims, keep)


def _extreme(name: str) -> Any:
    def reducer(builder: Builder, x: Value, dims: list[int], keep: bool) -> Value:
        dtype = builder.dtype(x)
        if dtype == torch.bool:
            target = aten.any.dims if name == "amax" else aten.all.dims
            return builder.call(target, x, dims, keep)
        sizes = builder.shape(x)
        if any(not isinstance(sizes[dim], Size) and sizes[dim] == 0 for dim in dims):
            shape = [1 if dim in dims else size for dim, size in enumerate(sizes) if keep or dim not in dims]
            return builder.full(shape, _bound(dtype, lowest=name == "amax"), dtype)
        return builder.call(getattr(aten, name).default, x, dims, keep)

    return reducer


def _bound(dtype: torch.dtype, *, lowest: bool) -> Any:
    """What the largest or smallest of no elements is."""
    if dtype.is_floating_point:
        return float("-inf") if lowest else float("inf")
    return torch.iinfo(dtype).min if lowest else torch.iinfo(dtype).max


_REDUCERS: dict[str, Any] = {
    "Sum": _sum,
    "L1": _sum,
    "L2": _sum,
    "LogSum": _sum,
    "SumSquare": _sum,
    "Mean": _mean,
    "Prod": _product,
    "LogSumExp": _log_sum_exp,
    "Max": _extreme("amax"),
    "Min": _extreme("amin"),
}


@reader("Softmax", "LogSoftmax")
def softmax(call: Call, x: Value) -> Value:
    target = aten.softmax.int if call.op_type == "Softmax" else aten.log_softmax.int
    return along_axis(call, x, lambda x, axis: call.builder.call(target, x, axis))


def along_axis(call: Call, x: Value, function: Callable[[Value, int], Value]) -> Value:
    """`function` of x and the axis that a normalization goes along: before opset 13 all dims from the axis on, as if they were one."""
    builder, rank = call.builder, call.builder.rank(x)
    old = call.version < 13
    axis = builder.dims([call.get("axis", 1 if old else -1)], rank)[0]
    if not old or axis >= rank - 1:
        return function(x, axis)
    flat = builder.call(aten.flatten.using_ints, x, axis, rank - 1)
    return viewed(call, function(flat, axis), builder.shape(x))
