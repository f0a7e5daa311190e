"""What changed between two programs: lines paired by where they came from, so that renumbering is not a change."""

import difflib
import re

from .errors import InputError
from .printer import print_program
from .program import Program

_VALUE = re.compile(r"%\d+\b")
_ORIGIN = re.compile(r"  # \[([\d,]+)\]")
_COLORS = {"-": "\x1b[31m", "+": "\x1b[32m", "@": "\x1b[36m"}


def diff(a: Program, b: Program, *, color: bool = False, context: int = 2) -> str:
    """The unified difference of two programs' texts; empty when they are equal.

    Values are compared by the captured operations that they descend from, not by number: an inserted line does not mark every
    line below it as changed. Lines are shown as each program prints them.

    Raises:
        InputError: one of them is no Program.
    """
    for given in (a, b):
        if not isinstance(given, Program):
            raise InputError(f"diff compares two programs, such as compiled.program, not a {type(given).__name__}")
    before, after = print_program(a).splitlines(), print_program(b).splitlines()
    groups = difflib.SequenceMatcher(None, _keys(before), _keys(after), autojunk=False).get_grouped_opcodes(context)
    lines: list[str] = []
    for group in groups:
        first, last = group[0], group[-1]
        lines.append(f"@@ -{first[1] + 1},{last[2] - first[1]} +{first[3] + 1},{last[4] - first[3]} @@")
        for tag, i1, i2, j1, j2 in group:
            if tag == "equal":
                lines += [f"  {line}" for line in after[j1:j2]]
                continue
            lines += [f"- {line}" for line in before[i1:i2]]
            lines += [f"+ {line}" for line in after[j1:j2]]
    if color:
        lines = [f"{_COLORS[line[0]]}{line}\x1b[0m" if line[0] in _COLORS else line for line in lines]
    return "\n".join(lines) + ("\n" if lines else "")


def _keys(lines: list[str]) -> list[str]:
    """Each line with its values named by provenance: `%12` becomes the origin of the line that defines it."""
    names: dict[str, str] = {}
    seen: dict[str, int] = {}
    keys = []
    for line in lines:
        match = re.match(r"\s*(%\d+) = ", line)
        if match:
            origin = _ORIGIN.search(line)
            label = f"<{origin.group(1)}>" if origin else "<new>"
            seen[label] = seen.get(label, 0) + 1
            names[match.group(1)] = f"{label}#{seen[label]}"
        keys.append(_VALUE.sub(lambda m: names.get(m.group(), "<input>"), line))
    return keys
