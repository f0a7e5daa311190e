"""Creating nodes: the one place where a node gets its metadata, used by capture, the parser and the Rewriter."""

from collections.abc import Callable
from typing import Any

from torch import fx

from .infer import fake_like, infer, sealed
from .program import Node, Weight, Where
from .region import Region, sliced
from .region_rules import check_region
from .symbols import SymbolTable


def add_placeholder(graph: fx.Graph, name: str, value: Any, role: str = "input") -> Node:
    """An input of type `value` (a FakeTensor or SymInt), or a constant that the program was captured for."""
    node = graph.placeholder(name)
    node.meta.update(val=value, role=role)
    return node


def add_weight(graph: fx.Graph, weight: Weight, symbols: SymbolTable) -> Node:
    """A use of `weight`; one node a weight and graph is enough, and callers share it."""
    node = graph.create_node("get_attr", weight.name)
    node.meta["val"] = fake_like(symbols, weight.dtype, weight.shape, weight.stride, weight.device)
    return node


def add_call(
    graph: fx.Graph,
    symbols: SymbolTable,
    target: Callable[..., Any],
    args: tuple[Any, ...] = (),
    kwargs: dict[str, Any] | None = None,
    *,
    origin: tuple[int, ...] = (),
    where: Where | None = None,
) -> Node:
    """A call with inferred metadata, at the graph's insertion point.

    Raises:
        InferenceError: the call does not type-check; the graph is unchanged.
    """
    args, kwargs = as_lists(args), {key: as_lists([value])[0] for key, value in (kwargs or {}).items()}
    if target is sliced:
        check_region(symbols, args, kwargs)
    value = infer(symbols, target, args, kwargs)
    node = graph.call_function(target, tuple(args), kwargs)
    node.meta.update(val=value, origin=origin, where=where or Where())
    if target is not sliced:
        node.meta["seal"] = (*sealed(target, node.args, node.kwargs), value)
    return node


def as_lists(value: Any) -> Any:
    """Sequences inside arguments are lists, so that equal calls are written alike; the outermost tuple stays."""

    def convert(item: Any) -> Any:
        return [convert(x) for x in item] if isinstance(item, tuple | list) and not isinstance(item, Region) else item

    return type(value)(convert(item) for item in value) if isinstance(value, tuple | list) else value


def set_outputs(graph: fx.Graph, leaves: list[Any], new_states: tuple[str, ...] = ()) -> Node:
    """The output node: user outputs, then the new value of each state."""
    node = graph.output(tuple(leaves))
    node.meta["new_states"] = new_states
    return node
