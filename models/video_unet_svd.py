"""Stable Video Diffusion's U-Net (Blattmann et al. 2023): every spatial layer is followed by one over time, and a learned
weight blends the two.

Parameters are named as in diffusers' `UNetSpatioTemporalConditionModel`, whose outputs the tests compare with. Its
`image_only_indicator` is left out: a U-Net that is given a clip never sets it.
"""

import itertools
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .timestep import TimestepEmbedding, sinusoidal_embedding
from .unet_layers import Attention, Downsample2D, FeedForward, ResnetBlock2D, TransformerBlock, Upsample2D, per_frame


@dataclass(frozen=True)
class Config:
    """A size of the network and of its example inputs. Every level but the lowest has transformers."""

    channels: tuple[int, ...]  # of each level, highest resolution first
    num_heads: tuple[int, ...]  # of each level
    layers_per_block: int
    context_dim: int
    time_id_dim: int
    norm_groups: int
    context_length: int
    frames: int
    height: int
    width: int
    batch: int = 1
    in_channels: int = 8  # the noisy latents beside those of the conditioning image
    out_channels: int = 4

    INPUT_SIZES = ("batch", "frames", "height", "width")

    def __post_init__(self):
        factor = 2 ** (len(self.channels) - 1)
        if self.height % factor or self.width % factor:
            raise ValueError(f"height={self.height} and width={self.width} must be multiples of {factor}")


SIZES = {
    "tiny": Config((16, 32), (2, 4), 1, context_dim=24, time_id_dim=8, norm_groups=4, context_length=3, frames=3, height=8, width=8),
    "small": Config(
        (64, 128, 256, 256),
        (2, 4, 8, 8),
        1,
        context_dim=128,
        time_id_dim=64,
        norm_groups=32,
        context_length=1,
        frames=14,
        height=32,
        width=32,
    ),
    "base": Config(
        (320, 640, 1280, 1280),
        (5, 10, 20, 20),
        2,
        context_dim=1024,
        time_id_dim=256,
        norm_groups=32,
        context_length=1,
        frames=14,
        height=72,
        width=128,
    ),
}
NUM_TIME_IDS = 3  # frames a second, motion bucket, strength of the noise on the conditioning image


class AlphaBlender(nn.Module):
    """a * spatial + (1 - a) * temporal with a = sigmoid(mix_factor); all of one shape."""

    def __init__(self):
        super().__init__()
        self.mix_factor = nn.Parameter(torch.full((1,), 0.5))

    def forward(self, spatial: Tensor, temporal: Tensor) -> Tensor:
        alpha = torch.sigmoid(self.mix_factor)
        return alpha * spatial + (1.0 - alpha) * temporal


class TemporalResnetBlock(nn.Module):
    """A resnet whose convolutions are (3, 1, 1) and whose norms' statistics span all frames of a clip.

    x: [B, C, F, H, W], time: [B, F, D] -> [B, C, F, H, W].
    """

    def __init__(self, channels: int, time_dim: int, groups: int, eps: float):
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, channels, eps)
        self.conv1 = nn.Conv3d(channels, channels, (3, 1, 1), padding=(1, 0, 0))
        self.time_emb_proj = nn.Linear(time_dim, channels)
        self.norm2 = nn.GroupNorm(groups, channels, eps)
        self.conv2 = nn.Conv3d(channels, channels, (3, 1, 1), padding=(1, 0, 0))

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        hidden = self.conv1(F.silu(self.norm1(x)))
        hidden = hidden + self.time_emb_proj(F.silu(time)).transpose(1, 2)[..., None, None]
        return x + self.conv2(F.silu(self.norm2(hidden)))


class SpatioTemporalResBlock(nn.Module):
    """blend(h, temporal_resnet(h)) with h = spatial_resnet(x).

    x: [B*F, C_in, H, W], time: [B*F, D] -> [B*F, C_out, H, W].
    """

    def __init__(self, in_channels: int, out_channels: int, time_dim: int, groups: int, eps: float, temporal_eps: float):
        super().__init__()
        self.spatial_res_block = ResnetBlock2D(in_channels, out_channels, time_dim, groups, eps)
        self.temporal_res_block = TemporalResnetBlock(out_channels, time_dim, groups, temporal_eps)
        self.time_mixer = AlphaBlender()

    def forward(self, x: Tensor, time: Tensor, frames: int) -> Tensor:
        spatial = self.spatial_res_block(x, time).unflatten(0, (-1, frames)).transpose(1, 2)
        temporal = self.temporal_res_block(spatial, time.unflatten(0, (-1, frames)))
        return self.time_mixer(spatial, temporal).transpose(1, 2).flatten(0, 1)


