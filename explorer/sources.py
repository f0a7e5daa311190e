"""The user's source behind a program: the text around the lines that its operations came from.

A file is known by its name from the root of its package, as `ir/where.py` writes it, and is looked for among the modules that this
process has imported, nowhere else: a program read from a file cannot name a path to be opened.
"""

import linecache
import sys
from collections.abc import Iterable, Sequence
from typing import Any

from ..ir.program import Where
from ..ir.where import relative_file

_AROUND = 6  # lines before and after one that is referred to


def sources(wheres: Sequence[Where]) -> dict[str, list[dict[str, Any]]]:
    """file -> runs of its lines, each `{"first": number of its first line, "lines": [text]}`; files that are not found are left out."""
    wanted: dict[str, set[int]] = {}
    for where in wheres:
        if where.file and where.line > 0:
            wanted.setdefault(where.file, set()).add(where.line)
    paths = _paths(wanted)
    found = {}
    for file, numbers in sorted(wanted.items()):
        runs = _runs(linecache.getlines(paths[file]), numbers) if file in paths else []
        if runs:
            found[file] = runs
    return found


def _paths(wanted: Iterable[str]) -> dict[str, str]:
    """Which imported module's file each name stands for."""
    names = set(wanted)
    endings = {name.rpartition("/")[2] for name in names}
    found: dict[str, str] = {}
    for module in list(sys.modules.values()):
        path = getattr(module, "__file__", None)
        if not isinstance(path, str) or not path.endswith(".py") or path.replace("\\", "/").rpartition("/")[2] not in endings:
            continue
        name = relative_file(path)
        if name in names:
            found.setdefault(name, path)
    return found


def _runs(lines: Sequence[str], numbers: Iterable[int]) -> list[dict[str, Any]]:
    """The lines around `numbers`, runs that touch as one."""
    runs: list[list[int]] = []
    for number in sorted(number for number in numbers if number <= len(lines)):
        first, last = max(number - _AROUND, 1), min(number + _AROUND, len(lines))
        if runs and first <= runs[-1][1] + 1:
            runs[-1][1] = max(runs[-1][1], last)
        else:
            runs.append([first, last])
    return [{"first": first, "lines": [line.rstrip("\n") for line in lines[first - 1 : last]]} for first, last in runs]
