"""`compile`: capture, passes, lowering, and a model that is called like the original."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.export import ExportedProgram

from .ir import Program, capture, from_exported
from .ir.errors import ArtifactError, InputError
from .runtime.backend import choose_backend
from .runtime.calling import Parameter, parameters_of
from .runtime.compiled import Compilation, CompiledModel

Model = nn.Module | ExportedProgram | Program | str | Path


def compile(
    model: Model,
    passes: str | Sequence[Any] = (),
    *,
    example_inputs: tuple[Any, ...] | None = None,
    example_kwargs: dict[str, Any] | None = None,
    dynamic_shapes: Any = None,
    backend: str = "auto",
    verify: str = "structure",
    cleanups: bool = True,
    trusted: bool = False,
    progress: Callable[..., None] | None = None,
) -> CompiledModel:
    """`model` with `passes` applied, ready to be called as `model` is.

    A module is captured in its present train/eval mode with `example_inputs` and `example_kwargs`, or on the first call when
    neither is given; it stays exactly as it was, and its weights are shared. `dynamic_shapes` is torch.export's. `backend` is
    "auto", "aten" (no compiler needed, starts at once) or "inductor" (needs a C++ compiler). `verify` is "structure" or
    "numeric", which checks each pass's contract on the example. A `.pt2` file can run code when it is read, so it needs
    `trusted=True`.

    Raises:
        CaptureError: the module cannot be captured; every blocker is listed.
        PassError, ContractError: a pass is unknown, out of order, failed, or broke its promise.
        TargetError: the backend cannot run here.
    """
    backend = choose_backend(backend)

    def finish(program: Program, parameters: tuple[Parameter, ...], inputs: Any) -> Compilation:
        return _compilation(program, passes, parameters, backend, verify, cleanups, inputs, progress)

    if not isinstance(model, nn.Module):
        program, parameters = _program_of(model, trusted)
        return CompiledModel(finish(program, parameters, _example(example_inputs, example_kwargs)))

    def make(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Compilation:
        program = capture(model, args, kwargs, dynamic_shapes=dynamic_shapes)
        return finish(program, parameters_of(model.forward), (args, kwargs))

    if example_inputs is None and example_kwargs is None:
        return CompiledModel(make=make, training=model.training)
    return CompiledModel(make(example_inputs or (), example_kwargs or {}), training=model.training)


def _compilation(
    program: Program,
    passes: str | Sequence[Any],
    parameters: tuple[Parameter, ...],
    backend: str,
    verify: str,
    cleanups: bool,
    inputs: Any,
    progress: Callable[..., None] | None,
) -> Compilation:
    if not passes and not cleanups:
        return Compilation(program, backend, parameters)
    from .passes import CLEANUPS, PassManager, parse_pipeline

    pipeline = parse_pipeline(passes) if isinstance(passes, str) else list(passes)
    pipeline = [*CLEANUPS, *pipeline] if cleanups else pipeline
    result = PassManager(pipeline, verify=verify, inputs=inputs, progress=progress).run(program)
    return Compilation(result.program, backend, parameters, tuple(result.history), tuple(result.reports), result.contract)


def _program_of(model: Model, trusted: bool) -> tuple[Program, tuple[Parameter, ...]]:
    """A program, and the names of its caller's parameters where these are known."""
    if isinstance(model, Program):
        return model, ()
    if isinstance(model, ExportedProgram):
        return from_exported(model), ()
    if isinstance(model, str | Path):
        return _read(Path(model), trusted)
    raise InputError(f"compile takes a module, an exported program, a program or a path, not a {type(model).__name__}")


def _read(path: Path, trusted: bool) -> tuple[Program, tuple[Parameter, ...]]:
    from .runtime import artifact

    if path.suffix == ".gw":
        saved = artifact.load(path)
        return saved.program, saved.parameters
    if path.suffix != ".pt2":
        raise InputError(f"{path} is no model file: compile reads .gw and .pt2")
    if not trusted:
        raise ArtifactError(
            f"{path} can run code when it is read: pass trusted=True if you made it, or turn it into a .gw where it was made, "
            "with graphwright.compile(exported).save('model.gw')"
        )
    return from_exported(torch.export.load(path)), ()


def _example(args: tuple[Any, ...] | None, kwargs: dict[str, Any] | None) -> Any:
    return None if args is None and kwargs is None else (args or (), kwargs or {})
