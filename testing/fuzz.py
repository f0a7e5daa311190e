"""Fuzzes the compiler: random programs under random pipelines, judged by the verdict rule.

    python -m graphwright.testing.fuzz --programs 10000 --seed 1 [--jobs 2] [--out DIR] [--require 50] [--only N]

A trial is named by (seed, number) and is the same on every machine. DIR gets results.jsonl, a line for each trial, and a folder for each
failure, which runs alone; a run that is started again goes on where it was. With --require a run also fails where a rule fired or was
refused less often. Source: specs/trust.md, sections 2 and 3.
"""

import argparse
import json
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from ..ir.errors import ArtifactError, GraphwrightError, InputError
from .cases import save_case
from .coverage import rule_counts, untested
from .ops import makers_of
from .trials import Record, make_trial, run_trial

FAILING = ("wrong", "unstable", "crashed", "timeout")
_SETTINGS = "settings.json"
_MOST_REASONS = 8  # of one rule


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs what the command line asks for; 1 when a trial fails, or a rule was tested less often than required, 2 for a mistake in what
    was asked for, 130 when it was stopped."""
    options = _parser().parse_args(arguments)
    try:
        return _run(options)
    except (GraphwrightError, OSError) as error:  # an OSError names the file
        print(f"fuzz: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"fuzz: stopped; what is in {options.out} stays, and the same command goes on from there", file=sys.stderr)
        return 130


def _run(options: argparse.Namespace) -> int:
    families = tuple(options.ops.split(",")) if options.ops else None
    makers_of(families)  # what is none of ours is no crash of each trial
    for name, least in (("programs", 0), ("jobs", 1), ("max_nodes", 1), ("only", 0)):
        given = getattr(options, name)
        if given is not None and given < least:
            raise InputError(f"--{name.replace('_', '-')} is {given}, but must be at least {least}")
    if options.only is not None:
        return _show_one(options.seed, options.only, options.max_nodes, families)
    out = Path(options.out)
    settings = {"seed": options.seed, "max_nodes": options.max_nodes, "ops": options.ops}
    _check_settings(out, settings)
    records = fuzz(options.seed, options.programs, out, jobs=options.jobs, max_nodes=options.max_nodes, families=families)
    console = Console()
    console.print(*summary(records))
    missing = untested(rule_counts(records), options.require)
    for each in missing:
        console.print(f"{each.rule} fired {each.fired} and was refused {each.refused} times, and each is to be {options.require} at least")
    return int(bool(missing) or any(record.kind in FAILING for record in records))


def fuzz(seed: int, programs: int, out: Path, *, jobs: int = 1, max_nodes: int = 12, families: Sequence[str] | None = None) -> list[Record]:
    """The records of trials 0 to `programs`; those in `out` are not run again, and new ones are written there as they come."""
    out.mkdir(parents=True, exist_ok=True)
    results = out / "results.jsonl"
    known = {record.number: record for record in _read(results)}
    numbers = [number for number in range(programs) if number not in known]
    with results.open("a") as file, _progress() as bar:
        task = bar.add_task(_counts(known.values()), total=programs, completed=programs - len(numbers))
        for record in _run_all(seed, numbers, jobs, max_nodes, families):
            file.write(json.dumps(record.as_json()) + "\n")
            file.flush()
            known[record.number] = record
            if record.kind in FAILING:
                _save(out, seed, record, max_nodes, families)
            bar.update(task, advance=1, description=_counts(known.values()))
    return [known[number] for number in sorted(known) if number < programs]


def _run_all(seed: int, numbers: Sequence[int], jobs: int, max_nodes: int, families: Sequence[str] | None) -> Iterator[Record]:
    """The records as they come, from `jobs` processes. What ends its process is found by running alone what was under way."""
    left = list(reversed(numbers))
    suspects: list[int] = []
    while left or suspects:
        alone, suspects = suspects, []
        for number in alone:
            records = list(_run_in_pool(seed, [number], 1, max_nodes, families, lost=[]))
            yield records[0] if records else Record(number, "crashed", "it ended its process")
        yield from _run_in_pool(seed, left, jobs, max_nodes, families, suspects)


def _run_in_pool(
    seed: int, left: list[int], jobs: int, max_nodes: int, families: Sequence[str] | None, lost: list[int]
) -> Iterator[Record]:
    """Runs the numbers of `left` from its end, taking them away; those under way when a process ended go to `lost`."""
    under_way: dict[Future[Record], int] = {}
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn"), initializer=_start_worker) as pool:
        try:
            while left or under_way:
                while left and len(under_way) < 2 * jobs:
                    number = left.pop()
                    under_way[pool.submit(run_trial, seed, number, max_nodes=max_nodes, families=families)] = number
                for done in wait(under_way, return_when=FIRST_COMPLETED).done:
                    record = done.result()
                    del under_way[done]
                    yield record
        except BrokenProcessPool:
            lost += under_way.values()
        except KeyboardInterrupt:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _start_worker() -> None:
    torch.set_num_threads(1)  # tensors of a few elements: threads only get in each other's way


def _read(results: Path) -> Iterator[Record]:
    """The records of a file whose last line may be cut off.

    Raises:
        ArtifactError: another line is none of a run.
    """
    lines = results.read_text().splitlines(keepends=True) if results.exists() else []
    for number, line in enumerate(lines, 1):
        try:
            yield Record(**json.loads(line))
        except (ValueError, TypeError) as error:
            if number == len(lines) and not line.endswith("\n"):
                results.write_text("".join(lines[:-1]))
                return
            raise ArtifactError(f"{results}:{number} is no record of a fuzzing run: give another --out") from error


def _check_settings(out: Path, settings: dict[str, Any]) -> None:
    """A folder holds one run.

    Raises:
        InputError: it holds another.
    """
    file = out / _SETTINGS
    if not file.exists():
        out.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(settings) + "\n")
    elif (found := file.read_text().strip()) != json.dumps(settings):
        raise InputError(f"{out} holds a run with {found[:200]}: give another --out, or the same settings to go on")


def _save(out: Path, seed: int, record: Record, max_nodes: int, families: Sequence[str] | None) -> None:
    try:
        case = make_trial(seed, record.number, max_nodes=max_nodes, families=families).case(record.reason)
    except Exception:  # the trial itself could not be made; its number reproduces that
        return
    save_case(out / f"failure-{record.number}", case, record.kind)


def _show_one(seed: int, number: int, max_nodes: int, families: Sequence[str] | None) -> int:
    torch.set_num_threads(1)
    trial = make_trial(seed, number, max_nodes=max_nodes, families=families)
    print(trial.program)
    record = run_trial(seed, number, max_nodes=max_nodes, families=families)
    print(json.dumps(record.as_json(), indent=1))
    return int(record.kind in FAILING)


# --- what is shown ---


def summary(records: Iterable[Record]) -> list[Table]:
    """Tables of verdicts, of rules by how often they fired and were refused, and of what was left alone and why."""
    records = list(records)
    calls = sum(record.calls for record in records)
    verdicts = Table(title=f"{len(records)} trials, {calls} calls", title_justify="left")
    verdicts.add_column("verdict")
    verdicts.add_column("trials", justify="right")
    for kind, count in Counter(record.kind for record in records).most_common():
        verdicts.add_row(kind, str(count))
    left: Counter[str] = Counter()
    for record in records:
        left.update(record.left)
    return [verdicts, _rules(records), _reasons(left)]


def _rules(records: Sequence[Record]) -> Table:
    table = Table(title="rules", title_justify="left")
    table.add_column("pass and rule", no_wrap=True)
    table.add_column("fired", justify="right")
    table.add_column("refused", justify="right")
    counts = sorted(rule_counts(records), key=lambda each: -each.fired)
    for each in counts:
        table.add_row(each.rule, str(each.fired), str(each.refused))
    if any(not each.least for each in counts):
        table.caption = "A rule at zero was not tested."
    return table


def _reasons(counts: Counter[str]) -> Table:
    """The commonest reasons of each rule."""
    table = Table(title="left alone", title_justify="left")
    table.add_column("pass, rule where it has several, and reason")
    table.add_column("times", justify="right")
    by_rule: dict[str, list[tuple[str, int]]] = {}
    for name, count in counts.most_common():
        by_rule.setdefault(name.partition(": ")[0], []).append((name, count))
    for rule, rows in by_rule.items():
        for name, count in rows[:_MOST_REASONS]:
            table.add_row(name, str(count))
        if len(rows) > _MOST_REASONS:
            table.add_row(f"{rule}: {len(rows) - _MOST_REASONS} other reasons", str(sum(count for _, count in rows[_MOST_REASONS:])))
    return table


def _counts(records: Iterable[Record]) -> str:
    return ", ".join(f"{count} {kind}" for kind, count in Counter(record.kind for record in records).most_common())


def _progress() -> Progress:
    """A bar on a terminal, nothing in a pipe."""
    return Progress(console=Console(stderr=True), disable=not sys.stderr.isatty())


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m graphwright.testing.fuzz", description="Random programs under random exact pipelines.")
    parser.add_argument("--programs", type=int, default=500, help="how many trials (default 500)")
    parser.add_argument("--seed", type=int, default=0, help="names the run; trial N of a seed is the same on every machine")
    parser.add_argument("--jobs", type=int, default=1, help="processes")
    parser.add_argument("--out", default="out/fuzz", help="folder of results and failures; a run that is in it goes on (default out/fuzz)")
    parser.add_argument("--require", type=int, default=0, metavar="N", help="fail where a rule fired or was refused less than N times")
    parser.add_argument("--only", type=int, metavar="N", help="runs trial N alone and shows it")
    parser.add_argument("--max-nodes", type=int, default=12, help="about how many calls a program has at most (default 12)")
    parser.add_argument("--ops", default="", help="families of operations, with commas between them (default all)")
    return parser


if __name__ == "__main__":
    sys.exit(main())
