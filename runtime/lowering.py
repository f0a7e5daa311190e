"""From a function's graph to the graph that runs: each region becomes a `SlicedRun`, and what a backend compiles one call.

With Inductor, the longest runs of operations between regions are compiled, and each region's body for the one or two lengths that
its slices have. In a program with regions a piece that takes more memory than its plan stays with library kernels: Inductor lays
out convolutions anew and may keep what the plan frees.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Protocol

from torch import fx

from ..codegen.native_calls import libraries_of
from ..ir import Node, SymbolTable
from ..ir.appends import CACHES, caches_of, plan_appends
from ..ir.calls import GETITEM
from ..ir.donation import plan_donations
from ..ir.infer import tensors_of
from ..ir.liveness import profile_graph
from ..ir.program import region_of
from ..ir.region_call import RegionCall
from .backend import has_cpp_compiler, has_triton
from .cache import Cache
from .code_cache import CodeCache, load_native
from .packing import Packs
from .prediction import lowered_profile
from .segments import AtenLowering, InductorLowering
from .sliced import SlicedRun
from .tuned_lowering import Bound, TunedLowering

Backend = str


class Lowering(Protocol):
    """How a backend runs what a graph consists of; `runtime/segments.py` says what its attributes mean."""

    pieces: dict[Node, Node]
    left: set[Node]
    code: CodeCache | None
    in_place: dict[Callable[..., Any], Callable[..., Any]]

    def prepared(self, graph: fx.Graph) -> tuple[fx.Graph, dict[Node, Node]]: ...

    def segment(self, nodes: Sequence[Node], lowered: fx.Graph, copies: dict[Node, Node]) -> None: ...

    def region(self, node: Node, donors: Mapping[int, int]) -> SlicedRun: ...


def lowering_for(
    backend: Backend, graph: fx.Graph, symbols: SymbolTable, bound: Bound, cache: Cache | None = None, packs: Packs | None = None
) -> Lowering:
    """What makes `graph` ready for `backend`: "aten", "inductor", "tuned" or "triton" ("triton_interpreter" is for tests alone). What a
    compiler made for it before may come from `cache`; `packs` are those of the functions that were made ready before."""
    _make_kernels_ready(graph, cache)
    if backend in ("triton", "triton_interpreter") or (backend == "tuned" and is_on(graph, "cuda") and has_triton()):
        from .triton_lowering import TritonLowering

        return TritonLowering(graph, symbols, interpreted=backend == "triton_interpreter", tune=backend == "tuned", cache=cache)
    code = None if cache is None else CodeCache(cache, symbols)
    if backend == "tuned" and is_on(graph, "cpu"):
        return TunedLowering(graph, symbols, bound, code, Packs() if packs is None else packs)
    if backend == "aten" or not has_cpp_compiler():
        return AtenLowering()
    return InductorLowering(symbols, code)


def _make_kernels_ready(graph: fx.Graph, cache: Cache | None) -> None:
    """Compiles the kernels of ours that calls in `graph` need, or takes them from `cache`, so that no call has to wait for it."""
    bodies = [region.graph for node in graph.nodes if (region := region_of(node)) is not None]
    for library in libraries_of(node for each in (graph, *bodies) for node in each.nodes):
        load_native(library, cache)


def is_on(graph: fx.Graph, device: str) -> bool:
    """Whether all tensors are on one kind of device, "cpu" or "cuda"."""
    return {tensor.device.type for node in graph.nodes for tensor in tensors_of(node.meta.get("val"))} == {device}


def lower(graph: fx.Graph, lowering: Lowering) -> fx.Graph:
    """The runnable form of `graph`."""
    if not any(region_of(node) is not None for node in graph.nodes):
        return _lowered(graph, lowering)
    nodes = list(graph.nodes)
    known = None if lowering.code is None else lowering.code.left(graph)
    if known is None:
        lowered = _lowered(graph, lowering)
        lowering.left = _left(graph, lowered, lowering.pieces)
        if lowering.code is not None:
            lowering.code.keep_left(graph, {position for position, node in enumerate(nodes) if node in lowering.left})
        return _lowered(graph, lowering) if lowering.left else lowered
    lowering.left = {nodes[position] for position in known}
    return _lowered(graph, lowering)


def _left(graph: fx.Graph, lowered: fx.Graph, pieces: Mapping[Node, Node]) -> set[Node]:
    """The first nodes of the pieces that library kernels run: whoever slices a program pays for memory, and what takes more of it than
    planned gives way."""
    memory = lowered_profile(lowered) if pieces else None
    if memory is None:
        return set()
    limit = profile_graph(graph).peak_bytes
    return {pieces[node] for node, live in zip(memory.nodes, memory.live, strict=True) if live > limit and node in pieces}


def _lowered(program: fx.Graph, lowering: Lowering) -> fx.Graph:
    graph, source = lowering.prepared(program)
    donors = plan_donations(graph)
    lowered = fx.Graph()
    copies: dict[Node, Node] = {}
    for piece in _pieces(graph):
        if isinstance(piece, list):
            lowering.segment(piece, lowered, copies)
        elif region_of(piece) is not None:
            run = lowering.region(piece, donors.get(piece, {}))
            call = _sliced_call(run, piece, lowered, copies)
            if not run.is_plain:
                lowering.pieces[call] = piece
        else:
            copies[piece] = lowered.node_copy(piece, copies.__getitem__)
    for call, first in lowering.pieces.items():
        lowering.pieces[call] = source.get(first, first)
    _write_in_place(program, lowered, lowering)
    return lowered


def _write_in_place(program: fx.Graph, lowered: fx.Graph, lowering: Lowering) -> None:
    """Lets calls write to the caches that `program` gives up to them."""
    given_up = {_names(caches.values()) for caches in plan_appends(program).values()}
    for node in lowered.nodes:
        if node.target in CACHES and _names(caches_of(node).values()) in given_up:
            node.meta["writes_caches"] = caches_of(node)
            node.target = lowering.in_place[node.target]


def _names(caches: Iterable[Node]) -> tuple[str, ...]:
    """The names of caches that are placeholders."""
    return tuple(str(cache.target) for cache in caches if cache.op == "placeholder")


def _pieces(graph: fx.Graph) -> "list[Node | list[Node]]":
    """The graph in order: runs of calls as lists; regions with their results, and whatever is no call, one by one."""
    pieces: list[Any] = []
    for node in graph.nodes:
        result_of_region = node.target is GETITEM and region_of(node.args[0]) is not None
        if node.op != "call_function" or region_of(node) is not None or result_of_region:
            pieces.append(node)
        elif pieces and isinstance(pieces[-1], list):
            pieces[-1].append(node)
        else:
            pieces.append([node])
    return pieces


def _sliced_call(run: SlicedRun, node: Node, lowered: fx.Graph, copies: dict[Node, Node]) -> Node:
    call = RegionCall.of(node)
    arguments = fx.map_arg((call.count, call.units, *call.operands), copies.__getitem__)
    copies[node] = lowered.create_node("call_function", run, arguments, name="sliced")  # type: ignore[arg-type]
    copies[node].meta = node.meta
    return copies[node]
