"""How the kernels are launched. A GPU is not asked how many tokens an expert has, as that would wait for it: grids are the most that there
can be, so calls can be recorded as CUDA graphs. No sum is by atomics on floats: two calls give equal bits.

What an index names that is not there is neither read nor written: a token that chose such an expert is NaN, and an expert that took such a
position did not take it. (The bodies raise IndexError, on a CPU.)
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ....ir.ops.experts import ACTIVATIONS
from ..targets import Target, target_of
from ..tiles import power_of_two

_TYPES = (torch.float32, torch.bfloat16, torch.float16)
_MOST_EXPERTS = 4096  # a program looks for its own among the ends of all
_MOST_SLOTS = 2**15  # sums of their numbers are int32
_SORTED = 2048  # pairs at a time
_JOINED = 2048  # bytes of a result at a time
_MARKED = 1024  # slots
_SEARCHED = 128  # slots, by a program that has room for no more without spills


@dataclass(frozen=True)
class Tile:
    """`m` rows times `n` columns of the result, `k` terms of its sums at a time."""

    m: int
    n: int
    k: int
    num_warps: int
    num_stages: int

    @property
    def options(self) -> dict[str, int]:
        return {
            "BLOCK_M": self.m, "BLOCK_N": self.n, "BLOCK_K": self.k, "num_warps": self.num_warps, "num_stages": self.num_stages
        }  # fmt: skip


def tile_of(rows: int, matrices: int, itemsize: int, is_aligned: bool, target: Target) -> Tile:
    """The tile for experts of so many rows in the mean and `matrices` products of each block of rows, the largest that compiles without
    spills for every target (tests/test_triton_experts_aot.py). Few rows wait for weights: small blocks, many programs. float32 has no unit
    of its own and holds its operands in registers, and so do operands whose rows do not begin at multiples of 16 bytes."""
    m, is_small = min(128, max(16, power_of_two(rows))), target.shared_bytes < 2**17
    if itemsize == 4:
        return Tile(min(m, 64), 64 // matrices, 16, 8 if m >= 64 else 4, 3)
    if not is_aligned:
        return Tile(min(m, 64), 64 // matrices, 32, 4, 2)
    if m == 16:
        return Tile(16, 64 // matrices, 64 if is_small else 128, 4, 2 if is_small else 4)
    return Tile(m, 128 // matrices, 32 if is_small else 64, 8 if m == 128 else 4, 2 if is_small else 3)


def token_choice_moe(
    x: Tensor, index: Tensor, weight: Tensor, gate_up: Tensor, down: Tensor, *, activation: str, combine_dtype: torch.dtype
) -> Tensor:
    """`gw.token_choice_moe`, by its body where the kernels have no form for the operands. Sums are float32 whatever the dtype."""
    is_routed = index.dim() == 2 and index.shape == weight.shape and index.size(0) == x.size(0) and combine_dtype != torch.float64
    if x.dim() != 2 or not is_routed or not _has_form(x, index, weight, gate_up, down, activation):
        body = torch.ops.gw.token_choice_moe.default
        return body(x, index, weight, gate_up, down, activation=activation, combine_dtype=combine_dtype)
    from . import kernels

    x, index = _with_rows(x), index.contiguous()
    (tokens, k), experts, width = index.shape, down.size(0), down.size(1)
    order, ends = (torch.empty(n, dtype=torch.int32, device=x.device) for n in (tokens * k, experts))
    rows = _Rows(experts, tokens * k, ends, is_even=False)
    with torch.cuda.device_of(x):
        kernels.sort[(experts,)](index, order, ends, tokens * k, BLOCK=min(_SORTED, power_of_two(tokens * k)), num_warps=4)
        h = _raised(rows, _Tokens(x, (0, x.stride(0)), order, choices=k), gate_up, activation)
        results = _multiplied(rows, h, down, down.stride(), order)
        y = torch.empty(tokens, width, dtype=x.dtype, device=x.device)
        block = min(_JOINED // x.element_size(), power_of_two(width))
        kernels.join_choices[(tokens, -(-width // block))](
            results, index, weight, y, *weight.stride(), experts, width, CHOICES=k, BLOCK_N=block, num_warps=4
        )
    return y


def expert_mlp(x: Tensor, index: Tensor, gate: Tensor, gate_up: Tensor, down: Tensor, *, activation: str) -> Tensor:
    """`gw.expert_mlp`, by its body where the kernels have no form for the operands."""
    is_routed = index.dim() == 3 and index.shape == gate.shape and index.shape[:2] == (x.size(0), down.size(0))
    if x.dim() != 3 or not is_routed or index.size(2) > _MOST_SLOTS or not _has_form(x, index, gate, gate_up, down, activation):
        return torch.ops.gw.expert_mlp.default(x, index, gate, gate_up, down, activation=activation)
    from . import kernels

    x = _with_rows(x)
    (batch, length, _), (_, experts, slots), width = x.shape, index.shape, down.size(1)
    rows = _Rows(experts, experts * batch * slots, index, is_even=True)
    marks = torch.zeros(batch, length, experts, dtype=torch.int32, device=x.device)
    with torch.cuda.device_of(x):
        block = min(_MARKED, power_of_two(slots))
        kernels.mark[(batch * experts, -(-slots // block))](index, marks, *index.stride(), experts, slots, length, BLOCK=block, num_warps=4)
        h = _raised(rows, _Tokens(x, x.stride()[:2], index, index.stride(), slots, length), gate_up, activation)
        results = _multiplied(rows, h, down, down.stride())
        y = torch.empty(batch, length, width, dtype=x.dtype, device=x.device)
        block = min(_JOINED // x.element_size(), power_of_two(width))
        kernels.join_takers[(batch * length, -(-width // block))](
            results, index, gate, marks, y, *index.stride(), *gate.stride(), batch, length, experts, slots, width,
            BLOCK_E=power_of_two(experts), BLOCK_C=_SEARCHED, BLOCK_N=block, num_warps=4,
        )  # fmt: skip
    return y


def grouped_mm(x: Tensor, weight: Tensor, offs: Tensor) -> Tensor:
    """`gw.grouped_mm`, by its body where the kernel has no form for the operands."""
    is_one_product = x.dim() == 2 and weight.dim() == 3 and offs.shape == weight.shape[:1] and x.size(1) == weight.size(1)
    is_typed = x.dtype in _TYPES and weight.dtype == x.dtype and not offs.dtype.is_floating_point
    if not is_one_product or not is_typed or 0 in (x.numel(), weight.numel()) or weight.size(0) > _MOST_EXPERTS:
        return torch.ops.gw.grouped_mm.default(x, weight, offs)
    rows = _Rows(weight.size(0), x.size(0), offs.contiguous(), is_even=False)
    of_group, of_term, of_column = weight.stride()
    with torch.cuda.device_of(x):
        return _multiplied(rows, _with_rows(x), weight.transpose(1, 2), (of_group, of_column, of_term), fills=True)


@dataclass(frozen=True)
class _Rows:
    """All rows of a product: `total` of them, as many for each expert where `is_even`, or up to `ends`."""

    experts: int
    total: int
    ends: Tensor
    is_even: bool

    @property
    def mean(self) -> int:
        return -(-self.total // self.experts)

    def is_few(self, tile: Tile) -> bool:
        """Whether a place for each row makes fewer than places for the tiles of all experts."""
        return not self.is_even and self.total < self.total // tile.m + self.experts

    def places(self, tile: Tile, fills: bool) -> int:
        if self.is_even:
            return self.experts * -(-self.mean // tile.m)
        return self.total if self.is_few(tile) else self.total // tile.m + self.experts + fills

    def named(self, tile: Tile) -> dict[str, Any]:
        return {"IS_EVEN": self.is_even, "IS_FEW": self.is_few(tile), "BLOCK_E": power_of_two(self.experts), **tile.options}


@dataclass(frozen=True)
class _Tokens:
    """Which of x's tokens rows are of: position index[b, e, c] of `length`, with `slots` for each b and e, or token index[r] // choices."""

    x: Tensor
    x_stride: tuple[int, ...]  # of sequences and of tokens
    index: Tensor
    index_stride: tuple[int, ...] = (0, 0, 0)
    slots: int = 1
    length: int = 1
    choices: int = 1


