"""What commands return and raise, and how long ones show where they are."""

import contextlib
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

OK, FOUND, MISTAKE = 0, 1, 2


@dataclass(frozen=True)
class Result:
    """What a command has to say: `text` for people, `data` for programs, and the exit code."""

    text: str
    data: dict[str, Any]
    code: int = OK


class Mistake(Exception):
    """A user's mistake: said in one line."""


@contextlib.contextmanager
def progress() -> Iterator[Callable[[int, int, str], None] | None]:
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


def table(header: list[str], rows: list[list[str]]) -> str:
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]
    return "".join("  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() + "\n" for row in [header, *rows])
