"""Scratch of a mixture of experts: rows sorted by expert, what both products make of them, and where each came from."""

import math
from typing import Any

from ..program import Node
from .operands import Workspace, nbytes, sizes, tensor

_INDEX = 8
BYTES_AT_ONCE = 2**22  # of the first products of experts that choose: as many experts run at once, and what they make stays in caches


def token_choice_moe(a: dict[str, Any], node: Node, threads: int) -> Workspace:
    """At the second product: rows [T k, D], the first's result [T k, 2I], the gated half of it, and the result [T k, D]."""
    tokens, k = sizes(a["index"])
    depth, inner = sizes(a["down"])[1:]
    size = tensor(a["x"]).element_size()
    gathered = (depth + 3 * inner + depth) * size + _INDEX
    return Workspace(max(tokens * k * gathered - nbytes(node), 0))  # the result itself comes when most of that is gone


def expert_choice(a: dict[str, Any], node: Node, threads: int) -> Workspace:
    """The keys, their bits, these in the keys' order, and the same as longer integers, which have room for the places."""
    return Workspace(max(math.prod(sizes(a["logits"])) * (4 + 4 + 4 + 8) - nbytes(node), 0))


def expert_mlp(a: dict[str, Any], node: Node, threads: int) -> Workspace:
    """Of the experts that run at once, rows, the first product, and its gated half with the second product, or that in two dtypes; where
    each row stands and weighs; and the sums, which are the result where that is float32 or wider."""
    experts, depth, inner = sizes(a["down"])
    batch, _, capacity = sizes(a["index"])
    size = tensor(a["x"]).element_size()
    rows = min(experts_at_once(batch * capacity, 2 * inner, size), experts) * batch * capacity
    placed = experts * batch * capacity * (_INDEX + 4 + 1)
    if size >= 4:
        return Workspace(rows * (2 * depth + 3 * inner) * size + placed)
    sums = nbytes(node) // size * 4
    return Workspace(max(rows * ((2 * depth + 2 * inner) * size + max(inner * size, 4 * depth)) + placed + sums - nbytes(node), 0))


def experts_at_once(rows: int, width: int, size: int) -> int:
    """How many experts of `rows` tokens each, whose first product is `width` elements of `size` bytes wide, run at once."""
    return max(1, BYTES_AT_ONCE // max(1, rows * width * size))


def grouped_mm(a: dict[str, Any], node: Node, threads: int) -> Workspace:
    """Nothing: each product is written where it belongs."""
    return Workspace()
