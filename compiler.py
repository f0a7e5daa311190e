"""`compile`: capture, passes, lowering, and a model that is called like the original."""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import nn
from torch.export import ExportedProgram

from .ir import Program, capture, from_exported
from .ir.calling import Call, parameters_of
from .ir.decoder_example import decoder_example
from .ir.errors import ArtifactError, GraphwrightError, InputError
from .ir.onnx import from_onnx
from .passes import CLEANUPS, Contract, ExpertChoice, KVCache, PassManager, parse_pipeline
from .passes.pipeline import Pipeline
from .runtime import artifact
from .runtime.artifact import Saved
from .runtime.backend import choose_backend
from .runtime.cache import Cache, default_cache
from .runtime.compiled import Compilation, CompiledModel
from .runtime.denoising.ratio import ARGUMENT
from .runtime.modes import other_mode
from .runtime.pass_cache import run_or_find
from .runtime.training import trainable_copy

Model = nn.Module | ExportedProgram | Program | str | Path
Progress = Callable[[int, int, str], None]
CacheChoice = bool | Cache | str | Path


def compile(
    model: Model,
    passes: Pipeline = (),
    *,
    example_inputs: tuple[Any, ...] | None = None,
    example_kwargs: dict[str, Any] | None = None,
    dynamic_shapes: Any = None,
    backend: str = "auto",
    verify: str = "structure",
    cleanups: bool = True,
    trusted: bool = False,
    trainable: bool = False,
    progress: Progress | None = None,
    cache: CacheChoice = True,
) -> CompiledModel:
    """`model` with `passes` applied, ready to be called as `model` is.

    A module is captured in its present train/eval mode with `example_inputs` and `example_kwargs`, or on the first call when
    neither is given; it stays exactly as it was, and its weights are shared. `dynamic_shapes` is torch.export's. `backend` is
    "tuned", which "auto" means (what is fastest on this CPU, or the fastest tiles of Triton kernels on this GPU, timed when the model is
    made ready), "aten" (no compiler needed, starts at once), "inductor" (needs a C++ compiler) or "triton" (needs a GPU; default
    tiles). `verify` is "structure" or "numeric", which checks each pass's contract on the example. A `.pt2` file can run code when it
    is read, so it needs `trusted=True`. What passes and compilers make and measurements find is kept in `cache` for the next process:
    in the user's own (True), in that of a folder, or nowhere (False).

    With `trainable` calls keep gradients for the parameters that the program still has, those that passes added included (`kind` "added"
    in its weight table); the model then owns copies of them, and optimizers change what `generate` and `save` use too. Such calls run
    operation by operation, by the bodies of the dialect or what has their gradients in less memory; under `torch.no_grad()` by the
    backend as ever. `.train()` and `.eval()` are taken where the module makes the same calls in both modes, which is seen by capturing it
    in both.

    Raises:
        CaptureError: the module cannot be captured; every blocker is listed.
        PassError, ContractError: a pass is unknown, out of order, failed, or broke its promise.
        TargetError: the backend cannot run here.
    """
    _check_examples(example_inputs, example_kwargs)
    if progress is not None and not callable(progress):
        raise InputError(f"progress is a function of (passes done, passes in all, name of the next), not {progress!r}")
    backend, kept = choose_backend(backend), _cache(cache)
    pipeline = parse_pipeline([*(CLEANUPS if cleanups else ()), *parse_pipeline(passes)])
    PassManager(pipeline, verify=verify)  # refuses them now, not on the first call

    def finish(captured: Saved, example: tuple[tuple[Any, ...], dict[str, Any]] | None, module: nn.Module | None = None) -> Compilation:
        program, parameters = captured.program, captured.parameters
        inputs = None if example is None else Call(program, program.main, parameters).bind(*example)[0]
        result = run_or_find(PassManager(pipeline, verify=verify, inputs=inputs, progress=progress), program, kept)
        contract = Contract.weakest([captured.contract, result.contract])
        reports = (*captured.reports, *result.reports)
        made, mode = trainable_copy(result.program) if trainable else result.program, (captured.training, captured.other_mode)
        return Compilation(made, backend, parameters, result.history, reports, contract, *mode, module, kept, trainable=trainable)

    if isinstance(model, CompiledModel) or not isinstance(model, nn.Module):
        if dynamic_shapes is not None:
            raise InputError(f"dynamic_shapes is for capturing a module, not for {type(model).__name__}, whose sizes stand: leave it out")
        return CompiledModel(finish(_saved(model, trusted, kept), _example(example_inputs, example_kwargs)))

    has_schedule = any(isinstance(each, ExpertChoice) and each.schedule is not None for each in pipeline)

    def make(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Compilation:
        kwargs = {name: value for name, value in kwargs.items() if not (has_schedule and name == ARGUMENT)}  # the module takes none
        # torch.export takes two arguments that are one tensor for one argument; each is a tensor of its own here.
        apart_args, apart_kwargs = pytree.tree_map_only(torch.Tensor, torch.Tensor.detach, (args, kwargs))
        program = capture(model, apart_args, apart_kwargs, dynamic_shapes=dynamic_shapes)
        other = other_mode(model, program, apart_args, apart_kwargs, dynamic_shapes) if trainable else None
        return finish(Saved(program, parameters_of(model.forward), training=model.training, other_mode=other), (args, kwargs), model)

    if example_inputs is None and example_kwargs is None:
        return CompiledModel(make=make, training=model.training)
    return CompiledModel(make(example_inputs or (), example_kwargs or {}))


def compile_decoder(model: nn.Module, passes: Pipeline = (), **options: Any) -> CompiledModel:
    """A language model, ready for `.generate`: captured with symbolic batch and length, then `kv-cache` and `passes`.

    `model.forward` takes tokens [B, T] first and `position_ids` [B, T] by name, and gives logits [B, T, V], alone or in an output class
    of transformers. `kv-cache` stands behind those of `passes` that come before it, unless it is among them. `options` are those of
    `compile`, less the example.

    Raises:
        CaptureError: the module has an encoder, or takes no positions. PassError: it is no causal decoder. And as `compile` does.
    """
    unfit = {"example_inputs", "example_kwargs", "dynamic_shapes"} & options.keys()
    if unfit:
        raise InputError(f"compile_decoder makes its own example: leave {sorted(unfit)[0]} out, or use compile with the pass kv-cache")
    if not isinstance(model, nn.Module) or isinstance(model, CompiledModel):
        named = "transformers' AutoModelForCausalLM.from_pretrained makes one of a name"
        instead = named if isinstance(model, str) else "compile(.., passes='kv-cache') takes programs"
        raise InputError(f"compile_decoder takes a module, not a {type(model).__name__}: {instead}")
    example, pipeline = decoder_example(model), list(parse_pipeline(passes))
    if all(each.name != KVCache.name for each in pipeline):
        place = next((n for n, each in enumerate(pipeline) if each.name not in KVCache.after), len(pipeline))
        pipeline.insert(place, KVCache())
    shapes = example.dynamic_shapes
    return compile(model, pipeline, example_inputs=(), example_kwargs=example.kwargs, dynamic_shapes=shapes, **options)


def load(
    path: str | Path, *, backend: str = "auto", sha256: str | None = None, trainable: bool = False, cache: CacheChoice = True
) -> CompiledModel:
    """The model that `compiled.save(path)` wrote, as it was: no pass runs again. `sha256` is the digest that the file must have, `cache`
    where compiled code is kept, `trainable` whether calls keep gradients, as for `compile`.

    Raises:
        ArtifactError: the file is not a whole, unedited artifact of a version that this graphwright reads.
        TargetError: the backend cannot run here.
    """
    kept = _cache(cache)
    saved = artifact.load(path, sha256=sha256, cache=kept)
    backend = choose_backend(backend)
    program = trainable_copy(saved.program) if trainable else saved.program
    promised = (saved.reports, saved.contract, saved.training, saved.other_mode)
    return CompiledModel(
        Compilation(program, backend, saved.parameters, (), *promised, cache=kept, kernels=saved.kernels, trainable=trainable)
    )


def _cache(choice: Any) -> Cache | None:
    if isinstance(choice, bool):
        return default_cache() if choice else None
    if isinstance(choice, str | Path):
        return Cache(choice)
    if not isinstance(choice, Cache):
        raise InputError(f"cache is True, False, a folder or a Cache, not a {type(choice).__name__}")
    return choice


def _saved(model: Any, trusted: bool, cache: Cache | None) -> Saved:
    """A program that exists already, with the names of its caller's parameters where these are known."""
    if isinstance(model, Program):
        return Saved(model)
    if isinstance(model, CompiledModel):
        return model.saved
    if isinstance(model, ExportedProgram):
        return Saved(from_exported(model))
    if isinstance(model, str | Path):
        return _read(Path(model), trusted, cache)
    raise InputError(f"compile takes a module, an exported program, a program or a path, not a {type(model).__name__}")


def _read(path: Path, trusted: bool, cache: Cache | None) -> Saved:
    if path.suffix == ".gw":
        return artifact.load(path, cache=cache)
    if path.suffix == ".onnx":
        return Saved(from_onnx(path))
    if path.suffix != ".pt2":
        raise InputError(f"{path} is no model file: these are .gw, .onnx and .pt2")
    if not trusted:
        raise ArtifactError(
            f"{path} can run code when it is read: pass trusted=True if you made it, or turn it into a .gw where it was made, "
            "with graphwright.compile(exported).save('model.gw')"
        )
    if not path.exists():
        raise ArtifactError(f"{path} does not exist")
    try:
        with _quiet(torch.export.__name__):  # it logs what it raises, traceback and all
            return Saved(from_exported(torch.export.load(path)))
    except GraphwrightError:
        raise
    except Exception as error:
        raise ArtifactError(f"{path} is not read by torch.export ({type(error).__name__}): export it again with this torch") from error


@contextmanager
def _quiet(logger_name: str) -> Iterator[None]:
    logger = logging.getLogger(logger_name)
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(level)


def _check_examples(args: Any, kwargs: Any) -> None:
    if args is not None and not isinstance(args, tuple):
        raise InputError(f"example_inputs is a tuple of positional arguments, not a {type(args).__name__}: write (x,)")
    if kwargs is not None and not (isinstance(kwargs, dict) and all(isinstance(name, str) for name in kwargs)):
        raise InputError(f"example_kwargs is a dict of arguments by name, not {_shown(kwargs)}: write {{'x': x}}")


def _shown(kwargs: Any) -> str:
    return "a dict with other keys" if isinstance(kwargs, dict) else f"a {type(kwargs).__name__}"


def _example(args: tuple[Any, ...] | None, kwargs: dict[str, Any] | None) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    return None if args is None and kwargs is None else (args or (), kwargs or {})
