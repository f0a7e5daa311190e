"""`gw.expert_choice` and `gw.expert_mlp` on CPUs: picks by topk of integers, experts by batched products, a few at a time.

All experts have as many tokens, so there is nothing to sort or to count. 64 experts [512, 256] that take 64 of 512 tokens each, float32, 2
threads of an AMD Zen 4: 25 ms, where as many pairs of tokens that choose take 32 (topk 0.4 ms, where the stable sort takes 1.6).
"""

from collections.abc import Callable

import torch
from torch import Tensor

from ...ir.ops.experts import ACTIVATIONS, choice_by
from ...ir.workspace.experts import experts_at_once

BatchedProduct = Callable[[Tensor, slice], Tensor]  # rows [E', N, K] of some of the experts -> [E', N, M]

gw = torch.ops.gw


def expert_choice(
    logits: Tensor, valid: Tensor | None, capacity_rows: Tensor | None, *, capacity: int, rule: str, key: str | None = None
) -> tuple[Tensor, Tensor]:
    """`gw.expert_choice`, whose picks are those of the stable sort in a quarter of its time."""
    if logits.device.type != "cpu" or logits.dtype == torch.float64:
        return gw.expert_choice.default(logits, valid, capacity_rows, capacity=capacity, rule=rule, key=key)
    return choice_by(_picks, logits, valid, capacity_rows, capacity, rule, key)


def _picks(keys: Tensor, capacity: int) -> Tensor:
    """The places of the largest float32 keys along the last dim, ties to the lowest: of integers in that order, no two of which are equal.

    The bits of a float, as an integer, are in its order where it is not negative and in the reverse order elsewhere; + 0.0 makes -0.0 one
    with 0.0, and NaN are largest, as for a sort.
    """
    bits = (keys + 0.0).masked_fill(keys.isnan(), float("nan")).contiguous().view(torch.int32)
    ordered = torch.where(bits >= 0, bits, bits ^ 0x7FFFFFFF).to(torch.int64)
    ordered.bitwise_left_shift_(32).bitwise_or_(torch.arange(keys.size(-1) - 1, -1, -1))
    return keys.size(-1) - 1 - ordered.topk(capacity, dim=-1).values.bitwise_and(0xFFFFFFFF)


def expert_mlp(x: Tensor, index: Tensor, gate: Tensor, gate_up: Tensor, down: Tensor, *, activation: str) -> Tensor:
    """`gw.expert_mlp`, a few experts at a time; sums are in the experts' order.

    Raises:
        IndexError: an index lies behind the sequence.
    """
    if x.device.type != "cpu" or activation not in ACTIVATIONS or index.numel() == 0:
        return gw.expert_mlp.default(x, index, gate, gate_up, down, activation=activation)

    def product(matrices: Tensor) -> BatchedProduct:
        return lambda rows, some: torch.bmm(rows, matrices[some].transpose(1, 2))

    return in_turns(x, index, gate, product(gate_up), product(down), tuple(down.shape[1:]), activation)


def in_turns(
    x: Tensor, index: Tensor, gate: Tensor, up: BatchedProduct, down: BatchedProduct, sizes: tuple[int, ...], activation: str
) -> Tensor:
    """The weighted sum over the experts of each position, with what multiplies rows by expert given; `sizes` are D and I.

    Raises:
        IndexError: an index lies behind the sequence.
    """
    (batch, length, depth), (width, inner), experts = x.shape, sizes, index.size(1)
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    places = (index.clamp(min=0) + torch.arange(batch).reshape(-1, 1, 1) * length).transpose(0, 1).reshape(experts, -1)  # [E, B C]
    if int(index.max()) >= length:
        raise IndexError(f"an expert takes position {int(index.max())} of {length}")
    weights = gate.to(wide).transpose(0, 1).reshape(experts, -1, 1)
    void = (index < 0).transpose(0, 1).reshape(experts, -1, 1)
    has_voids = bool(void.any())
    rows, out = x.reshape(-1, depth), torch.zeros(batch * length, width, dtype=wide)
    at_once = experts_at_once(places.size(1), 2 * inner, x.element_size())
    for first in range(0, experts, at_once):
        some = slice(first, first + at_once)
        taken = rows.index_select(0, places[some].reshape(-1)).unflatten(0, (-1, places.size(1)))
        if has_voids:
            taken.masked_fill_(void[some], 0.0)
        gates, values = up(taken, some).chunk(2, -1)
        y = down(ACTIVATIONS[activation](gates).mul_(values), some).to(wide).mul_(weights[some])
        if has_voids:
            y.masked_fill_(void[some], 0.0)
        out.index_add_(0, places[some].reshape(-1), y.flatten(0, 1))
    return out.unflatten(0, (batch, length)).to(x.dtype)
