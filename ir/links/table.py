"""The legality table: one row an op, which operand dims move with each output dim, and the questions a slicing pass asks of it.

A row is a function `links(call, output, dim) -> Moves | Refusal`, registered by op name (`row("aten::linear")`), which may add
`stuck` (why an operand's dim moves with no output dim), `local` (the call to make on slices) and `halo`. Both directions come from
the same function, so they cannot disagree. Source: specs/feature_slicing.md, sections 3.2 and 3.3.
"""

import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from ..infer import tensors_of
from .call import Call, Key
from .sizes import Size, common, differ, quotient, same
from .tag import WHOLE, Localized, OperandSlot, Refusal, Tag


@dataclass(frozen=True, slots=True)
class Move:
    """An operand's dim that moves with an output dim: unit of the operand = unit of the output * times / over."""

    dim: int
    times: Size = 1
    over: Size = 1


@dataclass(frozen=True, slots=True)
class Moves:
    """What moves with one output dim (a bare int is `Move(dim)`); operands not named are whole. `kind`: rows, query or features."""

    operands: Mapping[Key, Move | int]
    kind: str = "rows"


Links = Callable[[Call, int, int], Moves | Refusal]


@dataclass(slots=True)
class Row:
    """A row by links: per output dim, the operand dims that move with it, whatever N is."""

    links: Links
    _stuck: Callable[[Call, Key, int], Refusal | None] | None = field(default=None)
    _local: Callable[[Call, int, Tag], Localized | None] | None = field(default=None)
    _halo: Callable[[Call, int], str] | None = field(default=None)

    def stuck(self, function):
        """Decorator: `function(call, key, dim)` says why the operand's dim moves with no output dim, or None for the usual reason."""
        self._stuck = function
        return function

    def local(self, function):
        """Decorator: `function(call, output, tag)` gives the call that works for any slice length, or None for the node's own."""
        self._local = function
        return function

    def halo_rows(self, function):
        """Decorator: `function(call, dim)` prints which operand rows output rows [a, b) of `dim` need."""
        self._halo = function
        return function

    def backward(self, call: Call, output: int, tag: Tag, units: Size) -> dict[Key, Tag] | Refusal:
        moves = self.links(call, output, tag.dim)
        if isinstance(moves, Refusal):
            return moves
        tags = {}
        for key, move in moves.operands.items():
            operand_tag = _tag_of_operand(call, key, move, tag, units)
            if isinstance(operand_tag, Refusal):
                return operand_tag
            tags[key] = operand_tag
        return tags

    def forward(self, call: Call, keys: list[Key], output: int, tag: Tag, units: Size) -> Tag | Refusal:
        rank = len(call.out_shape(output))
        aligned = tag.dim + rank - len(call.shape(keys[0]) or ())
        refusal = None
        for dim in sorted(range(rank), key=lambda d: d != aligned):
            moves = self.links(call, output, dim)
            if isinstance(moves, Refusal):
                if dim == aligned or moves.reason == "sym-unproved":
                    refusal = refusal or moves
                continue
            if not any(_dim_of(moves.operands.get(key)) == tag.dim for key in keys):
                continue
            return self._agreed(call, keys, moves, dim, tag, units)
        stuck = self._stuck(call, keys[0], tag.dim) if self._stuck else None
        return stuck or refusal or _barrier(call, keys[0], tag.dim)

    def _agreed(self, call: Call, keys: list[Key], moves: Moves, dim: int, tag: Tag, units: Size) -> Tag | Refusal:
        """The output's tag along `dim`, if every occurrence of the operand moves with it by the operand's own tag."""
        found = None
        for key in keys:
            move = moves.operands.get(key)
            if _dim_of(move) != tag.dim:
                return _barrier(call, key, tag.dim)
            out = _tag_of_output(call, key, move, dim, tag, units)
            if isinstance(out, Refusal):
                return out
            if found is not None and out != found:
                return _barrier(call, key, tag.dim)
            found = out
        # Operands that move by other units (key heads of grouped queries) must divide too.
        for key, move in moves.operands.items():
            if isinstance(move, Move) and key not in keys:
                other = _tag_of_operand(call, key, move, found, units)
                if isinstance(other, Refusal):
                    return other
        return found

    def localize(self, call: Call, output: int, tag: Tag, units: Size) -> Localized | None:
        return self._local(call, output, tag) if self._local else None

    def kind(self, call: Call, tag: Tag) -> str:
        moves = self.links(call, 0, tag.dim)
        return "rows" if isinstance(moves, Refusal) else moves.kind

    def halo(self, call: Call, dim: int) -> str:
        return self._halo(call, dim) if self._halo else "[a, b)"


