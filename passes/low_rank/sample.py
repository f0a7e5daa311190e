"""A sample of a stream's rows that depends on nothing but the stream: neither on a seed nor on how its batches were cut.

Row i is kept while splitmix64(i) is among the `max_rows` smallest of the rows so far. The function is one to one, so there are no
ties (Steele, Lea and Flood, "Fast splittable pseudorandom number generators", 2014, figure 17, with Stafford's variant 13).
"""

import numpy as np
import torch
from torch import Tensor

SELECTION_SHARE = 8  # one row in so many is for selection


def splitmix64(index: np.ndarray) -> np.ndarray:
    """The (i + 1)-th number that splitmix64 gives from seed 0, for each i of `index`, as uint64."""
    z = (index.astype(np.uint64) + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


class RowSample:
    """At most `max_rows` rows of `k` numbers in `dtype`, on the CPU: 2 * max_rows * k bytes once it is full.

    One row in eight is for selection, chosen by the bits of the hash that did not decide whether it is kept. Of two rows there is one
    of each; a single row is for calibration.
    """

    def __init__(self, k: int, max_rows: int, dtype: torch.dtype = torch.bfloat16):
        self.seen = 0
        self._index = np.empty(0, np.int64)
        self._buffer = torch.empty(max_rows, k, dtype=dtype)  # memory that nothing was written to takes none

    def add(self, rows: Tensor) -> None:
        """The next rows of the stream: [m, k] of any float dtype, on any device."""
        old, size = len(self._index), len(self._buffer)
        index = np.concatenate([self._index, np.arange(self.seen, self.seen + len(rows))])
        kept = np.ones(len(index), bool)
        if len(index) > size:
            kept[np.argpartition(splitmix64(index), size)[size:]] = False
        arrived = old + np.flatnonzero(kept[old:])
        slots = np.concatenate([np.flatnonzero(~kept[:old]), np.arange(old, size)])[: len(arrived)]
        taken = rows.detach().index_select(0, torch.from_numpy(arrived - old).to(rows.device)).to("cpu", self._buffer.dtype)
        self._buffer.index_copy_(0, torch.from_numpy(slots), taken)
        self._index = np.concatenate([self._index, np.empty(int(kept.sum()) - old, np.int64)])
        self._index[slots] = index[arrived]
        self.seen += len(rows)

    def rows(self) -> Tensor:
        """The calibration rows [n, k] in the stream's order."""
        return self._part(selection=False)

    def selection(self) -> Tensor:
        """The rows [m, k] that calibration is not to see, in the stream's order."""
        return self._part(selection=True)

    def _part(self, *, selection: bool) -> Tensor:
        order = np.argsort(self._index)
        index = self._index[order]
        share = max(1, round(len(index) / SELECTION_SHARE)) if len(index) > 1 else 0
        # What was kept has zeros for the highest bits, so the low half tells its rows apart.
        low_bits = splitmix64(index) & np.uint64(0xFFFFFFFF)
        selected = np.zeros(len(index), bool)
        selected[np.argsort(low_bits, kind="stable")[:share]] = True
        return self._buffer.index_select(0, torch.from_numpy(order[selected == selection]))

    def state(self) -> dict[str, Tensor]:
        """What `restore` needs to go on: the kept rows and their numbers, as views."""
        return {"rows": self._buffer[: len(self._index)], "index": torch.from_numpy(self._index)}

    def restore(self, state: dict[str, Tensor], seen: int) -> None:
        """Takes the place of a sample that had that state after `seen` rows."""
        self.seen = seen
        self._index = state["index"].numpy().copy()
        self._buffer[: len(self._index)] = state["rows"]
