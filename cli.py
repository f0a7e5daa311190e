"""The `graphwright` command: reads arguments, calls the compiler, prints text or one JSON object.

A command returns a `Result` and prints nothing itself, so `--json`, pipes and exit codes are handled in one place, `main`.
"""

import argparse
import contextlib
import difflib
import importlib
import io
import json
import logging
import os
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

if TYPE_CHECKING:
    from .ir import Program
    from .passes import Pass, PassReport

OK, FOUND, MISTAKE = 0, 1, 2
SUFFIXES = (".gw", ".pt2", ".txt")
BARS = " ▁▂▃▄▅▆▇█"

EPILOG = """\
MODEL is one of
  unet.gw               an artifact that graphwright wrote
  unet.pt2              a torch.export file; it can run code when it is read, so it needs --trusted
  unet.txt              a program as `graphwright dump` prints it (dump, diff and verify only)
  video_unet:tiny       a network of the zoo and its size (small when left out)
  package.module:make   a function of yours, looked for in the current folder too, that returns (module, args) or
                        (module, args, kwargs); it runs

exit codes
  0  done; nothing was found
  1  diff found a difference, or verify could not confirm the program
  2  a mistake in what was asked: one line on stderr says which
"""


@dataclass(frozen=True)
class Result:
    """What a command has to say: `text` for people, `data` for programs, and the exit code."""

    text: str
    data: dict[str, Any]
    code: int = OK


@dataclass(frozen=True)
class Model:
    """What MODEL names, as `compile` takes it, with example inputs where it brings some."""

    model: Any
    example: tuple[tuple[Any, ...], dict[str, Any]] | None = None


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; returns its exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # torch's profiler, which measures memory, writes its own log to stderr
    as_json = "--json" in arguments
    try:
        options = _parser().parse_args(arguments)
        with _quiet_libraries():
            result = _run(options)
    except _Mistake as mistake:
        return _complain(mistake, as_json)
    except KeyboardInterrupt:
        return 130
    return _print(json.dumps(result.data) if as_json else result.text, result.code)


class _Mistake(Exception):
    """A user's mistake: said in one line."""


@contextlib.contextmanager
def _quiet_libraries() -> Iterator[None]:
    """torch logs, warns and prints graphs on stderr while it captures; what matters of that is in our errors."""
    disabled = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)


def _run(options: argparse.Namespace) -> Result:
    from .ir.errors import GraphwrightError

    try:
        return options.command(options)
    except GraphwrightError as error:
        raise _Mistake(str(error)) from error
    except OSError as error:
        raise _Mistake(f"{error.filename or 'a file'}: {error.strerror or error}") from error


def _complain(mistake: _Mistake, as_json: bool) -> int:
    line = " ".join(str(mistake).split())
    print(f"graphwright: {line}", file=sys.stderr)
    if not as_json:
        return MISTAKE
    cause = mistake.__cause__
    notes = list(getattr(cause, "__notes__", ()))
    return _print(json.dumps({"error": {"type": _documented(cause), "message": str(mistake), "notes": notes}}), MISTAKE)


def _documented(error: BaseException | None) -> str:
    """The class of `ir.errors` that `error` is of; their base for a mistake in the command line."""
    from .ir import errors

    return next((kind.__name__ for kind in type(error).__mro__ if kind.__module__ == errors.__name__), "GraphwrightError")


def _print(text: str, code: int) -> int:
    """Prints `text`; a reader that went away early (`| head`) is no error."""
    try:
        if isinstance(sys.stdout.encoding, str) and sys.stdout.encoding.lower() not in ("utf-8", "utf8"):
            sys.stdout.reconfigure(errors="replace")  # type: ignore[union-attr]
        sys.stdout.write(text if text.endswith("\n") or not text else text + "\n")
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return code


# --- arguments -------------------------------------------------------------------------------------------------------------


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise _Mistake(f"{message} (see {self.prog} --help)")


