"""What the kernels in Triton share: rotations, gates, which tokens a query sees, and attention over them. Importing this imports triton.

Times, and numbers of tokens and chunks, are int64 as addresses are. Keys that queries see are numbered in one row: sinks (numbers are
times), summaries (numbers are chunks), near tokens (times again); what lies in slots and what is new, in scratch, are two such rows.
"""

import triton
import triton.language as tl

from ..attention.kernels import dot


@triton.jit
def open_chunk(t, CHUNK: tl.constexpr, WINDOW: tl.constexpr):
    """The first chunk that is no summary to a query at t."""
    return tl.maximum(t - WINDOW, 0) // CHUNK


@triton.jit
def near_begin(t, CHUNK: tl.constexpr, WINDOW: tl.constexpr, SINKS: tl.constexpr, IS_RAW: tl.constexpr):
    """The first token beside the sinks that is near a query at t."""
    if IS_RAW:
        return tl.maximum(open_chunk(t, CHUNK, WINDOW) * CHUNK, SINKS)
    else:
        return tl.maximum(t - WINDOW, SINKS)


@triton.jit
def partner(d, TURNED: tl.constexpr, INTERLEAVED: tl.constexpr):
    """The channel that each is turned with; itself where nothing turns it."""
    if INTERLEAVED:
        other = d ^ 1
    else:
        other = tl.where(d < TURNED // 2, d + TURNED // 2, d - TURNED // 2)
    return tl.where(d < TURNED, other, d)


@triton.jit
def rotation(cos_ptr, sin_ptr, cos_at, sin_at, d, mask, TURNED: tl.constexpr, INTERLEAVED: tl.constexpr):
    """What a channel and its partner are multiplied with: rows of the tables begin at `cos_at` and `sin_at`."""
    is_turned = mask & (d < TURNED)
    cos = tl.load(cos_ptr + cos_at + d, mask=is_turned, other=1.0).to(tl.float32)
    sin = tl.load(sin_ptr + sin_at + d, mask=is_turned, other=0.0).to(tl.float32)
    is_first = d % 2 == 0 if INTERLEAVED else d < TURNED // 2
    return cos, tl.where(is_first, -sin, sin)


@triton.jit
def gates(gate_ptr, bias_ptr, at, step, bias_at, bias_step, d, mask, HAS_BIAS: tl.constexpr):
    """sigmoid and 1 - sigmoid of the logits of channels d, each with its own digits."""
    logit = tl.load(gate_ptr + at + d * step, mask=mask, other=0.0).to(tl.float32)
    if HAS_BIAS:
        logit += tl.load(bias_ptr + bias_at + d * bias_step, mask=mask, other=0.0).to(tl.float32)
    return tl.sigmoid(logit), tl.sigmoid(-logit)


@triton.jit
def visit(
    q, t, largest, total, sums, keys, values, k_slot, v_slot, first_sink, sinks, first_chunk, chunks, first_near, begin, end,
    start_time, tokens, summaries, scale, summary_bias, d, e,
    DEPTH: tl.constexpr, CHUNK: tl.constexpr, WINDOW: tl.constexpr, SINKS: tl.constexpr, IS_RAW: tl.constexpr, IS_NEW: tl.constexpr,
    BLOCK_S: tl.constexpr,
):  # fmt: skip
    """Adds to the sums of queries q [BQ, BD] at times t [BQ] what they see of keys [begin, end) of a row: `sinks` from number `first_sink`
    on, `chunks` from `first_chunk` on, and near tokens from `first_near` on, as in FlashAttention (arXiv 2205.14135)."""
    RING: tl.constexpr = WINDOW + (CHUNK if IS_RAW else 1)
    opens = open_chunk(t, CHUNK, WINDOW)  # [BQ]
    low = near_begin(t, CHUNK, WINDOW, SINKS, IS_RAW)
    for first in range(begin, end, BLOCK_S):
        i = first + tl.arange(0, BLOCK_S).to(tl.int64)  # [BS]
        is_live = i < end
        is_summary = (i >= sinks) & (i < sinks + chunks)
        near = first_near + i - sinks - chunks
        number = tl.where(i < sinks, first_sink + i, tl.where(is_summary, first_chunk + i - sinks, near))
        if IS_NEW:
            final = tokens + number - start_time // CHUNK if IS_RAW else (number + 1) * CHUNK - 1 - start_time
            place = tl.where(is_summary, final, number - start_time)
        else:
            place = tl.where(i < sinks, number, SINKS + tl.where(is_summary, number, summaries + number % RING))
        k = tl.load(keys + place[None, :] * k_slot + d[:, None], mask=is_live[None, :] & (d < DEPTH)[:, None], other=0.0)  # [BD, BS]
        score = dot(q, k) * scale + tl.where(is_summary, summary_bias, 0.0)[None, :]  # [BQ, BS]
        is_near = (number[None, :] < t[:, None]) & ((number < SINKS)[None, :] | (number[None, :] >= low[:, None]))
        is_visible = tl.where(is_summary[None, :], number[None, :] < opens[:, None], is_near) & is_live[None, :]
        score = tl.where(is_visible, score, float("-inf"))
        new = tl.maximum(largest, tl.max(score, 1))
        base = tl.where(new == float("-inf"), 0.0, new)  # a part of the keys may have none that a query sees
        weight = tl.exp(score - base[:, None])
        factor = tl.exp(largest - base)
        v = tl.load(values + place[:, None] * v_slot + e[None, :], mask=is_live[:, None] & (e < DEPTH)[None, :], other=0.0)  # [BS, BD]
        sums = sums * factor[:, None] + dot(weight.to(v.dtype), v)
        total = total * factor + tl.sum(weight, 1)
        largest = new
    return largest, total, sums
