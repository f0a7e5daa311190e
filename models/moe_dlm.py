"""A masked-diffusion language model with experts, in the family of LLaDA-MoE: a transformer that sees both ways and fills masked tokens
(Nie et al. 2025, "Large Language Diffusion Models"), whose tokens choose k of E gated experts.

Parameters are named as in transformers' mixtures of experts less the `model.` prefix; the tests compare a block with Mixtral's.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .decoder import Rotation


@dataclass(frozen=True)
class Config:
    """A size of the network and of its example inputs. `chosen` experts a token, each `hidden` wide; the last id stands for a mask."""

    vocabulary: int
    dim: int
    depth: int
    num_heads: int
    experts: int
    chosen: int
    hidden: int
    tied: bool
    length: int
    batch: int = 1
    norm_topk_prob: bool = False
    rope_base: float = 10000.0
    norm_eps: float = 1e-5

    INPUT_SIZES = ("batch", "length")

    @property
    def mask_id(self) -> int:
        return self.vocabulary - 1


SIZES = {
    "tiny": Config(vocabulary=256, dim=64, depth=2, num_heads=4, experts=8, chosen=2, hidden=32, tied=True, length=16, batch=2),
    # trained on text of the standard library (`text`): its 2048 byte pairs and the mask
    "text": Config(vocabulary=2049, dim=128, depth=4, num_heads=4, experts=16, chosen=4, hidden=64, tied=True, length=64),
    "small": Config(vocabulary=8192, dim=256, depth=4, num_heads=8, experts=64, chosen=8, hidden=128, tied=False, length=256),
    # the sizes of LLaDA-MoE 7B-A1B
    "base": Config(vocabulary=157184, dim=2048, depth=16, num_heads=16, experts=64, chosen=8, hidden=1024, tied=False, length=4096),
}


class Attention(nn.Module):
    """Self-attention over all tokens, those to come as well: [B, L, dim] -> [B, L, dim]."""

    def __init__(self, config: Config):
        super().__init__()
        self.head_dim = config.dim // config.num_heads
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            setattr(self, name, nn.Linear(config.dim, config.dim, bias=False))

    def forward(self, x: Tensor, rotation: Rotation, mask: Tensor | None) -> Tensor:
        query, key = (rotation.apply(self._split_heads(project(x))) for project in (self.q_proj, self.k_proj))
        attended = F.scaled_dot_product_attention(query, key, self._split_heads(self.v_proj(x)), attn_mask=mask)
        return self.o_proj(attended.transpose(1, 2).flatten(2))

    def _split_heads(self, x: Tensor) -> Tensor:
        """[B, L, heads * D] -> [B, heads, L, D]."""
        return x.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)


class Router(nn.Linear):
    """Scores of all experts for each token, in float32 or wider whatever the model's dtype: [T, dim] -> [T, E]."""

    def forward(self, x: Tensor) -> Tensor:
        wide = torch.promote_types(x.dtype, torch.float32)
        return F.linear(x.to(wide), self.weight.to(wide))


class Experts(nn.Module):
    """sum_j weight[t, j] down_e(silu(gate_e(x[t])) * up_e(x[t])) with e = index[t, j]: x [T, dim], index and weight [T, k] -> [T, dim]."""

    def __init__(self, config: Config):
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.empty(config.experts, 2 * config.hidden, config.dim))
        self.down_proj = nn.Parameter(torch.empty(config.experts, config.dim, config.hidden))

    def forward(self, x: Tensor, index: Tensor, weight: Tensor) -> Tensor:
        dense = weight.new_zeros(x.shape[0], self.down_proj.shape[0]).scatter(1, index, weight)  # [T, E]
        return self._each_on_its_own(x, index, dense) if self.training else self._all_on_all(x, dense)

    def _all_on_all(self, x: Tensor, weight: Tensor) -> Tensor:
        """What can be exported: E / k times the work."""
        gate, up = torch.matmul(x.unsqueeze(0), self.gate_up_proj.transpose(1, 2)).chunk(2, -1)  # [E, T, hidden]
        each = torch.matmul(F.silu(gate) * up, self.down_proj.transpose(1, 2))  # [E, T, dim]
        return (each * weight.t().unsqueeze(-1)).sum(0).to(x.dtype)

    def _each_on_its_own(self, x: Tensor, index: Tensor, weight: Tensor) -> Tensor:
        """The same at half the time of a training step: how many tokens an expert has depends on data."""
        result = torch.zeros_like(x, dtype=weight.dtype)
        for expert, (gate_up, down) in enumerate(zip(self.gate_up_proj, self.down_proj, strict=True)):
            tokens = (index == expert).any(1).nonzero().squeeze(1)
            gate, up = F.linear(x[tokens], gate_up).chunk(2, -1)
            result = result.index_add(0, tokens, F.linear(F.silu(gate) * up, down) * weight[tokens, expert, None])
        return result.to(x.dtype)


