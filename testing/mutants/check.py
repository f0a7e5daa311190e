"""Looks for one planted mistake: subjects one after another until something sees it; then bisecting must name where it is."""

import sys
import time
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import islice
from types import CodeType, FrameType
from typing import Any

from ...ir import Fuel
from ...ir.errors import GraphwrightError
from ...passes import PassManager
from ..bisect import Bisection, bisect
from ..reduce import reduce
from .hunts import Found, Subject
from .mutant import Mutant, planted

_AT_ONCE = 16  # subjects that are made before the mistake is planted, which takes a tenth of a second


@dataclass(frozen=True)
class Named:
    """What bisecting said of a mistake in a rewrite: whether its rule is the right one, and its application the first after which the
    program is another than the right compiler's; and how many calls the smallest program has (None where there is none)."""

    rule: bool
    application: bool
    calls: int | None = None


@dataclass(frozen=True)
class Outcome:
    """How a hunt ended. `catcher` is "" for a survivor; `trials` counts subjects, the last one included, and `ran` those of a
    survivor on which the changed code ran (at least 1 otherwise, and not counted)."""

    mutant: Mutant
    catcher: str
    trials: int
    seconds: float
    said: str = ""
    named: Named | None = None
    ran: int = 1

    @property
    def caught(self) -> bool:
        """By something that was expected to."""
        return self.catcher in self.mutant.catchers


def check(mutant: Mutant, *, seed: int = 0, most: int = 200, seconds: float = 60.0, bisecting: bool = True) -> Outcome:
    """Tries up to `most` subjects, and no new ones after so many seconds. What the right compiler fails on too says nothing.

    Raises:
        NoSite: the source that the mutant changes moved on.
    """
    start, trials, ran = time.perf_counter(), 0, 0
    subjects = mutant.hunt.subjects(seed)
    while trials < most and (time.perf_counter() - start < seconds or not trials):
        for subject, found, runs in _tried(mutant, list(islice(subjects, min(_AT_ONCE, most - trials))), start + seconds):
            trials, ran = trials + 1, ran + runs
            if found is None or _asked(mutant, subject) is not None:
                continue
            named = _named(mutant, subject, found) if bisecting and _is_bisected(mutant, found) else None
            return Outcome(mutant, found.catcher, trials, time.perf_counter() - start, str(found.verdict), named)
    return Outcome(mutant, "", trials, time.perf_counter() - start, ran=ran)


def _tried(mutant: Mutant, subjects: list[Subject], end: float) -> Iterator[tuple[Subject, Found | None, bool]]:
    """Each subject, what sees the mistake on it, and whether the changed code ran there."""
    for subject in subjects:
        with planted(mutant) as codes, _watched(codes) as seen:
            found = _asked(mutant, subject)
        yield subject, found, bool(seen)
        if time.perf_counter() > end:
            return


@contextmanager
def _watched(codes: Collection[CodeType]) -> Iterator[set[CodeType]]:
    """Those of `codes` that run inside the block, as they do."""
    seen: set[CodeType] = set()

    def entered(frame: FrameType, event: str, _: Any) -> None:
        if frame.f_code in codes:
            seen.add(frame.f_code)
            sys.setprofile(None)

    sys.setprofile(entered)
    try:
        yield seen
    finally:
        sys.setprofile(None)


def _asked(mutant: Mutant, subject: Subject) -> Found | None:
    """What a question finds; an error that is raised beside what it asks is found, too."""
    from ...passes import Verdict

    try:
        return mutant.hunt.ask(subject)
    except GraphwrightError as error:
        return Found("refusal", Verdict("refused", f"{type(error).__name__}: {error}"))
    except Exception as error:
        return Found("error", Verdict("crashed", f"{type(error).__name__}: {error}"))


def _is_bisected(mutant: Mutant, found: Found) -> bool:
    """Whether the mistake lies in a rewrite, and is what a trial fails on: a pass that refuses has found it itself."""
    return bool(mutant.rule) and mutant.hunt.question == "contracts" and found.verdict.fails


def _named(mutant: Mutant, subject: Subject, found: Found) -> Named:
    """What bisecting says, and the size of what reducing leaves."""
    with planted(mutant):
        try:
            bisection = bisect(subject.program, subject.passes, None if found.inputs is None else [found.inputs])
        except GraphwrightError:
            bisection = None
        if bisection is None:
            return Named(False, False)
        calls = None
        inputs = found.inputs if found.inputs is not None else subject.inputs[0]
        with suppress(ValueError, GraphwrightError):
            calls = len(reduce(subject.program, subject.passes, inputs).program.main.calls)
    return Named(_names_rule(mutant, bisection), _names_application(mutant, subject, bisection), calls)


def _names_rule(mutant: Mutant, bisection: Bisection) -> bool:
    """Whether it says the pass, and the rule or, where the pass fails between rewrites, the line that raised."""
    pass_name, _, rule = mutant.rule.partition("/")
    if bisection.passes[bisection.blamed].name != pass_name:
        return False
    if bisection.record is not None:
        return bisection.record.rule == rule
    reason = bisection.verdict.reason
    return f"in rewrite {rule} at" in reason or "in rewrite" not in reason and f"(raised at graphwright/{_room(mutant.file)}" in reason


def _room(file: str) -> str:
    return file.partition("/")[0]


def _names_application(mutant: Mutant, subject: Subject, bisection: Bisection) -> bool:
    """Whether the programs of the right and of the mistaken compiler part at this very rewrite."""
    count = bisection.rewrite
    right, wrong = [_text(subject, number) for number in (count - 1, count)], []
    with planted(mutant):
        wrong = [_text(subject, number) for number in (count - 1, count)]
    if count == 0:
        return wrong[1] is None and right[1] is not None
    return right[0] == wrong[0] and (right[1] != wrong[1] or right[1] is not None and _is_in_values(mutant))


def _is_in_values(mutant: Mutant) -> bool:
    """Whether the mistake is in what an operation or a weight is, which no text shows."""
    return mutant.file.startswith(("ir/ops/", "ir/region.py", "ir/float64.py"))


def _text(subject: Subject, rewrites: int) -> str | None:
    """The program after so many rewrites, None where the pipeline fails."""
    try:
        return str(PassManager(subject.passes, fuel=Fuel(rewrites)).run(subject.program).program)
    except GraphwrightError:
        return None
