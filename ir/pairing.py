"""Which line of one program is which line of another: by name where lines have one, calls by the captured operations they came from.

A call is the same when its operation, its arguments and its comment are; an operand is the same when it is the same value, whatever
its number. Inside a region an operand is the value that its input is a slice of, so a call that only moved into a region is the same.
"""

import difflib
from collections import defaultdict
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import fx

from .calls import GETITEM, draws, name_of
from .printer import Line, literal, program_lines, weight_name
from .program import Program, region_of
from .region import Region
from .region_call import RegionCall
from .types import type_text


class Text:
    """A program's lines, with what they say about values. A line is known by its index."""

    def __init__(self, program: Program):
        self.symbols = program.symbols
        self.lines = program_lines(program)
        self.index: dict[fx.Node, int] = {}
        self.operand_of: dict[fx.Node, tuple[fx.Node, int]] = {}  # a region's input -> (its region, the operand that it is a slice of)
        for index, line in enumerate(self.lines):
            if line.node is None or line.kind == "close":
                continue
            self.index[line.node] = index
            region = region_of(line.node)
            if region is not None:
                self.operand_of |= {inner: (line.node, j) for j, inner in enumerate(region.placeholders)}

    def written(self, node: fx.Node) -> str:
        """A value as this program's text has it: `%12`, `%x`, `@layer.weight`."""
        if node.op == "get_attr":
            return weight_name(str(node.target))
        line = self.lines[self.index[node]].text.strip()
        if node.op != "placeholder":
            return line.partition(" = ")[0]
        name = "%" + weight_name(str(node.target)).removeprefix("@")
        return name if node not in self.operand_of else line.split(" ")[1]

    @property
    def regions(self) -> list[int]:
        """The regions' calls in order."""
        return [
            i for i, line in enumerate(self.lines) if line.kind == "call" and line.node is not None and region_of(line.node) is not None
        ]

    def value(self, node: fx.Node) -> fx.Node:
        """What `node` stands for: a region's input for its operand, an element of a region's results for the call that computes it."""
        while True:
            if node in self.operand_of:
                call, j = self.operand_of[node]
                node = RegionCall.of(call).operands[j]
            elif is_result_of_region(node):
                call, j = node.args  # type: ignore[assignment]
                body = region_of(call)
                assert body is not None
                node = body.outputs[j]
            else:
                return node

    def call(self, index: int) -> fx.Node:
        node = self.lines[index].node
        assert node is not None
        return node

    def calls(self) -> list[int]:
        """The calls that compute something: no region as a whole, and no element of its results."""
        return [i for i, line in enumerate(self.lines) if line.kind == "call" and not is_plumbing(line)]

    def origin(self, index: int) -> tuple[int, ...]:
        return tuple(self.call(index).meta.get("origin", ()))

    def where(self, index: int) -> str:
        return str(self.call(index).meta.get("where") or "")

    def arguments(self, index: int) -> tuple[str, list[fx.Node]]:
        """The line without its values, and the values in order."""
        node, operands = self.call(index), list[fx.Node]()

        def plain(value: Any) -> str:
            if isinstance(value, fx.Node):
                operands.append(value)
                return "%"
            if isinstance(value, tuple | list):
                return "[" + ", ".join(map(plain, value)) + "]"
            return "{}" if isinstance(value, Region) else literal(value)

        given = [*map(plain, node.args), *(f"{k}={plain(v)}" for k, v in node.kwargs.items() if v is not None)]
        head = name_of(node.target) if node.op == "call_function" else node.op
        states = node.meta.get("new_states", ()) if node.op == "output" else ()
        return f"{head}({', '.join(given)}) {' '.join(states)}", operands

    def type(self, index: int) -> str:
        return type_text(self.call(index).meta["val"], self.symbols)


def is_result_of_region(node: fx.Node) -> bool:
    """Whether `node` picks one of a region's results."""
    return (
        node.op == "call_function" and node.target is GETITEM and isinstance(node.args[0], fx.Node) and region_of(node.args[0]) is not None
    )


