"""What gates are before any training: logits of `bias` [Hk E] for each channel and of `chunk_bias` [L, 1, 1] for each place in a chunk.

    closed   g = 4e-18: a state is its last token
    mean     g = l / (l + 1) at place l: a state is the mean of its chunk so far; without resets g = (l + 1) / (l + 2), which counts the
             state before the chunk as one token more
    chrono   g = u / (u + 1), u even in (1, L - 1): memories of different lengths, as RAT starts that is trained from scratch

Source: specs/rat.md, section 3.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

CLOSED = -40.0  # in float32 and bfloat16 1 - sigmoid(-40) is 1 exactly


@dataclass(frozen=True)
class Gates:
    """float32, on the CPU. `chunk_bias` None adds nothing; `summary_bias` is added to scores of summaries."""

    bias: Tensor
    chunk_bias: Tensor | None
    summary_bias: float = 0.0


def initial(init: str, channels: int, chunk: int, reset: bool, summary_bias: float, seed: int = 0) -> Gates:
    """The gates that `init` names: "closed", "mean" or "chrono" (drawn with `seed`)."""
    if init == "closed":
        return Gates(torch.full((channels,), CLOSED), None, summary_bias)
    if init == "mean":
        logits = [CLOSED, *map(math.log, range(1, chunk))] if reset else [math.log(place + 1) for place in range(chunk)]
        return Gates(torch.zeros(channels), torch.tensor(logits).reshape(chunk, 1, 1), summary_bias)
    drawn = torch.rand(channels, generator=torch.Generator().manual_seed(seed))
    return Gates((1 + drawn * (chunk - 2)).log(), None, summary_bias)
