"""The schedule with regions as single items, and the bytes live at each.

A region stands where its last member stood, and what depends on an earlier member waits for it. That moves calls only within the
block of regions whose spans overlap, so each block is scheduled once and what lies between blocks stays as it was. Lifetimes are
arrays over storages. Both, because a plan is laid out again for each region that is tried: at 10,000 calls, hundreds of times.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch

from ...ir import Node
from ...ir.infer import tensors_of
from ...ir.links import Refusal, Tag
from ...ir.links.sizes import Size
from ...ir.symbols import ceil_div, hint
from .scene import END, Scene, first_tag


@dataclass(eq=False)
class PlannedRegion:
    """Members in order, the tag of each, N units and n slices: n of the N at capture where N is known at the call only.

    Such a region keeps n, or the length of a slice: with `fixed_length`, and where a slice is one unit at capture. There a symbolic
    length would be 1 at its hint, and types inferred from it would broadcast.
    """

    units: Size
    count: int
    members: tuple[Node, ...]
    tags: dict[Node, tuple[Tag | None, ...]]
    fixed_length: bool = False

    @property
    def longest(self) -> int:
        """Units in the longest slice, at capture."""
        return ceil_div(hint(self.units), self.count)

    @property
    def length(self) -> int | None:
        """The most units of a slice whatever N is; None where n is fixed instead."""
        if isinstance(self.units, int) or not (self.fixed_length or self.longest == 1):
            return None
        return self.longest

    @property
    def nominal_length(self) -> Size:
        """The slice length for which the body is typed, an upper bound of all."""
        if isinstance(self.units, int):
            return self.longest
        return ceil_div(self.units, self.count) if self.length is None else torch.sym_min(self.units, self.length)


Item = Node | PlannedRegion


@dataclass
class Layout:
    """Items in order; `live` bytes at each, `full` without what is inside regions, `crossing` the cut before each."""

    items: list[Item]
    place: dict[Node, int]
    index: np.ndarray  # place -> position of the item
    live: np.ndarray
    full: np.ndarray
    crossing: np.ndarray

    def at(self, node: Node) -> int:
        """The position of the item that runs `node`; the return stands at the end."""
        return int(self.index[self.place[node]]) if node in self.place else END

    def live_at(self, nodes: Iterable[Node]) -> np.ndarray:
        """The bytes live while each of `nodes` runs."""
        return self.live[self.index[[self.place[node] for node in nodes]]]

    @cached_property
    def flat(self) -> list[Node]:
        """The calls in the order of their items."""
        return [node for item in self.items for node in (item.members if isinstance(item, PlannedRegion) else (item,))]

    @cached_property
    def flat_of_item(self) -> list[int]:
        """The flat position at which each item starts."""
        lengths = [len(item.members) if isinstance(item, PlannedRegion) else 1 for item in self.items]
        return [0, *np.cumsum(lengths[:-1]).tolist()]


@dataclass(frozen=True)
class _Block:
    """The items that stand for the calls `begin` to `end` of the program, and which of them are regions."""

    begin: int
    end: int
    items: list[Item]
    index: np.ndarray
    workspace: np.ndarray
    regions: list[tuple[int, PlannedRegion]]


@dataclass(frozen=True)
class _Boundary:
    """What goes in and out of a region: outputs as (place, storage, layout, bytes, is partial), operands that it slices as
    (storage, layout). Of a partial output, statistics of a slice, there are as many as slices."""

    members: np.ndarray
    outputs: list[tuple[int, int, tuple, int, bool]]
    donors: list[tuple[int, tuple]]


@dataclass(frozen=True)
class _Spans:
    """For each storage the first and the last item at which it exists, and its bytes, 0 for one that exists by slices only; what regions
    return as (item, place, storage)."""

    born: np.ndarray
    dies: np.ndarray
    size: np.ndarray
    outputs: list[tuple[int, int, int]]


class Layouts:
    """Lays regions over the calls of one scene."""

    def __init__(self, scene: Scene):
        self.scene = scene
        self.order = list(scene.nodes)
        self.place = {node: i for i, node in enumerate(self.order)}
        self._workspace = np.array([scene.workspace_of[node].total for node in self.order], dtype=np.int64)
        self._blocks: dict[tuple[PlannedRegion, ...], _Block | None] = {}
        self._boundaries: dict[PlannedRegion, _Boundary] = {}
        self._insides: dict[tuple[PlannedRegion, int], int] = {}
        self._index_uses()
        self._index_storages()

    def _index_uses(self) -> None:
        """Each call's users one after the other, the return as one past the last call; a call that nothing uses stands for itself."""
        uses = [[self.place.get(user, len(self.order)) for user in self.scene.users[node]] or [i] for i, node in enumerate(self.order)]
        self._users = np.array([user for each in uses for user in each], dtype=np.int64)
        self._first_user = np.cumsum([0, *map(len, uses[:-1])])

    def _index_storages(self) -> None:
        """Storages that calls make: maker, bytes, and the calls whose results lie there, one storage after the other."""
        self._storage: dict[int, int] = {}
        makers: list[int] = []
        nbytes: list[int] = []
        views: list[list[int]] = []
        for i, node in enumerate(self.order):
            for tensor, key in zip(tensors_of(node.meta["val"]), self.scene.keys[node], strict=True):
                if key in self.scene.outside_keys:
                    continue
                if key not in self._storage:
                    self._storage[key] = len(makers)
                    makers.append(i)
                    nbytes.append(hint(tensor.untyped_storage().nbytes()))
                    views.append([])
                views[self._storage[key]].append(i)
        self._makers = np.array(makers, dtype=np.int64)
        self._nbytes = np.array(nbytes, dtype=np.int64)
        self._views = np.array([view for each in views for view in each], dtype=np.int64)
        self._maker_of_view = np.repeat(self._makers, [len(each) for each in views])
        self._first_view = np.cumsum([0, *map(len, views[:-1])])

    def lay(self, regions: Sequence[PlannedRegion]) -> Layout | None:
        """The layout with these regions; None if one would need its own results."""
        blocks = self._blocks_of(regions)
        if blocks is None:
            return None
        items: list[Item] = []
        index = np.empty(len(self.order) + 1, dtype=np.int64)
        workspace: list[np.ndarray] = []
        placed: list[tuple[int, PlannedRegion]] = []
        for block in blocks:
            index[block.begin : block.end] = block.index + len(items)
            workspace.append(block.workspace)
            placed += [(len(items) + i, region) for i, region in block.regions]
            items += block.items
        index[-1] = END
        inside = np.concatenate(workspace) if workspace else np.zeros(0, dtype=np.int64)
        for i, region in placed:
            inside[i] = self._inside(region)
        spans = self._spans(index, len(items), placed)
        full = _running(spans.born, spans.dies, spans.size, len(items))
        outlives = spans.dies > spans.born
        crossing = _running(spans.born[outlives] + 1, spans.dies[outlives], spans.size[outlives], len(items))
        return Layout(items, self.place, index, full + inside, full, crossing)

    def held_at(self, layout: Layout, at: int) -> list[tuple[Node, int]]:
        """The values that exist in full while item `at` runs, with the bytes of their storages."""
        placed = [(i, item) for i, item in enumerate(layout.items) if isinstance(item, PlannedRegion)]
        spans = self._spans(layout.index, len(layout.items), placed)
        holder = dict(enumerate(self.order[maker] for maker in self._makers.tolist()))
        # A region's output lies in a storage of its own or takes a dead operand's.
        holder |= {storage: self.order[place] for i, place, storage in sorted(spans.outputs) if i <= at}
        live = np.flatnonzero((spans.born <= at) & (at <= spans.dies) & (spans.size > 0))
        return [(holder[storage], int(spans.size[storage])) for storage in live.tolist()]

    # --- schedule ---

    def _blocks_of(self, regions: Sequence[PlannedRegion]) -> list[_Block] | None:
        blocks: list[_Block] = []
        done = 0
        for begin, end, group in self._groups(regions):
            if group not in self._blocks:
                self._blocks[group] = self._scheduled(begin, end, group)
            block = self._blocks[group]
            if block is None:
                return None
            blocks += [self._untouched(done, begin), block]
            done = end
        return [*blocks, self._untouched(done, len(self.order))]

    def _groups(self, regions: Sequence[PlannedRegion]) -> list[tuple[int, int, tuple[PlannedRegion, ...]]]:
        """Regions whose spans overlap, with the span of all."""
        spans = sorted(((*self._span(region), i) for i, region in enumerate(regions)))
        groups: list[tuple[int, int, tuple[PlannedRegion, ...]]] = []
        for begin, end, i in spans:
            if groups and begin < groups[-1][1]:
                first, last, group = groups.pop()
                groups.append((first, max(last, end), (*group, regions[i])))
            else:
                groups.append((begin, end, (regions[i],)))
        return groups

    def _span(self, region: PlannedRegion) -> tuple[int, int]:
        members = self._boundary(region).members
        return int(members.min()), int(members.max()) + 1

    def _untouched(self, begin: int, end: int) -> _Block:
        return _Block(begin, end, list(self.order[begin:end]), np.arange(end - begin), self._workspace[begin:end], [])

    def _scheduled(self, begin: int, end: int, regions: Sequence[PlannedRegion]) -> _Block | None:
        """Program order with each region where its last member stands, each after all that it waits for."""
        import networkx  # a tenth of a second, and by now torch's capture has loaded it

        home: dict[Node, Item] = {member: region for region in regions for member in region.members}
        nodes = self.order[begin:end]
        order: networkx.DiGraph = networkx.DiGraph()
        last: dict[Item, int] = {}
        for place, node in enumerate(nodes, begin):
            item = home.get(node, node)
            last[item] = place
            sources = {home.get(o, o) for o in self.scene.operands[node] if self.place.get(o, -1) >= begin} - {item}
            order.add_node(item)
            order.add_edges_from((source, item) for source in sources)
        try:
            items = list(networkx.lexicographical_topological_sort(order, key=last.__getitem__))
        except networkx.NetworkXUnfeasible:
            return None
        position = {item: i for i, item in enumerate(items)}
        index = np.array([position[home.get(node, node)] for node in nodes], dtype=np.int64)
        workspace = [0 if isinstance(item, PlannedRegion) else self._workspace[self.place[item]] for item in position]
        placed = [(i, item) for item, i in position.items() if isinstance(item, PlannedRegion)]
        return _Block(begin, end, list(position), index, np.array(workspace, dtype=np.int64), placed)

    # --- lifetimes ---

    def _spans(self, index: np.ndarray, length: int, regions: list[tuple[int, PlannedRegion]]) -> "_Spans":
        """The items at which each storage that exists in full is born and dies."""
        if not len(self._makers):
            return _Spans(self._makers, self._makers, self._makers, [])
        home = np.full(len(self.order), -1)  # the region of each call
        for number, (_, region) in enumerate(regions):
            home[self._boundary(region).members] = number
        on_its_own = home < 0
        # A view that a region takes of an outside value keeps that alive for whoever uses it outside.
        outlasts = on_its_own[self._views] | (home[self._views] != home[self._maker_of_view])
        last_use = np.maximum.reduceat(index[self._users], self._first_user)
        born = index[self._makers]
        dies = np.maximum.reduceat(np.where(outlasts, last_use[self._views], -1), self._first_view)
        size = np.where(on_its_own[self._makers], self._nbytes, 0)
        outputs = self._add_outputs(regions, last_use, dies, size)
        return _Spans(born, np.minimum(dies, length - 1), size, outputs)

    def _add_outputs(
        self, regions: list[tuple[int, PlannedRegion]], last_use: np.ndarray, dies: np.ndarray, size: np.ndarray
    ) -> list[tuple[int, int, int]]:
        """What regions return: storages of their own, or those of sliced operands that die there. Gives (item, place, storage)."""
        taken: dict[int, int] = {}
        found: list[tuple[int, int, int]] = []
        for i, region in regions:
            boundary = self._boundary(region)
            donors: dict[tuple, list[int]] = {}
            for storage, layout in boundary.donors:
                storage = taken.get(storage, storage)
                if dies[storage] <= i:
                    donors.setdefault(layout, []).append(storage)
            for place, storage, layout, nbytes, is_partial in boundary.outputs:
                last = max(last_use[place], dies[storage])
                if not size[storage] and donors.get(layout):
                    taken[storage] = donors[layout].pop()
                if storage in taken:
                    storage = taken[storage]
                else:
                    size[storage] += nbytes * (region.count if is_partial else 1)
                dies[storage] = max(dies[storage], last)
                found.append((i, place, storage))
        return found

    def _boundary(self, region: PlannedRegion) -> _Boundary:
        if region not in self._boundaries:
            scene = self.scene
            outputs = []
            for node in escaping_members(scene, region):
                (key, *_), (tag, *_) = scene.keys[node], region.tags[node]
                if key in self._storage and tag is not None:
                    outputs.append((self.place[node], self._storage[key], scene.layout_of(node, tag), scene.bytes_of[node], tag.is_partial))
            members = np.array([self.place[member] for member in region.members], dtype=np.int64)
            donors = [(self._storage[scene.keys[o][0]], scene.layout_of(o, tag)) for o, tag in self._donors(region)]
            self._boundaries[region] = _Boundary(members, outputs, donors)
        return self._boundaries[region]

    def _donors(self, region: PlannedRegion) -> list[tuple[Node, Tag]]:
        """Outside values that are sliced, and nowhere in the region read whole."""
        inside = set(region.members)
        sliced: dict[Node, Tag] = {}
        whole: set[Node] = set()
        for member in region.members:
            for operand, tag in sliced_operands(self.scene, region, member):
                if operand.op != "call_function" or operand in inside or self.scene.keys[operand][0] not in self._storage:
                    continue
                if tag is None:
                    whole.add(operand)
                else:
                    sliced.setdefault(operand, tag)
        return [(operand, tag) for operand, tag in sliced.items() if operand not in whole]

    # --- inside regions ---

    def _inside(self, region: PlannedRegion) -> int:
        key = (region, region.count)
        if key not in self._insides:
            self._insides[key] = self.transient(region, region.count)
        return self._insides[key]

    def transient(self, region: PlannedRegion, count: int) -> int:
        """The peak inside the body for the longest of `count` slices."""
        units = hint(region.units)
        longest = ceil_div(units, count)
        position = {member: i for i, member in enumerate(region.members)}
        size: dict[int, int] = {}
        born: dict[int, int] = {}
        dies: dict[int, int] = {}
        made = {key for m in region.members for key in self.scene.keys[m]} - set(self.scene.outside_keys)
        outside = {
            key
            for m in region.members
            for o in self.scene.operands[m]
            if o not in position and o.op == "call_function"
            for key in self.scene.keys[o]
        }
        for i, member in enumerate(region.members):
            for tensor, key in zip(tensors_of(member.meta["val"]), self.scene.keys[member], strict=True):
                if key not in made or key in outside:
                    continue
                # What leaves the body is there until its end.
                last = max((position.get(user, len(position) - 1) for user in self.scene.users[member]), default=i)
                if key not in born:
                    born[key], dies[key] = i, i
                    size[key] = hint(tensor.untyped_storage().nbytes())
                dies[key] = max(dies[key], last)
        delta = np.zeros(len(position) + 2, dtype=np.int64)
        for key in born:
            nbytes = ceil_div(size[key] * longest, units)
            delta[born[key]] += nbytes
            delta[dies[key] + 1] -= nbytes
        tags = [first_tag(region.tags[member])[1] for member in region.members]
        views = {o for m in region.members for o in self.scene.operands[m] if o not in position}
        pairs = zip(region.members, tags, strict=True)
        scratch = [self.scene.slice_scratch(member, tag, longest, units, views) for member, tag in pairs]
        work = np.array(scratch, dtype=np.int64)
        return int((np.cumsum(delta)[: len(position)] + work).max(initial=0))


