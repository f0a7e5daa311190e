"""A small decoder in float64 whose steps are plain PyTorch, and what it generates when every step computes the whole sequence anew."""

from dataclasses import dataclass, field
from functools import partial

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

import graphwright.ir.ops  # noqa: F401
from graphwright.runtime.decoding.caches import CacheType
from graphwright.runtime.decoding.sampler import Sampler

VOCABULARY, DIM, HEADS, KV_HEADS, WIDTH = 11, 12, 4, 2, 4
GREEDY = Sampler()


def random(*shape, generator, scale):
    return scale * torch.randn(*shape, generator=generator, dtype=torch.float64)


@dataclass
class Layer:
    """f_l of h + f_l(h): attention with grouped queries, then a gated unit."""

    qkv: Tensor
    out: Tensor
    up: Tensor
    down: Tensor

    @staticmethod
    def made(generator):
        make = partial(random, generator=generator, scale=0.35)
        return Layer(make(DIM, (HEADS + 2 * KV_HEADS) * WIDTH), make(HEADS * WIDTH, DIM), make(DIM, 2 * DIM), make(DIM, DIM))

    def split(self, x):
        """q [B, H, T, E], k and v [B, Hk, T, E] of x [B, T, D]."""
        heads = (F.rms_norm(x, (DIM,)) @ self.qkv).unflatten(-1, (-1, WIDTH)).transpose(1, 2)
        return heads.split([HEADS, KV_HEADS, KV_HEADS], dim=1)

    def joined(self, x, attended):
        x = x + attended.transpose(1, 2).flatten(2) @ self.out
        gate, value = (F.rms_norm(x, (DIM,)) @ self.up).chunk(2, -1)
        return x + (torch.tanh(gate) * value) @ self.down


@dataclass
class SmallDecoder:
    """`functions`: name -> layers, in the order of the program's. "prefill" gives logits at lengths - 1, "verify" at all positions."""

    functions: dict[str, tuple[int, ...]]
    depth: int = 4
    seed: int = 0
    schedules: dict = field(default_factory=dict)
    vocabulary: int = VOCABULARY
    device: torch.device = torch.device("cpu")
    calls: list = field(default_factory=list)  # (function, cache rows) of each call

    def __post_init__(self):
        generator = torch.Generator().manual_seed(self.seed)
        self.embedding = random(VOCABULARY, DIM, generator=generator, scale=1.0)
        self.places = random(256, DIM, generator=generator, scale=0.5)
        self.head = random(DIM, VOCABULARY, generator=generator, scale=0.8)
        self.layers = [Layer.made(generator) for _ in range(self.depth)]
        cached = sorted({layer for layers in self.functions.values() for layer in layers})
        self.cache_types = tuple(CacheType(layer, KV_HEADS, WIDTH, torch.float64, self.device) for layer in cached for _ in "kv")
        self.place_of = {layer: 2 * n for n, layer in enumerate(cached)}

    def __contains__(self, name):
        return name in self.functions

    def __getitem__(self, name):
        return SmallStep(self, name, self.functions[name])

    def embed(self, tokens, positions):
        return self.embedding[tokens] + self.places[positions]

    def logits(self, x):
        return F.rms_norm(x, (DIM,)) @ self.head

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

    def __call__(self, caches, tokens, position, rows, lengths=None):
        assert tokens.dtype == position.dtype == rows.dtype == torch.int64
        self.decoder.calls.append((self.name, rows.tolist()))
        length = tokens.size(1)
        x = self.decoder.embed(tokens, position.unsqueeze(1) + torch.arange(length))
        for number in self.layers:
            layer, place = self.decoder.layers[number], self.decoder.place_of[number]
            q, k, v = layer.split(x)
            caches[place], caches[place + 1] = torch.ops.gw.kv_append(caches[place], caches[place + 1], k, v, position, rows)
            attended = torch.ops.gw.cached_attention(q, caches[place], caches[place + 1], position, rows, scale=WIDTH**-0.5)
            x = layer.joined(x, attended)
        logits = self.decoder.logits(x)
        if self.name == "verify":
            return logits
        if self.name != "prefill":
            assert length == 1
            return logits[:, -1]
        return logits[torch.arange(len(tokens)), lengths - 1]


def plain_decoder(depth=3, seed=0):
    """All layers in every step."""
    everything = tuple(range(depth))
    return SmallDecoder({"prefill": everything, "decode": everything}, depth, seed)


def skipping_decoder(levels, level_of_step, *, depth=4, prefill="full", merge="never", seed=0):
    """Layers by a schedule."""
    names = [f"decode_{level}" for level in range(len(levels))]
    first = tuple(range(depth)) if prefill == "full" else levels[0]
    functions = {"prefill": first, **dict(zip(names, levels, strict=True))}
    table = {
        "levels": levels, "level_of_step": level_of_step, "functions": names, "prefill": prefill, "mode": "schedule", "gamma": 4,
        "draft": "draft", "merge": merge,
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
