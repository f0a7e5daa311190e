"""The processors that kernels in C++ are tested for: this one, and older ones that it can play."""

import hashlib
import os
import platform
from pathlib import Path

import pytest

from graphwright.codegen.native import library
from graphwright.runtime.atomic import atomic_write

TARGETS = {"native": library.TARGETS}
if platform.machine() == "x86_64":
    TARGETS |= {"AVX2": (("-march=haswell", "-fopenmp"),), "plain": (("-march=x86-64", "-fopenmp"),)}


class Kept:
    """The place of a compiled library among those that the processes of a test run share."""

    def __init__(self, source, target):
        self.folder = Path(os.environ["GRAPHWRIGHT_TEST_KERNELS"])
        self.path = self.folder / f"{target}-{hashlib.sha256(source.encode()).hexdigest()}"

    def get(self):
        return self.path.read_bytes() if self.path.exists() else None

    def put(self, value):
        self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        with atomic_write(self.path) as file:
            file.write(value)


def library_for(kernels, target):
    """The library of `kernels` for one of `TARGETS`; the test is skipped where no compiler makes it."""
    native = kernels(Kept(kernels.source, target), TARGETS[target])
    if native is None:
        pytest.skip("no C++ compiler: install g++")
    return native
