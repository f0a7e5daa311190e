"""Chunked recurrence with softmax across chunks, in place of causal attention: over a sequence, and in steps over a cache.

Keys and values are smoothed by a gated recurrence inside chunks of L tokens. A query at time t attends to the state at the end of each
chunk that lies wholly before its window (a summary), and to what is near: the first `sinks` tokens and those of the window, as their
states (local "state") or as the keys and values they were made of ("raw"). Each past token is then read once: as a sink, in a summary, or
near. Whether summaries and near tokens are visible depends on the two times alone (`Layout`).

Sources: RAT (arXiv 2507.04416), RAT+ (arXiv 2602.18196), specs/rat.md, section 2. Local "raw" is ours.
"""

import torch
from torch import Tensor

from ..op import op
from .rat_parts import Layout, Rotation, gates_of, goes_on_at, recurrence


@op("rat_attention")
def rat_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gate: Tensor,
    chunk_bias: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    *,
    chunk: int,
    scale: float,
    window: int = 0,
    sinks: int = 0,
    local: str = "state",
    reset: bool = True,
    rope_style: str = "half",
    summary_bias: float = 0.0,
) -> Tensor:
    """Softmax attention of each token over states of a gated recurrence: one a chunk behind the window, and what is near.

    g[t] = sigmoid(gate[t] + chunk_bias[t % L]); s[t] = g[t] s[t-1] + (1 - g[t]) x[t] for x = k and x = v, s[t-1] = 0 at t = 0 and, with
    `reset`, at the start of each chunk. A query at t sees, with b = max(0, floor((t - W) / L)):

        sinks       j < min(sinks, t + 1)
        summaries   j = c L + L - 1 >= sinks for c < b; their scores get `summary_bias`
        near        max(sinks, t - W) <= j <= t with local "state", max(sinks, b L) <= j <= t with "raw"

    Summaries are states; sinks and near tokens are states, or k and v themselves with "raw". Queries and keys are turned by cos and sin
    after the recurrence: row t turns the query at t and any key whose time is t. `rope_style` "half" pairs channel i with i + dr/2,
    "interleaved" 2i with 2i + 1. Sums and the recurrence are float32, or float64 for float64 q.

    q [B, H, T, E]; k, v and gate (logits) [B, Hk, T, E], head h reads head h // (H/Hk); chunk_bias [L, Hk|1, E|1]; cos, sin [B|1, T, dr],
    dr <= E even -> [B, H, T, E], laid out as [B, T, H, E].

    Raises:
        ValueError: an attribute is none of the above, cos comes without sin, dr is odd, or Hk does not divide H.
    """
    layout = Layout(chunk, window, sinks, local)
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    rotate = Rotation(cos, sin, rope_style, wide)
    times = torch.arange(q.size(2), device=q.device)
    g = gates_of(gate.to(wide), chunk_bias, times.unsqueeze(0), chunk)
    raw_k, raw_v = k.to(wide), v.to(wide)
    states_k, states_v = recurrence([raw_k, raw_v], g, goes_on_at(times.unsqueeze(0), chunk, reset), chunk if reset else None)[0]
    keys = [rotate(states_k), *([rotate(raw_k)] if local == "raw" else [])]
    values = [states_v, *([raw_v] if local == "raw" else [])]
    t, j = times.unsqueeze(1), times.unsqueeze(0)
    bias = _bias(layout.is_summary(j, t), layout.is_near(j, t), summary_bias, wide, joined=local == "state")
    return _attend(rotate(q.to(wide)), torch.cat(keys, 2), torch.cat(values, 2), bias.unsqueeze(0), scale).to(q.dtype)


