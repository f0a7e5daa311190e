"""What changed between two programs: lines paired by where they came from, so that renumbering is not a change."""

import re
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass

from .errors import InputError
from .pairing import Pairing, Text, is_plumbing, pair
from .printer import Line
from .program import Program, region_of
from .region_call import RegionCall

_COLORS = {"-": "\x1b[31m", "+": "\x1b[32m", ">": "\x1b[33m", "<": "\x1b[33m", "~": "\x1b[35m", "@": "\x1b[36m"}
_LEGEND = "(values in - lines and after `was` are numbered as in the first program, all others as in the second)"
_MANY_ORIGINS = re.compile(r"\[(\d+,\d+,\d+),[\d,]+\]")


def diff(a: Program, b: Program, *, color: bool = False, context: int = 2) -> str:
    """The difference of two programs' texts; empty when they are equal. See `Difference.text`.

    Raises:
        InputError: one of them is no Program.
    """
    return compare(a, b).text(color=color, context=context)


def compare(a: Program, b: Program) -> "Difference":
    """What `b` has otherwise than `a`.

    Raises:
        InputError: one of them is no Program.
    """
    for given in (a, b):
        if not isinstance(given, Program):
            raise InputError(f"diff compares two programs, such as compiled.program, not a {type(given).__name__}")
    return Difference(pair(a, b))


@dataclass(frozen=True)
class Summary:
    """How many calls and weights changed. A region itself and what picks its results are no calls here.

    `moved`: calls that stand in another region, or in one instead of none; `moved_out`: those that stood in a region and stand in
    none; `.._and_changed`: those of them that are otherwise changed too. `regions`: how many regions took calls in. `changed`: calls
    where they were, but with another operation, arguments, type or user line. `reordered`: the same calls, earlier or later.
    `other_lines`: what else differs, such as inputs, symbols, schedules, the pipeline and regions as such.
    """

    calls_before: int
    calls_after: int
    moved: int
    moved_and_changed: int
    moved_out: int
    moved_out_and_changed: int
    regions: int
    removed: int
    added: int
    changed: int
    reordered: int
    weights_removed: int
    weights_added: int
    weights_changed: int
    other_lines: int

    def as_dict(self) -> dict[str, int]:
        return asdict(self)

    def __str__(self) -> str:
        moved = f"{_calls(self.moved)} moved into {self.regions} region{'' if self.regions == 1 else 's'}" if self.moved else ""
        moved += f" ({self.moved_and_changed} of them changed)" if self.moved_and_changed else ""
        out = f"{_calls(self.moved_out)} moved out of regions" if self.moved_out else ""
        out += f" ({self.moved_out_and_changed} of them changed)" if self.moved_out_and_changed else ""
        counts = [(self.removed, "removed"), (self.added, "added"), (self.changed, "changed"), (self.reordered, "reordered")]
        done = [f"{count} {what}" for count, what in counts if count]
        if done and not (moved or out):
            done[0] = done[0].replace(" ", " call " if done[0].startswith("1 ") else " calls ", 1)
        weights = [(self.weights_removed, "removed"), (self.weights_added, "added"), (self.weights_changed, "changed")]
        tables = ", ".join(f"{count} {what}" for count, what in weights if count)
        parts = [", ".join(part for part in (moved, out, *done) if part), f"weights: {tables}" if tables else ""]
        text = "; ".join(part for part in parts if part)
        return text or f"no call or weight changed; {self.other_lines} other {'line differs' if self.other_lines == 1 else 'lines differ'}"


def _calls(count: int) -> str:
    return f"{count} call{'' if count == 1 else 's'}"


@dataclass(frozen=True)
class _Row:
    """One line of the difference: its marker, its text, and the lines of the two programs behind it (-1: none)."""

    marker: str
    text: str
    before: int = -1
    after: int = -1


