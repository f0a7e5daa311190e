"""Whether a program read from text is the one that was printed, in every respect that text has. Texts are not compared: two programs can
print alike where printing is mistaken."""

from collections.abc import Iterable
from typing import Any

import torch

from ..ir import Node, Program
from ..ir.program import Function
from ..ir.region import Region


def difference(a: Program, b: Program) -> str:
    """What differs first between two programs, in a sentence; "" where they agree: operations, operands, numbers to the last bit, types
    with the strides of dims longer than 1 where these are numbers, nesting, inputs, states and weights."""
    if list(a.functions) != list(b.functions):
        return f"functions are {list(b.functions)}, not {list(a.functions)}"
    if a.weights.keys() != b.weights.keys():
        return f"weights differ: {sorted(a.weights.keys() ^ b.weights.keys())}"
    return next(filter(None, (_between(a.functions[name], b.functions[name]) for name in a.functions)), "")


def _between(a: Function, b: Function) -> str:
    if (a.in_tree, a.out_tree) != (b.in_tree, b.out_tree):
        return f"{a.name} nests its inputs or outputs otherwise"
    return _between_nodes(a.graph.nodes, b.graph.nodes)


def _between_nodes(a: Iterable[Node], b: Iterable[Node]) -> str:
    own, other = ([node for node in nodes if node.op != "get_attr"] for nodes in (a, b))
    if len(own) != len(other):
        return f"{len(other)} nodes, not {len(own)}"
    places = {node: n for nodes in (own, other) for n, node in enumerate(nodes)}
    for x, y in zip(own, other):
        if _kind(x) != _kind(y):
            return f"{x.name} is {y.op} {y.target}, not {x.op} {x.target}"
        inner = _between_regions(x, y)
        if inner:
            return inner
        if _spelled((x.args, x.kwargs), places) != _spelled((y.args, y.kwargs), places):
            return f"{x.name} has the operands {y.args} {y.kwargs}, not {x.args} {x.kwargs}"
        if x.op != "output" and _spelled(x.meta["val"], places) != _spelled(y.meta["val"], places):
            return f"{x.name} is {y.meta['val']}, not {x.meta['val']}"
    return ""


def _kind(node: Node) -> Any:
    """What is called; the role of an input, whose name in a region says nothing; which states an output gives."""
    return node.op, node.target if node.op == "call_function" else None, node.meta.get("role", "input"), node.meta.get("new_states", ())


def _between_regions(x: Node, y: Node) -> str:
    if not (x.args and y.args and isinstance(x.args[0], Region) and isinstance(y.args[0], Region)):
        return ""
    return _between_nodes(x.args[0].graph.nodes, y.args[0].graph.nodes)


def _spelled(value: Any, places: dict[Node, int]) -> Any:
    """Equal for equal operands and types; numbers are told apart by type and bits."""
    if isinstance(value, Node):
        return ("weight", value.target) if value.op == "get_attr" else ("node", places[value])
    if isinstance(value, torch.Tensor):
        sizes, is_empty = [str(size) for size in value.shape], any(isinstance(size, int) and size == 0 for size in value.shape)
        # One stride of symbols has several spellings, such as 32 * Max(1, n) for n of at least 2; that of a size of 1 addresses nothing.
        told = [stride for size, stride in zip(value.shape, value.stride()) if not (isinstance(size, int) and size == 1)]
        strides = [] if is_empty else [stride if isinstance(stride, int) else None for stride in told]
        return str(value.dtype), str(value.device), sizes, strides
    if isinstance(value, dict):
        return [(name, _spelled(item, places)) for name, item in value.items()]
    if isinstance(value, tuple | list):
        return [_spelled(item, places) for item in value]
    if isinstance(value, Region):
        return "region"
    if isinstance(value, torch.SymInt | torch.SymBool | torch.SymFloat):
        return str(value)
    return type(value).__name__, repr(value)