class MixtureOfExperts(nn.Module):
    """sum_e w_e FFN_e(x) over the k likeliest experts of each token, w their probabilities: [B, L, dim] -> [B, L, dim].

    With `norm_topk_prob` the k probabilities are scaled to a sum of 1. Source: Shazeer et al. 2017, section 2.
    """

    def __init__(self, config: Config):
        super().__init__()
        self.chosen, self.normalized = config.chosen, config.norm_topk_prob
        self.gate = Router(config.dim, config.experts, bias=False)
        self.experts = Experts(config)

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.reshape(-1, x.shape[-1])
        weight, index = self.gate(tokens).softmax(-1).topk(self.chosen, -1)
        if self.normalized:
            weight = weight / weight.sum(-1, keepdim=True)
        return self.experts(tokens, index, weight).reshape(x.shape)


class Layer(nn.Module):
    """Pre-norm attention and experts, each with a residual: [B, L, dim] -> [B, L, dim]."""

    def __init__(self, config: Config):
        super().__init__()
        self.input_layernorm = nn.RMSNorm(config.dim, eps=config.norm_eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = nn.RMSNorm(config.dim, eps=config.norm_eps)
        self.mlp = MixtureOfExperts(config)

    def forward(self, x: Tensor, rotation: Rotation, mask: Tensor | None) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), rotation, mask)
        return x + self.mlp(self.post_attention_layernorm(x))


class MoEDLM(nn.Module):
    """Predicts the token at every place from all that are not masked; those of places that are not masked mean nothing.

    forward(input_ids, attention_mask=None):
        input_ids: [B, L], integer in 0 .. vocabulary - 1, `mask_id` where a token is to be found.
        attention_mask: [B, L], 0 where a row is padded.
    Returns: [B, L, vocabulary], logits.
    """

    def __init__(self, config: Config):
        super().__init__()
        self.head_dim, self.rope_base, self.mask_id = config.dim // config.num_heads, config.rope_base, config.mask_id
        self.embed_tokens = nn.Embedding(config.vocabulary, config.dim)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.depth))
        self.norm = nn.RMSNorm(config.dim, eps=config.norm_eps)
        self.lm_head = nn.Linear(config.dim, config.vocabulary, bias=False)
        if config.tied:
            self.lm_head.weight = self.embed_tokens.weight

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        x = self.embed_tokens(input_ids)
        rotation = Rotation.of_positions(torch.arange(input_ids.shape[1], device=x.device), self.head_dim, self.rope_base, like=x)
        mask = None if attention_mask is None else attention_mask.to(torch.bool)[:, None, None, :]
        for layer in self.layers:
            x = layer(x, rotation, mask)
        return self.lm_head(self.norm(x))


def example_inputs(config: Config) -> tuple[tuple, dict]:
    """Tokens of which about half are masked."""
    shape = (config.batch, config.length)
    tokens = torch.randint(0, config.mask_id, shape)
    return (tokens.masked_fill(torch.rand(shape) < 0.5, config.mask_id),), {}
