"""Candidate regions: an axis is traced back from a value at the peak, then swept forward from a cut.

Tracing follows links backwards from the value and gives every ancestor that carries the same axis its tag. Sweeping starts at a
cut position: the traced values made before it are the sources, and each later call joins if its row maps the tags of its
operands to tags of its outputs and every member operand is wanted as it is carried. A call that depends on a member but cannot
join sinks behind the region with all that depends on it, so members are convex by construction.
Source: operator grouping of "Streamlined Inference" (arXiv 2411.01171); chunk flow of AutoChunk (arXiv 2401.10652).
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from ...ir import Node
from ...ir.calls import GETITEM
from ...ir.infer import tensors_of
from ...ir.links import Refusal, Tag
from ...ir.links.sizes import Size, identity
from ...ir.symbols import ceil_div, hint
from .scene import END, Scene, value_bytes

WINDOW = 400


@dataclass(frozen=True, eq=False)
class Axis:
    """An axis of `units` units and the tag of each value known to carry it."""

    units: Size
    tags: Mapping[Node, Tag]


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
    waiting: dict[Node, int] = field(default_factory=dict)  # member -> uses by calls that are not members (yet)
    escaping: int = 0
    live: int = 0
    transient: int = 0
    storage_users: dict[int, int] = field(default_factory=dict)
    storage_bytes: dict[int, int] = field(default_factory=dict)
    weights: int = 0
    allocating: int = 0
    hoisted: int = 0
    waiting_outside: dict[int, int] = field(default_factory=dict)  # storages made between members, not (yet) used by one
    fixed: int = 0


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
    best_ends: list[tuple[int, int]] = []
    snapshots: dict[int, Candidate] = {}
    state.sources = {value: tag for value, tag in axis.tags.items() if scene.at(value) < start and len(tensors_of(value.meta["val"])) == 1}
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
        if len(best_ends) < 12 or cost < max(best_ends)[0]:
            candidate = _snapshot(scene, axis, state, order, start, position, base)
            if candidate is None:
                continue
            snapshots[position] = candidate
            best_ends.append((cost, position))
            if len(best_ends) > 12:
                worst = max(best_ends)
                best_ends.remove(worst)
                del snapshots[worst[1]]
    yield from snapshots.values()


def _join(scene: Scene, axis: Axis, state: _Sweep, node: Node, kinds: frozenset[str], stops: list[Stop] | None) -> bool:
    """Makes `node` a member if its row allows; else taints it if it depends on one."""
    operands = scene.operands[node]
    if not state.tainted.isdisjoint(operands):
        state.tainted.add(node)
        return False
    has_member = not state.tags.keys().isdisjoint(operands)
    carries = has_member or not state.sources.keys().isdisjoint(operands)
    refusal = _tags_for(scene, axis, state, node, kinds) if carries else None
    if isinstance(refusal, tuple):
        _add(scene, state, node, refusal)
        return True
    if has_member:
        state.tainted.add(node)
        if stops is not None and refusal is not None:
            stops.append(Stop(node, refusal))
        return False
    tag = axis.tags.get(node)
    if tag is not None and len(tensors_of(node.meta["val"])) == 1:
        state.sources[node] = tag
    if scene.makes[node]:
        state.waiting_outside[scene.keys[node][0]] = scene.makes[node]
    return False


def _tags_for(scene: Scene, axis: Axis, state: _Sweep, node: Node, kinds: frozenset[str]) -> "tuple[Tag | None, ...] | Refusal | None":
    """The tags with which `node` joins, a refusal, or None if it carries nothing of the axis."""
    refusal: Refusal | None = None
    for operand in sorted(scene.operands[node], key=lambda o: o not in state.tags):
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
    state.weights += scene.weight_bytes[node]
    if scene.makes[node]:
        state.allocating += 1
        for tensor, key in zip(tensors_of(node.meta["val"]), scene.keys[node], strict=True):
            if key not in state.storage_bytes:
                state.storage_bytes[key] = hint(tensor.untyped_storage().nbytes())
                state.live += state.storage_bytes[key]
    state.transient = max(state.transient, state.live + scene.workspace_of[node].moving)
    state.fixed = max(state.fixed, scene.workspace_of[node].fixed)
    owned = [key for key in set(scene.keys[node]) if key in state.storage_bytes]
    users = len(scene.users[node])
    state.waiting[node] = users
    if users and owned:
        state.escaping += value_bytes(node)
    for key in owned:
        state.storage_users[key] = state.storage_users.get(key, 0) + users
    for operand in scene.operands[node]:
        if operand not in state.tags:
            state.hoisted += sum(state.waiting_outside.pop(key, 0) for key in scene.keys.get(operand, ()))
            continue
        operand_keys = [key for key in set(scene.keys[operand]) if key in state.storage_bytes]
        state.waiting[operand] -= 1
        if state.waiting[operand] == 0 and operand_keys:
            state.escaping -= value_bytes(operand)
        for key in operand_keys:
            state.storage_users[key] -= 1
            if state.storage_users[key] == 0:
                state.live -= state.storage_bytes[key]


def _snapshot(scene: Scene, axis: Axis, state: _Sweep, order: list[Node], start: int, position: int, base: int) -> Candidate | None:
    """The candidate that ends after `position`; None if an output could not be laid out again as it was."""
    escaping = [node for node, waiting in state.waiting.items() if waiting and any(key in state.storage_bytes for key in scene.keys[node])]
    if not escaping or not all(map(scene.is_dense, escaping)):
        return None
    donated = _donatable(scene, state, escaping)
    return Candidate(
        units=axis.units,
        members=tuple(order),
        tags=dict(state.tags),
        first=start,
        last=position,
        base=base + state.hoisted + state.fixed,
        escaping=state.escaping - donated,
        transient=state.transient,
        weight_bytes=state.weights,
    )


def _donatable(scene: Scene, state: _Sweep, escaping: list[Node]) -> int:
    """Bytes of outputs that may take the storage of a sliced operand that dies in the region."""
    dying: dict[tuple, int] = {}
    seen: set[Node] = set()
    for member in state.tags:
        for operand in scene.operands[member]:
            if operand in seen or operand in state.tags or operand.op != "call_function":
                continue
            seen.add(operand)
            if operand in state.sources and all(user in state.tags for user in scene.users[operand]):
                dying[layout_of(operand, state.sources[operand])] = dying.get(layout_of(operand, state.sources[operand]), 0) + 1
    saved = 0
    for node in escaping:
        tag = state.tags[node][0]
        key = layout_of(node, tag)
        if dying.get(key):
            dying[key] -= 1
            saved += value_bytes(node)
    return saved


def layout_of(node: Node, tag: Tag | None) -> tuple:
    """What must agree for one tensor to take another's storage slice by slice."""
    value = tensors_of(node.meta["val"])[0]
    assert tag is not None
    return (tag.dim, identity(tag.unit), value.dtype, tuple(map(hint, value.shape)), tuple(map(hint, value.stride())))


__all__ = ["END", "Axis", "Candidate", "Stop", "layout_of", "sweep", "trace"]
