"""Each operation by the fastest that this machine has, as timed when the model is made ready: oneDNN on packed weights, compiled code
between such calls, kernels of ATen and of ours otherwise.

Whether an instruction set or a library is there is asked nowhere: a way that does not win is not taken. Weights in region bodies are
operands that every slice gets whole; they are packed like those outside.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import fx

from ..codegen import cpu_packed
from ..codegen.cpu_groups import Group, find_groups
from ..codegen.cpu_packed import Pack, hinted
from ..codegen.cpu_rows import is_row_product
from ..ir import Node, Region, SymbolTable
from ..ir.calls import GETITEM
from ..ir.region_call import RegionCall
from .backend import has_cpp_compiler
from .cache import Cache
from .code_cache import CodeCache
from .flat import FlatGraph
from .lazy_order import lazy_runs
from .probe import Probe
from .segments import AtenLowering, cut_out
from .sliced import SlicedRun
from .tuned_segments import TunedSegments, random_like

Bound = Callable[[Node], torch.Tensor]


class TunedLowering:
    """Lowers `graph`, whose weights are `bound`."""

    def __init__(self, graph: fx.Graph, symbols: SymbolTable, bound: Bound, cache: Cache | None = None):
        self.symbols = symbols
        self._packs: WeakValueDictionary[tuple[Any, ...], Pack] = WeakValueDictionary()
        self._bound = bound
        self._probe = Probe(_weight_bytes(graph, bound), cache=cache)
        code = None if cache is None else CodeCache(cache, symbols)
        self._between = TunedSegments(symbols, self._probe, code) if has_cpp_compiler() else AtenLowering()
        self.pieces = self._between.pieces
        self.left: set[Node] = set()
        self.code: CodeCache | None = None  # what is left to library kernels depends on verdicts, and is found out anew

    def segment(self, nodes: Sequence[Node], lowered: fx.Graph, copies: dict[Node, Node]) -> None:
        """Adds a run of calls to `lowered`."""
        self._between.left = self.left
        groups = self._groups(nodes, lambda value: value if _is_weight(value) else None)
        by_result = {group.result: group for group in groups}
        inner = {node for group in groups for node in group.nodes[:-1]}
        calls = _with_parts([node for node in nodes if node not in inner])
        for run in lazy_runs(calls, lambda node: by_result[node].reads if node in by_result else None):
            if isinstance(run, list):
                self._between.segment(run, lowered, copies)
            else:
                _add_call(by_result[run], lowered, copies)
                self.pieces[copies[run]] = by_result[run].nodes[0]

    def region(self, node: Node, donors: Mapping[int, int]) -> SlicedRun:
        call = RegionCall.of(node)
        if node in self.left:
            return SlicedRun(node, donors)
        whole = {
            inner: operand
            for inner, operand, dim in zip(call.body.placeholders, call.operands, call.in_dims, strict=True)
            if dim < 0 and _is_weight(operand)
        }
        calls = [inner for inner in call.body.graph.nodes if inner.op == "call_function"]
        groups = self._groups(calls, whole.get)
        if not groups:
            return SlicedRun(node, donors)
        body, copies = fx.Graph(), dict[Node, Node]()
        for inner in call.body.placeholders:
            copies[inner] = body.node_copy(inner, copies.__getitem__)
        by_result = {group.result: group for group in groups}
        inside = {inner for group in groups for inner in group.nodes}
        for inner in calls:
            if inner in by_result:
                _add_call(by_result[inner], body, copies)
            elif inner not in inside:
                copies[inner] = body.node_copy(inner, copies.__getitem__)
        body.output(tuple(copies[part] for part in call.body.outputs))
        return SlicedRun(node, donors, body=Region(body))

    def _groups(self, nodes: Sequence[Node], weight_of: Callable[[Any], Node | None]) -> list[Group]:
        """The groups that are faster as one packed call; `weight_of` gives the weight behind a value that is one."""
        if not cpu_packed.is_available():
            return []
        found = find_groups(nodes, lambda value: isinstance(value, Node) and weight_of(value) is not None)
        return [group for group in found if self._may_pack(group) and self._wins(group, weight_of(group.weight))]

    def _may_pack(self, group: Group) -> bool:
        """Products of one row are faster as loops of compiled code."""
        is_looped = isinstance(self._between, TunedSegments) and is_row_product(group.nodes[0])
        return group.nodes[0] not in self.left and not is_looped

    def _wins(self, group: Group, node: Node | None) -> bool:
        """Whether `group` is faster as one call, which has its packed weight then."""
        assert node is not None
        weight = self._bound(node)
        question = (
            f"{[str(n.target) for n in group.nodes]} {group.call} {[hinted(n.meta['val']) for n in group.reads]} {group.call.layout()}"
        )
        known = self._probe.known(group.call.kind, question)
        if known == "aten":
            return False
        key = (id(weight), *group.call.layout())
        pack = self._packs.get(key) or Pack(weight, group.call.lay_out)
        group.call.pack = pack
        if known is None and self._verdict(group, weight, question) == "aten":
            return False
        self._packs[key] = pack
        return True

    def _verdict(self, group: Group, weight: torch.Tensor, question: str) -> str:
        inputs = list(dict.fromkeys(group.reads))
        values: list[Any] = [weight if operand is group.weight else random_like(operand.meta["val"]) for operand in inputs]
        by_node = dict(zip(inputs, values, strict=True))
        operands = [None if operand is None else by_node[operand] for operand in group.operands]
        aten = FlatGraph(cut_out(group.nodes, inputs, [group.result]))
        ways = {"aten": lambda: aten(list(values)), "onednn": lambda: group.call(*operands)}
        with torch.no_grad(), torch._C._DisableAutocast():
            return self._probe.fastest(group.call.kind, question, ways)


def _with_parts(nodes: Sequence[Node]) -> list[Node]:
    """The calls with the results of one that has several right behind it: a compiled run takes and gives tensors alone."""
    ordered = []
    for node in nodes:
        if node.target is not GETITEM:
            ordered += [node, *(user for user in node.users if user.target is GETITEM)]
    return ordered


def _add_call(group: Group, graph: fx.Graph, copies: dict[Node, Node]) -> None:
    """Adds the packed call of `group` to `graph`."""
    operands = tuple(None if operand is None else copies[operand] for operand in group.operands)
    copies[group.result] = graph.create_node("call_function", group.call, operands, name=group.call.kind)
    copies[group.result].meta = group.result.meta


def _is_weight(node: Any) -> bool:
    return isinstance(node, Node) and node.op == "get_attr"


def _weight_bytes(graph: fx.Graph, bound: Bound) -> int:
    return sum(bound(node).nbytes for node in graph.nodes if node.op == "get_attr")
