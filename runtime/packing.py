"""A graph with its products and convolutions as calls of oneDNN on packed weights, each where the probe finds that it wins.

Convolutions of oneDNN's have their channels innermost. Where all between them is compiled, copies to that layout and from it are written
into the graph, and become part of the loops that come before and after; a copy back and forth is none.
"""

import functools
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import fx

from ..codegen import cpu_packed
from ..codegen.cpu_groups import Group, find_groups
from ..codegen.cpu_packed import Pack, PackedCall, PackedConvolution, PackedLinear, hinted, is_channels_innermost
from ..codegen.experts.packed import PackedExperts, packed_experts
from ..codegen.panels.library import library as panels
from ..codegen.panels.linear import on_panels
from ..ir import Node, SymbolTable
from ..ir.infer import fake_like
from .backend import has_cpp_compiler
from .bindings import binding
from .cache import Cache
from .code_cache import load_native
from .flat import FlatGraph
from .probe import Probe
from .segments import cut_out
from .tuned_segments import random_like

aten = torch.ops.aten
WeightOf = Callable[[Node], torch.Tensor | None]
Packs = WeakValueDictionary[tuple[Any, ...], Pack]  # of one model's weights, by their ids and layouts


class Packing:
    """Packs weights for `probe`'s winners; `skips` says which calls are better off otherwise. What is in `packs` is not packed again, and
    compiled kernels may come from `cache`."""

    def __init__(self, symbols: SymbolTable, probe: Probe, skips: Callable[[Node], bool], packs: Packs, cache: Cache | None = None):
        self.symbols, self.probe, self.skips, self._packs, self._cache = symbols, probe, skips, packs, cache

    def packed(self, graph: fx.Graph, weight_of: WeightOf, channels_last: bool = False) -> tuple[fx.Graph, dict[Node, Node]]:
        """`graph` anew, and from which of its nodes each call came (the first, of several). `weight_of` gives the values of what is a
        weight there; with `channels_last` convolutions may have their channels innermost."""
        groups = self._groups(graph, weight_of, channels_last)
        experts = {node: call for node in graph.nodes if (call := self._experts(node, weight_of)) is not None}
        by_result = {group.result: group for group in groups}
        inside = {node for group in groups for node in group.nodes[:-1]}
        result = _Copy(self.symbols)
        for node in graph.nodes:
            if node in by_result:
                result.add(by_result[node])
            elif node in experts:
                result.put(node, experts[node])
            elif node not in inside:
                result.keep(node)
        result.drop_unused()
        return result.graph, result.source

    def _experts(self, node: Node, weight_of: WeightOf) -> PackedExperts | None:
        """What runs a mixture of experts on packed weights, where that wins."""
        call = packed_experts(node)
        if call is None or self.skips(node):
            return None
        weights = [weight_of(operand) for operand in node.args[3:5] if isinstance(operand, Node)]
        if any(weight is None for weight in weights):
            return None
        shapes = [hinted(operand.meta["val"]) for operand in node.all_input_nodes]
        dtypes = [operand.meta["val"].dtype for operand in node.all_input_nodes]
        names = ["aten", *call.others(), "onednn"]
        question = f"{names} {node.target} {call} {call.options} {dtypes} {shapes}"
        verdict = self.probe.known(call.kind, question)
        if verdict in ("aten", "dense"):
            return call.others().get(verdict)
        keys = [(id(weight), *call.layout()) for weight in weights]
        call.both = tuple(self._packs.get(key) or Pack(weight, call.lay_out) for key, weight in zip(keys, weights, strict=True))
        ways = {**call.others(), "onednn": call}
        winner = ways.get(verdict or self._faster_experts(node, call, ways, weights, question))
        if winner is not None and winner.packs:
            self._packs.update(zip(keys, winner.packs, strict=True))
        return winner

    def _faster_experts(self, node: Node, call: PackedExperts, ways: Mapping[str, PackedExperts], weights: list[Any], question: str) -> str:
        x, _, weight = (operand.meta["val"] for operand in node.args[:3])
        values = (random_like(x), call.example_index(x), random_like(weight), *weights)
        plain = binding(node.target)
        calls: dict[str, Callable[[], object]] = {"aten": lambda: plain(*values, **node.kwargs)}
        calls |= {name: functools.partial(way, *values) for name, way in ways.items()}
        with torch.no_grad(), torch._C._DisableAutocast():
            return self.probe.fastest(call.kind, question, calls)

    def _groups(self, graph: fx.Graph, weight_of: WeightOf, channels_last: bool) -> list[Group]:
        calls = [node for node in graph.nodes if node.op == "call_function"]
        found = find_groups(calls, lambda value: isinstance(value, Node) and weight_of(value) is not None, sums=channels_last)
        chosen = (self._chosen(group, weight_of, channels_last) for group in found if not self.skips(group.nodes[0]))
        return [group for group in chosen if group is not None]

    def _chosen(self, group: Group, weight_of: WeightOf, channels_last: bool) -> Group | None:
        """`group` with the way that wins and its packed weight; without what is added where that does not win; None for ATen."""
        weight = weight_of(group.weight)
        assert weight is not None
        ways = self._products(group) if not isinstance(group.call, PackedConvolution) else _layouts(group, group.call, channels_last)
        winner = self._winner(group, ways, weight) if ways else None
        if winner is not None:
            self._packs[(id(weight), *winner.call.layout())] = winner.call.pack
            return winner
        is_sum = isinstance(group.call, PackedConvolution) and group.other is not None
        return self._chosen(group.without_other(), weight_of, channels_last) if is_sum else None

    def _products(self, group: Group) -> dict[str, Group]:
        """The ways of a product: by oneDNN and by the kernel of ours, where these are there."""
        assert isinstance(group.call, PackedLinear)
        dtype = group.x.meta["val"].dtype
        ways = {"onednn": group} if cpu_packed.takes(dtype) else {}
        if has_cpp_compiler() and load_native(panels, self._cache) is not None:
            call = on_panels(group.call, dtype)
            ways |= {} if call is None else {"panels": replace(group, call=call)}
        return ways

    def _winner(self, group: Group, ways: Mapping[str, Group], weight: torch.Tensor) -> Group | None:
        if weight.numel() == 0:  # there is no layout for nothing
            return None
        call = group.call
        types = [(operand.meta["val"].dtype, *hinted(operand.meta["val"])) for operand in group.reads]
        question = f"{list(ways)} {[str(n.target) for n in group.nodes]} {call} {types} {call.layout()}"
        verdict = self.probe.known(call.kind, question)
        if verdict == "aten":
            return None
        for name, way in ways.items():
            if verdict in (None, name):
                way.call.pack = self._packs.get((id(weight), *way.call.layout())) or Pack(weight, way.call.lay_out)
        winner = ways.get(verdict or self._asked(group, ways, weight, question))
        for way in ways.values():
            if way is not winner and "pack" in vars(way.call):
                del way.call.pack  # as large as the weight, and `group` stays until all others were asked about
        return winner

    def _asked(self, group: Group, ways: Mapping[str, Group], weight: torch.Tensor, question: str) -> str:
        inputs = list(dict.fromkeys(group.reads))
        values: list[Any] = [weight if operand is group.weight else random_like(operand.meta["val"]) for operand in inputs]
        flat = FlatGraph(cut_out(group.nodes, inputs, [group.result]))
        calls: dict[str, Callable[[], object]] = {"aten": lambda: flat(list(values))}
        for name, way in ways.items():
            calls[name] = _call_of(way, dict(zip(inputs, values, strict=True)))
        with torch.no_grad(), torch._C._DisableAutocast():
            return self.probe.fastest(group.call.kind, question, calls)


