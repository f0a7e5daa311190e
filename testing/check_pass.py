"""`check_pass(MyPass())`: a property test of any pass, derived from its contract, that ends in the smallest program which breaks it.

    def test_my_pass() -> None:
        check_pass(MyPass(), ops=["aten.relu.default", "elementwise"])

| contract | what must hold on every program and its inputs |
|---|---|
| exact, policy | the exact rule: the same function in float64, as precise in the working dtype, of the same types and aliases |
| bounded, substitution | what the pass's own `check` finds |

And of each: every rule of the IR behind the pass, and a text that parses back. A typed error of the pass is a refusal, and none of these.
"""

import warnings
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from hypothesis import HealthCheck, Phase, Verbosity, given, seed, settings
from hypothesis import strategies as st

from ..ir import Program
from ..ir.torch_log import silenced
from ..passes import Contract, Pass
from .cases import packed, quoted
from .inputs import input_sets
from .pipelines import calibrated
from .programs import programs as any_programs
from .verdict import TrialResult, try_passes

_MOST_NUMBERS = 2000  # of a tensor that a ready-made test spells out
_MOST_SEARCHES = 4  # until enough programs are found that the pass changes
_ENOUGH = 10  # of one or two that it changed, all may be where nothing shows: in calls that nobody reads, or on operands that happen to fit


@dataclass(eq=False)
class _Failure(Exception):
    """One trial that breaks the contract, as hypothesis passes it on."""

    program: Program
    each: Pass
    inputs: Sequence[Any] | None
    result: TrialResult


def check_pass(
    each: Pass,
    *,
    ops: Collection[str] | None = None,
    max_nodes: int = 8,
    examples: int = 200,
    seed: int = 0,
    programs: st.SearchStrategy[Program] | None = None,
) -> None:
    """Holds `each` to its contract on `examples` random programs, of `ops` and `max_nodes` as for `programs()`, or of a strategy of
    your own. Equal arguments try equal programs where the same modules are imported (hypothesis tries constants of their code, too).

    A pass that calibrates is given inputs of each program. The pass must change some programs: while it changed fewer than 10, as many
    again are tried, a few times over; one that none of them concerns was not tested, so name operations that it looks for.

    Warns:
        UserWarning: the pass changed fewer than 10 programs, which is a weak test.

    Raises:
        AssertionError: with the smallest program that breaks the contract as text, the verdict, and a test that reproduces it; or that
            the pass changed no program.
    """
    changed: list[bool] = []
    reasons: dict[str, None] = {}

    def trial(program: Program, number: int) -> None:
        ready = calibrated(each, program)
        sets = list(input_sets(program, number))
        result = try_passes(program, [ready], sets)
        verdict = result.verdict
        changed.append(any(report.records for report in result.reports) and verdict.kind != "inconclusive")
        if verdict.kind == "refused":
            reasons[verdict.reason] = None
        if result.fails or verdict.kind == "unmeasured":
            raise _Failure(program, ready, None if result.input_set is None else sets[result.input_set], result)

    strategy = any_programs(ops, max_nodes) if programs is None else programs
    try:
        with silenced():  # what torch reports of symbols is no part of a failure's story
            for search in range(_MOST_SEARCHES):
                _searching(seed + search, examples)(given(strategy, st.integers(0, 2**16))(trial))()
                if sum(changed) >= _ENOUGH:
                    break
    except _Failure as failure:
        raise AssertionError(_story(failure)) from None
    if not any(changed):
        why = f"; it refused: {next(iter(reasons))}" if reasons else ""
        advice = "name operations that it looks for, as in check_pass(.., ops=['aten.relu.default'])"
        raise AssertionError(f"{each.name} changed none of {len(changed)} programs, so nothing was tested{why}: {advice}")
    if sum(changed) < _ENOUGH:
        text = f"{each.name} changed {sum(changed)} of {len(changed)} programs, few to be sure of: name operations that it looks for"
        warnings.warn(text, stacklevel=2)


def _searching(number: int, examples: int) -> Any:
    """Hypothesis set up to search alike each time, and to say nothing itself."""
    silent = settings(
        max_examples=examples,
        database=None,
        deadline=None,
        report_multiple_bugs=False,
        phases=(Phase.generate, Phase.shrink),
        verbosity=Verbosity.quiet,
        suppress_health_check=list(HealthCheck),
        print_blob=False,
    )
    return lambda test: seed(number)(silent(test))


# --- what a failure says ---


def _story(failure: _Failure) -> str:
    each, result = failure.each, failure.result
    promise = {Contract.EXACT: "exact", Contract.POLICY: "a policy"}.get(each.contract, str(each.contract))
    parts = [f"{each.name} is not {promise}: {result.verdict}", "the smallest program that was found:", str(failure.program)]
    if result.after is not None:
        parts += ["what the pass made of it:", str(result.after)]
    parts += ["a test that reproduces it:", _test_of(failure)]
    return "\n\n".join(part.rstrip() for part in parts) + "\n"


def _test_of(failure: _Failure) -> str:
    each, cls = failure.each, type(failure.each)
    leaves = failure.inputs or ()
    first = [next(n for n, other in enumerate(leaves) if other is leaf) for leaf in leaves]  # one tensor may be passed twice
    weights = ", ".join(f"{name!r}: {_literal(weight.tensor)}" for name, weight in failure.program.weights.items())
    body = [
        f"    program = parse(PROGRAM, weights={{{weights}}})",
        *(f"    x{n} = {_literal(leaf)}" for n, leaf in enumerate(leaves) if first[n] == n),
        f"    result = try_passes(program, [{construction(each)}], [{'' if failure.inputs is None else _names(first)}])",
        '    assert result.verdict.kind in ("right", "refused"), result.verdict',
    ]
    lines = [
        "import torch",
        "from graphwright import parse",
        *(["from graphwright.ir.strides import laid_out"] if any("laid_out(" in line for line in body) else []),
        "from graphwright.testing import try_passes",
        *(["from graphwright.testing.cases import unpacked"] if any("unpacked(" in line for line in body) else []),
        f"from {cls.__module__} import {cls.__name__}",
        "",
        f"PROGRAM = {quoted(str(failure.program))}",
        "",
        "",
        f"def test_{each.name.replace('-', '_')}_keeps_its_contract() -> None:",
        *body,
    ]
    return "\n".join(lines)


def _names(first: Sequence[int]) -> str:
    return f"[{', '.join(f'x{n}' for n in first)}]"


def construction(each: Pass) -> str:
    """The pass as code; examples to calibrate on are no code, and are the inputs of the trial."""
    given_options = [f"{name}={getattr(each, name)!r}" for name in each.option_names() if name != "calibration"]
    if "calibration" in each.option_names():
        given_options.append("calibration=[]")
    return f"{type(each).__name__}({', '.join(given_options)})"


def _literal(value: Any) -> str:
    """A value as code: a tensor with its numbers and strides, packed where they are many."""
    if not isinstance(value, torch.Tensor):
        return repr(value)
    if value.numel() == 0:
        return f"torch.empty({list(value.shape)}, dtype={value.dtype})"
    if value.numel() > _MOST_NUMBERS:
        literal = f"unpacked({packed(value)!r})"
    else:
        text = repr(value.tolist()).replace("nan", "float('nan')").replace("inf", "float('inf')")
        literal = f"torch.tensor({text}, dtype={value.dtype})"
    return literal if value.is_contiguous() else f"laid_out({literal}, {list(value.stride())})"
