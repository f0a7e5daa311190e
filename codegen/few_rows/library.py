"""The kernel of products of few rows in C++ (`native/`) as a shared library."""

import ctypes
from pathlib import Path
from typing import Any

from ..native.library import NativeLibrary


def _declare(opened: Any) -> None:
    opened.few_rows_linear.argtypes = (ctypes.c_char_p,)
    opened.few_rows_linear.restype, opened.takes_pairs.restype = None, ctypes.c_int64


library = NativeLibrary(Path(__file__).parent / "native", "products of a few rows", "takes ATen's", _declare)
