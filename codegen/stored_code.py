"""What Inductor made for a graph, as bytes that another process turns into the same function without compiling.

Inductor writes a Python function, which allocates and calls, and C++ kernels, each a shared library of its own that is a Python module.
Stored are the function's code object, the values of its global names, the libraries, and for people what they were made of. Reading
such bytes runs them: they must come from a place that only this user can write. They fit the very versions of Python and torch that made
them.
"""

import importlib.machinery
import importlib.util
import io
import marshal
import os
import pickle
import secrets
import tempfile
import types
import zlib
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import CodeType, FunctionType, SimpleNamespace
from typing import Any

import torch

Boxed = Callable[[list[Any]], Any]

_KERNEL, _OPERATOR, _PACKET, _NAMESPACE, _MODULE = "kernel", "operator", "packet", "namespace", "module"
_PARTITIONS = "partitions"  # of a graph that Inductor split; other functions hold their code


def store(function: Boxed, source: str = "") -> bytes | None:
    """`function` as bytes, None where it is more than a Python function over C++ kernels and what torch offers. `source` is kept beside
    it."""
    inner = getattr(function, "__func__", function)
    if not isinstance(inner, FunctionType) or inner.__closure__ or inner.__defaults__:
        return None
    names = set(_names(inner.__code__))
    if _PARTITIONS in names:
        return None
    used = {name: _narrowed(value, names) for name, value in inner.__globals__.items() if name in names}
    file = io.BytesIO()
    pickler = _Pickler(file)
    try:
        pickler.dump((marshal.dumps(inner.__code__), used, isinstance(function, types.MethodType)))
    except (pickle.PicklingError, TypeError, AttributeError, ValueError, OSError):
        return None
    return zlib.compress(pickle.dumps((file.getvalue(), pickler.libraries, source)), level=1)


def restore(stored: bytes) -> Boxed:
    """The function that `store` was given.

    Raises:
        Exception: of any kind, where the bytes were not written by `store` with these versions of Python and torch.
    """
    content, libraries, _ = pickle.loads(zlib.decompress(stored))
    code, used, is_method = _Unpickler(io.BytesIO(content), _loaded(libraries)).load()
    function = FunctionType(marshal.loads(code), {"__builtins__": __builtins__, **used})
    return partial(function, None) if is_method else function  # it asks its instance for partitions alone


def source_of(stored: bytes) -> str:
    """The source that `store` was given. Raises as `restore` does."""
    _, _, source = pickle.loads(zlib.decompress(stored))
    return str(source)


def _names(code: CodeType) -> Iterator[str]:
    """Every global name and attribute that `code` and the functions inside it use."""
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _names(constant)


def _narrowed(value: Any, names: set[str]) -> Any:
    """A namespace of Inductor's kernels (`extern_kernels`) with those in `names` alone; it fills it while it compiles."""
    if not type(value).__module__.startswith("torch._inductor"):
        return value
    return SimpleNamespace(**{name: getattr(value, name) for name in names if hasattr(value, name)})


class _Pickler(pickle.Pickler):
    """Names what every process has; `libraries` receives those of the kernels met."""

    def __init__(self, file: io.BytesIO):
        super().__init__(file)
        self.libraries: dict[str, bytes] = {}

    def persistent_id(self, value: Any) -> tuple[str, ...] | None:
        if isinstance(value, torch._ops.OpOverload):
            return _OPERATOR, value.namespace, value._schema.name.partition("::")[2], value._overloadname
        if isinstance(value, torch._ops.OpOverloadPacket):
            return _PACKET, *value._qualified_op_name.split("::")
        if isinstance(value, torch._ops._OpNamespace):
            return _NAMESPACE, value.name
        if isinstance(value, types.ModuleType):
            return _MODULE, value.__name__
        library = getattr(value, "__self__", None)
        if isinstance(value, types.BuiltinFunctionType) and isinstance(getattr(library, "__loader__", None), _LOADER):
            return _KERNEL, self._library(library), value.__name__
        return None

    def _library(self, module: types.ModuleType) -> str:
        if module.__name__.partition(".")[0] in ("torch", "numpy"):
            raise pickle.PicklingError(f"{module.__name__} is no library of Inductor's")
        self.libraries.setdefault(module.__name__, Path(module.__file__ or "").read_bytes())
        return module.__name__


_LOADER = importlib.machinery.ExtensionFileLoader


class _Unpickler(pickle.Unpickler):
    def __init__(self, file: io.BytesIO, libraries: dict[str, types.ModuleType]):
        super().__init__(file)
        self.libraries = libraries

    def persistent_load(self, name: tuple[str, ...]) -> Any:
        kind, first, *rest = name
        if kind == _KERNEL:
            return getattr(self.libraries[first], rest[0])
        if kind == _MODULE:
            return importlib.import_module(first)
        value = getattr(torch.ops, first)
        for attribute in rest:
            value = getattr(value, attribute)
        return value


def _loaded(libraries: dict[str, bytes]) -> dict[str, types.ModuleType]:
    """The libraries as modules. Each is a file while it is loaded; what was mapped stays when the file is gone."""
    # Where Inductor's kernels find how to get at a tensor's data (torch._inductor.codecache sets it before it loads one).
    pointer = torch._C._dynamo.guards._torchinductor_pyobject_tensor_data_ptr  # type: ignore[attr-defined]
    os.environ["_TORCHINDUCTOR_PYOBJECT_TENSOR_DATA_PTR"] = str(pointer)
    modules = {}
    with tempfile.TemporaryDirectory(prefix="graphwright-") as folder:
        for name, content in libraries.items():
            path = Path(folder) / f"{secrets.token_hex(8)}.so"
            path.write_bytes(content)
            spec = importlib.util.spec_from_file_location(name, path)
            assert spec is not None and spec.loader is not None, "a path that ends in .so has a loader"
            modules[name] = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(modules[name])
    return modules
