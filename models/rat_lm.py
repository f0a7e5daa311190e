"""A causal language model of chunked recurrence with softmax across chunks (RAT, arXiv 2507.04416), alone or taking turns with attention to
a window.

A RAT layer smooths keys and values by a gated recurrence inside chunks of L tokens, and lets each token attend to the last state of every
earlier chunk and to its own: of T tokens a cache keeps T / L entries. Queries and keys are shared by groups of heads, values and gates
are each head's own. Norms, SwiGLU and windowed attention are the zoo's decoder's.

RAT+ (arXiv 2602.18196) lets the recurrence run on through the chunks, and a token sees the states of the last `window` tokens and of the
first `sinks` besides: with a window as long as the sequence it is attention to all states, which is how it is trained, and any chunk
and window is a sparse form of the same weights.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..ir.ops.rat import rat_attention
from .decoder import Attention, Rotation, SwiGLU

GROUPS = 2  # of heads that share queries and keys


@dataclass(frozen=True)
class Config:
    """A size of the network and of its example inputs. With a `window` every second layer is attention to the last `window` tokens, in
    which each of `num_kv_heads` keys serves num_heads / num_kv_heads queries; without one all layers are RAT. With `plus` all layers
    are RAT+, and `window` and `sinks` are what each of them sees besides the ends of chunks.

    Raises: ValueError where heads fall into no two equal groups.
    """

    vocabulary: int
    dim: int
    depth: int
    num_heads: int
    num_kv_heads: int
    hidden: int
    chunk: int
    window: int
    tied: bool
    length: int
    batch: int = 1
    rope_base: float = 10000.0
    norm_eps: float = 1e-6
    plus: bool = False
    sinks: int = 0

    INPUT_SIZES = ("batch", "length")

    def __post_init__(self) -> None:
        if self.num_heads % GROUPS:
            raise ValueError(f"{self.num_heads} heads are no {GROUPS} equal groups")


SIZES = {
    "tiny": Config(
        vocabulary=256, dim=64, depth=2, num_heads=4, num_kv_heads=2, hidden=176, chunk=4, window=6, tied=True, length=16
    ),
    "plus": Config(
        vocabulary=256, dim=64, depth=2, num_heads=4, num_kv_heads=4, hidden=176, chunk=4, window=6, tied=True, length=16, plus=True,
        sinks=2,
    ),
    # trained on text of the standard library (`text`)
    "text": Config(
        vocabulary=2048, dim=128, depth=8, num_heads=4, num_kv_heads=2, hidden=384, chunk=16, window=64, tied=True, length=256
    ),
    "small": Config(
        vocabulary=8192, dim=512, depth=8, num_heads=8, num_kv_heads=4, hidden=1408, chunk=16, window=128, tied=False, length=512
    ),
    # depth, dim, heads, chunk and window of RAT's hybrid of 1.3 billion; hidden units and vocabulary are those of its size elsewhere
    "base": Config(
        vocabulary=32000, dim=2048, depth=24, num_heads=16, num_kv_heads=16, hidden=5504, chunk=16, window=1025, tied=True, length=4096
    ),
}  # fmt: skip


class RatMixer(nn.Module):
    """W_out(sigmoid(z) * rat_attention(q, k, v, g + b)), with z, v, g, q and k one product of x: [B, L, dim] -> [B, L, dim].

    Head n reads queries and keys of group n % GROUPS. Its keys and queries are turned by the number of their chunk.
    """

    def __init__(self, config: Config):
        super().__init__()
        self.chunk, self.num_heads, self.head_dim = config.chunk, config.num_heads, config.dim // config.num_heads
        shared = GROUPS * self.head_dim
        self.widths = [config.dim, config.dim, config.dim, shared, shared]
        self.in_proj = nn.Linear(config.dim, sum(self.widths), bias=False)
        # Half-lives spread over the chunk: sigmoid(log u) = u / (u + 1) (chrono initialisation, Tallec & Ollivier 2018).
        self.gate_bias = nn.Parameter(torch.empty(config.dim).uniform_(1, max(config.chunk - 1, 1)).log())
        self.o_proj = nn.Linear(config.dim, config.dim, bias=False)

    def forward(self, x: Tensor, rotation: Rotation) -> Tensor:
        z, v, gate, q, k = self.in_proj(x).split(self.widths, dim=-1)
        q, k = (self._split_heads(each).repeat(1, self.num_heads // GROUPS, 1, 1) for each in (q, k))
        v, gate = self._split_heads(v), self._split_heads(gate + self.gate_bias)
        options = {"chunk": self.chunk, "scale": self.head_dim**-0.5}
        attended = rat_attention(q, k, v, gate, None, rotation.cos, rotation.sin, **options)
        return self.o_proj(z.sigmoid() * attended.transpose(1, 2).flatten(2))

    def _split_heads(self, x: Tensor) -> Tensor:
        """[B, L, heads * D] -> [B, heads, L, D]."""
        return x.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)


class RatPlusMixer(nn.Module):
    """W_out(sigmoid(z) * rat_attention(q, k, v, g)) with a recurrence over the whole sequence: [B, L, dim] -> [B, L, dim].

    z, v, g, q and k are one product of x, each head has its own of all five, and keys and queries are turned by their tokens.
    """

    def __init__(self, config: Config):
        super().__init__()
        self.chunk, self.window, self.sinks = config.chunk, config.window, config.sinks
        self.head_dim = config.dim // config.num_heads
        self.in_proj = nn.Linear(config.dim, 5 * config.dim, bias=False)
        self.o_proj = nn.Linear(config.dim, config.dim, bias=False)

    def forward(self, x: Tensor, rotation: Rotation) -> Tensor:
        z, *others = self.in_proj(x).chunk(5, dim=-1)
        v, gate, q, k = (each.unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for each in others)  # [B, heads, L, D]
        options = {"chunk": self.chunk, "window": self.window, "sinks": self.sinks, "reset": False, "scale": self.head_dim**-0.5}
        attended = rat_attention(q, k, v, gate, None, rotation.cos, rotation.sin, **options)
        return self.o_proj(z.sigmoid() * attended.transpose(1, 2).flatten(2))


class Layer(nn.Module):
    """Pre-norm RAT, RAT+ or windowed attention, and SwiGLU, each with a residual: [B, L, dim] -> [B, L, dim]."""

    def __init__(self, config: Config, mixer: type[nn.Module]):
        super().__init__()
        self.input_layernorm = nn.RMSNorm(config.dim, eps=config.norm_eps)
        self.mixer = mixer(config)
        self.post_mixer_layernorm = nn.RMSNorm(config.dim, eps=config.norm_eps)
        self.mlp = SwiGLU(config.dim, config.hidden)

    def forward(self, x: Tensor, attention: Rotation, recurrence: Rotation, in_window: Tensor) -> Tensor:
        h = self.input_layernorm(x)
        x = x + (self.mixer(h, attention, in_window) if isinstance(self.mixer, Attention) else self.mixer(h, recurrence))
        return x + self.mlp(self.post_mixer_layernorm(x))


def _mixer(config: Config, index: int) -> type[nn.Module]:
    if config.plus:
        return RatPlusMixer
    return Attention if config.window > 0 and index % 2 == 1 else RatMixer


class RatLM(nn.Module):
    """Predicts each next token from those before it.

    forward(input_ids, position_ids=None):
        input_ids: [B, L], integer in 0 .. vocabulary - 1.
        position_ids: [B, L], integer: each token's place in its sequence, counted from 0 on; 0 .. L - 1 when None.
    Returns: [B, L, vocabulary], logits.
    """

    def __init__(self, config: Config):
        super().__init__()
        self.head_dim, self.rope_base = config.dim // config.num_heads, config.rope_base
        self.turned_every, self.window = 1 if config.plus else config.chunk, config.window
        self.embed_tokens = nn.Embedding(config.vocabulary, config.dim)
        self.layers = nn.ModuleList(Layer(config, _mixer(config, index)) for index in range(config.depth))
        self.norm = nn.RMSNorm(config.dim, eps=config.norm_eps)
        self.lm_head = nn.Linear(config.dim, config.vocabulary, bias=False)
        if config.tied:
            self.lm_head.weight = self.embed_tokens.weight

    def forward(self, input_ids: Tensor, position_ids: Tensor | None = None) -> Tensor:
        x = self.embed_tokens(input_ids)
        places = torch.arange(input_ids.shape[1], device=x.device)
        positions = places.unsqueeze(0) if position_ids is None else position_ids
        attention = Rotation.of_positions(positions.unsqueeze(1), self.head_dim, self.rope_base, like=x)
        recurrence = Rotation.of_positions(positions // self.turned_every, self.head_dim, self.rope_base, like=x)
        behind = places.unsqueeze(1) - places
        in_window = (behind >= 0).logical_and(behind < self.window)
        for layer in self.layers:
            x = layer(x, attention, recurrence, in_window)
        return self.lm_head(self.norm(x))


def example_inputs(config: Config) -> tuple[tuple, dict]:
    return (torch.randint(0, config.vocabulary, (config.batch, config.length)),), {}
