"""The kernels in Triton. Importing this imports triton.

Rows that experts multiply lie one expert after the other: rows of expert e end before ends[e], or where IS_EVEN each has `each` of them. A
program has a tile of BLOCK_M rows of one expert, and a place in the grid. Where ends are known to the GPU alone, there are more places than
tiles, and programs without a tile leave at once: expert e has those from begin // BLOCK_M + e on, enough for all its tiles as
floor(a) + ceil(b) <= floor(a + b) + 1, or where IS_FEW there is a place for each row. The last are for the rows behind all experts.
"""

import triton
import triton.language as tl

from ..attention.kernels import dot


@triton.jit
def sort(index_ptr, order_ptr, ends_ptr, pairs, BLOCK: tl.constexpr):
    """order [pairs] are the numbers of pairs of token and choice, by the experts that index [pairs] gives and each expert's in their order;
    ends [E]. A program counts what comes before the pairs of one expert, and places these. Pairs of no expert are in no place."""
    expert = tl.program_id(0)
    before = tl.zeros([BLOCK], tl.int32)
    for start in range(0, pairs, BLOCK):
        pair = start + tl.arange(0, BLOCK)
        chosen = tl.load(index_ptr + pair, mask=pair < pairs, other=-1)
        before += ((chosen >= 0) & (chosen < expert)).to(tl.int32)
    place = tl.sum(before, 0)
    for start in range(0, pairs, BLOCK):
        pair = start + tl.arange(0, BLOCK)
        chosen = tl.load(index_ptr + pair, mask=pair < pairs, other=-1)
        is_own = (chosen == expert).to(tl.int32)
        tl.store(order_ptr + place + tl.cumsum(is_own, 0) - 1, pair, mask=is_own > 0)
        place += tl.sum(is_own, 0)
    tl.store(ends_ptr + expert, place)


@triton.jit
def rows_of(
    place, ends_ptr, experts, each, total, IS_EVEN: tl.constexpr, IS_FEW: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_E: tl.constexpr
):
    """(expert, which of its rows is the tile's first, how many it has, which of all its first is) of a place; no rows where it has no tile.
    Where the expert is `experts`, the rows are those behind all experts."""
    if IS_EVEN:
        tiles = tl.cdiv(each, BLOCK_M)
        expert = place // tiles
        return expert, place % tiles * BLOCK_M, each, expert.to(tl.int64) * each
    else:
        e = tl.arange(0, BLOCK_E)
        ends = tl.minimum(tl.maximum(tl.load(ends_ptr + e, mask=e < experts, other=0), 0), total).to(tl.int32)
        is_before = (ends if IS_FEW else ends // BLOCK_M + e + 1) <= place
        is_before = is_before & (e < experts)
        expert = tl.sum(is_before.to(tl.int32), 0)
        begin = tl.max(tl.where(is_before, ends, 0), 0)
        end = tl.sum(tl.where((e == expert) & (e < experts), ends, 0), 0)
        count = tl.where(expert < experts, end, total) - begin
        if IS_FEW:
            first = place - begin
            count = tl.where(first % BLOCK_M == 0, count, 0)
        else:
            first = (place - begin // BLOCK_M - expert) * BLOCK_M
        return expert, first, count, begin.to(tl.int64)


@triton.jit
def sigmoid(x):
    """1 / (1 + exp(-x)) without an exponential that overflows."""
    e = tl.exp(-tl.abs(x))
    return tl.where(x >= 0.0, 1.0, e) / (1.0 + e)


@triton.jit
def activated(x, ACTIVATION: tl.constexpr):
    """What `ir.ops.experts.ACTIVATIONS` has by these names; NaN stays NaN."""
    if ACTIVATION == "silu":
        return x * sigmoid(x)
    elif ACTIVATION == "gelu":
        return 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    elif ACTIVATION == "gelu_tanh":
        return x * sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))
    else:
        return tl.where(x < 0.0, 0.0, x)


