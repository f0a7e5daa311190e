"""Which rewrite of a pipeline breaks its promise: the one after which the trial fails, and before which it does not.

    found = bisect(program, [MyPass()])
    print(found)        # pass, rule with its file and line, which application, what it changed, by how much the result is off

Fuel stops the compiler after N rewrites with a program that is whole; N is halved between a count that passes and one that fails. What is
inconclusive is tried again on other inputs, and never guessed. Source: specs/trust.md, section 4.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ..ir import Program, RewriteRecord
from ..ir.diff import diff
from ..ir.errors import InputError
from ..passes import Contract, Pass, Verdict, parse_pipeline
from ..passes.pipeline import Pipeline
from .inputs import input_sets as inputs_of
from .verdict import TrialResult, try_passes

_SEEDS = 5  # sets of inputs that an inconclusive trial is tried on


@dataclass(frozen=True)
class Bisection:
    """The rewrite to blame: number `rewrite` of the whole pipeline, and number `application` of its pass, 0 where that fails before its
    first one.

    `record` says its rule and what it changed, None where the pass fails inside the rewrite. `before` and `after` are the programs
    around it, and `inputs` those that show the fault (None: none are needed).
    """

    passes: tuple[Pass, ...]
    blamed: int
    rewrite: int
    application: int
    record: RewriteRecord | None
    verdict: Verdict
    inputs: Sequence[Any] | None
    before: Program
    after: Program | None

    @property
    def rule(self) -> str:
        """The rule with its file and line, "" where it is not known."""
        return "" if self.record is None else f"{self.record.rule} ({self.record.file}:{self.record.line})"

    def __str__(self) -> str:
        each = self.passes[self.blamed]
        promise = {Contract.EXACT: "exact", Contract.POLICY: "a policy"}.get(each.contract, str(each.contract))
        if self.application == 0:
            return f"{each.spelling} fails before its first rewrite: {self.verdict}"
        which = f"rewrite {self.application} of {each.spelling}, number {self.rewrite} of the pipeline"
        if self.record is None or self.after is None:
            return f"{which}, fails: {self.verdict}"
        lines = [f"{which}, is not {promise}: {self.verdict}", f"  rule       {self.rule}"]
        lines += [f"  took away  {label}" for label in self.record.before] + [f"  put there  {label}" for label in self.record.after]
        return "\n".join([*lines, "", diff(self.before, self.after).rstrip()])


def bisect(program: Program, passes: Pipeline, input_sets: Sequence[Sequence[Any]] | None = None) -> Bisection | None:
    """The first rewrite of `passes` on `program` that breaks its contract, on inputs as `input_sets` has them (made up when None); None
    where none does.

    Raises:
        PassError: the pipeline does not parse, or stands in a wrong order, or a pass refuses the program.
        InputError: the inputs tell nothing, or the fault is there before any rewrite and no pass is to blame.
        CalibrationError: the example inputs that a pass was given raised as they were iterated.
    """
    pipeline = parse_pipeline(passes)
    whole, sets = _conclusive(program, pipeline, None if input_sets is None else list(input_sets), None)
    if not whole.verdict.fails:
        return None
    shown = sets if whole.input_set is None else [sets[whole.input_set]]
    passing, failing = 0, max(whole.rewrites, 1)
    results = {failing: whole}
    start, _ = _conclusive(program, pipeline, shown, 0)
    if start.verdict.fails:
        return _without_rewrite(program, pipeline, start)
    while failing - passing > 1:
        middle = (passing + failing) // 2
        results[middle], _ = _conclusive(program, pipeline, shown, middle)
        passing, failing = (passing, middle) if results[middle].verdict.fails else (middle, failing)
    last, _ = _conclusive(program, pipeline, shown, failing)
    before = try_passes(program, pipeline, [], most=passing)
    return _described(program, pipeline, failing, last, before, shown)


def _conclusive(
    program: Program, pipeline: Sequence[Pass], given: Sequence[Sequence[Any]] | None, most: int | None
) -> tuple[TrialResult, Sequence[Sequence[Any]]]:
    """The trial with at most so many rewrites, and its inputs: others of a trial that is inconclusive, where none were given."""
    result = TrialResult(Verdict("inconclusive"))
    for seed in range(1 if given is not None else _SEEDS):
        sets: Sequence[Sequence[Any]] = given if given is not None else list(inputs_of(program, seed))
        result = try_passes(program, pipeline, sets, most=most)
        if result.verdict.kind != "inconclusive":
            return result, sets
    where = "" if most is None else f" after {most} rewrites"
    raise InputError(f"the trial is inconclusive{where} ({result.verdict.reason}): give inputs on which the program is well conditioned")


def _without_rewrite(program: Program, pipeline: tuple[Pass, ...], result: TrialResult) -> Bisection:
    if result.blamed is None:
        raise InputError(f"the program fails before any rewrite, so that no pass is to blame: {result.verdict}")
    return Bisection(pipeline, result.blamed, 0, 0, None, result.verdict, None, program, None)


def _described(
    program: Program, pipeline: tuple[Pass, ...], rewrite: int, failing: TrialResult, passing: TrialResult, sets: Sequence[Sequence[Any]]
) -> Bisection:
    assert passing.after is not None, "it passed"
    if failing.after is None:  # the last pass that ran raised
        place = len(passing.reports) - 1 if failing.blamed is None else failing.blamed
        made = try_passes(program, pipeline[:place], []).rewrites
        return Bisection(pipeline, place, rewrite, failing.rewrites - made, None, failing.verdict, None, passing.after, None)
    counts = [len(report.records) for report in failing.reports]
    place = next(n for n in reversed(range(len(counts))) if counts[n])
    application, record = rewrite - sum(counts[:place]), failing.reports[place].records[-1]
    inputs = sets[failing.input_set or 0]
    return Bisection(pipeline, place, rewrite, application, record, failing.verdict, inputs, passing.after, failing.after)
