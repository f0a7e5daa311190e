"""How the kernels are launched: tiles, and splits of the slots where rows and heads alone do not fill the GPU.

A GPU is not asked for positions, as that would wait for it: how many splits there are is settled by the capacity, and each split is its
share of what is live. A row or slot outside of the cache is neither read nor written; results for it are NaN.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from ...attention.cached import append_by_aten, are_of_one_append, are_of_one_step
from ..targets import Target, target_of

_TYPES = (torch.float32, torch.bfloat16, torch.float16)
_MAX_WIDTH = 256


@dataclass(frozen=True)
class Tile:
    """`q` queries times heads against `s` slots at a time, rows of keys and values filled up to `d` and `e`."""

    q: int
    s: int
    d: int
    e: int
    num_warps: int

    @property
    def blocks(self) -> dict[str, int]:
        return {"BLOCK_Q": self.q, "BLOCK_S": self.s, "BLOCK_D": self.d, "BLOCK_E": self.e}


def tile_of(queries: int, group: int, depth: int, width: int, itemsize: int, target: Target) -> Tile:
    """The tile for so many queries a row and heads a key head, the largest that compiles without spills for every target
    (tests/test_triton_kv_cache_aot.py). A dot has 16 rows at least; in float32 it has no unit of its own and holds its operands in
    registers."""
    d, e = (max(16, _power_of_two(n)) for n in (depth, width))
    is_float32, is_wide = itemsize == 4, d * itemsize > 256  # bytes of a row of keys
    q = min(32 if is_float32 or is_wide else 64, max(16, _power_of_two(queries * group)))
    s = 32 if is_float32 or is_wide or target.lanes == 64 else 64
    return Tile(q, s, d, e, 8 if is_float32 and q == 32 else 4)


def splits_of(programs: int, capacity: int, tile: Tile, target: Target) -> int:
    """As many as give two programs a multiprocessor, of four blocks of slots at least."""
    return max(1, min(2 * target.multiprocessors // programs, capacity // (4 * tile.s), 64))


def is_fit(q: Tensor, cache_k: Tensor, cache_v: Tensor, position: Tensor, rows: Tensor, window: int) -> bool:
    """Whether the kernels have the types, sizes and layouts."""
    is_typed = q.dtype in _TYPES and cache_k.dtype == cache_v.dtype == q.dtype and cache_k.stride(3) == cache_v.stride(3) == 1
    return is_typed and max(q.size(3), cache_v.size(3)) <= _MAX_WIDTH and are_of_one_step(q, cache_k, cache_v, position, rows, window)


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
    """`gw.cached_attention`, by its body where the kernels have no form for the operands."""
    batch, heads, queries, depth = q.shape
    width, kv_heads, capacity = cache_v.size(3), cache_k.size(1), cache_k.size(2)
    target, group = target_of(q.device), heads // max(kv_heads, 1)
    tile = tile_of(queries, group, depth, width, q.element_size(), target)
    if not is_fit(q, cache_k, cache_v, position, rows, window) or q.numel() == 0 or (ring and capacity < tile.s):
        body = torch.ops.gw.cached_attention.default
        return body(q, cache_k, cache_v, position, rows, scale=scale, window=window, softcap=softcap, ring=ring)
    from . import kernels

    q, position, rows = q if q.stride(3) == 1 else q.contiguous(), position.contiguous(), rows.contiguous()
    tiles = -(-queries * group // tile.q)
    splits = splits_of(batch * kv_heads * tiles, min(capacity, window + queries) if window else capacity, tile, target)
    y = torch.empty(batch, queries, heads, width, dtype=q.dtype, device=q.device)
    sums = y if splits == 1 else torch.empty(splits, *y.shape, dtype=torch.float32, device=q.device)
    stats = y if splits == 1 else torch.empty(splits, batch, queries, heads, 2, dtype=torch.float32, device=q.device)
    with torch.cuda.device_of(q):
        kernels.attend[(batch * kv_heads, tiles, splits)](
            q, cache_k, cache_v, position, rows, sums, stats, *q.stride()[:3], *cache_k.stride()[:3], *cache_v.stride()[:3],
            kv_heads, queries, capacity, cache_k.size(0), scale, softcap,
            GROUP=group, DEPTH=depth, WIDTH=width, WINDOW=window, IS_RING=ring, HAS_SOFTCAP=softcap != 0, IS_SPLIT=splits > 1,
            **tile.blocks, num_warps=tile.num_warps,
        )  # fmt: skip
        if splits > 1:
            places = batch * queries * heads
            kernels.join[(-(-places // 4),)](sums, stats, y, places, splits, WIDTH=width, BLOCK_N=4, BLOCK_E=tile.e, num_warps=4)
    return y.transpose(1, 2)


def append_in_place(
    cache_k: Tensor, cache_v: Tensor, k: Tensor, v: Tensor, position: Tensor, rows: Tensor, *, ring: bool = False
) -> tuple[Tensor, Tensor]:
    """`gw.kv_append` where nobody reads the old caches any more: they are written to, and are the result. By ATen where the kernel has no
    form for the operands."""
    if k.numel() == 0 or not are_of_one_append(cache_k, cache_v, k, v, position, rows):
        return append_by_aten(cache_k, cache_v, k, v, position, rows, ring=ring)
    from . import kernels

    position, rows = position.contiguous(), rows.contiguous()
    batch, heads, slots, _ = k.shape
    with torch.cuda.device_of(k):
        for cache, new in ((cache_k, k), (cache_v, v)):
            new, depth = new if new.stride(3) == 1 else new.contiguous(), new.size(3)
            block = min(32, _power_of_two(slots))
            kernels.append[(batch * heads, -(-slots // block))](
                cache, new, position, rows, *cache.stride()[:3], *new.stride()[:3], heads, slots, cache.size(2), cache.size(0),
                DEPTH=depth, IS_RING=ring, BLOCK_T=block, BLOCK_D=_power_of_two(depth), num_warps=1 if slots == 1 else 4,
            )  # fmt: skip
    return cache_k, cache_v


def _power_of_two(n: int) -> int:
    return 1 << max(0, n - 1).bit_length()
