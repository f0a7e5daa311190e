"""Each operation by the fastest that this machine has, as timed when the model is made ready: oneDNN on packed weights, compiled code
between such calls, kernels of ATen and of ours otherwise.

Whether an instruction set or a library is there is asked nowhere: a way that does not win is not taken. Weights in region bodies are
operands that every slice gets whole; they are packed like those outside.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import fx

from ..codegen import cpu_packed
from ..codegen.cpu_groups import Group, find_groups
from ..codegen.cpu_packed import Pack, hinted
from ..ir import Node, Region, SymbolTable
from ..ir.region_call import RegionCall
from .code_cache import CodeCache
from .flat import FlatGraph
from .probe import Probe
from .segments import cut_out
from .sliced import SlicedRun

Bound = Callable[[Node], torch.Tensor]


class TunedLowering:
    """Lowers `graph`, whose weights are `bound`."""

    def __init__(self, graph: fx.Graph, symbols: SymbolTable, bound: Bound):
        self.symbols = symbols
        self.pieces: dict[Node, Node] = {}
        self.left: set[Node] = set()
        self.code: CodeCache | None = None
        self.packs: dict[tuple[Any, ...], Pack] = {}
        self._bound = bound
        self._probe = Probe(_weight_bytes(graph, bound))

    def segment(self, nodes: Sequence[Node], lowered: fx.Graph, copies: dict[Node, Node]) -> None:
        """Adds a run of calls to `lowered`."""
        groups = self._groups(nodes, lambda value: value if _is_weight(value) else None)
        self._add(nodes, groups, lowered, copies)
        self.pieces |= {copies[group.result]: group.nodes[0] for group in groups}

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
        self._add(calls, groups, body, copies)
        body.output(tuple(copies[part] for part in call.body.outputs))
        return SlicedRun(node, donors, body=Region(body))

    def _add(self, nodes: Iterable[Node], groups: Sequence[Group], lowered: fx.Graph, copies: dict[Node, Node]) -> None:
        """Adds `nodes` to `lowered`, a packed call in the place of the last of each group."""
        by_result = {group.result: group for group in groups}
        inside = {node for group in groups for node in group.nodes}
        for node in nodes:
            if node not in inside:
                copies[node] = lowered.node_copy(node, copies.__getitem__)
            elif node in by_result:
                group = by_result[node]
                operands = tuple(None if operand is None else copies[operand] for operand in group.operands)
                copies[node] = lowered.create_node("call_function", group.call, operands, name=group.call.kind)
                copies[node].meta = node.meta

    def _groups(self, nodes: Sequence[Node], weight_of: Callable[[Any], Node | None]) -> list[Group]:
        """The groups that are faster as one packed call; `weight_of` gives the weight behind a value that is one."""
        if not cpu_packed.is_available():
            return []
        found = find_groups(nodes, lambda value: isinstance(value, Node) and weight_of(value) is not None)
        return [group for group in found if group.nodes[0] not in self.left and self._wins(group, weight_of(group.weight))]

    def _wins(self, group: Group, node: Node | None) -> bool:
        assert node is not None
        weight = self._bound(node)
        key = (id(weight), *group.call.layout())
        is_new = key not in self.packs
        pack = self.packs[key] if key in self.packs else Pack(weight, group.call.lay_out)
        group.call.pack = pack
        wins = self._verdict(group, weight) == "onednn"
        if wins and is_new:
            self.packs[key] = pack
        return wins

    def _verdict(self, group: Group, weight: torch.Tensor) -> str:
        inputs = list(dict.fromkeys(operand for operand in group.operands if operand is not None))
        values: list[Any] = [weight if operand is group.weight else _random(operand.meta["val"]) for operand in inputs]
        by_node = dict(zip(inputs, values, strict=True))
        operands = [None if operand is None else by_node[operand] for operand in group.operands]
        aten = FlatGraph(cut_out(group.nodes, inputs, [group.result]))
        question = f"{[str(node.target) for node in group.nodes]} {[(*hinted(node.meta['val']),) for node in inputs]} {group.call.layout()}"
        with torch.no_grad(), torch._C._DisableAutocast():
            return self._probe.fastest(
                group.call.kind, question, {"aten": lambda: aten(list(values)), "onednn": lambda: group.call(*operands)}
            )


def _is_weight(node: Any) -> bool:
    return isinstance(node, Node) and node.op == "get_attr"


def _weight_bytes(graph: fx.Graph, bound: Bound) -> int:
    return sum(bound(node).nbytes for node in graph.nodes if node.op == "get_attr")


def _random(value: torch.Tensor) -> torch.Tensor:
    """A tensor of the type of `value`, symbols at their hints. The user's generator is left alone."""
    shape, stride = hinted(value)
    generator = torch.Generator().manual_seed(0)
    return torch.empty_strided(shape, stride, dtype=value.dtype).normal_(generator=generator)
