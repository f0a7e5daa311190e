"""The body of a planned region: each member's call on slices, at the region's nominal slice length."""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ...ir import Node, SymbolTable, sliced
from ...ir.infer import InferenceError, infer, same_tensor_type, storage_key, tensors_of
from ...ir.links import OperandSlot, Refusal, Tag, backward, localize
from ...ir.links.sizes import Size, same
from ...ir.region_rules import check_region
from ...ir.rewriter import RegionBuilder
from ...ir.symbols import ceil_div
from .candidate import Stop
from .plan import PlannedRegion
from .prepare import Prepared
from .scene import first_tag

SizeNode = Callable[[torch.SymInt], Any]
"""A symbolic size -> a node outside the region that computes it."""


@dataclass(frozen=True)
class Body:
    """What `Rewriter.outline` takes: the members that leave the function, the builder, and (member, inner, dim) of each output."""

    leaving: list[Node]
    builder: RegionBuilder
    outputs: list[tuple[Node, Node, int]]

    def whole(self, symbols: SymbolTable, count: Size) -> list[torch.Tensor]:
        """The types of the outputs of a region with this body.

        Raises:
            Unwritable: it does not type-check, or the slice of an operand is not proved to be what the body takes.
        """
        region = self.builder.finish([inner for _, inner, _ in self.outputs])
        args = [region, self.builder.in_dims, [dim for _, _, dim in self.outputs], count, *self.builder.operands]
        options = {"units": self.builder.units}
        try:
            check_region(symbols, args, options)
            return infer(symbols, sliced, args, options)
        except InferenceError as error:
            raise Unwritable(self.leaving[0], error) from error


class Unwritable(Exception):
    """`node` has no call that works for every slice."""

    def __init__(self, node: Node, error: InferenceError):
        super().__init__(f"{node.target} on a slice: {error}")
        self.node = node


def build_body(symbols: SymbolTable, region: PlannedRegion, home: dict[Node, Node], size_node: SizeNode) -> Body:
    """The body of `region`, whose members stand for the nodes `home[member]`.

    Raises:
        Unwritable: a call does not type-check at slice size.
    """
    # A GroupNorm that stays whole is two members of the plan and one node of the program; its tag is that of the second.
    tags: dict[Node, tuple[Tag | None, ...]] = {home[member]: region.tags[member] for member in region.members}
    members = sorted(tags)
    builder = RegionBuilder(symbols, region.units, region.nominal_length)
    body: dict[Node, Node] = {}
    coarse = False
    for node in members:
        try:
            body[node], unit = _body_call(builder, node, tags[node], region, body, size_node)
        except InferenceError as error:
            raise Unwritable(node, error) from error
        coarse = coarse or unit
    staying = _views_that_stay(members, tags)
    leaving = [node for node in members if node not in staying]
    outputs = [
        (node, body[node], tag.dim)
        for node in leaving
        if (tag := tags[node][0]) is not None and any(user not in tags for user in node.users)
    ]
    builder.units = size_node(region.units) if coarse else None
    return Body(leaving, builder, outputs)


def unwritable(prepared: Prepared, region: PlannedRegion) -> Stop | None:
    """Why `region` cannot be outlined: a call or an output is not of one type for every slice length, as far as can be proved."""
    rewriter, first = prepared.rewriter, min(region.members)

    def size_node(size: Any) -> Any:
        return prepared.sizes.node(rewriter, size, first)

    with rewriter.step("try-region"):
        try:
            body = build_body(rewriter.symbols, region, {member: member for member in region.members}, size_node)
            values = body.whole(rewriter.symbols, region.count if region.length is None else ceil_div(region.units, region.length))
        except Unwritable as error:
            return Stop(error.node, Refusal("sym-unproved", str(error), error.node))
    for (member, _, _), value in zip(body.outputs, values, strict=True):
        if not same_tensor_type(member.meta["val"], value):
            shapes = f"{list(value.shape)} = {list(member.meta['val'].shape)}"
            return Stop(member, Refusal("sym-unproved", f"{member.target}: {shapes} is not proved of its slices", member))
    return None


def parted(prepared: Prepared, region: PlannedRegion) -> Stop | None:
    """Why `region` cannot be outlined: the caller receives two of its values, or views of them, in one memory, and what a region gives lies
    in memories of its own."""
    leaves = [leaf for leaf in prepared.program.functions[prepared.rewriter.function.name].outputs if isinstance(leaf, Node)]
    received = Counter(key for leaf in set(leaves) for key in _storages(leaf))
    inside, seen = set(region.members), set[int]()
    for member in region.members:
        if all(user in inside for user in member.users):
            continue
        keys = {key for key in _storages(member) if received[key] > 1}
        if keys & seen:
            return Stop(member, Refusal("alias", f"the caller receives {member.target} and what it is a view of in one memory", member))
        seen |= keys
    return None


def _views_that_stay(members: Sequence[Node], inside: dict[Node, Any]) -> set[Node]:
    """Views of outside values that are used outside too, and the views that these are made from: they cost nothing there."""
    staying: set[Node] = set()
    homes = Counter(key for member in inside for key in _storages(member))
    for node in reversed(members):
        if _is_outside_view(node, inside, homes) and any(user not in inside or user in staying for user in node.users):
            staying.add(node)
    return staying


def _is_outside_view(node: Node, inside: dict[Node, Any], homes: Counter[int]) -> bool:
    """Whether `node` only views a value from outside: it stays outside too, where it costs nothing. `homes` counts the members whose
    values lie in each storage."""
    keys = _storages(node)
    if any(keys & _storages(operand) for operand in node.all_input_nodes if operand not in inside):
        return True
    sources = [operand for operand in node.all_input_nodes if operand in inside and keys & _storages(operand)]
    shared = all(homes[key] > 1 for key in keys)  # with another member
    return bool(sources) and shared and all(_is_outside_view(source, inside, homes) for source in sources)


def _storages(node: Node) -> set[int]:
    return {storage_key(tensor) for tensor in tensors_of(node.meta["val"])}


def _body_call(
    builder: RegionBuilder, node: Node, tags: Sequence[Tag | None], region: PlannedRegion, body: dict[Node, Node], size_node: SizeNode
) -> tuple[Node, bool]:
    """The call of `node` inside the body, and whether a unit there is more than one index."""
    output, tag = first_tag(tags)
    wanted = backward(node, tag, region.units, output)
    assert isinstance(wanted, dict), wanted
    local = localize(node, tag, region.units, output)
    by_slot = {(slot.position, slot.index): (slot, want) for slot, want in wanted.items()}
    by_node = {slot.node: want for slot, want in wanted.items()}
    moved = local.target is not node.target

    def place(value: Any, position: Any, index: int | None = None) -> Any:
        if isinstance(value, (list, tuple)):
            return [place(item, position, i) for i, item in enumerate(value)]
        if isinstance(value, torch.SymInt):
            value = size_node(value)
        if not isinstance(value, Node):
            return value
        if value in body:
            return body[value]
        slot_want: tuple[OperandSlot, Tag | None] | None = None if moved else by_slot.get((position, index))
        want = slot_want[1] if slot_want is not None else by_node.get(value)
        return builder.operand(value, want.dim if want is not None else -1)

    args = tuple(place(value, i) for i, value in enumerate(local.args))
    kwargs = {key: place(value, key) for key, value in local.kwargs.items()}
    coarse = any(t is not None and not t.is_partial and not same(t.unit, 1) for t in [*tags, *wanted.values()])
    return builder.call(local.target, args, kwargs, like=node), coarse
