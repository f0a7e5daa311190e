"""MODEL on the command line: a file, a network of the zoo, or a function of the user's."""

import contextlib
import difflib
import importlib
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from .. import models
from ..compiler import compile as compile_model
from ..ir import Program, capture, parse
from ..ir.parser import MAX_TEXT
from ..ir.plain_file import read_plain
from .result import Mistake

SUFFIXES = (".gw", ".onnx", ".pt2", ".txt")


@dataclass(frozen=True)
class Model:
    """What MODEL names, as `compile` takes it, with example inputs where it brings some."""

    model: Any
    example: tuple[tuple[Any, ...], dict[str, Any]] | None = None


def load(spec: str, trusted: bool) -> Model:
    """The model that `spec` names. Files other than program texts are left to `compile`, which reads them."""
    path = Path(spec)
    if path.suffix in SUFFIXES or (path.exists() and not path.is_dir()):
        return _load_file(path, trusted)
    name, colon, rest = spec.partition(":")
    if name in models.names():
        module, args, kwargs = models.load(name, rest if colon else "small")
        return Model(module, (args, kwargs))
    if colon:
        return _load_factory(name, rest)
    near = difflib.get_close_matches(spec, models.names(), n=2)
    advice = f"did you mean {' or '.join(near)}?" if near else f"the zoo has {', '.join(models.names())}"
    raise Mistake(f"{spec} is no file, no zoo name and no module:factory: {advice}")


def _load_file(path: Path, trusted: bool) -> Model:
    if not path.exists():
        raise Mistake(f"{path} does not exist")
    if path.suffix == ".pt2" and not trusted:
        raise Mistake(f"{path} can run code when it is read: add --trusted if you made it")
    if path.suffix != ".txt":
        return Model(path)
    try:
        return Model(parse(read_plain(path, MAX_TEXT).decode("utf-8")))
    except UnicodeDecodeError as error:
        raise Mistake(f"{path} is not text in UTF-8 (byte {error.start})") from error
    except OSError as error:
        raise Mistake(f"{path} cannot be read: {error.strerror or error}") from error


def _load_factory(module_name: str, attribute: str) -> Model:
    spec = f"{module_name}:{attribute}"
    with users_code():
        try:
            made = getattr(importlib.import_module(module_name), attribute)()
        except ModuleNotFoundError as error:
            near = difflib.get_close_matches(module_name, models.names(), n=1)
            advice = f"did you mean {near[0]}:{attribute}?" if near else "the zoo's names and the current folder were searched"
            raise Mistake(f"{spec}: no module is called {error.name}: {advice}") from error
        except (Exception, SystemExit) as error:
            raise Mistake(f"{spec}: {type(error).__name__}: {error}") from error
    module, args, kwargs = (*made, {})[:3] if isinstance(made, tuple) and len(made) in (2, 3) else (None, None, None)
    if not (isinstance(module, nn.Module) and isinstance(args, tuple) and isinstance(kwargs, dict)):
        raise Mistake(f"{spec} must return (module, args) or (module, args, kwargs), with args a tuple and kwargs a dict")
    return Model(module, (args, kwargs))


@contextlib.contextmanager
def users_code() -> Iterator[None]:
    """The current folder can be imported from, and what is printed does not mix with our output."""
    sys.path.insert(0, os.getcwd())
    try:
        with contextlib.redirect_stdout(sys.__stderr__), contextlib.redirect_stderr(sys.__stderr__):
            yield
    finally:
        sys.path.remove(os.getcwd())


def program_of(model: Model, trusted: bool) -> Program:
    """The program as it stands: captured, or as the file has it."""
    if isinstance(model.model, Program):
        return model.model
    if model.example is not None:
        return capture(model.model, *model.example)
    return compile_model(model.model, cleanups=False, trusted=trusted, backend="aten", cache=False).program
