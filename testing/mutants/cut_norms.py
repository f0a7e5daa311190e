"""A pass that holds GroupNorm to its law: statistics of two parts, merged, are those of the whole. The planner seldom needs it."""

from dataclasses import dataclass

import torch

from ...ir import Node, Rewriter
from ...passes import Contract, Outcome, Pass
from ...passes.slicing.prepare import is_group_norm, split_norm

_aten, _gw = torch.ops.aten, torch.ops.gw


@dataclass(frozen=True)
class CutNorms(Pass):
    """group_norm(x) -> norm_apply(x, [norm_stats(x[..., :k]), norm_stats(x[..., k:])])   with k a third of the last dim, at least 1"""

    name = "cut-norms"
    contract = Contract.EXACT

    def run(self, rewriter: Rewriter) -> Outcome:
        for node in rewriter.nodes():
            size = node.meta["val"].shape[-1] if is_group_norm(node) else 0
            if not isinstance(size, int) or size < 2 or node.meta["val"].numel() == 0:
                continue
            with rewriter.step("cut-norm"):
                _cut(rewriter, node, max(size // 3, 1))
        return Outcome()


def _cut(rewriter: Rewriter, node: Node, at: int) -> None:
    split = split_norm(rewriter, node)
    if split is None:
        return
    x, groups = split.stats.args[:2]
    stats = []
    for begin, end in ((0, at), (at, node.meta["val"].size(-1))):
        part = rewriter.insert(_aten.slice.Tensor, (x, -1, begin, end), before=split.stats, origin=node)
        stats.append(rewriter.insert(_gw.norm_stats.default, (part, groups), before=split.stats, origin=node))
    both = rewriter.insert(_aten.cat.default, (stats, 0), before=split.stats, origin=node)
    merged = rewriter.insert(_gw.norm_apply.default, (x, both, *split.apply.args[2:]), before=split.apply, origin=node)
    rewriter.replace(split.apply, merged)
