"""What stands for a mixture whose experts choose: scores, `gw.expert_choice`, `gw.expert_mlp`."""

import itertools
from dataclasses import dataclass

import torch

from ...ir import Node, Rewriter, Weight
from ...ir.calls import GETITEM
from ...ir.pattern import named_arguments
from .capacity import Capacity
from .router import Routed

aten, gw = torch.ops.aten, torch.ops.gw


@dataclass(frozen=True)
class Choice:
    """How the experts of one mixture choose: k a token in the mean, by `key` with the gates of `rule`; scores in float32 unless `keep`."""

    k: int
    rule: str
    key: str
    sizes: Capacity
    keep: bool = False

    def capacity(self, length: int) -> int:
        return self.sizes.of(length, self.k)


def emit_choice(rewriter: Rewriter, site: Routed, choice: Choice, valid: Node | None) -> None:
    """Puts it in the place of `site`, within a step; `valid` is an input [B, S], 0 where a row is padded."""
    moe = site.moe
    a, length = named_arguments(moe), int(site.length)

    def insert(target: object, *args: object, origin: Node = moe, **kwargs: object) -> Node:
        return rewriter.insert(target, args, kwargs, before=moe, origin=origin)  # type: ignore[arg-type]

    scores = site.scores
    if not choice.keep and scores.meta["val"].dtype in (torch.bfloat16, torch.float16):
        wide = [insert(aten._to_copy.default, operand, dtype=torch.float32, origin=scores) for operand in scores.args]
        scores = insert(aten.linear.default, *wide, origin=scores)
    if scores.meta["val"].dim() == 2:
        scores = insert(aten.view.default, scores, [-1, length, site.experts], origin=scores)
    mask, rows = None, None
    if valid is not None:
        mask = valid if valid.meta["val"].dtype == torch.bool else insert(aten.ne.Scalar, valid, 0)
        table = torch.tensor([choice.capacity(n) for n in range(length + 1)])
        kept = _kept(rewriter, f"expert_choice.capacity_{choice.sizes.experts}_{choice.k}", table)
        rows = insert(aten.index.Tensor, kept, [insert(aten.sum.dim_IntList, mask, [1])])
    attributes = {"capacity": choice.capacity(length), "rule": choice.rule, "key": choice.key}
    chosen = insert(gw.expert_choice.default, scores, mask, rows, origin=site.choice, **attributes)
    index, gate = (insert(GETITEM, chosen, n, origin=site.choice) for n in (0, 1))
    x = insert(aten.view.default, a["x"], [-1, length, a["x"].meta["val"].size(-1)])
    y = insert(gw.expert_mlp.default, x, index, gate, a["gate_up"], a["down"], activation=a["activation"])
    rewriter.replace(moe, insert(aten.view.default, y, [-1, y.meta["val"].size(-1)]))


def _kept(rewriter: Rewriter, name: str, table: torch.Tensor) -> Node:
    """A use of a weight with this value: of that name, or with the first number behind it that no other value has."""
    for number in itertools.count():
        weight = Weight.of(f"{name}_{number}" if number else name, table)
        known = rewriter.program.weights.get(weight.name)
        if known is None or known.digest == weight.digest:
            return rewriter.weight(weight)
    raise AssertionError("numbers do not end")
