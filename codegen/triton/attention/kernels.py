"""The kernels in Triton. Importing this imports triton.

Rows of a tile of queries are r = t * GROUP + g: query t of the g-th head that reads the same keys. Addresses are int64: a cache may have
more than 2^31 elements. Slots that no query sees are not read.
"""

import os

import triton
import triton.language as tl

INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")


@triton.jit
def dot(a, b):
    """a @ b in float32; the interpreter has no bfloat16 and would multiply its bits."""
    if INTERPRETED:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), input_precision="ieee")
    else:
        return tl.dot(a, b, input_precision="ieee")


@triton.jit
def attend(
    q_ptr, k_ptr, v_ptr, position_ptr, rows_ptr, y_ptr, stats_ptr,
    q_row, q_head, q_query, k_row, k_head, k_slot, v_row, v_head, v_slot,
    kv_heads, queries, capacity, cache_rows, scale, softcap,
    GROUP: tl.constexpr, DEPTH: tl.constexpr, WIDTH: tl.constexpr, WINDOW: tl.constexpr, IS_RING: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr, IS_SPLIT: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """One split of the slots that a tile of queries sees, for one row and head of the cache, as in FlashAttention (arXiv 2205.14135).

    y [B, T, H, WIDTH], or where IS_SPLIT the sums of exp(score - largest) v, float32 [splits, B, T, H, WIDTH], with stats
    [splits, B, T, H, 2]: the largest score and the sum of exp(score - largest).
    """
    b = (tl.program_id(0) // kv_heads).to(tl.int64)
    head = (tl.program_id(0) % kv_heads).to(tl.int64)
    r = tl.program_id(1) * BLOCK_Q + tl.arange(0, BLOCK_Q)  # [BQ]
    t = r // GROUP
    in_q = r < queries * GROUP
    d = tl.arange(0, BLOCK_D)  # [BD]
    e = tl.arange(0, BLOCK_E)  # [BE]
    row = tl.load(rows_ptr + b)
    position = tl.load(position_ptr + b)
    is_inside = (row >= 0) & (row < cache_rows)
    of_query = (head * GROUP + r % GROUP) * q_head + t * q_query.to(tl.int64)
    q = tl.load(q_ptr + b * q_row + of_query[:, None] + d[None, :], mask=in_q[:, None] & (d < DEPTH)[None, :], other=0.0)  # [BQ, BD]
    last = position + t
    end = position + tl.minimum((tl.program_id(1) * BLOCK_Q + BLOCK_Q - 1) // GROUP, queries - 1) + 1
    if not IS_RING:
        end = tl.minimum(end, capacity)
    begin = position * 0
    if WINDOW > 0:
        begin = tl.maximum(begin, position + tl.program_id(1) * BLOCK_Q // GROUP - WINDOW + 1)
    end = tl.where(is_inside & (position >= 0), end, begin)
    if IS_SPLIT:
        span = tl.cdiv(tl.cdiv(tl.maximum(end - begin, 0), tl.num_programs(2)), BLOCK_S) * BLOCK_S
        begin += tl.program_id(2) * span
        end = tl.minimum(end, begin + span)
    largest = tl.full([BLOCK_Q], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_Q], tl.float32)
    sums = tl.zeros([BLOCK_Q, BLOCK_E], tl.float32)
    keys = k_ptr + row * k_row + head * k_head
    values = v_ptr + row * v_row + head * v_head
    at = (begin % capacity).to(tl.int32)  # the slot of a block's first position in a ring
    for start in range(begin, end, BLOCK_S):
        j = start + tl.arange(0, BLOCK_S).to(tl.int64)  # [BS]
        is_live = j < end
        slot = j
        if IS_RING:  # which a block goes around once at most
            slot = at + tl.arange(0, BLOCK_S)
            slot = tl.where(slot >= capacity, slot - capacity, slot).to(tl.int64)
            at = tl.where(at + BLOCK_S >= capacity, at + BLOCK_S - capacity, at + BLOCK_S)
        k = tl.load(keys + slot[None, :] * k_slot + d[:, None], mask=is_live[None, :] & (d < DEPTH)[:, None], other=0.0)  # [BD, BS]
        score = dot(q, k) * scale  # [BQ, BS]
        if HAS_SOFTCAP:
            score = softcap * (2.0 * tl.sigmoid(2.0 * score / softcap) - 1.0)
        is_visible = (j[None, :] <= last[:, None]) & is_live[None, :]
        if WINDOW > 0:
            is_visible = is_visible & (j[None, :] > last[:, None] - WINDOW)
        score = tl.where(is_visible, score, float("-inf"))
        new = tl.maximum(largest, tl.max(score, 1))
        base = tl.where(new == float("-inf"), 0.0, new)  # a query may see no slot of a block
        weight = tl.exp(score - base[:, None])
        factor = tl.exp(largest - base)
        v = tl.load(values + slot[:, None] * v_slot + e[None, :], mask=is_live[:, None] & (e < WIDTH)[None, :], other=0.0)  # [BS, BE]
        sums = sums * factor[:, None] + dot(weight.to(v.dtype), v)
        total = total * factor + tl.sum(weight, 1)
        largest = new
    place = (b * queries + t) * (kv_heads * GROUP) + head * GROUP + r % GROUP  # [BQ]
    mask = in_q[:, None] & (e < WIDTH)[None, :]
    if IS_SPLIT:
        place += tl.program_id(2).to(tl.int64) * (tl.num_programs(0) * queries * GROUP)
        tl.store(stats_ptr + place * 2, largest, mask=in_q)
        tl.store(stats_ptr + place * 2 + 1, total, mask=in_q)
        tl.store(y_ptr + place[:, None] * WIDTH + e[None, :], sums, mask=mask)
    else:
        tl.store(y_ptr + place[:, None] * WIDTH + e[None, :], (sums / total[:, None]).to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def join(
    sums_ptr, stats_ptr, y_ptr, places, splits,
    WIDTH: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """y = sum over splits of exp(largest - L) sums / sum of exp(largest - L) totals, L the largest of all: Flash-Decoding's second step.
    A program joins BLOCK_N places of y [places, WIDTH]."""
    n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    e = tl.arange(0, BLOCK_E)
    in_n = n < places
    mask = in_n[:, None] & (e < WIDTH)[None, :]
    largest = tl.full([BLOCK_N], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_N], tl.float32)
    sums = tl.zeros([BLOCK_N, BLOCK_E], tl.float32)
    for split in range(splits):
        place = split * places.to(tl.int64) + n
        here = tl.load(stats_ptr + place * 2, mask=in_n, other=0.0)
        new = tl.maximum(largest, here)
        base = tl.where(new == float("-inf"), 0.0, new)
        before, after = tl.exp(largest - base), tl.exp(here - base)
        total = total * before + tl.load(stats_ptr + place * 2 + 1, mask=in_n, other=1.0) * after
        sums = sums * before[:, None] + tl.load(sums_ptr + place[:, None] * WIDTH + e[None, :], mask=mask, other=0.0) * after[:, None]
        largest = new
    tl.store(y_ptr + n[:, None] * WIDTH + e[None, :], (sums / total[:, None]).to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def append(
    to_ptr, from_ptr, position_ptr, rows_ptr, to_row, to_head, to_slot, from_row, from_head, from_slot,
    heads, slots, capacity, cache_rows,
    DEPTH: tl.constexpr, IS_RING: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """to[rows[b], h, position[b] + i] = from[b, h, i], for one b and h and BLOCK_T neighbours i; in a ring the slot modulo its slots."""
    b = (tl.program_id(0) // heads).to(tl.int64)
    head = (tl.program_id(0) % heads).to(tl.int64)
    i = tl.program_id(1) * BLOCK_T + tl.arange(0, BLOCK_T).to(tl.int64)
    d = tl.arange(0, BLOCK_D)
    row = tl.load(rows_ptr + b)
    slot = tl.load(position_ptr + b) + i
    is_inside = (i < slots) & (slot >= 0) & (row >= 0) & (row < cache_rows)
    if IS_RING:
        slot = slot % capacity
    is_inside = is_inside & (slot < capacity)
    mask = is_inside[:, None] & (d < DEPTH)[None, :]
    new = tl.load(from_ptr + b * from_row + head * from_head + i[:, None] * from_slot + d[None, :], mask=mask)
    tl.store(to_ptr + row * to_row + head * to_head + slot[:, None] * to_slot + d[None, :], new, mask=mask)
