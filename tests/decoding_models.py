"""A small decoder in float64 whose steps are plain PyTorch, and what it generates when every step computes the whole sequence anew."""

from dataclasses import dataclass, field

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import graphwright.ir.ops  # noqa: F401
from graphwright.runtime.decoding import caches as caches_module
from graphwright.runtime.decoding.caches import CacheType
from graphwright.runtime.decoding.gain import Gains
from graphwright.runtime.decoding.sampler import Sampler

VOCABULARY, DIM, HEADS, KV_HEADS, WIDTH = 11, 12, 4, 2, 4
GREEDY = Sampler()


@pytest.fixture(autouse=True)
def poisoned_caches(monkeypatch):
    """Of every test in a file that imports this: what no step wrote is NaN, which reaches the logits of whoever reads it."""

    def poison(rows, capacity, each):
        return torch.full((rows, each.heads, capacity, each.width), torch.nan, dtype=each.dtype)

    monkeypatch.setattr(caches_module, "unwritten", poison)


class Layer(nn.Module):
    """f_l of h + f_l(h): attention with grouped queries, then a gated unit."""

    def __init__(self, weight):
        super().__init__()
        self.qkv, self.out = weight(DIM, (HEADS + 2 * KV_HEADS) * WIDTH), weight(HEADS * WIDTH, DIM)
        self.up, self.down = weight(DIM, 2 * DIM), weight(DIM, DIM)

    def split(self, x):
        """q [B, H, T, E], k and v [B, Hk, T, E] of x [B, T, D]."""
        heads = (F.rms_norm(x, (DIM,)) @ self.qkv).unflatten(-1, (-1, WIDTH)).transpose(1, 2)
        return heads.split([HEADS, KV_HEADS, KV_HEADS], dim=1)

    def joined(self, x, attended):
        x = x + attended.transpose(1, 2).flatten(2) @ self.out
        gate, value = (F.rms_norm(x, (DIM,)) @ self.up).chunk(2, -1)
        return x + (torch.tanh(gate) * value) @ self.down


