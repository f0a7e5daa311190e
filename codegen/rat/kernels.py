"""`gw.rat_attention` and `gw.rat_cached_attention` by the kernel in C++; where it has no form for the operands, or no compiler makes it,
by the operator's body.

Caches are written where they lie, and of them only the slots are read that hold what a query sees.
"""

import struct
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...ir.ops.rat import rat_attention as attention_by_body
from ...ir.ops.rat import rat_cached_attention as cached_by_body
from .library import library

_CALL = struct.Struct("=76q2d")  # `Call` in native/call.h
_TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_LINE = 64  # bytes of a line of the cache, where scratch begins
_NO_OPERAND = (0, 0, 0, 0, 0)
_LOCALS, _STYLES = ("state", "raw"), ("half", "interleaved")

Result = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


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
        return self.chunk >= 1 and min(self.window, self.sinks) >= 0 and self.local in _LOCALS and self.rope_style in _STYLES

    @property
    def ring(self) -> int:
        return self.window + (self.chunk if self.local == "raw" else 1)


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


def rat_attention(
    q: Tensor, k: Tensor, v: Tensor, gate: Tensor, chunk_bias: Tensor | None, cos: Tensor | None, sin: Tensor | None, **options: Any
) -> Tensor:
    """`gw.rat_attention`. The result of a row depends neither on the other rows nor on the number of threads."""
    operands = (q, k, v, gate, chunk_bias, cos, sin)
    y = _attended(*operands, caches=None, options=Options(**options))
    return attention_by_body(*operands, **options) if y is None else y


def rat_cached_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gate: Tensor,
    chunk_bias: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    key_slots: Tensor,
    value_slots: Tensor,
    key_state: Tensor,
    value_state: Tensor,
    *places: Tensor | None,
    **options: Any,
) -> Result:
    """`gw.rat_cached_attention`: the caches copied, and the copies written to."""
    caches = [each.clone() for each in (key_slots, value_slots, key_state, value_state)]
    return step_in_place(q, k, v, gate, chunk_bias, cos, sin, *caches, *places, **options)


def step_in_place(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gate: Tensor,
    chunk_bias: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    key_slots: Tensor,
    value_slots: Tensor,
    key_state: Tensor,
    value_state: Tensor,
    position: Tensor,
    rows: Tensor,
    lengths: Tensor | None,
    **options: Any,
) -> Result:
    """`gw.rat_cached_attention` where nobody reads the old caches any more: they are written to, and are the result.

    Raises:
        IndexError: a row lies outside of the caches, a position is negative, or more tokens are real than there are; nothing has been
            written.
    """
    operands = (q, k, v, gate, chunk_bias, cos, sin)
    caches = Caches(key_slots, value_slots, key_state, value_state, position, rows, lengths)
    held = (key_slots, value_slots, key_state, value_state)
    y = _attended(*operands, caches=caches, options=Options(**options))
    if y is None:
        y, *new = cached_by_body(*operands, *held, position, rows, lengths, **options)
        for cache, value in zip(held, new, strict=True):
            cache.copy_(value)
    return y, *held


