"""Patterns over programs, and the reason when one does not match.

    conv = Op(aten.conv2d.default, Any("x"), Const("weight"), ..., name="conv", only_use=True)
    norm = Op(aten.batch_norm.default, conv, ..., name="norm")
    match = norm.match(node)        # Match or NoMatch(reason, node)

Arguments are matched as the schema orders them, defaults filled in, so `f(x, bias=b)` and `f(x, b)` are one thing. `...` accepts
whatever stands there.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any as AnyType

from torch import fx

from .calls import name_of
from .program import Node


@dataclass(frozen=True)
class NoMatch:
    """Why and where a pattern failed. `depth` counts the operations that did match, so the best partial match can be shown."""

    reason: str
    node: Node | None
    depth: int = 0

    def __bool__(self) -> bool:
        return False


@dataclass(frozen=True)
class Match:
    """The named parts of a match; `nodes` are the calls it covers, root last."""

    root: Node
    parts: dict[str, AnyType]
    nodes: tuple[Node, ...]

    def __bool__(self) -> bool:
        return True

    def __getitem__(self, name: str) -> AnyType:
        return self.parts[name]


class Pattern:
    """Something an argument can match."""

    def match(self, value: AnyType) -> "Match | NoMatch":
        """Matches `value` as the root of the pattern."""
        state = _State()
        failure = self._match(value, state)
        if failure is not None:
            return NoMatch(failure.reason, failure.node, len(state.nodes))
        return Match(value, state.parts, tuple(state.nodes))

    def _match(self, value: AnyType, state: "_State") -> NoMatch | None:
        raise NotImplementedError


@dataclass
class _State:
    parts: dict[str, AnyType] = field(default_factory=dict)
    nodes: list[Node] = field(default_factory=list)

    def bind(self, name: str | None, value: AnyType, node: Node | None) -> NoMatch | None:
        if name is None:
            return None
        if name in self.parts and self.parts[name] is not value and self.parts[name] != value:
            return NoMatch(f"{name} stands for two different values", node)
        self.parts[name] = value
        return None


@dataclass(frozen=True)
class Any(Pattern):
    """Any value. `check(value)` returns a reason to refuse it, or None."""

    name: str | None = None
    check: Callable[[AnyType], str | None] | None = None

    def _match(self, value: AnyType, state: _State) -> NoMatch | None:
        node = value if isinstance(value, fx.Node) else None
        reason = self.check(value) if self.check else None
        return NoMatch(reason, node) if reason else state.bind(self.name, value, node)


@dataclass(frozen=True)
class Const(Pattern):
    """A weight of the program; `optional` accepts None too."""

    name: str | None = None
    optional: bool = False

    def _match(self, value: AnyType, state: _State) -> NoMatch | None:
        if value is None and self.optional:
            return state.bind(self.name, None, None)
        if not isinstance(value, fx.Node) or value.op != "get_attr":
            node = value if isinstance(value, fx.Node) else None
            return NoMatch(f"{self.name or 'operand'} is not a constant", node)
        return state.bind(self.name, value, value)


@dataclass(frozen=True)
class Is(Pattern):
    """A literal equal to `value`."""

    value: AnyType

    def _match(self, value: AnyType, state: _State) -> NoMatch | None:
        if type(value) is type(self.value) and value == self.value:
            return None
        return NoMatch(f"{value} is not {self.value}", value if isinstance(value, fx.Node) else None)


class Op(Pattern):
    """A call of one of `targets` whose leading arguments match `arguments`.

    `only_use`: no one but the pattern's parent may use the result. `check(node)` returns a reason to refuse, or None.
    """

    def __init__(
        self,
        targets: "AnyType | tuple[AnyType, ...]",
        *arguments: AnyType,
        name: str | None = None,
        only_use: bool = False,
        check: Callable[[Node], str | None] | None = None,
    ):
        self.targets = targets if isinstance(targets, tuple) else (targets,)
        self.arguments = arguments
        self.name = name
        self.only_use = only_use
        self.check = check

    def _match(self, value: AnyType, state: _State) -> NoMatch | None:
        if not isinstance(value, fx.Node) or value.op != "call_function" or value.target not in self.targets:
            wanted = " or ".join(name_of(target) for target in self.targets)
            return NoMatch(f"{_shown(value)} is not {wanted}", value if isinstance(value, fx.Node) else None)
        if self.only_use and len(value.users) != 1:
            return NoMatch(f"{_shown(value)} is used {len(value.users)} times, so it must stay", value)
        arguments = list(named_arguments(value).values())
        for pattern, argument in zip(self.arguments, arguments, strict=False):
            if pattern is ...:
                continue
            failure = (pattern if isinstance(pattern, Pattern) else Is(pattern))._match(argument, state)
            if failure is not None:
                return failure
        reason = self.check(value) if self.check else None
        if reason:
            return NoMatch(reason, value)
        state.nodes.append(value)
        return state.bind(self.name, value, value)


def named_arguments(node: Node) -> dict[str, AnyType]:
    """A call's arguments by name, in the schema's order, with defaults filled in."""
    schema = getattr(node.target, "_schema", None)
    if schema is None:
        return {str(i): value for i, value in enumerate(node.args)} | dict(node.kwargs)
    named = {}
    for position, argument in enumerate(schema.arguments):
        if position < len(node.args):
            named[argument.name] = node.args[position]
        elif argument.name in node.kwargs:
            named[argument.name] = node.kwargs[argument.name]
        else:
            named[argument.name] = argument.default_value
    return named


def _shown(value: AnyType) -> str:
    if not isinstance(value, fx.Node):
        return repr(value)
    return name_of(value.target) if value.op == "call_function" else str(value.target)
