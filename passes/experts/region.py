"""What computes a value from given others: a part of a graph, run on values of its own."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from ...ir import Node, Program
from ...ir.pattern import NoMatch
from ...ir.symbols import hint

aten = torch.ops.aten

# They read the type of their first operand alone.
_OF_A_TYPE = (
    aten.zeros_like.default, aten.ones_like.default, aten.empty_like.default, aten.full_like.default, aten.new_zeros.default,
    aten.new_empty.default, aten.new_full.default,
)  # fmt: skip


@dataclass(frozen=True)
class Region:
    """The calls and constants, in order, that compute the last of `nodes` from what was given. Of `types` the types alone are read."""

    nodes: tuple[Node, ...]
    types: tuple[Node, ...]

    def run(self, program: Program, given: Mapping[Node, Any], instead: Mapping[Any, Callable[..., Any]]) -> torch.Tensor:
        """Its value, symbols at their hints. Calls of what is in `instead` are made of that."""
        values = {node: _size_or_blank(node.meta["val"]) for node in self.types} | dict(given)

        def value(node: Node) -> Any:
            return values[node] if node in values else hint(node.meta["val"])

        for node in self.nodes:
            if node.op == "get_attr":
                values[node] = program.weights[str(node.target)].tensor
            else:
                args, kwargs = fx.map_arg((node.args, node.kwargs), value)
                target: Any = instead.get(node.target, node.target)
                values[node] = target(*args, **kwargs)
        return values[self.nodes[-1]]


def region_of(result: Node, given: Sequence[Node], inside: Node) -> Region | NoMatch:
    """What computes `result` from `given` and constants. All that is computed from `inside` must be read there alone."""
    found: set[Node] = set()
    types: set[Node] = set()
    pending = [result]
    while pending:
        node = pending.pop()
        if node in found or node in given or _is_size(node):
            continue
        if node.op == "placeholder":
            return NoMatch("its experts read more than tokens, the experts that these chose, and weights", node)
        found.add(node)
        sources = node.all_input_nodes
        if node.target in _OF_A_TYPE:
            types.add(node.args[0])  # type: ignore[arg-type]
            sources = [source for source in sources if source is not node.args[0]]
        pending += sources
    nodes = tuple(node for node in sorted(found))
    private = {inside}
    for node in nodes:
        if node in private or not private.isdisjoint(node.all_input_nodes):
            private.add(node)
            if node is not result and any(user not in found for user in node.users):
                return NoMatch("a value inside of it is read elsewhere", node)
    return Region(nodes, tuple(types - found))


def _is_size(node: Node) -> bool:
    return isinstance(node.meta["val"], int | float | bool | torch.SymInt | torch.SymFloat | torch.SymBool)


def _size_or_blank(value: Any) -> Any:
    if not isinstance(value, torch.Tensor):
        return hint(value)
    return torch.zeros([hint(n) for n in value.shape], dtype=value.dtype, device=value.device)
