"""Carries a plan out on the program: the splits it needs, then one `gw.sliced` call for each region."""

from typing import Any

from ...ir import Node, Rewriter
from ...ir.size_nodes import SizeNodes
from ...ir.symbols import ceil_div
from ..base import LeftAlone
from .body import build_body
from .plan import Plan, PlannedRegion
from .prepare import Prepared, attention_rows, split_norm


def emit(rewriter: Rewriter, prepared: Prepared, plan: Plan) -> tuple[LeftAlone, ...]:
    """Rewrites the program as planned, one step for each split and each region; the norms and attentions that it need not split."""
    sizes = SizeNodes(rewriter.function.placeholders)
    home, declined = _split_where_needed(rewriter, prepared, plan, sizes)
    for region in plan.regions:
        with rewriter.step("outline-region"):
            _outline(rewriter, region, home, sizes)
    return declined


def _split_where_needed(
    rewriter: Rewriter, prepared: Prepared, plan: Plan, sizes: SizeNodes
) -> tuple[dict[Node, Node], tuple[LeftAlone, ...]]:
    """Each node of the copy -> the node of the program that it stands for; what stays whole, and why."""
    declined = []
    region_of = {member: region for region in plan.regions for member in region.members}
    home = dict(prepared.original)
    for node, norm in prepared.norms.items():
        stats, apply = region_of.get(norm.stats), region_of.get(norm.apply)
        whole = stats is apply and (apply is None or _dim(apply, norm.apply) == 0)
        if whole:
            home[norm.stats] = home[norm.apply] = node
            declined.append(LeftAlone.at(node, "no region cuts what it normalises over", "split-group-norm"))
            continue
        with rewriter.step("split-group-norm"):
            split = split_norm(rewriter, node)
        assert split is not None, "it could be split in the copy"
        home[norm.stats], home[norm.apply] = split.stats, split.apply
    for node, causal in prepared.attentions.items():
        region = region_of.get(causal.attention)
        queries = node.meta["val"].dim() - 2
        if region is None or _dim(region, causal.attention) != queries:
            home[causal.attention] = node
            declined.append(LeftAlone.at(node, "no region slices its queries", "attention-rows"))
            continue
        with rewriter.step("attention-rows"):
            rows = attention_rows(rewriter, sizes, node)
        home[causal.rows], home[causal.attention] = rows.rows, rows.attention
    return home, tuple(declined)


def _dim(region: PlannedRegion, node: Node) -> int:
    tag = region.tags[node][0]
    assert tag is not None
    return tag.dim


def _outline(rewriter: Rewriter, region: PlannedRegion, home: dict[Node, Node], sizes: SizeNodes) -> None:
    first = min(home[member] for member in region.members)

    def size_node(size: Any) -> Any:
        return sizes.node(rewriter, size, first)

    body = build_body(rewriter.symbols, region, home, size_node)
    count = region.count if region.length is None else size_node(ceil_div(region.units, region.length))
    rewriter.outline(body.leaving, body.builder, body.outputs, count)
