"""`gw.kv_append` and `gw.cached_attention` by the kernels in C++; where these have no form for the operands, by ATen and by the
operator's body.

A cache is written where it lies, and of it only the slots are read that a query sees: both cost what the live prefix costs, whatever
the capacity.
"""

import struct

import torch
from torch import Tensor

from ...ir.ops.kv_cache import cached_attention as reference
from .library import library
from .without_compiler import attention_by_rows

_APPEND = struct.Struct("=19q")  # `Append` in native/call.h
_CALL = struct.Struct("=28q2d")  # `Call` there
_TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_LINE = 64  # bytes of a line of the cache, where scratch begins
_BLOCK = 64  # slots that the kernel reads at once, `kBlock` there


def kv_append(
    cache_k: Tensor, cache_v: Tensor, k: Tensor, v: Tensor, position: Tensor, rows: Tensor, *, ring: bool = False
) -> tuple[Tensor, Tensor]:
    """`gw.kv_append`: both caches copied, and the copies written to."""
    return append_in_place(cache_k.clone(), cache_v.clone(), k, v, position, rows, ring=ring)


def append_in_place(
    cache_k: Tensor, cache_v: Tensor, k: Tensor, v: Tensor, position: Tensor, rows: Tensor, *, ring: bool = False
) -> tuple[Tensor, Tensor]:
    """`gw.kv_append` where nobody reads the old caches any more: they are written to, and are the result.

    Raises:
        IndexError: a position or row lies outside of the cache; nothing has been written.
    """
    operands = (cache_k, cache_v, k, v, position, rows)
    native = library() if are_of_one_append(*operands) and _lie_here(*operands) else None
    if native is None or k.numel() == 0:
        _check(cache_k, k.size(2), position, rows, is_bounded=not ring)
        return append_by_aten(cache_k, cache_v, k, v, position, rows, ring=ring)
    position, rows, dense = position.contiguous(), rows.contiguous(), [_dense(k), _dense(v)]
    told = [
        _APPEND.pack(
            cache.data_ptr(), new.data_ptr(), cache.element_size(), *cache.stride()[:3], *new.stride()[:3],
            position.data_ptr(), rows.data_ptr(), *new.shape, cache.size(0), cache.size(2), torch.get_num_threads(), ring,
        )
        for cache, new in zip((cache_k, cache_v), dense, strict=True)
    ]  # fmt: skip
    found = native.kv_append(b"".join(told), len(told))
    if found < 0:
        raise _outside(cache_k, k.size(2), position, rows, -1 - found)
    return cache_k, cache_v


