"""Rotation of blocks of K by a Sylvester Hadamard matrix H (entries +-1, H H^T = b I), which spreads an outlier over its block.

Activations and weights share the factor 1/b as two powers of two, so that the pair is exact: 1/sqrt(32) would not be (2e-6 off
in float32).
"""

import math
from typing import Any

import torch
from torch import Tensor


def hadamard(size: int, dtype: torch.dtype = torch.float32, device: Any = None) -> Tensor:
    """H [size, size], size a power of two: entry (i, j) is -1 to the number of bits that i and j share.

    Raises:
        ValueError: the size is no power of two.
    """
    if size < 1 or size & (size - 1):
        raise ValueError(f"a Hadamard matrix of Sylvester's has a power of two rows, not {size}")
    h = torch.ones(1, 1, dtype=dtype, device=device)
    while h.size(0) < size:
        h = torch.cat([torch.cat([h, h], 1), torch.cat([h, -h], 1)], 0)
    return h


def rotate(values: Tensor, size: int, *, weight: bool) -> Tensor:
    """blocks(values, size) @ H * 2**-e along the last dim, e = ceil(log2(size)/2) for a weight and floor for activations.

    Raises:
        ValueError: `size` is no power of two.
    """
    half = math.log2(size) / 2
    factor = 2.0 ** -(math.ceil(half) if weight else math.floor(half))
    blocks = values.unflatten(-1, (-1, size))
    return (blocks @ (hadamard(size, values.dtype, values.device) * factor)).flatten(-2)
