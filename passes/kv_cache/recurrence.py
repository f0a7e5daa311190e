"""The chunked recurrences of a decoder, whose steps keep a slot for each chunk, the tokens near the last, and a running state."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch

from ...ir import Node, Symbol
from ...ir.ops.rat_parts import ring_of
from ...ir.pattern import named_arguments
from ...ir.symbols import UNBOUNDED, SymbolTable, hint

RAT = torch.ops.gw.rat_attention.default
_DEFAULTS = {argument.name: argument.default_value for argument in RAT._schema.arguments if argument.has_default_value()}
_OPERANDS = tuple(argument.name for argument in RAT._schema.arguments if not argument.kwarg_only)


@dataclass(frozen=True)
class Recurrence:
    """A call of gw.rat_attention: its operands q, k, v, gate, chunk_bias, cos, sin, of which some may be None, and its attributes."""

    root: Node
    operands: tuple[Node | None, ...]
    attributes: dict[str, Any]

    @property
    def stated(self) -> dict[str, Any]:
        """The attributes that are not the operation's defaults."""
        return {name: value for name, value in self.attributes.items() if name not in _DEFAULTS or value != _DEFAULTS[name]}

    @property
    def fixed_slots(self) -> int:
        """Those that a cache has of any capacity: for sinks and for what is near."""
        a = self.attributes
        return a["sinks"] + ring_of(a["chunk"], a["window"], a["local"])

    @property
    def q(self) -> Node:
        return self.operands[0]  # type: ignore[return-value]

    @property
    def k(self) -> Node:
        return self.operands[1]  # type: ignore[return-value]

    @property
    def v(self) -> Node:
        return self.operands[2]  # type: ignore[return-value]

    @property
    def reads(self) -> list[Node]:
        """What a step computes for it."""
        return [each for each in self.operands if each is not None]


def find_recurrences(nodes: Iterable[Node]) -> list[Recurrence]:
    """The recurrences among `nodes`."""
    found = []
    for node in nodes:
        if node.target is RAT:
            arguments = named_arguments(node)
            found.append(Recurrence(node, tuple(arguments.pop(name) for name in _OPERANDS), arguments))
    return found


def slots_of(symbols: SymbolTable, recurrence: Recurrence, capacity: Any) -> Any:
    """How many slots its cache has: a symbol for all recurrences of one form. `CacheType` has the formula by which the runtime makes it of
    the capacity; no formula stands in the program, since sizes of inputs are read off one by one."""
    fixed, chunk = recurrence.fixed_slots, recurrence.attributes["chunk"]
    name = f"slots_{fixed}_{chunk}"
    if name not in symbols:
        symbols.declare(Symbol(name, fixed, UNBOUNDED, fixed + -(-hint(capacity) // chunk)))
    return symbols.size(name)
