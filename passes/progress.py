"""How far a calibration is, as a bar with an estimate of the time left; nothing where no terminal shows it."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def progress_bar(description: str = "calibrating") -> Iterator[Callable[[int, int | None, float | None], None] | None]:
    """A callable for `collect(..., tell=...)` that moves a bar on stderr; None where that is no terminal."""
    if sys.stderr is None or not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("{task.fields[left]}"))
    with Progress(*columns, console=Console(file=sys.stderr), transient=True) as bar:
        task = bar.add_task(description, total=None, left="")
        yield lambda done, whole, left: bar.update(task, completed=done, total=whole, left=time_left(left))


def time_left(seconds: float | None) -> str:
    """`seconds` as people say them: "about 3 min left"."""
    if seconds is None:
        return ""
    for unit, length in (("h", 3600), ("min", 60)):
        if seconds >= 1.5 * length:
            return f"about {round(seconds / length)} {unit} left"
    return f"about {round(seconds)} s left"
