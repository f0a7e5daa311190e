"""bisect, reduce and explain: which rewrite is wrong, on how small a program, and why a pass left something alone."""

import argparse
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..ir import Program
from ..ir.calling import Call, parameters_of
from ..passes import Pass, PassManager, PassReport
from .programs import pipeline_of
from .result import FOUND, OK, Mistake, Result, progress
from .sources import load, program_of

if TYPE_CHECKING:
    from ..testing.bisect import Bisection
    from ..testing.reduce import Smallest

_MOST_LISTED = 12


def bisect(options: argparse.Namespace) -> Result:
    target = _target(options.output)
    program, passes, given = _read(options)
    found = _bisected(program, passes, given)
    if found is None:
        return Result("no rewrite is wrong: each pass keeps its contract on these inputs", {"verdict": "right"})
    data = {
        "verdict": found.verdict.kind,
        "reason": str(found.verdict),
        "pass": found.passes[found.blamed].spelling,
        "rule": found.rule,
        "rewrite": found.rewrite,
        "application": found.application,
        "before": list(found.record.before) if found.record else [],
        "after": list(found.record.after) if found.record else [],
    }
    text = str(found)
    if target is not None:
        text += "\n\n" + _offered(target, _smallest(program, found), data)
    return Result(text, data, FOUND)


def reduce(options: argparse.Namespace) -> Result:
    target = _target(options.output)
    program, passes, given = _read(options)
    found = _bisected(program, passes, given)
    if found is None:
        raise Mistake("no rewrite is wrong on these inputs, so that there is nothing to reduce")
    small = _smallest(program, found)
    data: dict[str, Any] = {
        "verdict": small.verdict.kind,
        "reason": str(small.verdict),
        "calls": len(small.program.main.calls),
        "passes": [each.spelling for each in small.passes],
        "program": str(small.program),
    }
    count, whole = data["calls"], len(program.main.calls)
    text = f"{count} of {whole} calls and {', '.join(data['passes'])} are enough: {small.verdict}\n\n{small.program}"
    if target is not None:
        text += "\n" + _offered(target, small, data)
    return Result(text, data, FOUND)


def _read(options: argparse.Namespace) -> tuple[Program, tuple[Pass, ...], list[Sequence[Any]] | None]:
    """The program, the passes, and the inputs that the model brings: made-up ones otherwise."""
    passes = pipeline_of(options)
    model = load(options.model, options.trusted)
    if isinstance(model.model, Program):
        raise Mistake(f"{options.model} has no weights: give a .gw, .onnx or .pt2 file, a zoo name or module:factory")
    program = program_of(model, options.trusted)
    if model.example is None:
        return program, passes, None
    return program, passes, [Call(program, program.main, parameters_of(model.model.forward)).bind(*model.example)[0]]


def _bisected(program: Program, passes: tuple[Pass, ...], given: list[Sequence[Any]] | None) -> "Bisection | None":
    """On the inputs that came with the model, then on made-up ones, hard ones among them."""
    testing = _testing()
    return (testing.bisect.bisect(program, passes, given) if given is not None else None) or testing.bisect.bisect(program, passes)


def _smallest(program: Program, found: "Bisection") -> "Smallest":
    testing = _testing()
    inputs = found.inputs if found.inputs is not None else next(testing.inputs.input_sets(program))
    small: Smallest = testing.reduce.reduce(program, found.passes, inputs)
    return small


def _offered(target: Path, small: "Smallest", data: dict[str, Any]) -> str:
    _testing().reproducer.write_reproducer(target, small.program, small.passes, small.inputs, small.verdict)
    data["output"] = str(target)
    calls = len(small.program.main.calls)
    return f"wrote {target}, which was run and fails alike, with {calls} call{'' if calls == 1 else 's'}"


def _target(output: str | None) -> Path | None:
    if output is None:
        return None
    path = Path(output)
    if path.suffix != ".py":
        raise Mistake(f"{path}: reproducers are called something.py")
    if not path.parent.is_dir():
        raise Mistake(f"{path}: the folder {path.parent} does not exist")
    return path


def _testing() -> Any:
    try:
        from .. import testing
        from ..testing import bisect, inputs, reduce, reproducer  # noqa: F401 - as attributes of the package
    except ModuleNotFoundError as error:
        raise Mistake(f"{error.name} is not installed: pip install 'graphwright[testing]'") from error
    return testing


def explain(options: argparse.Namespace) -> Result:
    passes = pipeline_of(argparse.Namespace(passes=options.passname, no_cleanups=options.no_cleanups))
    model = load(options.model, options.trusted)
    manager = PassManager(passes)
    with progress() as manager.progress:
        result = manager.run(program_of(model, options.trusted))
    report = result.reports[-1]
    fired = Counter(f"{record.rule} ({record.file}:{record.line})" for record in report.records)
    left = [{"what": each.what, "reason": each.reason, "where": each.where} for each in report.left]
    data = {"pass": report.spelling, "fired": dict(fired), "left": left, "lines": list(report.lines)}
    return Result(_explained(report, fired), data, OK)


def _explained(report: PassReport, fired: "Counter[str]") -> str:
    count = len(report.records)
    lines = [f"{report.spelling} ({report.contract}) made {count} rewrite{'' if count == 1 else 's'}"]
    lines += [f"  {rule} x {number}" for rule, number in fired.most_common()]
    lines += [f"  {line}" for line in report.lines]
    if not report.left:
        lines.append("nothing else came near: no other operation is of a kind that the pass looks at, or matched in part")
        return "\n".join(lines)
    reasons: dict[str, list[Any]] = {}
    for each in report.left:
        reasons.setdefault(each.reason, []).append(each)
    lines.append(f"left alone, {len(report.left)} in all:")
    for reason, sites in sorted(reasons.items(), key=lambda item: -len(item[1])):
        lines.append(f"  {len(sites)} x {reason}")
        lines += [f"      {each.what}" + (f"  {each.where}" if each.where else "") for each in sites[:_MOST_LISTED]]
        lines += [f"      and {len(sites) - _MOST_LISTED} more"] if len(sites) > _MOST_LISTED else []
    return "\n".join(lines)
