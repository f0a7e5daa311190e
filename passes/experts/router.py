"""The router behind a `gw.token_choice_moe`: the scores by which its tokens chose, and what the weights of the chosen ones are.

    index, w = topk(softmax(linear(x, Wr)), k);  weight = [cast] [w / sum(w)]         or softmax of topk of the scores

Other routers are refused, each for what it does: experts could not choose by the same scores, or the layer would lose a factor.
"""

from dataclasses import dataclass
from typing import Any

import torch

from ...ir import Node
from ...ir.calls import GETITEM, draws, name_of
from ...ir.infer import same_size
from ...ir.pattern import NoMatch, named_arguments

aten, gw = torch.ops.aten, torch.ops.gw

_SOFTMAX = (aten.softmax.int, aten._softmax.default)
_CASTS = (aten._to_copy.default, aten.alias.default, aten.clone.default, aten.type_as.default)
_SMALL = 1e-12  # what is added to a sum, or the least that it may be, so that none divides by 0
_VIEWS = (aten.view.default, aten.reshape.default, aten._unsafe_view.default, aten.unsqueeze.default)


@dataclass(frozen=True)
class Routed:
    """`moe` is a gw.token_choice_moe of tokens of `source` [B, S, D]; its tokens chose k of E experts by `scores` [T, E] = linear(..).

    `probability` is "softmax" or "sigmoid", computed by `probability_node`; with `renormalized` the weights of a token have a sum of 1.
    """

    moe: Node
    source: Node
    scores: Node
    choice: Node
    k: int
    probability: str
    probability_node: Node
    renormalized: bool

    @property
    def experts(self) -> int:
        return int(self.scores.meta["val"].size(-1))

    @property
    def batch(self) -> Any:
        return self.source.meta["val"].size(0)

    @property
    def length(self) -> Any:
        return self.source.meta["val"].size(1)


@dataclass(frozen=True)
class _Weights:
    """What the weights of chosen experts are made of: the values of `choice`, divided by their sum, or by `softmax_after` of them."""

    choice: Node
    renormalized: bool
    softmax_after: Node | None
    private: tuple[Node, ...]


def routed(moe: Node) -> Routed | NoMatch:
    """The router of `moe`, or why experts cannot choose by it."""
    if moe.target is gw.expert_mlp.default:
        return NoMatch("its experts choose already", moe)
    a = named_arguments(moe)
    weights = _weights(a["weight"])
    if isinstance(weights, NoMatch):
        return weights
    index, choice = a["index"], weights.choice
    if index.target is not GETITEM or index.args != (choice, 1):
        return NoMatch("which experts its tokens have is not what the topk chose that gave their weights", index)
    found = _scores(choice, weights.softmax_after)
    if isinstance(found, NoMatch):
        return found
    scores, probability, private = found
    for problem in (_read_elsewhere([*weights.private, *private], moe), _misfit(moe, scores, a)):
        if problem is not None:
            return problem
    source, routed_source = _sequences(a["x"]), _sequences(scores.args[0])
    if source is None:
        return NoMatch("how its tokens form sequences is not seen: they are no view [B S, D] of [B, S, D]", a["x"])
    if routed_source is None or not _same_rows(source, routed_source):
        return NoMatch("its router reads other rows than its experts, or the same in another order", scores)
    renormalized = weights.renormalized or weights.softmax_after is not None
    kind = "sigmoid" if probability.target is aten.sigmoid.default else "softmax"
    return Routed(moe, source, scores, choice, int(named_arguments(choice)["k"]), kind, probability, renormalized)


def _weights(weight: Node) -> _Weights | NoMatch:
    node, renormalized, softmax_after, private = weight, False, None, []
    while node.target is not GETITEM:
        private.append(node)
        if node.target in (*_CASTS, *_VIEWS) and len(node.meta["val"].shape) == 2:
            node = node.args[0]  # type: ignore[assignment]
        elif node.target is aten.div.Tensor and not (renormalized or softmax_after) and (total := _total(node)):
            private += total
            node, renormalized = node.args[0], True  # type: ignore[assignment]
        elif node.target in _SOFTMAX and not (renormalized or softmax_after):
            node, softmax_after = named_arguments(node)["self"], node
        else:
            return NoMatch(_extra_step(node), node)
    choice: Any = node.args[0]
    if choice.target is not aten.topk.default or node.args[1] != 0:
        return NoMatch("the weights of its experts are not the values of one topk", node)
    results = [user for user in choice.users if user.target is GETITEM]
    return _Weights(choice, renormalized, softmax_after, (choice, *private, *results))


