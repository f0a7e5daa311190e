"""The command: plants every mistake, says what saw each and after how many programs, and what bisecting named.

    python -m graphwright.testing.mutants [NAME ...] [--jobs 2] [--seed 0] [--most 200] [--seconds 60] [--json FILE]

Exits with 1 where fewer than 95 of 100 mistakes that are any are caught, or bisecting names fewer of them than that.
"""

import argparse
import json
import statistics
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from ...ir.torch_log import silenced
from ...runtime.atomic import atomic_write, check_writable
from . import MUTANTS, Outcome, check

_SHARE = 0.95


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs what the command line asks for."""
    options = _parser().parse_args(arguments)
    known = {each.name: each for each in MUTANTS}
    unknown = sorted(set(options.names) - set(known))
    if unknown:
        print(f"there is no mutant {unknown[0]}; there are {', '.join(known)}", file=sys.stderr)
        return 2
    if options.json is not None:
        check_writable(Path(options.json))
    names = options.names or list(known)
    outcomes = {each.mutant.name: each for each in _shown(_checked(names, options), len(names))}
    ordered = [outcomes[name] for name in known if name in outcomes]
    if options.json is not None:
        with atomic_write(Path(options.json)) as file:
            file.write((json.dumps(as_json(ordered), indent=1) + "\n").encode())
    Console().print(*summary(ordered))
    figures = _figures(ordered)
    return int(figures["caught"] < _SHARE * figures["mistakes"] or figures["named"] < _SHARE * figures["in rewrites"])


def _checked(names: Sequence[str], options: argparse.Namespace) -> Iterator[Outcome]:
    with ProcessPoolExecutor(options.jobs, mp_context=get_context("spawn"), initializer=_start_worker) as pool:
        futures = [pool.submit(_one, name, options.seed, options.most, options.seconds) for name in names]
        for done in as_completed(futures):
            yield done.result()


def _one(name: str, seed: int, most: int, seconds: float) -> Outcome:
    mutant = next(each for each in MUTANTS if each.name == name)
    with silenced():
        return check(mutant, seed=seed, most=most, seconds=seconds)


def _start_worker() -> None:
    torch.set_num_threads(1)


def _shown(outcomes: Iterable[Outcome], total: int) -> Iterator[Outcome]:
    """The same, a bar on a terminal while they come, and a line for each that nothing saw."""
    console = Console(stderr=True)
    with Progress(console=console, disable=not sys.stderr.isatty()) as bar:
        task = bar.add_task("planted", total=total)
        for each in outcomes:
            bar.advance(task)
            if not each.caught and not each.mutant.equivalent:
                console.print(f"{each.mutant.name}: {_seen(each)}", markup=False, highlight=False, soft_wrap=True)
            yield each


def _seen(outcome: Outcome) -> str:
    if outcome.catcher:
        return f"seen by {outcome.catcher} after {outcome.trials}, not by {' or '.join(outcome.mutant.catchers)}: {outcome.said}"
    return f"survives {outcome.trials} subjects, of which {outcome.ran} ran it"


def summary(outcomes: Sequence[Outcome]) -> list[Table]:
    """What was planted, by group, and what saw it."""
    table = Table(title="planted mistakes", title_justify="left")
    for name in ("group", "planted", "equivalent", "caught", "survive", "median of subjects"):
        table.add_column(name, justify="left" if name == "group" else "right")
    for group in dict.fromkeys(each.mutant.group for each in outcomes):
        table.add_row(group, *_row([each for each in outcomes if each.mutant.group == group]))
    table.add_row("all", *_row(outcomes))
    catchers = Table(title="seen by", title_justify="left")
    catchers.add_column("what")
    catchers.add_column("mistakes", justify="right")
    for name, count in Counter(each.catcher for each in outcomes if each.caught).most_common():
        catchers.add_row(name, str(count))
    figures = _figures(outcomes)
    for what in ("in rewrites", "named", "median of calls"):
        catchers.add_row(f"bisected: {what}", str(figures[what]))
    return [table, catchers]


def _row(outcomes: Sequence[Outcome]) -> list[str]:
    figures = _figures(outcomes)
    return [str(figures[name]) for name in ("planted", "equivalent", "caught", "survive", "median of subjects")]


def _figures(outcomes: Sequence[Outcome]) -> dict[str, Any]:
    real = [each for each in outcomes if not each.mutant.equivalent]
    caught = [each for each in real if each.caught]
    named = [each.named for each in caught if each.named is not None]
    sizes = [each.calls for each in named if each.calls is not None]
    return {
        "planted": len(outcomes),
        "equivalent": len(outcomes) - len(real),
        "mistakes": len(real),
        "caught": len(caught),
        "survive": len(real) - len(caught),
        "median of subjects": statistics.median([each.trials for each in caught]) if caught else "",
        "in rewrites": len(named),
        "named": sum(each.rule and each.application for each in named),
        "median of calls": statistics.median(sizes) if sizes else "",
    }


def as_json(outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """The figures, and a record of each mistake."""
    return {"torch": torch.__version__, "figures": _figures(outcomes), "mutants": [_record(each) for each in outcomes]}


def _record(outcome: Outcome) -> dict[str, Any]:
    mutant, named = outcome.mutant, outcome.named
    return {
        "name": mutant.name,
        "group": mutant.group,
        "file": mutant.file,
        "expected": list(mutant.catchers),
        "equivalent": mutant.equivalent,
        "caught": outcome.caught,
        "by": outcome.catcher,
        "subjects": outcome.trials,
        "ran": outcome.ran,
        "seconds": round(outcome.seconds, 1),
        "said": outcome.said,
        "bisected": None if named is None else {"rule": named.rule, "application": named.application, "calls": named.calls},
    }


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m graphwright.testing.mutants", description="Plants mistakes in the compiler.")
    parser.add_argument("names", nargs="*", metavar="NAME", help="these alone (default all)")
    parser.add_argument("--jobs", type=int, default=1, help="processes")
    parser.add_argument("--seed", type=int, default=0, help="of the subjects")
    parser.add_argument("--most", type=int, default=200, help="subjects that one mistake is tried on at most (default 200)")
    parser.add_argument("--seconds", type=float, default=60.0, help="no new subjects after so many (default 60)")
    parser.add_argument("--json", metavar="FILE", help="write the figures and a record of each mistake there")
    return parser
