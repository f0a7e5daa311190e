"""Trials by number: (seed, number) is one program with inputs and a pipeline, the same on every machine; how it ended is a record."""

import random
import re
import signal
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

from ..ir import Program
from ..ir.errors import first_line
from ..passes import Pass, Verdict
from .cases import Case, spelled
from .choices import Choices, RandomChoices
from .inputs import input_sets
from .pipelines import pipeline_with, random_pipeline
from .programs import random_program
from .themes import Theme, drawn_theme
from .verdict import TrialResult, try_passes

MAX_SECONDS = 120
THEMED = 33  # percent of trials that are made around a site of one rule


@dataclass(frozen=True)
class Trial:
    """What (seed, number) stands for."""

    program: Program
    passes: tuple[Pass, ...]
    inputs: tuple[Sequence[Any], ...]

    def case(self, note: str = "") -> Case:
        return Case(self.program, spelled(self.passes), self.inputs, note)


@dataclass(frozen=True)
class Record:
    """One line of a run's results. `fired` counts rewrites by "pass/rule", `left` what was left alone by "pass/rule: reason", or by
    "pass: reason" where every rule of the pass refused it."""

    number: int
    kind: str
    reason: str = ""
    blamed: str = ""
    pipeline: str = ""
    calls: int = 0
    seconds: float = 0.0
    fired: dict[str, int] = field(default_factory=dict)
    left: dict[str, int] = field(default_factory=dict)

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def make_trial(seed: int, number: int, *, max_nodes: int = 12, families: Sequence[str] | None = None) -> Trial:
    """The trial `number` of the run with `seed`."""
    choices = RandomChoices(random.Random(f"{seed}/{number}"))
    if families is None and choices.chance(THEMED):
        return themed_trial(choices, drawn_theme(choices), max_nodes)
    program = random_program(choices, families, max_nodes)
    inputs = tuple(input_sets(program, choices.integer(0, 2**16)))
    return Trial(program, random_pipeline(choices, program), inputs)


def themed_trial(choices: Choices, theme: Theme, max_nodes: int = 12) -> Trial:
    """A program with a site of the theme under a pipeline with its pass."""
    program = theme.program(choices, max_nodes)
    inputs = tuple(input_sets(program, choices.integer(0, 2**16)))
    return Trial(program, pipeline_with(choices, program, theme.wanted, theme.options), inputs)


def run_trial(seed: int, number: int, *, max_nodes: int = 12, families: Sequence[str] | None = None) -> Record:
    """Makes the trial and runs it; whatever happens is a record."""
    start = time.perf_counter()
    try:
        with _limited(MAX_SECONDS):
            trial = make_trial(seed, number, max_nodes=max_nodes, families=families)
            result = try_passes(trial.program, trial.passes, trial.inputs)
    except TimeoutError:
        return Record(number, "timeout", f"longer than {MAX_SECONDS} s", seconds=time.perf_counter() - start)
    except Exception as error:  # of the generator, the judge or torch: each is looked at
        reason = f"{type(error).__name__}: {first_line(error)}"
        return Record(number, "crashed", reason, seconds=time.perf_counter() - start)
    return record_of(number, trial, result, time.perf_counter() - start)


def record_of(number: int, trial: Trial, result: TrialResult, seconds: float) -> Record:
    """What is kept of a trial that ended with `result`."""
    verdict: Verdict = result.verdict
    names = [each.name for each in trial.passes]
    fired = Counter(f"{record.pass_name}/{record.rule}" for report in result.reports for record in report.records)
    left = Counter(
        f"{name}{'/' if site.rule else ''}{site.rule}: {_general(site.reason)}"
        for name, report in zip(names, result.reports)
        for site in (*report.left, *report.declined)
    )
    if verdict.kind == "refused" and result.blamed is not None:
        left[f"{names[result.blamed]}: {_general(verdict.reason)}"] += 1
    return Record(
        number,
        verdict.kind,
        "" if verdict.kind == "right" else str(verdict),
        "" if result.blamed is None else names[result.blamed],
        spelled(trial.passes),
        len(trial.program.main.calls),
        round(seconds, 3),
        dict(fired),
        dict(left),
    )


def _general(reason: str) -> str:
    """The reason without numbers, names of operations and values, and lines, so that equal reasons count as one."""
    without_names = re.sub(r"\b(?:aten|gw)\.[\w.]+|\b\w+_default\w*|\S+\.py:\d+", "..", reason)
    return re.sub(r"\d+(?:\.\d+)?(?: [KMG]?i?B\b)?", "N", without_names)[:100]


@contextmanager
def _limited(seconds: int) -> Iterator[None]:
    """Raises TimeoutError in the main thread when the block takes longer; elsewhere there is no limit."""
    try:
        before = signal.signal(signal.SIGALRM, _raise_timeout)
    except ValueError:  # not in the main thread
        yield
        return
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def _raise_timeout(*_: Any) -> None:
    raise TimeoutError
