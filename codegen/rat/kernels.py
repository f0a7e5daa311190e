"""`gw.rat_attention` and `gw.rat_cached_attention` by the kernel in C++; where it has no form for the operands, or no compiler makes it,
by the operator's body.

Caches are written where they lie, and of them only the slots are read that hold what a query sees.
"""

import struct
from typing import Any

import torch
from torch import Tensor

from ...ir.ops.rat import rat_attention as attention_by_body
from ...ir.ops.rat import rat_cached_attention as cached_by_body
from .library import library
from .operands import TYPES, Caches, Options, bias_strides, dense, hold, is_fit, rotation_strides

_CALL = struct.Struct("=76q2d")  # `Call` in native/call.h
_LINE = 64  # bytes of a line of the cache, where scratch begins
_NO_OPERAND = (0, 0, 0, 0, 0)

Result = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


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
    if q.numel() == 0 or not q.is_cpu or not is_fit(q, k, v, gate, chunk_bias, cos, sin, options):
        return None
    if caches is not None and not hold(caches, q, k, options):
        return None
    native = library()
    if native is None:
        return None
    batch, heads, tokens, depth = q.shape
    q, k, v = (dense(each) for each in (q, k, v))
    gate = gate if gate.stride(3) in (0, 1) else gate.contiguous()
    # Copies of small operands, and what else a call reads, live until it returns.
    bias, cos, sin = (None if each is None else dense(each.float()) for each in (chunk_bias, cos, sin))
    places = [] if caches is None else [each.contiguous() for each in caches.places]
    y = torch.empty(batch, tokens, heads, depth, dtype=q.dtype)
    told = (*_told(q), *_told(k), *_told(v), *_told(gate), *_told_bias(bias), *_told_rotation(cos), *_told_rotation(sin))
    fields = (
        *told, *((0,) * 20 if caches is None else _told_caches(caches)),
        y.data_ptr(), TYPES[q.dtype], *(each.data_ptr() for each in places), *(0,) * (3 - len(places)),
        batch, heads, k.size(1), tokens, depth, *((0, 0) if caches is None else (caches.key_slots.size(0), caches.key_slots.size(2))),
        0 if cos is None else cos.size(2), options.rope_style == "interleaved",
        options.chunk, options.window, options.sinks, options.is_raw, options.reset, torch.get_num_threads(),
    )  # fmt: skip
    numbers = options.scale, options.summary_bias
    needed = native.scratch_bytes(_CALL.pack(*fields, 0, *numbers))
    if needed < 0:
        raise _outside(caches, tokens, -1 - needed)
    scratch = torch.empty(needed + _LINE, dtype=torch.uint8)
    native.rat_attention(_CALL.pack(*fields, -(-scratch.data_ptr() // _LINE) * _LINE, *numbers))
    return y.transpose(1, 2)


def _told(x: Tensor) -> tuple[int, ...]:
    """`Operand` in native/call.h."""
    return (x.data_ptr(), *x.stride())


def _told_bias(bias: Tensor | None) -> tuple[int, ...]:
    if bias is None:
        return _NO_OPERAND
    token, head, channel = bias_strides(bias)
    return bias.data_ptr(), 0, head, token, channel


def _told_rotation(table: Tensor | None) -> tuple[int, ...]:
    if table is None:
        return _NO_OPERAND
    row, token = rotation_strides(table)
    return table.data_ptr(), row, 0, token, 1


def _told_caches(caches: Caches) -> tuple[int, ...]:
    states = [(each.data_ptr(), *each.stride()[:2], 0, 1) for each in (caches.key_state, caches.value_state)]
    return *_told(caches.key_slots), *_told(caches.value_slots), *states[0], *states[1]


def _outside(caches: Caches | None, tokens: int, b: int) -> IndexError:
    assert caches is not None
    row, position = int(caches.rows[b]), int(caches.position[b])
    count = tokens if caches.lengths is None else int(caches.lengths[b])
    return IndexError(
        f"{count} of {tokens} tokens at position {position} of row {row} are no step over caches of {caches.key_slots.size(0)} rows: rows "
        "and positions count from 0, and no more tokens are real than there are"
    )
