"""A value of a program that is being made: its node, and the interval that its elements lie in."""

import math
from dataclasses import dataclass
from typing import Any

import torch

from ..ir import Node
from ..ir.symbols import hint

LIMIT = 1e4  # what elements stay below, so that float16 and sums over them do not overflow
FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
INTEGERS = (torch.int64, torch.int32, torch.int8, torch.uint8, torch.int16)


@dataclass(frozen=True)
class Value:
    """`low <= x <= high` for each element x on plain and hard inputs alike, or nearly so in low precision; of a boolean 0 and 1."""

    node: Node
    low: float = -LIMIT
    high: float = LIMIT

    @property
    def fake(self) -> torch.Tensor:
        return self.node.meta["val"]

    @property
    def dtype(self) -> torch.dtype:
        return self.fake.dtype

    @property
    def shape(self) -> tuple[Any, ...]:
        return tuple(self.fake.shape)

    @property
    def rank(self) -> int:
        return self.fake.dim()

    @property
    def bound(self) -> float:
        return max(abs(self.low), abs(self.high))

    @property
    def is_float(self) -> bool:
        return self.dtype.is_floating_point

    @property
    def is_integer(self) -> bool:
        return self.dtype in INTEGERS

    @property
    def is_static(self) -> bool:
        return all(isinstance(size, int) for size in self.shape)


def numel(shape: Any) -> int:
    """How many elements a tensor of `shape` has at the sizes of capture."""
    return math.prod(hint(size) for size in shape)