def append_by_aten(
    cache_k: Tensor, cache_v: Tensor, k: Tensor, v: Tensor, position: Tensor, rows: Tensor, *, ring: bool
) -> tuple[Tensor, Tensor]:
    """As `append_in_place`, on any device."""
    slots = (position.unsqueeze(1) + torch.arange(k.size(2), device=k.device)).unsqueeze(1)
    slots = slots % cache_k.size(2) if ring else slots
    heads = torch.arange(k.size(1), device=k.device).reshape(1, -1, 1)
    for cache, new in ((cache_k, k), (cache_v, v)):
        cache.index_put_((rows.reshape(-1, 1, 1), heads, slots), new)
    return cache_k, cache_v


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
    """`gw.cached_attention`. The result of a query does not depend on the queries and rows beside it, nor on the number of threads.

    Raises:
        IndexError: a position or row lies outside of the cache.
    """
    batch, heads, queries, depth = q.shape
    width = cache_v.size(3)
    if batch * heads * queries * width == 0:
        return q.new_empty(batch, queries, heads, width).transpose(1, 2)
    native = library() if is_fit(q, cache_k, cache_v, position, rows, window, ring=ring) else None
    if native is None:
        _check(cache_k, queries, position, rows, is_bounded=not ring or cache_k.size(2) < window + queries - 1)
        if ring or not is_fit(q, cache_k, cache_v, position, rows, window, ring=ring):
            return reference(q, cache_k, cache_v, position, rows, scale=scale, window=window, softcap=softcap, ring=ring)
        return attention_by_rows(q, cache_k, cache_v, position, rows, scale, window, softcap)
    q, position, rows = _dense(q), position.contiguous(), rows.contiguous()
    y = torch.empty(batch, queries, heads, width, dtype=q.dtype)
    fields = (
        q.data_ptr(), cache_k.data_ptr(), cache_v.data_ptr(), y.data_ptr(), _TYPES[q.dtype], *q.stride()[:3], *cache_k.stride()[:3],
        *cache_v.stride()[:3], position.data_ptr(), rows.data_ptr(), batch, heads, cache_k.size(1), queries, depth, width,
        cache_k.size(0), cache_k.size(2), window, torch.get_num_threads(), ring,
    )  # fmt: skip
    needed = native.scratch_bytes(_CALL.pack(*fields, 0, scale, softcap))
    if needed < 0:
        raise _outside(cache_k, queries, position, rows, -1 - needed)
    scratch = torch.empty(needed + _LINE, dtype=torch.uint8)
    begin = -(-scratch.data_ptr() // _LINE) * _LINE
    native.cached_attention(_CALL.pack(*fields, begin, scale, softcap))
    return y.transpose(1, 2)


def is_fit(q: Tensor, cache_k: Tensor, cache_v: Tensor, position: Tensor, rows: Tensor, window: int, *, ring: bool = False) -> bool:
    """Whether the operands have the types, sizes and layouts that the kernel of attention reads, float64 being left to the body. A ring
    that is gone around has whole blocks, which lie in one piece."""
    if ring and (not window or (cache_k.size(2) % _BLOCK and position.numel() and int(position.max()) + q.size(2) > cache_k.size(2))):
        return False
    is_typed = q.dtype in _TYPES and cache_k.dtype == cache_v.dtype == q.dtype and cache_k.stride(3) == cache_v.stride(3) == 1
    return is_typed and are_of_one_step(q, cache_k, cache_v, position, rows, window) and _lie_here(q, cache_k, cache_v, position, rows)


def are_of_one_step(q: Tensor, cache_k: Tensor, cache_v: Tensor, position: Tensor, rows: Tensor, window: int) -> bool:
    """Whether the sizes of attention fit one another: a kernel computes addresses from them, and asks no further."""
    kv_heads = cache_k.size(1)
    are_caches = cache_k.shape[:3] == cache_v.shape[:3] and kv_heads > 0 and window >= 0
    return are_caches and q.size(3) == cache_k.size(3) and q.size(1) % kv_heads == 0 and _are_places(position, rows, q.size(0))


def are_of_one_append(cache_k: Tensor, cache_v: Tensor, k: Tensor, v: Tensor, position: Tensor, rows: Tensor) -> bool:
    """Whether types, sizes and layouts of an append fit one another."""
    pairs = ((cache_k, k), (cache_v, v))
    fit = all(cache.dtype == new.dtype and cache.stride(3) == 1 and cache.shape[1::2] == new.shape[1::2] for cache, new in pairs)
    return fit and k.shape[:3] == v.shape[:3] and _are_places(position, rows, k.size(0))


def _are_places(position: Tensor, rows: Tensor, batch: int) -> bool:
    return position.dtype == rows.dtype == torch.int64 and position.shape == rows.shape == (batch,)


def _lie_here(*tensors: Tensor) -> bool:
    return all([x.is_cpu for x in tensors])


def _dense(x: Tensor) -> Tensor:
    return x if x.stride(3) == 1 else x.contiguous()


def _check(cache: Tensor, slots: int, position: Tensor, rows: Tensor, *, is_bounded: bool) -> None:
    """Raises IndexError for what lies outside of the cache; only a ring of enough slots does not bound positions. On a GPU this would wait
    for it, and for operands that are no places of rows the operator's body speaks."""
    if position.device.type != "cpu" or position.dim() != 1 or position.shape != rows.shape:
        return
    for b, (first, row) in enumerate(zip(position.tolist(), rows.tolist(), strict=True)):
        if not (0 <= row < cache.size(0) and first >= 0 and (not is_bounded or first <= cache.size(2) - slots)):
            raise _outside(cache, slots, position, rows, b)


def _outside(cache: Tensor, slots: int, position: Tensor, rows: Tensor, b: int) -> IndexError:
    return IndexError(
        f"row {int(rows[b])} with positions {int(position[b])} to {int(position[b]) + slots - 1} lies outside of a cache of "
        f"{cache.size(0)} rows and {cache.size(2)} slots: make the cache larger, or stop before"
    )
