"""`gw.token_choice_moe` on CPUs: pairs of token and expert are sorted by expert, and each expert that has some multiplies them at once,
into their place in one result; a token's results are then weighted and summed."""

import torch
from torch import Tensor

from ...ir.ops.experts import ACTIVATIONS

_body = torch.ops.gw.token_choice_moe.default


def token_choice_moe(
    x: Tensor, index: Tensor, weight: Tensor, gate_up: Tensor, down: Tensor, *, activation: str, combine_dtype: torch.dtype
) -> Tensor:
    """`gw.token_choice_moe`, which runs each expert on the tokens that chose it alone.

    Raises:
        IndexError: an index lies outside of the experts.
    """
    if x.device.type != "cpu" or activation not in ACTIVATIONS:
        return _body(x, index, weight, gate_up, down, activation=activation, combine_dtype=combine_dtype)
    k = index.size(1)
    flat = index.reshape(-1)
    _check_range(flat, gate_up.size(0))
    counts = torch.bincount(flat, minlength=gate_up.size(0)).tolist()
    order = flat.argsort(stable=True)
    both = _by_expert(x[order // k], gate_up, counts)
    gates, up = both.chunk(2, -1)
    sorted_results = _by_expert(ACTIVATIONS[activation](gates).mul_(up), down, counts)
    results = torch.empty_like(sorted_results)
    results[order] = sorted_results  # [T k, D], a token's together
    return _combined(results.unflatten(0, (-1, k)), weight, combine_dtype).to(x.dtype)


def _by_expert(x: Tensor, weight: Tensor, counts: list[int]) -> Tensor:
    """x[N, K], rows sorted by expert, times weight[E, M, K] transposed -> [N, M]."""
    y = torch.empty(x.size(0), weight.size(1), dtype=x.dtype)
    start = 0
    for matrix, count in zip(weight.unbind(0), counts, strict=True):
        if count:
            torch.mm(x[start : start + count], matrix.t(), out=y[start : start + count])
            start += count
    return y


def _combined(results: Tensor, weight: Tensor, dtype: torch.dtype) -> Tensor:
    """sum_j weight[t, j] results[t, j]: [T, k, D] -> [T, D]."""
    return torch.bmm(weight.to(dtype).unsqueeze(1), results.to(dtype)).squeeze(1)


def _check_range(flat: Tensor, experts: int) -> None:
    if flat.numel() == 0:
        return
    low, high = flat.aminmax()
    if low < 0 or high >= experts:
        raise IndexError(f"a token chose expert {int(low) if low < 0 else int(high)} of {experts}")