def _raised(rows: _Rows, tokens: _Tokens, weight: Tensor, activation: str) -> Tensor:
    """The rows that the second product takes, [rows, I]."""
    from . import kernels

    x, inner, tile = tokens.x, weight.size(1) // 2, _tile(rows, 2, tokens.x, weight)
    h = torch.empty(rows.total, inner, dtype=x.dtype, device=x.device)
    kernels.raise_rows[(rows.places(tile, fills=False) * -(-inner // tile.n),)](
        x, weight, tokens.index, rows.ends, h, *tokens.x_stride, *weight.stride(), *tokens.index_stride,
        rows.experts, rows.mean, rows.total, tokens.slots, tokens.length, weight.size(2), inner,
        CHOICES=tokens.choices, ACTIVATION=activation, **rows.named(tile),
    )  # fmt: skip
    return h


def _multiplied(rows: _Rows, x: Tensor, weight: Tensor, of_weight: Any, order: Tensor | None = None, fills: bool = False) -> Tensor:
    """x [rows, K] times each expert's matrix [M, K], in `order`."""
    from . import kernels

    width, tile = weight.size(1), _tile(rows, 1, x, weight)
    y = torch.empty(rows.total, width, dtype=x.dtype, device=x.device)
    kernels.multiply[(rows.places(tile, fills) * -(-width // tile.n),)](
        x, weight, rows.ends if order is None else order, rows.ends, y, x.stride(0), *of_weight,
        rows.experts, rows.mean, rows.total, x.size(1), width,
        IS_SORTED=order is not None, FILLS=fills, **rows.named(tile),
    )  # fmt: skip
    return y


def _tile(rows: _Rows, matrices: int, x: Tensor, weight: Tensor) -> Tile:
    size = x.element_size()
    is_aligned = all(step == 1 or step * size % 16 == 0 for each in (x, weight) for step in each.stride())
    return tile_of(rows.mean, matrices, size, is_aligned, target_of(x.device))


def _has_form(x: Tensor, index: Tensor, weight: Tensor, gate_up: Tensor, down: Tensor, activation: str) -> bool:
    """Whether the kernels have the types and sizes."""
    experts, width, inner = down.shape if down.dim() == 3 else (0, 0, 0)
    is_typed = x.dtype in _TYPES and gate_up.dtype == down.dtype == x.dtype and weight.dtype in _TYPES
    is_whole = not index.dtype.is_floating_point and index.dtype != torch.bool
    is_sized = gate_up.shape == (experts, 2 * inner, x.size(-1)) and 0 < experts <= _MOST_EXPERTS and index.numel() > 0 < down.numel()
    return is_typed and is_whole and is_sized and x.numel() > 0 and activation in ACTIVATIONS


def _with_rows(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()
