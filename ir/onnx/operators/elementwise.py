"""Operators on elements: arithmetic, comparisons, logic, activations, casts."""

import operator
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from ..builder import WIDER, Unsupported, Value, aten
from ..dtypes import torch_dtype
from ..registry import Call, reader
from ..sizes import Size, maximum, minimum, quotient, same

_UNARY = {
    "Abs": "abs",
    "Acos": "acos",
    "Acosh": "acosh",
    "Asin": "asin",
    "Asinh": "asinh",
    "Atan": "atan",
    "Atanh": "atanh",
    "BitwiseNot": "bitwise_not",
    "Ceil": "ceil",
    "Cos": "cos",
    "Cosh": "cosh",
    "Erf": "erf",
    "Exp": "exp",
    "Floor": "floor",
    "IsNaN": "isnan",
    "Log": "log",
    "Mish": "mish",
    "Not": "logical_not",
    "Reciprocal": "reciprocal",
    "Relu": "relu",
    "Round": "round",
    "Sigmoid": "sigmoid",
    "Sign": "sign",
    "Sin": "sin",
    "Sinh": "sinh",
    "Sqrt": "sqrt",
    "Tan": "tan",
    "Tanh": "tanh",
}


@reader(*_UNARY)
def unary(call: Call, x: Value) -> Value:
    if call.builder.dtype(x) in WIDER:
        return call.builder.widened(getattr(aten, _UNARY[call.op_type]).default, x)
    return call.builder.call(getattr(aten, _UNARY[call.op_type]).default, x)


@reader("Neg")
def negative(call: Call, x: Value) -> Value:
    return -x if isinstance(x, np.ndarray) else call.builder.call(aten.neg.default, x)


@reader("Identity")
def identity(call: Call, x: Value) -> Value:
    return x


# --- arithmetic --------------------------------------------------------------------------------------------------------------

_ON_SIZES: dict[str, Callable[[Any, Any], Any]] = {
    "Add": operator.add,
    "Sub": operator.sub,
    "Mul": operator.mul,
    "Div": quotient,
    "Mod": operator.mod,
    "Max": maximum,
    "Min": minimum,
}


def on_sizes(call: Call, inputs: tuple[Value, ...]) -> np.ndarray | None:
    """The result where an operand is symbolic and none depends on data."""
    if not any(isinstance(each, np.ndarray) for each in inputs):
        return None
    arrays = [call.builder.sizes(each) for each in inputs]
    if any(array is None for array in arrays) or call.op_type not in _ON_SIZES:
        return None
    function = np.frompyfunc(_ON_SIZES[call.op_type], 2, 1)
    result: Any = arrays[0]
    for array in arrays[1:]:
        result = np.asarray(function(result, array), dtype=object)
    return result


@reader("Add", "Sub", "Mul")
def arithmetic(call: Call, a: Value, b: Value) -> Value:
    sizes = on_sizes(call, (a, b))
    return sizes if sizes is not None else call.builder.binary(call.op_type.lower(), a, b)


@reader("Div")
def divide(call: Call, a: Value, b: Value) -> Value:
    """Quotients of integers are cut off towards zero."""
    sizes, builder = on_sizes(call, (a, b)), call.builder
    if sizes is not None:
        return sizes
    if builder.dtype(a).is_floating_point:
        return builder.div(a, b)
    compute = builder.widened if builder.dtype(a) in WIDER else builder.call
    return compute(aten.div.Tensor_mode, a, b, rounding_mode="trunc")


@reader("Mod")
def modulo(call: Call, a: Value, b: Value) -> Value:
    """The remainder has the sign of the divisor, with fmod=1 that of the dividend."""
    sizes = on_sizes(call, (a, b))
    if sizes is not None and not call.get("fmod", 0):
        return sizes
    compute = call.builder.widened if call.builder.dtype(a) in WIDER else call.builder.call
    return compute(aten.fmod.Tensor if call.get("fmod", 0) else aten.remainder.Tensor, a, b)


