"""The pass `split-low-rank`: a weight becomes a branch of its largest directions and a residual. Exact.

    linear(x, W, b) -> gw.lowrank_linear(x, W - U D, D, U, b, weight_format="none"),   U D the best of rank r

Source: SVDQuant (arXiv 2411.05007), section 4.2; that U D is the best is Eckart and Young's theorem.
"""

from dataclasses import dataclass

import torch

from ...ir import Program, Rewriter
from ..base import LeftAlone, Outcome, Pass
from ..contract import Contract
from ..options import at_least, between, is_texts, one_of, option
from .factorize import best_factors
from .layers import computed, find_layers, matches
from .recipe import stored_dtype
from .rewrite import product_of, split
from .sites import Site, find_sites


@dataclass(frozen=True)
class SplitLowRank(Pass):
    """Each linear layer becomes a branch of its largest directions beside a float residual.

    rank: of the branch. svd: exact, randomized, or auto by size. share_down: queries, keys and values of a block share a
    down-projection. min_numel, skip: smaller weights, and layers of these names, stay."""

    name = "split-low-rank"
    rules = ("split-low-rank",)
    contract = Contract.EXACT
    before = frozenset({"slice-groups"})  # layers inside a region are not seen
    after = frozenset({"smooth"})

    rank: int = option(32, "an integer of at least 0", at_least(0))
    svd: str = option("auto", "auto, exact or randomized", one_of(("auto", "exact", "randomized")))
    share_down: bool = option(True, "true or false", one_of((True, False)))
    min_numel: int = option(65536, "an integer of at least 0", at_least(0))
    skip: tuple[str, ...] = option((), "a list of patterns", is_texts)
    seed: int = option(0, "an integer from 0 to 2**63 - 1", between(0, 2**63 - 1))

    def run(self, rewriter: Rewriter) -> Outcome:
        layers, left = find_layers(rewriter)
        if self.rank == 0:
            return Outcome(tuple(left))
        taken = [layer for layer in layers if layer.numel >= self.min_numel and not matches(layer.name, self.skip)]
        for site in find_sites(taken):
            for members in site.branches(self.share_down):
                reason = self._reason_against(site, members, rewriter.program)
                reason = reason or self._split(rewriter, site, members)
                if reason:
                    left += [LeftAlone.at(site.layers[i].node, f"{site.layers[i].name}: {reason}") for i in members]
        return Outcome(tuple(left))

    def _reason_against(self, site: Site, members: tuple[int, ...], program: Program) -> str:
        n, k, rank = sum(site.layers[i].out_features for i in members), site.in_features, self.rank
        if rank > min(n, k):
            return f"rank {rank} is more than the {min(n, k)} that a weight [{n}, {k}] has"
        if rank * (n + k) >= n * k / 4:
            return f"a branch of rank {rank} saves nothing at [{n}, {k}]: it has a quarter of the weight's numbers or more"
        weights = [program.weights[str(site.layers[i].weight.target)].tensor for i in members]
        if not all(weight is not None and bool(torch.isfinite(weight).all()) for weight in weights):
            return "its weight holds NaN or infinity"
        return ""

    def _factors(self, joined: torch.Tensor, smooth: torch.Tensor | None, store: torch.dtype) -> tuple[torch.Tensor, torch.Tensor] | None:
        """up and down as stored, None where `store` does not hold them."""
        up, down = best_factors(joined, self.rank, self.svd, self.seed)
        raw = down if smooth is None else down * smooth.to(down.dtype)
        stored = up.to(store), raw.to(store)
        return stored if all(bool(torch.isfinite(each).all()) for each in stored) else None

    def _split(self, rewriter: Rewriter, site: Site, members: tuple[int, ...]) -> str:
        """Rewrites the layers, or says why not."""
        layers = [site.layers[i] for i in members]
        products = [product_of(layer.node, rewriter.program) for layer in layers]
        joined = torch.cat([layer.matrix(rewriter.program) for layer in layers])
        store = stored_dtype(layers[0].dtype)
        vector = products[0].smooth if products[0] is not None else None
        factors = self._factors(joined, None if vector is None else rewriter.program.weights[str(vector.target)].tensor, store)
        if factors is None:
            return f"its branch holds numbers too large for {str(store).removeprefix('torch.')}"
        up, down = factors
        start = 0
        with rewriter.step("split-low-rank"):
            shared = computed(rewriter, f"{layers[0].name}.down", down)
            for layer, product in zip(layers, products, strict=True):
                assert product is not None
                split(rewriter, product, up[start : start + layer.out_features], shared)
                start += layer.out_features
        return ""
