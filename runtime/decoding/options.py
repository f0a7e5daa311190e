"""What a call of `generate` may ask for, checked before anything runs."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from ...ir.errors import InputError
from .sampler import Sampler


@dataclass(frozen=True)
class Limits:
    """Of one generation: new tokens a row, tokens of a prefill chunk (None: whole prompts), slots of a cache row, rows at once."""

    max_new_tokens: int
    chunk: int | None
    capacity: int
    batch: int
    eos: frozenset[int]


def checked_prompts(prompts: Any, vocabulary: int) -> list[np.ndarray]:
    """Each prompt as i64[P].

    Raises:
        InputError: they are no sequences of tokens, one is empty, or a token is none of the vocabulary.
    """
    if isinstance(prompts, str | bytes) or not isinstance(prompts, Sequence | torch.Tensor | np.ndarray):
        raise InputError(f"prompts is a list of token sequences or a tensor [B, T], not {_kind(prompts)}")
    if isinstance(prompts, torch.Tensor | np.ndarray) and prompts.ndim != 2:
        raise InputError(f"prompts is a tensor [B, T], not one of {prompts.ndim} dims: write prompt[None] for a single one")
    return [_checked_prompt(prompt, number, vocabulary) for number, prompt in enumerate(prompts)]


def _checked_prompt(prompt: Any, number: int, vocabulary: int) -> np.ndarray:
    if isinstance(prompt, torch.Tensor):
        prompt = prompt.detach().cpu().numpy() if not prompt.dtype.is_floating_point else prompt.detach().cpu().double().numpy()
    if isinstance(prompt, str | bytes) or not isinstance(prompt, Sequence | np.ndarray):
        raise InputError(f"prompt {number} is a sequence of tokens, not {_kind(prompt)}: write [[1, 2, 3]] for a single one")
    if isinstance(prompt, np.ndarray) and prompt.ndim == 0:  # a list of a tensor's elements has such
        raise InputError(f"prompt {number} is a sequence of tokens, not a tensor of 0 dims: write [[1, 2, 3]] for a single one")
    if len(prompt) == 0:
        raise InputError(f"prompt {number} is empty: give it at least the token that begins a text")
    try:
        tokens = np.asarray(prompt)
    except ValueError:  # sequences of different lengths
        tokens = np.empty(0, object)
    if tokens.ndim != 1 or tokens.dtype.kind not in "iu":
        raise InputError(f"prompt {number} is a flat sequence of integers, and holds something else: tokenize it first")
    outside = tokens[(tokens < 0) | (tokens >= vocabulary)]
    if outside.size:
        raise InputError(
            f"prompt {number} has the token {outside[0]}, and the model gives logits of 0 to {vocabulary - 1}: look at its tokenizer, and "
            "whether the model has its head"
        )
    return tokens.astype(np.int64)


def checked_limits(
    prompts: Sequence[np.ndarray],
    max_new_tokens: Any,
    chunk: Any,
    capacity: Any,
    batch: Any,
    eos: Any,
    vocabulary: int,
    positions: int | None,
) -> Limits:
    """For a model of `positions` (None: any number), behind which no slot is of use: not to the padding of chunks either, which a table of
    positions has no entry for.

    Raises:
        InputError: one is of a wrong type or out of range, or a row has no room for its tokens.
    """
    _check_integer("max_new_tokens", max_new_tokens, 0)
    for name, value in (("chunk", chunk), ("capacity", capacity), ("batch", batch)):
        if value is not None:
            _check_integer(name, value, 1)
    # The last token is not fed, so it needs no slot.
    needed = [len(prompt) + max(0, max_new_tokens - 1) for prompt in prompts]
    if capacity is not None and max(needed, default=0) > capacity:
        row = needed.index(max(needed))
        fits = capacity - len(prompts[row]) + 1
        what = f"at most max_new_tokens={fits} fit" if fits > 0 else "it does not fit"
        raise InputError(
            f"prompt {row} has {len(prompts[row])} tokens and capacity={capacity} slots: {what}; "
            f"{max_new_tokens} new tokens need capacity={needed[row]}"
        )
    rows = len(prompts) if batch is None else min(batch, len(prompts))
    slots = capacity or max(needed, default=1)
    slots = slots if positions is None else min(slots, positions)
    return Limits(max_new_tokens, chunk, slots, rows, _end_tokens(eos, vocabulary))


def check_positions(prompts: Sequence[np.ndarray], max_new_tokens: int, gamma: int, most: int | None) -> None:
    """Raises InputError where a row needs more than the `most` positions that the model has: a burst looks `gamma` ahead of it."""
    if most is None:
        return
    for row, prompt in enumerate(prompts):
        fits = most - gamma - len(prompt) + 1
        if max_new_tokens > fits:
            what = f"max_new_tokens is at most {fits} for it" if fits > 0 else "it is too long"
            drafts = f", {gamma} of which drafts need (speculative=False needs none)" if gamma else ""
            raise InputError(f"prompt {row} has {len(prompt)} tokens and the model {most} positions{drafts}: {what}")


def checked_sampler(temperature: Any, top_k: Any, top_p: Any, seed: Any) -> Sampler:
    """Raises InputError where one is of a wrong type or out of range."""
    if not _is_number(temperature) or not 0 <= temperature < math.inf:
        raise InputError(f"temperature is a number from 0 (greedy) on, not {temperature!r}")
    if top_k is not None:
        _check_integer("top_k", top_k, 1)
    if top_p is not None and not (_is_number(top_p) and 0 < top_p <= 1):
        raise InputError(f"top_p is a probability above 0 and at most 1, not {top_p!r}")
    if temperature == 0 and (top_k is not None or top_p is not None):
        name = "top_p" if top_k is None else "top_k"
        raise InputError(
            f"{name} has no effect, since temperature is 0, which takes the likeliest token: give temperature=1.0, or leave {name} out"
        )
    _check_integer("seed", seed, 0)
    if seed >= 2**64:
        raise InputError(f"seed is below 2**64, not {seed}")
    return Sampler(float(temperature), top_k, top_p, seed)


def check_flags(stream: Any, speculative: Any) -> None:
    """Raises InputError where one is of a wrong type."""
    if not isinstance(stream, bool):
        raise InputError(f"stream is True or False, not {stream!r}")
    if speculative is not None and not isinstance(speculative, bool):
        raise InputError(f"speculative is True, False, or None for what the model was compiled for, not {speculative!r}")


def _end_tokens(eos: Any, vocabulary: int) -> frozenset[int]:
    if eos is None:
        return frozenset()
    if isinstance(eos, torch.Tensor | np.ndarray):
        eos = eos.tolist()
    tokens = list(eos) if isinstance(eos, Iterable) and not isinstance(eos, str | bytes) else [eos]
    for token in tokens:
        if not _is_integer(token) or not 0 <= token < vocabulary:
            raise InputError(f"eos is a token of the vocabulary, 0 to {vocabulary - 1}, or several of them, not {token!r}")
    return frozenset(map(int, tokens))


def _check_integer(name: str, value: Any, least: int) -> None:
    if not _is_integer(value) or value < least:
        raise InputError(f"{name} is an integer from {least} on, not {value!r}")


def _kind(value: Any) -> str:
    name = type(value).__name__
    return f"an {name}" if name[0] in "aeiou" else f"a {name}"


def _is_integer(value: Any) -> bool:
    return isinstance(value, int | np.integer) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float | np.integer | np.floating) and not isinstance(value, bool)