@reader("Pow")
def power(call: Call, a: Value, b: Value) -> Value:
    """The result has the dtype of the base."""
    builder, dtype = call.builder, call.builder.dtype(a)
    if isinstance(b, torch.Tensor) and b.numel() == 1 and b.dim() <= builder.rank(a) and not isinstance(a, torch.Tensor):
        exponent = b.item()
        if exponent == int(exponent):
            exponent = int(exponent)
        if dtype.is_floating_point or (isinstance(exponent, int) and exponent >= 0):
            return builder.call(aten.pow.Tensor_Scalar, a, exponent)
    result = builder.call(aten.pow.Tensor_Tensor, a, b)
    return builder.cast(result, dtype)


@reader("Max", "Min")
def extreme(call: Call, *inputs: Value) -> Value:
    sizes, builder = on_sizes(call, inputs), call.builder
    if sizes is not None:
        return sizes
    target = aten.maximum.default if call.op_type == "Max" else aten.minimum.default
    result = inputs[0]
    for each in inputs[1:]:
        result = (builder.widened if builder.dtype(each) in WIDER else builder.call)(target, result, each)
    return result


@reader("Sum", "Mean")
def total(call: Call, *inputs: Value) -> Value:
    result = inputs[0]
    for each in inputs[1:]:
        result = call.builder.add(result, each)
    if call.op_type == "Mean" and len(inputs) > 1:
        result = call.builder.call(aten.div.Scalar, result, len(inputs))
    return result


# --- comparisons and logic ------------------------------------------------------------------------------------------------------

_COMPARISONS = {"Equal": "eq", "Less": "lt", "LessOrEqual": "le", "Greater": "gt", "GreaterOrEqual": "ge"}
_LOGIC = {
    "And": "logical_and",
    "Or": "logical_or",
    "Xor": "logical_xor",
    "BitwiseAnd": "bitwise_and",
    "BitwiseOr": "bitwise_or",
    "BitwiseXor": "bitwise_xor",
}


@reader(*_COMPARISONS)
def compare(call: Call, a: Value, b: Value) -> Value:
    if call.op_type == "Equal" and any(isinstance(each, np.ndarray) for each in (a, b)):
        decided = _decided_equal(call, a, b)
        if decided is not None:
            return decided
    return call.builder.binary(_COMPARISONS[call.op_type], a, b)


def _decided_equal(call: Call, a: Value, b: Value) -> torch.Tensor | None:
    """Whether sizes are equal, where that is known whatever they are: a size is never negative, -1 the commonest operand."""
    left, right = call.builder.sizes(a), call.builder.sizes(b)
    if left is None or right is None:
        return None
    pairs = np.broadcast(left, right)
    verdicts = [_is_equal(x, y) for x, y in pairs]
    if any(verdict is None for verdict in verdicts):
        return None
    return torch.tensor(verdicts, dtype=torch.bool).reshape(pairs.shape)


def _is_equal(a: Any, b: Any) -> bool | None:
    if not isinstance(a, Size) and not isinstance(b, Size):
        return bool(a == b)
    if isinstance(a, Size) and isinstance(b, Size):
        return True if same(a, b) else None
    number = b if isinstance(a, Size) else a
    return False if number < 0 else None


@reader(*_LOGIC)
def logic(call: Call, a: Value, b: Value) -> Value:
    name = _LOGIC[call.op_type]
    packet = getattr(aten, name)
    compute = call.builder.widened if call.builder.dtype(a) in WIDER else call.builder.call
    return compute(packet.default if name.startswith("logical") else packet.Tensor, a, b)


@reader("BitShift")
def bit_shift(call: Call, a: Value, b: Value) -> Value:
    builder, dtype = call.builder, call.builder.dtype(a)
    target = aten.bitwise_left_shift.Tensor if call.get("direction") == "LEFT" else aten.bitwise_right_shift.Tensor
    return (builder.widened if dtype in WIDER else builder.call)(target, a, b)