def _parser() -> argparse.ArgumentParser:
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--json", action="store_true", help="print one JSON object instead of text")
    model = argparse.ArgumentParser(add_help=False, parents=[common])
    model.add_argument("model", metavar="MODEL", help="what to read; see below")
    model.add_argument("--trusted", action="store_true", help="read .pt2 files, which can run code")
    passes = argparse.ArgumentParser(add_help=False)
    passes.add_argument("--passes", metavar="P", help="a pipeline, such as slice-groups{memory_budget=25%%}, after the exact clean-ups")
    passes.add_argument("--no-cleanups", action="store_true", help="run the passes of P alone")

    parser = _Parser(prog="graphwright", description="Compiles PyTorch models by passes that say what they do to the numbers.")
    _finish(parser)
    commands = parser.add_subparsers(dest="name", metavar="COMMAND", required=True)

    def add(
        name: str, command: Callable[[argparse.Namespace], Result], about: str, *parents: argparse.ArgumentParser
    ) -> argparse.ArgumentParser:
        added = commands.add_parser(name, parents=list(parents), help=about, description=about[0].upper() + about[1:] + ".")
        _finish(added)
        added.set_defaults(command=command)
        return added

    compiling = add("compile", _compile, "compile a model, print the report, write an artifact", model, passes)
    compiling.add_argument("-o", "--output", metavar="FILE.gw", help="the artifact to write")
    compiling.add_argument("--backend", default="auto", help="auto, aten or inductor (default: auto)")
    compiling.add_argument("--numeric", action="store_true", help="hold each pass to its contract on the example inputs")
    dumping = add("dump", _dump, "print a program as text, as captured or after passes", model, passes)
    dumping.add_argument("--weights", action="store_true", help="print the table of its weights instead")
    differing = add("diff", _diff, "print what differs between two programs, paired by where operations came from", common)
    differing.add_argument("a", metavar="A")
    differing.add_argument("b", metavar="B")
    differing.add_argument("--trusted", action="store_true", help="read .pt2 files, which can run code")
    verifying = add("verify", _verify, "check a program, and what passes make of it", model, passes)
    verifying.add_argument("--numeric", action="store_true", help="hold each pass to its contract on inputs")
    add("passes", _passes, "list the passes with contracts and options", common)
    demo = add("demo", _demo, "lower the memory of a small video network and measure it", common)
    demo.add_argument("--quick", action="store_true", help="the tiny network: seconds instead of minutes")
    demo.add_argument("--save", metavar="DIR", help="also write the program (demo.txt) and the report (report.txt) there")
    return parser


def _finish(parser: argparse.ArgumentParser) -> None:
    parser.epilog = EPILOG
    parser.formatter_class = argparse.RawDescriptionHelpFormatter


# --- models ----------------------------------------------------------------------------------------------------------------


def _load(spec: str, trusted: bool) -> Model:
    """The model that `spec` names. Files other than program texts are left to `compile`, which reads them."""
    from . import models

    path = Path(spec)
    if path.suffix in SUFFIXES or (path.exists() and not path.is_dir()):
        return _load_file(path, trusted)
    name, colon, rest = spec.partition(":")
    if name in models.names():
        module, args, kwargs = models.load(name, rest if colon else "small")
        return Model(module, (args, kwargs))
    if colon:
        return _load_factory(name, rest)
    near = difflib.get_close_matches(spec, models.names(), n=2)
    advice = f"did you mean {' or '.join(near)}?" if near else f"the zoo has {', '.join(models.names())}"
    raise _Mistake(f"{spec} is no file, no zoo name and no module:factory: {advice}")


def _load_file(path: Path, trusted: bool) -> Model:
    from .ir import parse

    if not path.exists():
        raise _Mistake(f"{path} does not exist")
    if path.suffix == ".pt2" and not trusted:
        raise _Mistake(f"{path} can run code when it is read: add --trusted if you made it")
    if path.suffix != ".txt":
        return Model(path)
    try:
        return Model(parse(path.read_text(encoding="utf-8")))
    except UnicodeDecodeError as error:
        raise _Mistake(f"{path} is not text in UTF-8 (byte {error.start})") from error


def _load_factory(module_name: str, attribute: str) -> Model:
    from torch import nn

    spec = f"{module_name}:{attribute}"
    with _users_code():
        try:
            made = getattr(importlib.import_module(module_name), attribute)()
        except ModuleNotFoundError as error:
            raise _Mistake(f"{spec}: no module is called {error.name} (the zoo's names and the current folder were searched)") from error
        except (Exception, SystemExit) as error:
            raise _Mistake(f"{spec}: {type(error).__name__}: {error}") from error
    module, args, kwargs = (*made, {})[:3] if isinstance(made, tuple) and len(made) in (2, 3) else (None, None, None)
    if not (isinstance(module, nn.Module) and isinstance(args, tuple) and isinstance(kwargs, dict)):
        raise _Mistake(f"{spec} must return (module, args) or (module, args, kwargs), with args a tuple and kwargs a dict")
    return Model(module, (args, kwargs))


