"""Runs of calls as what runs them: each call by its own kernel, or all in one as Inductor's C++.

A lowering adds a run of calls to the graph that is being made (`segment`), and makes regions ready (`region`). `pieces` says of each
call that it made of something else what that began with; what begins with a node in `left` stays with library kernels. `code` holds what
was compiled before. `in_place` has for operators that give new caches what runs where nobody reads the old ones any more.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import fx

from ..codegen.cpu_kernels import IN_PLACE
from ..codegen.low_rank.sites import add_site, find_sites
from ..codegen.native_calls import has_kernel
from ..ir import Node, SymbolTable
from ..ir.calls import GETITEM
from ..ir.infer import storage_key, tensors_of
from ..ir.region_call import RegionCall
from .code_cache import CodeCache
from .flat import Boxed, FlatGraph
from .lazy_order import lazy_runs
from .sliced import Body, SlicedRun


class AtenLowering:
    """Every operation by its own kernel."""

    in_place = IN_PLACE

    def __init__(self) -> None:
        self.pieces: dict[Node, Node] = {}
        self.left: set[Node] = set()
        self.code: CodeCache | None = None

    def prepared(self, graph: fx.Graph) -> tuple[fx.Graph, dict[Node, Node]]:
        """What is lowered in the place of `graph`, and from which of its nodes each call came where that is another."""
        return graph, {}

    def segment(self, nodes: Sequence[Node], lowered: fx.Graph, copies: dict[Node, Node]) -> None:
        """Adds a run of calls to `lowered`."""
        sites = {site[0]: site for site in find_sites(nodes)}
        for node in nodes:
            if node in sites:
                add_site(sites[node], lowered, copies)
            elif node not in copies:
                copies[node] = lowered.node_copy(node, copies.__getitem__)

    def region(self, node: Node, donors: Mapping[int, int]) -> SlicedRun:
        return SlicedRun(node, donors)


class Segment(Boxed):
    """Compiled code as an operation."""

    def __init__(self, graph: fx.Graph, run: Callable[[list[Any]], list[Any]]):
        self.graph = graph
        self.run = run

    def __call__(self, arguments: list[Any]) -> list[Any]:
        return self.run(arguments)

    def __str__(self) -> str:
        return "a compiled segment"


class InductorLowering(AtenLowering):
    """Segments and bodies as Inductor's C++. `form` names what the compiler is given for a graph."""

    form = "as it is"

    def __init__(self, symbols: SymbolTable, code: CodeCache | None = None):
        super().__init__()
        self.symbols, self.code = symbols, code
        self._segments: dict[Node, Segment] = {}
        self._regions: dict[Node, SlicedRun] = {}

    def segment(self, nodes: Sequence[Node], lowered: fx.Graph, copies: dict[Node, Node]) -> None:
        """Adds what `nodes` become to `lowered`: compiled code, and between it the calls that have a kernel of ours."""
        sites = {site[0]: site for site in find_sites(nodes)}
        for run in lazy_runs(nodes, lambda node: node.all_input_nodes if _is_ours(node) else None):
            if isinstance(run, list):
                self.compiled_segment(run, lowered, copies)
            elif run in sites:
                add_site(sites[run], lowered, copies)
            elif run not in copies:
                copies[run] = lowered.node_copy(run, copies.__getitem__)

    def compiled_segment(self, nodes: Sequence[Node], lowered: fx.Graph, copies: dict[Node, Node]) -> None:
        """Adds a run of calls to `lowered` as one call of compiled code."""
        inputs, outputs = ends(nodes)
        if nodes[0] in self.left or not computes(outputs, inputs):
            return AtenLowering.segment(self, nodes, lowered, copies)
        if nodes[0] not in self._segments:
            types = [node.meta["val"] for node in inputs]
            alone = cut_out(nodes, inputs, outputs)
            self._segments[nodes[0]] = Segment(alone, self._compiled(alone, types))
        self.add_call(self._segments[nodes[0]], nodes, inputs, outputs, lowered, copies)

    def add_call(
        self,
        segment: Segment,
        nodes: Sequence[Node],
        inputs: Sequence[Node],
        outputs: Sequence[Node],
        lowered: fx.Graph,
        copies: dict[Node, Node],
    ) -> None:
        """Adds to `lowered` the call of `segment` that `nodes` become."""
        call = lowered.create_node("call_function", segment, tuple(map(copies.__getitem__, inputs)), name="segment")
        call.meta = {"val": tuple(output.meta["val"] for output in outputs)}
        for index, output in enumerate(outputs):
            copies[output] = lowered.call_function(GETITEM, (call, index))
            copies[output].meta = output.meta
        self.pieces[call] = nodes[0]

    def region(self, node: Node, donors: Mapping[int, int]) -> SlicedRun:
        if node in self.left or any(map(has_kernel, RegionCall.of(node).body.graph.nodes)):
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

        shelf = None if self.code is None else self.code.code(graph, examples, self.form)
        return CompiledGraph(self._formed(graph), examples, self.symbols, FlatGraph(graph), shelf)

    def _formed(self, graph: fx.Graph) -> fx.Graph:
        """What the compiler is given for `graph`."""
        return graph


def _is_ours(node: Node) -> bool:
    """Whether a call is one that has a kernel of ours, or takes one of its results."""
    called: Any = node.args[0] if node.target is GETITEM else node
    return has_kernel(called)


def computes(outputs: Sequence[Node], inputs: Sequence[Node]) -> bool:
    """Whether a segment makes a tensor: views and arithmetic on sizes are not worth a compilation."""
    known = {storage_key(tensor) for node in inputs for tensor in tensors_of(node.meta["val"])}
    return any(storage_key(tensor) not in known for node in outputs for tensor in tensors_of(node.meta["val"]))


def ends(nodes: Sequence[Node]) -> tuple[list[Node], list[Node]]:
    """What a run of calls reads, and which of its results others read."""
    inside = set(nodes)
    inputs = list(dict.fromkeys(operand for node in nodes for operand in node.all_input_nodes if operand not in inside))
    return inputs, [node for node in nodes if any(user not in inside for user in node.users)]


def cut_out(nodes: Sequence[Node], inputs: Sequence[Node], outputs: Sequence[Node]) -> fx.Graph:
    """The graph of `nodes` alone."""
    graph, copies = fx.Graph(), {}
    for index, node in enumerate(inputs):
        copies[node] = graph.placeholder(f"input_{index}")
        copies[node].meta = node.meta
    for node in nodes:
        copies[node] = graph.node_copy(node, copies.__getitem__)
    graph.output(tuple(copies[node] for node in outputs))
    return graph
