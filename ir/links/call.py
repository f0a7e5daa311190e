"""A node's call read through its op's schema: arguments by name, wherever they stand, and the shapes of its operands."""

import operator
from dataclasses import dataclass

import torch
from torch import fx

from .tag import OperandSlot

Key = str | tuple[str, int]
"""A tensor operand within a call: its parameter's name, or (name, i) for item i of a list."""


@dataclass(frozen=True, slots=True)
class Parameters:
    """An op's parameters: name -> (position, or None if keyword-only; default)."""

    by_name: dict[str, tuple[int | None, object]]
    names: tuple[str, ...]


_PARAMETERS: dict[object, Parameters] = {operator.getitem: Parameters({"self": (0, None), "index": (1, None)}, ("self", "index"))}


def parameters(target) -> Parameters:
    known = _PARAMETERS.get(target)
    if known is None:
        arguments = target._schema.arguments
        by_name = {
            a.name: (None if a.kwarg_only else i, a.default_value if a.has_default_value() else None) for i, a in enumerate(arguments)
        }
        known = _PARAMETERS[target] = Parameters(by_name, tuple(by_name))
    return known


class Call:
    """One node's call. Nothing is copied and nothing is kept beyond the question that made it."""

    __slots__ = ("node", "parameters", "_operands")

    def __init__(self, node: fx.Node):
        self.node = node
        self.parameters = parameters(node.target)
        self._operands = None

    @property
    def op(self) -> str:
        """`linear`, `sum.dim_IntList`: how a message names the call."""
        return self.node.target.__name__.removesuffix(".default")

    @property
    def overload(self) -> str:
        return self.node.target._overloadname

    def __getitem__(self, name: str):
        """The argument `name` as it stands in the call, or its default; None for a parameter the overload does not have."""
        position, default = self.parameters.by_name.get(name, (None, None))
        if position is not None and position < len(self.node.args):
            return self.node.args[position]
        return self.node.kwargs.get(name, default)

    def integers(self, name: str) -> list:
        """A list argument; a lone int counts as a list of one."""
        value = self[name]
        if value is None:
            return []
        return list(value) if isinstance(value, (list, tuple)) else [value]

    def operand(self, key: Key) -> fx.Node | None:
        value = self[key] if isinstance(key, str) else self[key[0]][key[1]]
        return value if isinstance(value, fx.Node) else None

    def shape(self, key: Key) -> torch.Size | None:
        """The operand's shape (of the item that `getitem` picks); None for an absent optional operand."""
        node = self.operand(key)
        if node is None:
            return None
        value = node.meta["val"]
        return value[self["index"]].shape if isinstance(value, (tuple, list)) else value.shape

    def out_shape(self, output: int = 0) -> torch.Size:
        value = self.node.meta["val"]
        return value[output].shape if isinstance(value, (tuple, list)) else value.shape

    def outputs(self) -> int | None:
        """How many outputs a multi-output op has; None for an op with one tensor."""
        value = self.node.meta["val"]
        return len(value) if isinstance(value, (tuple, list)) else None

    def dim(self, name: str, rank: int) -> int:
        """The dim argument `name`, counted from the front."""
        return self[name] % rank

    def dims(self, name: str, rank: int) -> list[int]:
        return [d % rank for d in self.integers(name)]

    @property
    def operands(self) -> dict[Key, OperandSlot]:
        """Every tensor operand occurrence, optional ones and list items included."""
        if self._operands is None:
            self._operands = dict(self._find_operands())
        return self._operands

    def _find_operands(self):
        args, kwargs = self.node.args, self.node.kwargs
        for position, (name, value) in enumerate(zip(self.parameters.names, args)):
            yield from _occurrences(name, position, value)
        for name, value in kwargs.items():
            yield from _occurrences(name, name, value)


def _occurrences(name, position, value):
    if isinstance(value, fx.Node):
        if _is_tensor(value):
            yield name, OperandSlot(position, None, value)
    elif isinstance(value, (list, tuple)):
        for i, item in enumerate(value):
            if isinstance(item, fx.Node) and _is_tensor(item):
                yield (name, i), OperandSlot(position, i, item)


def _is_tensor(node: fx.Node) -> bool:
    """A tensor, or the several tensors of a multi-output op; SymInts and their like are not operands that could be sliced."""
    value = node.meta.get("val")
    return isinstance(value, torch.Tensor) or (isinstance(value, (tuple, list)) and any(isinstance(v, torch.Tensor) for v in value))
