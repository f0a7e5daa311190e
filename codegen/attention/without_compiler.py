"""Cached attention where no C++ compiler makes the kernel: ATen's attention of each row over the slots that it sees."""

import torch
import torch.nn.functional as F
from torch import Tensor

from ...ir.ops.kv_cache import cached_attention as reference


def attention_by_rows(
    q: Tensor, cache_k: Tensor, cache_v: Tensor, position: Tensor, rows: Tensor, scale: float, window: int, softcap: float
) -> Tensor:
    """`gw.cached_attention`. The operator's body where there is a softcap, which ATen's attention does not have."""
    y = torch.empty(q.size(0), q.size(2), q.size(1), cache_v.size(3), dtype=q.dtype)
    for b, (first, row) in enumerate(zip(position.tolist(), rows.tolist(), strict=True)):
        begin, end = max(0, first - window + 1) if window else 0, first + q.size(2)
        k, v = (cache[row : row + 1, :, begin:end] for cache in (cache_k, cache_v))
        if softcap:
            here = (position[b : b + 1] - begin, torch.zeros_like(rows[:1]))
            part = reference(q[b : b + 1], k, v, *here, scale=scale, window=window, softcap=softcap)
        else:
            mask = None if q.size(2) == 1 else _visible(first, q.size(2), begin, end, window)
            part = F.scaled_dot_product_attention(q[b : b + 1], k, v, mask, scale=scale, enable_gqa=q.size(1) != cache_k.size(1))
        y[b] = part[0].transpose(0, 1)
    return y.transpose(1, 2)


def _visible(position: int, queries: int, begin: int, end: int, window: int) -> Tensor:
    """Which of the slots [begin, end) each query sees, [queries, end - begin]."""
    last, slots = torch.arange(position, position + queries).unsqueeze(1), torch.arange(begin, end)
    return (slots <= last) & (slots > last - window) if window else slots <= last