def _running(begin: np.ndarray, last: np.ndarray, size: np.ndarray, length: int) -> np.ndarray:
    """At each of `length` positions the sum of the sizes whose span, `begin` to `last`, holds it."""
    delta = np.zeros(length + 1, dtype=np.int64)
    np.add.at(delta, begin, size)
    np.subtract.at(delta, last + 1, size)
    return np.cumsum(delta)[:length]


def sliced_operands(scene: Scene, region: PlannedRegion, member: Node) -> Iterable[tuple[Node, Tag | None]]:
    """The operands of a member with the tag that its row asks of each."""
    seen: list[tuple[Node, Tag | None]] = []
    for output, tag in enumerate(region.tags[member]):
        assert tag is not None
        wanted = scene.backward(member, tag, region.units, output)
        if not isinstance(wanted, Refusal):
            seen += [(slot.node, want) for slot, want in wanted.items()]
    return seen


def escaping_members(scene: Scene, region: PlannedRegion) -> list[Node]:
    """Members whose value is used outside the region; views of outside values are left out, they stay outside for free."""
    inside = set(region.members)
    made = {key for m in region.members if scene.makes[m] for key in scene.keys[m]}
    return [m for m in region.members if any(u not in inside for u in scene.users[m]) and any(key in made for key in scene.keys[m])]
