"""Scratch of a mixture of experts: rows sorted by expert, what both products make of them, and where each came from."""

from typing import Any

from ..program import Node
from .operands import Workspace, nbytes, sizes, tensor

_INDEX = 8


def token_choice_moe(a: dict[str, Any], node: Node, threads: int) -> Workspace:
    """At the second product: rows [T k, D], the first's result [T k, 2I], the gated half of it, and the result [T k, D]."""
    tokens, k = sizes(a["index"])
    depth, inner = sizes(a["down"])[1:]
    size = tensor(a["x"]).element_size()
    gathered = (depth + 3 * inner + depth) * size + _INDEX
    return Workspace(max(tokens * k * gathered - nbytes(node), 0))  # the result itself comes when most of that is gone


def grouped_mm(a: dict[str, Any], node: Node, threads: int) -> Workspace:
    """Nothing: each product is written where it belongs."""
    return Workspace()
