"""ONNX forms of operators of ATen that torch's exporter has none for: the least and greatest of all elements, a stable order, what a
division by a size leaves, sums of sizes, and what takes float32 numbers apart into exponent and mantissa, and puts them together. Scales
that are powers of two are made by the latter, so each is exact, with powers of two from a table: Pow may be off."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

aten = torch.ops.aten

_FRACTION, _LOWEST, _HIGHEST = 23, -149, 128  # bits of a float32's fraction; exponents of its smallest number, and of infinity


def translations() -> dict[Any, Callable[..., Any]]:
    """By overload, as `torch.onnx.export(custom_translation_table=...)` takes them."""
    return {
        aten.amin.default: amin,
        aten.amax.default: amax,
        torch.sym_sum: sym_sum,
        aten.sort.stable: sort,
        aten.remainder.Scalar: remainder,
        aten.frexp.Tensor: frexp,
        aten.view.dtype: number_of_bits,
    }


def amin(self: Any, dim: Sequence[int] = (), keepdim: bool = False) -> Any:
    """The least element along `dim`, or of all."""
    return _operators().ReduceMin(self, _axes(dim), keepdims=int(keepdim))


def amax(self: Any, dim: Sequence[int] = (), keepdim: bool = False) -> Any:
    """The greatest element along `dim`, or of all."""
    return _operators().ReduceMax(self, _axes(dim), keepdims=int(keepdim))


def _axes(dim: Sequence[int]) -> Any:
    import onnx

    return _operators().Constant(value=onnx.numpy_helper.from_array(np.array(dim, np.int64))) if len(dim) else None


def sym_sum(*sizes: Any) -> Any:
    """The sum of sizes, which come one after another or as a list."""
    flat = [size for each in sizes for size in (each if isinstance(each, list | tuple) else [each])]
    op = _operators()
    return functools.reduce(op.Add, [_integer(size) if isinstance(size, int) else size for size in flat])


def sort(self: Any, stable: bool = False, dim: int = -1, descending: bool = False) -> Any:
    """Elements in order along `dim`, and where each was; of equal ones the standard, too, has the first come first."""
    op = _operators()
    size = op.Gather(op.Shape(self), op.Constant(value_ints=[dim]))
    return op.TopK(self, size, axis=dim, largest=int(descending), sorted=1)


def remainder(self: Any, other: Any) -> Any:
    """x - floor(x / n) n, for n a number or a size: slots of a ring are places modulo how many it has."""
    op = _operators()
    divisor = op.CastLike(other, self)
    if not self.dtype.is_floating_point():
        return op.Mod(self, divisor)
    return op.Sub(self, op.Mul(op.Floor(op.Div(self, divisor)), divisor))


def frexp(self: Any) -> Any:
    """x = mantissa 2^exponent, 1/2 <= |mantissa| < 1: f32[..] -> f32[..], i32[..]. What is 0 or not finite is its own mantissa, and its
    exponent 0.

    The logarithm says which power of two is near, and comparisons with its neighbours which one it is.
    """
    op, size = _operators(), _operators().Abs(self)
    has_exponent = op.And(op.Greater(size, _float(0.0)), op.Less(size, _float(np.inf)))
    sound = op.Where(has_exponent, size, _float(1.0))
    near = op.Cast(op.Floor(op.Div(op.Log(sound), _float(np.log(2.0)))), to=_INT64)
    near = op.Max(op.Min(near, _integer(_HIGHEST - 1)), _integer(_LOWEST))
    above, below = op.LessOrEqual(_power(op.Add(near, _integer(1))), sound), op.Greater(_power(near), sound)
    power = op.Sub(op.Add(near, op.Cast(above, to=_INT64)), op.Cast(below, to=_INT64))  # 2^power <= |x| < 2^(power + 1)
    mantissa = op.Mul(op.Div(self, _power(op.Where(has_exponent, power, _integer(0)))), _float(0.5))
    exponent = op.Where(has_exponent, op.Add(power, _integer(1)), _integer(0))
    return op.Where(has_exponent, mantissa, self), op.Cast(exponent, to=_INT32)


def number_of_bits(self: Any, dtype: int) -> Any:
    """The float32 that 32 bits are: i32[..] -> f32[..], (-1)^s (m + [e > 0] 2^23) 2^(max(e, 1) - 150).

    Raises:
        ValueError: other types than these.
    """
    import onnx_ir as ir

    if dtype != ir.DataType.FLOAT or self.dtype != ir.DataType.INT32:
        raise ValueError("bits are read as another type of numbers, which ONNX models can do of int32 as float32 alone")
    op = _operators()
    bits = op.Mod(op.Cast(self, to=_INT64), _integer(2**31))  # all but the sign
    exponent, fraction = op.Div(bits, _integer(2**_FRACTION)), op.Mod(bits, _integer(2**_FRACTION))
    is_normal = op.Cast(op.Greater(exponent, _integer(0)), to=_INT64)
    significand = op.Cast(op.Add(fraction, op.Mul(is_normal, _integer(2**_FRACTION))), to=_FLOAT)
    finite = op.Mul(significand, _power(op.Sub(op.Max(op.Min(exponent, _integer(254)), _integer(1)), _integer(127 + _FRACTION))))
    beyond = op.Where(op.Equal(fraction, _integer(0)), _float(np.inf), _float(np.nan))
    size = op.Where(op.Equal(exponent, _integer(255)), beyond, finite)
    is_negative = op.Less(self, op.Constant(value=_scalar(0, np.int32)))
    return op.Mul(size, op.Where(is_negative, _float(-1.0), _float(1.0)))  # Where itself loses the sign of -0 in onnxruntime


_FLOAT, _INT32, _INT64 = 1, 6, 7  # TensorProto's numbers of types


def _operators() -> Any:
    from onnxscript import opset21  # all that is used here is the same in later ones

    return opset21


def _power(exponent: Any) -> Any:
    """2^exponent, for exponents of float32 numbers and of infinity: i64[..] -> f32[..]"""
    import onnx

    op = _operators()
    table = np.array([2.0**power for power in range(_LOWEST, _HIGHEST)] + [np.inf], np.float32)
    return op.Gather(op.Constant(value=onnx.numpy_helper.from_array(table)), op.Sub(exponent, _integer(_LOWEST)))


def _float(value: float) -> Any:
    return _operators().Constant(value=_scalar(value, np.float32))


def _integer(value: int) -> Any:
    return _operators().Constant(value=_scalar(value, np.int64))


def _scalar(value: float, dtype: Any) -> Any:
    import onnx

    return onnx.numpy_helper.from_array(np.array(value, dtype))
