"""Which outputs of a region may take over the storage of one of its operands.

A slice of the output is then written where the same slice of the operand was read. That holds when both have one shape, dtype
and strides and are sliced along one dim, and when nobody else will read the operand: it is an intermediate, its storage dies
at this region, and it is no second operand of it.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import fx

from .infer import operands_of, same_strides, same_tensor_type, storage_key
from .program import Node, region_of


def plan_donations(graph: fx.Graph) -> dict[Node, dict[int, int]]:
    """Region call -> {output index: index of the operand whose storage it takes}."""
    regions = [node for node in graph.nodes if region_of(node) is not None]
    if not regions:
        return {}
    position = {node: index for index, node in enumerate(graph.nodes)}
    last_use, pinned = _storages(graph, position)
    plan: dict[Node, dict[int, int]] = {}
    for call in regions:
        candidates = _candidates(call, last_use, pinned, position[call])
        chosen = _match(call, candidates)
        if chosen:
            plan[call] = chosen
    return plan


def _storages(graph: fx.Graph, position: dict[Node, int]) -> tuple[dict[int, int], set[int]]:
    """Storage -> position of the last call that reads it; and the storages that others own or receive."""
    last_use: dict[int, int] = {}
    pinned: set[int] = set()
    for node in graph.nodes:
        for operand in operands_of((node.args, node.kwargs)):
            for key in _keys(operand):
                last_use[key] = position[node]
        if node.op in ("placeholder", "get_attr"):
            pinned.update(_keys(node))
    for leaf in operands_of(graph.output_node().args):
        pinned.update(_keys(leaf))
    return last_use, pinned


def _candidates(call: Node, last_use: dict[int, int], pinned: set[int], at: int) -> list[int]:
    """Operands that are sliced, alone on their storage, and dead afterwards."""
    body, in_dims, _, _, *operands = call.args
    keys = [key for operand in operands if isinstance(operand, fx.Node) for key in _keys(operand)]
    escaping = {key for leaf in body.outputs for key in _keys(leaf)}
    found = []
    for index, (operand, dim, inner) in enumerate(zip(operands, in_dims, body.placeholders, strict=True)):
        value = operand.meta["val"] if isinstance(operand, fx.Node) else None
        if dim < 0 or not isinstance(value, torch.Tensor):
            continue
        key = storage_key(value)
        # A body that returns a view of its operand would be overwritten while it is still being copied out.
        if key in pinned or keys.count(key) > 1 or last_use[key] != at or storage_key(inner.meta["val"]) in escaping:
            continue
        if _fills_storage(value):
            found.append(index)
    return found


def _fills_storage(value: torch.Tensor) -> bool:
    """Whether the tensor is all of its storage: a view of a larger one would keep that alive."""
    size = value.untyped_storage().nbytes()
    return isinstance(size, torch.SymInt) or size == value.numel() * value.element_size()


def _match(call: Node, candidates: Sequence[int]) -> dict[int, int]:
    _, in_dims, out_dims, _, *operands = call.args
    chosen: dict[int, int] = {}
    for j, (out, dim) in enumerate(zip(call.meta["val"], out_dims, strict=True)):
        for i in candidates:
            value = operands[i].meta["val"]
            if i not in chosen.values() and in_dims[i] == dim and same_tensor_type(out, value) and same_strides(out, value):
                chosen[j] = i
                break
    return chosen


def _keys(node: Node) -> Iterator[int]:
    value: Any = node.meta.get("val")
    for item in value if isinstance(value, tuple | list) else (value,):
        if isinstance(item, torch.Tensor):
            yield storage_key(item)
