"""Low-rank linears where no C++ compiler makes the kernel: int8 by int8 as ATen's product of codes. All else is left to the
operator's body, which decodes the weight at each call: slow, and no copy of the weight is held for it either."""

from typing import Any

import torch
from torch import Tensor

from ...ir.low_bit.hadamard import rotate as rotated

_TINY = 2.0**-149  # the smallest float32


def int8_product(
    x: Tensor,
    weight_q: Tensor,
    weight_scale: Tensor,
    down: Tensor | None,
    up: Tensor | None,
    bias: Tensor | None,
    *,
    weight_format: str,
    act_format: str,
    smooth: Tensor | None,
    act_shift: float,
    rotate: int,
    **unused: Any,
) -> Tensor | None:
    """y = (codes of x @ weight_q.T) * scale of a row * scale of a column + branch + bias; None for other formats, and where this torch has
    no `_int_mm`, which is private."""
    if (weight_format, act_format) != ("int8-channel", "int8-token") or not hasattr(torch, "_int_mm"):
        return None
    raw = x.reshape(-1, x.size(-1)).float()
    xs = raw + act_shift
    if smooth is not None:
        xs = xs * smooth.float()
    if rotate:
        xs = rotated(xs, rotate, weight=False)
    amax = xs.abs().amax(-1, keepdim=True)
    scale = torch.where(amax == 0, 1.0, amax / 127).clamp(min=_TINY)
    y = torch._int_mm((xs / scale).round().clamp(-127, 127).to(torch.int8), weight_q.t()).float() * scale * weight_scale.t()
    if down is not None and up is not None:
        y = y.addmm(raw @ down.float().t(), up.float().t())
    if bias is not None:
        y = y + bias.float()
    return y.to(x.dtype).reshape(*x.shape[:-1], weight_q.size(0))
