"""Rotary positions as they are captured, undone: the value before it is turned, and the tables that turn it.

x * cos + cat(-x[.., dr/2:], x[.., :dr/2]) * sin               "half" pairs, the first dr of E channels
cat(the same of x[.., :dr], x[.., dr:])
"""

from dataclasses import dataclass
from typing import Any

import torch

from ...ir import Node
from ...ir.calls import GETITEM
from ...ir.pattern import NoMatch, named_arguments

aten = torch.ops.aten


@dataclass(frozen=True)
class Turned:
    """x [B, H, T, E] before it is turned by cos and sin, which multiply the first channels of it; None where nothing turns it."""

    x: Node
    cos: Node | None = None
    sin: Node | None = None


def unturned(node: Node) -> Turned | NoMatch:
    """What `node` turns; itself where it is no sum of products and no concatenation of channels."""
    if node.target is aten.cat.default:
        return _partly(node)
    if node.target is not aten.add.Tensor:
        return Turned(node)
    products = [each for each in node.args if isinstance(each, Node) and each.target is aten.mul.Tensor]
    for straight, crossed in (products, products[::-1]) if len(products) == 2 else ():
        for x, cos in (straight.args, straight.args[::-1]):
            for partner, sin in (crossed.args, crossed.args[::-1]):
                if isinstance(x, Node) and isinstance(partner, Node) and _is_partner(partner, x):
                    return Turned(x, cos, sin)
    return NoMatch("rotary positions of another form than x cos + rotate_half(x) sin stand before attention", node)


def _partly(node: Node) -> Turned | NoMatch:
    parts = named_arguments(node)["tensors"]
    if len(parts) == 2 and named_arguments(node)["dim"] in (-1, 3):
        turned, rest = unturned(parts[0]), _channels(parts[1])
        if isinstance(turned, Turned) and turned.cos is not None and rest is not None:
            first, width = _channels(turned.x), node.meta["val"].size(-1)
            if first is not None and first[0] is rest[0] and first[1] == 0 and first[2] == rest[1] and rest[2] == width:
                return Turned(first[0], turned.cos, turned.sin)
    return NoMatch("rotary positions of another form than of the first channels stand before attention", node)


def _is_partner(node: Node, x: Node) -> bool:
    """Whether `node` is cat(-x[.., dr/2:], x[.., :dr/2])."""
    if node.target is not aten.cat.default or named_arguments(node)["dim"] not in (-1, 3) or len(node.args[0]) != 2:
        return False
    parts: Any = node.args[0]
    negated, first = parts
    if negated.target is not aten.neg.default:
        return False
    width = x.meta["val"].size(-1)
    return _channels(negated.args[0]) == (x, width // 2, width) and _channels(first) == (x, 0, width // 2)


def _channels(node: Any) -> tuple[Node, int, int] | None:
    """(x, start, end) of x[.., start:end], its last dim."""
    if node.target is aten.slice.Tensor:
        a = named_arguments(node)
        source, last = a["self"], a["self"].meta["val"].dim() - 1
        if a["dim"] % (last + 1) != last or a["step"] != 1:
            return None
        return source, a["start"] or 0, min(source.meta["val"].size(-1), a["end"] if a["end"] is not None else 2**62)
    if node.target is not GETITEM or node.args[0].target is not aten.split.Tensor:
        return None
    split, index = node.args
    a = named_arguments(split)
    source, last = a["self"], a["self"].meta["val"].dim() - 1
    if a["dim"] % (last + 1) != last or not isinstance(a["split_size"], int):
        return None
    start = index * a["split_size"]
    return source, start, min(source.meta["val"].size(-1), start + a["split_size"])
