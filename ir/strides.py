"""Tensors with given strides: what a caller's tensor may look like in memory, dims that stand for one element included."""

from collections.abc import Sequence

import torch


def laid_out(tensor: torch.Tensor, stride: Sequence[int]) -> torch.Tensor:
    """The elements of `tensor` with strides `stride`; where these are 0 its elements along the dim are equal.

    A tensor whose strides agree on dims larger than 1 is returned as it is.
    """
    if tensor.numel() == 0 or all(a == b for size, a, b in zip(tensor.shape, tensor.stride(), stride, strict=True) if size > 1):
        return tensor
    length = 1 + sum((size - 1) * step for size, step in zip(tensor.shape, stride, strict=True))
    result = tensor.new_zeros(length).as_strided(tensor.shape, list(stride))
    once = tuple(slice(0, 1) if step == 0 else slice(None) for step in stride)
    result[once] = tensor[once]
    return result
