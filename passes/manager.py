"""Runs a pipeline: each pass on a copy, the verifier after each, and on demand the numeric check of each pass's contract.

The check costs far more than the passes, so it comes when all of them ran and are structurally right. When it fails, fuel finds the
first rewrite that breaks: the pass runs again with fuel for half as many rewrites, and so on.
"""

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any

from ..ir import Fuel, OutOfFuel, Program, Rewriter, RewriteRecord, Stage, verify
from ..ir.errors import ContractError, GraphwrightError, InputError, PassError, VerifyError
from ..ir.where import raised_at
from .base import LeftAlone, Outcome, Pass
from .check import Reference
from .contract import Contract
from .inputs import random_inputs
from .pipeline import Pipeline, check_order, parse_pipeline
from .registry import BUILT_IN
from .verdict import Verdict

Progress = Callable[[int, int, str], None]

_MODES = ("structure", "numeric")
_RETRIES = 3
UNCHANGED = "nothing changed"


@dataclass(frozen=True)
class PassReport:
    """What one pass did. `str(report)` is its paragraph in the compile report. One that is `kept` is of an earlier run on an equal
    program, and so are its times. One with `seconds` None says no time, as in files, which are equal bytes for equal input."""

    spelling: str
    contract: Contract
    records: tuple[RewriteRecord, ...] = ()
    left: tuple[LeftAlone, ...] = ()
    lines: tuple[str, ...] = ()
    data: dict[str, Any] = field(default_factory=dict)
    seconds: float | None = 0.0
    verdict: Verdict | None = None
    out_of_fuel: bool = False
    declined: tuple[LeftAlone, ...] = ()
    kept: bool = field(default=False, compare=False)

    def __str__(self) -> str:
        head = [self.spelling, str(self.contract), _count(len(self.records), "rewrite")]
        head += [] if self.seconds is None else [f"{self.seconds:.2f} s"]
        head += [said for said, holds in (("(out of fuel)", self.out_of_fuel), ("(in an earlier run)", self.kept)) if holds]
        lines = ["  ".join(head)]
        lines += [f"  {rule} x {count}  ({place})" for (rule, place), count in _tally((r.rule, f"{r.file}:{r.line}") for r in self.records)]
        lines += [f"  {line}" for line in self.lines]
        lines += [f"  left {count} {what}: {reason}" for (what, reason), count in _tally((left.what, left.reason) for left in self.left)]
        if self.verdict is not None:
            lines.append(f"  {_verdict_line(self.verdict, self.contract)}")
        return "\n".join(lines)

    @property
    def untimed(self) -> "PassReport":
        """What it says of every run alike."""
        return replace(self, seconds=None, kept=False)


@dataclass(frozen=True)
class PipelineResult:
    """The rewritten program; `history` holds the captured one, then the program after each pass."""

    program: Program
    history: Sequence[Program]
    reports: tuple[PassReport, ...]
    contract: Contract

    def __str__(self) -> str:
        paragraphs = [f"contract: {self.contract}. {self.contract.promise}", *map(str, self.reports)]
        return "\n".join(paragraphs)


