"""Convolutions on CPU: pointwise ones as products of matrices, and 3-d ones without the kernel that unfolds a video.

A pointwise kernel is a matrix [C_out, C_in] that meets [B, C_in, places]: no scratch at all, where oneDNN has blocks of input and
result. Float32, two threads, against oneDNN: [2, 64, 32, 32] 0.10 ms and 0.20, [1, 3, 224, 224] 0.8 and 1.7, [1, 320, 64, 64] 3.3
and 3.5, [8, 2048, 7, 7] 3.9 and 3.3, the worst that was seen.
"""

from typing import Any

import torch
from torch import Tensor

from ..ir.infer import is_channels_last


def conv1d(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, stride: Any = 1, padding: Any = 0, dilation: Any = 1, groups: int = 1
) -> Tensor:
    """`aten.conv1d`."""
    if _is_pointwise(x, weight, stride, padding, groups):
        return _pointwise(x, weight, bias)
    return torch.conv1d(x, weight, bias, stride, padding, dilation, groups)


def conv2d(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, stride: Any = 1, padding: Any = 0, dilation: Any = 1, groups: int = 1
) -> Tensor:
    """`aten.conv2d`."""
    if _is_pointwise(x, weight, stride, padding, groups):
        return _pointwise(x, weight, bias)
    return torch.conv2d(x, weight, bias, stride, padding, dilation, groups)


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

    Two forms instead: (k, 1, 1) as the conv2d (k, 1) on [B, C, F, H W], which has no such cliff down to one row of 64 pixels;
    oneDNN's own call.
    """
    if _is_pointwise(x, weight, stride, padding, groups):
        return _pointwise(x, weight, bias)
    if x.device.type != "cpu" or x.dim() != 5 or not _is_channels_outside(x, weight):
        return torch.conv3d(x, weight, bias, stride, padding, dilation, groups)
    kernel, stride, padding, dilation = tuple(weight.shape[2:]), _triple(stride), _triple(padding), _triple(dilation)
    if kernel[1:] == (1, 1) == stride[1:] and padding[1:] == (0, 0):
        y = torch.conv2d(x.flatten(3), weight.flatten(3), bias, (stride[0], 1), (padding[0], 0), (dilation[0], 1), groups)
        return y.unflatten(3, x.shape[3:])
    if x.dtype is weight.dtype is torch.float32 and x.size(0) == 1 and groups == 1 and x.numel() and _has_onednn():
        return torch.ops.aten.mkldnn_convolution(x, weight, bias, padding, stride, dilation, groups)
    return torch.conv3d(x, weight, bias, stride, padding, dilation, groups)


def _is_pointwise(x: Tensor, weight: Tensor, stride: Any, padding: Any, groups: int) -> bool:
    """Whether the kernel is a matrix for the channels of float32 images."""
    return (
        x.dtype is weight.dtype is torch.float32
        and weight.numel() == weight.size(0) * weight.size(1)
        and x.dim() == weight.dim()
        and groups == 1
        and _is_all(stride, 1)
        and _is_all(padding, 0)
        and x.device.type == "cpu"
        and (x.dim() == 3 or _is_channels_outside(x, weight))
    )


def _is_channels_outside(x: Tensor, weight: Tensor) -> bool:
    """Whether the result's channels lie outside its places; ATen lays them innermost where those of input or weight are."""
    return x.stride(-1) < x.stride(1) and not _is_channels_last(weight)


def _pointwise(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    matrix = weight.flatten(1).expand(x.size(0), -1, -1)
    flat = x.flatten(2)
    y = torch.bmm(matrix, flat) if bias is None else torch.baddbmm(bias[:, None], matrix, flat)
    return y if x.dim() == 3 else y.unflatten(2, x.shape[2:])


def _is_all(setting: Any, number: int) -> bool:
    return all(n == number for n in setting) if isinstance(setting, (list, tuple)) else setting == number


def _triple(value: Any) -> tuple[int, ...]:
    return tuple(value) * (3 // len(value)) if isinstance(value, (list, tuple)) else (value,) * 3


def _is_channels_last(weight: Tensor) -> bool:
    """ATen's rule; the strides of a single channel may say either, or both."""
    if weight.size(1) > 1:
        return weight.stride(1) == 1 < weight.stride(-1)
    return is_channels_last(weight.shape, weight.stride())


def _has_onednn() -> bool:
    return bool(torch.backends.mkldnn.is_available() and torch.backends.mkldnn.enabled)