def is_plumbing(line: Line) -> bool:
    """Whether a line belongs to a region as such: its call, inputs, return, end, and the elements of its results."""
    return line.region is not None and line.kind in ("input", "return") or line.kind == "close" or _is_region_call(line)


def _is_region_call(line: Line) -> bool:
    return line.kind == "call" and line.node is not None and (region_of(line.node) is not None or is_result_of_region(line.node))


@dataclass(frozen=True)
class Pairing:
    """`partner`: line of `after` -> line of `before`. `changed`: those of `after` that say another thing than their partner.

    `now`: call of `before` that has no partner -> what its users read instead, as `after` writes it. `copies`: call of `after` that has
    no partner -> another line of `after` that computes the same.
    """

    before: Text
    after: Text
    partner: dict[int, int]
    changed: frozenset[int]
    now: dict[int, str]
    copies: dict[int, int]

    def moved(self, index: int) -> bool:
        """Whether a call of `after` stands in another region than its partner, or only one of them in a region."""
        here, there = self.after.lines[index].region, self.before.lines[self.partner[index]].region
        if here is None or there is None:
            return here is not there
        return self.partner.get(self.after.index[here]) != self.before.index[there]


def pair(a: Program, b: Program) -> Pairing:
    """The lines of `a` beside those of `b`."""
    before, after = Text(a), Text(b)
    partner: dict[int, int] = {}
    _pair_equal(partner, _named(before), _named(after))
    _pair_calls(partner, before, after)
    _pair_regions(partner, before, after)
    changed, now, copies = _changes(partner, before, after)
    return Pairing(before, after, partner, changed, now, copies)


# --- pairs -----------------------------------------------------------------------------------------------------------------


def _pair_equal(partner: dict[int, int], before: Iterable[tuple[Hashable, int]], after: Iterable[tuple[Hashable, int]]) -> None:
    """Pairs what has equal keys, in order, and is not paired yet."""
    taken, waiting = set(partner.values()), defaultdict[Hashable, list[int]](list)
    for key, i in before:
        if i not in taken:
            waiting[key].append(i)
    for key, j in after:
        if j not in partner and waiting.get(key):
            partner[j] = waiting[key].pop(0)


def _named(text: Text) -> Iterable[tuple[Hashable, int]]:
    """Lines that are no calls and no part of a region, by what they name."""
    for i, line in enumerate(text.lines):
        if line.kind != "call" and not is_plumbing(line):
            yield (line.kind, line.function, line.name, str(line.node.target) if line.node is not None else ""), i


def _pair_calls(partner: dict[int, int], before: Text, after: Text) -> None:
    mine, theirs = before.calls(), after.calls()

    def descent(text: Text, i: int) -> Hashable:
        return text.lines[i].function, text.origin(i), text.where(i)

    def key(text: Text, i: int) -> Hashable:
        return descent(text, i), text.call(i).target

    known = [i for i in mine if before.origin(i)], [j for j in theirs if after.origin(j)]
    whole = [[((key(text, i), text.arguments(i)[0]), i) for i in side] for text, side in zip((before, after), known, strict=True)]
    _pair_equal(partner, *whole)
    _pair_equal(partner, ((key(before, i), i) for i in known[0]), ((key(after, j), j) for j in known[1]))
    _pair_overlapping(partner, before, after, *known)
    # Of one captured operation one call is left on each side: the operation changed.
    left = _unpaired(partner, *known)
    alone = [_alone((descent(text, i), i) for i in side) for text, side in zip((before, after), left, strict=True)]
    _pair_equal(partner, alone[0], alone[1])
    _pair_in_order(partner, before, after, *_unpaired(partner, mine, theirs))


def _unpaired(partner: dict[int, int], mine: Sequence[int], theirs: Sequence[int]) -> tuple[list[int], list[int]]:
    taken = set(partner.values())
    return [i for i in mine if i not in taken], [j for j in theirs if j not in partner]


