"""Networks of timm, also where there is no torchvision.

timm imports torchvision, of which PyPI has builds for one torch with CUDA each: they do not load beside a torch for CPUs, and pip would
replace that to satisfy them. Networks need nothing of it but names: a layer that others are compared with, classes that transforms of
images derive from. So where torchvision cannot be imported, empty modules stand in for it while timm is imported. They are gone after
that, since torch and transformers ask whether there is one.
"""

import importlib
import importlib.abc
import importlib.machinery
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import torch
from torch import nn

_ROOT = "torchvision"


class _Named(type):
    """The type of classes that have a class for every attribute asked of them, as enumerations have members."""

    def __getattr__(cls, name: str) -> Any:
        return _named(cls.__module__, name)


def _named(module: str, name: str) -> _Named:
    if name.startswith("__"):
        raise AttributeError(f"{module}.{name}")
    return _Named(name, (), {"__module__": module})


class _StandIn(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds torchvision and every module below it: empty ones, whose attributes are classes of no content."""

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> importlib.machinery.ModuleSpec | None:
        return importlib.machinery.ModuleSpec(name, self, is_package=True) if name.partition(".")[0] == _ROOT else None

    def exec_module(self, module: ModuleType) -> None:
        module.__getattr__ = lambda name: _named(module.__name__, name)  # type: ignore[method-assign]


@contextmanager
def torchvision_stand_in() -> Iterator[None]:
    """Within it torchvision can be imported: the one that is installed, else empty modules that are gone afterwards."""
    if _is_importable():
        yield
        return
    finder = _StandIn()
    _forget()
    sys.meta_path.insert(0, finder)
    try:
        yield
    finally:
        sys.meta_path.remove(finder)
        _forget()


def _is_importable() -> bool:
    try:
        importlib.import_module(_ROOT)
    except (ImportError, RuntimeError, OSError):  # not there, made for another torch, or for a system with CUDA
        return False
    return True


def _forget() -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == _ROOT]:
        del sys.modules[name]


def timm_network(name: str) -> nn.Module:
    """A network of timm by its name, with random weights, in evaluation mode.

    Raises:
        ImportError: timm is not installed.
    """
    with torchvision_stand_in():
        import timm
    torch.manual_seed(0)
    return timm.create_model(name, pretrained=False).eval()
