"""The kernel of products with weights in panels in C++ (`native/`) as a shared library."""

import ctypes
from pathlib import Path
from typing import Any

from ..native.library import NativeLibrary


def _declare(opened: Any) -> None:
    opened.panel_linear.argtypes = (ctypes.c_char_p,)
    opened.panel_linear.restype = None
    for told in (opened.takes_pairs, opened.panel_width, opened.panel_step):
        told.argtypes, told.restype = (), ctypes.c_int64


library = NativeLibrary(Path(__file__).parent / "native", "products with packed weights", "takes oneDNN's", _declare)
