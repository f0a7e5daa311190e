"""The limit at which experts that choose are tokens that choose: each expert takes all tokens of a row, each token all experts.

A program whose experts take C = S tokens is compared with the one whose tokens choose k = E experts, weights and all else equal.
"""

from typing import Any

import torch

from ...ir import Function, Node, Program, Rewriter
from ...ir.derive import Derivation, specialised
from ...ir.pattern import named_arguments
from ..check import Reference
from ..verdict import Verdict
from .capacity import Capacity
from .emit import Choice, emit_choice
from .router import Routed, routed

aten, gw = torch.ops.aten, torch.ops.gw


def judge_limit(before: Program, inputs: list[Any], rules: dict[int, str]) -> Verdict:
    """By the exact contract, on the inputs of `before`; `rules` has the rule of each mixture by its number, those that stay left out."""
    chosen = before.copy()
    rewriter = Rewriter(chosen)
    for number, moe in enumerate(mixtures(chosen.main)):
        if number in rules:
            site = routed(moe)
            assert isinstance(site, Routed), "it was one when the pass ran"
            with rewriter.step("limit"):
                emit_choice(rewriter, site, Choice(site.experts, rules[number], "logit", Capacity(site.experts)), None)
    tensors = [value for node, value in zip(before.main.placeholders, inputs, strict=False) if isinstance(node.meta["val"], torch.Tensor)]
    flat = Program([specialised(chosen, chosen.main, {})], chosen.weights, chosen.symbols)
    return Reference(_all_chosen(before, rules), tensors).judge_exact(flat)


def mixtures(function: Function) -> list[Node]:
    """The mixtures of a function, in order, whoever chooses in them: their numbers are those of the option `layers`."""
    return [node for node in function.calls if node.target in (gw.token_choice_moe.default, gw.expert_mlp.default)]


def _all_chosen(program: Program, rules: dict[int, str]) -> Program:
    """`program` whose tokens choose all experts, by the probabilities of the rules."""
    sites: list[tuple[Routed, str]] = []
    for number, moe in enumerate(mixtures(program.main)):
        site = routed(moe)
        if number in rules and isinstance(site, Routed):
            sites.append((site, rules[number]))
    instead: dict[Node, Any] = {site.choice: site.experts for site, _ in sites}
    shares = {site.probability_node: rule for site, rule in sites}

    def made_of(made: Derivation, node: Node) -> Any:
        if node in instead:
            scores, _, *rest = node.args
            return made.call(node.target, made.copy_of(scores), instead[node], *rest, like=node, **node.kwargs)  # type: ignore[arg-type]
        if node not in shares:
            return None
        return _shares(made, made.copy_of(named_arguments(node)["self"]), shares[node], node)

    function = specialised(program, program.main, {}, made_of)
    return Program([function], program.weights, program.symbols)


def _shares(made: Derivation, scores: Any, rule: str, like: Node) -> Any:
    dtype = like.meta["val"].dtype
    if rule != "sigmoid":
        return made.call(aten.softmax.int, scores, -1, dtype, like=like)
    values = made.call(aten.sigmoid.default, made.call(aten._to_copy.default, scores, dtype=dtype, like=like), like=like)
    return made.call(aten.div.Tensor, values, made.call(aten.sum.dim_IntList, values, [-1], True, like=like), like=like)
