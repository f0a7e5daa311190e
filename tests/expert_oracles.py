"""What the operators of mixtures of experts mean, as loops over rows, experts and tokens, in float64."""

import torch
from torch import Tensor

from graphwright.ir.ops.experts import ACTIVATIONS, RULES


def ffn(x: Tensor, gate_up: Tensor, down: Tensor, activation: str) -> Tensor:
    """One expert on one token: [D] -> [D]."""
    inner = down.shape[1]
    both = gate_up @ x
    return down @ (ACTIVATIONS[activation](both[:inner]) * both[inner:])


def token_choice(x: Tensor, index: Tensor, weight: Tensor, gate_up: Tensor, down: Tensor, activation: str) -> Tensor:
    x, weight, gate_up, down = (each.double() for each in (x, weight, gate_up, down))
    out = torch.zeros(len(x), down.shape[1], dtype=torch.float64)
    for t in range(len(x)):
        for j, expert in enumerate(index[t].tolist()):
            out[t] += weight[t, j] * ffn(x[t], gate_up[expert], down[expert], activation)
    return out


def expert_choice(logits: Tensor, valid: Tensor | None, capacity_rows: Tensor | None, capacity: int, rule: str, key: str | None = None):
    """(index, gate) as `gw.expert_choice`; keys are of the logits' own precision, so that ties are ties."""
    batch, length, experts = logits.shape
    keys = logits.softmax(-1) if (key or RULES[rule]) == "prob" else logits
    index = torch.full((batch, experts, capacity), -1)
    gate = torch.zeros(batch, experts, capacity, dtype=torch.float64)
    for b in range(batch):
        limit = capacity if capacity_rows is None else min(capacity, int(capacity_rows[b]))
        allowed = [s for s in range(length) if valid is None or valid[b, s]]
        for e in range(experts):
            best = sorted(allowed, key=lambda s: (-float(keys[b, s, e]), s))[:limit]  # noqa: B023
            index[b, e, : len(best)] = torch.tensor(best, dtype=torch.int64)
        for s in allowed:
            takers = [e for e in range(experts) if s in index[b, e]]
            scores = logits[b, s].double()
            shares = {"orig": scores.softmax(0), "post": (scores - scores.max()).exp(), "sigmoid": scores.sigmoid()}[rule]
            total = 1.0 if rule == "orig" else float(sum(shares[e] for e in takers))
            for e in takers:
                gate[b, e, index[b, e] == s] = shares[e] / total
    return index, gate


def expert_mlp(x: Tensor, index: Tensor, gate: Tensor, gate_up: Tensor, down: Tensor, activation: str) -> Tensor:
    x, gate, gate_up, down = (each.double() for each in (x, gate, gate_up, down))
    out = torch.zeros(*x.shape[:2], down.shape[1], dtype=torch.float64)
    for b, e, c in (index >= 0).nonzero().tolist():
        s = int(index[b, e, c])
        out[b, s] += gate[b, e, c] * ffn(x[b, s], gate_up[e], down[e], activation)
    return out
