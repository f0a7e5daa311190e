"""Causal attention that says which rows its queries are, so that queries can be sliced.

`scaled_dot_product_attention(is_causal=True)` on a slice of queries would align its mask to the slice's own first row
(measured error 3.6 against 7e-16). With the rows as an operand a slice carries its own positions.
"""

import torch
from torch import Tensor

from ..op import op


@op("causal_attention")
def causal_attention(q: Tensor, k: Tensor, v: Tensor, rows: Tensor, scale: float | None, enable_gqa: bool) -> Tensor:
    """softmax(q k^T * scale + mask) v, key j visible to the query in row r iff j <= rows[r] (top-left aligned).

    q [.., H, L, E]; k [.., Hk, S, E]; v [.., Hk, S, Ev]; rows i64[L] -> [.., H, L, Ev]. `scale` None is 1/sqrt(E); with
    `enable_gqa` query head h reads key head h // (H/Hk). `causal_attention(q, k, v, arange(L))` is SDPA with is_causal.
    """
    keys = torch.arange(k.size(-2), device=k.device)
    mask = keys.unsqueeze(0) <= rows.unsqueeze(1)
    return torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale, enable_gqa=enable_gqa)
