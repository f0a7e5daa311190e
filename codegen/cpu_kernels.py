"""CPU kernels of dialect operators, from library calls or our own C++: the same function as the operator's body, with less memory and
time.

A kernel takes its operator's positional arguments; each is tested against the body in float64.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..ir.ops.norm import merge_stats, result_format
from .attention.cached import append_in_place, cached_attention, kv_append
from .cpu_convolutions import conv1d, conv2d, conv3d
from .experts.expert_choice import expert_choice, expert_mlp
from .experts.grouped import grouped_mm
from .experts.token_choice import token_choice_moe
from .low_rank.linear import lowrank_linear
from .rat.kernels import rat_attention, rat_cached_attention, step_in_place

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


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`aten.linear`, where rows lie along dim 0 of x [N, M, K] (images [M, K, N] whose places became the batch) as M products of
    matrices, each from x where it lies into its place in the result. ATen takes the N products [M, K], and copies every one:
    float32 [1024, 16, 64], two threads: 9.2 ms, here 1.1."""
    if not _has_rows_along_batch(x) or x.device.type != "cpu" or not x.is_floating_point():
        return torch._C._nn.linear(x, weight, bias)
    y = torch.empty(x.size(0), x.size(1), weight.size(0), dtype=x.dtype)
    columns = weight.t()
    for rows, place in zip(x.unbind(1), y.unbind(1), strict=True):
        if bias is None:
            torch.mm(rows, columns, out=place)
        else:
            torch.addmm(bias, rows, columns, out=place)
    return y


def _has_rows_along_batch(x: Tensor) -> bool:
    return x.dim() == 3 and x.stride(0) == 1 and x.stride(1) > 1 < x.stride(2) and 1 < x.size(1) <= x.size(0)


KERNELS: dict[Callable[..., Any], Callable[..., Any]] = {
    gw.norm_stats.default: norm_stats,
    gw.norm_apply.default: norm_apply,
    gw.lowrank_linear.default: lowrank_linear,
    gw.grouped_mm.default: grouped_mm,
    gw.token_choice_moe.default: token_choice_moe,
    gw.expert_choice.default: expert_choice,
    gw.expert_mlp.default: expert_mlp,
    gw.kv_append.default: kv_append,
    gw.cached_attention.default: cached_attention,
    gw.rat_attention.default: rat_attention,
    gw.rat_cached_attention.default: rat_cached_attention,
    torch.ops.aten.conv1d.default: conv1d,
    torch.ops.aten.conv2d.default: conv2d,
    torch.ops.aten.conv3d.default: conv3d,
    torch.ops.aten.linear.default: linear,
}

# The same where nobody reads the old caches any more: they are written to, and are the result.
IN_PLACE: dict[Callable[..., Any], Callable[..., Any]] = {
    gw.kv_append.default: append_in_place,
    gw.rat_cached_attention.default: step_in_place,
}
