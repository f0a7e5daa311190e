"""The kernels of `gw.kv_append` and `gw.cached_attention` in C++ (`native/`) as a shared library."""

import ctypes
from pathlib import Path
from typing import Any

from ..native.library import NativeLibrary


def _declare(opened: Any) -> None:
    opened.scratch_bytes.argtypes = opened.cached_attention.argtypes = (ctypes.c_char_p,)
    opened.kv_append.argtypes = (ctypes.c_char_p, ctypes.c_int64)
    opened.scratch_bytes.restype = opened.kv_append.restype = ctypes.c_int64
    opened.cached_attention.restype = None


library = NativeLibrary(Path(__file__).parent / "native", "gw.cached_attention", "attends with ATen, a row at a time", _declare)
