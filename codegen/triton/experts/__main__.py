"""The kernels against the operators' bodies in float64, on a GPU or in Triton's interpreter."""

import os
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

if __name__ == "__main__" and not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before triton is imported

from ....ir.ops import experts, grouped  # noqa: F401  (declare the operators)
from . import launch

# Relative to the largest element: sums of 123 products, and the roundings of what the experts are made of, twice that for bfloat16 in the
# interpreter, which rounds towards zero.
TOLERANCES = {torch.float32: 5e-6, torch.float16: 4e-3, torch.bfloat16: 3e-2}
SIZES = {
    "tiny": (1, 5, 3, 2, 16, 16),
    "odd": (3, 13, 5, 2, 123, 63),
}  # sequences, positions of each, experts, experts a token, width, inner


def check(device: str) -> None:
    """Random operands, fresh memory poisoned with NaN. On a GPU each call is recorded and replayed, too.

    Raises:
        AssertionError: a result is off by more than its tolerance.
    """
    torch.manual_seed(0)
    for dtype, tolerance in TOLERANCES.items():
        for name, sizes in SIZES.items():
            for call, body, operands in calls(device, dtype, *sizes):
                exact = body(*(x.double() if x.is_floating_point() else x for x in operands))
                y = poisoned(partial(call, *operands), is_recorded=device == "cuda")
                error = ((y.double() - exact).abs().max() / exact.abs().max()).item()
                assert error <= tolerance, f"{name} {dtype} is off by {error:.3g}, more than {tolerance:.3g}"  # NaN as well
                print(f"{name} {dtype}: error {error:.3g} of at most {tolerance:.3g} on {device}")


def calls(
    device: str, dtype: torch.dtype, batch: int, length: int, count: int, k: int, width: int, inner: int
) -> Sequence[tuple[Callable[..., Tensor], Callable[..., Tensor], Sequence[Tensor]]]:
    """(kernel, body, operands) of each operation; the last expert has no token."""

    def normal(*shape: int) -> Tensor:
        return (torch.randn(shape, device=device) / shape[-1] ** 0.5).to(dtype)

    gw, tokens = torch.ops.gw, batch * length
    weights = normal(count, 2 * inner, width), normal(count, width, inner)
    chosen = torch.rand(tokens, count - 1, device=device).argsort(1)[:, :k]
    taken = torch.rand(batch, count, length, device=device).argsort(2)[..., : max(1, length * k // count)]
    taken[:, -1] = -1
    ends = torch.rand(count, device=device).mul(tokens).int().sort().values
    return [
        (
            lambda *a: launch.token_choice_moe(*a, activation="silu", combine_dtype=torch.float32),
            lambda *a: gw.token_choice_moe(*a, activation="silu", combine_dtype=torch.float64),
            [normal(tokens, width), chosen, torch.rand(tokens, k, device=device), *weights],
        ),
        (
            lambda *a: launch.expert_mlp(*a, activation="silu"),
            lambda *a: gw.expert_mlp(*a, activation="silu"),
            [normal(batch, length, width), taken, torch.rand(taken.shape, device=device), *weights],
        ),
        (launch.grouped_mm, gw.grouped_mm, [normal(tokens, inner), weights[1].transpose(1, 2), ends]),
    ]


def poisoned(call: Callable[[], Tensor], is_recorded: bool = False) -> Tensor:
    """What a call gives whose fresh memory is NaN, or the largest integers: what is never written shows."""
    was_deterministic = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        return replayed(call) if is_recorded else call()
    finally:
        torch.use_deterministic_algorithms(was_deterministic)


def replayed(call: Callable[[], Tensor]) -> Tensor:
    """What a call gives as a CUDA graph, which nothing that waits for the GPU can be a part of."""
    call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = call()
    graph.replay()
    torch.cuda.synchronize()
    return y


if __name__ == "__main__":
    check("cuda" if torch.cuda.is_available() else "cpu")
