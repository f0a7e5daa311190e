"""What becomes of a program under a pipeline, on given inputs: one trial, its verdict, and the pass to blame.

    result = try_passes(program, "remove-no-ops,share-subexpressions", [random_inputs(program), hard_inputs(program)])
    result.verdict.kind     right, wrong, unstable, refused, crashed or inconclusive

The rule is that of `passes/verdict.py`, in the form that it has for tests; source: specs/trust.md, section 2. A *silent miscompile* is
`wrong` or `unstable`, since the compile raised nothing.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from ..ir import Fuel, Program, parse
from ..ir.errors import CalibrationError, GraphwrightError, InputError, VerifyError, first_line
from ..ir.float64 import Widening
from ..passes import Contract, Pass, PassManager, PassReport, Reference, Verdict, parse_pipeline
from ..passes.pipeline import Pipeline
from .same import difference

GRAVITY = ("crashed", "wrong", "unstable", "refused", "inconclusive", "unmeasured", "right")
"""The kinds of verdicts, the gravest first. Only `right` and `refused` pass; an `inconclusive` trial says nothing."""


@dataclass(frozen=True)
class TrialResult:
    """The gravest verdict over all input sets; `blamed` is the place, in the pipeline, of the pass that it is due to (None: of none), and
    `input_set` the place of the inputs that showed it. `after` is the rewritten program, None where there is none."""

    verdict: Verdict
    blamed: int | None = None
    input_set: int | None = None
    rewrites: int = 0  # that were made, or begun
    reports: tuple[PassReport, ...] = ()
    after: Program | None = None

    @property
    def fails(self) -> bool:
        """Whether the trial showed a fault: `verdict.fails`."""
        return self.verdict.fails


def try_passes(program: Program, passes: Pipeline, input_sets: Sequence[Sequence[Any]], *, most: int | None = None) -> TrialResult:
    """Runs `passes` over `program`, the verifier behind each of them, and holds what came of it to their contracts on each of `input_sets`
    (flat, a value for each leaf of main's inputs). What came of it must also print as text that parses back to an equal program.
    With `most` the pipeline ends after so many rewrites.

    Raises:
        PassError: the pipeline does not parse, or stands in a wrong order.
        CalibrationError: the inputs that a pass was given cannot be had, which tells nothing of the pass.
    """
    pipeline, fuel = parse_pipeline(passes), Fuel(most)
    manager = PassManager(pipeline, checked=True, fuel=fuel)
    try:
        result = manager.run(program)
    except CalibrationError:
        raise
    except GraphwrightError as error:
        return replace(_unfinished(error, pipeline), rewrites=fuel.spent)
    history, reports = result.history, result.reports
    pipeline = pipeline[: len(reports)]
    found = TrialResult(Verdict("right"), rewrites=fuel.spent, reports=reports, after=result.program)
    problem = _text_problem(result.program)
    if problem:
        return replace(found, verdict=Verdict("wrong", problem))
    widening = Widening(keeps_programs=True)
    for index, inputs in enumerate(input_sets):
        judged = _judge(pipeline, history, reports, Reference(history[0], inputs, widening=widening))
        if GRAVITY.index(judged.verdict.kind) < GRAVITY.index(found.verdict.kind):
            found = replace(found, verdict=judged.verdict, blamed=judged.blamed, input_set=index)
        if found.fails:
            break
    return found


def _unfinished(error: GraphwrightError, pipeline: Sequence[Pass]) -> TrialResult:
    """A typed error is a refusal, but not one that stands for a broken rule of the IR or for any other exception inside a pass."""
    cause = error.__cause__
    is_crash = cause is not None and (isinstance(cause, VerifyError) or not isinstance(cause, GraphwrightError))
    said = " ".join((str(error), *_notes(error)))
    blamed = next((n for n, each in enumerate(pipeline) if f"pass {each.name}" in said), None)
    notes = [f" ({note})" for note in (*_notes(cause), *_notes(error)) if note.startswith("in rewrite ")]
    return TrialResult(Verdict("crashed" if is_crash else "refused", f"{type(error).__name__}: {error}{''.join(notes[:1])}"), blamed)


def _notes(error: BaseException | None) -> Sequence[str]:
    return getattr(error, "__notes__", ())


def _text_problem(program: Program) -> str:
    text = str(program)
    try:
        again = parse(text, weights=program.weights)
    except GraphwrightError as error:
        return f"its text does not parse back: {error}"
    if str(again) != text:
        return "its text parses back to a program of another text"
    other = difference(program, again)
    return f"its text parses back to another program: {other}" if other else ""


def _judge(pipeline: Sequence[Pass], history: Sequence[Program], reports: Sequence[PassReport], reference: Reference) -> TrialResult:
    """Exact passes that follow one another are judged as one; only where that fails is each of them judged, to find the one to blame."""
    inputs, worst = reference.inputs, TrialResult(Verdict("right"))
    begin = 0
    try:
        for end in range(1, len(pipeline) + 1):
            if end < len(pipeline) and _is_plainly_exact(pipeline[end]) and _is_plainly_exact(pipeline[end - 1]):
                continue
            judged = _judge_run(range(begin, end), pipeline, history, reports, reference)
            if GRAVITY.index(judged.verdict.kind) < GRAVITY.index(worst.verdict.kind):
                worst = judged
            if worst.fails:
                break
            if pipeline[end - 1].contract not in (Contract.EXACT, Contract.POLICY) and reports[end - 1].records:
                reference = reference.followed_by(history[end], inputs)
            begin = end
    except InputError as error:
        return TrialResult(Verdict("inconclusive", first_line(error)))
    return worst


def _judge_run(
    run: range, pipeline: Sequence[Pass], history: Sequence[Program], reports: Sequence[PassReport], reference: Reference
) -> TrialResult:
    """The verdict on passes of which `run` holds the places: all exact, or one that is not."""
    changing = [place for place in run if reports[place].records]
    if not changing:
        return TrialResult(Verdict("right"))
    verdict = _held(pipeline[run[-1]], reference, history[run[-1] + 1])
    if verdict.kind == "right":
        return TrialResult(verdict)
    for place in changing[:-1]:
        earlier = _held(pipeline[place], reference, history[place + 1])
        if earlier.kind == verdict.kind:
            return TrialResult(earlier, place)
    return TrialResult(verdict, changing[-1])


def _held(each: Pass, reference: Reference, after: Program) -> Verdict:
    return reference.judge_exact(after, strict=True) if _is_plainly_exact(each) else each.check(reference, after)


def _is_plainly_exact(each: Pass) -> bool:
    """Whether the exact rule and nothing else judges the pass. A policy leaves the graph as it was."""
    return each.contract in (Contract.EXACT, Contract.POLICY) and type(each).check is Pass.check