class TemporalTransformerBlock(nn.Module):
    """Feed-forward, self-attention, attention over the context, feed-forward, all along the frames of each pixel.

    x: [B*F, S, dim] for S pixels, context: [B, T, context_dim] -> [B*F, S, dim].
    """

    def __init__(self, dim: int, num_heads: int, context_dim: int):
        super().__init__()
        self.norm_in = nn.LayerNorm(dim)
        self.ff_in = FeedForward(dim)
        self.norm1 = nn.LayerNorm(dim)
        self.attn1 = Attention(dim, num_heads)
        self.norm2 = nn.LayerNorm(dim)
        self.attn2 = Attention(dim, num_heads, context_dim)
        self.norm3 = nn.LayerNorm(dim)
        self.ff = FeedForward(dim)

    def forward(self, x: Tensor, context: Tensor, frames: int) -> Tensor:
        batch_frames, pixels, dim = x.shape
        batch = batch_frames // frames
        context = per_frame(context, pixels)  # [B*S, T, context_dim]: here pixels ride in the batch
        hidden = x.reshape(batch, frames, pixels, dim).transpose(1, 2).reshape(batch * pixels, frames, dim)
        hidden = hidden + self.ff_in(self.norm_in(hidden))
        hidden = hidden + self.attn1(self.norm1(hidden))
        hidden = hidden + self.attn2(self.norm2(hidden), context)
        hidden = hidden + self.ff(self.norm3(hidden))
        return hidden.reshape(batch, pixels, frames, dim).transpose(1, 2).reshape(batch_frames, pixels, dim)


