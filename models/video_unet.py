"""AnimateDiff's U-Net (Guo et al. 2023): Stable Diffusion 1.5 on single frames, a motion module after every layer.

Frames ride in the batch, [B*F, C, H, W], everywhere but in the motion modules, where every pixel attends over its frames.
Parameters are named as in diffusers' `UNetMotionModel`, whose outputs the tests compare with.
"""

import itertools
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .timestep import TimestepEmbedding, sinusoidal_embedding
from .unet_layers import Downsample2D, ResnetBlock2D, TransformerBlock, Upsample2D, per_frame


@dataclass(frozen=True)
class Config:
    """A size of the network and of its example inputs. Every level but the lowest has spatial transformers."""

    channels: tuple[int, ...]  # of each level, highest resolution first
    layers_per_block: int
    context_dim: int
    num_heads: int
    norm_groups: int
    context_length: int
    frames: int
    height: int
    width: int
    batch: int = 1
    latent_channels: int = 4
    max_frames: int = 32

    INPUT_SIZES = ("batch", "frames", "height", "width")

    def __post_init__(self):
        factor = 2 ** (len(self.channels) - 1)
        if self.height % factor or self.width % factor:
            raise ValueError(f"height={self.height} and width={self.width} must be multiples of {factor}")
        if self.frames > self.max_frames:
            raise ValueError(f"frames={self.frames} is more than the {self.max_frames} positions of the motion modules")


SIZES = {
    "tiny": Config((16, 32), 1, context_dim=24, num_heads=2, norm_groups=4, context_length=5, frames=4, height=8, width=8),
    "small": Config(
        (64, 128, 256, 256), 1, context_dim=128, num_heads=8, norm_groups=32, context_length=77, frames=16, height=32, width=32
    ),
    "base": Config(
        (320, 640, 1280, 1280), 2, context_dim=768, num_heads=8, norm_groups=32, context_length=77, frames=16, height=64, width=64
    ),
}


class SpatialTransformer(nn.Module):
    """Each frame's pixels attend to one another and to the text.

    x: [B*F, C, H, W], context: [B*F, T, D] -> [B*F, C, H, W].
    """

    def __init__(self, channels: int, config: Config):
        super().__init__()
        self.norm = nn.GroupNorm(config.norm_groups, channels, eps=1e-6)
        self.proj_in = nn.Conv2d(channels, channels, 1)
        self.transformer_blocks = nn.ModuleList([TransformerBlock(channels, config.num_heads, config.context_dim)])
        self.proj_out = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        batch_frames, channels, height, width = x.shape
        hidden = self.proj_in(self.norm(x))
        hidden = hidden.permute(0, 2, 3, 1).reshape(batch_frames, height * width, channels)
        for block in self.transformer_blocks:
            hidden = block(hidden, context)
        hidden = hidden.reshape(batch_frames, height, width, channels).permute(0, 3, 1, 2)
        return x + self.proj_out(hidden)


class MotionModule(nn.Module):
    """Each pixel attends over its frames; the norm's statistics span all frames of a clip.

    x: [B*F, C, H, W] -> [B*F, C, H, W].
    """

    def __init__(self, channels: int, config: Config):
        super().__init__()
        self.norm = nn.GroupNorm(config.norm_groups, channels, eps=1e-6)
        self.proj_in = nn.Linear(channels, channels)
        self.transformer_blocks = nn.ModuleList([TransformerBlock(channels, config.num_heads, max_length=config.max_frames)])
        self.proj_out = nn.Linear(channels, channels)

    def forward(self, x: Tensor, frames: int) -> Tensor:
        batch_frames, channels, height, width = x.shape
        batch = batch_frames // frames
        clip = x.reshape(batch, frames, channels, height, width).permute(0, 2, 1, 3, 4)
        hidden = self.norm(clip).permute(0, 3, 4, 2, 1).reshape(batch * height * width, frames, channels)
        hidden = self.proj_in(hidden)
        for block in self.transformer_blocks:
            hidden = block(hidden)
        hidden = self.proj_out(hidden)
        hidden = hidden.reshape(batch, height, width, frames, channels).permute(0, 3, 4, 1, 2)
        return x + hidden.reshape(batch_frames, channels, height, width)


class DownBlock(nn.Module):
    """(resnet, transformer, motion) a layer, then half the resolution; also returns every state for the way up."""

    def __init__(self, in_channels: int, out_channels: int, time_dim: int, config: Config, *, attends: bool, downsamples: bool):
        super().__init__()
        widths = [in_channels] + [out_channels] * config.layers_per_block
        self.resnets = nn.ModuleList(ResnetBlock2D(a, b, time_dim, config.norm_groups, 1e-5) for a, b in itertools.pairwise(widths))
        self.attentions = nn.ModuleList(SpatialTransformer(out_channels, config) for _ in self.resnets if attends)
        self.motion_modules = nn.ModuleList(MotionModule(out_channels, config) for _ in self.resnets)
        self.downsamplers = nn.ModuleList([Downsample2D(out_channels)] if downsamples else [])

    def forward(self, x: Tensor, time: Tensor, context: Tensor, frames: int) -> tuple[Tensor, list[Tensor]]:
        states = []
        for i, resnet in enumerate(self.resnets):
            x = resnet(x, time)
            if self.attentions:
                x = self.attentions[i](x, context)
            x = self.motion_modules[i](x, frames)
            states.append(x)
        for downsample in self.downsamplers:
            x = downsample(x)
            states.append(x)
        return x, states


