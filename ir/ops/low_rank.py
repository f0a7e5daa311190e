"""A linear layer as a low-bit weight beside a low-rank branch. Source: SVDQuant (arXiv 2411.05007), sections 4.1 and 4.2."""

import torch
from torch import Tensor

from ..low_bit.formats import format_of
from ..low_bit.hadamard import rotate as rotated
from ..low_bit.quantize import dequantize, fake_quantize
from ..op import op


@op("lowrank_linear")
def lowrank_linear(
    x: Tensor,
    weight_q: Tensor,
    weight_scale: Tensor | None,
    down: Tensor | None,
    up: Tensor | None,
    bias: Tensor | None,
    *,
    weight_format: str,
    act_format: str = "none",
    smooth: Tensor | None = None,
    weight_scale2: Tensor | None = None,
    act_scale2: float = 1.0,
    act_shift: float = 0.0,
    rotate: int = 0,
) -> Tensor:
    """y = Q(rot((x + act_shift) * smooth)) @ dequantize(weight_q).T + (x @ down.T) @ up.T + bias, in x's dtype.

    x [.., K], weight_q the codes of a weight [N, K] in `weight_format` (a float weight itself for "none"), weight_scale [N, K/g]
    (None for "none"), down [r, K], up [N, r], bias [N], smooth [K] -> [.., N]. Sums are float32, or float64 for float64 x.

    Activations are quantized to `act_format` ("none": not at all) row by row as they come; `act_scale2` is the tensor's scale of
    the NV formats, `weight_scale2` that of the weight (f32[1], or [N] where several weights were joined). `rotate` is the size
    of the Hadamard blocks that turn K, 0 for none: the weight was turned before it was quantized. The branch reads x as it is.

    Raises:
        ValueError: a format is unknown, or is none for weights or activations.
        RuntimeError: shapes do not fit one another or the format's blocks.
    """
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    scale_dtype = torch.float32 if x.dtype == torch.float64 else x.dtype
    raw = x.to(wide)
    xs = raw + act_shift if act_shift else raw
    if smooth is not None:
        xs = xs * smooth.to(wide)
    if rotate:
        xs = rotated(xs, rotate, weight=False)
    xs = fake_quantize(xs, act_format, scale_dtype, act_scale2)
    y = xs @ _weight(weight_q, weight_scale, weight_scale2, weight_format, wide).T
    if down is not None and up is not None:
        y = y + (raw @ down.to(wide).T) @ up.to(wide).T
    if bias is not None:
        y = y + bias.to(wide)
    return y.to(x.dtype)


def _weight(codes: Tensor, scale: Tensor | None, scale2: Tensor | None, weight_format: str, dtype: torch.dtype) -> Tensor:
    if weight_format == "none":
        return codes.to(dtype)
    if not format_of(weight_format).weight:
        raise ValueError(f"format {weight_format} is none for weights")
    if scale is None:
        raise ValueError(f"format {weight_format} needs the scales of its weight")
    return dequantize(codes, scale, scale2, weight_format, dtype)
