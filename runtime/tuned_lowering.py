"""Each operation by the fastest that this machine has, as timed when the model is made ready: oneDNN on packed weights, a kernel of ours
on weights where they lie, compiled code between such calls, kernels of ATen otherwise.

Whether an instruction set or a library is there is asked nowhere: a way that does not win is not taken. Weights in region bodies are
operands that every slice gets whole; they are packed like those outside.
"""

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import fx

from ..codegen.cpu_kernels import IN_PLACE
from ..codegen.cpu_rows import is_row_product
from ..codegen.library_call import LibraryCall
from ..ir import Node, Region, SymbolTable
from ..ir.program import region_of
from ..ir.region_call import RegionCall
from .attention import Attentions
from .backend import has_cpp_compiler
from .code_cache import CodeCache
from .few_rows import FewRows
from .lazy_order import lazy_runs
from .packing import Packing, Packs
from .probe import Probe
from .segments import AtenLowering
from .sliced import SlicedRun
from .tuned_segments import TunedSegments

Bound = Callable[[Node], torch.Tensor]  # gives the values of a weight


class TunedLowering:
    """Lowers `graph`, whose weights are `bound`; compiled code and verdicts may come from `code`, packed weights from `packs`."""

    in_place = IN_PLACE

    def __init__(self, graph: fx.Graph, symbols: SymbolTable, bound: Bound, code: CodeCache | None, packs: Packs):
        self.code: CodeCache | None = None  # which pieces are left depends on what the probe finds
        self.left: set[Node] = set()
        self._bound = bound
        self._compiles = has_cpp_compiler()
        cache = None if code is None else code.cache
        probe = Probe(_weight_bytes(graph, bound), cache=cache)
        self._by_few_rows: set[Node] = set()
        self._packing = Packing(symbols, probe, skips=self._is_better_off, packs=packs, cache=cache)
        self._between = TunedSegments(symbols, probe, code) if self._compiles else AtenLowering()
        self._attention = Attentions(probe, cache) if self._compiles else None
        self._few_rows = FewRows(probe, bound, cache, self._between.loop if isinstance(self._between, TunedSegments) else None)
        self.pieces = self._between.pieces
        self._source: dict[Node, Node] = {}

    def prepared(self, graph: fx.Graph) -> tuple[fx.Graph, dict[Node, Node]]:
        """`graph` with packed calls, and from which of its nodes each call came."""
        # Copies to another layout are for time; a program with regions was made for memory.
        channels_last = self._compiles and all(region_of(node) is None for node in graph.nodes)
        self._by_few_rows = self._few_rows.chosen(graph) - self.left
        prepared, self._source = self._packing.packed(graph, lambda node: self._bound(node) if _is_weight(node) else None, channels_last)
        self._few_rows.put(prepared, self._source, self._by_few_rows)
        self._put_attention(prepared, self._source)
        self._between.left = {node for node, source in self._source.items() if source in self.left}
        return prepared, self._source

    def segment(self, nodes: Sequence[Node], lowered: fx.Graph, copies: dict[Node, Node]) -> None:
        """Adds a run of calls to `lowered`."""
        for run in lazy_runs(nodes, lambda node: node.all_input_nodes if _is_library_call(node) else None):
            if isinstance(run, list):
                self._between.segment(run, lowered, copies)
            else:
                copies[run] = lowered.node_copy(run, copies.__getitem__)
                self.pieces[copies[run]] = run

    def region(self, node: Node, donors: Mapping[int, int]) -> SlicedRun:
        if node in self._between.left:
            return SlicedRun(node, donors)
        call = RegionCall.of(node)
        weights = {
            inner: self._bound(operand)
            for inner, operand, dim in zip(call.body.placeholders, call.operands, call.in_dims, strict=True)
            if dim < 0 and _is_weight(operand)
        }
        body, source = self._packing.packed(call.body.graph, weights.get)
        self._put_attention(body, source)
        is_changed = any(isinstance(inner.target, LibraryCall) for inner in body.nodes)
        return SlicedRun(node, donors, body=Region(body) if is_changed else None)

    def _put_attention(self, graph: fx.Graph, source: Mapping[Node, Node]) -> None:
        if self._attention is not None:
            self._attention.put(node for node in graph.nodes if source.get(node) not in self.left)

    def _is_better_off(self, node: Node) -> bool:
        """Whether a call is not to be packed: library kernels have it, or the one for few rows, or it is a product of one row, which is
        faster as a loop of compiled code."""
        return node in self.left or node in self._by_few_rows or (self._compiles and is_row_product(node))


def _is_library_call(node: Node) -> bool:
    return isinstance(node.target, LibraryCall)


def _is_weight(node: Node) -> bool:
    return node.op == "get_attr"


def _weight_bytes(graph: fx.Graph, bound: Bound) -> int:
    return sum(bound(node).nbytes for node in graph.nodes if _is_weight(node))
