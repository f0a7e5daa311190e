"""Which experts tokens chose and by what weights, where both are spread before products read them: one-hot, scattered, or sent to slots.

    combine = sum over k of one_hot(index) * weight;  y = einsum("te,etd->td", combine, results)
    dispatch = one_hot(index) * one_hot(place of a token among those of its expert);  rows = einsum("tec,td->ecd", dispatch, x)

How that is done is not matched: a block is what is computed from tokens, choices and weights alone, and the self-check runs it. Source of
the second: Lepikhin et al. 2020, "GShard" (arXiv 2006.16668), where an expert has room for few tokens, and drops others: those are refused.
"""

from collections.abc import Sequence
from typing import Any

import torch

from ...ir import Node
from ...ir.calls import GETITEM
from ...ir.infer import same_size
from ...ir.pattern import NoMatch
from .products import ExpertProduct, operation
from .region import Region, region_of

aten = torch.ops.aten

CHOICES = (aten.topk.default, aten.sort.default, aten.sort.stable)
_DISPATCHED = (
    aten.einsum.default, aten.mul.Tensor, aten.matmul.default, aten.bmm.default, aten.permute.default, aten.transpose.int,
    aten.expand.default, aten.unsqueeze.default, aten.view.default, aten.reshape.default, aten._to_copy.default,
)  # fmt: skip


def dispatched_tokens(rows: Node) -> Node | None:
    """Tokens [T, K] that were given or sent to all experts as `rows`."""
    node = rows
    while node.meta["val"].dim() != 2:
        if operation(node) not in _DISPATCHED:
            return None
        wide = [each for each in node.all_input_nodes if same_size(each.meta["val"].size(-1), rows.meta["val"].size(-1))]
        node = min(wide, key=lambda each: each.meta["val"].dim(), default=None)  # type: ignore[assignment,arg-type]
        if node is None:
            return None
    return node if node.op != "get_attr" else None


def chosen_behind(factor: Node, result: Node, given: Sequence[Node], inside: Node, index: Node | None) -> tuple[Node, Node] | NoMatch:
    """(index, weight) of the choice that `factor` was computed from, of which and of `given` all of `result` follows. Of several weights,
    which were scaled one after another, it is the last. `index` where it is known."""
    before = _before(factor)
    chosen = index or next((node for node in before if _is_chosen(node)), None)
    if chosen is None:
        return NoMatch("which experts its tokens chose is not seen: no index [tokens, k] of a topk leads to their weights", factor)
    shape = chosen.meta["val"].shape
    for weight in before:
        value = weight.meta["val"]
        if not value.dtype.is_floating_point or not _same(value.shape, shape):
            continue
        if isinstance(region_of(result, (chosen, weight, *given), inside=inside), Region):
            return chosen, weight
    return NoMatch("its result does not follow from tokens, the experts that these chose, and a weight for each of them alone", factor)


def dropped(down: ExpertProduct, tokens: Any) -> NoMatch | None:
    """Whether experts have room for fewer rows than there are tokens."""
    first, second, _ = down.result.meta["val"].shape
    experts = down.weight.meta["val"].size(0)
    room = first * second // experts
    if down.experts is not None or same_size(room, tokens) or (isinstance(room, int) and isinstance(tokens, int) and room >= tokens):
        return None
    return NoMatch(f"each of its experts has room for {room} of {tokens} tokens, and drops what is more", down.result)


def _before(node: Node) -> list[Node]:
    """Tensors that `node` was computed from, the last first; not what choices were made of."""
    found, pending = {node}, [node]
    while pending:
        for source in pending.pop().all_input_nodes:
            if source not in found and isinstance(source.meta["val"], torch.Tensor):
                found.add(source)
                pending += [source] if source.target is not GETITEM else []
    return sorted(found, reverse=True)


def _is_chosen(node: Node) -> bool:
    is_index = node.target is GETITEM and node.args[1] == 1 and node.meta["val"].dim() == 2
    return bool(is_index) and operation(node.args[0]) in CHOICES


def _same(a: Sequence[Any], b: Sequence[Any]) -> bool:
    return len(a) == len(b) and all(same_size(m, n) for m, n in zip(a, b, strict=True))