@contextlib.contextmanager
def _users_code() -> Iterator[None]:
    """The current folder can be imported from, and what is printed does not mix with our output."""
    sys.path.insert(0, os.getcwd())
    try:
        with contextlib.redirect_stdout(sys.__stderr__), contextlib.redirect_stderr(sys.__stderr__):
            yield
    finally:
        sys.path.remove(os.getcwd())


def _program(model: Model, trusted: bool) -> "Program":
    """The program as it stands: captured, or as the file has it."""
    from .compiler import compile as compile_model
    from .ir import Program, capture

    if isinstance(model.model, Program):
        return model.model
    if model.example is not None:
        return capture(model.model, *model.example)
    return compile_model(model.model, cleanups=False, trusted=trusted, backend="aten").program


def _pipeline(options: argparse.Namespace) -> tuple["Pass", ...]:
    from .passes import CLEANUPS, parse_pipeline

    asked = parse_pipeline(options.passes or "")
    return asked if options.no_cleanups else parse_pipeline([*CLEANUPS, *asked])


@contextlib.contextmanager
def _progress() -> Iterator[Callable[[int, int, str], None] | None]:
    """A callback that moves a bar on a terminal's stderr; None elsewhere."""
    terminal = sys.__stderr__  # sys.stderr itself is silenced while a command runs
    if terminal is None or not terminal.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(file=terminal), transient=True) as bar:
        task = bar.add_task("reading", total=None)
        yield lambda done, total, name: bar.update(task, completed=done, total=total, description=name or "done")


# --- commands --------------------------------------------------------------------------------------------------------------


def _compile(options: argparse.Namespace) -> Result:
    from .compiler import compile as compile_model
    from .ir import Program
    from .passes import parse_pipeline
    from .runtime.backend import choose_backend

    choose_backend(options.backend)  # a wrong one is said before the work
    output = _writable(options.output)
    parse_pipeline(options.passes or "")
    model = _load(options.model, options.trusted)
    if isinstance(model.model, Program) and options.model.endswith(".txt"):
        raise _Mistake(f"{options.model} has no weights: compile takes a .gw or .pt2 file, a zoo name or module:factory")
    args, kwargs = model.example or (None, None)
    with _progress() as progress:
        compiled = compile_model(
            model.model,
            options.passes or "",
            example_inputs=args,
            example_kwargs=kwargs,
            backend=options.backend,
            verify="numeric" if options.numeric else "structure",
            cleanups=not options.no_cleanups,
            trusted=options.trusted,
            progress=progress,
        )
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


def _writable(output: str | None) -> Path | None:
    if output is None:
        return None
    path = Path(output)
    if path.suffix != ".gw":
        raise _Mistake(f"{path}: artifacts are called something.gw")
    if not path.parent.is_dir():
        raise _Mistake(f"{path}: the folder {path.parent} does not exist")
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


def _dump(options: argparse.Namespace) -> Result:
    from .passes import PassManager

    manager = PassManager(_pipeline(options) if options.passes is not None else ())
    model = _load(options.model, options.trusted)
    with _progress() as manager.progress:
        program = manager.run(_program(model, options.trusted)).program
    weights = [
        {"name": w.name, "kind": w.kind, "dtype": str(w.dtype).removeprefix("torch."), "shape": list(w.shape), "bytes": w.nbytes}
        for w in program.weights.values()
    ]
    if not options.weights:
        return Result(str(program), {"program": str(program), "pipeline": program.pipeline, "weights": weights})
    rows = [[w["name"], w["kind"], w["dtype"], str(w["shape"]), f"{w['bytes']:,}"] for w in weights]
    total = f"{len(weights)} weights, {sum(w.nbytes for w in program.weights.values()):,} bytes"
    return Result(_table(["weight", "kind", "dtype", "shape", "bytes"], rows) + total, {"pipeline": program.pipeline, "weights": weights})


def _diff(options: argparse.Namespace) -> Result:
    from .ir.diff import diff

    a, b = (_program(_load(spec, options.trusted), options.trusted) for spec in (options.a, options.b))
    plain = diff(a, b)
    color = sys.stdout.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb" and not options.json
    return Result(diff(a, b, color=True) if color else plain, {"equal": not plain, "diff": plain}, FOUND if plain else OK)


