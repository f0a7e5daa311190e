"""Mixtures of experts on a GPU, as a part of `bench/gpu.py`: tokens that choose, against what transformers runs (rows sorted by expert, and
torch's grouped products: "eager") and what torch.compile makes of that; experts that choose, at as many pairs of token and expert, against
the operation's body, which is batched products; and the roofline."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from gpu_run import compiled_call, peer_seconds, run_case
from harness import Bench
from torch import Tensor

from graphwright.codegen.triton.experts.launch import expert_mlp, token_choice_moe
from graphwright.codegen.triton.roofline import Machine
from graphwright.codegen.triton.tune import device_seconds

TOKENS_CHOOSE, EXPERTS_CHOOSE = "tokens choose", "experts choose"


@dataclass(frozen=True)
class Case:
    """Sequences of `length` tokens, `k` experts a token in the mean, in bfloat16 unless `dtype` says otherwise."""

    length: int
    experts: int
    k: int
    width: int
    inner: int
    batch: int = 1
    dtype: torch.dtype = torch.bfloat16

    @property
    def pairs(self) -> int:
        return self.batch * self.length * self.k

    def weights(self, device: torch.device) -> tuple[Tensor, Tensor]:
        shapes = (self.experts, 2 * self.inner, self.width), (self.experts, self.width, self.inner)
        gate_up, down = (torch.randn(shape, device=device, dtype=self.dtype) / shape[-1] ** 0.5 for shape in shapes)
        return gate_up, down

    def seconds(self, machine: Machine, hit: int) -> float:
        """The least time: weights of the `hit` experts, tokens and results once, or the products."""
        moved = self.dtype.itemsize * (3 * hit * self.width * self.inner + 2 * self.batch * self.length * self.width)
        kind = str(self.dtype).removeprefix("torch.")
        return max(moved / machine.bandwidth, 6 * self.pairs * self.width * self.inner / machine.product_flops(kind))


CASES = {
    "128 experts [2048, 768], 8 a token, 1 token": Case(1, 128, 8, 2048, 768),
    "128 experts [2048, 768], 8 a token, 64 tokens": Case(64, 128, 8, 2048, 768),
    "128 experts [2048, 768], 8 a token, 4096 tokens": Case(4096, 128, 8, 2048, 768),
    "64 experts [2048, 1024], 8 a token, 512 tokens": Case(512, 64, 8, 2048, 1024),
    "64 experts [2048, 1024], 8 a token, 16 x 512 tokens": Case(512, 64, 8, 2048, 1024, batch=16),
    "8 experts [4096, 14336], 2 a token, 16 tokens": Case(16, 8, 2, 4096, 14336),
    "8 experts [4096, 14336], 2 a token, 4096 tokens": Case(4096, 8, 2, 4096, 14336),
    "64 experts [512, 256], 8 a token, 512 tokens, float32": Case(512, 64, 8, 512, 256, dtype=torch.float32),
}


def experts(bench: Bench, machine: Machine, device: torch.device) -> None:
    """All cases, or those that the command line names."""
    torch.set_grad_enabled(False)
    for name, case in CASES.items():
        if not bench.options.kernels or name in bench.options.kernels.split(";"):
            run_case(bench, name, partial(_both, bench, machine, name, case, device))


def _both(bench: Bench, machine: Machine, name: str, case: Case, device: torch.device) -> None:
    seconds = _tokens_choose(bench, machine, name, case, device)
    if case.length >= case.experts // case.k:
        taken = _experts_choose(bench, machine, name, case, device)
        bench.note(f"{name}: {EXPERTS_CHOOSE} in {taken / seconds:.2f} x the time of {TOKENS_CHOOSE}")


def _tokens_choose(bench: Bench, machine: Machine, name: str, case: Case, device: torch.device) -> float:
    torch.manual_seed(0)
    tokens = case.batch * case.length
    index = torch.rand(tokens, case.experts, device=device).argsort(1)[:, : case.k].contiguous()
    x = torch.randn(tokens, case.width, device=device, dtype=case.dtype)
    operands = [x, index, torch.rand(tokens, case.k, device=device), *case.weights(device)]
    options = {"activation": "silu", "combine_dtype": torch.float32}
    peers = {"eager": _by_groups} if hasattr(torch, "_grouped_mm") and case.dtype == torch.bfloat16 else {}  # private: aten's, by that name
    body = partial(torch.ops.gw.token_choice_moe.default, **options)
    hit = int(index.unique().numel())
    return _row(bench, f"{TOKENS_CHOOSE}, {name}", partial(token_choice_moe, **options), body, operands, peers, case.seconds(machine, hit))


def _experts_choose(bench: Bench, machine: Machine, name: str, case: Case, device: torch.device) -> float:
    torch.manual_seed(0)
    capacity = case.length * case.k // case.experts
    index = torch.rand(case.batch, case.experts, case.length, device=device).argsort(2)[..., :capacity].contiguous()
    x = torch.randn(case.batch, case.length, case.width, device=device, dtype=case.dtype)
    operands = [x, index, torch.rand(index.shape, device=device), *case.weights(device)]
    body = partial(torch.ops.gw.expert_mlp.default, activation="silu")
    ours, least = partial(expert_mlp, activation="silu"), case.seconds(machine, case.experts)
    return _row(bench, f"{EXPERTS_CHOOSE}, {name}", ours, body, operands, {"eager": body}, least)


def _row(
    bench: Bench,
    name: str,
    ours: Callable[..., Tensor],
    body: Callable[..., Tensor],
    operands: list[Tensor],
    ways: dict[str, Callable[..., Tensor]],
    least: float,
) -> float:
    """One case, checked where the body in float64 fits the memory, and timed; the seconds that it takes."""
    device = operands[0].device
    if sum(each.nbytes for each in operands) < 2**30:
        exact = body(*(each.double() if each.is_floating_point() else each for each in operands))
        bench.row(name, "error", "1", ((ours(*operands).double() - exact).norm() / exact.norm()).item(), {})
    calls = {peer: lambda way=way: lambda: way(*operands) for peer, way in ways.items()}
    if ways:
        calls["torch.compile"] = lambda: compiled_call(next(iter(ways.values())), operands)
    peers = peer_seconds(bench, name, device, calls) | {"roofline": least}
    seconds = device_seconds(lambda: ours(*operands), device)
    bench.row(name, "time", "s", seconds, peers)
    return seconds


def _by_groups(x: Tensor, index: Tensor, weight: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    """Mixtures as transformers 5 runs them by `grouped_mm`."""
    tokens, k = index.shape
    chosen, order = index.reshape(-1).sort()
    ends = torch.histc(chosen.float(), gate_up.size(0), 0, gate_up.size(0) - 1).cumsum(0, dtype=torch.int32)
    gate, up = torch._grouped_mm(x[order // k], gate_up.transpose(1, 2), ends).chunk(2, -1)
    results = torch._grouped_mm(F.silu(gate) * up, down.transpose(1, 2), ends) * weight.reshape(-1)[order].unsqueeze(-1)
    places = torch.empty_like(order).scatter_(0, order, torch.arange(tokens * k, device=x.device))
    return results[places].view(tokens, k, -1).sum(1).to(x.dtype)
