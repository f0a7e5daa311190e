"""From logits to tokens: the largest, or one drawn after temperature, top-k and top-p, in this order.

What is drawn for a row's step depends on the seed, the row and the step alone: each has random numbers of its own, made by hashing
those, so neither the other rows of a batch nor the order of rows changes them. Sums are float64.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...ir.errors import InputError
from ...passes.low_rank.sample import splitmix64

# How many of the largest weights are looked at for a nucleus before all are sorted: 60 us, 240 us and 2.2 ms for 32000 tokens (measured,
# an EPYC core), and nuclei are small where a model knows what comes next.
_SORTED = (64, 1024)
# So many more than k are looked at for the k largest, since many may equal the k-th, in bfloat16 above all.
_TIED = 64
_BLOCK = 64  # tokens whose largest logit is looked at first
_NO_NUMBERS = "the model's logits are NaN or infinite, there is nothing to choose from: look for overflow, or for broken weights"


class Purpose(IntEnum):
    """What a random number of a row's step decides."""

    TOKEN = 0  # the token, drawn from the model's distribution or from the draft's
    ACCEPT = 1  # whether a drafted token is taken
    RESIDUAL = 2  # the token in the place of a refused one


@dataclass(frozen=True)
class Sampler:
    """Temperature 0 is greedy. `top_k` keeps the k largest logits, `top_p` then the fewest most likely tokens that have together at
    least that probability; both keep all that equal the last they keep."""

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    seed: int = 0

    @property
    def is_greedy(self) -> bool:
        return self.temperature == 0

    def choose(self, logits: Tensor, rows: Sequence[int], steps: Sequence[int]) -> list[int]:
        """One token for each of logits [B, V], drawn for those `rows` at those `steps`; greedily the first of the largest."""
        if self.is_greedy:
            return most_likely(logits)
        tokens = self._candidates(logits)
        if tokens is None:
            return draw(self.weights(logits), self.uniforms(rows, steps))
        drawn = draw(self.weights(logits.gather(-1, tokens)), self.uniforms(rows, steps))
        return tokens.gather(-1, torch.tensor(drawn, device=tokens.device).unsqueeze(-1)).squeeze(-1).tolist()

    def _candidates(self, logits: Tensor) -> Tensor | None:
        """Tokens [B, n] in order, all that top-k keeps and some more: what is drawn from them is what is drawn from all, since the others
        weigh nothing. None where they may be most of all. A tenth of the time for 8 rows of 32000 tokens.

        The k-th largest of the blocks' largest is at most the k-th largest of all, so blocks below it have nothing that top-k keeps."""
        size = logits.size(-1)
        if self.top_k is None or size % _BLOCK or self.top_k + _TIED > size // _BLOCK // 2:
            return None
        blocks = _wide(logits).unflatten(-1, (-1, _BLOCK))
        best = _clear_largest(blocks.amax(-1), self.top_k)
        if best is None:
            return None
        found = _clear_largest(blocks[torch.arange(len(best), device=best.device).unsqueeze(-1), best].flatten(1), self.top_k)
        if found is None:
            return None
        return (best.gather(-1, found // _BLOCK) * _BLOCK + found % _BLOCK).sort(-1).values

    def weights(self, logits: Tensor) -> Tensor:
        """float64[.., V], in proportion to the probabilities: exp((z - max z) / temperature) of what top-k and top-p keep."""
        weights = logits.to(torch.float64) - logits.amax(-1, keepdim=True)
        weights.div_(self.temperature).exp_()
        if self.top_k is not None and self.top_k < logits.size(-1):
            weights.mul_(logits >= logits.topk(self.top_k).values[..., -1:])
        if self.top_p is not None and self.top_p < 1:
            weights.mul_(weights >= _least_of_nucleus(weights, self.top_p))
        return weights

    def uniforms(self, rows: Sequence[int], steps: Sequence[int], purpose: int | Sequence[int] = Purpose.TOKEN) -> list[float]:
        """Numbers in [0, 1), one for each row, step and purpose: multiples of 2^-52, so that u * x < x for every x > 0."""
        bits = splitmix64(np.array([self.seed], np.uint64))
        for key in (rows, steps, purpose):
            bits = splitmix64(bits ^ np.asarray(key, np.uint64))
        return ((bits >> np.uint64(12)) * 2.0**-52).tolist()


def first_of_largest(logits: Tensor) -> Any:
    """Of logits [.., V] the first token of the largest, as nested lists: on a CPU by NumPy, 25 us for 8 rows of 32000 tokens in float32
    where torch takes 108, and 460 in bfloat16. NaN counts as the largest."""
    return _wide(logits).numpy().argmax(-1).tolist() if logits.is_cpu else logits.argmax(-1).tolist()


def most_likely(logits: Tensor) -> Any:
    """`first_of_largest`, of logits that are to be believed.

    Raises:
        InputError: one is NaN.
    """
    tokens = first_of_largest(logits)
    if bool(logits.gather(-1, torch.tensor(tokens, device=logits.device).unsqueeze(-1)).isnan().any()):
        raise InputError(_NO_NUMBERS)
    return tokens


def draw(weights: Tensor, uniforms: Sequence[float]) -> list[int]:
    """For each row of weights [B, V] the first token at which the sum of weights exceeds that share of their total.

    Raises:
        InputError: a row's weights are NaN.
    """
    sums = weights.cumsum(-1)
    total: Any = sums[:, -1:]
    if not bool((total > 0).all()):
        raise InputError(_NO_NUMBERS)
    targets = torch.tensor(uniforms, dtype=torch.float64).to(sums.device).unsqueeze(1) * total
    return torch.searchsorted(sums, targets, right=True).squeeze(1).tolist()


def _clear_largest(values: Tensor, k: int) -> Tensor | None:
    """Places [B, k + _TIED] of the largest of values [B, n], all that are at least the k-th among them; None where there may be more."""
    largest = values.topk(k + _TIED)
    is_clear = bool((largest.values[:, -1] < largest.values[:, k - 1]).all())
    return largest.indices if is_clear else None


def _least_of_nucleus(weights: Tensor, share: float) -> Tensor:
    """The smallest weight [.., 1] among the fewest largest ones whose sum is at least `share` of all."""
    needed = share * weights.sum(-1, keepdim=True)
    for count in (*[n for n in _SORTED if n < weights.size(-1)], weights.size(-1)):
        largest = weights.topk(count).values
        before = (largest.cumsum(-1) < needed).sum(-1, keepdim=True)  # how many are not enough
        if bool((before < count).all()):
            break
    return largest.gather(-1, before.clamp(max=count - 1))  # rounding may leave the sum of all below the share


def _wide(logits: Tensor) -> Tensor:
    """In float32 at least, which kernels of few bits are slower than."""
    return logits if logits.dtype == torch.float64 else logits.float()