@triton.jit
def raise_rows(
    x_ptr, weight_ptr, index_ptr, ends_ptr, h_ptr,
    x_batch, x_row, weight_expert, weight_row, weight_column, index_batch, index_expert, index_slot,
    experts, each, total, slots, length, depth, inner,
    CHOICES: tl.constexpr, IS_EVEN: tl.constexpr, IS_FEW: tl.constexpr, ACTIVATION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """h [rows, inner] = act(x G') * (x U') with [G; U] = weight[e] [2 inner, depth], of the tokens x that the expert's rows are of.

    Where IS_EVEN, row b * slots + c of an expert is position index[b, e, c] of sequence b, x [B, S, depth], and nothing where that is none
    of `length`. Otherwise row r of all is token index[r] // CHOICES of x [T, depth].
    """
    columns = tl.cdiv(inner, BLOCK_N)
    place = tl.program_id(0) // columns
    expert, first, count, begin = rows_of(place, ends_ptr, experts, each, total, IS_EVEN, IS_FEW, BLOCK_M, BLOCK_E)
    if (expert >= experts) | (first >= count):
        return
    r = first + tl.arange(0, BLOCK_M)  # [BM]
    in_rows = r < count
    if IS_EVEN:
        batch = (r // slots).to(tl.int64)
        position = tl.load(index_ptr + batch * index_batch + expert * index_expert + r % slots * index_slot, mask=in_rows, other=-1)
        is_there = (position >= 0) & (position < length)
        of_row = batch * x_batch + position * x_row
    else:
        is_there = in_rows
        of_row = (tl.load(index_ptr + begin + r, mask=in_rows, other=0) // CHOICES).to(tl.int64) * x_row
    n = tl.program_id(0) % columns * BLOCK_N + tl.arange(0, BLOCK_N)  # [BN]
    k = tl.arange(0, BLOCK_K)  # [BK]
    x_at = x_ptr + of_row[:, None] + k[None, :]
    gate_at = weight_ptr + expert.to(tl.int64) * weight_expert + n.to(tl.int64)[None, :] * weight_row + k[:, None] * weight_column
    up_at = weight_ptr + expert.to(tl.int64) * weight_expert + (inner + n).to(tl.int64)[None, :] * weight_row + k[:, None] * weight_column
    gate, up = tl.zeros([BLOCK_M, BLOCK_N], tl.float32), tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for start in range(0, depth, BLOCK_K):
        in_depth = start + k < depth
        in_weight = in_depth[:, None] & (n < inner)[None, :]
        x = tl.load(x_at, mask=is_there[:, None] & in_depth[None, :], other=0.0)
        gate += dot(x, tl.load(gate_at, mask=in_weight, other=0.0))
        up += dot(x, tl.load(up_at, mask=in_weight, other=0.0))
        x_at += BLOCK_K
        gate_at += BLOCK_K * weight_column
        up_at += BLOCK_K * weight_column
    h = activated(gate, ACTIVATION) * up
    at = (begin + r) * inner
    tl.store(h_ptr + at[:, None] + n[None, :], h.to(h_ptr.dtype.element_ty), mask=in_rows[:, None] & (n < inner)[None, :])


@triton.jit
def multiply(
    x_ptr, weight_ptr, order_ptr, ends_ptr, y_ptr,
    x_row, weight_expert, weight_row, weight_column, experts, each, total, depth, width,
    IS_EVEN: tl.constexpr, IS_FEW: tl.constexpr, IS_SORTED: tl.constexpr, FILLS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """y[r] = x[r] weight[e]' for the rows r of expert e, weight[e] [width, depth]; where IS_SORTED it is row order[r] of y. Where it FILLS,
    rows behind all experts are 0."""
    columns = tl.cdiv(width, BLOCK_N)
    place = tl.program_id(0) // columns
    expert, first, count, begin = rows_of(place, ends_ptr, experts, each, total, IS_EVEN, IS_FEW, BLOCK_M, BLOCK_E)
    if (first >= count) | (expert >= experts) & (not FILLS):
        return
    r = first + tl.arange(0, BLOCK_M)  # [BM]
    in_rows = r < count
    n = tl.program_id(0) % columns * BLOCK_N + tl.arange(0, BLOCK_N)  # [BN]
    k = tl.arange(0, BLOCK_K)  # [BK]
    x_at = x_ptr + (begin + r)[:, None] * x_row + k[None, :]
    weight_at = weight_ptr + expert.to(tl.int64) * weight_expert + n.to(tl.int64)[None, :] * weight_row + k[:, None] * weight_column
    y = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for start in range(0, tl.where(expert < experts, depth, 0), BLOCK_K):
        in_depth = start + k < depth
        x = tl.load(x_at, mask=in_rows[:, None] & in_depth[None, :], other=0.0)
        y += dot(x, tl.load(weight_at, mask=in_depth[:, None] & (n < width)[None, :], other=0.0))
        x_at += BLOCK_K
        weight_at += BLOCK_K * weight_column
    row = begin + r
    if IS_SORTED:
        row = tl.load(order_ptr + row, mask=in_rows, other=0).to(tl.int64)
    at = y_ptr + row[:, None] * width + n[None, :]
    tl.store(at, y.to(y_ptr.dtype.element_ty), mask=in_rows[:, None] & (n < width)[None, :])


@triton.jit
def join_choices(
    results_ptr, index_ptr, weight_ptr, y_ptr, weight_row, weight_choice, experts, width,
    CHOICES: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """y[t] = sum_j weight[t, j] results[t, j], j ascending, in float32: results [T, CHOICES, width]. NaN where a choice is no expert."""
    t = tl.program_id(0).to(tl.int64)
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    total = tl.zeros([BLOCK_N], tl.float32)
    for j in tl.static_range(CHOICES):
        pair = t * CHOICES + j
        chosen = tl.load(index_ptr + pair)
        mask = (n < width) & (chosen >= 0) & (chosen < experts)
        weight = tl.load(weight_ptr + t * weight_row + j * weight_choice).to(tl.float32)
        total += weight * tl.load(results_ptr + pair * width + n, mask=mask, other=float("nan")).to(tl.float32)
    tl.store(y_ptr + t * width + n, total.to(y_ptr.dtype.element_ty), mask=n < width)


@triton.jit
def mark(index_ptr, marks_ptr, index_batch, index_expert, index_slot, experts, slots, length, BLOCK: tl.constexpr):
    """marks[b, s, e], zeros before, grow by c + 1 for each slot c in which expert e took position s: sums of integers, which have no order.
    Where slot marks - 1 holds s, it is the only one: others would have made the sum larger than it."""
    b, e = (tl.program_id(0) // experts).to(tl.int64), tl.program_id(0) % experts
    c = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    position = tl.load(index_ptr + b * index_batch + e * index_expert + c * index_slot, mask=c < slots, other=-1)
    is_there = (position >= 0) & (position < length)
    tl.atomic_add(marks_ptr + (b * length + position) * experts + e, c + 1, mask=is_there)


@triton.jit
def join_takers(
    results_ptr, index_ptr, gate_ptr, marks_ptr, y_ptr, index_batch, index_expert, index_slot, gate_batch, gate_expert, gate_slot,
    batch, length, experts, slots, width,
    BLOCK_E: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """y[b, s] = sum over the experts that took s, in their order, of gate times results [E, B, C, width], in float32; 0 without any."""
    b, s = (tl.program_id(0) // length).to(tl.int64), tl.program_id(0) % length
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    ids = tl.arange(0, BLOCK_E)
    marks = tl.load(marks_ptr + tl.program_id(0).to(tl.int64) * experts + ids, mask=ids < experts, other=0)
    total = tl.zeros([BLOCK_N], tl.float32)
    expert = -1
    for _ in range(tl.sum((marks > 0).to(tl.int32), 0)):
        expert = tl.min(tl.where((marks > 0) & (ids > expert), ids, BLOCK_E), 0)
        slot = tl.sum(tl.where(ids == expert, marks, 0), 0) - 1
        of_index, of_gate = index_ptr + b * index_batch + expert * index_expert, gate_ptr + b * gate_batch + expert * gate_expert
        in_slots = slot < slots
        is_alone = in_slots & (tl.load(of_index + slot * index_slot, mask=in_slots, other=-1) == s)
        if is_alone:
            gate = tl.load(of_gate + slot * gate_slot).to(tl.float32)
        else:  # an expert that took a position more than once, which none of `gw.expert_choice` does
            gates, last = tl.zeros([BLOCK_C], tl.float32), tl.zeros([BLOCK_C], tl.int32)
            for start in range(0, slots, BLOCK_C):
                c = start + tl.arange(0, BLOCK_C)
                is_own = tl.load(of_index + c * index_slot, mask=c < slots, other=-1) == s
                gates += tl.load(of_gate + c * gate_slot, mask=is_own, other=0.0).to(tl.float32)
                last = tl.where(is_own, c, last)
            gate, slot = tl.sum(gates, 0), tl.max(last, 0)
        row = (expert.to(tl.int64) * batch + b) * slots + slot
        total += gate * tl.load(results_ptr + row * width + n, mask=n < width, other=0.0).to(tl.float32)
    at = y_ptr + tl.program_id(0).to(tl.int64) * width + n
    tl.store(at, total.to(y_ptr.dtype.element_ty), mask=n < width)