def _alone(keyed: Iterable[tuple[Hashable, int]]) -> list[tuple[Hashable, int]]:
    groups = defaultdict[Hashable, list[int]](list)
    for key, i in keyed:
        groups[key].append(i)
    return [(key, members[0]) for key, members in groups.items() if len(members) == 1]


def _pair_overlapping(partner: dict[int, int], before: Text, after: Text, mine: Sequence[int], theirs: Sequence[int]) -> None:
    """Calls of one operation of which one descends from more than the other: a shared call, or one that others were folded into."""
    mine, theirs = _unpaired(partner, mine, theirs)
    waiting, taken = defaultdict[Hashable, list[int]](list), set[int]()
    for i in mine:
        for origin in before.origin(i):
            waiting[before.lines[i].function, before.call(i).target, origin].append(i)
    for j in theirs:
        keys = [(after.lines[j].function, after.call(j).target, origin) for origin in after.origin(j)]
        found = [i for key in keys for i in waiting.get(key, ()) if i not in taken and len(before.origin(i)) + len(keys) > 2]
        if found:
            partner[j] = min(found, key=lambda i: (before.where(i) != after.where(j), i))
            taken.add(partner[j])


def _pair_in_order(partner: dict[int, int], before: Text, after: Text, mine: Sequence[int], theirs: Sequence[int]) -> None:
    """Calls without a common origin, such as those of two captures: the longest common sequences of equal lines, values aside."""

    def key(text: Text, i: int) -> Hashable:
        where = text.call(i).meta.get("where")
        return text.lines[i].function, text.arguments(i)[0], text.type(i), getattr(where, "module", "")

    keys = [key(before, i) for i in mine], [key(after, j) for j in theirs]
    for i, j, size in difflib.SequenceMatcher(None, *keys, autojunk=False).get_matching_blocks():
        partner.update(zip(theirs[j : j + size], mine[i : i + size], strict=True))


def _pair_regions(partner: dict[int, int], before: Text, after: Text) -> None:
    """A region's call pairs with that of which most calls are in it; its other lines follow."""
    shared = defaultdict[tuple[int, int], int](int)
    for j, i in partner.items():
        here, there = after.lines[j].region, before.lines[i].region
        if here is not None and there is not None:
            shared[before.index[there], after.index[here]] += 1
    taken = set[int]()
    for i, j in sorted(shared, key=lambda key: (-shared[key], key)):
        if j not in partner and i not in taken:
            partner[j] = i
            taken.add(i)
    regions = {i: j for j, i in partner.items()}
    _pair_equal(partner, _plumbing(before, lambda i: regions.get(i, -1)), _plumbing(after, lambda j: j))


def _plumbing(text: Text, region: Any) -> Iterable[tuple[Hashable, int]]:
    """A region's lines but the first, by the region (-1: it has no partner) and their place in it."""
    for i, line in enumerate(text.lines):
        if not is_plumbing(line) or line.node is None or region_of(line.node) is not None and line.kind == "call":
            continue
        if line.kind == "call":
            call: Any = line.node.args[0]
            key: Any = line.node.args[1]
        else:
            call, key = (line.node if line.kind == "close" else line.region), text.operand_of.get(line.node, (None, 0))[1]
        home = region(text.index[call])
        if home >= 0:
            yield (home, line.kind, key), i


# --- changes ---------------------------------------------------------------------------------------------------------------


def _changes(partner: dict[int, int], before: Text, after: Text) -> tuple[frozenset[int], dict[int, str], dict[int, int]]:
    """Lines that say another thing than their partner, what the users of each call without partner read instead, and copies."""
    comparison = _Comparison(partner, before, after)
    changed = set[int]()
    for j in range(len(after.lines)):
        if j not in partner:
            comparison.note_copy(j)
        elif not comparison.is_same(partner[j], j):
            changed.add(j)
    now = {i: weight_name(read) if isinstance(read, str) else after.written(after.call(read)) for i, read in comparison.reads.items()}
    return frozenset(changed), now, comparison.copies


