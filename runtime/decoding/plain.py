"""One token a step: each row by the function of its level, the rows of a level together."""

from collections.abc import Sequence
from itertools import groupby

from .dispatch import Dispatch
from .generated import Figures
from .rows import Row
from .sampler import Sampler
from .schedule import Schedule
from .steps import Decoder, Step


class PlainDecoding:
    """Takes rows one token further."""

    def __init__(self, decoder: Decoder, schedule: Schedule, dispatch: Dispatch, sampler: Sampler, figures: Figures):
        self._steps = [decoder[name] for name in schedule.functions]
        self._schedule, self._dispatch, self._sampler, self._figures = schedule, dispatch, sampler, figures

    def advance(self, rows: Sequence[Row]) -> list[tuple[Row, list[int]]]:
        """The next token of each row."""
        self._set_levels(rows)
        if all(row.levels[-1] == rows[0].levels[-1] for row in rows):
            return self._step(rows)
        by_level = groupby(sorted(rows, key=_level), _level)
        return [each for _, group in by_level for each in self._step(list(group))]

    def _set_levels(self, rows: Sequence[Row]) -> None:
        levels = scheduled = [self._schedule.level_of(row) for row in rows]
        if self._schedule.merges:
            smallest = max(*scheduled, *[row.least_level for row in rows])
            levels = [smallest] * len(rows)
            self._figures.merged_steps += sum(level < smallest for level in scheduled)
            for row in rows:
                row.least_level = smallest  # for good: the layers left out have nothing for this position
        for row, level in zip(rows, levels, strict=True):
            row.levels.append(level)

    def _step(self, rows: Sequence[Row]) -> list[tuple[Row, list[int]]]:
        self._figures.steps += 1
        return next_tokens(self._steps[rows[0].levels[-1]], rows, self._dispatch, self._sampler)


def next_tokens(step: Step, rows: Sequence[Row], dispatch: Dispatch, sampler: Sampler) -> list[tuple[Row, list[int]]]:
    """One token of each row, by a step that all of them take."""
    tokens = [row.tokens[-1:] for row in rows]
    logits = dispatch.decode(step, [row.slot for row in rows], [row.position for row in rows], tokens)
    chosen = sampler.choose(logits, [row.id for row in rows], [len(row.tokens) for row in rows])
    for row in rows:
        row.position += 1
    return [(row, [token]) for row, token in zip(rows, chosen, strict=True)]


def _level(row: Row) -> int:
    return row.levels[-1]