def _dim_of(move: Move | int | None) -> int | None:
    return move.dim if isinstance(move, Move) else move


def _tag_of_operand(call: Call, key: Key, move: Move | int, tag: Tag, units: Size) -> Tag | Refusal:
    if not isinstance(move, Move):
        return Tag(move, tag.unit)
    unit = quotient(tag.unit * move.times, move.over)
    if unit is not None:
        return Tag(move.dim, unit)
    return _unit(call, key, call.shape(key)[move.dim], units)


def _tag_of_output(call: Call, key: Key, move: Move | int, dim: int, tag: Tag, units: Size) -> Tag | Refusal:
    if not isinstance(move, Move):
        return Tag(dim, tag.unit)
    unit = quotient(tag.unit * move.over, move.times)
    if unit is not None:
        return Tag(dim, unit)
    return _unit(call, key, quotient(call.shape(key)[move.dim] * move.over, move.times), units)


def _unit(call: Call, key: Key, size: Size | None, units: Size) -> Refusal:
    """Units must not be finer than the `size` blocks that move together."""
    if type(size) is not int or type(units) is not int:
        return Refusal("sym-unproved", f"{call.op}: {units} units are not proved to divide into {size} blocks", call.operand(key))
    return Refusal("unit", f"{call.op} moves {size} blocks as wholes, {units} units cut them", call.operand(key), common(size, units))


def _barrier(call: Call, key: Key, dim: int) -> Refusal:
    node = call.operand(key)
    return Refusal("barrier", f"{call.op} needs {node} whole along dim {dim}", node)


ROWS: dict[str, Any] = {}
"""`aten::linear`, or `aten::max.dim` where overloads differ -> the row.
A row must be sampled in tests/test_links.py or it does not exist."""

_FOUND: dict[Any, Any] = {}


def row(*names: str):
    """Decorator: the links of these ops. A dialect op declares its own beside its reference: `@row("gw::name")`."""

    def register(links: Links) -> Row:
        entry = Row(links)
        for name in names:
            declare(name, entry)
        return entry

    return register


def declare(name: str, entry) -> None:
    """Give op `name` the row `entry`: a `Row`, or any object with its backward, forward, localize, kind and halo."""
    ROWS[name] = entry
    _FOUND.clear()


@dataclass(frozen=True, slots=True)
class Never:
    """The row of an op that has no link at all: a barrier, a random source, a data-dependent shape (R30)."""

    reason: str
    why: str

    def backward(self, call: Call, output: int, tag: Tag, units: Size) -> Refusal:
        return Refusal(self.reason, f"{call.op}: {self.why}")

    def forward(self, call: Call, keys: list[Key], output: int, tag: Tag, units: Size) -> Refusal:
        return Refusal(self.reason, f"{call.op}: {self.why}", call.operand(keys[0]))

    def localize(self, call: Call, output: int, tag: Tag, units: Size) -> None:
        return None

    def kind(self, call: Call, tag: Tag) -> str:
        return "rows"

    def halo(self, call: Call, dim: int) -> str:
        return "[a, b)"


def never(reason: str, why: str, *names: str) -> None:
    for name in names:
        declare(name, Never(reason, why))


def find_row(target) -> Any:
    """The row of an op: its own, or elementwise if ATen tags the op pointwise; else why there is none."""
    found = _FOUND.get(target)
    if found is None:
        found = _FOUND[target] = _search(target)
    return found


def _search(target) -> Any:
    if target is operator.getitem:
        return ROWS["getitem"]
    if not isinstance(target, torch._ops.OpOverload):
        return Refusal("no-row", f"{getattr(target, '__name__', target)} has no row")
    name = target._schema.name
    if target._schema.is_mutable:
        return Refusal("mutates", f"{target} writes into an operand")
    entry = ROWS.get(f"{name}.{target._overloadname}") or ROWS.get(name)
    if entry is not None:
        return entry
    if torch.Tag.nondeterministic_seeded in target.tags:
        return Refusal("rng", f"{target} draws random numbers")
    if torch.Tag.pointwise in target.tags:
        return ROWS["pointwise"]
    if torch.Tag.dynamic_output_shape in target.tags or torch.Tag.data_dependent_output in target.tags:
        return Refusal("data-dependent", f"the shape or value of {target} depends on data")
    return Refusal("no-row", f"{target} has no row")


