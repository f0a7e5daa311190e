"""Carries a plan out on the program: the splits it needs, then one `gw.sliced` call for each region."""

from collections.abc import Sequence
from typing import Any

import torch

from ...ir import Node, Rewriter
from ...ir.links import OperandSlot, Tag, backward, localize
from ...ir.rewriter import RegionBuilder
from .plan import Plan, PlannedRegion
from .prepare import Prepared, attention_rows, split_norm


def emit(rewriter: Rewriter, prepared: Prepared, plan: Plan) -> None:
    """Rewrites the program as planned, one step for each split and each region."""
    home = _split_where_needed(rewriter, prepared, plan)
    for region in plan.regions:
        with rewriter.step("outline-region"):
            _outline(rewriter, region, home)


def _split_where_needed(rewriter: Rewriter, prepared: Prepared, plan: Plan) -> dict[Node, Node]:
    """Each node of the copy -> the node of the program that it stands for."""
    region_of = {member: region for region in plan.regions for member in region.members}
    home = dict(prepared.original)
    for node, norm in prepared.norms.items():
        stats, apply = region_of.get(norm.stats), region_of.get(norm.apply)
        whole = stats is apply and (apply is None or _dim(apply, norm.apply) == 0)
        if whole:
            home[norm.stats] = home[norm.apply] = node
            continue
        with rewriter.step("split-group-norm"):
            split = split_norm(rewriter, node)
        home[norm.stats], home[norm.apply] = split.stats, split.apply
    for node, causal in prepared.attentions.items():
        region = region_of.get(causal.attention)
        queries = node.meta["val"].dim() - 2
        if region is None or _dim(region, causal.attention) != queries:
            home[causal.attention] = node
            continue
        with rewriter.step("attention-rows"):
            rows = attention_rows(rewriter, node)
        home[causal.rows], home[causal.attention] = rows.rows, rows.attention
    return home


def _dim(region: PlannedRegion, node: Node) -> int:
    tag = region.tags[node][0]
    assert tag is not None
    return tag.dim


def _outline(rewriter: Rewriter, region: PlannedRegion, home: dict[Node, Node]) -> None:
    # A GroupNorm that stays whole is two members of the plan and one node of the program; its tag is that of the second.
    tags: dict[Node, tuple[Tag | None, ...]] = {home[member]: region.tags[member] for member in region.members}
    members = sorted(tags)
    builder = RegionBuilder(rewriter.symbols, region.units, region.longest)
    body: dict[Node, Node] = {}
    coarse = False
    for node in members:
        body[node], unit = _body_call(builder, node, tags[node], region.units, body)
        coarse = coarse or unit
    staying = _views_that_stay(members, tags)
    leaving = [node for node in members if node not in staying]
    outputs = [
        (node, body[node], tag.dim)
        for node in leaving
        if (tag := tags[node][0]) is not None and any(user not in tags for user in node.users)
    ]
    builder.units = region.units if coarse else None
    rewriter.outline(leaving, builder, outputs, region.count)


def _views_that_stay(members: Sequence[Node], inside: dict[Node, Any]) -> set[Node]:
    """Views of outside values that are used outside too, and the views that these are made from: they cost nothing there."""
    staying: set[Node] = set()
    for node in reversed(members):
        if _is_outside_view(node, inside) and any(user not in inside or user in staying for user in node.users):
            staying.add(node)
    return staying


def _is_outside_view(node: Node, inside: dict[Node, Any]) -> bool:
    """Whether `node` only views a value from outside: it stays outside too, where it costs nothing."""
    from ...ir.infer import storage_key, tensors_of

    keys = {storage_key(t) for t in tensors_of(node.meta["val"])}
    made_inside = {storage_key(t) for member in inside if member is not node for t in tensors_of(member.meta["val"])}
    outside = {storage_key(t) for o in node.all_input_nodes if o not in inside for t in tensors_of(o.meta["val"])}
    if keys & outside:
        return True
    sources = [o for o in node.all_input_nodes if o in inside and keys & {storage_key(t) for t in tensors_of(o.meta["val"])}]
    return bool(sources) and keys <= made_inside and all(_is_outside_view(source, inside) for source in sources)


def _body_call(builder: RegionBuilder, node: Node, tags: Sequence[Tag | None], units: int, body: dict[Node, Node]) -> tuple[Node, bool]:
    """The call of `node` inside the body, and whether a unit there is more than one index."""
    tag = next(t for t in tags if t is not None)
    output = tags.index(tag)
    wanted = backward(node, tag, units, output)
    assert isinstance(wanted, dict), wanted
    local = localize(node, tag, units, output)
    by_slot = {(slot.position, slot.index): (slot, want) for slot, want in wanted.items()}
    by_node = {slot.node: want for slot, want in wanted.items()}
    moved = local.target is not node.target

    def place(value: Any, position: Any, index: int | None = None) -> Any:
        if isinstance(value, (list, tuple)):
            return [place(item, position, i) for i, item in enumerate(value)]
        if isinstance(value, torch.SymInt):
            raise AssertionError("a size that is not a node reached a region body")
        if not isinstance(value, Node):
            return value
        if value in body:
            return body[value]
        slot_want: tuple[OperandSlot, Tag | None] | None = None if moved else by_slot.get((position, index))
        want = slot_want[1] if slot_want is not None else by_node.get(value)
        return builder.operand(value, want.dim if want is not None else -1)

    args = tuple(place(value, i) for i, value in enumerate(local.args))
    kwargs = {key: place(value, key) for key, value in local.kwargs.items()}
    coarse = any(t is not None and t.unit > 1 for t in [*tags, *(want for _, want in wanted.items())])
    return builder.call(local.target, args, kwargs, like=node), coarse
