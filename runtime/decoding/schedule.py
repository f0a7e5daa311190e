"""Which function a row's next step runs: by how many tokens it has generated, or by its position, as the program's schedule says."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ...ir.errors import InputError
from .rows import Row


@dataclass(frozen=True)
class Schedule:
    """`functions[level]` has the layers of that level, fewer for each next one; decode step i runs level `level_of_step[i]`, those behind
    the table the last. With `by_position` i is the position of the token that is fed, prompt included, so rows of different prompts are on
    different levels. With `merges` all rows of a step run the smallest set that one of them has reached.

    A speculative one drafts `gamma` tokens with function `draft`, and the levels are of no matter.
    """

    functions: tuple[str, ...] = ("decode",)
    level_of_step: tuple[int, ...] = (0,)
    by_position: bool = False
    merges: bool = False
    gamma: int = 0
    draft: str = ""

    def level_of(self, row: Row) -> int:
        """Of the row's next step."""
        step = row.position if self.by_position else len(row.tokens) - 1
        return self.level_of_step[min(step, len(self.level_of_step) - 1)]

    @property
    def is_speculative(self) -> bool:
        return self.gamma > 0


def choose_schedule(schedules: Mapping[str, Any], speculative: bool | None) -> Schedule:
    """The schedule of a program with those `schedules`: its own where `speculative` is None, else with or without drafts.

    Raises:
        InputError: drafts are asked for, and the program has no function that drafts.
    """
    table = schedules.get("layer-skip")
    drafts = table is not None and table["mode"] == "speculative"
    if speculative and not drafts:
        raise InputError("this model has no function that drafts: make it with compile_decoder(model, 'layer-skip{mode=speculative}')")
    if drafts and speculative is not False:
        return Schedule(gamma=table["gamma"], draft=table["draft"])
    if table is None or drafts:
        return Schedule()
    by_position = table.get("clock", "step") == "position"  # programs of before have no clock
    return Schedule(tuple(table["functions"]), tuple(table["level_of_step"]), by_position, table["merge"] == "down")
