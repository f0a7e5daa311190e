"""A kernel in C++ as a shared library: compiled once with the system's compiler for the processor at hand, and loaded."""

import ctypes
import functools
import logging
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

from ...ir.forks import new_lock

_log = logging.getLogger(__name__)
_SHARED = Path(__file__).parent
# What fits the machine best comes first: some compilers have no -march=native, others come without OpenMP's library.
TARGETS = (("-march=native", "-fopenmp"), ("-mcpu=native", "-fopenmp"), ("-fopenmp",), ())
_FLAGS = ("-std=c++17", "-O3", "-ffp-contract=off", "-shared", "-fPIC")
_SECONDS = 120  # a compiler that takes longer is stuck


class Shelf(Protocol):
    """Where the compiled library is kept, for this source, compiler and machine."""

    def get(self) -> bytes | None: ...

    def put(self, value: bytes) -> None: ...


def compiler() -> str | None:
    """The path of the C++ compiler, the one that CXX names, g++ or clang++; None where there is none."""
    named = os.environ.get("CXX")
    return next((found for name in ([named] if named else ["g++", "clang++"]) if (found := shutil.which(name))), None)


class NativeLibrary:
    """The library of `folder`, whose `kernel.cpp` includes the other files there and those of this room.

    `op` is the operator that it is for and `instead` what runs in its place where there is no compiler, for messages; `declare` gives a
    loaded library the types of its functions.
    """

    def __init__(self, folder: Path, op: str, instead: str, declare: Callable[[Any], None]):
        self._folder, self._op, self._instead, self._declare = folder, op, instead, declare
        self._turn = new_lock()
        self._loaded: dict[tuple[str, ...], Any] = {}

    @functools.cached_property
    def source(self) -> str:
        """All files of the kernel, for keys of what is compiled from them."""
        files = [path for folder in (_SHARED, self._folder) for path in sorted(folder.iterdir()) if path.suffix in (".h", ".cpp")]
        return "\n".join(f"// {path.name}\n{path.read_text(encoding='utf-8')}" for path in files)

    def __call__(self, shelf: Shelf | None = None, targets: tuple[tuple[str, ...], ...] = TARGETS) -> Any:
        """The library, from this process, `shelf` or the compiler; None where no compiler makes one."""
        with self._turn:
            if targets[0] not in self._loaded:
                self._loaded[targets[0]] = self._taken(shelf) or self._made(shelf, targets)
            return self._loaded[targets[0]]

    def _taken(self, shelf: Shelf | None) -> Any:
        binary = shelf.get() if shelf is not None else None
        return None if binary is None else self._opened(binary)

    def _made(self, shelf: Shelf | None, targets: tuple[tuple[str, ...], ...]) -> Any:
        command = compiler()
        if command is None:
            _log.warning("%s has no kernel here and %s: install g++ or clang++", self._op, self._instead)
            return None
        for flags in targets:
            binary = self._compiled(command, flags)
            opened = None if binary is None else self._opened(binary)
            if binary is not None and opened is not None:
                if shelf is not None:
                    shelf.put(binary)
                return opened
        return None

    def _compiled(self, command: str, flags: tuple[str, ...]) -> bytes | None:
        with tempfile.TemporaryDirectory(prefix="graphwright-") as folder:
            path = Path(folder) / "kernel.so"
            arguments = [command, *_FLAGS, *flags, f"-I{_SHARED}", str(self._folder / "kernel.cpp"), "-o", str(path)]
            try:
                subprocess.run(arguments, check=True, capture_output=True, text=True, timeout=_SECONDS)
                return path.read_bytes()
            except (OSError, subprocess.SubprocessError) as error:
                _log.warning("%s does not compile the kernel of %s: %s", command, self._op, _reason(error))
                return None

    def _opened(self, binary: bytes) -> Any:
        """The library as ctypes has it, which runs its functions without the interpreter's lock; None where it does not load. Its file
        is gone when it is mapped."""
        with tempfile.TemporaryDirectory(prefix="graphwright-") as folder:
            path = Path(folder) / "kernel.so"
            path.write_bytes(binary)
            try:
                opened = ctypes.CDLL(str(path))
            except OSError as error:
                _log.warning("the kernel of %s does not load: %s", self._op, error)
                return None
        self._declare(opened)
        return opened


def _reason(error: OSError | subprocess.SubprocessError) -> str:
    """What a user can act on: the text of these errors is the whole command."""
    if isinstance(error, subprocess.TimeoutExpired):
        return f"it was still at it after {error.timeout:g} s and was stopped"
    if isinstance(error, subprocess.CalledProcessError):
        return error.stderr or f"it ended with code {error.returncode} and said nothing"
    return str(error)
