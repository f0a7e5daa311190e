"""From a function's graph to the graph that runs: each region becomes a `SlicedRun`, and what a backend compiles one call.

With Inductor, the longest runs of operations between regions are compiled, and each region's body for the one or two lengths that
its slices have.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import fx

from ..ir import Node, SymbolTable
from ..ir.calls import GETITEM
from ..ir.donation import plan_donations
from ..ir.infer import storage_key, tensors_of
from ..ir.program import region_of
from ..ir.region_call import RegionCall
from .flat import Boxed, FlatGraph
from .sliced import Body, SlicedRun

Backend = str


def lower(graph: fx.Graph, symbols: SymbolTable, backend: Backend) -> fx.Graph:
    """The runnable form of `graph` for `backend`, "aten" or "inductor"."""
    lowering = _Inductor(symbols) if backend == "inductor" else _Aten()
    donors = plan_donations(graph)
    lowered = fx.Graph()
    copies: dict[Node, Node] = {}
    for piece in _pieces(graph):
        if isinstance(piece, list):
            lowering.segment(piece, lowered, copies)
        elif region_of(piece) is not None:
            _sliced_call(SlicedRun(piece, donors.get(piece, {}), lowering.compile_body), piece, lowered, copies)
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


def _sliced_call(run: SlicedRun, node: Node, lowered: fx.Graph, copies: dict[Node, Node]) -> None:
    call = RegionCall.of(node)
    arguments = fx.map_arg((call.count, call.units, *call.operands), copies.__getitem__)
    copies[node] = lowered.create_node("call_function", run, arguments, name="sliced")  # type: ignore[arg-type]
    copies[node].meta = node.meta


class _Aten:
    """Every operation by its own kernel."""

    def segment(self, nodes: Sequence[Node], lowered: fx.Graph, copies: dict[Node, Node]) -> None:
        for node in nodes:
            copies[node] = lowered.node_copy(node, copies.__getitem__)

    compile_body = None


class _Segment(Boxed):
    """Compiled code as an operation."""

    def __init__(self, run: Callable[[list[Any]], list[Any]]):
        self.run = run

    def __call__(self, arguments: list[Any]) -> list[Any]:
        return self.run(arguments)

    def __str__(self) -> str:
        return "a compiled segment"


@dataclass(frozen=True)
class _Inductor:
    """Segments and bodies as Inductor's C++."""

    symbols: SymbolTable

    def segment(self, nodes: Sequence[Node], lowered: fx.Graph, copies: dict[Node, Node]) -> None:
        inside = set(nodes)
        inputs = list(dict.fromkeys(operand for node in nodes for operand in node.all_input_nodes if operand not in inside))
        outputs = [node for node in nodes if any(user not in inside for user in node.users)]
        if not _computes(outputs, inputs):
            _Aten().segment(nodes, lowered, copies)
            return
        graph = _cut_out(nodes, inputs, outputs)
        run = _Segment(self._compiled(graph, [node.meta["val"] for node in inputs]))
        call = lowered.create_node("call_function", run, tuple(map(copies.__getitem__, inputs)), name="segment")
        call.meta = {"val": tuple(output.meta["val"] for output in outputs)}
        for index, output in enumerate(outputs):
            copies[output] = lowered.call_function(GETITEM, (call, index))
            copies[output].meta = output.meta

    def compile_body(self, graph: fx.Graph, examples: Callable[[], list[Any]]) -> Body:
        with self.symbols.inference():
            types = examples()
        return self._compiled(graph, types)

    def _compiled(self, graph: fx.Graph, examples: Sequence[Any]) -> Body:
        from ..codegen.cpu_inductor import CompiledGraph

        return CompiledGraph(graph, examples, self.symbols, FlatGraph(graph))


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
