"""Makes one operation of each block where tokens choose experts, so that it runs by the fastest way that there is.

    dispatch, grouped | batched | dense products, gate, combine  ->  gw.token_choice_moe(x, index, weight, gate_up, down)

The router stays as it is. Exact in real arithmetic; in bfloat16, roundings between the block's steps may go. Of a dense block it takes
finite results of all experts for granted, since 0 times infinity is no 0 there. Source: specs/expert_choice.md, sections 3.2 and 3.3.
"""

from collections import Counter
from dataclasses import dataclass

import torch

from ...ir import Rewriter
from ...ir.pattern import NoMatch
from ..base import LeftAlone, Outcome, Pass
from ..contract import Contract
from ..options import option
from .blocks import MoEBlock, find_blocks
from .products import ExpertProduct
from .self_check import disagreement

aten, gw = torch.ops.aten, torch.ops.gw


@dataclass(frozen=True)
class RegroupExperts(Pass):
    """Blocks of a mixture of experts, as transformers and dense code by hand have them, become `gw.token_choice_moe`.

    With `verify` each block is run beside the operation on random operands, and stays as it was where these differ.
    """

    name = "regroup-experts"
    rules = ("regroup",)
    contract = Contract.EXACT
    ensures = frozenset({"experts-regrouped"})
    before = frozenset({"slice-groups"})

    verify: bool = option(True, "true or false", lambda value: isinstance(value, bool))

    def run(self, rewriter: Rewriter) -> Outcome:
        blocks, failures = find_blocks(rewriter.function)
        left = [_left(failure) for failure in failures]
        done = []
        for block in blocks:
            problem = disagreement(rewriter.program, block) if self.verify else None
            if problem is not None:
                left.append(LeftAlone.at(block.result, f"it is no mixture of chosen experts after all: {problem}"))
                continue
            line = _described(block)  # before its nodes go
            with rewriter.step("regroup"):
                _emit(rewriter, block)
            done.append(line)
        lines = tuple(f"{count} block{'' if count == 1 else 's'}: {line}" for line, count in Counter(done).items())
        return Outcome(tuple(left), lines, {"regrouped": len(done)} if done else {})


def _emit(rewriter: Rewriter, block: MoEBlock) -> None:
    inside = [node for node in block.region.nodes if node.op == "call_function"]
    matrices = []
    for product in (block.gated.product, block.down):
        weight = product.weight
        if product.transposed:
            weight = rewriter.insert(aten.transpose.int, (weight, 1, 2), before=block.result, origin=product.result)
        matrices.append(weight)
    chosen = [
        node if node.meta["val"].dim() == 2 else rewriter.insert(aten.unsqueeze.default, (node, 1), before=block.result, origin=node)
        for node in (block.index, block.weight)
    ]
    moe = rewriter.insert(
        gw.token_choice_moe.default,
        (block.x, *chosen, *matrices),
        {"activation": block.gated.activation, "combine_dtype": block.combine_dtype},
        before=block.result,
        origin=inside,
    )
    rewriter.replace(block.result, moe)


def _described(block: MoEBlock) -> str:
    experts, depth, inner = _sizes(block.down)
    k = block.k
    return f"{experts} experts [{depth}, {inner}], {k} a token, {6 * depth * inner * k} FLOPs a token; was {block.form}"


def _sizes(down: ExpertProduct) -> tuple[int, int, int]:
    first, *rest = down.weight.meta["val"].shape
    depth, inner = reversed(rest) if down.transposed else rest
    return first, depth, inner


def _left(failure: NoMatch) -> LeftAlone:
    return LeftAlone("experts", failure.reason) if failure.node is None else LeftAlone.at(failure.node, failure.reason)
