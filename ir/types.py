"""How types are written: `f32[2, 64, s0]`, `i64[]`, `size(2*s0)`, with strides and device only where not the default."""

from typing import Any

import torch

from .infer import contiguous_stride, same_size
from .symbols import SymbolTable

DTYPES: dict[str, torch.dtype] = {
    "f64": torch.float64,
    "f32": torch.float32,
    "f16": torch.float16,
    "bf16": torch.bfloat16,
    "i64": torch.int64,
    "i32": torch.int32,
    "i16": torch.int16,
    "i8": torch.int8,
    "u8": torch.uint8,
    "u16": torch.uint16,
    "u32": torch.uint32,
    "u64": torch.uint64,
    "bool": torch.bool,
    "c32": torch.complex32,
    "c64": torch.complex64,
    "c128": torch.complex128,
    "f8e4m3fn": torch.float8_e4m3fn,
    "f8e5m2": torch.float8_e5m2,
    "f8e4m3fnuz": torch.float8_e4m3fnuz,
    "f8e5m2fnuz": torch.float8_e5m2fnuz,
    "f8e8m0fnu": torch.float8_e8m0fnu,
}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


def type_text(value: Any, symbols: SymbolTable) -> str:
    """The type of a metadata value as the text form writes it."""
    if isinstance(value, torch.Tensor):
        return tensor_type_text(value.dtype, value.shape, value.stride(), value.device, symbols)
    if isinstance(value, tuple | list):
        return "(" + ", ".join(type_text(item, symbols) for item in value) + ")"
    if isinstance(value, torch.SymInt | int) and not isinstance(value, bool):
        return f"size({symbols.text(value)})"
    if isinstance(value, torch.SymBool | bool):
        return "condition"
    if isinstance(value, torch.SymFloat | float):
        return "scalar"
    if value is None:
        return "none"
    raise TypeError(f"no type is written for {type(value).__name__}")


def tensor_type_text(dtype: torch.dtype, shape: Any, stride: Any, device: torch.device, symbols: SymbolTable) -> str:
    text = f"{DTYPE_NAMES[dtype]}[{', '.join(symbols.text(size) for size in shape)}]"
    if not _row_major(shape, stride):
        text += f" strides [{', '.join(map(symbols.stride_text, stride))}]"
    if device.type != "cpu":
        text += f" on {device}"
    return text


def _row_major(shape: Any, stride: Any) -> bool:
    if any(isinstance(size, int) and size == 0 for size in shape):
        return True
    return all(same_size(a, b) for a, b in zip(stride, contiguous_stride(shape), strict=True))
