"""Which outputs of a region may take over the storage of one of its operands.

A slice of the output is then written where the same slice of the operand was read. That holds when both have one shape, dtype
and strides and are sliced along one dim, and when nobody else will read the operand: it is an intermediate, its storage dies
at this region, and it is no second operand of it.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import fx

from .infer import operands_of, same_size, same_strides, same_tensor_type, storage_key, tensors_of
from .program import Node, region_of
from .region_call import RegionCall


def plan_donations(graph: fx.Graph) -> dict[Node, dict[int, int]]:
    """Region call -> {output index: index of the operand whose storage it takes}."""
    regions = [node for node in graph.nodes if region_of(node) is not None]
    if not regions:
        return {}
    uses = _Uses.of(graph)
    plan = {node: _match(RegionCall.of(node), _candidates(node, uses)) for node in regions}
    return {node: chosen for node, chosen in plan.items() if chosen}


@dataclass(frozen=True)
class _Uses:
    """Of the graph's storages: those that each value may share, the last reader of each, and those that others own or receive."""

    shared: dict[Node, set[int]]
    last_reader: dict[int, Node]
    pinned: set[int]

    @staticmethod
    def of(graph: fx.Graph) -> "_Uses":
        uses = _Uses({}, {}, set())
        for node in graph.nodes:
            uses.shared[node] = keys = {storage_key(tensor) for tensor in tensors_of(node.meta.get("val"))}
            if _may_alias_at_other_sizes(node):
                keys.update(*(uses.shared[operand] for operand in node.all_input_nodes))
            for operand in operands_of((node.args, node.kwargs)):
                uses.last_reader.update(dict.fromkeys(uses.shared[operand], node))
            if node.op in ("placeholder", "get_attr"):
                uses.pinned.update(keys)
        for leaf in operands_of(graph.output_node().args):
            uses.pinned.update(uses.shared[leaf])
        return uses


def _may_alias_at_other_sizes(node: Node) -> bool:
    """`contiguous` and its like copy or not as sizes have it; with dynamic sizes the metadata knows one case of the two."""
    if not isinstance(node.target, torch._ops.OpOverload) or all(r.alias_info is None for r in node.target._schema.returns):
        return False
    return any(isinstance(size, torch.SymInt) for tensor in tensors_of(node.meta["val"]) for size in tensor.shape)


def _candidates(node: Node, uses: _Uses) -> list[int]:
    """Operands that are sliced, alone on their storage, and dead afterwards."""
    call = RegionCall.of(node)
    escaping = {storage_key(tensor) for leaf in call.body.outputs for tensor in tensors_of(leaf.meta["val"])}
    found = []
    for index, (operand, dim, inner) in enumerate(zip(call.operands, call.in_dims, call.body.placeholders, strict=True)):
        if dim < 0:
            continue
        storages = uses.shared[operand]
        others = [other for n, other in enumerate(call.operands) if n != index and isinstance(other, fx.Node)]
        is_alone = not any(storages & uses.shared[other] for other in others)
        is_dead = not storages & uses.pinned and all(uses.last_reader[key] is node for key in storages)
        # A body that returns a view of its operand would be overwritten while it is still being copied out.
        is_kept_inside = storage_key(inner.meta["val"]) not in escaping
        if is_alone and is_dead and is_kept_inside and _fills_storage(operand.meta["val"]):
            found.append(index)
    return found


def _fills_storage(value: torch.Tensor) -> bool:
    """Whether the tensor is all of its storage: a view of a larger one would keep that alive."""
    return same_size(value.untyped_storage().nbytes(), value.numel() * value.element_size())


def _match(call: RegionCall, candidates: Sequence[int]) -> dict[int, int]:
    chosen: dict[int, int] = {}
    for j, (out, dim) in enumerate(zip(call.outputs, call.out_dims, strict=True)):
        for i in candidates:
            value = call.operands[i].meta["val"]
            if i not in chosen.values() and call.in_dims[i] == dim and same_tensor_type(out, value) and same_strides(out, value):
                chosen[j] = i
                break
    return chosen
