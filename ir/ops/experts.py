"""Mixtures of experts: which tokens each expert takes, and what the experts make of tokens that were routed to them.

Expert e is a gated layer FFN_e(x) = down[e] @ (act(G) * U) with [G; U] = gate_up[e] @ x, gate rows first: gate_up [E, 2I, D], down
[E, D, I]. B sequences of S positions, T tokens in all, k experts a token, C tokens an expert and sequence.

Sources: Zhou et al., "Mixture-of-Experts with Expert Choice Routing" (arXiv 2202.09368); "Expert-Choice Routing Enables Adaptive
Computation in Diffusion Language Models" (arXiv 2604.01622); specs/expert_choice.md, section 2.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from ..op import op

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
}
RULES = {"orig": "prob", "post": "logit", "sigmoid": "logit"}  # rule of the gates -> the key that it picks by unless told otherwise
SMALLEST_SUM = 1e-20


@op("token_choice_moe")
def token_choice_moe(
    x: Tensor, index: Tensor, weight: Tensor, gate_up: Tensor, down: Tensor, *, activation: str, combine_dtype: torch.dtype
) -> Tensor:
    """y[t] = sum_j weight[t, j] * FFN_{index[t, j]}(x[t]), in x's dtype; products and sum over j in `combine_dtype`.

    x [T, D], index i64[T, k], weight [T, k], gate_up [E, 2I, D], down [E, D, I] -> [T, D]. An expert that a token did not choose does not
    reach it, infinities and NaN included.

    This body runs every expert on every token, E/k times the work that is needed: kernels do the rest.

    Raises:
        ValueError: the activation is unknown.
        IndexError: an index lies outside of the experts.
    """
    tokens, experts = torch.arange(x.size(0), device=x.device).unsqueeze(1), gate_up.size(0)
    chosen = index.masked_fill(index < 0, experts)  # which is refused: a negative index would count from the end
    y = _experts(x.unsqueeze(0).expand(experts, -1, -1), gate_up, down, activation)[chosen, tokens]  # [T, k, D]
    return (y.to(combine_dtype) * weight.to(combine_dtype).unsqueeze(-1)).sum(1).to(x.dtype)


@op("expert_choice")
def expert_choice(
    logits: Tensor, valid: Tensor | None, capacity_rows: Tensor | None, *, capacity: int, rule: str, key: str | None = None
) -> tuple[Tensor, Tensor]:
    """The `capacity` positions of its row that each expert takes, and the weight of the expert in each: index i64[B, E, C], gate [B, E, C].

    Expert e of row b takes the positions with the largest key[b, s, e], ties to the lowest s, in that order; the key is softmax(logits)
    over experts ("prob"), or the logits ("logit"). With A(s) the experts that took s, and L the logits,

        orig: gate = softmax(L)_e      post: gate = exp(L_e) / sum_{A(s)} exp(L)      sigmoid: gate = sigm(L_e) / sum_{A(s)} sigm(L)

    logits [B, S, E]; positions that are not valid, bool[B, S], are taken by nobody; of row b, experts take at most capacity_rows[b],
    i64[B]. A slot that holds no position has index -1 and gate 0. Gates are float32, or float64 for float64 logits; sums are at least
    1e-20.

    Raises:
        ValueError: rule or key is unknown, or the capacity is none of the sequence.
    """
    return choice_by(_stable_picks, logits, valid, capacity_rows, capacity, rule, key)


def choice_by(
    pick: Callable[[Tensor, int], Tensor],
    logits: Tensor,
    valid: Tensor | None,
    capacity_rows: Tensor | None,
    capacity: int,
    rule: str,
    key: str | None,
) -> tuple[Tensor, Tensor]:
    """`gw.expert_choice`, where pick(keys [B, E, S], C) gives the places [B, E, C] of the largest, in order, ties to the lowest."""
    _check_routing(rule, key, capacity, logits)
    scores = logits.to(torch.float64 if logits.dtype == torch.float64 else torch.float32)  # [B, S, E]
    if valid is not None:
        scores = scores.masked_fill(~valid.unsqueeze(-1), 0.0)  # NaN of padding stays out of gradients, too
    keys = scores.softmax(-1) if (key or RULES[rule]) == "prob" else scores
    if valid is not None:
        keys = keys.masked_fill(~valid.unsqueeze(-1), float("-inf"))
    picks = pick(keys.detach().transpose(1, 2), capacity)  # [B, E, C]
    live = torch.ones_like(picks, dtype=torch.bool)
    if valid is not None:
        live = valid.unsqueeze(1).expand(-1, picks.size(1), -1).gather(-1, picks)
    if capacity_rows is not None:
        live = live & (torch.arange(capacity, device=logits.device) < capacity_rows.reshape(-1, 1, 1))
    taken = torch.zeros_like(scores, dtype=torch.bool).transpose(1, 2).scatter(-1, picks, live).transpose(1, 2)
    gates = _gates(scores, taken, rule).transpose(1, 2).gather(-1, picks)
    return picks.masked_fill(~live, -1), gates.masked_fill(~live, 0.0)


def _stable_picks(keys: Tensor, capacity: int) -> Tensor:
    # topk leaves open which of equal keys it takes.
    return keys.sort(dim=-1, descending=True, stable=True).indices.narrow(-1, 0, capacity)


@op("expert_mlp")
def expert_mlp(x: Tensor, index: Tensor, gate: Tensor, gate_up: Tensor, down: Tensor, *, activation: str) -> Tensor:
    """y[b, s] = sum over (e, c) with index[b, e, c] = s of gate[b, e, c] * FFN_e(x[b, s]), in x's dtype; 0 where there is none.

    x [B, S, D], index i64[B, E, C], gate [B, E, C], gate_up [E, 2I, D], down [E, D, I] -> [B, S, D]. Slots with index -1 are left out, not
    multiplied by 0. Sums over experts are float32, or float64 for float64 x, in the experts' order on a CPU.

    Raises:
        ValueError: the activation is unknown.
        IndexError: an index lies behind the sequence.
    """
    batch, length, depth = x.shape
    experts, capacity = index.shape[1:]
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    live = (index >= 0).transpose(0, 1).unsqueeze(-1)  # [E, B, C, 1]
    rows = torch.arange(batch, device=x.device).reshape(-1, 1, 1)
    taken = x[rows, index.clamp(min=0)].transpose(0, 1).masked_fill(~live, 0.0)  # [E, B, C, D]
    y = _experts(taken.reshape(experts, batch * capacity, depth), gate_up, down, activation).unflatten(1, (batch, capacity))
    y = y.to(wide) * gate.to(wide).transpose(0, 1).unsqueeze(-1)
    places = (index.clamp(min=0) + rows * length).transpose(0, 1).reshape(-1)  # experts outermost: that is the order of the sums
    out = y.new_zeros(batch * length, y.size(-1)).index_add(0, places, y.masked_fill(~live, 0.0).flatten(0, 2))
    return out.unflatten(0, (batch, length)).to(x.dtype)


def _experts(x: Tensor, gate_up: Tensor, down: Tensor, activation: str) -> Tensor:
    """FFN_e(x[e]) for each expert: [E, N, D] -> [E, N, D]."""
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation {activation!r} of an expert is unknown: it is one of {', '.join(ACTIVATIONS)}")
    gates, up = torch.bmm(x, gate_up.transpose(1, 2)).chunk(2, -1)
    return torch.bmm(ACTIVATIONS[activation](gates) * up, down.transpose(1, 2))


def _gates(scores: Tensor, taken: Tensor, rule: str) -> Tensor:
    """The weight of each expert in each position, [B, S, E]; 0 where `taken` says that it is not there, but by the rule "orig".

    Sums run over the innermost dim, so that their order, and thus each bit, is the same wherever a position stands.
    """
    if rule == "orig":
        return scores.softmax(-1)
    if rule == "sigmoid":
        shares = scores.sigmoid().masked_fill(~taken, 0.0)
    else:
        alone = scores.masked_fill(~taken, float("-inf"))
        largest = alone.detach().amax(-1, keepdim=True)
        shares = (alone - largest.masked_fill(largest == float("-inf"), 0.0)).exp()
    return shares / shares.sum(-1, keepdim=True).clamp(min=SMALLEST_SUM)


def _check_routing(rule: str, key: str | None, capacity: int, logits: Tensor) -> None:
    if rule not in RULES:
        raise ValueError(f"rule {rule!r} of expert choice is unknown: it is one of {', '.join(RULES)}")
    if key not in (None, *RULES.values()):
        raise ValueError(f"key {key!r} of expert choice is unknown: it is one of prob, logit")
    if not 0 <= capacity <= logits.size(1):
        raise ValueError(f"an expert takes from 0 to {logits.size(1)} positions of a sequence, not {capacity}")