class Network(nn.Module):
    """Learned places, `depth` layers, and a head."""

    def __init__(self, depth, seed):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)

        def weight(*shape, scale=0.35):
            return nn.Parameter(scale * torch.randn(*shape, generator=generator, dtype=torch.float64), requires_grad=False)

        self.embedding = weight(VOCABULARY, DIM, scale=1.0)
        self.places = weight(256, DIM, scale=0.5)
        self.head = weight(DIM, VOCABULARY, scale=0.8)
        self.layers = nn.ModuleList(Layer(weight) for _ in range(depth))

    def embed(self, tokens, positions):
        return self.embedding[tokens] + self.places[positions]

    def logits(self, x):
        return F.rms_norm(x, (DIM,)) @ self.head

    def step(self, tokens, position, rows, caches, layers):
        """Hidden states [B, T, D] behind `layers`, and their new caches, which stand in `caches` one after another."""
        x = self.embed(tokens, position.unsqueeze(1) + torch.arange(tokens.size(1)))
        new = []
        for number, k_cache, v_cache in zip(layers, caches[::2], caches[1::2], strict=True):
            q, k, v = self.layers[number].split(x)
            k_cache, v_cache = torch.ops.gw.kv_append(k_cache, v_cache, k, v, position, rows)
            x = self.layers[number].joined(x, torch.ops.gw.cached_attention(q, k_cache, v_cache, position, rows, scale=WIDTH**-0.5))
            new += [k_cache, v_cache]
        return x, new

    def reference(self, tokens, active):
        """Logits [T, V] of all `tokens`, layer l running at position t where it is in active[t]: no cache."""
        length = len(tokens)
        x = self.embed(torch.tensor([list(tokens)]), torch.arange(length))
        for number, layer in enumerate(self.layers):
            q, k, v = layer.split(x)
            k, v = (each.repeat_interleave(HEADS // KV_HEADS, 1) for each in (k, v))
            hidden = torch.ones(length, length, dtype=torch.bool).triu(1)
            scores = (q @ k.transpose(-2, -1) * WIDTH**-0.5).masked_fill(hidden, -torch.inf)
            on = torch.tensor([number in each for each in active]).reshape(1, -1, 1)
            x = torch.where(on, layer.joined(x, scores.softmax(-1) @ v), x)
        return self.logits(x)[0]


@dataclass
class SmallDecoder:
    """`functions`: name -> layers, in the order of the program's. "prefill" gives logits at lengths - 1, "verify" at all positions."""

    functions: dict[str, tuple[int, ...]]
    depth: int = 4
    seed: int = 0
    schedules: dict = field(default_factory=dict)
    gains: Gains = field(default_factory=Gains)
    vocabulary: int = VOCABULARY
    max_positions: int | None = None
    device: torch.device = torch.device("cpu")
    calls: list = field(default_factory=list)  # (function, cache rows) of each call

    def __post_init__(self):
        self.network = Network(self.depth, self.seed)
        cached = sorted({layer for layers in self.functions.values() for layer in layers})
        self.cache_types = tuple(CacheType(layer, KV_HEADS, WIDTH, torch.float64, self.device) for layer in cached for _ in "kv")
        self.place_of = {layer: 2 * n for n, layer in enumerate(cached)}

    def __contains__(self, name):
        return name in self.functions

    def __getitem__(self, name):
        return SmallStep(self, name, self.functions[name])

    def reference(self, tokens, active):
        return self.network.reference(tokens, active)

    def naive(self, prompt, max_new_tokens, *, level_sets=None, prefill=None, sampler=GREEDY, row=0, eos=()):
        """What a loop generates that runs the whole sequence anew for each token; decode step i runs level_sets[i]."""
        everything = set(range(self.depth))
        active = [set(everything if prefill is None else prefill)] * len(prompt)
        tokens = list(prompt)
        for step in range(max_new_tokens):
            if step:
                active.append(everything if level_sets is None else set(level_sets[step - 1]))
            tokens += sampler.choose(self.reference(tokens, active)[-1:], [row], [step])
            if tokens[-1] in eos:
                break
        return tokens[len(prompt) :]


@dataclass
class SmallStep:
    decoder: SmallDecoder
    name: str
    layers: tuple[int, ...]

    def padded(self, batch):
        return batch

    def make_ready(self, batch, length):
        return 0.0

    def __call__(self, caches, tokens, position, rows, lengths, hidden):
        assert tokens.dtype == position.dtype == rows.dtype == torch.int64
        self.decoder.calls.append((self.name, rows.tolist()))
        places = [self.decoder.place_of[layer] + n for layer in self.layers for n in (0, 1)]
        x, new = self.decoder.network.step(tokens, position, rows, [caches[place] for place in places], self.layers)
        for place, cache in zip(places, new, strict=True):
            caches[place] = cache
        logits = self.decoder.network.logits(x)
        if self.name == "verify":
            return (logits,)
        if self.name != "prefill":
            assert tokens.size(1) == 1
            return (logits[:, -1],)
        return (logits[torch.arange(len(tokens)), lengths - 1],)


def plain_decoder(depth=3, seed=0):
    """All layers in every step."""
    everything = tuple(range(depth))
    return SmallDecoder({"prefill": everything, "decode": everything}, depth, seed)


def skipping_decoder(levels, level_of_step, *, depth=4, prefill="full", merge="never", clock="step", seed=0):
    """Layers by a schedule."""
    names = [f"decode_{level}" for level in range(len(levels))]
    first = tuple(range(depth)) if prefill == "full" else levels[0]
    functions = {"prefill": first, **dict(zip(names, levels, strict=True))}
    table = {
        "levels": levels, "level_of_step": level_of_step, "functions": names, "prefill": prefill, "mode": "schedule", "gamma": 4,
        "draft": "draft", "merge": merge, "clock": clock,
    }  # fmt: skip
    return SmallDecoder(functions, depth, seed, {"layer-skip": table})


def drafting_decoder(draft, gamma, *, depth=4, seed=0):
    """Drafts with the layers `draft`."""
    everything = tuple(range(depth))
    functions = {"prefill": everything, "decode": everything, "verify": everything, "draft": draft}
    table = {
        "levels": [everything, draft], "level_of_step": [0], "functions": ["decode", "draft"], "prefill": "full", "mode": "speculative",
        "gamma": gamma, "draft": "draft", "merge": "never",
    }  # fmt: skip
    return SmallDecoder(functions, depth, seed, {"layer-skip": table})


def random_prompts(lengths, seed=0):
    random_numbers = np.random.default_rng(seed)
    return [random_numbers.integers(0, VOCABULARY, length).tolist() for length in lengths]