class PassManager:
    """Runs `passes` (objects, names, or one pipeline text) in order.

    Args:
        verify: "structure" holds the verifier's rules after each pass; "numeric" also, when all ran, each pass to its contract.
        inputs: example inputs for "numeric", one for each leaf of main's inputs; made up from the signature when None.
        fuel: how many rewrites may happen over all passes; when it is spent the pipeline ends there.
        checked: every rule must change the program exactly when it says so. Expensive.
        progress: called as progress(passes done, passes in all, name of the next). With "numeric" a pass is done when it is checked,
            and while that goes on the name is "checking NAME".

    Raises:
        PassError: the pipeline does not parse, or stands in a wrong order.
    """

    def __init__(
        self,
        passes: Pipeline,
        *,
        verify: str = "structure",
        inputs: Sequence[Any] | None = None,
        fuel: Fuel | None = None,
        checked: bool = False,
        progress: Progress | None = None,
    ):
        if verify not in _MODES:
            raise PassError(f"verify is {verify!r}, but must be one of {', '.join(map(repr, _MODES))}")
        self.passes = parse_pipeline(passes)
        check_order(self.passes)
        self.numeric = verify == "numeric"
        self.inputs = inputs
        self.fuel = fuel if fuel is not None else Fuel()
        self.checked = checked
        self.progress = progress

    @property
    def contract(self) -> Contract:
        """What the pipeline as a whole promises: what its weakest pass does."""
        return Contract.weakest(each.contract for each in self.passes)

    def run(self, program: Program) -> PipelineResult:
        """The program after every pass; `program` itself is unchanged.

        Raises:
            VerifyError: `program` itself breaks a rule of the IR.
            PassError: a pass needs a fact that none before it ensures, fails inside, or leaves a program that breaks a rule.
            ContractError: with verify="numeric": the pass and the rewrite that change the function by more than allowed.
        """
        check_facts(self.passes, program)
        verify(program)
        reference = self._reference(program) if self.numeric else None
        history, reports = [program], []
        for index, each in enumerate(self.passes):
            self._tell(0 if self.numeric else index, each.name)
            after, report = self._run_pass(index, history[-1], self.fuel)
            history.append(after)
            reports.append(report)
            if report.out_of_fuel:
                break
        if reference is not None:
            reports = self._hold_to_contracts(reference, history, reports)
        self._tell(len(self.passes), "")
        return PipelineResult(history[-1], tuple(history), tuple(reports), Contract.weakest(report.contract for report in reports))

    def _tell(self, done: int, name: str) -> None:
        if self.progress is not None:
            self.progress(done, len(self.passes), name)

    def _run_pass(self, index: int, source: Program, fuel: Fuel) -> tuple[Program, PassReport]:
        each, program = self.passes[index], source.copy()
        records: list[RewriteRecord] = []
        outcomes: list[Outcome] = []
        out_of_fuel, start = False, time.perf_counter()
        with self._blaming(index):
            for name in list(program.functions):
                rewriter = Rewriter(program, pass_name=each.name, function=name, fuel=fuel, checked=self.checked)
                try:
                    outcomes.append(_checked_outcome(each, each.run(rewriter)))
                except OutOfFuel:
                    out_of_fuel = True
                records += rewriter.records
                if out_of_fuel:
                    break
            _drop_unused_weights(program)
            program.history = (*source.history, Stage(each.spelling, source))
            verify(program)
        outcome = Outcome.merged(outcomes)
        return program, PassReport(
            spelling=each.spelling,
            contract=each.contract,
            records=tuple(records),
            left=outcome.left,
            lines=outcome.lines,
            data=outcome.data,
            seconds=time.perf_counter() - start,
            out_of_fuel=out_of_fuel,
            declined=outcome.declined,
        )

    @contextmanager
    def _blaming(self, index: int) -> Iterator[None]:
        """What goes wrong inside is an error of the pass, and says which passes ran before it."""
        each, before = self.passes[index], [p.name for p in self.passes[:index]]
        story = f"pass {each.name} (after {', '.join(before)})" if before else f"pass {each.name} (the first)"
        try:
            yield
        except VerifyError as error:
            failure = PassError(f"{story} breaks a rule of the IR: {error}")
            for note in getattr(error, "__notes__", ()):
                failure.add_note(note)
            raise failure from error
        except GraphwrightError as error:
            error.add_note(f"while running {story}")
            raise
        except Exception as error:
            raise PassError(f"{story} failed: {type(error).__name__}: {error} (raised at {raised_at(error)})") from error

    # --- the numeric check ---

    def _reference(self, program: Program) -> Reference:
        return Reference(program, random_inputs(program) if self.inputs is None else self.inputs)

    def _hold_to_contracts(self, reference: Reference, history: Sequence[Program], reports: Sequence[PassReport]) -> list[PassReport]:
        """The reports with verdicts. A pass is measured against the captured program, or what the last inexact pass made of it."""
        judged = []
        for index, (report, (before, after)) in enumerate(zip(reports, pairwise(history), strict=True)):
            self._tell(index, f"checking {self.passes[index].name}")
            verdict = self._hold_to_contract(index, reference, before, after, report)
            judged.append(replace(report, verdict=verdict))
            if report.contract not in (Contract.EXACT, Contract.POLICY) and verdict.reason != UNCHANGED:
                reference = reference.followed_by(after, self.inputs)
            reference.forget()
        return judged

    def _hold_to_contract(self, index: int, reference: Reference, before: Program, after: Program, report: PassReport) -> Verdict:
        each = self.passes[index]
        if not report.records and _content(before) == _content(after):
            return Verdict("right", UNCHANGED)
        verdict, reference = self._judge(each, reference, after)
        if not verdict.fails:
            return verdict
        place, culprit = self._first_breaking_rewrite(index, reference, before, report.records)
        failure = ContractError(f"pass {each.name} breaks its contract ({each.contract}), {place}: {verdict}")
        if culprit is not None:
            failure.add_note("\n".join(["before:", *culprit.before, "after:", *culprit.after]))
        raise failure

    def _judge(self, each: Pass, reference: Reference, after: Program) -> tuple[Verdict, Reference]:
        """The verdict, on other inputs where the first are too ill-conditioned, and the reference that gave it."""
        first, verdict = reference, each.check(reference, after)
        for seed in range(1, _RETRIES):
            if verdict.kind != "inconclusive":
                break
            other = first.on_other_inputs(seed)
            try:
                verdict, reference = each.check(other, after), other
            except InputError:
                break  # made-up inputs that the program refuses tell nothing
        return verdict, reference

    def _first_breaking_rewrite(
        self, index: int, reference: Reference, before: Program, records: Sequence[RewriteRecord]
    ) -> tuple[str, RewriteRecord | None]:
        """Where the contract breaks, in words and as a record, by bisection: `right` rewrites keep it, `wrong` break it."""
        if not records:
            return "without reporting a rewrite", None
        right, wrong = 0, len(records)
        while wrong - right > 1:
            middle = (right + wrong) // 2
            program, _ = self._run_pass(index, before, Fuel(left=middle))
            verdict = self.passes[index].check(reference, program)
            if verdict.kind == "inconclusive":
                return f"in one of the rewrites {right + 1} to {wrong} of {len(records)} (those between cannot be judged)", None
            right, wrong = (right, middle) if verdict.fails else (middle, wrong)
        record = records[wrong - 1]
        return f"first in rewrite {wrong} of {len(records)}, rule {record.rule} ({record.file}:{record.line})", record