class MidBlock(nn.Module):
    """resnet, transformer, motion, resnet at the lowest resolution."""

    def __init__(self, channels: int, time_dim: int, config: Config):
        super().__init__()
        self.resnets = nn.ModuleList(ResnetBlock2D(channels, channels, time_dim, config.norm_groups, 1e-5) for _ in range(2))
        self.attentions = nn.ModuleList([SpatialTransformer(channels, config)])
        self.motion_modules = nn.ModuleList([MotionModule(channels, config)])

    def forward(self, x: Tensor, time: Tensor, context: Tensor, frames: int) -> Tensor:
        x = self.resnets[0](x, time)
        x = self.attentions[0](x, context)
        x = self.motion_modules[0](x, frames)
        return self.resnets[1](x, time)


class UpBlock(nn.Module):
    """(concatenate a state of the way down, resnet, transformer, motion) a layer, then twice the resolution."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        skip_channels: list[int],
        time_dim: int,
        config: Config,
        *,
        attends: bool,
        upsamples: bool,
    ):
        super().__init__()
        widths = [in_channels] + [out_channels] * (len(skip_channels) - 1)
        self.resnets = nn.ModuleList(
            ResnetBlock2D(width + skip, out_channels, time_dim, config.norm_groups, 1e-5) for width, skip in zip(widths, skip_channels)
        )
        self.attentions = nn.ModuleList(SpatialTransformer(out_channels, config) for _ in self.resnets if attends)
        self.motion_modules = nn.ModuleList(MotionModule(out_channels, config) for _ in self.resnets)
        self.upsamplers = nn.ModuleList([Upsample2D(out_channels)] if upsamples else [])

    def forward(self, x: Tensor, states: list[Tensor], time: Tensor, context: Tensor, frames: int) -> Tensor:
        for i, (resnet, state) in enumerate(zip(self.resnets, reversed(states))):
            x = resnet(torch.cat([x, state], dim=1), time)
            if self.attentions:
                x = self.attentions[i](x, context)
            x = self.motion_modules[i](x, frames)
        for upsample in self.upsamplers:
            x = upsample(x)
        return x


class VideoUNet(nn.Module):
    """Predicts the noise in a clip of latents, given the diffusion step and the text.

    forward(sample, timestep, encoder_hidden_states):
        sample: [B, C, F, H, W] noisy latents; H and W multiples of 2^(levels - 1), F <= max_frames.
        timestep: [] or [B], integer.
        encoder_hidden_states: [B, T, context_dim], the text encoder's states.
    Returns: [B, C, F, H, W].
    """

    def __init__(self, config: Config):
        super().__init__()
        channels, levels = config.channels, len(config.channels)
        time_dim = 4 * channels[0]
        self.time_channels = channels[0]
        self.conv_in = nn.Conv2d(config.latent_channels, channels[0], 3, padding=1)
        self.time_embedding = TimestepEmbedding(channels[0], time_dim, time_dim)

        self.down_blocks = nn.ModuleList()
        skip_channels = [channels[0]]
        for level, width in enumerate(channels):
            last = level == levels - 1
            above = channels[max(level - 1, 0)]
            self.down_blocks.append(DownBlock(above, width, time_dim, config, attends=not last, downsamples=not last))
            skip_channels += [width] * (config.layers_per_block + (not last))

        self.mid_block = MidBlock(channels[-1], time_dim, config)

        self.up_blocks = nn.ModuleList()
        for level in reversed(range(levels)):
            below = channels[min(level + 1, levels - 1)]
            skips = [skip_channels.pop() for _ in range(config.layers_per_block + 1)]
            attends, upsamples = level != levels - 1, level != 0
            self.up_blocks.append(UpBlock(below, channels[level], skips, time_dim, config, attends=attends, upsamples=upsamples))

        self.conv_norm_out = nn.GroupNorm(config.norm_groups, channels[0], eps=1e-5)
        self.conv_out = nn.Conv2d(channels[0], config.latent_channels, 3, padding=1)

    def forward(self, sample: Tensor, timestep: Tensor, encoder_hidden_states: Tensor) -> Tensor:
        batch, _, frames, _, _ = sample.shape
        time = self.time_embedding(sinusoidal_embedding(timestep.expand(batch), self.time_channels, sample.dtype))
        time = per_frame(time, frames)
        context = per_frame(encoder_hidden_states, frames)

        x = self.conv_in(sample.transpose(1, 2).flatten(0, 1))
        states = [x]
        for block in self.down_blocks:
            x, block_states = block(x, time, context, frames)
            states += block_states
        x = self.mid_block(x, time, context, frames)
        for block in self.up_blocks:
            depth = len(block.resnets)
            states, block_states = states[:-depth], states[-depth:]
            x = block(x, block_states, time, context, frames)
        x = self.conv_out(F.silu(self.conv_norm_out(x)))
        return x.unflatten(0, (batch, frames)).transpose(1, 2)


def example_inputs(config: Config) -> tuple[tuple, dict]:
    """Called as diffusers' pipelines call it: latents and step by position, the text by keyword."""
    sample = torch.randn(config.batch, config.latent_channels, config.frames, config.height, config.width)
    context = torch.randn(config.batch, config.context_length, config.context_dim)
    return (sample, torch.tensor(501)), {"encoder_hidden_states": context}
