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
    """`aten.conv3d`, without the kernel that ATen leaves oneDNN for where one video has small sizes: it unfolds the video, prod(k)
    times the input as scratch. Float32 [1, 32, 16, 32, 32], two threads: 96 ms and 54 MiB for 3 x 3 x 3, oneDNN 13 ms and 2.1.

    Three forms instead: a pointwise kernel as a product of matrices [C_out, C_in] [B, C_in, F H W], with no scratch at all where
    oneDNN has blocks of input and result; (k, 1, 1) as the conv2d (k, 1) on [B, C, F, H W], which has no such cliff down to one
    row of 64 pixels; oneDNN's own call.
    """
    if x.device.type != "cpu" or x.dim() != 5:
        return torch.conv3d(x, weight, bias, stride, padding, dilation, groups)
    kernel, stride, padding, dilation = tuple(weight.shape[2:]), _triple(stride), _triple(padding), _triple(dilation)
    is_plain = x.dtype is weight.dtype is torch.float32 and not _is_channels_last(x) and not _is_channels_last(weight)
    if is_plain and kernel == (1, 1, 1) == stride and padding == (0, 0, 0) and groups == 1:
        matrix = weight.flatten(1).expand(x.size(0), -1, -1)
        flat = x.flatten(2)
        y = torch.bmm(matrix, flat) if bias is None else torch.baddbmm(bias[:, None], matrix, flat)
        return y.unflatten(2, x.shape[2:])
    if kernel[1:] == (1, 1) == stride[1:] and padding[1:] == (0, 0):
        y = torch.conv2d(x.flatten(3), weight.flatten(3), bias, (stride[0], 1), (padding[0], 0), (dilation[0], 1), groups)
        return y.unflatten(3, x.shape[3:])
    if is_plain and x.size(0) == 1 and groups == 1 and x.numel() and _has_onednn():
        return torch.ops.aten.mkldnn_convolution(x, weight, bias, padding, stride, dilation, groups)
    return torch.conv3d(x, weight, bias, stride, padding, dilation, groups)


def _triple(value: Any) -> tuple[int, ...]:
    return tuple(value) * (3 // len(value)) if isinstance(value, (list, tuple)) else (value,) * 3


def _is_channels_last(x: Tensor) -> bool:
    return not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last_3d)


def _has_onednn() -> bool:
    return bool(torch.backends.mkldnn.is_available() and torch.backends.mkldnn.enabled)


KERNELS: dict[Callable[..., Any], Callable[..., Any]] = {
    gw.norm_stats.default: norm_stats,
    gw.norm_apply.default: norm_apply,
    torch.ops.aten.conv3d.default: conv3d,
}
