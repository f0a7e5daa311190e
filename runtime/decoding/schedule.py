"""Which function a row's next step runs: by how many tokens it has generated, as the program's schedule says."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ...ir.errors import InputError


@dataclass(frozen=True)
class Schedule:
    """`functions[level]` has the layers of that level, fewer for each next one; decode step i runs level `level_of_step[i]`, those behind
    the table the last. With `merges` all rows of a step run the smallest set that one of them has reached.

    A speculative one drafts `gamma` tokens with function `draft`, and the levels are of no matter.
    """

    functions: tuple[str, ...] = ("decode",)
    level_of_step: tuple[int, ...] = (0,)
    merges: bool = False
    gamma: int = 0
    draft: str = ""

    def level(self, step: int) -> int:
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
    return Schedule(tuple(table["functions"]), tuple(table["level_of_step"]), table["merge"] == "down")
