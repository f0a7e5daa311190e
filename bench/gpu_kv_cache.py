"""Attention over caches and appends on a GPU, as a part of `bench/gpu.py`: against ATen's attention on views of the live slots ("eager",
which a graph of fixed sizes does not reach, as it cannot narrow), what torch.compile makes of the operation's body, and the roofline."""

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from gpu_run import compiled_call, peer_seconds, run_case
from harness import Bench
from torch import Tensor

from graphwright.codegen.triton.attention.launch import append_in_place, cached_attention
from graphwright.codegen.triton.roofline import Machine
from graphwright.codegen.triton.tune import device_seconds


@dataclass(frozen=True)
class Step:
    """`queries` of each of `batch` rows, the last of which sees `seen` of `capacity` slots, in bfloat16."""

    batch: int
    queries: int
    seen: int
    capacity: int
    heads: int = 32
    kv_heads: int = 8
    width: int = 128
    window: int = 0

    def tensors(self, device: torch.device) -> dict[str, Tensor]:
        """What the operation takes, and k and v to append."""

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, device=device, dtype=torch.bfloat16)

        new = (self.batch, self.queries, self.kv_heads, self.width)
        cache = (self.batch, self.kv_heads, self.capacity, self.width)
        q = normal(self.batch, self.queries, self.heads, self.width).transpose(1, 2)
        found = {"q": q, "cache_k": normal(*cache), "cache_v": normal(*cache)}
        found |= {name: normal(*new).transpose(1, 2) for name in ("k", "v")}
        found["position"] = torch.full((self.batch,), self.seen - self.queries, device=device)
        return found | {"rows": torch.arange(self.batch, device=device)}

    def seconds(self, machine: Machine) -> float:
        """The least time: live keys and values once, or the products of visible pairs."""
        pairs = self.queries * self.seen - self.queries * (self.queries - 1) // 2
        if self.window:
            pairs = min(pairs, self.queries * self.window)
        slots = min(self.seen, self.window + self.queries) if self.window else self.seen
        moved = 2 * self.batch * self.width * (2 * self.kv_heads * slots + 2 * self.heads * self.queries)
        return max(moved / machine.bandwidth, 4 * self.batch * self.heads * self.width * pairs / machine.product_flops("bfloat16"))


STEPS = {
    "decode, 1 row of 8192": Step(1, 1, 8192, 32768),
    "decode, 1 row of 512": Step(1, 1, 512, 32768),
    "decode, 64 rows of 2048": Step(64, 1, 2048, 4096),
    "decode, 8 rows of 8192, window 1024": Step(8, 1, 8192, 16384, window=1024),
    "verify 5, 8 rows of 2048": Step(8, 5, 2048, 4096),
    "prefill of 2048, 4 rows": Step(4, 2048, 2048, 4096),
    "chunk of 512 behind 3584, 4 rows": Step(4, 512, 4096, 8192),
}


def row(bench: Bench, machine: Machine, name: str, step: Step, device: torch.device) -> None:
    """One step, checked and timed."""
    torch.manual_seed(0)
    t = step.tensors(device)
    operands = [t[key] for key in ("q", "cache_k", "cache_v", "position", "rows")]
    options: dict[str, Any] = {"scale": step.width**-0.5, "window": step.window}
    body = partial(torch.ops.gw.cached_attention.default, **options)
    calls = {"eager": lambda: lambda: _narrowed(step, t), "torch.compile": lambda: compiled_call(body, operands)}
    peers = peer_seconds(bench, name, device, calls) | {"roofline": step.seconds(machine)}
    bench.row(f"attention, {name}", "time", "s", device_seconds(lambda: cached_attention(*operands, **options), device), peers)
    exact = body(*(each.double() if each.is_floating_point() else each for each in operands))
    error = (cached_attention(*operands, **options).double() - exact).norm() / exact.norm()
    bench.row(f"attention, {name}", "error", "1", error.item(), {})
    appended = [t[key] for key in ("cache_k", "cache_v", "k", "v", "position", "rows")]
    moved = 4 * 2 * step.batch * step.queries * step.kv_heads * step.width
    bench.row(
        f"append, {name}", "time", "s", device_seconds(lambda: append_in_place(*appended), device), {"roofline": moved / machine.bandwidth}
    )


def _narrowed(step: Step, t: dict[str, Tensor]) -> Tensor:
    begin = max(0, step.seen - step.window) if step.window else 0
    k, v = (t[key][:, :, begin : step.seen] for key in ("cache_k", "cache_v"))
    is_causal = step.queries == step.seen
    mask = None
    if 1 < step.queries < step.seen:
        last = torch.arange(step.seen - step.queries, step.seen, device=k.device).unsqueeze(1)
        mask = torch.arange(begin, step.seen, device=k.device) <= last
    return F.scaled_dot_product_attention(t["q"], k, v, mask, is_causal=is_causal, enable_gqa=True)


def caches(bench: Bench, machine: Machine, device: torch.device) -> None:
    """All steps, or those that the command line names."""
    torch.set_grad_enabled(False)
    for name, step in STEPS.items():
        if not bench.options.kernels or name in bench.options.kernels.split(";"):
            run_case(bench, name, partial(row, bench, machine, name, step, device))
