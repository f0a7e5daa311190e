"""Where random programs get their decisions from: hypothesis, which shrinks and replays them, or a plain generator, which is fast.

Both give the same programs for the same decisions. The first option of each choice is the simplest, since shrinking goes there.
"""

import random
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

T = TypeVar("T")


class Choices(ABC):
    """A source of decisions."""

    @abstractmethod
    def integer(self, low: int, high: int) -> int:
        """A number from `low` to `high`, both included; the simplest is `low`."""

    def pick(self, options: Sequence[T]) -> T:
        """One of `options`, of which the first is the simplest."""
        return options[self.integer(0, len(options) - 1)] if len(options) > 1 else options[0]

    def chance(self, percent: int) -> bool:
        """True in `percent` of 100 cases; False is simpler."""
        return self.integer(0, 99) >= 100 - percent

    def subset(self, options: Sequence[T], percent: int = 50) -> list[T]:
        """Each of `options` with that chance, in their order."""
        return [option for option in options if self.chance(percent)]


class RandomChoices(Choices):
    """Decisions of `random.Random`, which is the same for a seed on every machine."""

    def __init__(self, generator: random.Random):
        self.generator = generator

    def integer(self, low: int, high: int) -> int:
        return self.generator.randint(low, high)


class DrawnChoices(Choices):
    """Decisions of a hypothesis strategy: `draw` is what `st.composite` gives, `integers` is `st.integers`."""

    def __init__(self, draw: Callable[..., Any], integers: Callable[..., Any]):
        self.draw = draw
        self.integers = integers

    def integer(self, low: int, high: int) -> int:
        return self.draw(self.integers(low, high))
