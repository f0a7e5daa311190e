"""The kernels in Triton. Importing this imports triton.

A stream is a row and head of keys. Scratch has for each, in the model's dtype, `tokens` rows of what is near and after them, for local
"raw", final states; as keys and as values. Rows of a tile of queries are r = t * GROUP + g. Where a row lies outside of the caches, results
are NaN and nothing is written.
"""

import triton
import triton.language as tl

from .parts import gates, near_begin, open_chunk, partner, rotation, visit


@triton.jit
def scan(
    k_ptr, v_ptr, gate_ptr, bias_ptr, cos_ptr, sin_ptr, key_state_ptr, value_state_ptr, position_ptr, rows_ptr, lengths_ptr,
    near_k_ptr, near_v_ptr, last_ptr,
    k_row, k_head, k_token, v_row, v_head, v_token, gate_row, gate_head, gate_token, gate_channel,
    bias_token, bias_head, bias_channel, cos_row, cos_token, sin_row, sin_token, ks_row, ks_head, vs_row, vs_head,
    kv_heads, tokens, rows_of_scratch, cache_rows,
    DEPTH: tl.constexpr, TURNED: tl.constexpr, INTERLEAVED: tl.constexpr, CHUNK: tl.constexpr, SEGMENT: tl.constexpr, IS_RAW: tl.constexpr,
    RESETS: tl.constexpr, HAS_BIAS: tl.constexpr, IS_CACHED: tl.constexpr, HAS_LENGTHS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """The states of one segment of a stream: s[t] = g[t] s[t-1] + (1 - g[t]) x[t]. A segment is whole chunks, or with no resets all tokens.

    Each channel of the keys runs the recurrence of its partner too, so that turning needs no exchange between threads.
    """
    stream = tl.program_id(0).to(tl.int64)
    b, head = stream // kv_heads, stream % kv_heads
    d = tl.arange(0, BLOCK_D)
    mask = d < DEPTH
    other = partner(d, TURNED, INTERLEAVED)
    start, row, count = b * 0, b * 0, tokens
    is_inside = b >= 0
    if IS_CACHED:
        start, row = tl.load(position_ptr + b), tl.load(rows_ptr + b)
        is_inside = (row >= 0) & (row < cache_rows) & (start >= 0)
        start = tl.where(is_inside, start, 0)
        if HAS_LENGTHS:
            count = tl.load(lengths_ptr + b)
    begin, end = start, start + tokens
    if RESETS:
        begin = tl.maximum(start, (start // SEGMENT + tl.program_id(1)) * SEGMENT)
        end = tl.minimum(end, (start // SEGMENT + tl.program_id(1) + 1) * SEGMENT)
    key, turner, value = tl.zeros([BLOCK_D], tl.float32), tl.zeros([BLOCK_D], tl.float32), tl.zeros([BLOCK_D], tl.float32)
    if IS_CACHED:
        goes_on = is_inside & (begin == start) & (start > 0)
        if RESETS:
            goes_on = goes_on & (start % CHUNK != 0)
        from_k, from_v = key_state_ptr + row * ks_row + head * ks_head, value_state_ptr + row * vs_row + head * vs_head
        key = tl.load(from_k + d, mask=mask & goes_on, other=0.0)
        turner = tl.load(from_k + other, mask=mask & goes_on, other=0.0)
        value = tl.load(from_v + d, mask=mask & goes_on, other=0.0)
    for t in range(begin, end):
        i = t - start
        of_k, of_gate = b * k_row + head * k_head + i * k_token, b * gate_row + head * gate_head + i * gate_token
        of_bias = (t % CHUNK) * bias_token + head * bias_head
        k = tl.load(k_ptr + of_k + d, mask=mask, other=0.0).to(tl.float32)
        k_other = tl.load(k_ptr + of_k + other, mask=mask, other=0.0).to(tl.float32)
        v = tl.load(v_ptr + b * v_row + head * v_head + i * v_token + d, mask=mask, other=0.0).to(tl.float32)
        opened, shut = gates(gate_ptr, bias_ptr, of_gate, gate_channel, of_bias, bias_channel, d, mask, HAS_BIAS)
        opened_other, shut_other = gates(gate_ptr, bias_ptr, of_gate, gate_channel, of_bias, bias_channel, other, mask, HAS_BIAS)
        goes_on = t > 0
        if RESETS:
            goes_on = t % CHUNK != 0
        key = tl.where(goes_on, opened * key, 0.0) + shut * k
        turner = tl.where(goes_on, opened_other * turner, 0.0) + shut_other * k_other
        value = tl.where(goes_on, opened * value, 0.0) + shut * v
        cos, sin = rotation(cos_ptr, sin_ptr, b * cos_row + i * cos_token, b * sin_row + i * sin_token, d, mask, TURNED, INTERLEAVED)
        at = (stream * rows_of_scratch + i) * DEPTH + d
        turned = key * cos + turner * sin
        if IS_RAW:
            tl.store(near_k_ptr + at, (k * cos + k_other * sin).to(near_k_ptr.dtype.element_ty), mask=mask)
            tl.store(near_v_ptr + at, v.to(near_v_ptr.dtype.element_ty), mask=mask)
            final = (stream * rows_of_scratch + tokens + t // CHUNK - start // CHUNK) * DEPTH + d
            is_final = mask & ((t + 1) % CHUNK == 0)
            tl.store(near_k_ptr + final, turned.to(near_k_ptr.dtype.element_ty), mask=is_final)
            tl.store(near_v_ptr + final, value.to(near_v_ptr.dtype.element_ty), mask=is_final)
        else:
            tl.store(near_k_ptr + at, turned.to(near_k_ptr.dtype.element_ty), mask=mask)
            tl.store(near_v_ptr + at, value.to(near_v_ptr.dtype.element_ty), mask=mask)
        if IS_CACHED:
            is_last = mask & (i == count - 1)
            tl.store(last_ptr + 2 * stream * DEPTH + d, key, mask=is_last)
            tl.store(last_ptr + (2 * stream + 1) * DEPTH + d, value, mask=is_last)


@triton.jit
def flash(
    q_ptr, near_k_ptr, near_v_ptr, cos_ptr, sin_ptr, key_slots_ptr, value_slots_ptr, position_ptr, rows_ptr, y_ptr,
    q_row, q_head, q_token, cos_row, cos_token, sin_row, sin_token, k_row, k_head, k_slot, v_row, v_head, v_slot,
    kv_heads, tokens, rows_of_scratch, cache_rows, slots, scale, summary_bias,
    GROUP: tl.constexpr, DEPTH: tl.constexpr, TURNED: tl.constexpr, INTERLEAVED: tl.constexpr, CHUNK: tl.constexpr, WINDOW: tl.constexpr,
    SINKS: tl.constexpr, IS_RAW: tl.constexpr, IS_CACHED: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Attention of a tile of queries of one stream: y [B, T, H, DEPTH]. A query's own token, which it always sees, begins its sums."""
    stream = tl.program_id(0).to(tl.int64)
    b, head = stream // kv_heads, stream % kv_heads
    r = tl.program_id(1) * BLOCK_Q + tl.arange(0, BLOCK_Q)  # [BQ]
    i = (r // GROUP).to(tl.int64)
    in_q = r < tokens * GROUP
    d = tl.arange(0, BLOCK_D)
    mask = in_q[:, None] & (d < DEPTH)[None, :]
    start, row = b * 0, b * 0
    is_inside = b >= 0
    if IS_CACHED:
        start, row = tl.load(position_ptr + b), tl.load(rows_ptr + b)
        is_inside = (row >= 0) & (row < cache_rows) & (start >= 0)
        start = tl.where(is_inside, start, 0)
    other = partner(d, TURNED, INTERLEAVED)
    of_query = b * q_row + (head * GROUP + r % GROUP) * q_head + i * q_token
    wide = tl.load(q_ptr + of_query[:, None] + d[None, :], mask=mask, other=0.0).to(tl.float32)  # [BQ, BD]
    if TURNED > 0:
        wide_other = tl.load(q_ptr + of_query[:, None] + other[None, :], mask=mask, other=0.0).to(tl.float32)
        of_cos, of_sin = (b * cos_row + i * cos_token)[:, None], (b * sin_row + i * sin_token)[:, None]
        cos, sin = rotation(cos_ptr, sin_ptr, of_cos, of_sin, d[None, :], mask, TURNED, INTERLEAVED)
        wide = wide * cos + wide_other * sin
    keys, values = near_k_ptr + stream * rows_of_scratch * DEPTH, near_v_ptr + stream * rows_of_scratch * DEPTH
    own = tl.load(keys + i[:, None] * DEPTH + d[None, :], mask=mask, other=0.0).to(tl.float32)
    largest = tl.sum(wide * own, 1) * scale
    total = tl.full([BLOCK_Q], 1.0, tl.float32)
    sums = tl.load(values + i[:, None] * DEPTH + d[None, :], mask=mask, other=0.0).to(tl.float32)
    q = wide.to(q_ptr.dtype.element_ty)
    t = start + i
    first = start + tl.program_id(1).to(tl.int64) * BLOCK_Q // GROUP
    end = start + tl.minimum((tl.program_id(1).to(tl.int64) * BLOCK_Q + BLOCK_Q - 1) // GROUP + 1, tokens)
    opens, low = open_chunk(end - 1, CHUNK, WINDOW), near_begin(first, CHUNK, WINDOW, SINKS, IS_RAW)
    if IS_CACHED:
        summaries = slots - SINKS - WINDOW - (CHUNK if IS_RAW else 1)
        sinks = tl.minimum(start, SINKS)
        chunks = tl.maximum(tl.minimum(tl.minimum(opens, start // CHUNK), summaries) - SINKS // CHUNK, 0)
        stop = tl.where(is_inside, sinks + chunks + tl.maximum(start - low, 0), 0)
        old_keys, old_values = key_slots_ptr + row * k_row + head * k_head, value_slots_ptr + row * v_row + head * v_head
        largest, total, sums = visit(
            q, t, largest, total, sums, old_keys, old_values, k_slot, v_slot, start * 0, sinks, start * 0 + SINKS // CHUNK, chunks, low,
            start * 0, stop, start, tokens, summaries, scale, summary_bias, d, d,
            DEPTH, CHUNK, WINDOW, SINKS, IS_RAW, False, BLOCK_S,
        )  # fmt: skip
    sinks = tl.maximum(tl.minimum(end - 1, SINKS) - start, 0)
    first_chunk = tl.maximum(start // CHUNK, SINKS // CHUNK)
    chunks = tl.maximum(opens - first_chunk, 0)
    first_near = tl.maximum(low, start)
    stop = sinks + chunks
    if IS_RAW or WINDOW > 0:
        stop += tl.maximum(end - 1 - first_near, 0)
    largest, total, sums = visit(
        q, t, largest, total, sums, keys, values, DEPTH, DEPTH, start, sinks, first_chunk, chunks, first_near,
        start * 0, stop, start, tokens, 0, scale, summary_bias, d, d,
        DEPTH, CHUNK, WINDOW, SINKS, IS_RAW, True, BLOCK_S,
    )  # fmt: skip
    total = tl.where(is_inside, total, float("nan"))
    place = (b * tokens + i) * (kv_heads * GROUP) + head * GROUP + r % GROUP
    tl.store(y_ptr + place[:, None] * DEPTH + d[None, :], (sums / total[:, None]).to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def keep(
    near_k_ptr, near_v_ptr, last_ptr, key_slots_ptr, value_slots_ptr, key_state_ptr, value_state_ptr, position_ptr, rows_ptr, lengths_ptr,
    k_row, k_head, k_slot, v_row, v_head, v_slot, ks_row, ks_head, vs_row, vs_head,
    kv_heads, tokens, rows_of_scratch, cache_rows, slots,
    DEPTH: tl.constexpr, CHUNK: tl.constexpr, WINDOW: tl.constexpr, SINKS: tl.constexpr, IS_RAW: tl.constexpr, HAS_LENGTHS: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Writes what the caches keep of BLOCK_T tokens of a stream, after all queries have read."""
    stream = tl.program_id(0).to(tl.int64)
    b, head = stream // kv_heads, stream % kv_heads
    RING: tl.constexpr = WINDOW + (CHUNK if IS_RAW else 1)
    start, row = tl.load(position_ptr + b), tl.load(rows_ptr + b)
    count = start * 0 + tokens
    if HAS_LENGTHS:
        count = tl.minimum(tl.load(lengths_ptr + b), tokens)
    is_inside = (row >= 0) & (row < cache_rows) & (start >= 0)
    i = tl.program_id(1).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)  # [BT]
    d = tl.arange(0, BLOCK_D)
    is_kept = is_inside & (i < count)
    t = tl.maximum(start, 0) + i
    at = (stream * rows_of_scratch + i)[:, None] * DEPTH + d[None, :]
    mask = is_kept[:, None] & (d < DEPTH)[None, :]
    k = tl.load(near_k_ptr + at, mask=mask, other=0.0)  # [BT, BD]
    v = tl.load(near_v_ptr + at, mask=mask, other=0.0)
    keys = key_slots_ptr + row * k_row + head * k_head + d[None, :]
    values = value_slots_ptr + row * v_row + head * v_head + d[None, :]
    if SINKS > 0:
        is_sink = mask & (t < SINKS)[:, None]
        tl.store(keys + t[:, None] * k_slot, k, mask=is_sink)
        tl.store(values + t[:, None] * v_slot, v, mask=is_sink)
    in_ring = mask & (t >= start + count - RING)[:, None]
    place = (slots - RING + t % RING)[:, None]
    tl.store(keys + place * k_slot, k, mask=in_ring)
    tl.store(values + place * v_slot, v, mask=in_ring)
    is_final = mask & (((t + 1) % CHUNK == 0) & (t // CHUNK < slots - RING - SINKS))[:, None]
    if IS_RAW:
        final = (stream * rows_of_scratch + tokens + t // CHUNK - start // CHUNK)[:, None] * DEPTH + d[None, :]
        k = tl.load(near_k_ptr + final, mask=is_final, other=0.0)
        v = tl.load(near_v_ptr + final, mask=is_final, other=0.0)
    place = (SINKS + t // CHUNK)[:, None]
    tl.store(keys + place * k_slot, k, mask=is_final)
    tl.store(values + place * v_slot, v, mask=is_final)
    if tl.program_id(1) == 0:
        is_new = is_inside & ((count > 0) | (start == 0)) & (d < DEPTH)  # of a row that has seen nothing the states are 0
        key = tl.load(last_ptr + 2 * stream * DEPTH + d, mask=is_new & (count > 0), other=0.0)
        value = tl.load(last_ptr + (2 * stream + 1) * DEPTH + d, mask=is_new & (count > 0), other=0.0)
        tl.store(key_state_ptr + row * ks_row + head * ks_head + d, key, mask=is_new)
        tl.store(value_state_ptr + row * vs_row + head * vs_head + d, value, mask=is_new)


@triton.jit
def decode(
    q_ptr, k_ptr, v_ptr, gate_ptr, bias_ptr, cos_ptr, sin_ptr, key_slots_ptr, value_slots_ptr, key_state_ptr, value_state_ptr,
    position_ptr, rows_ptr, lengths_ptr, y_ptr, stats_ptr,
    q_row, q_head, new_k_row, new_k_head, new_v_row, new_v_head, gate_row, gate_head, gate_channel, bias_token, bias_head, bias_channel,
    cos_row, sin_row, k_row, k_head, k_slot, v_row, v_head, v_slot, ks_row, ks_head, vs_row, vs_head,
    kv_heads, cache_rows, slots, scale, summary_bias,
    GROUP: tl.constexpr, DEPTH: tl.constexpr, TURNED: tl.constexpr, INTERLEAVED: tl.constexpr, CHUNK: tl.constexpr, WINDOW: tl.constexpr,
    SINKS: tl.constexpr, IS_RAW: tl.constexpr, RESETS: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_LENGTHS: tl.constexpr,
    IS_SPLIT: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """A step of one token of a stream, all in one: state, rotation, slots, attention. The slots that a query sees are shared by splits, of
    which the first has the new token, in registers, and writes what stays of it: nobody reads these slots in this step.

    y [B, H, DEPTH], or where IS_SPLIT sums and stats as of `attention.kernels.attend`.
    """
    stream = tl.program_id(0).to(tl.int64)
    b, head = stream // kv_heads, stream % kv_heads
    RING: tl.constexpr = WINDOW + (CHUNK if IS_RAW else 1)
    r = tl.arange(0, BLOCK_Q)
    d = tl.arange(0, BLOCK_D)
    mask, in_q = d < DEPTH, r < GROUP
    t, row = tl.load(position_ptr + b), tl.load(rows_ptr + b)
    count = t * 0 + 1
    if HAS_LENGTHS:
        count = tl.load(lengths_ptr + b)
    is_inside = (row >= 0) & (row < cache_rows) & (t >= 0)
    t = tl.where(is_inside, t, 0)
    is_first = tl.program_id(1) == 0
    other = partner(d, TURNED, INTERLEAVED)
    cos, sin = rotation(cos_ptr, sin_ptr, b * cos_row, b * sin_row, d, mask, TURNED, INTERLEAVED)
    of_query = b * q_row + (head * GROUP + r) * q_head
    wide = tl.load(q_ptr + of_query[:, None] + d[None, :], mask=in_q[:, None] & mask[None, :], other=0.0).to(tl.float32)
    if TURNED > 0:
        wide_other = tl.load(q_ptr + of_query[:, None] + other[None, :], mask=in_q[:, None] & mask[None, :], other=0.0).to(tl.float32)
        wide = wide * cos[None, :] + wide_other * sin[None, :]
    goes_on = t > 0
    if RESETS:
        goes_on = t % CHUNK != 0
    to_k, to_v = key_state_ptr + row * ks_row + head * ks_head, value_state_ptr + row * vs_row + head * vs_head
    is_read = mask & goes_on & is_inside & is_first
    key, value = tl.load(to_k + d, mask=is_read, other=0.0), tl.load(to_v + d, mask=is_read, other=0.0)
    turner = tl.load(to_k + other, mask=is_read, other=0.0)
    of_gate, of_bias = b * gate_row + head * gate_head, (t % CHUNK) * bias_token + head * bias_head
    opened, shut = gates(gate_ptr, bias_ptr, of_gate, gate_channel, of_bias, bias_channel, d, mask, HAS_BIAS)
    opened_other, shut_other = gates(gate_ptr, bias_ptr, of_gate, gate_channel, of_bias, bias_channel, other, mask, HAS_BIAS)
    of_k = b * new_k_row + head * new_k_head
    k = tl.load(k_ptr + of_k + d, mask=mask, other=0.0).to(tl.float32)
    k_other = tl.load(k_ptr + of_k + other, mask=mask, other=0.0).to(tl.float32)
    v = tl.load(v_ptr + b * new_v_row + head * new_v_head + d, mask=mask, other=0.0).to(tl.float32)
    key, turner, value = opened * key + shut * k, opened_other * turner + shut_other * k_other, opened * value + shut * v
    turned = key * cos + turner * sin
    near_k, near_v = turned, value
    if IS_RAW:
        near_k, near_v = k * cos + k_other * sin, v
    tl.debug_barrier()  # a thread has read the partner's state before another one writes it
    is_kept = mask & is_inside & is_first & (count > 0)
    is_new = mask & is_inside & is_first & ((count > 0) | (t == 0))
    tl.store(to_k + d, tl.where(count > 0, key, 0.0), mask=is_new)
    tl.store(to_v + d, tl.where(count > 0, value, 0.0), mask=is_new)
    keys, values = key_slots_ptr + row * k_row + head * k_head, value_slots_ptr + row * v_row + head * v_head
    dtype = key_slots_ptr.dtype.element_ty
    summaries = slots - SINKS - RING
    tl.store(keys + t * k_slot + d, near_k.to(dtype), mask=is_kept & (t < SINKS))
    tl.store(values + t * v_slot + d, near_v.to(dtype), mask=is_kept & (t < SINKS))
    place = SINKS + summaries + t % RING
    tl.store(keys + place * k_slot + d, near_k.to(dtype), mask=is_kept)
    tl.store(values + place * v_slot + d, near_v.to(dtype), mask=is_kept)
    is_final = is_kept & ((t + 1) % CHUNK == 0) & (t // CHUNK < summaries)
    place = SINKS + t // CHUNK
    tl.store(keys + place * k_slot + d, turned.to(dtype), mask=is_final)
    tl.store(values + place * v_slot + d, value.to(dtype), mask=is_final)

    largest = tl.where(is_first, tl.sum(wide * near_k[None, :], 1) * scale, float("-inf"))
    total = tl.where(is_first, 1.0, 0.0) + tl.zeros([BLOCK_Q], tl.float32)
    sums = tl.where(is_first, near_v[None, :], 0.0) + tl.zeros([BLOCK_Q, BLOCK_D], tl.float32)
    low = near_begin(t, CHUNK, WINDOW, SINKS, IS_RAW)
    sinks = tl.minimum(t, SINKS)
    chunks = tl.maximum(tl.minimum(open_chunk(t, CHUNK, WINDOW), summaries) - SINKS // CHUNK, 0)
    begin, end = t * 0, tl.where(is_inside, sinks + chunks + tl.maximum(t - low, 0), 0)
    if IS_SPLIT:
        span = tl.cdiv(tl.cdiv(end, tl.num_programs(1)), BLOCK_S) * BLOCK_S
        begin += tl.program_id(1) * span
        end = tl.minimum(end, begin + span)
    largest, total, sums = visit(
        wide.to(dtype), t + r * 0, largest, total, sums, keys, values, k_slot, v_slot, t * 0, sinks, t * 0 + SINKS // CHUNK, chunks, low,
        begin, end, t, 1, summaries, scale, summary_bias, d, d,
        DEPTH, CHUNK, WINDOW, SINKS, IS_RAW, False, BLOCK_S,
    )  # fmt: skip
    total = tl.where(is_inside, total, float("nan"))
    place = b * (kv_heads * GROUP) + head * GROUP + r
    mask_y = in_q[:, None] & mask[None, :]
    if IS_SPLIT:
        place += tl.program_id(1).to(tl.int64) * (tl.num_programs(0) * GROUP)
        tl.store(stats_ptr + place * 2, largest, mask=in_q)
        tl.store(stats_ptr + place * 2 + 1, total, mask=in_q)
        tl.store(y_ptr + place[:, None] * DEPTH + d[None, :], sums, mask=mask_y)
    else:
        tl.store(y_ptr + place[:, None] * DEPTH + d[None, :], (sums / total[:, None]).to(y_ptr.dtype.element_ty), mask=mask_y)