class Difference:
    """Two programs side by side."""

    def __init__(self, pairing: Pairing):
        self.pairing = pairing
        self.reordered = _out_of_order(pairing)
        self.rows = list(self._rows())

    @property
    def summary(self) -> Summary:
        pairing, before, after = self.pairing, self.pairing.before, self.pairing.after
        taken, partner, changed = set(pairing.partner.values()), pairing.partner, pairing.changed
        mine, theirs = before.calls(), after.calls()
        kept = [j for j in theirs if j in partner]
        moved = [j for j in kept if pairing.moved(j)]
        within = [j for j in moved if after.lines[j].region is not None]
        weights = (
            [i for i, line in enumerate(before.lines) if line.kind == "weight"],
            [j for j, line in enumerate(after.lines) if line.kind == "weight"],
        )
        return Summary(
            calls_before=len(mine),
            calls_after=len(theirs),
            moved=len(within),
            moved_and_changed=sum(j in changed for j in within),
            moved_out=len(moved) - len(within),
            moved_out_and_changed=sum(j in changed for j in moved) - sum(j in changed for j in within),
            regions=len({after.lines[j].region for j in within}),
            removed=sum(i not in taken for i in mine),
            added=len(theirs) - len(kept),
            changed=sum(j in changed and not pairing.moved(j) for j in kept),
            reordered=sum(j in self.reordered for j in kept),
            weights_removed=sum(i not in taken for i in weights[0]),
            weights_added=sum(j not in partner for j in weights[1]),
            weights_changed=sum(j in changed for j in weights[1]),
            other_lines=sum(row.marker != " " and self._is_other(row) for row in self.rows),
        )

    def text(self, *, color: bool = False, context: int = 2) -> str:
        """A summary, then the second program's lines around each change, with the first's where it had others.

        `-` removed, `+` added (a `-` and then a `+` of the same origin: changed), `>` the same call but now in a region, `<` no
        longer in one, `~` the same but earlier or later. Empty when the programs are equal.
        """
        hunks = self._hunks(context)
        if not hunks:
            return ""
        lines = [str(self.summary), _LEGEND]
        for hunk in hunks:
            lines.append(self._header(hunk))
            lines += [f"{row.marker} {row.text}" for row in hunk]
        if color:
            lines = [f"{_COLORS[line[0]]}{line}\x1b[0m" if line[0] in _COLORS else line for line in lines]
        return "\n".join(lines) + "\n"

    # --- rows ---

    def _rows(self) -> Iterator[_Row]:
        """The second program's lines in order; one that only the first has follows the line that it followed there."""
        pairing = self.pairing
        there = {i: j for j, i in pairing.partner.items()}
        tails: dict[int, list[int]] = {}
        anchor = -1
        for i in range(len(pairing.before.lines)):
            if i in there:
                anchor = there[i]
            else:
                tails.setdefault(anchor, []).append(i)
        for j in range(-1, len(pairing.after.lines)):
            if j >= 0:
                yield from self._row_of(j)
            yield from (_Row("-", self._removed(i), before=i) for i in tails.get(j, ()))

    def _row_of(self, j: int) -> Iterator[_Row]:
        pairing, line = self.pairing, self.pairing.after.lines[j]
        i = pairing.partner.get(j, -1)
        if i < 0:
            text, copied = _shown_alone(pairing.after, j), pairing.copies.get(j)
            if copied is not None:
                text = _noted(text, f"again {pairing.after.written(pairing.after.call(copied))}")
            yield _Row("+", text, after=j)
        elif j in pairing.changed:
            yield _Row("-", pairing.before.lines[i].text, before=i)
            yield _Row("+", line.text, after=j)
        elif line.kind == "call" and not is_plumbing(line) and pairing.moved(j):
            note = f"was {pairing.before.written(pairing.before.call(i))}"
            if pairing.before.type(i) != pairing.after.type(j):
                note += f" : {pairing.before.type(i)}"
            yield _Row("<" if line.region is None else ">", _noted(line.text, note), i, j)
        else:
            yield _Row("~" if j in self.reordered else " ", line.text, i, j)

    def _removed(self, i: int) -> str:
        text, now = _shown_alone(self.pairing.before, i), self.pairing.now.get(i)
        return text if now is None else _noted(text, f"now {now}")

    def _is_other(self, row: _Row) -> bool:
        """Whether a row that differs is neither a call nor a weight that came, went or changed."""
        line = self._line(row)
        return is_plumbing(line) or (line.kind != "call" and (line.kind != "weight" or row.marker == "~"))

    def _line(self, row: _Row) -> Line:
        return self.pairing.after.lines[row.after] if row.after >= 0 else self.pairing.before.lines[row.before]

    # --- hunks ---

    def _hunks(self, context: int) -> list[list[_Row]]:
        """Runs of rows of which none is more than `context` rows from a change."""
        hunks: list[list[_Row]] = []
        end = -1
        for index, row in enumerate(self.rows):
            if row.marker == " ":
                continue
            start, stop = max(index - context, 0), min(index + context + 1, len(self.rows))
            if start > end or not hunks:
                hunks.append(self.rows[start:stop])
            else:
                hunks[-1] += self.rows[end:stop]
            end = max(end, stop)
        return hunks

    def _header(self, hunk: Sequence[_Row]) -> str:
        """`@@ -first,count +first,count @@ module path`, of the lines of each program in the hunk."""
        sides = [row.before for row in hunk if row.before >= 0], [row.after for row in hunk if row.after >= 0]
        spans = [f"{sign}{min(lines, default=-1) + 1},{len(lines)}" for sign, lines in zip("-+", sides, strict=True)]
        place = _common_module([self._module(row) for row in hunk if row.marker != " "])
        return f"@@ {' '.join(spans)} @@" + (f" {place}" if place else "")

    def _module(self, row: _Row) -> str:
        node = self._line(row).node
        return getattr(node.meta.get("where"), "module", "") if node is not None else ""


