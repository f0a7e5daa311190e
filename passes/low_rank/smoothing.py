"""Smoothing: x W.T = (x a) (W / a).T, the factors a folded into what makes x or multiplied in. Exact; bitwise for powers of two.

The stored factors are a = 1/lambda; a channel that is silent, or whose weights are all 0, keeps a = 1. Sources: SmoothQuant
(arXiv 2211.10438), equation 4; SVDQuant (arXiv 2411.05007), section 4.1.
"""

from dataclasses import replace

import torch

from ...ir import Node, Program, Rewriter
from ...ir.float64 import exact_value
from .folds import Fold, apply_edit, folded_factors_name, record_factors, relinked
from .layers import Layer, aten, computed, layer_of, smoothed_name
from .sites import Site


class Moved:
    """Where nodes that rewrites replaced are now."""

    def __init__(self) -> None:
        self._now: dict[Node, Node] = {}

    def now(self, node: Node) -> Node:
        while node in self._now:
            node = self._now[node]
        return node

    def put(self, old: Node, new: Node) -> None:
        self._now[self.now(old)] = new

    def layer(self, node: Node, program: Program) -> Layer:
        found = layer_of(self.now(node), program)
        assert isinstance(found, Layer), found
        return found


def factors(
    amax_x: torch.Tensor, amax_w: torch.Tensor, alpha: float, beta: float, dtype: torch.dtype, *, pow2: bool = False
) -> torch.Tensor:
    """a = 1/lambda in `dtype`, lambda = amax_x^alpha / amax_w^beta; 1 for a channel where one of the three is 0 or not finite."""
    x, w = amax_x.to(torch.float64), amax_w.to(torch.float64)
    strength = x.pow(alpha) / w.pow(beta)
    a = (1 / strength).to(dtype).to(torch.float64)
    if pow2:
        a = torch.exp2(a.log2().round())
    usable = (x > 0) & (w > 0) & torch.isfinite(x) & torch.isfinite(w) & (a > 0) & torch.isfinite(a)
    return torch.where(usable, a, torch.ones_like(a)).to(dtype)


def tied(amax: torch.Tensor, ties: torch.Tensor | None) -> torch.Tensor:
    """For each channel the largest of `amax` over the channels that share its factor."""
    if ties is None:
        return amax
    largest = torch.full((int(ties.max()) + 1,), -torch.inf, dtype=amax.dtype).scatter_reduce(0, ties, amax, "amax")
    return largest[ties]


def apply_smoothing(rewriter: Rewriter, moved: Moved, site: Site, a: torch.Tensor, fold: Fold | None) -> None:
    """Rewrites the layers of `site` to W / a, and what makes their input, or their operands, to x a."""
    wide = a.to(torch.float64)
    with rewriter.step("fold-smoothing" if fold is not None else "multiply-by-smoothing"):
        if fold is None:
            _multiply(rewriter, moved, site, a)
        else:
            for edit in fold.edits:
                moved.put(edit.node, apply_edit(rewriter, moved.now(edit.node), edit, wide))
        for member in site.layers:
            record_factors(rewriter, folded_factors_name(member.name), a)
            layer = moved.layer(member.node, rewriter.program)
            moved.put(member.node, rewriter.set_arguments(layer.node, relinked(layer, _divided(rewriter, layer, wide), layer.bias)))


def _multiply(rewriter: Rewriter, moved: Moved, site: Site, a: torch.Tensor) -> None:
    layers = [moved.layer(member.node, rewriter.program) for member in site.layers]
    vector = computed(rewriter, f"{site.name}.smooth", a.to(layers[0].dtype))
    products: dict[Node, Node] = {}
    for member, layer in zip(site.layers, layers, strict=True):
        if layer.x not in products:
            products[layer.x] = rewriter.insert(aten.mul.Tensor, (layer.x, vector), before=layer.node, origin=layer.node)
        reading = replace(layer, x=products[layer.x])
        moved.put(member.node, rewriter.set_arguments(layer.node, relinked(reading, layer.weight, layer.bias)))


def _divided(rewriter: Rewriter, layer: Layer, a: torch.Tensor) -> Node:
    """W / a, stored as W was."""
    source = rewriter.program.weights[str(layer.weight.target)]
    divisor = a.unsqueeze(1) if layer.transposed else a

    def exact() -> torch.Tensor:
        return exact_value(source) / divisor

    return computed(rewriter, smoothed_name(source.name), exact().to(source.dtype), exact)