@op("rat_cached_attention")
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
    position: Tensor,
    rows: Tensor,
    lengths: Tensor | None,
    *,
    chunk: int,
    scale: float,
    window: int = 0,
    sinks: int = 0,
    local: str = "state",
    reset: bool = True,
    rope_style: str = "half",
    summary_bias: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """`rat_attention` of T more tokens of each row, the first at time position[b]; what came before is in the caches of row rows[b].

    Of a row the caches hold key_slots and value_slots [R, Hk, S, E], S = sinks + C + ring, keys turned already, and key_state and
    value_state f32[R, Hk, E], the state at the last time, not turned. The slots are

        [0, sinks)           token i, as near tokens are
        [sinks, sinks + C)   the state at c L + L - 1, once that time has passed: enough for C L tokens
        the ring             the token whose time is r modulo ring, the last of these; ring = W + 1 with local "state", W + L with "raw"

    Other operands are as in `rat_attention`, cos and sin being rows of these T tokens; position, rows (all different) and lengths are
    i64[B]. The first lengths[b] tokens of row b are real (all T without lengths): what pads the row is computed and not kept. At
    position 0 nothing of the row's caches is read. A slot that was never written may hold anything, NaN included.

    -> out [B, H, T, E], laid out as [B, T, H, E], and the four caches.

    Raises:
        ValueError: as `rat_attention`, or S is too small for the sinks and the ring.
        IndexError: a row lies outside of the caches. Tokens beyond C L lose their summaries: who calls keeps below.
    """
    layout = Layout(chunk, window, sinks, local)
    summaries = key_slots.size(2) - sinks - layout.ring
    if isinstance(summaries, int) and summaries < 0:
        raise ValueError(f"{key_slots.size(2)} slots are too few for {sinks} sinks and a ring of {layout.ring}")
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    rotate = Rotation(cos, sin, rope_style, wide)
    start = position.unsqueeze(1)  # [B, 1]
    t = start + torch.arange(q.size(2), device=q.device)  # [B, T]
    g = gates_of(gate.to(wide), chunk_bias, t, chunk)
    raw_k, raw_v = k.to(wide), v.to(wide)
    before = [state.index_select(0, rows).to(wide) for state in (key_state, value_state)]
    before = [torch.where((position > 0).reshape(-1, 1, 1), state, 0.0).unsqueeze(2) for state in before]
    (states_k, states_v), passed = recurrence([raw_k, raw_v], g, goes_on_at(t, chunk, reset), chunk if reset else None)
    states_k, states_v = states_k + passed * before[0], states_v + passed * before[1]

    old_k, old_v = key_slots.index_select(0, rows), value_slots.index_select(0, rows)
    held = _slot_times(layout, summaries, start)  # [B, S], -1 where a slot holds nothing
    empty = (held < 0).reshape(held.size(0), 1, held.size(1), 1)
    turned, turned_raw = rotate(states_k), rotate(raw_k)
    near_k, near_v = (turned, states_v) if local == "state" else (turned_raw, raw_v)
    keys = [old_k.to(wide).masked_fill(empty, 0.0), turned, *([near_k] if local == "raw" else [])]
    values = [old_v.to(wide).masked_fill(empty, 0.0), states_v, *([near_v] if local == "raw" else [])]
    bias = torch.cat([_slot_bias(layout, held, t, summary_bias, wide), _token_bias(layout, t, summary_bias, wide)], 2)
    out = _attend(rotate(q.to(wide)), torch.cat(keys, 2), torch.cat(values, 2), bias, scale).to(q.dtype)

    count = torch.full_like(position, q.size(2)) if lengths is None else lengths
    after = _slot_times(layout, summaries, start + count.unsqueeze(1))
    slots = [_kept(old, layout, after, start, states, near) for old, states, near in ((old_k, turned, near_k), (old_v, states_v, near_v))]
    last = (count - 1).clamp(min=0).reshape(-1, 1, 1, 1)
    none = (count == 0).reshape(-1, 1, 1)
    ends = [states.gather(2, last.expand(-1, states.size(1), 1, states.size(3))).squeeze(2) for states in (states_k, states_v)]
    states = [torch.where(none, old.squeeze(2), end) for old, end in zip(before, ends, strict=True)]
    caches = ((key_slots, slots[0]), (value_slots, slots[1]), (key_state, states[0]), (value_state, states[1]))
    new = [cache.index_put([rows], value.to(cache.dtype)) for cache, value in caches]
    return out, new[0], new[1], new[2], new[3]


def _bias(is_summary: Tensor, is_near: Tensor, summary_bias: float, dtype: torch.dtype, *, joined: bool) -> Tensor:
    """What is added to scores: `summary_bias` for summaries, 0 near, -inf elsewhere. Not `joined`, summaries stand before near tokens."""
    hidden = torch.full((), float("-inf"), dtype=dtype, device=is_near.device)
    near = torch.where(is_near, 0.0, hidden)
    if joined:
        return torch.where(is_summary, summary_bias, near)
    return torch.cat([torch.where(is_summary, summary_bias, hidden), near], -1)


