"""Whether a module is another model in its other mode (train or eval): captured in both, it makes the same calls or it does not.

Nothing else tells: attention may drop weights by a number in a configuration, and a forward may ask for `self.training` itself.
"""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import count
from typing import Any

import torch
from torch import fx, nn

from ..ir import Node, Program, capture
from ..ir.calls import draws, is_random
from ..ir.errors import GraphwrightError
from ..ir.pattern import named_arguments

NAMES = {True: "train", False: "eval"}
_COPIES = (torch.ops.aten.clone.default, torch.ops.aten.alias.default)
_OF_DRAWING = {"p", "train", "dropout", "dropout_p"}  # arguments of calls that may draw random numbers


def other_mode(model: nn.Module, program: Program, args: tuple[Any, ...], kwargs: dict[str, Any], dynamic_shapes: Any) -> str:
    """Why `model`, which `program` was captured of as it is, is another one in its other mode; "" where it is the same."""
    name = NAMES[not model.training]
    try:
        with _in_mode(model, not model.training):
            other = capture(model, args, kwargs, dynamic_shapes=dynamic_shapes)
    except GraphwrightError as error:
        return f"it cannot be captured in {name} mode ({str(error).splitlines()[0]})"
    calls, others = list(_calls(program)), list(_calls(other))
    if [text for text, _ in calls] == [text for text, _ in others]:
        return ""
    changed = _changed(calls, others)
    return f"{name} mode changes {f'submodule {changed}' if changed else 'what its own forward does'}"


def _changed(calls: Sequence[tuple[str, Node]], others: Sequence[tuple[str, Node]]) -> str:
    """The submodule of the first operation that one of them has oftener, or else of the first call that differs: what comes behind a call
    of one mode alone reads another value too."""
    counts = Counter(_operation(node) for _, node in calls)
    counts.subtract(_operation(node) for _, node in others)
    alone = (_operation(node) for _, node in (*others, *calls))
    differing = (_operation(node) for (one, node), (two, _) in zip(calls, others, strict=False) if one != two)
    return next((module for module, name in alone if counts[module, name]), "") or next((module for module, _ in differing), "")


def _operation(node: Node) -> tuple[str, str]:
    """(submodule, operator)"""
    return (node.meta["where"].module if "where" in node.meta else "", str(node.target))


@contextmanager
def _in_mode(model: nn.Module, mode: bool) -> Iterator[None]:
    """The flags alone: a `train` of its own may do anything."""
    modules = list(model.modules())
    before = [each.training for each in modules]
    try:
        for each in modules:
            each.training = mode
        yield
    finally:
        for each, flag in zip(modules, before, strict=True):
            each.training = flag


def _calls(program: Program) -> Iterator[tuple[str, Node]]:
    """Each call of `main`, and what it gives, as a text that is the same for the same call. Copies are left
    out, and so is what would drop numbers and does not: capture makes a copy of it."""
    names: dict[Node, str] = {}
    number = count()
    for node in program.main.graph.nodes:
        if node.op in ("placeholder", "get_attr"):
            names[node] = str(node.target)
        elif node.op == "output":
            yield str(fx.map_arg(node.args, names.__getitem__)), node
        elif _is_copy(node):
            names[node] = names[node.args[0]]  # type: ignore[index]
        else:
            names[node] = f"%{next(number)}"
            yield f"{node.target} {fx.map_arg(_told(node), names.__getitem__)}", node


def _is_copy(node: Node) -> bool:
    if not isinstance(node.args[0] if node.args else None, Node):
        return False
    return node.target in _COPIES or ("dropout" in str(node.target) and is_random(node.target) and not draws(node))


def _told(node: Node) -> Mapping[str, Any]:
    """The arguments of a call, less those that say how it draws where it does not."""
    if not isinstance(node.target, torch._ops.OpOverload):
        return {"args": node.args, **node.kwargs}
    silent = _OF_DRAWING if is_random(node.target) and not draws(node) else set()
    return {name: value for name, value in named_arguments(node).items() if name not in silent}
