"""What a site's input looked like over the calibration, and the state in which it is gathered row by row."""

import hashlib
import json
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from ...ir.program import content_digest
from .sample import RowSample


@dataclass(frozen=True)
class Statistics:
    """The rows [K] that one value had, over its leading dims and all calibration items.

    amax f32[K]: the largest |x| of each channel over all rows. low: the least x of all. rows_seen: how many rows there were.
    rows [n, K], selection [m, K]: the sample, in bfloat16 (float16 where the value is), in the order in which rows came; what is
    fitted to `rows` is judged on `selection`. refusal: why there is no telling, empty where there is; then the tensors are empty.
    """

    amax: Tensor
    low: float
    rows_seen: int
    rows: Tensor
    selection: Tensor
    refusal: str = ""

    @property
    def reason_against_judging(self) -> str:
        """Why no error can be measured on it, empty where one can."""
        if self.refusal:
            return self.refusal
        if self.rows_seen and len(self.selection):
            return ""
        return f"calibration gave {self.rows_seen} row{'' if self.rows_seen == 1 else 's'} there, too few to choose by and to judge on"

    @cached_property
    def digest(self) -> str:
        """SHA-256 over everything in it, hex."""
        tensors = [content_digest(each) for each in (self.amax, self.rows, self.selection)]
        return hashlib.sha256(json.dumps([tensors, self.low, self.rows_seen, self.refusal]).encode()).hexdigest()


class Watch:
    """Gathers the statistics of one value [.., k] of `dtype`, in 2 * max_rows * k + 8 * k bytes."""

    def __init__(self, k: int, dtype: torch.dtype, max_rows: int):
        self.items = 0  # calibration items seen
        self.is_finished = False
        self._kept = torch.float16 if dtype == torch.float16 else torch.bfloat16
        self._amax = torch.zeros(k)
        self._low = torch.inf
        self._sample = RowSample(k, max_rows, self._kept)
        self._refusal = ""

    def see(self, value: Tensor, item: int) -> None:
        """The value that calibration item `item` gave."""
        if self._refusal or value.numel() == 0:
            return
        rows = value.detach().reshape(-1, len(self._amax))
        low, high = rows.amin(0), rows.amax(0)
        amax = torch.maximum(high, -low).to("cpu", torch.float32)
        if not amax.to(self._kept).isfinite().all():
            found = "NaN" if amax.isnan().any() else "infinite or too large values"
            return self._refuse(f"calibration item {item} has {found} there")
        self._amax = torch.maximum(self._amax, amax)
        self._low = min(self._low, float(low.amin()))
        self._sample.add(rows)

    def statistics(self) -> Statistics:
        """What was seen so far."""
        if not (self._refusal or self._sample.seen):
            self._refuse("no calibration item has a row there")
        return Statistics(self._amax, self._low, self._sample.seen, self._sample.rows(), self._sample.selection(), self._refusal)

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Tensors (views) and plain data from which `restore` goes on."""
        data = {"items": self.items, "finished": self.is_finished, "seen": self._sample.seen, "low": self._low, "refusal": self._refusal}
        return {"amax": self._amax, **self._sample.state()}, data

    def restore(self, tensors: dict[str, Tensor], data: dict[str, Any]) -> None:
        """Takes the place of a watch that had that state."""
        self.items, self.is_finished, self._low = data["items"], data["finished"], data["low"]
        if data["refusal"]:
            return self._refuse(data["refusal"])
        self._amax = tensors["amax"].clone()
        self._sample.restore(tensors, data["seen"])

    def _refuse(self, reason: str) -> None:
        self._refusal, self._amax, self._low = reason, torch.zeros(0), 0.0
        self._sample = RowSample(0, 0)
