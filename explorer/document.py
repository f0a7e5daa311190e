"""The document: everything that is known of a compile, as plain data for programs to read. `schema.json` describes it.

Programs stand in a list, each once, and stages refer to them by number: a pass that changed nothing gives the program that it was given.
A line of a program is known by its place in `lines`, a line of the user's by its place in `wheres`.
"""

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import torch

from ..ir import Program
from ..passes import PassReport
from ..passes.verdict import Verdict
from .difference_data import difference_data
from .program_data import ProgramData, Wheres
from .schedules import schedules
from .sources import sources
from .story import KernelRun, Story

VERSION = 1


def document(story: Story) -> dict[str, Any]:
    """The document of `story`: JSON's types alone, and no number that is not finite."""
    wheres = Wheres()
    programs, of_stage = _programs(story, wheres)
    earlier = len(story.reports) - len(story.history) + 1
    stages = [_captured(story, earlier)]
    for index, report in enumerate(story.reports):
        before, after = (of_stage[max(place - earlier, 0)] for place in (index, index + 1))
        stages.append(_stage(report, programs[before], programs[after], after))
    kernels = story.profile.kernels if story.profile is not None else story.kernels
    return _finite(
        {
            "graphwright_report": VERSION,
            "title": story.title,
            "pipeline": story.history[-1].pipeline,
            "contract": _contract(story.contract),
            "backend": story.backend,
            "torch": torch.__version__,
            "measured": {"peak_bytes": story.peak_bytes, "seconds": story.seconds},
            "stages": stages,
            "programs": [program.data for program in programs],
            "differences": _differences(programs),
            "kernels": [_kernel(kernel, programs[-1]) for kernel in kernels],
            "errors": _errors(story, programs),
            "errors_missing": story.profile.errors_missing if story.profile is not None else "nobody asked for them",
            "schedules": schedules(story.history[-1]),
            "wheres": [{"file": where.file, "line": where.line, "module": where.module} for where in wheres.known],
            "sources": sources(wheres.known),
        }
    )


def _programs(story: Story, wheres: Wheres) -> tuple[list[ProgramData], list[int]]:
    """The distinct programs, and for each of the history which one it is."""
    history = list(story.history)
    programs, of_stage = [ProgramData(history[0], wheres)], [0]
    reports = story.reports[len(story.reports) - len(history) + 1 :]
    for (before, after), report in zip(pairwise(history), reports, strict=True):
        if not _is_same(before, after, report):
            programs.append(ProgramData(after, wheres))
        of_stage.append(len(programs) - 1)
    programs[-1].stands_for(history[-1])  # what was measured is of this very one
    return programs, of_stage


def _is_same(before: Program, after: Program, report: Any) -> bool:
    """Whether a pass left the program as it was: it recorded no rewrite, and there are as many calls and the same weights."""
    is_idle = isinstance(report, PassReport) and not report.records
    return is_idle and before.weights.keys() == after.weights.keys() and _count(before) == _count(after)


def _count(program: Program) -> int:
    return sum(1 for _ in program.nodes())


def _captured(story: Story, earlier: int) -> dict[str, Any]:
    """The first stage; of an artifact, which `earlier` passes made, it is what was loaded."""
    return {"name": "loaded" if earlier else "captured", "pipeline": "", "program": 0, "records": [], "left": [], "lines": []}


def _stage(report: Any, before: ProgramData, after: ProgramData, program: int) -> dict[str, Any]:
    if not isinstance(report, PassReport):  # of an artifact: a paragraph
        said = str(report).splitlines()
        name = said[0].partition("{")[0].partition(" ")[0] if said else ""
        return {"name": name, "pipeline": "", "program": program, "records": [], "left": [], "lines": said}
    return {
        "name": report.spelling.partition("{")[0],
        "pipeline": report.spelling,
        "program": program,
        "contract": _contract(report.contract),
        "seconds": report.seconds,
        "kept": report.kept,
        "verdict": None if report.verdict is None else _verdict(report.verdict),
        "lines": list(report.lines),
        "records": [
            {
                "rule": record.rule,
                "file": record.file,
                "line": record.line,
                "microseconds": record.microseconds,
                "before": _named(record.before, before.labelled),
                "after": _named(record.after, after.labelled),
            }
            for record in report.records
        ],
        "left": [
            {"what": left.what, "reason": left.reason, "where": left.where, "line": before.line_of(left.what, left.where)}
            for left in report.left
        ],
    }


def _named(labels: Sequence[str], known: Mapping[str, Sequence[int]]) -> list[dict[str, Any]]:
    """What a record calls calls, with the line of each where one line alone is called so."""
    lines = (known.get(label, ()) for label in labels)
    return [{"label": label, "line": found[0] if len(found) == 1 else -1} for label, found in zip(labels, lines, strict=True)]


def _contract(contract: Any) -> dict[str, str]:
    return {"name": str(contract), "promise": contract.promise}


def _verdict(verdict: Verdict) -> dict[str, Any]:
    return {
        "kind": verdict.kind,
        "reason": verdict.reason,
        "worst": "" if verdict.worst is None else str(verdict.worst),
        "rewrite_error": verdict.rewrite_error,
        "error": verdict.error,
        "error_ratio": verdict.error_ratio,
    }


def _differences(programs: Sequence[ProgramData]) -> list[dict[str, Any]]:
    """Of each program to the one before it, and of the last to the first."""
    last = len(programs) - 1
    pairs = [(index - 1, index) for index in range(1, len(programs))] + ([(0, last)] if last > 1 else [])
    return [{"before": a, "after": b, **difference_data(programs[a].bare, programs[b].bare)} for a, b in pairs]


def _kernel(kernel: KernelRun, program: ProgramData) -> dict[str, Any]:
    return {
        "name": kernel.name,
        "kind": kernel.kind,
        "lines": [program.index[node] for node in kernel.nodes if node in program.index],
        "bytes": kernel.nbytes,
        "seconds": kernel.seconds,
        "source": kernel.source,
        "language": kernel.language,
        "emitted": kernel.emitted,
    }


def _errors(story: Story, programs: Sequence[ProgramData]) -> list[dict[str, Any]]:
    errors = story.profile.errors if story.profile is not None else ()
    return [
        {
            "module": each.module,
            "line_before": programs[0].index[each.source],
            "line": -1 if each.result is None else programs[-1].index[each.result],
            "before": each.before,
            "after": each.after,
        }
        for each in errors
    ]


def _finite(value: Any) -> Any:
    """`value` with what JSON does not know as text: infinities and NaN."""
    if isinstance(value, float) and not math.isfinite(value):
        return repr(value)
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    return [_finite(item) for item in value] if isinstance(value, list | tuple) else value