class _Comparison:
    """Compares lines with their partners, in order.

    Where a call went away, that its users read another value is no change of theirs, if all of them read the same: `reads`. That a
    call descends from what went away too, or no longer from what is a call of its own now, is none either. And a copy of a call, such
    as a region makes to have all it needs, has the same value: `copies`, line of `after` -> the line with that value.
    """

    def __init__(self, partner: dict[int, int], before: Text, after: Text):
        self.before = before
        self.after = after
        self.there = {i: j for j, i in partner.items()}
        self.reads: dict[int, int | str] = {}
        self.copies: dict[int, int] = {}
        mine, theirs = _unpaired(partner, before.calls(), after.calls())
        self.copied = {self._descent(before, i): i for i in reversed(before.calls()) if i in self.there}
        self.gone = {origin for i in mine for origin in before.origin(i)}
        self.new = {origin for j in theirs for origin in after.origin(j)}

    @staticmethod
    def _descent(text: Text, i: int) -> Hashable:
        return text.lines[i].function, text.origin(i), text.where(i), text.call(i).target, text.arguments(i)[0]

    def note_copy(self, j: int) -> None:
        """Notes whether line j, which has no partner, does what a call that has one did."""
        line = self.after.lines[j]
        if line.kind != "call" or is_plumbing(line) or not self.after.origin(j) or draws(line.node):
            return
        i = self.copied.get(self._descent(self.after, j))
        if i is not None and self._same_arguments(i, j):
            self.copies[j] = self.there[i]

    def is_same(self, i: int, j: int) -> bool:
        mine, theirs = self.before.lines[i], self.after.lines[j]
        if theirs.node is None or theirs.kind == "close" or (theirs.kind == "input" and theirs.region is None):
            return mine.text == theirs.text
        return self._same_type(i, j) and self._same_arguments(i, j) and self._same_comment(i, j)

    def _same_type(self, i: int, j: int) -> bool:
        """Equal types; in one region alone, or in one of slices of another length, a type is that of a slice."""
        mine, theirs = self.before.lines[i], self.after.lines[j]
        if theirs.kind == "return" or (mine.region is None) != (theirs.region is None):
            return True
        return self.before.type(i) == self.after.type(j) or (theirs.kind == "call" and self._cut_otherwise(mine.region, theirs.region))

    def _cut_otherwise(self, mine: fx.Node | None, theirs: fx.Node | None) -> bool:
        """Whether a region around the lines is cut along other dims, or into another count of slices, than its partner."""
        while mine is not None and theirs is not None:
            i, j = self.before.index[mine], self.after.index[theirs]
            if self.before.arguments(i)[0] != self.after.arguments(j)[0]:
                return True
            mine, theirs = self.before.lines[i].region, self.after.lines[j].region
        return False

    def _same_arguments(self, i: int, j: int) -> bool:
        (mine, values), (theirs, others) = self.before.arguments(i), self.after.arguments(j)
        if mine != theirs or len(values) != len(others):
            return False
        found: dict[int, int | str] = {}
        for value, other in zip(values, others, strict=True):
            a, b = _identity(self.before, value), _identity(self.after, other)
            b = self.copies.get(b, b) if isinstance(b, int) else b
            if isinstance(a, str) or a in self.there:
                if b != (a if isinstance(a, str) else self.there[a]):
                    return False
            elif self.reads.get(a, found.get(a, b)) != b:
                return False
            else:
                found[a] = b
        self.reads |= found
        return True

    def _same_comment(self, i: int, j: int) -> bool:
        if self.after.lines[j].kind != "call" or is_plumbing(self.after.lines[j]):
            return True
        mine, theirs = set(self.before.origin(i)), set(self.after.origin(j))
        return self.before.where(i) == self.after.where(j) and theirs - mine <= self.gone and mine - theirs <= self.new


def _identity(text: Text, node: fx.Node) -> int | str:
    """The line that computes the value, or the weight's name."""
    value = text.value(node)
    return str(value.target) if value.op == "get_attr" else text.index[value]
