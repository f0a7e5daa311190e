"""A causal language model of the Llama 3 family (Grattafiori et al. 2024): RMS norm, rotary positions, grouped queries, SwiGLU.

Parameters are named as in transformers' `LlamaForCausalLM` less its `model.` prefix; the tests compare outputs with it.
"""

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..ir.errors import InputError

if TYPE_CHECKING:
    from . import rat_lm


@dataclass(frozen=True)
class Config:
    """A size of the network and of its example inputs. Each of `num_kv_heads` keys serves num_heads / num_kv_heads queries."""

    vocabulary: int
    dim: int
    depth: int
    num_heads: int
    num_kv_heads: int
    hidden: int
    tied: bool
    length: int
    batch: int = 1
    rope_base: float = 500000.0
    norm_eps: float = 1e-5

    INPUT_SIZES = ("batch", "length")


SIZES = {
    "tiny": Config(vocabulary=256, dim=64, depth=2, num_heads=4, num_kv_heads=2, hidden=176, tied=True, length=16),
    # trained on text of the standard library (`text`); its depth is for schedules that skip layers
    "text": Config(vocabulary=2048, dim=128, depth=12, num_heads=4, num_kv_heads=2, hidden=384, tied=True, length=256, rope_base=10000.0),
    "small": Config(vocabulary=8192, dim=512, depth=8, num_heads=8, num_kv_heads=4, hidden=1408, tied=False, length=512),
    # Llama 3.2 1B, without its rescaling of low rotary frequencies for contexts beyond 8192
    "base": Config(vocabulary=128256, dim=2048, depth=16, num_heads=32, num_kv_heads=8, hidden=8192, tied=True, length=2048),
}


@dataclass(frozen=True)
class Rotation:
    """cos and sin of each position's rotary angles, the two halves alike: [L, head_dim], or [B, 1, L, head_dim] where rows differ."""

    cos: Tensor
    sin: Tensor

    @staticmethod
    def of_positions(positions: Tensor, head_dim: int, base: float, like: Tensor) -> "Rotation":
        """Angle p * base^(-2i / head_dim) at position p (Su et al. 2021), formed in float32 or wider, in `like`'s dtype and device."""
        angle_dtype = torch.promote_types(like.dtype, torch.float32)
        exponents = torch.arange(0, head_dim, 2, device=like.device, dtype=angle_dtype) / head_dim
        angles = positions.to(angle_dtype).unsqueeze(-1) * base**-exponents
        angles = torch.cat([angles, angles], dim=-1)
        return Rotation(angles.cos().to(like.dtype), angles.sin().to(like.dtype))

    def apply(self, x: Tensor) -> Tensor:
        """Rotates the pairs (x_i, x_{i + head_dim/2}); x: [B, heads, L, head_dim]."""
        first, second = x.chunk(2, dim=-1)
        return x * self.cos + torch.cat([-second, first], dim=-1) * self.sin


class Attention(nn.Module):
    """Causal self-attention with grouped queries: [B, L, dim] -> [B, L, dim]. `mask` bool [L, L] says what a token sees where that is
    not all before it."""

    def __init__(self, config: "Config | rat_lm.Config"):
        super().__init__()
        self.head_dim = config.dim // config.num_heads
        self.q_proj = nn.Linear(config.dim, config.num_heads * self.head_dim, bias=False)
        self.k_proj = nn.Linear(config.dim, config.num_kv_heads * self.head_dim, bias=False)
        self.v_proj = nn.Linear(config.dim, config.num_kv_heads * self.head_dim, bias=False)
        self.o_proj = nn.Linear(config.num_heads * self.head_dim, config.dim, bias=False)

    def forward(self, x: Tensor, rotation: Rotation, mask: Tensor | None = None) -> Tensor:
        query = rotation.apply(self._split_heads(self.q_proj(x)))
        key = rotation.apply(self._split_heads(self.k_proj(x)))
        value = self._split_heads(self.v_proj(x))
        attended = F.scaled_dot_product_attention(query, key, value, mask, is_causal=mask is None, enable_gqa=True)
        return self.o_proj(attended.transpose(1, 2).flatten(2))

    def _split_heads(self, x: Tensor) -> Tensor:
        """[B, L, heads * D] -> [B, heads, L, D]."""
        return x.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)


class SwiGLU(nn.Module):
    """down(silu(gate(x)) * up(x)) (Shazeer 2020): [..., dim] -> [..., dim]."""

    def __init__(self, dim: int, hidden: int):
        super().__init__()
        self.gate_proj = nn.Linear(dim, hidden, bias=False)
        self.up_proj = nn.Linear(dim, hidden, bias=False)
        self.down_proj = nn.Linear(hidden, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Layer(nn.Module):
    """Pre-norm attention and SwiGLU, each with a residual: [B, L, dim] -> [B, L, dim]."""

    def __init__(self, config: Config):
        super().__init__()
        self.input_layernorm = nn.RMSNorm(config.dim, eps=config.norm_eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = nn.RMSNorm(config.dim, eps=config.norm_eps)
        self.mlp = SwiGLU(config.dim, config.hidden)

    def forward(self, x: Tensor, rotation: Rotation) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), rotation)
        return x + self.mlp(self.post_attention_layernorm(x))


class Decoder(nn.Module):
    """Predicts each next token from those before it.

    forward(input_ids, position_ids=None):
        input_ids: [B, L], integer in 0 .. vocabulary - 1.
        position_ids: [B, L], integer: each token's place in its sequence; 0 .. L - 1 when None.
    Returns: [B, L, vocabulary], logits.
    """

    def __init__(self, config: Config):
        super().__init__()
        self.head_dim, self.rope_base = config.dim // config.num_heads, config.rope_base
        self.embed_tokens = nn.Embedding(config.vocabulary, config.dim)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.depth))
        self.norm = nn.RMSNorm(config.dim, eps=config.norm_eps)
        self.lm_head = nn.Linear(config.dim, config.vocabulary, bias=False)
        if config.tied:
            self.lm_head.weight = self.embed_tokens.weight

    def forward(self, input_ids: Tensor, position_ids: Tensor | None = None) -> Tensor:
        x = self.embed_tokens(input_ids)
        # One rotation for all heads: [B, 1, L, ..]; without position_ids one for all rows too.
        positions = torch.arange(input_ids.shape[1], device=x.device) if position_ids is None else position_ids.unsqueeze(1)
        rotation = Rotation.of_positions(positions, self.head_dim, self.rope_base, like=x)
        for layer in self.layers:
            x = layer(x, rotation)
        return self.lm_head(self.norm(x))


def with_layers(network: Decoder, kept: Sequence[int]) -> Decoder:
    """A decoder of these layers of `network`, in this order, that shares its weights: what skipping all others computes.

    Raises: InputError for a layer that `network` does not have.
    """
    depth = len(network.layers)
    for index in kept:
        if not 0 <= index < depth:
            raise InputError(f"the decoder has no layer {index}: they are 0 .. {depth - 1}")
    thinned = copy.copy(network)
    thinned._modules = dict(network._modules)  # a shallow copy shares the table of modules too
    thinned.layers = nn.ModuleList(network.layers[index] for index in kept)
    return thinned


def example_inputs(config: Config) -> tuple[tuple, dict]:
    return (torch.randint(0, config.vocabulary, (config.batch, config.length)),), {}