def _layouts(group: Group, call: PackedConvolution, channels_last: bool) -> dict[str, Group]:
    """The ways of a convolution by oneDNN: the channels of its result where the program has them, or innermost."""
    if not cpu_packed.is_available():
        return {}
    if is_channels_innermost(group.result.meta["val"]):
        return {"onednn": group}
    ways = {} if group.other is not None else {"onednn": group}
    if channels_last and len(call.image) == 4 and all(isinstance(n, int) for n in group.result.meta["val"].shape):
        ways["channels last"] = replace(group, call=call.with_channels_last())
    return ways


def _call_of(way: Group, values: Mapping[Node, torch.Tensor]) -> Callable[[], object]:
    call = way.call
    operands = [None if operand is None else values[operand] for operand in way.operands]
    if isinstance(call, PackedConvolution) and call.channels_last:
        moved = (operands[0], *operands[3:])
        first, *rest = [value.contiguous(memory_format=torch.channels_last) for value in moved if value is not None]
        operands = [first, *operands[1:3], *rest]
    return lambda: call(*operands)


class _Copy:
    """A graph that is being made from another."""

    def __init__(self, symbols: SymbolTable):
        self.graph = fx.Graph()
        self.source: dict[Node, Node] = {}
        self._symbols = symbols
        self._copies: dict[Node, Node] = {}
        self._last: dict[Node, Node] = {}  # a value of the graph as it was with its channels innermost
        self._made: list[Node] = []

    def keep(self, node: Node) -> None:
        self._copies[node] = self.graph.node_copy(node, self._copies.__getitem__)
        self.source[self._copies[node]] = node

    def add(self, group: Group) -> None:
        """The call of `group` in the place of its last node."""
        value = group.result.meta["val"]
        moves = isinstance(group.call, PackedConvolution) and group.call.channels_last and not is_channels_innermost(value)
        operands: list[Any] = [None if operand is None else self._copies[operand] for operand in group.operands]
        if moves:
            operands = [self._channels_last(operands[0]), *operands[1:3], *map(self._channels_last, operands[3:])]
        call = self.graph.create_node("call_function", group.call, tuple(operands), name=group.call.kind)
        call.meta = dict(group.result.meta)
        self.source[call] = group.nodes[0]
        self._copies[group.result] = call
        if moves:
            call.meta["val"] = self._type(value)
            self._copies[group.result] = plain = self._clone(call, torch.contiguous_format, group.result.meta, value)
            self._last[plain] = call

    def put(self, node: Node, call: PackedCall) -> None:
        """`call` in the place of `node`, on its operands."""
        made = self.graph.create_node("call_function", call, tuple(self._copies[operand] for operand in node.args), name=call.kind)
        made.meta = dict(node.meta)
        self.source[made], self._copies[node] = node, made

    def _channels_last(self, node: Node) -> Node:
        if node not in self._last:
            self._last[node] = self._clone(node, torch.channels_last, node.meta, self._type(node.meta["val"]))
        return self._last[node]

    def _clone(self, node: Node, memory_format: torch.memory_format, meta: Mapping[str, Any], value: torch.Tensor) -> Node:
        made = self.graph.call_function(aten.clone.default, (node,), {"memory_format": memory_format})
        with self._symbols.inference():
            made.meta = {**meta, "val": torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=value.device)}
        self._made.append(made)
        self.source[made] = self.source[node]
        return made

    def _type(self, value: torch.Tensor) -> torch.Tensor:
        """The type of `value` with its channels innermost."""
        _, channels, height, width = value.shape
        stride = (height * width * channels, 1, width * channels, channels)
        return fake_like(self._symbols, value.dtype, value.shape, stride, value.device)

    def drop_unused(self) -> None:
        for node in reversed(self._made):
            if not node.users:
                self.graph.erase_node(node)
