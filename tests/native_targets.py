"""The processors that kernels in C++ are tested for: this one, and older ones that it can play."""

import platform

import pytest

from graphwright.codegen.native import library

TARGETS = {"native": library.TARGETS}
if platform.machine() == "x86_64":
    TARGETS |= {"AVX2": (("-march=haswell", "-fopenmp"),), "plain": (("-march=x86-64", "-fopenmp"),)}


def library_for(kernels, target):
    """The library of `kernels` for one of `TARGETS`; the test is skipped where no compiler makes it."""
    native = kernels(targets=TARGETS[target])
    if native is None:
        pytest.skip("no C++ compiler: install g++")
    return native