def backward(node: fx.Node, tag: Tag, units: Size, output: int = 0) -> dict[OperandSlot, Tag | None] | Refusal:
    """What each tensor operand must carry for output `output` of `node` to carry `tag` of an axis of `units` units.

    One entry for each tensor operand occurrence; `WHOLE` (None) = passed at full size. All `WHOLE`, or no entry at all: the output
    does not depend on the slice, so it is hoisted and may re-enter sliced.
    """
    entry = lazy_operand(node) or find_row(node.target)
    if isinstance(entry, Refusal):
        return entry
    call = Call(node)
    size = call.out_shape(output)[tag.dim]
    assert type(size) is not int or tag.is_partial or not differ(size, units * tag.unit), (
        f"{tag} of {units} units on {size} indices: {call.op}"
    )
    tags = entry.backward(call, output, tag, units)
    if isinstance(tags, Refusal):
        return tags
    return {slot: tags.get(key, WHOLE) for key, slot in call.operands.items()}


def forward(node: fx.Node, operand: OperandSlot | fx.Node, tag: Tag, units: Size) -> Tag | tuple[Tag | None, ...] | Refusal:
    """The tag that `node` carries if `operand` carries `tag`; for a multi-output op one for each output.

    A node stands for all its occurrences among the operands, which must then agree; an `OperandSlot` for that occurrence alone.
    An operand that can only be whole is a `barrier`.
    """
    entry = lazy_operand(node) or find_row(node.target)
    if isinstance(entry, Refusal):
        return entry
    call = Call(node)
    if isinstance(operand, OperandSlot):
        keys = [key for key, slot in call.operands.items() if slot == operand]
    else:
        keys = [key for key, slot in call.operands.items() if slot.node is operand]
    if not keys:
        raise ValueError(f"{operand} is no tensor operand of {node.format_node()}")
    count = call.outputs()
    if count is None:
        return entry.forward(call, keys, 0, tag, units)
    tags = [entry.forward(call, keys, output, tag, units) for output in range(count)]
    if all(isinstance(t, Refusal) for t in tags):
        return tags[0]
    return tuple(None if isinstance(t, Refusal) else t for t in tags)


def localize(node: fx.Node, tag: Tag, units: Size, output: int = 0) -> Localized:
    """The call to make on slices where `node` carries `tag`: no size along a tagged dim is left in it, so any slice length works.

    Operands stay in place. A size that the node left to -1 and that must now be stated may be a SymInt: the emitter puts a node of
    that value, read from the full tensor, in its place. If `backward` passes every operand whole, the node is hoisted, not localized.
    """
    entry = find_row(node.target)
    own = Localized(node.target, node.args, dict(node.kwargs))
    if isinstance(entry, Refusal):
        return own
    return entry.localize(Call(node), output, tag, units) or own


def kind(node: fx.Node, tag: Tag) -> str:
    """The kind of the link of output dim `tag.dim`: `rows`, `query` (attention) or `features` (a weight is sliced too)."""
    entry = find_row(node.target)
    return "rows" if isinstance(entry, Refusal) else entry.kind(Call(node), tag)


def halo(node: fx.Node, dim: int) -> str:
    """The operand rows, in terms of a and b, that output rows [a, b) of `dim` need."""
    entry = find_row(node.target)
    return "[a, b)" if isinstance(entry, Refusal) else entry.halo(Call(node), dim)


def lazy_operand(node: fx.Node) -> Refusal | None:
    """Why a call on what torch conjugates or negates only when it is read is no link: a region's operands and outputs are plain."""
    for value in (node, *node.all_input_nodes):
        if any(tensor.is_conj() or tensor.is_neg() for tensor in tensors_of(value.meta.get("val"))):
            return Refusal("barrier", f"{node.target} works on {value}, a lazy conjugate: .resolve_conj() makes it plain", value)
    return None


def aligned(call: Call, keys, dim: int, shape=None) -> dict[Key, int] | Refusal:
    """The operands among `keys` that move with output dim `dim` under broadcasting: right-aligned, of equal size; 1 or absent is whole."""
    shape = call.out_shape() if shape is None else shape
    back = len(shape) - dim
    moves = {}
    for key in keys:
        sizes = call.shape(key)
        if sizes is None or len(sizes) < back:
            continue
        place = len(sizes) - back
        moving = moves_or_whole(call, key, place, shape[dim])
        if isinstance(moving, Refusal):
            return moving
        if moving:
            moves[key] = place
    return moves


def moves_or_whole(call: Call, key: Key, dim: int, size: Size) -> bool | Refusal:
    """Under broadcasting, whether the operand's dim moves with an output dim of `size` (equal) or is whole (1)."""
    own = call.shape(key)[dim]
    if same(own, size):
        return True
    return False if same(own, 1) else unproved(call, key, own, size)


def unproved(call: Call, key: Key, size: Size, other: Size) -> Refusal:
    return Refusal("sym-unproved", f"{call.op}: {size} = {other} is not proved", call.operand(key))