def _token_bias(layout: Layout, t: Tensor, summary_bias: float, dtype: torch.dtype) -> Tensor:
    """[B, T, T], or [B, T, 2T] with summaries apart: what queries at t see of the tokens at t."""
    queries, tokens = t.unsqueeze(2), t.unsqueeze(1)
    is_summary, is_near = layout.is_summary(tokens, queries), layout.is_near(tokens, queries)
    return _bias(is_summary, is_near, summary_bias, dtype, joined=layout.local == "state")


def _slot_bias(layout: Layout, held: Tensor, t: Tensor, summary_bias: float, dtype: torch.dtype) -> Tensor:
    """[B, T, S]: what queries at t [B, T] see of slots that hold tokens of times `held` [B, S]."""
    times, queries = held.unsqueeze(1), t.unsqueeze(2)
    slot = torch.arange(held.size(1), device=held.device)
    in_ring = slot >= held.size(1) - layout.ring
    in_summaries = (slot >= layout.sinks) & ~in_ring
    is_near = layout.is_near(times, queries) & (~in_ring | (times >= layout.sinks)) & ~in_summaries
    is_summary = layout.is_summary(times, queries) & in_summaries
    exists = times >= 0
    return _bias(is_summary & exists, is_near & exists, summary_bias, dtype, joined=True)


def _slot_times(layout: Layout, summaries: int, end: Tensor) -> Tensor:
    """[B, S]: the time of the token that each slot holds when `end` [B, 1] tokens have passed, -1 where it holds none."""
    device = end.device
    sink = torch.arange(layout.sinks, device=device)
    summary = torch.arange(summaries, device=device) * layout.chunk + (layout.chunk - 1)
    first = torch.cat([sink, summary]).unsqueeze(0).expand(end.size(0), -1)
    place = torch.arange(layout.ring, device=device).unsqueeze(0)
    ring = end - 1 - (end - 1 - place) % layout.ring  # the last time before `end` that is `place` modulo ring: remainders are not negative
    return torch.cat([torch.where(first < end, first, -1), ring.clamp(min=-1)], 1)


def _kept(old: Tensor, layout: Layout, after: Tensor, start: Tensor, states: Tensor, near: Tensor) -> Tensor:
    """The slots [B, Hk, S, E] with what these tokens [B, Hk, T, E] put there: slots hold tokens of times `after`, old before `start`."""
    is_new = (after >= start) & (after >= 0)
    place = torch.where(is_new, after - start, 0).reshape(after.size(0), 1, after.size(1), 1).expand(-1, old.size(1), -1, old.size(3))
    slot = torch.arange(after.size(1), device=after.device)
    in_summaries = (slot >= layout.sinks) & (slot < after.size(1) - layout.ring)
    fresh = (
        near.gather(2, place) if near is states else torch.where(in_summaries.unsqueeze(1), states.gather(2, place), near.gather(2, place))
    )
    return torch.where(is_new.reshape(after.size(0), 1, after.size(1), 1), fresh.to(old.dtype), old)


def _attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, scale: float) -> Tensor:
    """softmax(q k^T scale + bias) v: q [B, H, T, E], k and v [B, Hk, S, E], bias [B|1, T, S] -> [B, H, T, E], laid out as [B, T, H, E]"""
    batch, heads, queries, depth = q.shape
    kv_heads, keys = k.size(1), k.size(2)
    if heads % kv_heads:
        raise ValueError(f"{heads} heads cannot share {kv_heads} of keys: the second must divide the first")
    # Heads alone are merged with rows, and keys of fewer heads repeated for it: of queries merged with heads the strides are a minimum over
    # products of sizes, which for a symbolic length becomes a guard.
    k, v = (each.repeat_interleave(heads // kv_heads, 1).flatten(0, 1) for each in (k, v))
    scores = (torch.bmm(q.reshape(batch * heads, queries, depth), k.transpose(1, 2)) * scale).reshape(batch, heads, queries, keys)
    weights = (scores + bias.unsqueeze(1)).softmax(-1)
    sums = torch.bmm(weights.flatten(0, 1), v).reshape(batch, heads, queries, v.size(2))
    return sums.transpose(1, 2).contiguous().transpose(1, 2)
