"""`aten.scaled_dot_product_attention` by the kernel in C++, or by ATen where the kernel has no form for the operands."""

import struct

import torch
from torch import Tensor

from ...ir.symbols import hint
from ...ir.workspace import NOMINAL_THREADS
from ..library_call import LibraryCall
from .library import library

_CALL = struct.Struct("=33qd")  # `Call` in native/kernel.cpp
_TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.bool: 3}
_NO_MASK = 4
_LANES, _KEYS = 64, 96  # `kCols` of the widest vectors, and `kKeys`
_LINE = 64  # bytes of a line of the cache, where scratch begins


def attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, is_causal: bool, scale: float | None, enable_gqa: bool, heads_inside: bool = False
) -> Tensor:
    """softmax(q k^T scale + mask) v, where `is_causal` key j visible to query i iff j <= i; a query that sees no key gets 0.

    q [(B,) H, L, E]; k [(B,) Hk, S, E]; v [(B,) Hk, S, Ev]; mask broadcast to [(B,) H, L, S], bool (True is seen) or what is added ->
    [(B,) H, L, Ev], dense, or with `heads_inside` laid out as [B, L, H, Ev]. `scale` None is 1/sqrt(E); with `enable_gqa` query head h
    reads key head h // (H/Hk). Sums are float32. The result of a query depends neither on the queries beside it nor on the number of
    threads, as long as keys and values are finite: where some query of a tile sees a value that is not, all of the tile may become NaN,
    those too to which it is masked, as ATen's kernel has it. A `scale` of 0 gives means, also where that of ATen gives NaN.
    """
    native = library() if is_fit(q, k, v, mask, is_causal, enable_gqa) else None
    if native is None:
        y = torch.nn.functional.scaled_dot_product_attention(q, k, v, mask, 0.0, is_causal, scale=scale, enable_gqa=enable_gqa)
        return y if not heads_inside else y.transpose(-2, -3).contiguous().transpose(-2, -3)
    if q.dim() == 3:
        mask = mask[None] if mask is not None and mask.dim() == 3 else mask
        return attention(q[None], k[None], v[None], mask, is_causal, scale, enable_gqa, heads_inside)[0]
    batch, heads, queries, depth = q.shape
    keys, width = v.shape[2:]
    shape = (batch, queries, heads, width) if heads_inside else (batch, heads, queries, width)
    y = torch.empty(shape, dtype=q.dtype)
    y = y.transpose(1, 2) if heads_inside else y
    if y.numel() == 0:
        return y
    if keys == 0:
        return y.zero_()
    q, k, v = _dense(q), _dense(k), _dense(v)
    told_mask: tuple[int, ...] = (0, _NO_MASK, 0, 0, 0, 0)
    if mask is not None:
        mask = mask.expand(batch, heads, queries, keys)
        told_mask = (mask.data_ptr(), _TYPES[mask.dtype], *mask.stride())
    fields = (
        q.data_ptr(), k.data_ptr(), v.data_ptr(), y.data_ptr(), _TYPES[q.dtype], *q.stride()[:3], *k.stride()[:3], *v.stride()[:3],
        *y.stride()[:3], *told_mask, batch, heads, k.size(1), queries, keys, depth, width, is_causal, torch.get_num_threads(),
    )  # fmt: skip
    factor = scale if scale is not None else max(depth, 1) ** -0.5
    scratch = torch.empty(native.scratch_bytes(_CALL.pack(*fields, 0, factor)) + _LINE, dtype=torch.uint8)
    native.attention(_CALL.pack(*fields, -(-scratch.data_ptr() // _LINE) * _LINE, factor))
    return y


def is_fit(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, is_causal: bool, enable_gqa: bool) -> bool:
    """Whether the operands have the types and sizes that the kernel reads."""
    if q.dtype not in _TYPES or q.dtype == torch.bool or not k.dtype == v.dtype == q.dtype or q.dim() not in (3, 4):
        return False
    if not (k.dim() == v.dim() == q.dim() and q.is_cpu and k.is_cpu and v.is_cpu and q.size(-1) == k.size(-1)):
        return False
    heads, scores = q.size(-3), (*q.shape[:-1], k.size(-2))
    if k.shape[:-1] != v.shape[:-1] or k.shape[:-3] != q.shape[:-3] or k.size(-3) == 0:
        return False
    if heads != k.size(-3) and not (enable_gqa and heads % k.size(-3) == 0):
        return False
    if mask is None:
        return True
    if is_causal or not mask.is_cpu or mask.dtype not in (torch.bool, torch.float32, q.dtype) or not 2 <= mask.dim() <= q.dim():
        return False
    return all(size in (1, whole) for size, whole in zip(mask.shape, scores[-mask.dim() :], strict=True))


def _dense(x: Tensor) -> Tensor:
    return x if x.stride(3) == 1 or x.size(3) == 1 else x.contiguous()


class AttentionCall(LibraryCall):
    """`attention` with its settings, as an operation of a graph: `call(q, k, v, mask)`."""

    def __init__(self, is_causal: bool, scale: float | None, enable_gqa: bool, heads_inside: bool):
        self.is_causal, self.scale, self.enable_gqa, self.heads_inside = is_causal, scale, enable_gqa, heads_inside
        self.settings = (is_causal, scale, enable_gqa, heads_inside)

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        return attention(q, k, v, mask, *self.settings)

    def scratch(self, x: Tensor, result: Tensor) -> int:
        """Queries, scores, mask and values of a tile, and a block of keys and values, for each thread."""
        depth, width = hint(x.size(-1)), hint(result.size(-1))
        return NOMINAL_THREADS * 4 * ((depth + width + 2 * _KEYS) * _LANES + _KEYS * (depth + width)) + _LINE

    def __str__(self) -> str:
        return f"attention with a query a lane{', causal' if self.is_causal else ''}"