@reader("Where")
def where(call: Call, condition: Value, a: Value, b: Value) -> Value:
    builder = call.builder
    if isinstance(condition, torch.Tensor) and any(isinstance(each, np.ndarray) for each in (a, b)):
        left, right = builder.sizes(a), builder.sizes(b)
        if left is not None and right is not None:
            return np.where(condition.numpy(), left, right)
    return builder.call(aten.where.self, condition, a, b)


@reader("IsInf")
def is_infinite(call: Call, x: Value) -> Value:
    builder = call.builder
    positive, negative = call.get("detect_positive", 1), call.get("detect_negative", 1)
    if positive and negative:
        return builder.call(aten.isinf.default, x)
    if not positive and not negative:
        return builder.call(aten.zeros_like.default, x, dtype=torch.bool)
    return builder.call(aten.eq.Scalar, x, float("inf" if positive else "-inf"))


# --- casts ------------------------------------------------------------------------------------------------------------------------


@reader("Cast")
def cast(call: Call, x: Value) -> Value:
    return converted(call, x, torch_dtype(call.get("to")), saturate=bool(call.get("saturate", 1)))


@reader("CastLike")
def cast_like(call: Call, x: Value, like: Value) -> Value:
    return converted(call, x, call.builder.dtype(like), saturate=bool(call.get("saturate", 1)))


_SATURATING = (torch.float8_e4m3fn, torch.float8_e5m2)


def converted(call: Call, x: Value, dtype: torch.dtype, *, saturate: bool) -> Value:
    builder, source = call.builder, call.builder.dtype(x)
    if isinstance(x, np.ndarray):
        return builder.cast(x, dtype)
    if saturate and dtype in _SATURATING and source in (torch.float32, torch.float16, torch.bfloat16):
        # Which versions of torch saturate where differs; of numbers within range all round alike.
        largest = torch.finfo(dtype).max
        return builder.cast(builder.call(aten.clamp.default, x, -largest, largest), dtype)
    narrow = dtype.is_floating_point and dtype.itemsize == 1
    if narrow or (source.is_floating_point and source.itemsize == 1 and dtype.itemsize == 1 and dtype != source):
        raise Unsupported(f"torch and ONNX round to {str(dtype).removeprefix('torch.')} in different ways")
    if source.is_floating_point and dtype in (torch.uint8, torch.int8, torch.int16, torch.uint16, torch.uint32):
        # Of values that do not fit, C++ leaves the result open; ONNX's tests take them modulo, by way of a wider integer.
        return builder.cast(builder.cast(x, torch.int64), dtype)
    return builder.cast(x, dtype)


@reader("BitCast")
def bit_cast(call: Call, x: Value) -> Value:
    builder, dtype = call.builder, torch_dtype(call.get("to"))
    if dtype == torch.bool or builder.dtype(x) == torch.bool:
        raise Unsupported("torch's booleans are no bits")
    return builder.call(aten.view.dtype, builder.node(x) if not isinstance(x, torch.Tensor) else x, dtype)


# --- activations ----------------------------------------------------------------------------------------------------------------


@reader("Clip")
def clip(call: Call, x: Value, low: Value = None, high: Value = None) -> Value:
    """Before opset 11 the bounds are attributes."""
    builder = call.builder
    if call.version < 11:
        low, high = (None if bound is None else torch.tensor(bound) for bound in (call.get("min"), call.get("max")))
    if low is None and high is None:
        return x
    numbers = [each.item() if isinstance(each, torch.Tensor) else each for each in (low, high)]
    if any(isinstance(each, float | int) or each is None for each in numbers) and not any(_is_dynamic(each) for each in numbers):
        if builder.dtype(x) in (torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int8):
            return builder.call(aten.clamp.default, x, *numbers)
    # Above all the lower bound gives way: min(max(x, low), high).
    result = x if low is None else builder.call(aten.maximum.default, x, low)
    return result if high is None else builder.call(aten.minimum.default, result, high)


