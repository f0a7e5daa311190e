"""Which function a row's next step runs: by how many tokens it has generated, or by its position, as the program's schedule says."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ...ir.errors import InputError
from .gain import FIRST_DRAFTS, MOST_DRAFTS
from .rows import Row


@dataclass(frozen=True)
class Schedule:
    """`functions[level]` has the layers of that level, fewer for each next one; decode step i runs level `level_of_step[i]`, those behind
    the table the last. With `by_position` i is the position of the token that is fed, prompt included, so rows of different prompts are on
    different levels. With `merges` all rows of a step run the smallest set that one of them has reached.

    A speculative one drafts `gamma` tokens with function `draft`, and the levels are of no matter. Where nobody has said how many, it
    `chooses_gamma` by what is measured, at most `most_drafts`; it `may_switch` to plain decoding unless somebody has said that it is to
    draft. Where it `reuses_prefix`, the draft gives hidden states too, from which the judge resumes.
    """

    functions: tuple[str, ...] = ("decode",)
    level_of_step: tuple[int, ...] = (0,)
    by_position: bool = False
    merges: bool = False
    gamma: int = 0
    draft: str = ""
    most_drafts: int = 0
    chooses_gamma: bool = False
    may_switch: bool = True
    reuses_prefix: bool = False

    def level_of(self, row: Row) -> int:
        """Of the row's next step."""
        step = row.position if self.by_position else len(row.tokens) - 1
        return self.level_of_step[min(step, len(self.level_of_step) - 1)]

    @property
    def needed(self) -> tuple[str, ...]:
        """The functions that run."""
        if not self.is_speculative:
            return ("prefill", *self.functions)
        return ("prefill", "decode", self.draft, *(("lift", "resume") if self.reuses_prefix else ("verify",)))

    @property
    def is_speculative(self) -> bool:
        return self.gamma > 0


def choose_schedule(schedules: Mapping[str, Any], speculative: bool | None) -> Schedule:
    """The schedule of a program with those `schedules`: its own where `speculative` is None, else with drafts at all events, or without.

    Raises:
        InputError: drafts are asked for, and the program has no function that drafts.
    """
    table = schedules.get("layer-skip")
    drafts = table is not None and table["mode"] == "speculative"
    if speculative and not drafts:
        raise InputError("this model has no function that drafts: make it with compile_decoder(model, 'layer-skip{mode=speculative}')")
    if drafts and speculative is not False:
        gamma = table["gamma"]
        return Schedule(
            gamma=FIRST_DRAFTS if gamma is None else gamma,
            most_drafts=MOST_DRAFTS if gamma is None else gamma,
            draft=table["draft"],
            chooses_gamma=gamma is None,
            may_switch=not speculative,
            reuses_prefix=table.get("reuse_prefix", False),  # programs of before say nothing of it
        )
    if table is None or drafts:
        return Schedule()
    by_position = table.get("clock", "step") == "position"  # programs of before have no clock
    return Schedule(tuple(table["functions"]), tuple(table["level_of_step"]), by_position, table["merge"] == "down")
