"""Candidate regions: an axis is traced back from a value at the peak, then swept forward from a cut.

Tracing follows links backwards from the value and gives every ancestor that carries the same axis its tag. Sweeping starts at a
cut position: the traced values made before it are the sources, and each later call joins if its row maps the tags of its
operands to tags of its outputs and every member operand is wanted as it is carried. A call that depends on a member but cannot
join sinks behind the region with all that depends on it, so members are convex by construction.
Source: operator grouping of "Streamlined Inference" (arXiv 2411.01171); chunk flow of AutoChunk (arXiv 2401.10652).
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple

from ...ir import Node
from ...ir.calls import GETITEM
from ...ir.infer import tensors_of
from ...ir.links import Refusal, Tag
from ...ir.links.sizes import Size, identity
from ...ir.symbols import ceil_div, hint
from .scene import END, Scene

WINDOW = 400
_MOST_ENDS = 12


@dataclass(frozen=True, eq=False)
class Axis:
    """An axis of `units` units and the tag of each value known to carry it."""

    units: Size
    tags: Mapping[Node, Tag]

    @cached_property
    def single(self) -> dict[Node, Tag]:
        """The tags of those values that are one tensor."""
        return {value: tag for value, tag in self.tags.items() if len(tensors_of(value.meta["val"])) == 1}

    @cached_property
    def marks(self) -> "dict[Node, _Mark]":
        return {value: _mark((tag,), is_member=False) for value, tag in self.single.items()}


_Mark = tuple  # whether a call is a member, then dim and unit of each of its tags: what a later call's answer depends on, hashable


def _mark(tags: Sequence[Tag | None], is_member: bool) -> _Mark:
    return is_member, *((tag.dim, identity(tag.unit)) for tag in tags if tag is not None)


@dataclass(frozen=True)
class Stop:
    """A call that an axis could not pass, and why."""

    node: Node
    refusal: Refusal


@dataclass
class Candidate:
    """Members of a region in order, the tag of each, and what it costs.

    `base` bytes live around it, `escaping` bytes of outputs (donated ones left out), `transient` bytes inside at one slice.
    """

    units: Size
    members: tuple[Node, ...]
    tags: dict[Node, tuple[Tag | None, ...]]
    first: int
    last: int
    base: int
    escaping: int
    transient: int
    weight_bytes: int

    def peak(self, count: int) -> int:
        """Bytes live while the region runs in `count` slices."""
        units = hint(self.units)
        return self.base + self.escaping + ceil_div(self.transient * ceil_div(units, count), units)


def trace(scene: Scene, node: Node, tag: Tag, units: Size, window: int = WINDOW) -> tuple[Axis, list[Stop]]:
    """The axis that `node` carries by `tag`, followed back to every ancestor within the window."""
    tags: dict[Node, Tag] = {node: tag}
    clashing: set[Node] = set()
    stops: list[Stop] = []
    lowest = scene.at(node) - window
    stack: list[tuple[Node, int]] = [(node, 0)]
    while stack:
        current, output = stack.pop()
        if current.op != "call_function" or scene.position[current] < lowest:
            continue
        wanted = scene.backward(current, tags[current], units, output)
        if isinstance(wanted, Refusal):
            stops.append(Stop(current, wanted))
            continue
        index = current.args[1] if is_getitem(current) else 0
        for slot, want in wanted.items():
            operand = slot.node
            if want is None or want.is_partial or operand in clashing:
                continue
            if operand not in tags:
                tags[operand] = want
                stack.append((operand, index if isinstance(index, int) else 0))
            elif tags[operand] != want:
                clashing.add(operand)
    return Axis(units, {value: tag for value, tag in tags.items() if value not in clashing}), stops


def is_getitem(node: Node) -> bool:
    return node.target is GETITEM


@dataclass
class _Sweep:
    """The state of one forward sweep."""

    tags: dict[Node, tuple[Tag | None, ...]] = field(default_factory=dict)
    sources: dict[Node, Tag] = field(default_factory=dict)
    tainted: set[Node] = field(default_factory=set)
    marks: dict[Node, _Mark] = field(default_factory=dict)  # of members and sources
    waiting: dict[Node, int] = field(default_factory=dict)  # member -> uses by calls that are not members (yet)
    leaving: dict[Node, None] = field(default_factory=dict)  # members with a storage of their own that still wait
    escaping: int = 0
    live: int = 0
    transient: int = 0
    storage_users: dict[int, int] = field(default_factory=dict)
    unread: dict[Node, int] = field(default_factory=dict)  # source read by members -> uses by other calls (yet)
    donors: dict[tuple, int] = field(default_factory=dict)  # layout -> sources that die in the region
    weights: int = 0
    allocating: int = 0
    hoisted: int = 0
    waiting_outside: dict[int, int] = field(default_factory=dict)  # storages made between members, not (yet) used by one
    fixed: int = 0


class _End(NamedTuple):
    """A good end of a sweep: the smaller, the better."""

    cost: int
    position: int
    members: int
    base: int
    escaping: int
    transient: int
    weights: int


def sweep(
    scene: Scene,
    axis: Axis,
    start: int,
    target: int,
    base: int,
    kinds: frozenset[str],
    window: int = WINDOW,
    stops: list[Stop] | None = None,
) -> Iterator[Candidate]:
    """Candidates that start at the cut before position `start` and cover position `target`, one for each good end.

    `base` is the bytes live across the cut.
    """
    state = _Sweep()
    order: list[Node] = []
    ends: list[_End] = []
    for value, tag in axis.single.items():
        if scene.at(value) < start:
            state.sources[value] = tag
            state.marks[value] = axis.marks[value]
    end = min(len(scene.nodes), max(target, start) + window)
    for position in range(start, end):
        node = scene.nodes[position]
        joined = _join(scene, axis, state, node, kinds, stops)
        if joined:
            order.append(node)
        elif position == target or (node in scene.random and node in state.tainted):
            break  # the call to be covered cannot join; random numbers are drawn in program order, so such a call must not sink
        if position < target or state.allocating < 2 or not joined:
            continue
        cost = state.escaping + state.transient // 8
        if (len(ends) < _MOST_ENDS or cost < max(ends).cost) and _can_end(scene, state):
            around = base + state.hoisted + state.fixed
            escaping = state.escaping - _donated(scene, state)
            ends.append(_End(cost, position, len(order), around, escaping, state.transient, state.weights))
            if len(ends) > _MOST_ENDS:
                ends.remove(max(ends))
    for best in ends:
        members = tuple(order[: best.members])
        tags = {member: state.tags[member] for member in members}
        yield Candidate(axis.units, members, tags, start, best.position, best.base, best.escaping, best.transient, best.weights)


def _join(scene: Scene, axis: Axis, state: _Sweep, node: Node, kinds: frozenset[str], stops: list[Stop] | None) -> bool:
    """Makes `node` a member if its row allows; else taints it if it depends on one."""
    operands = scene.operands[node]
    if not state.tainted.isdisjoint(operands):
        state.tainted.add(node)
        return False
    if not state.marks.keys().isdisjoint(operands):
        question = (node, identity(axis.units), kinds, tuple(map(state.marks.get, operands)))
        if question not in scene.answers:
            scene.answers[question] = _tags_for(scene, axis, state, node, kinds)
        answer = scene.answers[question]
        if isinstance(answer, tuple):
            _add(scene, state, node, answer)
            return True
        if not state.tags.keys().isdisjoint(operands):
            state.tainted.add(node)
            if stops is not None and answer is not None:
                stops.append(Stop(node, answer))
            return False
    if node in axis.single:
        state.sources[node] = axis.single[node]
        state.marks[node] = axis.marks[node]
    if scene.makes[node]:
        state.waiting_outside[scene.keys[node][0]] = scene.makes[node]
    return False


def _tags_for(scene: Scene, axis: Axis, state: _Sweep, node: Node, kinds: frozenset[str]) -> "tuple[Tag | None, ...] | Refusal | None":
    """The tags with which `node` joins, a refusal, or None if it carries nothing of the axis."""
    refusal: Refusal | None = None
    operands = scene.operands[node]
    for operand in [*(o for o in operands if o in state.tags), *(o for o in operands if o in state.sources)]:
        tag = _carried(state, node, operand)
        if tag is None:
            continue
        tags = scene.forward(node, operand, tag, axis.units)
        if isinstance(tags, Refusal):
            refusal = refusal or tags
            if operand in state.tags:
                return tags
            continue
        if any(t is None for t in tags):
            return Refusal("mixed", "an output does not carry the axis", operand)
        if any(t is not None and scene.kind(node, t) not in kinds for t in tags):
            return Refusal("kind-off", "this kind of link is switched off", operand)
        problem = _disagreement(scene, axis, state, node, tags) or scene.unknown_size(node, tags, axis.units)
        return problem if problem is not None else tags
    return refusal


def _carried(state: _Sweep, node: Node, operand: Node) -> Tag | None:
    if operand in state.tags:
        tags = state.tags[operand]
        return tags[node.args[1]] if is_getitem(node) else tags[0]
    return state.sources.get(operand)


def _disagreement(scene: Scene, axis: Axis, state: _Sweep, node: Node, tags: tuple[Tag | None, ...]) -> Refusal | None:
    """Why a member operand is not wanted as it is carried."""
    for output, tag in enumerate(tags):
        assert tag is not None
        wanted = scene.backward(node, tag, axis.units, output)
        if isinstance(wanted, Refusal):
            return wanted
        for slot, want in wanted.items():
            if slot.node not in state.tags:
                continue
            have = _carried(state, node, slot.node)
            if want is None:
                return Refusal("barrier", f"{node.target} needs {slot.node.target} whole", slot.node)
            if have != want:
                return Refusal("two-tags", f"{node.target} wants another dim of {slot.node.target}", slot.node)
    return None


def _add(scene: Scene, state: _Sweep, node: Node, tags: tuple[Tag | None, ...]) -> None:
    state.tags[node] = tags
    state.marks[node] = _mark(tags, is_member=True)
    state.weights += scene.weight_bytes[node]
    if scene.makes[node]:
        state.allocating += 1
        for key, nbytes in scene.storages[node]:
            if key not in state.storage_users:
                state.storage_users[key] = 0
                state.live += nbytes
    scratch = scene.workspace_of[node]
    state.transient = max(state.transient, state.live + scratch.moving)
    state.fixed = max(state.fixed, scratch.fixed)
    users = len(scene.users[node])
    state.waiting[node] = users
    owned = [key for key, _ in scene.storages[node] if key in state.storage_users]
    if users and owned:
        state.leaving[node] = None
        state.escaping += scene.bytes_of[node]
    for key in owned:
        state.storage_users[key] += users
    for operand in scene.operands[node]:
        if operand in state.tags:
            _use(scene, state, operand)
        else:
            _read(scene, state, operand)


def _use(scene: Scene, state: _Sweep, member: Node) -> None:
    """Counts the use of a member by a new one."""
    state.waiting[member] -= 1
    if state.waiting[member] == 0 and member in state.leaving:
        del state.leaving[member]
        state.escaping -= scene.bytes_of[member]
    for key, nbytes in scene.storages[member]:
        if key in state.storage_users:
            state.storage_users[key] -= 1
            if state.storage_users[key] == 0:
                state.live -= nbytes


def _read(scene: Scene, state: _Sweep, operand: Node) -> None:
    """Counts the use of an outside value by a new member."""
    state.hoisted += sum(state.waiting_outside.pop(key, 0) for key in scene.keys.get(operand, ()))
    if operand.op != "call_function" or operand not in state.sources:
        return
    left = state.unread.get(operand, len(scene.users[operand])) - 1
    state.unread[operand] = left
    if left == 0:
        layout = scene.layout_of(operand, state.sources[operand])
        state.donors[layout] = state.donors.get(layout, 0) + 1


def _can_end(scene: Scene, state: _Sweep) -> bool:
    """Whether something leaves the members so far, and all of that can be laid out again as it was."""
    return bool(state.leaving) and all(map(scene.is_dense, state.leaving))


def _donated(scene: Scene, state: _Sweep) -> int:
    """Bytes of outputs that may take the storage of a sliced operand that dies in the region."""
    if not state.donors:
        return 0
    left = dict(state.donors)
    saved = 0
    for node in state.leaving:
        layout = scene.layout_of(node, state.tags[node][0])
        if left.get(layout):
            left[layout] -= 1
            saved += scene.bytes_of[node]
    return saved


__all__ = ["END", "Axis", "Candidate", "Stop", "sweep", "trace"]
