"""The layers that both video U-Nets are made of, as in Stable Diffusion (Rombach et al. 2022).

Parameters bear the names that diffusers gives them, so a published checkpoint of either network loads as it is.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def per_frame(x: Tensor, frames: int) -> Tensor:
    """Repeats each batch entry once a frame: [B, ...] -> [B*F, ...]."""
    return x.unsqueeze(1).expand(-1, frames, *x.shape[1:]).flatten(0, 1)


class ResnetBlock2D(nn.Module):
    """shortcut(x) + conv2(silu(norm2(conv1(silu(norm1(x))) + proj(silu(time))))).

    x: [N, C_in, H, W], time: [N, D] -> [N, C_out, H, W].
    """

    def __init__(self, in_channels: int, out_channels: int, time_dim: int, groups: int, eps: float):
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, in_channels, eps)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.time_emb_proj = nn.Linear(time_dim, out_channels)
        self.norm2 = nn.GroupNorm(groups, out_channels, eps)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.conv_shortcut = nn.Conv2d(in_channels, out_channels, 1) if in_channels != out_channels else None

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        hidden = self.conv1(F.silu(self.norm1(x)))
        hidden = hidden + self.time_emb_proj(F.silu(time))[:, :, None, None]
        hidden = self.conv2(F.silu(self.norm2(hidden)))
        shortcut = x if self.conv_shortcut is None else self.conv_shortcut(x)
        return shortcut + hidden


class Downsample2D(nn.Module):
    """Halves height and width by a strided convolution: [N, C, H, W] -> [N, C, H/2, W/2]."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)


class Upsample2D(nn.Module):
    """Doubles height and width by nearest neighbours, then convolves: [N, C, H, W] -> [N, C, 2H, 2W]."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class Attention(nn.Module):
    """Multi-head attention of x over a context, or over itself.

    x: [N, L, dim], context: [N, T, context_dim] or None -> [N, L, dim].
    """

    def __init__(self, dim: int, num_heads: int, context_dim: int | None = None):
        super().__init__()
        context_dim = dim if context_dim is None else context_dim
        self.num_heads = num_heads
        self.to_q = nn.Linear(dim, dim, bias=False)
        self.to_k = nn.Linear(context_dim, dim, bias=False)
        self.to_v = nn.Linear(context_dim, dim, bias=False)
        self.to_out = nn.ModuleList([nn.Linear(dim, dim)])

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        context = x if context is None else context
        query = self._split_heads(self.to_q(x))
        key = self._split_heads(self.to_k(context))
        value = self._split_heads(self.to_v(context))
        attended = F.scaled_dot_product_attention(query, key, value)
        return self.to_out[0](attended.transpose(1, 2).flatten(2))

    def _split_heads(self, x: Tensor) -> Tensor:
        """[N, L, heads * D] -> [N, heads, L, D]."""
        return x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)


class GEGLU(nn.Module):
    """a * gelu(b) with [a, b] = proj(x) (Shazeer 2020): [..., dim] -> [..., hidden]."""

    def __init__(self, dim: int, hidden: int):
        super().__init__()
        self.proj = nn.Linear(dim, 2 * hidden)

    def forward(self, x: Tensor) -> Tensor:
        value, gate = self.proj(x).chunk(2, dim=-1)
        return value * F.gelu(gate)


class FeedForward(nn.Module):
    """linear(geglu(x)), four times wider inside: [..., dim] -> [..., dim]."""

    def __init__(self, dim: int):
        super().__init__()
        # The middle place is the dropout of training; it keeps the last layer's published name, `net.2`.
        self.net = nn.Sequential(GEGLU(dim, 4 * dim), nn.Identity(), nn.Linear(4 * dim, dim))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


class SinusoidalPositions(nn.Module):
    """Adds [sin, cos, sin, cos, ...] position codes (Vaswani et al. 2017) along dim 1 of x: [N, L, dim], L <= max_length."""

    def __init__(self, dim: int, max_length: int):
        super().__init__()
        frequencies = 10000.0 ** (-torch.arange(0, dim, 2) / dim)
        angles = torch.arange(max_length)[:, None] * frequencies
        self.register_buffer("pe", torch.stack([angles.sin(), angles.cos()], dim=-1).flatten(-2)[None])

    def forward(self, x: Tensor) -> Tensor:
        return x + self.pe[:, : x.shape[1]]


class TransformerBlock(nn.Module):
    """Pre-norm self-attention, attention over a context, GEGLU feed-forward, each with a residual.

    Without a context the second attention is self-attention too; with `max_length` position codes are added before
    each attention. Both are how AnimateDiff's motion modules attend over frames.

    x: [N, L, dim], context: [N, T, context_dim] or None -> [N, L, dim].
    """

    def __init__(self, dim: int, num_heads: int, context_dim: int | None = None, max_length: int | None = None):
        super().__init__()
        self.pos_embed = None if max_length is None else SinusoidalPositions(dim, max_length)
        self.norm1 = nn.LayerNorm(dim)
        self.attn1 = Attention(dim, num_heads)
        self.norm2 = nn.LayerNorm(dim)
        self.attn2 = Attention(dim, num_heads, context_dim)
        self.norm3 = nn.LayerNorm(dim)
        self.ff = FeedForward(dim)

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        x = x + self.attn1(self._positioned(self.norm1(x)))
        x = x + self.attn2(self._positioned(self.norm2(x)), context)
        return x + self.ff(self.norm3(x))

    def _positioned(self, x: Tensor) -> Tensor:
        return x if self.pos_embed is None else self.pos_embed(x)
