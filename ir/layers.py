"""The repeated layers of a function, found on its graph: where all that is computed from one input is a single value, the graph is cut, and
alike pieces between cuts that follow one another are layers.

Names and module paths are not looked at. What does not depend on that input (rotary tables, masks, positions) is no part of a piece but an
operand of it. Source: specs/layer_skip.md, section 3 (Repeated-layer detection).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from .calls import GETITEM, name_of
from .infer import same_type, storage_key, tensors_of
from .pattern import named_arguments
from .program import Function, Node

MAX_PIECES = 12  # in one layer: OPT's, which flattens to [B*T, D] and back, have four

# Attributes in which layers may differ and still be alike: some attend to a window, whose cache may be a ring, others to all.
_FREE_ATTRIBUTES = {"window", "ring"}
_ADDS = (torch.ops.aten.add.Tensor,)


@dataclass(frozen=True)
class Layer:
    """One of the repeated layers: `source` is the value that it reads, `result` the one that it gives, `nodes` what lies between, in
    order and with `result` last. `kind` numbers classes of layers that read the same outside values."""

    index: int
    source: Node
    result: Node
    nodes: tuple[Node, ...]
    kind: int = 0

    def bypass(self) -> "list[Node] | None":
        """The additions through which `source` reaches `result` unchanged, first to last: result = source + branch + branch. None where
        it does not, and the layer cannot be left out by taking its source for its result."""
        path: list[Node] = []
        node = self.result
        while node is not self.source:
            following = _straight(node, self.source, self.nodes)
            if following is None:
                return None
            if node.target in _ADDS:
                path.append(node)
            node = following
        return path[::-1]


@dataclass(frozen=True)
class Layers:
    """What was found: the layers in order, and all cuts of the function, each a value through which everything passes."""

    layers: tuple[Layer, ...]
    cuts: tuple[Node, ...]


def find_layers(function: Function, source: Node) -> Layers:
    """The longest run of alike pieces between cuts of what is computed from the values of the input `source`; no layers where nothing
    repeats."""
    data = data_nodes(function, source)
    cuts = _cuts(function, data)
    pieces = [_Piece.between(data, start, end) for start, end in zip(cuts, cuts[1:], strict=False)]
    period, first, count = _longest_run([piece.signature for piece in pieces])
    layers = []
    for index in range(count):
        chosen = pieces[first + index * period : first + (index + 1) * period]
        nodes = tuple(node for piece in chosen for node in piece.nodes)
        layers.append(Layer(index, chosen[0].source, nodes[-1], nodes))
    return Layers(_with_kinds(layers), tuple(cuts))


def data_nodes(function: Function, source: Node) -> list[Node]:
    """What depends on the values of `source`, not on its sizes alone, in order."""
    found = {source}
    for node in function.calls:
        if isinstance(node.meta["val"], torch.Tensor | tuple) and any(operand in found for operand in node.all_input_nodes):
            found.add(node)
    return [node for node in function.graph.nodes if node in found and node is not source]


def _cuts(function: Function, data: Sequence[Node]) -> list[Node]:
    """The values that are alone: everything computed from the source before is done with. What only becomes a new state, such as keys
    and values that go to a cache, is done with when it is made."""
    members = set(data)
    kept = {id(leaf) for leaf in function.outputs[: len(function.signature().outputs)]}
    pending = {node: sum(user in members for user in node.users) + (id(node) in kept) for node in data}
    alive: set[Node] = set()
    cuts = []
    for node in data:
        for operand in node.all_input_nodes:
            if operand in pending:
                pending[operand] -= 1
                if not pending[operand]:
                    alive.discard(operand)
        if pending[node]:
            alive.add(node)
        if alive == {node} and isinstance(node.meta["val"], torch.Tensor):
            cuts.append(node)
    return cuts


@dataclass(frozen=True)
class _Piece:
    source: Node
    nodes: tuple[Node, ...]
    signature: tuple[Any, ...]

    @staticmethod
    def between(data: Sequence[Node], start: Node, end: Node) -> "_Piece":
        nodes = tuple(data[data.index(start) + 1 : data.index(end) + 1])
        return _Piece(start, nodes, _signature(start, nodes))


def _signature(start: Node, nodes: Sequence[Node]) -> tuple[Any, ...]:
    """Equal for pieces that compute the same on other weights: operations, attributes, operands by their place inside, or by their type."""
    places = {start: 0} | {node: index + 1 for index, node in enumerate(nodes)}

    def told(value: Any) -> Any:
        if isinstance(value, fx.Node):
            return ("inside", places[value]) if value in places else ("outside", _type_text(value.meta["val"]))
        if isinstance(value, list | tuple):
            return tuple(map(told, value))
        return repr(value)

    return tuple(
        (name_of(node.target), tuple((key, told(value)) for key, value in named_arguments(node).items() if key not in _FREE_ATTRIBUTES))  # type: ignore[arg-type]
        for node in nodes
    )


def _type_text(value: Any) -> str:
    """Type and sizes; symbolic ones are alike, since the cache of a window has fewer slots than one of all positions."""
    if isinstance(value, torch.Tensor):
        return f"{value.dtype}[{', '.join(str(size) if isinstance(size, int) else '?' for size in value.shape)}]"
    return str(value)


def _longest_run(signatures: Sequence[Any]) -> tuple[int, int, int]:
    """(period, first, count): the run of `count` >= 2 equal groups of `period` pieces that covers most pieces; of several the first, and of
    one the shortest period."""
    best = (1, 0, 0)
    for period in range(1, min(MAX_PIECES, len(signatures) // 2) + 1):
        first = 0
        while first + 2 * period <= len(signatures):
            count = 1
            group = signatures[first : first + period]
            while signatures[first + count * period : first + (count + 1) * period] == group:
                count += 1
            if count > 1 and count * period > best[2] * best[0]:
                best = (period, first, count)
            first += (count - 1) * period + 1 if count > 1 else 1
    return best


def _with_kinds(layers: Sequence[Layer]) -> tuple[Layer, ...]:
    """Numbers the layers by the outside values that they read; weights and caches, which each has of its own, do not count."""
    numbers: dict[Any, int] = {}
    result = []
    for layer in layers:
        inside = {layer.source, *layer.nodes}
        outside = {
            operand
            for node in layer.nodes
            for operand in node.all_input_nodes
            if operand not in inside and operand.op == "call_function" and isinstance(operand.meta["val"], torch.Tensor)
        }
        free = tuple(named_arguments(node)[key] for node in layer.nodes for key in sorted(_FREE_ATTRIBUTES & named_arguments(node).keys()))
        kind = numbers.setdefault((frozenset(outside), free), len(numbers))
        result.append(Layer(layer.index, layer.source, layer.result, layer.nodes, kind))
    return tuple(result)


def _straight(node: Node, source: Node, inside: Sequence[Node]) -> Node | None:
    """The operand that `node` passes on unchanged, or to which it adds a branch, on the way to `source`."""
    if node.op != "call_function" or node not in inside:
        return None
    if _is_view(node):
        return node.all_input_nodes[0]
    if node.target not in _ADDS or named_arguments(node)["alpha"] != 1:
        return None
    for operand in (named_arguments(node)["self"], named_arguments(node)["other"]):
        if isinstance(operand, fx.Node) and same_type(operand.meta["val"], node.meta["val"]) and _reaches(operand, source, inside):
            return operand
    return None


def _reaches(node: Node, source: Node, inside: Sequence[Node]) -> bool:
    if node is source:
        return True
    following = _straight(node, source, inside)
    return following is not None and _reaches(following, source, inside)


def _is_view(node: Node) -> bool:
    """Whether a call gives its first operand's elements, all and in order, at another shape."""
    if node.target is GETITEM or not isinstance(node.meta["val"], torch.Tensor) or not node.all_input_nodes:
        return False
    names = ("aten.view.default", "aten.reshape.default", "aten._unsafe_view.default", "aten.alias.default", "aten.unsqueeze.default")
    if name_of(node.target) in (*names, "aten.squeeze.dim", "aten.squeeze.default"):  # type: ignore[arg-type]
        return True
    known = {storage_key(tensor) for tensor in tensors_of(node.all_input_nodes[0].meta["val"])}
    value = node.meta["val"]
    return storage_key(value) in known and same_type(value, node.all_input_nodes[0].meta["val"])
