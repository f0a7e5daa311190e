"""From the text of a kernel to an operation on tensors.

A kernel's text is a Python module of our own making; triton reads the source of its functions, so the module is entered in
`linecache` under the file's name and never written to disk. Whether triton compiles or interprets is settled when it is first imported:
its own library functions are decorated then.
"""

import hashlib
import importlib.util
import linecache
import sys
from collections.abc import Callable
from importlib.abc import SourceLoader
from types import ModuleType
from typing import Any

import torch

from ...ir.errors import TargetError
from ...ir.forks import new_lock
from .emit import Kernel

_LOADED: dict[str, ModuleType] = {}
_LOCK = new_lock()


class Launch:
    """A kernel as an operation: tensors in, the tuple of its outputs out."""

    def __init__(self, kernel: Kernel):
        self.kernel = kernel
        self._run: Callable[..., tuple[torch.Tensor, ...]] = load(kernel).run

    def __call__(self, *inputs: Any) -> tuple[torch.Tensor, ...]:
        with torch.cuda.device_of(inputs[0]):  # triton launches on the current device; this does nothing for CPU tensors
            return self._run(*inputs)

    def __str__(self) -> str:
        return f"kernel {self.kernel.name}"


class _Text(SourceLoader):
    def __init__(self, name: str, text: str):
        self._name = name
        self._text = text

    def get_filename(self, fullname: str) -> str:
        return self._name

    def get_data(self, path: str) -> bytes:
        return self._text.encode()


def load(kernel: Kernel) -> ModuleType:
    """The module of a kernel; kernels that differ in their headers alone share one, and what triton compiled for it."""
    with _LOCK:
        if kernel.digest not in _LOADED:
            _LOADED[kernel.digest] = _module(kernel.file_name, kernel.source)
        return _LOADED[kernel.digest]


def _module(file_name: str, text: str) -> ModuleType:
    name = f"graphwright_triton_{hashlib.sha256(text.encode()).hexdigest()[:16]}"
    # An entry without a modification time is kept as it is: there is no file to compare it with.
    linecache.cache[file_name] = (len(text), None, text.splitlines(keepends=True), file_name)
    loader = _Text(file_name, text)
    spec = importlib.util.spec_from_loader(name, loader)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    loader.exec_module(module)
    return module


def require_interpreter() -> None:
    """Checks that triton interprets in this process.

    Raises:
        TargetError: triton was imported to compile.
    """
    import triton
    from triton.runtime.interpreter import InterpretedFunction

    if not isinstance(triton.language.sum, InterpretedFunction):
        raise TargetError("triton was imported to compile, not to interpret: start Python with TRITON_INTERPRET=1")
