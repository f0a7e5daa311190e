"""`gw.token_choice_moe` on CPUs: pairs of token and expert are sorted by expert, and each expert that has some multiplies them at once; a
token's results are then weighted and summed. One token needs no sorting.

64 experts [512, 256], 8 of them for each of 512 tokens, float32, two threads of an AMD Zen 4: products 34 ms by `mm`, 24 on packed weights,
all else 3.3.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from ...ir.ops.experts import ACTIVATIONS

Runs = Sequence[tuple[int, int]]  # (expert, how many rows in sequence are its)
Product = Callable[[Tensor, Runs], Tensor]  # rows [N, K] -> [N, M], each by the matrix of its expert

_body = torch.ops.gw.token_choice_moe.default


def token_choice_moe(
    x: Tensor, index: Tensor, weight: Tensor, gate_up: Tensor, down: Tensor, *, activation: str, combine_dtype: torch.dtype
) -> Tensor:
    """`gw.token_choice_moe`, which runs each expert on the tokens that chose it alone.

    Raises:
        IndexError: an index lies outside of the experts.
    """
    if x.device.type != "cpu" or activation not in ACTIVATIONS or index.numel() == 0:
        return _body(x, index, weight, gate_up, down, activation=activation, combine_dtype=combine_dtype)
    check_range(index, gate_up.size(0))
    return by_expert(x, index, weight, by_matrices(gate_up), by_matrices(down), activation, combine_dtype)


def by_expert(x: Tensor, index: Tensor, weight: Tensor, up: Product, down: Product, activation: str, combine_dtype: torch.dtype) -> Tensor:
    """The sum over a token's experts, with what multiplies rows by expert given. `index` is checked."""
    tokens, k = index.shape
    if tokens == 1:
        results = _ffn(x.expand(k, -1), [(expert, 1) for expert in index[0].tolist()], up, down, activation)
        return torch.mm(weight.to(combine_dtype), results.to(combine_dtype)).to(x.dtype)
    chosen = index.reshape(-1)
    runs = [(expert, count) for expert, count in enumerate(torch.bincount(chosen).tolist()) if count]
    order = chosen.argsort(stable=True)
    results = _ffn(x.index_select(0, order.div(k, rounding_mode="floor")), runs, up, down, activation)
    places = torch.empty_like(order).scatter_(0, order, torch.arange(tokens * k)).view(tokens, k)
    # Gathers, weights and sums in one call. Its sums are float32 whatever the dtype.
    return F.embedding_bag(places, results.to(combine_dtype), per_sample_weights=weight.to(combine_dtype), mode="sum").to(x.dtype)


def every_expert(
    x: Tensor, index: Tensor, weight: Tensor, experts: int, up: Product, down: Product, activation: str, combine_dtype: torch.dtype
) -> Tensor:
    """As `by_expert`, with each expert run on all tokens, one after another: nothing is sorted, gathered or put back, which can win where
    tokens choose about all of them. What an expert makes of a token that did not choose it is left out, not multiplied by 0."""
    wide = torch.promote_types(combine_dtype, torch.float32)
    gates = torch.zeros(x.size(0), experts, dtype=wide).scatter_add_(1, index, weight.to(combine_dtype).to(wide))
    absent = torch.ones(x.size(0), experts, dtype=torch.bool).scatter_(1, index, False)
    out = torch.zeros(x.size(0), x.size(1), dtype=wide)
    for expert in range(experts):
        results = _ffn(x, [(expert, x.size(0))], up, down, activation).to(combine_dtype).to(wide)
        out.addcmul_(results.masked_fill_(absent[:, expert : expert + 1], 0.0), gates[:, expert : expert + 1])
    return out.to(x.dtype)


def by_matrices(matrices: Tensor) -> Product:
    """Products with plain matrices [E, M, K]."""
    return lambda rows, runs: _products(rows, matrices, runs)


def check_range(index: Tensor, experts: int) -> None:
    """Raises IndexError where an index lies outside of the experts."""
    low, high = map(int, index.aminmax())
    if low < 0 or high >= experts:
        raise IndexError(f"a token chose expert {low if low < 0 else high} of {experts}")


def _ffn(rows: Tensor, runs: Runs, up: Product, down: Product, activation: str) -> Tensor:
    gates, values = up(rows, runs).chunk(2, -1)
    return down(ACTIVATIONS[activation](gates).mul_(values), runs)


def _products(rows: Tensor, matrices: Tensor, runs: Runs) -> Tensor:
    """Each product into its place in the result."""
    y = torch.empty(rows.size(0), matrices.size(1), dtype=rows.dtype)
    counts = [count for _, count in runs]
    for (expert, _), part, place in zip(runs, rows.split(counts), y.split(counts), strict=True):
        torch.mm(part, matrices[expert].t(), out=place)
    return y