def check_facts(passes: Sequence[Pass], program: Program) -> None:
    """Holds what each pass requires against what the passes before it, and those in the program's history, ensure.

    Raises:
        PassError: a fact is missing; the message says which passes ensure it.
    """
    made = {stage.pipeline.partition("{")[0] for stage in program.history}
    facts = {fact for name in made if name in BUILT_IN for fact in BUILT_IN[name].ensures}
    for each in passes:
        for fact in sorted(each.requires - facts):
            known: list[Pass | type[Pass]] = [*passes, *BUILT_IN.values()]
            ensuring = sorted({other.name for other in known if fact in other.ensures})
            advice = f"put {' or '.join(ensuring)} before it" if ensuring else "no known pass ensures that"
            raise PassError(f"pass {each.name} requires {fact}: {advice}")
        facts |= each.ensures


def _checked_outcome(each: Pass, outcome: Any) -> Outcome:
    if not isinstance(outcome, Outcome):
        raise PassError(f"pass {each.name} returned {outcome!r} from run: return an Outcome, such as Outcome()")
    return outcome


def _drop_unused_weights(program: Program) -> None:
    used = {str(node.target) for node in program.nodes() if node.op == "get_attr"}
    for name in [name for name, weight in program.weights.items() if name not in used and weight.kind not in ("state", "record")]:
        del program.weights[name]


def _content(program: Program) -> str:
    """The text without the history."""
    return str(Program(program.functions.values(), program.weights, program.symbols, program.schedules))


def _verdict_line(verdict: Verdict, contract: Contract) -> str:
    """The verdict with what the exact rule measured; other contracts say what they measured in its reason."""
    is_exact = contract in (Contract.EXACT, Contract.POLICY)
    if verdict.reason == UNCHANGED or verdict.kind == "unmeasured" or not is_exact:
        return str(verdict)
    working = f"working dtype {verdict.error:.1e} ({verdict.error_ratio:.2f} x the original's own)"
    return f"{verdict}; float64 error {verdict.rewrite_error:.1e}, {working}"


def _tally(items: Iterable[Any]) -> list[tuple[Any, int]]:
    counts: dict[Any, int] = {}
    for item in items:
        counts[item] = counts.get(item, 0) + 1
    return list(counts.items())


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" + ("" if number == 1 else "s")
