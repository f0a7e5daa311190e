"""Runs a step on some rows of the caches: fills the operands, checks that every layer has what it will read, keeps count of what it wrote.

The operands of a step are kept, one set for each number of rows and tokens, and written anew: a step allocates none.
"""

import time
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from .caches import Caches
from .steps import Step


class Operands:
    """`tokens` i64[B, T], `position`, `rows`, `lengths` i64[B]: arrays of the host, and the tensors that steps get of them."""

    def __init__(self, batch: int, length: int, device: torch.device):
        self.tokens, self.position = np.zeros((batch, length), np.int64), np.zeros(batch, np.int64)
        self.rows, self.lengths = np.zeros(batch, np.int64), np.full(batch, length, np.int64)
        self._host = [torch.from_numpy(array) for array in (self.tokens, self.position, self.rows, self.lengths)]
        self._device = [torch.empty_like(tensor, device=device) for tensor in self._host] if device.type != "cpu" else self._host

    def tensors(self) -> list[Tensor]:
        """As the arrays are now."""
        if self._device is not self._host:
            for there, here in zip(self._device, self._host, strict=True):
                there.copy_(here)
        return self._device


class Dispatch:
    """Steps on rows of `caches`."""

    def __init__(self, caches: Caches, device: torch.device):
        self.caches = caches
        self.ready_seconds = 0.0
        self._device = device
        self._kept: dict[tuple[int, int], Operands] = {}

    def decode(self, step: Step, rows: Sequence[int], positions: Sequence[int], tokens: Sequence[Sequence[int]]) -> Tensor:
        """Logits of `step` on all the `tokens`, B lists of one length, of cache rows `rows`, from `positions` on."""
        return self.outputs(step, rows, positions, tokens)[0]

    def outputs(
        self, step: Step, rows: Sequence[int], positions: Sequence[int], tokens: Sequence[Sequence[int]], hidden: Tensor | None = None
    ) -> tuple[Tensor, ...]:
        """All that `step` gives, one that begins with hidden states [B, T, D] being given these."""
        batch, sizes = len(tokens), (step.padded(len(tokens)), len(tokens[0]))
        if sizes not in self._kept:
            self._kept[sizes] = Operands(*sizes, self._device)
        operands = self._kept[sizes]
        operands.tokens[:batch] = tokens
        operands.position[:batch], operands.rows[:batch] = positions, rows
        if batch < sizes[0]:  # rows that stand in for none work on the spare one
            operands.position[batch:], operands.rows[batch:] = 0, self.caches.spare
            hidden = None if hidden is None else F.pad(hidden, (0, 0, 0, 0, 0, sizes[0] - batch))
        return self._run(step, operands, batch, hidden)

    def prefill(self, step: Step, rows: Sequence[int], positions: Sequence[int], tokens: Sequence[np.ndarray]) -> Tensor:
        """Logits [B, V] behind the last of each row's `tokens`, of any lengths: shorter ones are padded on the right."""
        operands = Operands(len(tokens), max(map(len, tokens)), self._device)
        operands.position[:], operands.rows[:] = positions, rows
        operands.lengths[:] = [len(each) for each in tokens]
        for padded, each in zip(operands.tokens, tokens, strict=True):
            padded[: len(each)] = each
        return self._run(step, operands, len(tokens))[0]

    def clock(self) -> float:
        """Seconds of the wall, without those in which steps were made ready: these are taken once for a model and size."""
        return time.perf_counter() - self.ready_seconds

    def _run(self, step: Step, operands: Operands, batch: int, hidden: Tensor | None = None) -> tuple[Tensor, ...]:
        self.ready_seconds += step.make_ready(*operands.tokens.shape)
        rows, position = operands.rows[:batch], operands.position[:batch]
        self.caches.check(step.layers, rows, position)
        tokens, positions, places, lengths = operands.tensors()
        outputs = step(self.caches.tensors, tokens, positions, places, lengths, hidden)
        self.caches.wrote(step.layers, rows, position + operands.lengths[:batch])
        return tuple(output[:batch] for output in outputs)
