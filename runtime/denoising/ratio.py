"""A program whose experts take more or fewer tokens by how much of a row is masked: each row runs the function of its own number.

Rows that share it run together. That is exact, since an expert chooses among the tokens of one row.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch

from ...ir import Program
from ...ir.errors import InputError
from ...passes.experts.capacity import SCHEDULE, CapacitySchedule

ARGUMENT = "mask_ratio"


class RowsByRatio:
    """Calls of a program with a schedule; `run` gives the outputs of a function, by its name, on inputs."""

    def __init__(self, program: Program, schedule: CapacitySchedule, run: Callable[[str, Sequence[Any]], list[Any]]):
        self.schedule = schedule
        data = program.schedules[SCHEDULE]
        self._names = dict(zip(data["k"], data["functions"], strict=True))
        self._length = data["length"]
        self._run = run
        sizes = [argument.value.shape[0] for argument in program.main.signature().inputs if isinstance(argument.value, torch.Tensor)]
        self._fixed = sizes[0] if isinstance(sizes[0], int) else 0  # rows that a function takes, no more and no fewer; 0: any number

    def __call__(self, inputs: Sequence[Any], ratio: Any) -> list[Any]:
        """The outputs of all rows, each at its own k."""
        batch = next(len(value) for value in inputs if isinstance(value, torch.Tensor))
        groups = self.groups(ratio, batch)
        if not groups:
            return self._run(self._names[self.schedule.kmax], inputs)  # no rows: outputs are as empty by any
        if len(groups) == 1:
            return self._run(self._names[next(iter(groups))], inputs)
        results: list[Any] = []
        for k, rows in groups.items():
            part = self._run(self._names[k], self._rows_of(inputs, rows))
            results = results or [leaf.new_empty(batch, *leaf.shape[1:]) if isinstance(leaf, torch.Tensor) else leaf for leaf in part]
            for whole, leaf in zip(results, part, strict=True):
                if isinstance(leaf, torch.Tensor):
                    whole[rows] = leaf[: len(rows)]
        return results

    def _rows_of(self, inputs: Sequence[Any], rows: Sequence[int]) -> list[Any]:
        """These rows of inputs, and as many copies of the first as a function of a fixed number of rows takes."""
        index = torch.tensor([*rows, *[rows[0]] * (self._fixed - len(rows))])
        return [value[index.to(value.device)] if isinstance(value, torch.Tensor) else value for value in inputs]

    def parts(self, inputs: Sequence[Any], ratio: Any) -> Iterator[tuple[str, list[Any], int]]:
        """The functions that a call runs, by name, each on its inputs, of which the first so many rows are the call's."""
        batch = next(len(value) for value in inputs if isinstance(value, torch.Tensor))
        for k, rows in self.groups(ratio, batch).items():
            yield self._names[k], self._rows_of(inputs, rows), len(rows)

    def groups(self, ratio: Any, batch: int) -> Mapping[int, list[int]]:
        """k -> the rows that run with it.

        Raises:
            InputError: `ratio` is no pair of counts of masked and valid positions, for all rows or for each, within a row.
        """
        masked, valid = (_counts(each, batch) for each in _pair(ratio))
        if max(valid, default=0) > self._length:
            raise InputError(f"{ARGUMENT} says that {max(valid)} positions are valid, and a row has {self._length}")
        groups: dict[int, list[int]] = {}
        for row, counts in enumerate(zip(masked, valid, strict=True)):
            groups.setdefault(self.schedule.k(*counts), []).append(row)
        return groups


def _pair(ratio: Any) -> tuple[Any, Any]:
    if ratio is None:
        raise InputError(
            f"how many tokens an expert of this model takes depends on how much of a row is masked: call it with {ARGUMENT}=(masked, "
            "valid), numbers of positions, for all rows or a list with one for each"
        )
    if not isinstance(ratio, tuple | list) or len(ratio) != 2:
        raise InputError(f"{ARGUMENT} is a pair (masked, valid) of numbers of positions, or of lists with one for each row, not {ratio!r}")
    return ratio[0], ratio[1]


def _counts(value: Any, batch: int) -> list[int]:
    values = value.tolist() if isinstance(value, torch.Tensor) else value
    values = list(values) if isinstance(values, list | tuple) else [values] * batch
    if len(values) != batch or not all(isinstance(each, int) and not isinstance(each, bool) for each in values):
        raise InputError(f"{ARGUMENT} has {value!r} for {batch} rows: give an integer for all, or a list with one for each")
    return values