def _common_module(modules: Sequence[str]) -> str:
    """The longest module path that all known ones start with."""
    paths = [module.split(".") for module in modules if module]
    common: list[str] = []
    for parts in zip(*paths, strict=False):
        if len(set(parts)) > 1:
            break
        common.append(parts[0])
    return ".".join(common)


def _shown_alone(text: Text, index: int) -> str:
    """A line that only one program has. Of a region the operands are said at its inputs, which they are slices of."""
    line = text.lines[index]
    if line.node is None or line.kind == "close":
        return line.text
    if line.node in text.operand_of:
        call, place = text.operand_of[line.node]
        region = RegionCall.of(call)
        dim = region.in_dims[place]
        return _noted(line.text, text.written(region.operands[place]) + (f" along dim {dim}" if dim >= 0 else ""))
    if region_of(line.node) is None:
        return line.text
    head, _, rest = line.text.partition("gw.sliced(")
    rest = rest[rest.index(") in_dims=") :].partition(" out_dims=")[2]
    return _noted(_MANY_ORIGINS.sub(r"[\1,..]", f"{head}gw.sliced(..) out_dims={rest}"), f"region {text.regions.index(index)}")


def _noted(line: str, note: str) -> str:
    """The line with a note of ours, in braces that the IR's text does not use there, before its comment."""
    code, mark, comment = line.partition("  # ")
    return f"{code}  <{note}>{mark}{comment}"


def _out_of_order(pairing: Pairing) -> frozenset[int]:
    """The lines that are the same and stand in no longest sequence that both programs have in the same order."""
    kept = [j for j in sorted(pairing.partner) if j not in pairing.changed and not pairing.moved(j)]
    tops: list[int] = []  # of the sequences of each length the smallest last line, as a line of `before`
    length_at = []
    for j in kept:
        i = pairing.partner[j]
        place = bisect_left(tops, i)
        tops[place : place + 1] = [i]
        length_at.append(place)
    wanted, in_order = len(tops) - 1, set[int]()
    last = len(pairing.before.lines)
    for j, place in zip(reversed(kept), reversed(length_at), strict=True):
        if place == wanted and pairing.partner[j] < last:
            in_order.add(j)
            wanted, last = wanted - 1, pairing.partner[j]
    return frozenset(kept) - in_order
