"""How a diffusion network is told the time: a sinusoidal code of a scalar, then a two-layer perceptron."""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def sinusoidal_embedding(positions: Tensor, dim: int, dtype: torch.dtype) -> Tensor:
    """[cos(p w_0) .. cos(p w_{k-1}), sin(p w_0) .. sin(p w_{k-1})] with w_i = 10000^(-i/k) and k = dim / 2.

    The order (cosines first) is that of Stable Diffusion's networks (Ho et al. 2020, `flip_sin_to_cos` in diffusers).
    The angles are formed in float32 or wider: a half-precision 999 * w_i would be wrong in its first digit.

    Args:
        positions: [N], integers or floats.
        dim: even.
        dtype: of the result.

    Returns: [N, dim].
    """
    angle_dtype = torch.promote_types(dtype, torch.float32)
    half = dim // 2
    exponents = torch.arange(half, device=positions.device, dtype=angle_dtype) / half
    angles = positions[:, None].to(angle_dtype) * torch.exp(-math.log(10000.0) * exponents)
    return torch.cat([angles.cos(), angles.sin()], dim=-1).to(dtype)


class TimestepEmbedding(nn.Module):
    """linear_2(silu(linear_1(x))): [..., in_features] -> [..., out_features]."""

    def __init__(self, in_features: int, hidden_features: int, out_features: int):
        super().__init__()
        self.linear_1 = nn.Linear(in_features, hidden_features)
        self.linear_2 = nn.Linear(hidden_features, out_features)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear_2(F.silu(self.linear_1(x)))
