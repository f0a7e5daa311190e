"""The kernel of `gw.rat_attention` and `gw.rat_cached_attention` in C++ (`native/`) as a shared library."""

import ctypes
from pathlib import Path
from typing import Any

from ..native.library import NativeLibrary


def _declare(opened: Any) -> None:
    opened.scratch_bytes.argtypes = opened.rat_attention.argtypes = (ctypes.c_char_p,)
    opened.scratch_bytes.restype = ctypes.c_int64
    opened.rat_attention.restype = None


library = NativeLibrary(Path(__file__).parent / "native", "gw.rat_attention", "computes a score for each two tokens", _declare)
