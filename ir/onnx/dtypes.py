"""ONNX element types as torch dtypes."""

import torch

from ..errors import CaptureError
from ..ops.onnx_node import DTYPES as NUMBERED

_DTYPES = NUMBERED | {
    17: torch.float8_e4m3fn,
    18: torch.float8_e4m3fnuz,
    19: torch.float8_e5m2,
    20: torch.float8_e5m2fnuz,
    24: torch.float8_e8m0fnu,
}
_NAMES = {8: "strings", 14: "complex64", 15: "complex128", 21: "uint4", 22: "int4", 23: "float4e2m1", 25: "uint2", 26: "int2"}
_NUMBERS = {dtype: number for number, dtype in _DTYPES.items()}


def torch_dtype(element_type: int) -> torch.dtype:
    """The dtype of elements of type `element_type`.

    Raises:
        CaptureError: torch has none.
    """
    if element_type not in _DTYPES:
        raise CaptureError(f"tensors of {_NAMES.get(element_type, f'element type {element_type}')} have no place in the IR")
    return _DTYPES[element_type]


def element_type(dtype: torch.dtype) -> int:
    """The ONNX element type of `dtype`.

    Raises:
        CaptureError: ONNX has none.
    """
    if dtype not in _NUMBERS:
        raise CaptureError(f"ONNX has no tensors of {dtype}")
    return _NUMBERS[dtype]
