"""Which backend runs a program: what was asked for, if it can run here."""

import functools
import importlib.util

import torch

from ..codegen.native.library import compiler
from ..ir.errors import TargetError

BACKENDS = ("auto", "aten", "inductor", "tuned", "triton")


def choose_backend(name: str) -> str:
    """The backend that `name` means here.

    Raises:
        TargetError: it is unknown, or cannot run here; the message says what to do.
    """
    if name not in BACKENDS:
        raise TargetError(f"unknown backend {name!r}: it is one of {', '.join(BACKENDS)}")
    if name == "auto":
        return "tuned"
    if name == "inductor" and not has_cpp_compiler():
        raise TargetError("backend inductor needs a C++ compiler and found none: install g++ or clang++, or use backend='aten'")
    if name == "triton":
        if not torch.cuda.is_available():
            raise TargetError("backend triton needs a GPU and found none: use backend='inductor' or 'aten'")
        if not has_triton():
            raise TargetError("backend triton needs the package triton and found none: pip install 'graphwright[triton]'")
    return name


@functools.cache
def has_triton() -> bool:
    """Whether the package triton is installed."""
    return importlib.util.find_spec("triton") is not None


@functools.cache
def has_cpp_compiler() -> bool:
    """Whether a C++ compiler is on the path, or named by CXX as Inductor looks for it."""
    return compiler() is not None
