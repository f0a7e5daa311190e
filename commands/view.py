"""view: what the compiler did to a model, as one page."""

import argparse
import json
import re
import webbrowser
from pathlib import Path
from typing import Any

from ..explorer import Story, document, page
from ..ir import Program
from ..ir.decoder_example import decoder_example
from ..ir.tree import unflatten
from ..passes import PassManager
from ..passes.inputs import random_inputs
from ..runtime.atomic import atomic_write, check_writable
from ..runtime.backend import choose_backend
from ..runtime.compiled import CompiledModel
from .programs import compiled_from, pipeline_of
from .result import Mistake, Result, progress
from .sources import Model, load


def view(options: argparse.Namespace) -> Result:
    """Writes the page; with --json and no --output prints the document and writes nothing."""
    choose_backend(options.backend)  # a wrong one is said before the work
    output = None if options.json and options.output is None else _output(options)
    if options.model.endswith(".txt"):
        found = _of_text(options, load(options.model, options.trusted))
    else:
        found = _of_model(options)
    found["title"] = found["title"] or options.model
    if output is None:
        return Result(json.dumps(found), found)
    with atomic_write(output) as file:
        file.write(page(found).encode())
    opened = options.open and webbrowser.open(output.resolve().as_uri())
    hint = "" if opened else ": open it in a browser"
    return Result(f"wrote {output} ({output.stat().st_size / 1e6:.1f} MB){hint}", {**found, "output": str(output)} if options.json else {})


def _output(options: argparse.Namespace) -> Path:
    name = re.sub(r"[^\w.-]+", "-", Path(options.model).name)
    path = Path(options.output or f"{name}.report.html")
    if path.suffix not in (".html", ".htm"):
        raise Mistake(f"{path}: pages are called something.html")
    if not path.parent.is_dir():
        raise Mistake(f"{path}: the folder {path.parent} does not exist")
    check_writable(path)
    return path


def _of_text(options: argparse.Namespace, model: Model) -> dict[str, Any]:
    """A program without weights: nothing runs."""
    if options.profile or options.numeric:
        raise Mistake(f"{options.model} has no weights, so nothing of it runs: leave --profile and --numeric out, or give the model itself")
    manager = PassManager(pipeline_of(options) if options.passes is not None else ())
    assert isinstance(model.model, Program), "a text file is parsed"
    with progress() as manager.progress:
        result = manager.run(model.model)
    return document(Story(result.history, result.reports, result.contract))


def _of_model(options: argparse.Namespace) -> dict[str, Any]:
    if options.passes is None and not options.decoder:
        options.no_cleanups = True  # as it stands
    compiled = compiled_from(options, "view", backend=options.backend, verify="numeric" if options.numeric else "structure")
    if options.profile:
        model = load(options.model, options.trusted)
        args, kwargs = ((), decoder_example(model.model).kwargs) if options.decoder else _inputs(compiled, model)
        compiled.measure(*args, **kwargs)
        compiled.profile(*args, **kwargs)
    return compiled.report().data()


def _inputs(compiled: CompiledModel, model: Model) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The example that the model brings, else made-up inputs of its signature."""
    if model.example is not None:
        return model.example
    main = compiled.program.main
    args, kwargs = unflatten(main.in_tree.to_spec(), random_inputs(compiled.program))
    return tuple(args), dict(kwargs)
