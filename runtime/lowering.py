"""From a function's graph to the graph that runs: each region becomes a `SlicedRun`, and what a backend compiles one call.

With Inductor, the longest runs of operations between regions are compiled, and each region's body for the one or two lengths that
its slices have. In a program with regions a piece that takes more memory than its plan stays with library kernels: Inductor lays
out convolutions anew and may keep what the plan frees.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from torch import fx

from ..ir import Node, SymbolTable
from ..ir.calls import GETITEM
from ..ir.donation import plan_donations
from ..ir.infer import storage_key, tensors_of
from ..ir.liveness import profile_graph
from ..ir.program import region_of
from ..ir.region_call import RegionCall
from .cache import Cache
from .code_cache import CodeCache
from .flat import Boxed, FlatGraph
from .prediction import lowered_profile
from .sliced import Body, SlicedRun

if TYPE_CHECKING:
    from .triton_lowering import TritonLowering

Backend = str


def lower(graph: fx.Graph, symbols: SymbolTable, backend: Backend, cache: Cache | None = None) -> fx.Graph:
    """The runnable form of `graph` for `backend`: "aten", "inductor" or "triton" ("triton_interpreter" is for tests alone). What a
    compiler made for it before may come from `cache`."""
    if backend in ("triton", "triton_interpreter"):
        from .triton_lowering import TritonLowering

        return _lowered(graph, TritonLowering(graph, symbols, interpreted=backend != "triton"), {})
    if backend != "inductor":
        return _lowered(graph, _Aten(), {})
    code = None if cache is None else CodeCache(cache, symbols)
    lowering = _Inductor(symbols, code)
    if any(region_of(node) is not None for node in graph.nodes):
        lowering.left = _pieces_left(graph, lowering, code)
    return _lowered(graph, lowering, {})


def _pieces_left(graph: fx.Graph, lowering: "_Inductor", code: CodeCache | None) -> set[Node]:
    """The first nodes of the pieces that library kernels run: whoever slices a program pays for memory, and compiled code that takes
    more of it than planned gives way."""
    nodes = list(graph.nodes)
    known = code.left(graph) if code is not None else None
    if known is not None:
        return {nodes[position] for position in known}
    pieces: dict[Node, Node] = {}
    memory = lowered_profile(_lowered(graph, lowering, pieces))
    if memory is None:
        return set()
    limit = profile_graph(graph).peak_bytes
    left = {pieces[node] for node, live in zip(memory.nodes, memory.live, strict=True) if live > limit and node in pieces}
    if code is not None:
        code.keep_left(graph, {position for position, node in enumerate(nodes) if node in left})
    return left


def _lowered(graph: fx.Graph, lowering: "_Aten | _Inductor | TritonLowering", pieces: dict[Node, Node]) -> fx.Graph:
    """`pieces` receives, for each call of the result that may be compiled, the node of `graph` that it begins with."""
    donors = plan_donations(graph)
    lowered = fx.Graph()
    copies: dict[Node, Node] = {}
    for piece in _pieces(graph):
        if isinstance(piece, list):
            call = lowering.segment(piece, lowered, copies)
            if call is not None:
                pieces[call] = piece[0]
        elif region_of(piece) is not None:
            call = _sliced_call(lowering.region(piece, donors.get(piece, {})), piece, lowered, copies)
            pieces[call] = piece
        else:
            copies[piece] = lowered.node_copy(piece, copies.__getitem__)
    return lowered


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


class _Aten:
    """Every operation by its own kernel."""

    def segment(self, nodes: Sequence[Node], lowered: fx.Graph, copies: dict[Node, Node]) -> Node | None:
        """Adds a run of calls to `lowered`; returns the one call that they became, if one."""
        for node in nodes:
            copies[node] = lowered.node_copy(node, copies.__getitem__)
        return None

    def region(self, node: Node, donors: Mapping[int, int]) -> SlicedRun:
        return SlicedRun(node, donors)


class _Segment(Boxed):
    """Compiled code as an operation."""

    def __init__(self, graph: fx.Graph, run: Callable[[list[Any]], list[Any]]):
        self.graph = graph
        self.run = run

    def __call__(self, arguments: list[Any]) -> list[Any]:
        return self.run(arguments)

    def __str__(self) -> str:
        return "a compiled segment"


class _Inductor(_Aten):
    """Segments and bodies as Inductor's C++, but for the pieces that begin with a node in `left`."""

    def __init__(self, symbols: SymbolTable, code: CodeCache | None = None):
        self.symbols, self.code = symbols, code
        self.left: set[Node] = set()
        self._segments: dict[Node, _Segment] = {}
        self._regions: dict[Node, SlicedRun] = {}

    def segment(self, nodes: Sequence[Node], lowered: fx.Graph, copies: dict[Node, Node]) -> Node | None:
        inside = set(nodes)
        inputs = list(dict.fromkeys(operand for node in nodes for operand in node.all_input_nodes if operand not in inside))
        outputs = [node for node in nodes if any(user not in inside for user in node.users)]
        if nodes[0] in self.left or not _computes(outputs, inputs):
            return super().segment(nodes, lowered, copies)
        if nodes[0] not in self._segments:
            types = [node.meta["val"] for node in inputs]
            alone = _cut_out(nodes, inputs, outputs)
            self._segments[nodes[0]] = _Segment(alone, self._compiled(alone, types))
        call = lowered.create_node("call_function", self._segments[nodes[0]], tuple(map(copies.__getitem__, inputs)), name="segment")
        call.meta = {"val": tuple(output.meta["val"] for output in outputs)}
        for index, output in enumerate(outputs):
            copies[output] = lowered.call_function(GETITEM, (call, index))
            copies[output].meta = output.meta
        return call

    def region(self, node: Node, donors: Mapping[int, int]) -> SlicedRun:
        if node in self.left:
            return super().region(node, donors)
        if node not in self._regions:
            self._regions[node] = SlicedRun(node, donors, self._compile_body)
        return self._regions[node]

    def _compile_body(self, graph: fx.Graph, examples: Callable[[], list[Any]]) -> Body:
        with self.symbols.inference():
            types = examples()
        return self._compiled(graph, types)

    def _compiled(self, graph: fx.Graph, examples: Sequence[Any]) -> Body:
        from ..codegen.cpu_inductor import CompiledGraph

        shelf = None if self.code is None else self.code.code(graph, examples)
        return CompiledGraph(graph, examples, self.symbols, FlatGraph(graph), shelf)


def _computes(outputs: Sequence[Node], inputs: Sequence[Node]) -> bool:
    """Whether a segment makes a tensor: views and arithmetic on sizes are not worth a compilation."""
    known = {storage_key(tensor) for node in inputs for tensor in tensors_of(node.meta["val"])}
    return any(storage_key(tensor) not in known for node in outputs for tensor in tensors_of(node.meta["val"]))


def _cut_out(nodes: Sequence[Node], inputs: Sequence[Node], outputs: Sequence[Node]) -> fx.Graph:
    """The graph of `nodes` alone."""
    graph, copies = fx.Graph(), {}
    for index, node in enumerate(inputs):
        copies[node] = graph.placeholder(f"input_{index}")
        copies[node].meta = node.meta
    for node in nodes:
        copies[node] = graph.node_copy(node, copies.__getitem__)
    graph.output(tuple(copies[node] for node in outputs))
    return graph
