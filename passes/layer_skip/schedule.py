"""Schedules: which layers run at each step of decoding, as data. Source: specs/layer_skip.md, section 2.

A schedule is nested: what runs at a step ran at every step before it. So a layer's keys and values are there for all positions
up to its last, and nothing is read that was never written.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from ...ir.errors import PassError


@dataclass(frozen=True)
class Schedule:
    """`levels`: layers that run, strictly decreasing; `level_of_step`: the level of decode step 0, 1, .., the last for all that follow.

    Raises:
        PassError: the levels are not nested, or grow over the steps; the layers whose keys and values would be missing are named.
    """

    levels: tuple[tuple[int, ...], ...]
    level_of_step: tuple[int, ...]

    def __post_init__(self) -> None:
        for higher, lower in zip(self.levels, self.levels[1:], strict=False):
            missing = sorted(set(lower) - set(higher))
            if missing:
                raise PassError(
                    f"layer-skip: level {list(lower)} follows {list(higher)}, which leaves out layer{'s' if len(missing) > 1 else ''} "
                    f"{', '.join(map(str, missing))}: the keys and values of these positions would be missing there; levels are nested"
                )
            if len(lower) == len(higher):
                raise PassError(f"layer-skip: level {list(lower)} is given twice: each level has fewer layers than the one before")
        if any(not level for level in self.levels):
            raise PassError("layer-skip: a level has no layers: at least one must run")
        if not self.level_of_step or set(self.level_of_step) != set(range(len(self.levels))):
            count = len(self.levels)
            raise PassError(f"layer-skip: level_of_step names each of the {count} levels once or more, 0 to {count - 1}, and no other")
        for step, (before, after) in enumerate(zip(self.level_of_step, self.level_of_step[1:], strict=False)):
            if after < before:
                back = sorted(set(self.levels[after]) - set(self.levels[before]))
                raise PassError(
                    f"layer-skip: step {step + 1} runs layers {', '.join(map(str, back))} again, which step {step} left out: their keys "
                    "and values of that position are missing; numbers in level_of_step never fall"
                )

    def layers_at(self, step: int) -> tuple[int, ...]:
        """The layers that run at decode step `step`, from 0."""
        return self.levels[self.level_of_step[min(step, len(self.level_of_step) - 1)]]

    def mean_layers(self, steps: int) -> float:
        """Layers that run in a step, in the mean of the first `steps`."""
        return sum(len(self.layers_at(step)) for step in range(steps)) / steps


def counts(decay: str, n_max: int, n_min: int, horizon: int, alpha: float) -> list[int]:
    """n(i), the number of layers at decode step i = 0 .. horizon - 1; the last holds for all that follow.

    linear: clamp(floor(n_max - (n_max - n_min) i / max(1, horizon - 1) + 1/2), n_min, n_max) (SkipDecode). power:
    max(n_min, floor(n_max alpha^i)) (D3). constant: n_min from the first step on.
    """
    if decay == "constant":
        return [n_min]
    if decay == "linear":
        raw = [math.floor(n_max - (n_max - n_min) * i / max(1, horizon - 1) + 0.5) for i in range(horizon)]
    else:
        raw = [math.floor(n_max * alpha**i) for i in range(horizon)]
    return [min(max(n, n_min), n_max) for n in raw]


def of_counts(numbers: Sequence[int], sets: Sequence[tuple[int, ...]]) -> Schedule:
    """The schedule of `numbers` of layers a step, `sets[n - 1]` being the layers that n of them are."""
    distinct = list(dict.fromkeys(numbers))
    return Schedule(tuple(sets[n - 1] for n in distinct), tuple(distinct.index(n) for n in numbers))


def top_sets(layers: int, warmup: int) -> list[tuple[int, ...]]:
    """For n = 1, 2, ..: the `warmup` lowest layers and the n - warmup highest (SkipDecode); the n highest where n is below warmup."""
    return [
        tuple(range(layers - n, layers)) if n < warmup else (*range(warmup), *range(layers - (n - warmup), layers))
        for n in range(1, layers + 1)
    ]


def ranked_sets(ranking: Sequence[int]) -> list[tuple[int, ...]]:
    """For n = 1, 2, ..: the first n of a ranking, in the order of the network."""
    return [tuple(sorted(ranking[:n])) for n in range(1, len(ranking) + 1)]