class SpatioTemporalTransformer(nn.Module):
    """blend(h, temporal(h + embedding of the frame's number)) with h = spatial(x), inside a residual.

    x: [B*F, C, H, W], context: [B, T, D] -> [B*F, C, H, W].
    """

    def __init__(self, channels: int, num_heads: int, config: Config):
        super().__init__()
        self.norm = nn.GroupNorm(config.norm_groups, channels, eps=1e-6)
        self.proj_in = nn.Linear(channels, channels)
        self.transformer_blocks = nn.ModuleList([TransformerBlock(channels, num_heads, config.context_dim)])
        self.temporal_transformer_blocks = nn.ModuleList([TemporalTransformerBlock(channels, num_heads, config.context_dim)])
        self.time_pos_embed = TimestepEmbedding(channels, 4 * channels, channels)
        self.time_mixer = AlphaBlender()
        self.proj_out = nn.Linear(channels, channels)

    def forward(self, x: Tensor, context: Tensor, frames: int) -> Tensor:
        batch_frames, channels, height, width = x.shape
        hidden = self.norm(x).permute(0, 2, 3, 1).reshape(batch_frames, height * width, channels)
        hidden = self.proj_in(hidden)
        numbers = torch.arange(frames, device=x.device).repeat(batch_frames // frames)
        frame_embedding = self.time_pos_embed(sinusoidal_embedding(numbers, channels, x.dtype))[:, None]
        for spatial_block, temporal_block in zip(self.transformer_blocks, self.temporal_transformer_blocks):
            hidden = spatial_block(hidden, per_frame(context, frames))
            hidden = self.time_mixer(hidden, temporal_block(hidden + frame_embedding, context, frames))
        hidden = self.proj_out(hidden)
        return x + hidden.reshape(batch_frames, height, width, channels).permute(0, 3, 1, 2)


class DownBlock(nn.Module):
    """(resnet, transformer) a layer, then half the resolution; also returns every state for the way up."""

    def __init__(self, in_channels: int, level: int, time_dim: int, config: Config, *, attends: bool, downsamples: bool):
        super().__init__()
        out_channels = config.channels[level]
        eps = 1e-6 if attends else 1e-5
        widths = [in_channels] + [out_channels] * config.layers_per_block
        self.resnets = nn.ModuleList(
            SpatioTemporalResBlock(a, b, time_dim, config.norm_groups, eps, temporal_eps=eps) for a, b in itertools.pairwise(widths)
        )
        self.attentions = nn.ModuleList(
            SpatioTemporalTransformer(out_channels, config.num_heads[level], config) for _ in self.resnets if attends
        )
        self.downsamplers = nn.ModuleList([Downsample2D(out_channels)] if downsamples else [])

    def forward(self, x: Tensor, time: Tensor, context: Tensor, frames: int) -> tuple[Tensor, list[Tensor]]:
        states = []
        for i, resnet in enumerate(self.resnets):
            x = resnet(x, time, frames)
            if self.attentions:
                x = self.attentions[i](x, context, frames)
            states.append(x)
        for downsample in self.downsamplers:
            x = downsample(x)
            states.append(x)
        return x, states


class MidBlock(nn.Module):
    """resnet, transformer, resnet at the lowest resolution."""

    def __init__(self, time_dim: int, config: Config):
        super().__init__()
        channels = config.channels[-1]
        self.resnets = nn.ModuleList(
            SpatioTemporalResBlock(channels, channels, time_dim, config.norm_groups, 1e-5, temporal_eps=1e-5) for _ in range(2)
        )
        self.attentions = nn.ModuleList([SpatioTemporalTransformer(channels, config.num_heads[-1], config)])

    def forward(self, x: Tensor, time: Tensor, context: Tensor, frames: int) -> Tensor:
        x = self.resnets[0](x, time, frames)
        x = self.attentions[0](x, context, frames)
        return self.resnets[1](x, time, frames)


class UpBlock(nn.Module):
    """(concatenate a state of the way down, resnet, transformer) a layer, then twice the resolution."""

    def __init__(
        self, in_channels: int, level: int, skip_channels: list[int], time_dim: int, config: Config, *, attends: bool, upsamples: bool
    ):
        super().__init__()
        out_channels = config.channels[level]
        widths = [in_channels] + [out_channels] * (len(skip_channels) - 1)
        self.resnets = nn.ModuleList(
            SpatioTemporalResBlock(width + skip, out_channels, time_dim, config.norm_groups, 1e-6, temporal_eps=1e-6)
            for width, skip in zip(widths, skip_channels)
        )
        self.attentions = nn.ModuleList(
            SpatioTemporalTransformer(out_channels, config.num_heads[level], config) for _ in self.resnets if attends
        )
        self.upsamplers = nn.ModuleList([Upsample2D(out_channels)] if upsamples else [])

    def forward(self, x: Tensor, states: list[Tensor], time: Tensor, context: Tensor, frames: int) -> Tensor:
        for i, (resnet, state) in enumerate(zip(self.resnets, reversed(states))):
            x = resnet(torch.cat([x, state], dim=1), time, frames)
            if self.attentions:
                x = self.attentions[i](x, context, frames)
        for upsample in self.upsamplers:
            x = upsample(x)
        return x


class VideoUNetSVD(nn.Module):
    """Predicts the denoised clip (v-prediction) from noisy latents beside an image's, given the noise level.

    forward(sample, timestep, encoder_hidden_states, added_time_ids):
        sample: [B, F, C_in, H, W]; H and W multiples of 2^(levels - 1).
        timestep: [] or [B], float: a quarter of the logarithm of the noise level.
        encoder_hidden_states: [B, T, context_dim], the image encoder's state (T = 1 in the published model).
        added_time_ids: [B, 3], float: frames a second, motion bucket, noise on the conditioning image.
    Returns: [B, F, C_out, H, W].
    """

    def __init__(self, config: Config):
        super().__init__()
        channels, levels = config.channels, len(config.channels)
        time_dim = 4 * channels[0]
        self.time_channels, self.time_id_dim = channels[0], config.time_id_dim
        self.conv_in = nn.Conv2d(config.in_channels, channels[0], 3, padding=1)
        self.time_embedding = TimestepEmbedding(channels[0], time_dim, time_dim)
        self.add_embedding = TimestepEmbedding(NUM_TIME_IDS * config.time_id_dim, time_dim, time_dim)

        self.down_blocks = nn.ModuleList()
        skip_channels = [channels[0]]
        for level, width in enumerate(channels):
            last = level == levels - 1
            above = channels[max(level - 1, 0)]
            self.down_blocks.append(DownBlock(above, level, time_dim, config, attends=not last, downsamples=not last))
            skip_channels += [width] * (config.layers_per_block + (not last))

        self.mid_block = MidBlock(time_dim, config)

        self.up_blocks = nn.ModuleList()
        for level in reversed(range(levels)):
            below = channels[min(level + 1, levels - 1)]
            skips = [skip_channels.pop() for _ in range(config.layers_per_block + 1)]
            attends, upsamples = level != levels - 1, level != 0
            self.up_blocks.append(UpBlock(below, level, skips, time_dim, config, attends=attends, upsamples=upsamples))

        self.conv_norm_out = nn.GroupNorm(config.norm_groups, channels[0], eps=1e-5)
        self.conv_out = nn.Conv2d(channels[0], config.out_channels, 3, padding=1)

    def forward(self, sample: Tensor, timestep: Tensor, encoder_hidden_states: Tensor, added_time_ids: Tensor) -> Tensor:
        batch, frames, _, _, _ = sample.shape
        time = self.time_embedding(sinusoidal_embedding(timestep.expand(batch), self.time_channels, sample.dtype))
        time_ids = sinusoidal_embedding(added_time_ids.flatten(), self.time_id_dim, sample.dtype)
        time = per_frame(time + self.add_embedding(time_ids.reshape(batch, -1)), frames)

        x = self.conv_in(sample.flatten(0, 1))
        states = [x]
        for block in self.down_blocks:
            x, block_states = block(x, time, encoder_hidden_states, frames)
            states += block_states
        x = self.mid_block(x, time, encoder_hidden_states, frames)
        for block in self.up_blocks:
            depth = len(block.resnets)
            states, block_states = states[:-depth], states[-depth:]
            x = block(x, block_states, time, encoder_hidden_states, frames)
        x = self.conv_out(F.silu(self.conv_norm_out(x)))
        return x.unflatten(0, (batch, frames))


def example_inputs(config: Config) -> tuple[tuple, dict]:
    """Called as diffusers' pipelines call it: latents and noise level by position, the conditioning by keyword."""
    sample = torch.randn(config.batch, config.frames, config.in_channels, config.height, config.width)
    context = torch.randn(config.batch, config.context_length, config.context_dim)
    time_ids = torch.tensor([[6.0, 127.0, 0.02]]).repeat(config.batch, 1)
    return (sample, torch.tensor(0.64)), {"encoder_hidden_states": context, "added_time_ids": time_ids}
