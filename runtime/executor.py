"""Runs one function of a program: weights bound once, tensors freed at last use, autocast and gradients off.

Values that a call made die inside it; inputs stay with the caller. Outputs are ordinary tensors, usable in autograd.
"""

import functools
import statistics
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from ..codegen.cpu_packed import Pack, PackedCall
from ..explorer.story import KernelRun
from ..ir import Node, Program
from ..ir.appends import plan_appends
from ..ir.errors import InputError
from ..ir.forks import check_threads
from ..ir.infer import tensors_of
from .cache import Cache
from .flat import FlatGraph
from .graph_replay import Call, CudaGraphs, Replayed
from .kernel_times import kernel_runs
from .lowering import Backend, is_on, lower, lowering_for
from .packing import Packs
from .prediction import lowered_profile
from .segments import AtenLowering
from .sliced import SlicedRun

if TYPE_CHECKING:
    from ..codegen.triton import Kernel

_TIMED_CALLS = 5

# A view would keep the tensor that it was made from, and so its storage in use by two.
_VIEW_TRACKING = torch._C.DispatchKeySet(torch._C.DispatchKey.ADInplaceOrView)


class Executor:
    """`executor(inputs, states)` gives the flat outputs and the new states of `function`.

    `inputs` holds one value for each leaf, constants included; `states` a tensor for each state, the program's own where one
    is missing. States and inputs are read, never written: writing back is the caller's business. Only caches that the function gives up
    (`ir/appends.py`) are written where they lie, and are the new states themselves. Compiled code is kept in `cache`. Executors of one
    model's functions share `packs`, so that a weight has one second layout for all.

    Raises:
        InputError: a weight has no values (the program was read from text alone).
        TargetError: this process, or one that calls later, was forked and lacks the threads that torch would wait for.
    """

    def __init__(
        self,
        program: Program,
        function: str = "main",
        backend: Backend = "aten",
        cache: Cache | None = None,
        packs: Packs | None = None,
    ):
        check_threads()
        body = program.functions[function]
        self.program, self.backend = program, backend
        self._name = function
        self._new_states = tuple(body.signature().new_states)
        self._states = {str(p.target): _tensor(program, p) for p in body.placeholders if p.meta.get("role", "input") == "state"}
        # Where each placeholder's value comes from: a name for a state, None for the next input.
        self._sources = [str(p.target) if p.meta.get("role", "input") == "state" else None for p in body.placeholders]
        bound = functools.partial(_tensor, program)
        self._lowering = lowering_for(backend, body.graph, program.symbols, bound, cache, packs)
        self._lowered = lower(body.graph, self._lowering)
        self._flat = FlatGraph(self._lowered, bound)
        self._call: Call = self._flat
        devices = {tensor.device for node in self._lowered.nodes for tensor in tensors_of(node.meta.get("val"))}
        if not isinstance(self._lowering, AtenLowering) and is_on(self._lowered, "cuda") and len(devices) == 1:
            weights = [bound(node) for node in self._lowered.nodes if node.op == "get_attr"]
            caches = {cache for each in plan_appends(body.graph).values() for cache in each.values()}
            is_state = [p in caches or source is not None for p, source in zip(body.placeholders, self._sources, strict=True)]
            self._call = Replayed(self._flat, CudaGraphs(*devices), is_state, weights)

    @contextmanager
    def kernel_by_kernel(self) -> Iterator[None]:
        """Calls run as they would be recorded, so that their memory can be seen: a recording holds its own."""
        before, self._call = self._call, self._flat
        try:
            yield
        finally:
            self._call = before

    @property
    def calls_until_recorded(self) -> int:
        """How many calls with new sizes take longer than those that follow."""
        return 0 if self._call is self._flat else 2

    def predicted_peak(self) -> int | None:
        """The peak of what a compiler made of the program, in bytes; None where library kernels run it as it stands, and while a
        profiler is running."""
        memory = None if self.backend == "aten" else lowered_profile(self._lowered)
        return None if memory is None else memory.peak_bytes

    def packs(self) -> set[Pack]:
        """The weights that are held in a second layout."""
        return {
            pack for graph in self._graphs() for node in graph.nodes if isinstance(node.target, PackedCall) for pack in node.target.packs
        }

    def _graphs(self) -> list[fx.Graph]:
        """The graph that runs, and the bodies of its regions."""
        runs = [node.target for node in self._lowered.nodes if isinstance(node.target, SlicedRun)]
        return [self._lowered, *(run.call.body.graph for run in runs)]

    def kernel_calls(self) -> "list[Kernel]":
        """The Triton kernel of each call of one, in order."""
        from ..codegen.triton.launch import Launch

        return [node.target.kernel for node in self._lowered.nodes if isinstance(node.target, Launch)]

    def __call__(
        self, inputs: Sequence[Any], states: Mapping[str, torch.Tensor] | None = None
    ) -> tuple[list[Any], dict[str, torch.Tensor]]:
        check_threads()
        values = self._values(inputs, states)
        del inputs, states
        with torch.no_grad(), torch._C._DisableAutocast(), torch._C._ExcludeDispatchKeyGuard(_VIEW_TRACKING):
            leaves = self._call(values)
        split = len(leaves) - len(self._new_states)
        return leaves[:split], dict(zip(self._new_states, leaves[split:], strict=True))

    def _values(self, inputs: Sequence[Any], states: Mapping[str, torch.Tensor] | None) -> list[Any]:
        """One value for each placeholder."""
        expected = self._sources.count(None)
        if len(inputs) != expected:
            raise InputError(f"function {self._name} takes {expected} inputs, not {len(inputs)}")
        held = {**self._states, **(states or {})}
        following = iter(inputs)
        return [next(following) if source is None else held[source] for source in self._sources]

    def kernel_runs(self, inputs: Sequence[Any], states: Mapping[str, torch.Tensor] | None = None) -> tuple[KernelRun, ...]:
        """What a call runs, each kernel with the median of its times over a few calls."""
        settle = torch.cuda.synchronize if is_on(self._lowered, "cuda") else lambda: None
        with torch.no_grad(), torch._C._DisableAutocast(), torch._C._ExcludeDispatchKeyGuard(_VIEW_TRACKING):
            self._flat(self._values(inputs, states))
            runs = [self._flat.timed(self._values(inputs, states), settle) for _ in range(_TIMED_CALLS)]
        medians = [statistics.median(times) for times in zip(*runs, strict=True)]
        return kernel_runs(self.program, self._name, [each.node for each in self._flat.instructions], medians)

    def kernels_untimed(self) -> tuple[KernelRun, ...]:
        """The kernels that were emitted for this function, in the order in which a call runs them."""
        runs = kernel_runs(self.program, self._name, [each.node for each in self._flat.instructions])
        return tuple(run for run in runs if run.kind in ("triton", "compiled"))


def _tensor(program: Program, node: Node) -> torch.Tensor:
    tensor = program.weights[str(node.target)].tensor
    if tensor is None:
        raise InputError(f"weight {node.target} has no values: this program was read from text, give parse() a weight table")
    return tensor
