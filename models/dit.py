"""DiT, the diffusion transformer with adaLN-Zero (Peebles & Xie 2023), with RMS norm on queries and keys (Esser et al. 2024)."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .timestep import TimestepEmbedding, sinusoidal_embedding


@dataclass(frozen=True)
class Config:
    """A size of the network and of its example inputs. `length` tokens are laid out as squarely as they divide."""

    dim: int
    depth: int
    num_heads: int
    length: int
    batch: int = 2
    patch: int = 2
    channels: int = 4
    num_classes: int = 1000

    INPUT_SIZES = ("batch", "length")

    def __post_init__(self):
        if self.length < 1:
            raise ValueError(f"length={self.length} must be at least one token")

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of tokens, rows the largest divisor of `length` up to its square root: 4096 -> (64, 64)."""
        rows = next(r for r in range(math.isqrt(self.length), 0, -1) if self.length % r == 0)
        return rows, self.length // rows


SIZES = {
    "tiny": Config(dim=64, depth=2, num_heads=4, length=16, num_classes=10),
    "digits": Config(dim=256, depth=3, num_heads=4, length=16, channels=1, num_classes=10),  # trained: models/digits.py is its data
    "small": Config(dim=384, depth=12, num_heads=6, length=256),  # DiT-S/2
    "base": Config(dim=1152, depth=28, num_heads=16, length=256),  # DiT-XL/2
}


def grid_positions(grid: tuple[int, int], dim: int) -> Tensor:
    """Fixed codes of each token's row (first half) and column (second half): [1, rows * columns, dim]."""
    rows, columns = grid
    row_codes = sinusoidal_embedding(torch.arange(rows), dim // 2, torch.get_default_dtype())
    column_codes = sinusoidal_embedding(torch.arange(columns), dim // 2, torch.get_default_dtype())
    codes = torch.cat([row_codes[:, None].expand(-1, columns, -1), column_codes[None].expand(rows, -1, -1)], dim=-1)
    return codes.reshape(1, rows * columns, dim)


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """x * (1 + scale) + shift; x: [B, N, dim], shift and scale: [B, dim]."""
    return x * (1.0 + scale[:, None]) + shift[:, None]


class Attention(nn.Module):
    """Self-attention with RMS-normed queries and keys: [B, N, dim] -> [B, N, dim]."""

    def __init__(self, dim: int, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.q_norm = nn.RMSNorm(dim // num_heads, eps=1e-6)
        self.k_norm = nn.RMSNorm(dim // num_heads, eps=1e-6)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        qkv = self.qkv(x).unflatten(-1, (3, self.num_heads, -1))  # [B, N, 3, heads, D]
        query, key, value = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        attended = F.scaled_dot_product_attention(self.q_norm(query), self.k_norm(key), value)
        return self.proj(attended.transpose(1, 2).flatten(2))


class MLP(nn.Module):
    """fc2(gelu_tanh(fc1(x))), four times wider inside: [..., dim] -> [..., dim]."""

    def __init__(self, dim: int):
        super().__init__()
        self.fc1 = nn.Linear(dim, 4 * dim)
        self.fc2 = nn.Linear(4 * dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


class Block(nn.Module):
    """x + gate * f(modulate(norm(x))) for f = attention, then MLP; shift, scale and gate come from the condition.

    x: [B, N, dim], condition: [B, dim] -> [B, N, dim].
    """

    def __init__(self, dim: int, num_heads: int):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, elementwise_affine=False, eps=1e-6)
        self.attn = Attention(dim, num_heads)
        self.norm2 = nn.LayerNorm(dim, elementwise_affine=False, eps=1e-6)
        self.mlp = MLP(dim)
        self.modulation = nn.Linear(dim, 6 * dim)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        shift_attn, scale_attn, gate_attn, shift_mlp, scale_mlp, gate_mlp = self.modulation(F.silu(condition)).chunk(6, dim=-1)
        x = x + gate_attn[:, None] * self.attn(modulate(self.norm1(x), shift_attn, scale_attn))
        return x + gate_mlp[:, None] * self.mlp(modulate(self.norm2(x), shift_mlp, scale_mlp))


class DiT(nn.Module):
    """Predicts noise and variance of an image of latents, given the diffusion step and the class.

    forward(sample, timestep, class_labels):
        sample: [B, C, H, W] with (H / patch) * (W / patch) = length.
        timestep: [B], integer.
        class_labels: [B], integer in 0 .. num_classes; the last one means no class (classifier-free guidance).
    Returns: [B, 2C, H, W], the noise above the variance.
    """

    def __init__(self, config: Config):
        super().__init__()
        dim = config.dim
        self.patch, self.grid = config.patch, config.grid
        self.patch_embed = nn.Conv2d(config.channels, dim, config.patch, stride=config.patch)
        self.register_buffer("positions", grid_positions(config.grid, dim))
        self.time_channels = 256
        self.time_embedding = TimestepEmbedding(self.time_channels, dim, dim)
        self.class_embedding = nn.Embedding(config.num_classes + 1, dim)
        self.blocks = nn.ModuleList(Block(dim, config.num_heads) for _ in range(config.depth))
        self.norm = nn.LayerNorm(dim, elementwise_affine=False, eps=1e-6)
        self.modulation = nn.Linear(dim, 2 * dim)
        self.head = nn.Linear(dim, config.patch**2 * 2 * config.channels)

    def forward(self, sample: Tensor, timestep: Tensor, class_labels: Tensor) -> Tensor:
        time = self.time_embedding(sinusoidal_embedding(timestep, self.time_channels, sample.dtype))
        condition = time + self.class_embedding(class_labels)
        x = self.patch_embed(sample).flatten(2).transpose(1, 2) + self.positions
        for block in self.blocks:
            x = block(x, condition)
        shift, scale = self.modulation(F.silu(condition)).chunk(2, dim=-1)
        return self._unpatchify(self.head(modulate(self.norm(x), shift, scale)))

    def _unpatchify(self, tokens: Tensor) -> Tensor:
        """[B, rows * columns, patch * patch * C] -> [B, C, rows * patch, columns * patch]."""
        rows, columns = self.grid
        pixels = tokens.reshape(tokens.shape[0], rows, columns, self.patch, self.patch, -1)
        return pixels.permute(0, 5, 1, 3, 2, 4).reshape(tokens.shape[0], -1, rows * self.patch, columns * self.patch)


def example_inputs(config: Config) -> tuple[tuple, dict]:
    rows, columns = config.grid
    sample = torch.randn(config.batch, config.channels, rows * config.patch, columns * config.patch)
    timestep = torch.randint(0, 1000, (config.batch,))
    class_labels = torch.randint(0, config.num_classes, (config.batch,))
    return (sample, timestep, class_labels), {}
