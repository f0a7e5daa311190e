"""The operands of `gw.rat_attention` and `gw.rat_cached_attention` as kernels see them, and whether these have a form for them."""

from dataclasses import dataclass

import torch
from torch import Tensor

from ...ir.ops.rat_parts import LOCALS, ROPE_STYLES, ring_of

TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}  # and their numbers in native/call.h


@dataclass(frozen=True)
class Options:
    """The attributes of both operators."""

    chunk: int
    scale: float
    window: int = 0
    sinks: int = 0
    local: str = "state"
    reset: bool = True
    rope_style: str = "half"
    summary_bias: float = 0.0

    @property
    def are_valid(self) -> bool:
        return self.chunk >= 1 and min(self.window, self.sinks) >= 0 and self.local in LOCALS and self.rope_style in ROPE_STYLES

    @property
    def is_raw(self) -> bool:
        return self.local == "raw"

    @property
    def ring(self) -> int:
        return ring_of(self.chunk, self.window, self.local)


@dataclass(frozen=True)
class Caches:
    """What a step continues, and which rows it works on."""

    key_slots: Tensor
    value_slots: Tensor
    key_state: Tensor
    value_state: Tensor
    position: Tensor
    rows: Tensor
    lengths: Tensor | None

    @property
    def places(self) -> list[Tensor]:
        return [each for each in (self.position, self.rows, self.lengths) if each is not None]


def is_fit(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gate: Tensor,
    chunk_bias: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    options: Options,
) -> bool:
    """Whether operands have the types and sizes that kernels read: these compute addresses from them, and ask no further. What is wrong
    with the others the operator's body says."""
    if not options.are_valid or q.dtype not in TYPES or not all(each.dtype == q.dtype for each in (q, k, v, gate)):
        return False
    if not all(each is None or each.device == q.device for each in (k, v, gate, chunk_bias, cos, sin)):
        return False
    batch, heads, tokens, depth = q.shape
    kv_heads = k.size(1)
    is_shared = kv_heads > 0 and heads % kv_heads == 0 and k.shape == v.shape == gate.shape == (batch, kv_heads, tokens, depth)
    return is_shared and _is_bias(chunk_bias, options.chunk, kv_heads, depth) and _are_rotations(cos, sin, batch, tokens, depth)


def _is_bias(bias: Tensor | None, chunk: int, kv_heads: int, depth: int) -> bool:
    if bias is None:
        return True
    return bias.dim() == 3 and bias.size(0) == chunk and bias.size(1) in (1, kv_heads) and bias.size(2) in (1, depth)


def _are_rotations(cos: Tensor | None, sin: Tensor | None, batch: int, tokens: int, depth: int) -> bool:
    if cos is None or sin is None:
        return cos is sin
    is_even = cos.dim() == 3 and cos.size(2) <= depth and cos.size(2) % 2 == 0
    return is_even and cos.shape == sin.shape and cos.size(0) in (1, batch) and cos.size(1) == tokens


def hold(caches: Caches, q: Tensor, k: Tensor, options: Options) -> bool:
    """Whether caches, and what says where in them a step is, have the types, sizes and layouts that kernels read and write."""
    slots, states = (caches.key_slots, caches.value_slots), (caches.key_state, caches.value_state)
    rows, heads, capacity, depth = caches.key_slots.shape
    if not all(each.device == q.device for each in (*slots, *states, *caches.places)) or (heads, depth) != (k.size(1), k.size(3)):
        return False
    are_dense = all(each.stride(-1) == 1 for each in (*slots, *states))
    are_slots = all(each.dtype == q.dtype and each.shape == slots[0].shape for each in slots)
    are_states = all(each.dtype == torch.float32 and each.shape == (rows, heads, depth) for each in states)
    are_places = all(each.dtype == torch.int64 and each.shape == (q.size(0),) for each in caches.places)
    return are_dense and are_slots and are_states and are_places and capacity >= options.sinks + options.ring


def dense(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def bias_strides(bias: Tensor) -> tuple[int, ...]:
    """Of tokens, heads and channels, 0 where one number is for all."""
    return tuple(step if size > 1 else 0 for size, step in zip(bias.shape, bias.stride(), strict=True))


def rotation_strides(table: Tensor) -> tuple[int, int]:
    """Of rows, 0 where one is for all, and tokens."""
    return table.stride(0) if table.size(0) > 1 else 0, table.stride(1)
