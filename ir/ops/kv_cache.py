"""Keys and values of earlier positions as explicit state: what a step adds to a cache, and attention that reads it.

A cache has one slot a position and row: cache_k [R, Hk, C, E], cache_v [R, Hk, C, Ev]. A step works on B of the R rows, `rows[b]` being the
place of row b in the cache, and on T positions of each, the first of which is `position[b]`. Slots behind a row's last position hold
anything, NaN included: nothing here reads them.

Attention with a window reads the last positions alone, so its cache may be a ring: position p lies in slot p % C. It is exact with
C >= window + T - 1 slots, those that T queries see, or with as many as there are positions; what a step wrote behind a row's last position,
as padding and refused drafts are, lies where no later query looks before it is written over.

Source: specs/layer_skip.md, section 3 (Cache).
"""

import torch
from torch import Tensor

from ..op import op


@op("kv_append")
def kv_append(
    cache_k: Tensor, cache_v: Tensor, k: Tensor, v: Tensor, position: Tensor, rows: Tensor, *, ring: bool = False
) -> tuple[Tensor, Tensor]:
    """The caches with k and v at their positions: new_cache[rows[b], h, position[b] + i] = k[b, h, i], every other slot as it was. In a
    `ring` it is slot (position[b] + i) % C, T being C at most.

    cache_k [R, Hk, C, E], cache_v [R, Hk, C, Ev], k [B, Hk, T, E], v [B, Hk, T, Ev], position i64[B], rows i64[B], all different ->
    both caches, of the same types.

    Raises:
        IndexError: a position, but of a ring, or row lies behind the cache's last. Negative ones are none of a cache either: the kernel of
            CPUs raises for them too, this body counts them from the end, as any index. Kernels of GPUs, which nobody waits for, write
            nothing there.
    """
    slots = position.unsqueeze(1) + torch.arange(k.size(2), device=k.device)
    if ring:
        slots = slots % cache_k.size(2)
    heads = torch.arange(k.size(1), device=k.device)
    at = [rows.reshape(-1, 1, 1), heads.reshape(1, -1, 1), slots.unsqueeze(1)]  # [B, Hk, T]
    return cache_k.index_put(at, k), cache_v.index_put(at, v)


@op("cached_attention")
def cached_attention(
    q: Tensor,
    cache_k: Tensor,
    cache_v: Tensor,
    position: Tensor,
    rows: Tensor,
    *,
    scale: float,
    window: int = 0,
    softcap: float = 0.0,
    ring: bool = False,
) -> Tensor:
    """o[b, h, i] = sum over visible j of softmax_j(cap(q[b, h, i] . k[j] * scale)) v[j], k and v those of row rows[b] and head h // (H/Hk).

    Slot j is visible to query i where j <= position[b] + i, and with a `window` also j > position[b] + i - window. cap(s) is
    softcap * tanh(s / softcap), or s for 0. In a `ring` a slot stands for the last position up to position[b] + T - 1 that lies in it.
    q [B, H, T, E], cache_k [R, Hk, C, E], cache_v [R, Hk, C, Ev], position and rows i64[B] -> [B, H, T, Ev], laid out as [B, T, H, Ev].
    Sums are float32, or float64 for float64 q.

    Raises:
        IndexError: a row lies outside of the cache; in the kernel of CPUs, a position too, or positions for which a ring is too small.
            Kernels of GPUs give NaN for such a row.
        ValueError: the window is negative, or a ring has none.
    """
    if window < 0 or (ring and not window):
        raise ValueError(f"a window is a number of slots, or 0 for all, which no ring has, not {window}")
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    batch, heads, queries, depth = q.shape
    kv_heads, capacity, width = cache_v.shape[1:]
    slots = torch.arange(capacity, device=q.device).unsqueeze(0)
    newest = position.unsqueeze(1) + (queries - 1)  # [B, 1]
    keys = newest - (newest - slots) % capacity if ring else slots  # the position that a slot holds, [B or 1, C]
    last = (position.unsqueeze(1) + torch.arange(queries, device=q.device)).unsqueeze(-1)  # [B, T, 1]
    unwritten = (keys < 0 if ring else keys > newest).reshape(batch, 1, capacity, 1)  # [B, 1, C, 1]
    keys = keys.unsqueeze(1)
    visible = (keys >= 0) & (keys <= last)
    if window:
        visible = visible & (keys > last - window)
    k, v = [cache.index_select(0, rows).to(wide).masked_fill(unwritten, 0.0) for cache in (cache_k, cache_v)]
    shared = heads // kv_heads
    # Sizes have names throughout: of no rows or no queries, -1 says nothing.
    grouped = q.to(wide).reshape(batch * kv_heads, shared * queries, depth)  # all queries of one key head
    scores = (torch.bmm(grouped, k.flatten(0, 1).transpose(1, 2)) * scale).reshape(batch, heads, queries, capacity)
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    weights = scores.masked_fill(~visible.unsqueeze(1), float("-inf")).softmax(-1)
    sums = torch.bmm(weights.reshape(batch * kv_heads, shared * queries, capacity), v.flatten(0, 1)).reshape(batch, heads, queries, width)
    return sums.to(q.dtype).transpose(1, 2).contiguous().transpose(1, 2)
