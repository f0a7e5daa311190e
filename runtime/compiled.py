"""`CompiledModel`: what `compile` returns, called like the module that it was made from."""

import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import cached_property, reduce
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import torch
import torch.utils._pytree as pytree
from torch import nn

from ..codegen.cpu_kernels import KERNELS
from ..codegen.cpu_packed import Pack
from ..explorer import LayerError, Profile, Story, layer_errors
from ..ir import Program
from ..ir.calling import Call, Parameter
from ..ir.calls import draws
from ..ir.derive import specialised
from ..ir.errors import ArtifactError, InputError, TargetError
from ..ir.float64 import NoFloat64
from ..ir.forks import new_lock, new_rlock
from ..ir.tree import unflatten
from ..passes import Contract
from ..passes.experts.capacity import schedule_of
from ..passes.experts.limit import mixtures
from ..passes.experts.statistics import RoutingStatistics, count_routing
from ..passes.manager import PassReport
from . import artifact
from .artifact import Saved
from .cache import Cache
from .decoding.generate import generate
from .decoding.generated import Generated, Token
from .decoding.steps import ProgramDecoder
from .denoising.ratio import ARGUMENT, RowsByRatio
from .executor import Executor
from .memory import Measurement, measure_peak, seconds
from .modes import NAMES
from .packing import Packs
from .report import Report, Threads, predicted, predicted_on
from .training import as_trained, parameters_of, run_with_gradients

if TYPE_CHECKING:
    from ..codegen.triton import Kernel
    from .onnx_file import Exported

Make = Callable[[tuple[Any, ...], dict[str, Any]], "Compilation"]


@dataclass(frozen=True)
class Compilation:
    """A program to run, and how it came to be: the captured program and the one after each pass, reports, contract, whether
    the module was in train mode when it was captured, why the other mode is another model ("" where it is not, None where nobody knows),
    the module, where there was one, where compiled code is kept, the sources of Triton kernels that came with it, and whether calls keep
    gradients."""

    program: Program
    backend: str
    parameters: tuple[Parameter, ...] = ()
    history: Sequence[Program] = ()
    reports: tuple[Any, ...] = ()
    contract: Contract = Contract.EXACT
    training: bool = False
    other_mode: str | None = None
    module: nn.Module | None = None
    cache: Cache | None = None
    kernels: tuple[str, ...] = ()
    trainable: bool = False

    @property
    def stages(self) -> tuple[Program, ...]:
        """The history with the program that runs as its last: that of a trainable model, or of one found in the cache, is a copy."""
        return (*self.history[:-1], self.program)


