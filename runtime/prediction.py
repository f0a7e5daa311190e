"""The peak of a lowered program: the liveness of what lies between its pieces, with what each compiled piece was seen to allocate.

A compiler decides on its own which intermediates of a piece exist. So each piece runs once, on tensors of ones, under the meter.
"""

from collections.abc import Callable, Sequence
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import fx

from ..ir import Node
from ..ir.forks import new_lock
from ..ir.infer import storage_key, tensors_of
from ..ir.liveness import MemoryProfile, last_uses, profile_graph, storage_bytes
from ..ir.symbols import hint
from .flat import Boxed
from .memory import measure_peak, profiler_is_running
from .sliced import SlicedRun, call_workspace

_metering = new_lock()
# What each piece was seen to allocate, by the operands that it may free.
_known: WeakKeyDictionary[Any, dict[tuple[int, ...], int | None]] = WeakKeyDictionary()


def lowered_profile(graph: fx.Graph) -> MemoryProfile | None:
    """The memory profile of `graph`, as `lower` made it; symbols at their hints. None while a profiler is running: torch has one a
    process, and the meter needs it."""
    with _metering:
        return None if profiler_is_running() else _profile(graph)


def _profile(graph: fx.Graph) -> MemoryProfile:
    dying = last_uses(graph)
    donors = {
        node: {j: node.args[2 + i] for j, i in node.target.donors.items()} for node in graph.nodes if isinstance(node.target, SlicedRun)
    }
    donors |= {node: node.meta["writes_caches"] for node in graph.nodes if "writes_caches" in node.meta}

    def workspace(node: Node) -> int:
        if isinstance(node.target, SlicedRun):
            seen = [_seen(body, types, ()) for body, types in node.target.compiled]
            return max((peak for peak in seen if peak is not None), default=node.target.workspace)
        if not isinstance(node.target, Boxed):
            return call_workspace(node)
        operands = node.all_input_nodes
        dead = [i for i, operand in enumerate(operands) if operand in dying.get(node, ()) and operand.op == "call_function"]
        made = _storages([node])
        for key in _storages(operands):
            made.pop(key, None)
        peak = _seen(node.target, lambda: [operand.meta["val"] for operand in operands], dead)
        if peak is None:
            return profile_graph(node.target.graph).peak_bytes - sum(made.values())
        return peak - sum((made | _storages([operands[i] for i in dead])).values())

    return profile_graph(graph, donors=donors, workspace_of=workspace)


def _storages(nodes: Sequence[Node]) -> dict[int, int]:
    """The bytes of each storage behind the values of `nodes`."""
    return {storage_key(tensor): storage_bytes(tensor) for node in nodes for tensor in tensors_of(node.meta["val"])}


def _seen(run: Any, types: Callable[[], Sequence[Any]], dead: Sequence[int]) -> int | None:
    """The peak of one run on ones, with the operands in `dead`, which the run may free; the others were there before. None if the
    piece cannot run on ones: an index out of range."""
    known = _known.setdefault(run, {})
    if tuple(dead) not in known:
        known[tuple(dead)] = _measured(run, types(), dead)
    return known[tuple(dead)]


def _measured(run: Any, types: Sequence[Any], dead: Sequence[int]) -> int | None:
    held = [None if i in dead else _ones(value) for i, value in enumerate(types)]

    def call() -> list[Any]:
        return run([_ones(value) if i in dead else held[i] for i, value in enumerate(types)])

    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        try:
            return measure_peak(call).peak_bytes
        except (RuntimeError, IndexError):
            return None


def _ones(value: Any) -> Any:
    if not isinstance(value, torch.Tensor):
        return hint(value)
    size, stride = [[hint(n) for n in each] for each in (value.shape, value.stride())]
    return torch.empty_strided(size, stride, dtype=value.dtype, device=value.device).fill_(1)