def _verify(options: argparse.Namespace) -> Result:
    from .ir import verify
    from .ir.errors import ContractError, GraphwrightError, VerifyError
    from .passes import PassManager
    from .passes.manager import UNCHANGED
    from .runtime.calling import Call, parameters_of

    pipeline = _pipeline(options) if options.passes is not None or options.numeric else ()
    PassManager(pipeline)  # a wrong order is said before the work
    model = _load(options.model, options.trusted)
    program = _program(model, options.trusted)
    inputs = None
    if model.example is not None:
        inputs = Call(program, program.main, parameters_of(model.model.forward)).bind(*model.example)[0]
    try:
        verify(program)
        with _progress() as progress:
            manager = PassManager(pipeline, verify="numeric" if options.numeric else "structure", inputs=inputs, progress=progress)
            result = manager.run(program)
    except GraphwrightError as error:
        if not isinstance(error, ContractError | VerifyError) and not isinstance(error.__cause__, VerifyError):
            raise
        notes = list(getattr(error, "__notes__", ()))
        return Result("\n".join([f"failed: {error}", *notes]), {"verdict": "failed", "reason": str(error), "notes": notes}, FOUND)
    unjudged = [each.spelling for each in result.reports if each.verdict is not None and each.verdict.kind != "right"]
    lines = ["program: structure right", *map(_verdict_line, result.reports)]
    judged = any(each.verdict is not None and each.verdict.reason != UNCHANGED for each in result.reports)
    verified = "verified" if judged or not options.numeric else "verified; nothing was judged numerically, as no pass changed the program"
    lines.append(f"not verified: inconclusive after {', '.join(unjudged)}" if unjudged else verified)
    data = {
        "verdict": "inconclusive" if unjudged else "right",
        "numeric": judged,
        "passes": [_report_data(each) for each in result.reports],
    }
    return Result("\n".join(lines), data, FOUND if unjudged else OK)


def _verdict_line(report: "PassReport") -> str:
    rewrites = f"{len(report.records)} rewrite{'' if len(report.records) == 1 else 's'}"
    verdict = "structure right" if report.verdict is None else f"structure right; contract {report.verdict}"
    if report.verdict is not None and report.records:
        verdict += f" (float64 error {report.verdict.rewrite_error:.1e})"
    return f"{report.spelling}: {report.contract}, {rewrites}, {verdict}"


def _passes(options: argparse.Namespace) -> Result:
    from .passes import CLEANUPS, all_passes
    from .passes.options import spell_value

    cleanups = {each.name for each in CLEANUPS}
    found: list[dict[str, Any]] = []
    for name, kind in all_passes().items():
        spelled = [f for f in fields(kind) if f.metadata.get("spelled", True)]
        listed = [{"name": f.name, "default": spell_value(f.default), "legal": f.metadata.get("legal", "")} for f in spelled]
        about = next(iter((kind.__doc__ or "").strip().splitlines()), "")
        found.append({"name": name, "contract": str(kind().contract), "cleanup": name in cleanups, "about": about, "options": listed})
    rows = []
    for each in found:
        shown = [f"{o['name']}={o['default']}  ({o['legal']})" for o in each["options"]] or [
            "exact clean-up, on by default" if each["cleanup"] else ""
        ]
        rows += [[each["name"] if i == 0 else "", each["contract"] if i == 0 else "", line] for i, line in enumerate(shown)]
    return Result(_table(["pass", "contract", "options with their defaults"], rows), {"passes": found})


