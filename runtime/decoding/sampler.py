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
            return logits.argmax(-1).tolist()
        return draw(self.weights(logits), self.uniforms(rows, steps))

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


def draw(weights: Tensor, uniforms: Sequence[float]) -> list[int]:
    """For each row of weights [B, V] the first token at which the sum of weights exceeds that share of their total.

    Raises:
        InputError: a row's weights are NaN.
    """
    sums = weights.cumsum(-1)
    total: Any = sums[:, -1:]
    if not bool((total > 0).all()):
        raise InputError("the model's logits are NaN or infinite, there is nothing to draw from: look for overflow, or for broken weights")
    targets = torch.tensor(uniforms, dtype=torch.float64).to(sums.device).unsqueeze(1) * total
    return torch.searchsorted(sums, targets, right=True).squeeze(1).tolist()


def _least_of_nucleus(weights: Tensor, share: float) -> Tensor:
    """The smallest weight [.., 1] among the fewest largest ones whose sum is at least `share` of all."""
    needed = share * weights.sum(-1, keepdim=True)
    for count in (*[n for n in _SORTED if n < weights.size(-1)], weights.size(-1)):
        largest = weights.topk(count).values
        before = (largest.cumsum(-1) < needed).sum(-1, keepdim=True)  # how many are not enough
        if bool((before < count).all()):
            break
    return largest.gather(-1, before.clamp(max=count - 1))  # rounding may leave the sum of all below the share