def _attended(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gate: Tensor,
    chunk_bias: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    caches: Caches | None,
    options: Options,
) -> Tensor | None:
    """The result by the kernel, which has written to the caches; None where it does not have this form."""
    if q.numel() == 0 or not _is_fit(q, k, v, gate, chunk_bias, cos, sin, options) or not (caches is None or _hold(caches, q, k, options)):
        return None
    native = library()
    if native is None:
        return None
    batch, heads, tokens, depth = q.shape
    q, k, v = (_dense(each) for each in (q, k, v))
    gate = gate if gate.stride(3) in (0, 1) else gate.contiguous()
    # Copies of small operands, and what else a call reads, live until it returns.
    bias, cos, sin = (None if each is None else _dense(each.float()) for each in (chunk_bias, cos, sin))
    places = [] if caches is None else [each.contiguous() for each in caches.places]
    y = torch.empty(batch, tokens, heads, depth, dtype=q.dtype)
    told = (*_told(q), *_told(k), *_told(v), *_told(gate), *_told_bias(bias), *_told_rotation(cos), *_told_rotation(sin))
    fields = (
        *told, *((0,) * 20 if caches is None else _told_caches(caches)),
        y.data_ptr(), _TYPES[q.dtype], *(each.data_ptr() for each in places), *(0,) * (3 - len(places)),
        batch, heads, k.size(1), tokens, depth, *((0, 0) if caches is None else (caches.key_slots.size(0), caches.key_slots.size(2))),
        0 if cos is None else cos.size(2), options.rope_style == "interleaved",
        options.chunk, options.window, options.sinks, options.local == "raw", options.reset, torch.get_num_threads(),
    )  # fmt: skip
    numbers = options.scale, options.summary_bias
    needed = native.scratch_bytes(_CALL.pack(*fields, 0, *numbers))
    if needed < 0:
        raise _outside(caches, tokens, -1 - needed)
    scratch = torch.empty(needed + _LINE, dtype=torch.uint8)
    native.rat_attention(_CALL.pack(*fields, -(-scratch.data_ptr() // _LINE) * _LINE, *numbers))
    return y.transpose(1, 2)


def _is_fit(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gate: Tensor,
    chunk_bias: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    options: Options,
) -> bool:
    """Whether operands have the types and sizes that the kernel reads: it computes addresses from them, and asks no further. What is
    wrong with the others the operator's body says."""
    if not options.are_valid or q.dtype not in _TYPES or not all(each.is_cpu and each.dtype == q.dtype for each in (q, k, v, gate)):
        return False
    batch, heads, tokens, depth = q.shape
    kv_heads = k.size(1)
    is_shared = kv_heads > 0 and heads % kv_heads == 0 and k.shape == v.shape == gate.shape == (batch, kv_heads, tokens, depth)
    return is_shared and _is_bias(chunk_bias, options.chunk, kv_heads, depth) and _are_rotations(cos, sin, batch, tokens, depth)


def _is_bias(bias: Tensor | None, chunk: int, kv_heads: int, depth: int) -> bool:
    if bias is None:
        return True
    return bias.is_cpu and bias.dim() == 3 and bias.size(0) == chunk and bias.size(1) in (1, kv_heads) and bias.size(2) in (1, depth)


def _are_rotations(cos: Tensor | None, sin: Tensor | None, batch: int, tokens: int, depth: int) -> bool:
    if cos is None or sin is None:
        return cos is sin
    is_even = cos.dim() == 3 and cos.size(2) <= depth and cos.size(2) % 2 == 0
    return is_even and cos.is_cpu and sin.is_cpu and cos.shape == sin.shape and cos.size(0) in (1, batch) and cos.size(1) == tokens


def _hold(caches: Caches, q: Tensor, k: Tensor, options: Options) -> bool:
    """Whether caches, and what says where in them a step is, have the types, sizes and layouts that the kernel reads and writes."""
    slots, states = (caches.key_slots, caches.value_slots), (caches.key_state, caches.value_state)
    rows, heads, capacity, depth = caches.key_slots.shape
    if not all(each.is_cpu and each.stride(-1) == 1 for each in (*slots, *states)) or (heads, depth) != (k.size(1), k.size(3)):
        return False
    are_slots = all(each.dtype == q.dtype and each.shape == slots[0].shape for each in slots)
    are_states = all(each.dtype == torch.float32 and each.shape == (rows, heads, depth) for each in states)
    are_places = all(each.is_cpu and each.dtype == torch.int64 and each.shape == (q.size(0),) for each in caches.places)
    return are_slots and are_states and are_places and capacity >= options.sinks + options.ring


def _told(x: Tensor) -> tuple[int, ...]:
    """`Operand` in native/call.h."""
    return (x.data_ptr(), *x.stride())


def _told_bias(bias: Tensor | None) -> tuple[int, ...]:
    if bias is None:
        return _NO_OPERAND
    token, head, channel = (step if size > 1 else 0 for size, step in zip(bias.shape, bias.stride(), strict=True))
    return bias.data_ptr(), 0, head, token, channel


def _told_rotation(table: Tensor | None) -> tuple[int, ...]:
    if table is None:
        return _NO_OPERAND
    return table.data_ptr(), table.stride(0) if table.size(0) > 1 else 0, 0, table.stride(1), 1


def _told_caches(caches: Caches) -> tuple[int, ...]:
    states = [(each.data_ptr(), *each.stride()[:2], 0, 1) for each in (caches.key_state, caches.value_state)]
    return *_told(caches.key_slots), *_told(caches.value_slots), *states[0], *states[1]


def _dense(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _outside(caches: Caches | None, tokens: int, b: int) -> IndexError:
    assert caches is not None
    row, position = int(caches.rows[b]), int(caches.position[b])
    count = tokens if caches.lengths is None else int(caches.lengths[b])
    return IndexError(
        f"{count} of {tokens} tokens at position {position} of row {row} are no step over caches of {caches.key_slots.size(0)} rows: rows "
        "and positions count from 0, and no more tokens are real than there are"
    )