def _table(header: list[str], rows: list[list[str]]) -> str:
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]
    return "".join("  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() + "\n" for row in [header, *rows])


# --- the demo --------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Side:
    """One of the two contestants: measured peak, median time, and the predicted curve of live bytes."""

    peak_bytes: int
    seconds: float
    live: list[int] = field(repr=False)
    held: list[str]


def _demo(options: argparse.Namespace) -> Result:
    import torch

    from .compiler import compile as compile_model
    from .ir.liveness import mib
    from .models import load
    from .passes import SliceGroups

    folder = None if options.save is None else Path(options.save)
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
    size = "tiny" if options.quick else "small"
    module, args, kwargs = load("video_unet", size)
    start = time.perf_counter()
    with _progress() as progress:
        passes = [SliceGroups(memory_budget="25%")]
        compiled = compile_model(module, passes, example_inputs=args, example_kwargs=kwargs, backend="aten", progress=progress)
        seconds = time.perf_counter() - start
        before, after, error = _compare(lambda: module(*args, **kwargs), lambda: compiled(*args, **kwargs), compiled, progress)
    left = [f"{each.what}, {each.reason}" for each in compiled.report().passes[-1].left]
    threads = torch.get_num_threads()
    head = f"video_unet, {size}, float32, torch {torch.__version__}, CPU with {os.cpu_count()} cores ({threads} threads), backend aten"
    top = max(before.live)
    peak_ratio, time_ratio = after.peak_bytes / before.peak_bytes, after.seconds / before.seconds
    lines = [
        head,
        f"slice-groups{{memory_budget=25%}}, contract exact; compiled in {seconds:.1f} s",
        "",
        f"  peak memory of a call   {mib(before.peak_bytes):>10} eager   {mib(after.peak_bytes):>10} compiled   {peak_ratio:.2f} x",
        f"  time of a call          {before.seconds:>8.2f} s eager   {after.seconds:>8.2f} s compiled   {time_ratio:.2f} x",
        f"  largest difference      {error:.1e} of the largest output",
        "",
        f"bytes live at each call, as predicted; the top of both is {mib(top)}",
        *_curve("eager   ", before.live, top),
        *_curve("compiled", after.live, top),
        "",
        f"held at eager's peak ({mib(top)} predicted)",
        *(f"  {line}" for line in before.held),
        f"held at the compiled program's peak ({mib(max(after.live))} predicted)",
        *(f"  {line}" for line in after.held),
        *(["why these stay whole", *(f"  {line}" for line in left[:4])] if left else []),
    ]
    if folder is not None:
        (folder / "demo.txt").write_text(str(compiled.program), encoding="utf-8")
        (folder / "report.txt").write_text(str(compiled.report()), encoding="utf-8")
        lines += ["", f"wrote {folder / 'demo.txt'} and {folder / 'report.txt'}"]
    sides = {
        name: {"peak_bytes": s.peak_bytes, "seconds": s.seconds, "live": s.live, "held": s.held}
        for name, s in (("eager", before), ("compiled", after))
    }
    data = {
        "model": f"video_unet:{size}",
        "torch": torch.__version__,
        "threads": threads,
        "compile_seconds": seconds,
        "error": error,
        "left": left,
        **sides,
    }
    return Result("\n".join(lines), data)


def _compare(eager: Callable[[], Any], ours: Callable[[], Any], compiled: Any, progress: Any) -> tuple[_Side, _Side, float]:
    """Both sides measured in one process; times are medians of three calls, taken in turns after a call to warm up."""
    import torch

    from .ir.liveness import describe, profile
    from .runtime.memory import measure_peak

    contestants = (eager, ours)
    seconds: tuple[list[float], list[float]] = ([], [])
    tell = progress or (lambda done, total, name: None)
    with torch.no_grad():
        tell(0, 5, "comparing outputs")
        expected, got = (fn().double() for fn in contestants)
        tell(1, 5, "measuring memory")
        peaks = [measure_peak(fn).peak_bytes for fn in contestants]
        for turn in range(3):
            tell(2 + turn, 5, "measuring time")
            for fn, taken in zip(contestants, seconds):
                start = time.perf_counter()
                fn()
                taken.append(time.perf_counter() - start)
    error = float((expected - got).abs().max() / expected.abs().max())
    sides = []
    for peak, taken, program in zip(peaks, seconds, (compiled.history[0], compiled.program)):
        memory = profile(program.main)
        held = [describe(storage) for storage in memory.live_at(memory.peak_at)[:3]]
        sides.append(_Side(peak, statistics.median(taken), [int(n) for n in memory.live], held))
    return sides[0], sides[1], error


def _curve(label: str, live: Sequence[int], top: int, *, width: int = 72, height: int = 4) -> list[str]:
    """`live` as `height` lines of block characters, each column the largest of its calls; a full column is `top`."""
    columns = [max(live[len(live) * i // width : max(len(live) * (i + 1) // width, len(live) * i // width + 1)]) for i in range(width)]
    levels = [round(value / top * height * 8) for value in columns]
    rows = ["".join(BARS[min(max(level - 8 * row, 0), 8)] for level in levels) for row in reversed(range(height))]
    return [f"  {label if row == height - 1 else ' ' * len(label)} {text}".rstrip() for row, text in enumerate(rows)]


if __name__ == "__main__":
    sys.exit(main())
