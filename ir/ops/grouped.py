"""A product whose rows have matrices of their own, in groups: what libraries of models multiply tokens that were sorted by expert with."""

import torch
from torch import Tensor

from ..op import op


@op("grouped_mm")
def grouped_mm(x: Tensor, weight: Tensor, offs: Tensor) -> Tensor:
    """y[r] = x[r] @ weight[g] for rows offs[g - 1] <= r < offs[g]; rows behind the last group are 0.

    x [N, K], weight [G, K, M], offs i32[G] or i64[G], not falling -> [N, M]. It is `aten._grouped_mm` for any dtype, which torch has for
    some alone (its types: bfloat16), and `transformers::grouped_mm_fallback`.

    This body multiplies every row with every matrix, G times the work that is needed.
    """
    rows = torch.arange(x.size(0), device=x.device)
    group = torch.searchsorted(offs, rows.to(offs.dtype), right=True)
    y = torch.bmm(x.unsqueeze(0).expand(weight.size(0), -1, -1), weight)[group.clamp(max=weight.size(0) - 1), rows]
    return y.masked_fill((group >= weight.size(0)).unsqueeze(-1), 0.0)
