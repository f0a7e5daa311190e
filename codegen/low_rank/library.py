"""The kernel in C++ as a shared library: compiled once with the system's compiler for the processor at hand, and loaded."""

import ctypes
import functools
import logging
import os
import shutil
import subprocess
import tempfile
import threading
from pathlib import Path
from typing import Any, Protocol

_log = logging.getLogger(__name__)
_FOLDER = Path(__file__).parent / "native"
# What fits the machine best comes first: some compilers have no -march=native, others come without OpenMP's library.
_TARGETS = (("-march=native", "-fopenmp"), ("-mcpu=native", "-fopenmp"), ("-fopenmp",), ())
_FLAGS = ("-std=c++17", "-O3", "-ffp-contract=off", "-shared", "-fPIC")
_SECONDS = 120  # a compiler that takes longer is stuck

_turn = threading.Lock()
_loaded: dict[tuple[str, ...], Any] = {}


class Shelf(Protocol):
    """Where the compiled library is kept, for this source, compiler and machine."""

    def get(self) -> bytes | None: ...

    def put(self, value: bytes) -> None: ...


def compiler() -> str | None:
    """The path of the C++ compiler, the one that CXX names, g++ or clang++; None where there is none."""
    named = os.environ.get("CXX")
    return next((found for name in ([named] if named else ["g++", "clang++"]) if (found := shutil.which(name))), None)


@functools.cache
def source() -> str:
    """All files of the kernel, for keys of what is compiled from them."""
    return "\n".join(
        f"// {path.name}\n{path.read_text(encoding='utf-8')}" for path in sorted(_FOLDER.iterdir()) if path.suffix in (".h", ".cpp")
    )


def library(shelf: Shelf | None = None, targets: tuple[tuple[str, ...], ...] = _TARGETS) -> Any:
    """The library, from this process, `shelf` or the compiler; None where no compiler makes one."""
    with _turn:
        if targets[0] not in _loaded:
            _loaded[targets[0]] = _taken(shelf) or _made(shelf, targets)
        return _loaded[targets[0]]


def _taken(shelf: Shelf | None) -> Any:
    binary = shelf.get() if shelf is not None else None
    return None if binary is None else _opened(binary)


def _made(shelf: Shelf | None, targets: tuple[tuple[str, ...], ...]) -> Any:
    command = compiler()
    if command is None:
        _log.warning("gw.lowrank_linear has no kernel here and decodes its weights at each call, which is slow: install g++ or clang++")
        return None
    for flags in targets:
        binary = _compiled(command, flags)
        opened = None if binary is None else _opened(binary)
        if binary is not None and opened is not None:
            if shelf is not None:
                shelf.put(binary)
            return opened
    return None


def _compiled(command: str, flags: tuple[str, ...]) -> bytes | None:
    with tempfile.TemporaryDirectory(prefix="graphwright-") as folder:
        path = Path(folder) / "kernel.so"
        arguments = [command, *_FLAGS, *flags, str(_FOLDER / "kernel.cpp"), "-o", str(path)]
        try:
            subprocess.run(arguments, check=True, capture_output=True, text=True, timeout=_SECONDS)
            return path.read_bytes()
        except (OSError, subprocess.SubprocessError) as error:
            _log.warning("%s does not compile the kernel of gw.lowrank_linear: %s", command, getattr(error, "stderr", None) or error)
            return None


def _opened(binary: bytes) -> Any:
    """The library as ctypes has it, which runs its functions without the interpreter's lock; None where it does not load. Its file is
    gone when it is mapped."""
    with tempfile.TemporaryDirectory(prefix="graphwright-") as folder:
        path = Path(folder) / "kernel.so"
        path.write_bytes(binary)
        try:
            opened = ctypes.CDLL(str(path))
        except OSError as error:
            _log.warning("the kernel of gw.lowrank_linear does not load: %s", error)
            return None
    opened.scratch_bytes.argtypes = opened.lowrank_linear.argtypes = (ctypes.c_char_p, ctypes.c_int64)
    opened.scratch_bytes.restype, opened.lowrank_linear.restype = ctypes.c_int64, None
    return opened
