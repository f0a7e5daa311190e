"""CPU kernels of dialect operators from library calls: the same function as the operator's body, with less memory and time.

A kernel takes its operator's positional arguments; each is tested against the body in float64.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..ir.ops.norm import merge_stats, result_format

gw = torch.ops.gw


def norm_stats(x: Tensor, groups: int) -> Tensor:
    """`gw.norm_stats` one group at a time, so that the squares exist for one group only: 1.4 ms where `var_mean` takes 7.3
    (float32 [1, 64, 16, 32, 32], one thread), and 1/G of x as scratch instead of 3 x."""
    if x.device.type != "cpu" or x.dtype not in (torch.float32, torch.float64) or x.numel() < 2**14:
        return gw.norm_stats.default(x, groups)
    grouped = x.unflatten(1, (groups, -1))
    within = tuple(range(2, grouped.dim()))
    mean = grouped.mean(within)
    stats = torch.empty(1, *mean.shape, 3, dtype=x.dtype)
    stats[0, :, :, 0] = grouped[0, 0].numel()
    stats[0, :, :, 1] = mean
    for g in range(groups):
        rest = grouped[:, g] - mean[:, g].view(-1, *[1] * len(within))
        stats[0, :, g, 2] = rest.square_().flatten(1).sum(1)
    return stats


def norm_apply(x: Tensor, stats: Tensor, weight: Tensor | None, bias: Tensor | None, groups: int, eps: float) -> Tensor:
    """`gw.norm_apply` as one multiply-add per element: y = x * a_c + b_c with a = rsqrt(var + eps) w, b = bias - mean a."""
    if x.device.type != "cpu" or x.dtype != stats.dtype:
        return gw.norm_apply.default(x, stats, weight, bias, groups, eps)
    count, mean, m2 = merge_stats(stats)
    per_channel = x.size(1) // groups
    scale = torch.rsqrt(m2 / count + eps).repeat_interleave(per_channel, 1)
    if weight is not None:
        scale = scale * weight
    shift = -mean.repeat_interleave(per_channel, 1) * scale
    if bias is not None:
        shift = shift + bias
    channels = (x.size(0), x.size(1), *[1] * (x.dim() - 2))
    y = torch.empty(x.shape, dtype=x.dtype, memory_format=result_format(x))
    return torch.addcmul(shift.view(channels), x, scale.view(channels), out=y)


def conv3d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = (1, 1, 1),
    padding: Any = (0, 0, 0),
    dilation: Any = (1, 1, 1),
    groups: int = 1,
) -> Tensor:
    """`aten.conv3d`; a kernel (k, 1, 1) as the conv2d (k, 1) on [B, C, F, H W].

    ATen leaves oneDNN for a slow kernel with 3 x the input as scratch when the first four sizes of the input are small, as those
    of a slice are: 2 to 3 times slower per row. The conv2d has no such cliff down to one row of 64 pixels.
    """
    flat = x.device.type == "cpu" and x.dim() == 5 and tuple(weight.shape[3:]) == (1, 1)
    if not flat or tuple(stride[1:]) != (1, 1) or tuple(padding[1:]) != (0, 0):
        return torch.conv3d(x, weight, bias, stride, padding, dilation, groups)
    y = torch.conv2d(x.flatten(3), weight.flatten(3), bias, (stride[0], 1), (padding[0], 0), (dilation[0], 1), groups)
    return y.unflatten(3, x.shape[3:])


KERNELS: dict[Callable[..., Any], Callable[..., Any]] = {
    gw.norm_stats.default: norm_stats,
    gw.norm_apply.default: norm_apply,
    torch.ops.aten.conv3d.default: conv3d,
}
