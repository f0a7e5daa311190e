"""Attention over a chunked recurrence on a GPU, as a part of `bench/gpu.py`: steps and prompts against ATen's attention on all tokens
("eager"), which is what it stands in the place of, what torch.compile makes of the operation's body, and the roofline. Prompts are measured
on both sides of where the authors' code crosses attention, about 8,192 tokens."""

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from gpu_run import compiled_call, peer_seconds, run_case
from harness import Bench
from torch import Tensor

from graphwright.codegen.triton.rat.launch import rat_attention, step_in_place
from graphwright.codegen.triton.roofline import Machine
from graphwright.codegen.triton.tune import device_seconds

_LONGEST_BODY = 8192  # tokens of a prompt whose body, with a score for each two, fits the memory


@dataclass(frozen=True)
class Case:
    """The last of `tokens` tokens where it `is_step`, or all of them, in bfloat16 with chunks of 16."""

    batch: int
    tokens: int
    is_step: bool
    window: int = 0
    local: str = "state"
    heads: int = 32
    kv_heads: int = 8
    width: int = 128
    chunk: int = 16

    @property
    def options(self) -> dict[str, Any]:
        return {"chunk": self.chunk, "scale": self.width**-0.5, "window": self.window, "local": self.local}

    @property
    def slots(self) -> int:
        return -(-self.tokens // self.chunk) + self.window + (1 if self.local == "state" else self.chunk)

    def operands(self, device: torch.device) -> list[Tensor]:
        """Of the operation, caches and all."""
        count = 1 if self.is_step else self.tokens

        def normal(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
            return torch.randn(shape, device=device, dtype=dtype)

        heads = [normal(self.batch, count, n, self.width).transpose(1, 2) for n in (self.heads, *[self.kv_heads] * 3)]
        angles = normal(1, count, self.width, dtype=torch.float32)
        found = [*heads, normal(self.chunk, 1, 1, dtype=torch.float32), angles.cos(), angles.sin()]
        if self.is_step:
            found += [normal(self.batch, self.kv_heads, self.slots, self.width) for _ in range(2)]
            found += [normal(self.batch, self.kv_heads, self.width, dtype=torch.float32) for _ in range(2)]
            found += [torch.full((self.batch,), self.tokens - 1, device=device), torch.arange(self.batch, device=device)]
        return found

    def seconds(self, machine: Machine) -> float:
        """The least time: what is read and written once, or the products of visible pairs."""
        seen = [
            max(0, t - self.window) // self.chunk + min(t, self.window) + 1
            for t in ([self.tokens - 1] if self.is_step else range(self.tokens))
        ]
        rows = (seen[0] if self.is_step else 3 * self.tokens) * self.kv_heads * (2 if self.is_step else 1)
        moved = 2 * self.batch * self.width * (rows + 2 * self.heads * len(seen))
        return max(moved / machine.bandwidth, 4 * self.batch * self.heads * self.width * sum(seen) / machine.product_flops("bfloat16"))


CASES = {
    "rat step, 1 row of 4096": Case(1, 4096, True),
    "rat step, 64 rows of 4096": Case(64, 4096, True),
    "rat step, 64 rows of 4096, window 256": Case(64, 4096, True, window=256, local="raw"),
    "rat step, 8 rows of 131072": Case(8, 131072, True),
    "rat prompt of 4096, 4 rows": Case(4, 4096, False),
    "rat prompt of 4096, 4 rows, window 256": Case(4, 4096, False, window=256, local="raw"),
    "rat prompt of 32768": Case(1, 32768, False),
}


def row(bench: Bench, machine: Machine, name: str, case: Case, device: torch.device) -> None:
    """One case, checked and timed."""
    torch.manual_seed(0)
    operands = case.operands(device)
    q, k, v = operands[:3]
    op = torch.ops.gw.rat_cached_attention.default if case.is_step else torch.ops.gw.rat_attention.default
    body, tail = partial(op, **case.options), [None] if case.is_step else []
    if case.is_step:
        k, v = (torch.randn(case.batch, case.kv_heads, case.tokens, case.width, device=device, dtype=torch.bfloat16) for _ in range(2))
    has_body = case.is_step or case.tokens <= _LONGEST_BODY
    calls = {"eager": lambda: lambda: F.scaled_dot_product_attention(q, k, v, is_causal=not case.is_step, enable_gqa=True)}
    if has_body:
        calls["torch.compile"] = lambda: compiled_call(body, (*operands, *tail))
    peers = peer_seconds(bench, name, device, calls) | {"roofline": case.seconds(machine)}
    ours = partial(step_in_place if case.is_step else rat_attention, **case.options)
    if has_body:  # before a step has written to its caches
        wide = [each.double() if each.is_floating_point() else each for each in operands]
        exact, y = body(*wide, *tail), ours(*(each.clone() for each in operands), *tail)
        exact, y = (exact[0], y[0]) if case.is_step else (exact, y)
        bench.row(name, "error", "1", ((y.double() - exact).norm() / exact.norm()).item(), {})
    bench.row(name, "time", "s", device_seconds(lambda: ours(*operands, *tail), device), peers)


def recurrences(bench: Bench, machine: Machine, device: torch.device) -> None:
    """All cases, or those that the command line names."""
    torch.set_grad_enabled(False)
    for name, case in CASES.items():
        if not bench.options.kernels or name in bench.options.kernels.split(";"):
            run_case(bench, name, partial(row, bench, machine, name, case, device))