def _is_dynamic(value: Any) -> bool:
    return value is not None and not isinstance(value, float | int)


@reader("Elu")
def elu(call: Call, x: Value) -> Value:
    return call.builder.call(aten.elu.default, x, call.get("alpha", 1.0))


@reader("Celu")
def celu(call: Call, x: Value) -> Value:
    return call.builder.call(aten.celu.default, x, call.get("alpha", 1.0))


@reader("Selu")
def selu(call: Call, x: Value) -> Value:
    builder, alpha, gamma = call.builder, call.get("alpha", 1.67326319217681884765625), call.get("gamma", 1.05070102214813232421875)
    return builder.call(aten.elu.default, x, alpha, gamma)


@reader("LeakyRelu")
def leaky_relu(call: Call, x: Value) -> Value:
    return call.builder.call(aten.leaky_relu.default, x, call.get("alpha", 0.01))


@reader("ThresholdedRelu")
def thresholded_relu(call: Call, x: Value) -> Value:
    return call.builder.call(aten.threshold.default, x, call.get("alpha", 1.0), 0.0)


@reader("PRelu")
def prelu(call: Call, x: Value, slope: Value) -> Value:
    builder = call.builder
    return builder.call(aten.where.self, builder.call(aten.lt.Scalar, x, 0), builder.mul(x, slope), x)


@reader("Gelu")
def gelu(call: Call, x: Value) -> Value:
    return call.builder.call(aten.gelu.default, x, approximate=call.get("approximate", "none"))


@reader("HardSigmoid")
def hard_sigmoid(call: Call, x: Value) -> Value:
    builder, alpha, beta = call.builder, call.get("alpha", 0.2), call.get("beta", 0.5)
    line = builder.call(aten.add.Scalar, builder.call(aten.mul.Scalar, x, alpha), beta)
    return builder.call(aten.clamp.default, line, 0.0, 1.0)


@reader("HardSwish")
def hard_swish(call: Call, x: Value) -> Value:
    return call.builder.call(aten.hardswish.default, x)


@reader("Swish")
def swish(call: Call, x: Value) -> Value:
    builder, alpha = call.builder, call.get("alpha", 1.0)
    if alpha == 1.0:
        return builder.call(aten.silu.default, x)
    return builder.mul(x, builder.call(aten.sigmoid.default, builder.call(aten.mul.Scalar, x, alpha)))


@reader("Softplus")
def softplus(call: Call, x: Value) -> Value:
    return call.builder.call(aten.softplus.default, x)


@reader("Softsign")
def softsign(call: Call, x: Value) -> Value:
    builder = call.builder
    return builder.div(x, builder.call(aten.add.Scalar, builder.call(aten.abs.default, x), 1))


@reader("Shrink")
def shrink(call: Call, x: Value) -> Value:
    builder, bias, lambd = call.builder, call.get("bias", 0.0), call.get("lambd", 0.5)
    zero = builder.call(aten.zeros_like.default, x)
    above = builder.call(aten.where.self, builder.call(aten.gt.Scalar, x, lambd), builder.call(aten.sub.Scalar, x, bias), zero)
    return builder.call(aten.where.self, builder.call(aten.lt.Scalar, x, -lambd), builder.call(aten.add.Scalar, x, bias), above)


@reader("Dropout")
def dropout(call: Call, x: Value, ratio: Value = None, training: Value = None) -> Any:
    """Before opset 12 it never draws, and its standard leaves open what the mask holds."""
    builder = call.builder
    if call.version < 12:
        call.get("ratio")
        if call.wants(1):
            raise Unsupported("its mask is the runtime's own before opset 12")
    if training is not None and bool(builder.constant(training, "training flag").item()):
        if ratio is None or float(builder.constant(ratio, "ratio").item()) != 0.0:
            raise Unsupported("it draws random numbers, which ONNX and torch draw in different ways")
    if not call.wants(1):
        return x
    return x, builder.call(aten.ones_like.default, x, dtype=torch.bool)
