"""compile, dump, diff and verify."""

import argparse
import os
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import torch

from ..compiler import compile as compile_model
from ..compiler import compile_decoder
from ..ir import Program
from ..ir import verify as verify_program
from ..ir.calling import Call, parameters_of
from ..ir.calls import name_of
from ..ir.diff import compare
from ..ir.errors import ContractError, GraphwrightError, VerifyError
from ..passes import CLEANUPS, Contract, Pass, PassManager, PassReport, parse_pipeline
from ..passes.manager import UNCHANGED
from ..runtime.atomic import check_writable
from ..runtime.backend import choose_backend
from ..runtime.compiled import CompiledModel
from .per_layer import per_layer, plot_target
from .result import FOUND, OK, Mistake, Result, progress, table
from .sources import load, program_of, users_code


def compile_(options: argparse.Namespace) -> Result:
    choose_backend(options.backend)  # a wrong one is said before the work
    output = _writable(options.output)
    compiled = compiled_from(options, "compile", backend=options.backend, verify="numeric" if options.numeric else "structure")
    report = compiled.report()
    if output is not None:
        compiled.save(output)
    memory = {"unsliced": report.memory.unsliced, "planned": report.memory.planned, "floor": report.memory.floor}
    data = {
        "pipeline": report.pipeline,
        "contract": str(report.contract),
        "backend": report.backend,
        "passes": [_report_data(each) for each in report.passes],
        "predicted_bytes": memory,
        "output": None if output is None else str(output),
    }
    return Result(str(report) + (f"wrote {output}\n" if output is not None else ""), data)


def compiled_from(options: argparse.Namespace, command: str, **choices: Any) -> CompiledModel:
    """MODEL with its passes, for a `command` that needs its weights. `choices` are those of `compile`."""
    passes = parsed(options.passes)
    model = load(options.model, options.trusted)
    if isinstance(model.model, Program) and options.model.endswith(".txt"):
        raise Mistake(f"{options.model} has no weights: {command} takes a .gw, .onnx or .pt2 file, a zoo name or module:factory")
    if options.decoder and not isinstance(model.model, torch.nn.Module):
        raise Mistake(f"{options.model} is captured already: --decoder takes a zoo name or module:factory, and captures it for any length")
    args, kwargs = model.example or (None, None)
    with progress() as tell:
        if options.decoder:
            return compile_decoder(model.model, passes, cleanups=not options.no_cleanups, progress=tell, **choices)
        return compile_model(
            model.model,
            passes,
            example_inputs=args,
            example_kwargs=kwargs,
            cleanups=not options.no_cleanups,
            trusted=options.trusted,
            progress=tell,
            **choices,
        )


def _writable(output: str | None) -> Path | None:
    if output is None:
        return None
    path = Path(output)
    if path.suffix != ".gw":
        raise Mistake(f"{path}: artifacts are called something.gw")
    if not path.parent.is_dir():
        raise Mistake(f"{path}: the folder {path.parent} does not exist")
    check_writable(path)
    return path


def _report_data(report: Any) -> Any:
    if isinstance(report, str):  # of an artifact: a paragraph
        return report
    verdict = None if report.verdict is None else {"kind": report.verdict.kind, "reason": report.verdict.reason}
    return {
        "pass": report.spelling,
        "contract": str(report.contract),
        "rewrites": len(report.records),
        "seconds": report.seconds,
        "lines": list(report.lines),
        "left": [{"what": left.what, "reason": left.reason, "where": left.where} for left in report.left],
        "verdict": verdict,
    }


def dump(options: argparse.Namespace) -> Result:
    manager = PassManager(pipeline_of(options) if options.passes is not None else ())
    model = load(options.model, options.trusted)
    with progress() as manager.progress:
        program = manager.run(program_of(model, options.trusted)).program
    if options.ops:
        return _operators(program)
    weights = [
        {"name": w.name, "kind": w.kind, "dtype": str(w.dtype).removeprefix("torch."), "shape": list(w.shape), "bytes": w.nbytes}
        for w in program.weights.values()
    ]
    if not options.weights:
        return Result(str(program), {"program": str(program), "pipeline": program.pipeline, "weights": weights})
    rows = [[w["name"], w["kind"], w["dtype"], str(w["shape"]), f"{w['bytes']:,}"] for w in weights]
    total = f"{len(weights)} weights, {sum(w.nbytes for w in program.weights.values()):,} bytes"
    return Result(table(["weight", "kind", "dtype", "shape", "bytes"], rows) + total, {"pipeline": program.pipeline, "weights": weights})