class CompiledModel(nn.Module):
    """Runs a compiled program; calls take and return what the original module's did.

    Made from a `Compilation`, or from `make(args, kwargs)`, which gives one for the arguments of the first call; `training` is
    the mode until then. Threads may call at once; the calls of a model with states follow one another, and each sees the states that
    the one before left.
    """

    def __init__(self, compilation: Compilation | None = None, *, make: Make | None = None, training: bool = False):
        super().__init__()
        self.training = training if compilation is None else compilation.training
        self._make = make
        self._lock = new_rlock()
        self._runner = None if compilation is None else _Runner(compilation)
        self._measured: Measurement | None = None
        self._routing: list[RoutingStatistics] = []
        self._compiled_peak: int | None = None
        self._on_threads: Threads | None = None
        self._profiled: Profile | None = None

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The model's output, nested as the original's. One whose experts choose by a schedule takes `mask_ratio=(masked, valid)` as well,
        numbers of positions, for all rows or a list with one for each.

        Raises:
            InputError: the arguments do not fit what was captured, or do not say how much is masked; or a weight that passes folded into
                others was written to, or replaced in its submodule, since (what is written through its `.data` is not seen, and has no
                effect).
        """
        runner = self._runner or self._compile_for(args, kwargs)
        return runner(args, kwargs)

    def _compile_for(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> "_Runner":
        with self._lock:
            if self._runner is None:
                assert self._make is not None, "a model without a compilation knows how to make one"
                runner = _Runner(self._make(args, kwargs))
                self.training = runner.compilation.training
                self._runner, self._make = runner, None
            return self._runner

    def generate(
        self,
        prompts: Any,
        max_new_tokens: int,
        *,
        temperature: float = 0.0,
        top_k: int | None = None,
        top_p: float | None = None,
        seed: int = 0,
        eos: Any = None,
        stream: bool = False,
        chunk: int | None = None,
        capacity: int | None = None,
        batch: int | None = None,
        speculative: bool | None = None,
    ) -> Generated | Iterator[Token]:
        """Up to `max_new_tokens` tokens after each prompt, from a decoder that `compile_decoder` made, or the pass `kv-cache`.

        `prompts` is a list of token sequences of any lengths, or a tensor [B, T]. Temperature 0 takes the most likely token, of equals the
        first; others draw one after temperature, `top_k` and `top_p`, the same for a prompt's number and `seed` whatever else runs beside
        it. A row ends with a token of `eos` (one or several), which is kept. With `stream` the tokens come one by one as they are decided,
        else all at the end with what they cost. At most `chunk` tokens of a prompt are read between two steps of the rows that decode.
        `batch` prompts run at once, all by default; the next takes the place of one that has ended. `capacity` is the slots of a row in the
        caches, those for the longest prompt by default. `speculative` says whether to draft tokens with few layers and have all layers
        judge them, at all events (True) or not (False). By default a model that `layer-skip` made for it does so, and switches to plain
        decoding in calls that are greedy as soon as what it measures says that drafts gain nothing; the result tells.

        Raises:
            InputError: the model cannot decode; an argument is of a wrong type or out of range, a prompt is empty or has tokens that the
                model does not know, a row's tokens do not fit into `capacity` or the model's positions, or the caches into memory; or a
                weight that passes folded was changed.
        """
        runner = self._present
        runner.check_weights()
        return generate(
            runner.decoder, prompts, max_new_tokens, temperature=temperature, top_k=top_k, top_p=top_p, seed=seed, eos=eos, stream=stream,
            chunk=chunk, capacity=capacity, batch=batch, speculative=speculative,
        )  # fmt: skip

    # --- looking inside ---

    @property
    def compilation(self) -> Compilation:
        """Raises InputError before the first call of a model that was compiled without example inputs."""
        return self._present.compilation

    @property
    def program(self) -> Program:
        """The program that runs."""
        return self.compilation.program

    @property
    def history(self) -> Sequence[Program]:
        """The captured program, then the program after each pass; for a loaded model the program alone."""
        return self.compilation.history or (self.program,)

    def report(self) -> Report:
        """What was promised, what each pass did, and what it costs; `measure` fills in the measured part."""
        compiled = self.compilation
        memory = predicted(compiled.history[0] if compiled.history else None, compiled.program, compiled.reports)
        memory = replace(memory, compiled=self._compiled_peak, threads=self._on_threads)
        promised = (compiled.program.pipeline, compiled.contract, compiled.backend, compiled.reports)
        executor, packed = self._present.executor, self._present.packed()
        shown = (executor.kernel_calls(), packed, self._routing, self._story)
        return Report(*promised, memory, self._measured, compiled.training, *shown)

    def _story(self) -> Story:
        compiled, measured = self.compilation, self._measured
        return Story(
            history=compiled.stages,
            reports=compiled.reports,
            contract=compiled.contract,
            title="" if compiled.module is None else type(compiled.module).__name__,
            backend=compiled.backend,
            kernels=() if self._profiled is not None else self._present.executor.kernels_untimed(),
            profile=self._profiled,
            peak_bytes=None if measured is None else measured.peak_bytes,
            seconds=None if measured is None else measured.seconds,
        )

    def kernels(self) -> "tuple[Kernel, ...]":
        """The Triton kernels that run, each once: `name`, `source` (a file that checks itself), `ir` (the lines that it computes),
        `roofline`. None for other backends."""
        return tuple({kernel.digest: kernel for kernel in reversed(self._present.executor.kernel_calls())}.values())[::-1]

    @property
    def saved(self) -> Saved:
        """What an artifact of this model holds: its program with its states as they are now, how to call it, what was promised."""
        return self._present.saved()

    def save(self, path: str | Path) -> None:
        """Writes a `.gw` artifact, whole or not at all.

        Raises:
            ArtifactError: it cannot be written; a file that was there before is as it was.
        """
        artifact.save(self.saved, path)

    def export_onnx(
        self,
        path: str | Path,
        *,
        dialect: str = "function",
        regions: str = "loop",
        opset: int = 21,
        functions: Sequence[str] | None = None,
        external_data: bool | None = None,
    ) -> "Exported":
        """Writes the program as an ONNX model, whole or not at all, after onnx's checker took it and onnxruntime gave what the
        program gives, on random, hard and zero inputs.

        Operators of the dialect are functions of the model in the domain `graphwright` (`dialect="function"`), standard operators
        ("inline") or custom operators without a body ("custom", which nothing here can run). Regions are loops ("loop") or are written out
        slice by slice ("unroll"). A program of several functions becomes a model each, `model.onnx` for main and `model.decode.onnx` for
        decode, all or those of `functions`. States and caches are inputs, and their new values outputs. Weights of more than 1.5 GB, and
        those of several models, lie in one file beside them; `external_data` says otherwise.

        Raises:
            CaptureError: an operator has no ONNX form; the message names it and the user's line.
            ContractError: the model's results are not the program's.
            TargetError: a package is missing, or onnxruntime does not run the model.
            InputError: an option is none. ArtifactError: the file cannot be written.
        """
        from .onnx_file import export

        return export(
            self.saved.program, path, dialect=dialect, regions=regions, opset=opset, functions=functions, external_data=external_data
        )

    def measure(self, *args: Any, **kwargs: Any) -> Measurement:
        """Runs the model on these arguments (once to warm up, once for memory, once for time) and keeps the figures for the report; where
        there are mixtures of experts, once more to count which tokens each of them has.

        States and arguments are as before afterwards.
        """
        runner = self._runner or self._compile_for(args, kwargs)
        args, kwargs = runner.spared(args, kwargs)
        device = "cuda" if any(weight.device.type == "cuda" for weight in self.program.weights.values()) else "cpu"
        with self._lock, runner.states_kept():
            self._compiled_peak = runner.executor.predicted_peak()
            self._on_threads = predicted_on(torch.get_num_threads(), self.program) if device == "cpu" else None
            with runner.executor.kernel_by_kernel():
                self(*args, **kwargs)
                peak = measure_peak(lambda: self(*args, **kwargs), device=device)
            for _ in range(runner.executor.calls_until_recorded):
                self(*args, **kwargs)
            self._measured = replace(peak, seconds=seconds(lambda: self(*args, **kwargs), device))
            self._routing = runner.routing(args, kwargs)
        return self._measured

    def profile(self, *args: Any, **kwargs: Any) -> Profile:
        """Runs the model on these arguments, a few times by the clock and three times to see the error of each layer against float64, and
        keeps what it saw for the report: the time of each kernel, and how far each layer is from float64 as captured and as compiled.

        States and arguments are as before afterwards. Of a model whose rows run at a share of their own, `main` is profiled.
        """
        runner = self._runner or self._compile_for(args, kwargs)
        args, kwargs = runner.spared(args, kwargs)
        inputs, _ = runner.call.bind(args, {name: value for name, value in kwargs.items() if name != ARGUMENT})
        with self._lock, runner.states_kept():
            kernels = runner.executor.kernel_runs(inputs, runner.states)
            self._profiled = Profile(kernels, *_layer_errors(runner.compilation, inputs))
        return self._profiled

    @property
    def _present(self) -> "_Runner":
        if self._runner is None:
            raise InputError("this model is captured on its first call: call it once, or compile it with example_inputs=...")
        return self._runner

    def __repr__(self) -> str:
        return f"CompiledModel({'not captured yet' if self._runner is None else repr(self.program)})"

    # --- as a module ---

    def named_parameters(self, prefix: str = "", recurse: bool = True, remove_duplicate: bool = True) -> Iterator[tuple[str, nn.Parameter]]:
        """The program's parameters under the names that the original module gave them, and those that passes added."""
        for name, parameter in self._present.parameters.items():
            yield (f"{prefix}.{name}" if prefix else name), parameter

    def named_buffers(self, prefix: str = "", recurse: bool = True, remove_duplicate: bool = True) -> Iterator[tuple[str, torch.Tensor]]:
        """The program's buffers and states under the names that the original module gave them."""
        for name, buffer in self._present.buffers.items():
            yield (f"{prefix}.{name}" if prefix else name), buffer

    def state_dict(  # type: ignore[override]
        self, *args: Any, destination: Any = None, prefix: str = "", keep_vars: bool = False
    ) -> dict[str, Any]:
        """Every parameter, buffer and state of the program that runs, by name.

        It lacks names of the original module: of weights that passes folded into others or that nothing reads, and of all but one
        of those that are one tensor.
        """
        result = {} if destination is None else destination
        for name, tensor in (*self._present.parameters.items(), *self._present.buffers.items()):
            result[prefix + name] = tensor if keep_vars else tensor.detach()
        return result

    def load_state_dict(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Refused: passes may have folded weights into others."""
        raise InputError("weights of a compiled model are fixed: load them into the original module and compile it again")

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> "CompiledModel":
        for tensor in (*self._present.parameters.values(), *self._present.buffers.values()):
            probe = tensor.detach().new_empty(0)
            try:
                moved = fn(probe)
            except AssertionError as error:  # torch's answer to .cuda() in a build without it
                raise TargetError(f"{error}: this model was compiled for {probe.device}") from error
            if moved.dtype != probe.dtype or moved.device != probe.device:
                raise TargetError(
                    f"this model was compiled for {probe.dtype} on {probe.device}, not {moved.dtype} on {moved.device}: "
                    "convert the original module and compile it again"
                )
        return self

    def train(self, mode: bool = True) -> "CompiledModel":
        """Keeps what was captured, in whichever mode that was; a model with `trainable` takes the other mode where it is the same there.

        Raises:
            InputError: in the mode that is asked for it is another model, or nobody knows whether it is.
        """
        captured, why = (self.training, None) if self._runner is None else self._runner.mode
        if mode != captured and why != "":
            known = f", and {why}" if why else ""
            raise InputError(f"this model was captured in {NAMES[captured]} mode{known}: compile the original after .{NAMES[mode]}()")
        self.training = mode
        return self

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        raise ArtifactError("a compiled model is not pickled: write compiled.save('model.gw') and read it with gw.load('model.gw')")

    def __deepcopy__(self, memo: Any) -> NoReturn:
        raise ArtifactError("a compiled model is not copied: its weights are fixed and calls are thread-safe, so share it")


class _Runner:
    """A compilation made ready: executor, call binding, and the states that this model owns."""

    def __init__(self, compilation: Compilation):
        program = compilation.program
        main = program.main
        signature = main.signature()
        self.compilation = compilation
        self.parameters = parameters_of(program, trainable=compilation.trainable)
        self._packs, self._executors = Packs(), list[Executor]()
        self.executor = self._executor_of("main", {})
        self.call = Call(program, main, compilation.parameters)
        self.states = {state.name: _own_copy(program, state.name) for state in signature.states}
        self._updates = _updates(signature)
        self._named, self._lock = {"main": self.executor}, new_lock()
        schedule = schedule_of(program)
        self._by_ratio = None if schedule is None else RowsByRatio(program, schedule, self._outputs_of)
        self._out_spec = main.out_tree.to_spec()
        # Two calls at once would lose one update.
        self._folded = _folded(compilation)
        self._turn: AbstractContextManager[Any] = new_rlock() if self.states else nullcontext()
        tensors = [(w.name, w.kind, w.tensor) for w in program.weights.values() if w.tensor is not None]
        self.buffers = {name: tensor for name, kind, tensor in tensors if kind == "buffer"} | self.states

    def __call__(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        inputs, given, ratio = self._bound(args, kwargs)
        self.check_weights()
        if self._by_ratio is not None:
            return unflatten(self._out_spec, self._by_ratio(inputs, ratio))
        with self._turn:
            if self.compilation.trainable and torch.is_grad_enabled():
                leaves, new_states = run_with_gradients(self.compilation.program, inputs, self.parameters, states=self.states)
            else:
                leaves, new_states = self.executor(inputs, self.states)
            if new_states:
                leaves = self._write_back(leaves, new_states, given)
        return unflatten(self._out_spec, leaves)

    def _bound(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[list[Any], list[Any], Any]:
        """The inputs of a call as the program takes them and as they were given, and how much of rows is masked where it asks for that."""
        ratio = None
        if self._by_ratio is not None:
            ratio, kwargs = kwargs.get(ARGUMENT), {name: value for name, value in kwargs.items() if name != ARGUMENT}
        return *self.call.bind(args, kwargs), ratio

    def routing(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[RoutingStatistics]:
        """Which tokens the experts of each mixture have in a call. Rows that run with different numbers of experts are added up."""
        program, (inputs, _, ratio) = self.compilation.program, self._bound(args, kwargs)
        if not mixtures(program.main):
            return []
        whole: list[tuple[str, list[Any], int | None]] = [("main", inputs, None)]
        parts = whole if self._by_ratio is None else self._by_ratio.parts(inputs, ratio)
        kernels = {node.target: KERNELS[node.target] for node in mixtures(program.main)}
        counted = [count_routing(program, own, name, rows=rows, states=self.states, instead=kernels) for name, own, rows in parts]
        return [reduce(operator.add, counts).statistics() for counts in zip(*counted, strict=True)]

    @property
    def mode(self) -> tuple[bool, str | None]:
        """Whether it was captured in train mode, and why the other is another model: without gradients nobody asks."""
        compiled = self.compilation
        return compiled.training, compiled.other_mode if compiled.trainable else None

    def check_weights(self) -> None:
        """Raises InputError where a weight that passes folded into others was changed since."""
        for weight in self._folded:
            if weight.has_changed():
                raise InputError(f"weight {weight.name} was changed after compiling, and passes have folded it: compile the module again")

    @cached_property
    def decoder(self) -> ProgramDecoder:
        """The functions that generate tokens. Raises InputError for a program that has none."""
        # What runs operation by operation gains nothing by knowing its sizes.
        return ProgramDecoder(self.compilation.program, self._executor_of, fixed=self.compilation.backend != "aten")

    def _executor_of(self, function: str, sizes: Mapping[str, int]) -> Executor:
        """Of a function as it is, or at values of its symbols."""
        compiled, program = self.compilation, self.compilation.program
        if sizes:
            program = Program([specialised(program, program.functions[function], sizes)], program.weights, program.symbols)
        executor = Executor(program, function, compiled.backend, compiled.cache, self._packs)
        self._executors.append(executor)
        return executor

    def _outputs_of(self, function: str, inputs: Sequence[Any]) -> list[Any]:
        """Of a function without states."""
        if self.compilation.trainable and torch.is_grad_enabled():
            return run_with_gradients(self.compilation.program, inputs, self.parameters, function=function)[0]
        with self._lock:
            executor = self._named.get(function) or self._named.setdefault(function, self._executor_of(function, {}))
        return executor(inputs, {})[0]

    def packed(self) -> tuple[int, int]:
        """How many weights are held in a second layout by the functions that have run, and the bytes of these copies."""
        packs = set[Pack]().union(*(executor.packs() for executor in self._executors))
        return len(packs), sum(pack.nbytes for pack in packs)

    def _write_back(self, leaves: list[Any], new_states: Mapping[str, torch.Tensor], given: Sequence[Any]) -> list[Any]:
        """Copies new states into the tensors that hold them, save those that lie there already. What shares memory with one of these is
        copied out first: an output, which would change with it, and a new state, which may be what another state was."""
        targets = {name: self.states[name] if index is None else given[index] for name, index in self._updates.items()}
        held = {target.untyped_storage().data_ptr() for target in targets.values()}

        def apart(value: Any) -> Any:
            return value.clone() if isinstance(value, torch.Tensor) and value.untyped_storage().data_ptr() in held else value

        leaves = [apart(leaf) for leaf in leaves]
        values = {name: apart(value) for name, value in new_states.items() if not _is_the_same(value, targets[name])}
        with torch.no_grad():
            for name, value in values.items():
                targets[name].copy_(value)
        return leaves

    def saved(self) -> Saved:
        compiled = self.compilation
        with self._turn:
            states = {
                name: replace(compiled.program.weights[name], tensor=s.clone(), known_digest=None, _memo={})
                for name, s in self.states.items()
            }
        program = as_trained(compiled.program) if compiled.trainable else compiled.program.copy()
        program.weights.update(states)
        sources = tuple(kernel.source for kernel in self.executor.kernel_calls()) or compiled.kernels
        reports = tuple(str(each.untimed if isinstance(each, PassReport) else each) for each in compiled.reports)
        return Saved(program, compiled.parameters, compiled.contract, reports, compiled.training, compiled.other_mode, sources)

    @contextmanager
    def states_kept(self) -> Iterator[None]:
        """Puts the states back to what they were; calls from other threads come before or after."""
        with self._turn:
            before = {name: state.clone() for name, state in self.states.items()}
            try:
                yield
            finally:
                for name, value in before.items():
                    self.states[name].copy_(value)

    def spared(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments of a call, with copies of those that it writes to."""
        _, given, _ = self._bound(args, kwargs)
        written = {id(given[index]) for index in self._updates.values() if index is not None}
        return pytree.tree_map(lambda leaf: leaf.detach().clone() if id(leaf) in written else leaf, (args, kwargs))


@dataclass(frozen=True)
class _Folded:
    """A captured weight that passes computed others from: who trains the module changes it, and not what was computed from it.

    Seen are writes that torch counts and another tensor in its place (`holder[key]`), not writes through `.data` nor another
    submodule.
    """

    name: str
    tensor: torch.Tensor
    version: int
    holder: Mapping[str, Any]
    key: str
    held: Any

    @staticmethod
    def of(name: str, tensor: torch.Tensor, module: nn.Module | None) -> "_Folded":
        path, _, key = name.rpartition(".")
        try:
            owner = nn.Module() if module is None else module.get_submodule(path)
        except AttributeError:  # a weight that torch.export named itself
            owner = nn.Module()
        holder: Mapping[str, Any] = owner._parameters if key in owner._parameters else owner._buffers
        return _Folded(name, tensor, tensor._version, holder, key, holder.get(key))

    def has_changed(self) -> bool:
        return self.tensor._version != self.version or self.holder.get(self.key) is not self.held


def _folded(compilation: Compilation) -> list[_Folded]:
    if not compilation.history:
        return []
    before, after = compilation.history[0], compilation.program.weights
    if after.keys() <= before.weights.keys():
        return []
    gone = [(name, weight.tensor) for name, weight in before.weights.items() if name not in after]
    return [_Folded.of(name, tensor, compilation.module) for name, tensor in gone if tensor is not None and not tensor.is_inference()]


def _layer_errors(compilation: Compilation, inputs: Sequence[Any]) -> tuple[tuple[LayerError, ...], str]:
    """The errors of the layers, and why there are none."""
    if not compilation.history:
        return (), "a loaded model does not know the program that it was captured as"
    captured = compilation.stages[0]
    if any(node.op == "call_function" and draws(node) for node in captured.nodes()):
        return (), "the program draws random numbers, which are others in float64"
    try:
        return layer_errors(captured, compilation.program, inputs), ""
    except (NoFloat64, RuntimeError) as error:
        return (), str(error)


def _own_copy(program: Program, name: str) -> torch.Tensor:
    tensor = program.weights[name].tensor
    if tensor is None:
        raise InputError(f"state {name} has no values: this program was read from text, give parse() a weight table")
    with torch.inference_mode(False):  # a tensor made in inference mode is not written to outside
        return tensor.detach().clone()


def _is_the_same(value: torch.Tensor, target: torch.Tensor) -> bool:
    return value.data_ptr() == target.data_ptr() and (value.shape, value.stride()) == (target.shape, target.stride())


def _updates(signature: Any) -> dict[str, int | None]:
    """New state -> index of the input that it is written into, None for a state of the model's own."""
    index = {f"input:{argument.name}": n for n, argument in enumerate(signature.inputs)}
    return {name: index.get(name) for name in signature.new_states}
