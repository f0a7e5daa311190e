"""The kernel of `gw.lowrank_linear` in C++ (`native/`) as a shared library."""

import ctypes
from pathlib import Path
from typing import Any

from ..native.library import NativeLibrary


def _declare(opened: Any) -> None:
    opened.scratch_bytes.argtypes = opened.lowrank_linear.argtypes = (ctypes.c_char_p, ctypes.c_int64)
    opened.scratch_bytes.restype, opened.lowrank_linear.restype = ctypes.c_int64, None


library = NativeLibrary(Path(__file__).parent / "native", "gw.lowrank_linear", "decodes its weights at each call, which is slow", _declare)
