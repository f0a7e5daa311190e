"""Keys, values and states of the rows in flight, and for how many positions each layer has them.

A layer that a row skipped at some position has nothing there, and no later step may run it for that row: `check` says so before a step
runs, since what attention would read is whatever the memory held.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from ...ir.caches import CacheType
from ...ir.errors import InputError, StateError
from ...ir.liveness import format_bytes


class Caches:
    """For steps of `most_tokens` of a row at most. `tensors` has one cache for each of `types`; a step may put another in its place.
    `lengths` i64[layers, rows] counts the positions of each row that a layer has seen, from the first on. Behind the rows is a `spare` one,
    for what pads a step; a single row has no need of it.

    Raises:
        InputError: there is no memory for so many rows and slots.
    """

    def __init__(self, types: Sequence[CacheType], rows: int, capacity: int, most_tokens: int = 1):
        self.spare = rows
        self.tensors = _allocated(types, rows + (rows > 1), capacity, most_tokens)
        self.lengths = np.zeros((1 + max(each.layer for each in types), rows), np.int64)
        self._columns: dict[tuple[int, ...], np.ndarray] = {}

    def check(self, layers: tuple[int, ...], rows: np.ndarray, position: np.ndarray) -> None:
        """That each of `layers` has exactly the positions before `position` i64[B] of each of `rows` i64[B].

        Raises:
            StateError: one has not.
        """
        held = self.lengths[self._column(layers), rows]
        if (held == position).all():
            return
        place, b = np.argwhere(held != position)[0]
        raise StateError(
            f"layer {layers[place]} has keys and values for {held[place, b]} positions of cache row {rows[b]}, and the step is at position "
            f"{position[b]}: a layer that was skipped there cannot run any more, so the levels of a schedule must be nested"
        )

    def wrote(self, layers: tuple[int, ...], rows: np.ndarray, end: np.ndarray) -> None:
        """`layers` have now the positions before `end` i64[B] of `rows` i64[B]."""
        self.lengths[self._column(layers), rows] = end

    def rewind(self, rows: np.ndarray, end: np.ndarray, layers: tuple[int, ...] | None = None) -> None:
        """Forgets what `layers` (None: any) have of `rows` i64[B] from `end` i64[B] on."""
        chosen = slice(None) if layers is None else self._column(layers)
        self.lengths[chosen, rows] = np.minimum(self.lengths[chosen, rows], end)

    def clear(self, row: int) -> None:
        """Forgets all of a row, for the next prompt."""
        self.lengths[:, row] = 0

    def _column(self, layers: tuple[int, ...]) -> np.ndarray:
        """i64[L, 1]"""
        if layers not in self._columns:
            self._columns[layers] = np.array(layers, np.int64).reshape(-1, 1)
        return self._columns[layers]


def _allocated(types: Sequence[CacheType], rows: int, capacity: int, most_tokens: int) -> list[Tensor]:
    try:
        return [unwritten(rows, each.slots(capacity, most_tokens), each) for each in types]
    except (RuntimeError, TypeError) as error:  # a TypeError: the capacity is no int64
        needed = sum(each.nbytes(rows, capacity, most_tokens) for each in types)
        raise InputError(
            f"caches of {rows} rows x {capacity} positions take {format_bytes(needed)}, which {types[0].device} does not have: "
            "lower capacity, max_new_tokens, or batch"
        ) from error


def unwritten(rows: int, slots: int, each: CacheType) -> Tensor:
    """Memory for a cache, holding anything: no step reads what no step wrote."""
    return torch.empty(each.shape(rows, slots), dtype=each.dtype, device=each.device)
