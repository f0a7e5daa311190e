"""Layers that read a concatenation along K become one layer for each part, so that each part has factors and a branch of its own.

    linear(cat([x1, x2], -1), W, b) -> add(linear(x1, W[:, :k1], b), linear(x2, W[:, k1:]))

Exact but for the order of sums. FLUX's single blocks read attention and MLP so.
"""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ...ir import Node, Rewriter, Weight
from ...ir.float64 import exact_value
from .layers import Layer, aten, computed, find_layers, part_name


@dataclass(frozen=True)
class Halves:
    """A layer that was split: the sum that stands for it, its parts, its own weight and bias, and the calls that were there."""

    name: str
    joined: Node
    layer: Node
    dim: int
    total: Node
    parts: tuple[Node, ...]
    weight: Weight
    bias: Node | None


def split_concatenations(rewriter: Rewriter, takes: Callable[[Layer, list[int]], bool]) -> list[Halves]:
    """Rewrites every `linear` of a concatenation for which `takes(layer, sizes of the parts)`."""
    layers, _ = find_layers(rewriter)
    found = [(layer, _parts(layer)) for layer in layers]
    return [
        _split(rewriter, layer, parts) for layer, parts in found if parts and takes(layer, [part.meta["val"].shape[-1] for part in parts])
    ]


def rejoin(rewriter: Rewriter, halves: Sequence[Halves], planned: Collection[str]) -> None:
    """Makes a layer one again of which no part is among the `planned`."""
    for each in halves:
        if any(part_name(each.name, i) in planned for i in range(len(each.parts))):
            continue
        with rewriter.step("rejoin"):
            joined = rewriter.insert(aten.cat.default, (list(each.parts), each.dim), before=each.total, origin=each.joined)
            arguments = (joined, rewriter.weight(each.weight), each.bias)
            rewriter.replace(each.total, rewriter.insert(aten.linear.default, arguments, before=each.total, origin=each.layer))


def _parts(layer: Layer) -> list[Node]:
    """What the layer's input is a concatenation of, along its last dim; empty where it is none, or something else reads it."""
    x = layer.x
    if x.target is not aten.cat.default or layer.transposed or len(x.users) != 1:
        return []
    dim = x.args[1] if len(x.args) > 1 else 0
    parts = x.args[0]
    rank = x.meta["val"].dim()
    if not isinstance(dim, int) or dim % rank != rank - 1 or not isinstance(parts, list | tuple) or len(parts) < 2:
        return []
    nodes = [part for part in parts if isinstance(part, Node)]
    same = all(part.meta["val"].dim() == rank and part.meta["val"].dtype == x.meta["val"].dtype for part in nodes)
    static = all(isinstance(part.meta["val"].shape[-1], int) for part in nodes)
    return nodes if same and static and len(nodes) == len(parts) else []


def _split(rewriter: Rewriter, layer: Layer, parts: list[Node]) -> Halves:
    source, joined = rewriter.program.weights[str(layer.weight.target)], layer.x
    dim: Any = joined.args[1]
    with rewriter.step("split-concatenation"):
        total: Node | None = None
        start = 0
        for i, part in enumerate(parts):
            columns = slice(start, start + int(part.meta["val"].shape[-1]))
            start = columns.stop

            def exact(columns: slice = columns) -> torch.Tensor:
                return exact_value(source)[:, columns]

            weight = computed(rewriter, f"{part_name(layer.name, i)}.weight", exact().to(source.dtype), exact)
            bias = layer.bias if i == 0 else None
            product = rewriter.insert(aten.linear.default, (part, weight, bias), before=layer.node, origin=layer.node)
            total = product if total is None else rewriter.insert(aten.add.Tensor, (total, product), before=layer.node, origin=layer.node)
        assert total is not None
        rewriter.replace(layer.node, total)
    return Halves(layer.name, joined, layer.node, dim, total, tuple(parts), source, layer.bias)