def _extra_step(node: Node) -> str:
    """What a step between the topk and the weights of experts is, which experts that choose would not know of."""
    if node.target in (aten.gather.default, aten.index.Tensor):
        return "the weights of its experts are read off scores at what was chosen by others, which a bias or groups changed"
    what = name_of(node.target) if node.op == "call_function" else node.target  # type: ignore[arg-type]
    if node.target is aten.div.Tensor:
        return "the weights of its experts are divided by more than their sum, which experts that choose would lose"
    return f"the weights of its experts have an extra factor or step, {what}, which experts that choose would lose"


def _total(division: Node) -> list[Node]:
    """The calls that make sum(values, [-1], keepdim=True) of what `division` divides by it, kept from 0 or not; none of another divisor."""
    values, total = division.args
    private = [total]
    is_kept = isinstance(total, Node) and total.target in (aten.add.Tensor, aten.clamp.default, aten.clamp_min.default)
    if is_kept and isinstance(total.args[1], int | float) and 0 <= total.args[1] <= _SMALL and len(total.args) == 2:  # type: ignore[union-attr]
        private.append(total := total.args[0])  # type: ignore[union-attr]
    if not isinstance(total, Node) or total.target is not aten.sum.dim_IntList:
        return []
    named = named_arguments(total)
    is_sum = named["self"] is values and [dim % 2 for dim in named["dim"]] == [1] and named["keepdim"]
    return private if is_sum else []  # type: ignore[return-value]


def _scores(choice: Node, probability: Node | None) -> tuple[Node, Node, list[Node]] | NoMatch:
    """(linear(..), what makes probabilities of it: `probability` where that stands behind the topk, what lies between it and the topk)."""
    named = named_arguments(choice)
    if named["dim"] not in (-1, 1) or not named["largest"]:
        return NoMatch("its topk does not take the largest scores over experts", choice)
    node, private = named["self"], []
    while node.target is not aten.linear.default:
        private.append(node)
        if node.op != "call_function":
            return NoMatch("its experts are not chosen by a linear layer", choice)
        over_experts = node.target in _SOFTMAX and named_arguments(node)["dim"] in (-1, node.meta["val"].dim() - 1)
        if probability is None and (over_experts or node.target is aten.sigmoid.default):
            probability = node
        elif node.target not in (*_CASTS, *_VIEWS):
            noisy = any(draws(source) for source in node.all_input_nodes)
            what = "noise is added to its scores" if noisy else f"its scores go through {name_of(node.target)}: a bias, groups or a limit"
            return NoMatch(f"{what} between router and choice, which experts that choose would not see", node)
        node = node.args[0]
    if probability is None:
        return NoMatch("its experts are chosen by scores that are no probabilities: there is no softmax or sigmoid", choice)
    return node, probability, [*private, node]


def _read_elsewhere(nodes: list[Node], moe: Node) -> NoMatch | None:
    """A reader of what makes choice and weights that is none of these nor `moe`."""
    inside = {moe, *nodes}
    for node in nodes:
        for user in node.users:
            if user not in inside:
                what = "the scores of its router are" if node.target is aten.linear.default else "what its router chose is"
                return NoMatch(f"{what} read elsewhere: an auxiliary loss, a beam, or a layer that skips tokens", user)
    return None


def _misfit(moe: Node, scores: Node, a: dict[str, Any]) -> NoMatch | None:
    gate_up, down = (a[name].meta["val"] for name in ("gate_up", "down"))
    if scores.meta["val"].size(-1) != gate_up.size(0):
        return NoMatch(f"its router has {scores.meta['val'].size(-1)} scores and there are {gate_up.size(0)} experts", moe)
    if gate_up.dtype != down.dtype or not gate_up.dtype.is_floating_point:
        return NoMatch(f"the weights of its experts are {gate_up.dtype} and {down.dtype}: quantize after this pass, not before", moe)
    return None


def _sequences(tokens: Any) -> Node | None:
    """[B, S, D] of which `tokens` [B S, D] are a view, in whatever dtype; None where the two first dims are swapped before."""
    node = tokens
    while isinstance(node, Node) and node.op == "call_function" and node.target in (*_CASTS, *_VIEWS):
        source = node.args[0]
        if source.meta["val"].dim() == 3 and same_size(source.meta["val"].size(2), tokens.meta["val"].size(-1)):  # type: ignore[union-attr]
            return None if _is_swapped(source) else source  # type: ignore[return-value]
        node = source
    return tokens if tokens.meta["val"].dim() == 3 else None


def _is_swapped(node: Any) -> bool:
    while isinstance(node, Node) and node.target in _CASTS:
        node = node.args[0]
    if node.target is aten.transpose.int:
        return 0 in (dim % 3 for dim in node.args[1:])
    return node.target is aten.permute.default and node.args[1][0] % 3 != 0


def _same_rows(a: Node, b: Node) -> bool:
    return all(same_size(m, n) for m, n in zip(a.meta["val"].shape[:2], b.meta["val"].shape[:2], strict=True))
