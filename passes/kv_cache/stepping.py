"""The functions of one step run by their operations' own bodies, on caches that hold NaN where nothing was written."""

from typing import Any

import torch

from ...ir import Program
from ...ir.caches import cache_types
from ...ir.run import run


class Stepping:
    """`step(function, tokens, start)` gives the logits of `tokens` i64[B, T] at positions `start`, .. of all rows, and keeps new caches.

    `rows` i64[B] are the places of the rows in caches of as many rows, with room for `capacity` positions. What was
    never written is NaN, and reaches the logits of whoever reads it.
    """

    def __init__(self, program: Program, rows: torch.Tensor, capacity: int):
        self.program, self.rows = program, rows
        self.caches = empty_caches(program, len(rows), capacity)

    def __call__(self, function: str, tokens: torch.Tensor, start: int, *more: Any) -> torch.Tensor:
        return self.outputs(function, tokens, start, *more)[0]

    def outputs(self, function: str, tokens: torch.Tensor, start: int, *more: Any) -> list[torch.Tensor]:
        """All that it gives beside new caches; `more` are operands that stand before these."""
        names = [str(node.target) for node in self.program.functions[function].placeholders]
        held = [self.caches[name] for name in names if name in self.caches]
        position = torch.full_like(self.rows, start)
        outputs, new = run(self.program, [tokens, position, self.rows, *more, *held], function=function)
        self.caches |= {name.removeprefix("input:"): value for name, value in new.items()}
        return outputs


def empty_caches(program: Program, rows: int, capacity: int) -> dict[str, torch.Tensor]:
    """Slots that hold NaN: what was never written is never read."""
    return {
        name: torch.full(each.shape(rows, each.slots(capacity, capacity)), float("nan"), dtype=each.dtype, device=each.device)
        for name, each in cache_types(program.functions["decode"]).items()
    }


def largest_difference(got: torch.Tensor, expected: torch.Tensor, scale: float) -> float:
    """max |got - expected| / scale, infinite where a NaN is among them; of logits that are all zero the difference itself."""
    difference = float((got - expected).abs().max()) / (scale or 1.0)
    return difference if difference == difference else float("inf")