def _operators(program: Program) -> Result:
    """How often each operator is called, in regions once; those that stayed ONNX by their own names, apart."""
    calls = [node for node in program.nodes() if node.op == "call_function"]
    opaque = Counter(str(node.kwargs["op"]) for node in calls if node.target is torch.ops.gw.onnx_node.default)
    counts = Counter(name_of(node.target) for node in calls if node.target is not torch.ops.gw.onnx_node.default)
    rows = [[name, str(count)] for name, count in counts.most_common()]
    text = table(["operator", "calls"], rows)
    if opaque:
        text += "\n" + table(["run by onnxruntime", "calls"], [[name, str(count)] for name, count in opaque.most_common()])
    return Result(text, {"pipeline": program.pipeline, "operators": dict(counts), "opaque": dict(opaque)})


def diff(options: argparse.Namespace) -> Result:
    a, b = (program_of(load(spec, options.trusted), options.trusted) for spec in (options.a, options.b))
    difference = compare(a, b)
    plain = difference.text()
    color = sys.stdout.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb" and not options.json
    data = {"equal": not plain, "summary": difference.summary.as_dict(), "diff": plain}
    return Result(difference.text(color=True) if color else plain, data, FOUND if plain else OK)


def verify(options: argparse.Namespace) -> Result:
    plot = plot_target(options.plot)
    pipeline = pipeline_of(options) if options.passes is not None or options.numeric or options.per_layer or plot else ()
    PassManager(pipeline)  # a wrong order is said before the work
    model = load(options.model, options.trusted)
    program = program_of(model, options.trusted)
    inputs = None
    if model.example is not None:
        inputs = Call(program, program.main, parameters_of(model.model.forward)).bind(*model.example)[0]
    try:
        verify_program(program)
        with progress() as tell:
            manager = PassManager(pipeline, verify="numeric" if options.numeric else "structure", inputs=inputs, progress=tell)
            result = manager.run(program)
    except GraphwrightError as error:
        if not isinstance(error, ContractError | VerifyError) and not isinstance(error.__cause__, VerifyError):
            raise
        notes = list(getattr(error, "__notes__", ()))
        return Result("\n".join([f"failed: {error}", *notes]), {"verdict": "failed", "reason": str(error), "notes": notes}, FOUND)
    unjudged = [each.spelling for each in result.reports if each.verdict is not None and each.verdict.kind != "right"]
    lines = ["program: structure right", *map(_verdict_line, result.reports)]
    judged = any(each.verdict is not None and each.verdict.reason != UNCHANGED for each in result.reports)
    verdict, said, verified = "right", "", "verified"
    if options.numeric and not judged:
        advice = "" if options.passes else "; give --passes P, or a network as written (a zoo name or module:factory)"
        verified += f"; nothing was judged numerically, as no pass changed the program{advice}"
    data: dict[str, Any] = {"numeric": judged, "passes": [_report_data(each) for each in result.reports]}
    if options.per_layer or plot is not None:
        said, data["layers"], diverged = per_layer(options.model, program, result.program, inputs, plot)
        if diverged and result.contract in (Contract.EXACT, Contract.POLICY):
            verdict, verified = "diverges", "not verified: calls diverge (below)"
    if unjudged:
        verdict, verified = "inconclusive", f"not verified: inconclusive after {', '.join(unjudged)}"
    lines += [verified] + (["", said] if said else [])
    return Result("\n".join(lines), {"verdict": verdict, **data}, OK if verdict == "right" else FOUND)


def _verdict_line(report: PassReport) -> str:
    rewrites = f"{len(report.records)} rewrite{'' if len(report.records) == 1 else 's'}"
    verdict = "structure right" if report.verdict is None else f"structure right; contract {report.verdict}"
    if report.verdict is not None and report.records:
        verdict += f" (float64 error {report.verdict.rewrite_error:.1e})"
    return f"{report.spelling}: {report.contract}, {rewrites}, {verdict}"


def pipeline_of(options: argparse.Namespace) -> tuple[Pass, ...]:
    asked = parsed(options.passes)
    return asked if options.no_cleanups else parse_pipeline([*CLEANUPS, *asked])


def parsed(pipeline: str | None) -> tuple[Pass, ...]:
    with users_code():
        return parse_pipeline(pipeline or "")
