"""How far an integer input may count before a table that it looks up has no entry for it: learned places, sines and cosines kept ready."""

from typing import Any

import torch
from torch import fx

from .calls import name_of
from .pattern import named_arguments
from .program import Function, Node

aten = torch.ops.aten

_PASSED_ON = {
    "aten.view.default", "aten.reshape.default", "aten._unsafe_view.default", "aten.unsqueeze.default", "aten.squeeze.dim",
    "aten.expand.default", "aten.clone.default", "aten._to_copy.default", "aten.alias.default",
}  # fmt: skip


def lookup_limit(function: Function, source: Node) -> int | None:
    """The least n for which an element n of the input `source` lies behind a table's last entry; None where it indexes none. It may have
    gone there as it is, with a number added, or as the first of several that count on from it."""
    added = {source: 0}
    limits = []
    for node in function.calls:
        index, entries = _looked_up(node)
        if index in added and isinstance(entries, int):
            limits.append(entries - added[index])
        operand, number = _passed_on(node)
        if operand in added:
            added[node] = added[operand] + number
    return min(limits, default=None)


def _looked_up(node: Node) -> tuple[Any, Any]:
    """(indices, entries of the table) of a call that looks up; (None, None) of others."""
    if node.target is aten.embedding.default:
        a = named_arguments(node)
        return a["indices"], a["weight"].meta["val"].size(0)
    if node.target is aten.index.Tensor:
        table, indices = node.args[:2]
        dim = next((dim for dim, each in enumerate(indices) if each is not None), 0)  # type: ignore[arg-type]
        return indices[dim], table.meta["val"].size(dim)  # type: ignore[index, union-attr]
    return None, None


def _passed_on(node: Node) -> tuple[Any, int]:
    """(x, n) of a call that gives the integers x + n, perhaps at another shape, or x + 0, x + 1, ..; (None, 0) of others."""
    if name_of(node.target) in _PASSED_ON:  # type: ignore[arg-type]
        return node.args[0], 0
    if node.target in (aten.add.Tensor, aten.sub.Tensor):
        first, second = node.args[:2]
        sign = 1 if node.target is aten.add.Tensor else -1
        if not isinstance(first, fx.Node) or named_arguments(node)["alpha"] != 1:
            return None, 0
        if type(second) is int:
            return first, sign * second
        if isinstance(second, fx.Node) and second.target is aten.arange.default and sign == 1:
            return first, 0
    return None, 0
