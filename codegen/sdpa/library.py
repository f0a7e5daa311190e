"""The kernel of `scaled_dot_product_attention` in C++ (`native/`) as a shared library."""

import ctypes
from pathlib import Path
from typing import Any

from ..native.library import NativeLibrary


def _declare(opened: Any) -> None:
    opened.scratch_bytes.argtypes = opened.attention.argtypes = (ctypes.c_char_p,)
    opened.scratch_bytes.restype, opened.attention.restype = ctypes.c_int64, None


library = NativeLibrary(Path(__file__).parent / "native", "scaled_dot_product_attention", "takes ATen's", _declare)
