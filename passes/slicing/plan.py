"""The plan: which calls run in which regions, in how many slices, so that the peak meets the budget.

Rounds over the hot spots (calls above the budget). At each, the widest good candidate wins: it must lower the spot, meet the
budget if any candidate does, clear the most hot calls, then take the fewest slices. A spot that no candidate lowers by 1 % is a
floor, and the budget rises to it: slicing elsewhere below a floor would only cost time.
"""

import bisect
import heapq
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from ...ir import Node
from ...ir.infer import tensors_of
from ...ir.links import Refusal, Tag
from ...ir.links.sizes import Size, identity, quotient
from ...ir.symbols import ceil_div, hint
from .candidate import Axis, Candidate, Stop, layout_of, sweep, trace
from .scene import END, Scene, value_bytes

_LEAST_GAIN = 0.01  # of the peak: below this a region or a further slice is not worth its time
_MAX_CUTS = 10
_FEW_UNITS = 8  # at capture: a batch or a few frames may go one by one, however many there are at a call
_MAX_TRIALS = 6  # candidates whose exact profile is computed; the estimate is seldom far off


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


@dataclass(frozen=True)
class Held:
    """A tensor that is live in full at the final peak, and what keeps it so."""

    node: Node
    nbytes: int
    reason: str


@dataclass
class Plan:
    """Regions in order, with the predicted peaks in bytes. `floor` is the peak if every slice were infinitely thin."""

    regions: list[PlannedRegion]
    unsliced: int
    planned: int
    floor: int
    budget: int
    held: list[Held] = field(default_factory=list)
    order: list[Node] = field(default_factory=list)

    @property
    def met(self) -> bool:
        return self.planned <= self.budget


@dataclass
class _Layout:
    """The schedule with regions as single items, and the bytes live at each."""

    items: list["Node | PlannedRegion"]
    index: dict[Node, int]
    live: np.ndarray
    full: np.ndarray  # without what is inside regions
    crossing: np.ndarray  # bytes live across the cut before each item
    flat: list[Node]
    flat_of_item: list[int]


class Planner:
    """Makes one plan for one function.

    `fixed_length`: over an axis known at the call only, keep the length of a slice, not their number. `refused` says of a region
    why it cannot be written, None if it can.
    """

    def __init__(
        self,
        scene: Scene,
        budget: int,
        max_slices: int,
        kinds: frozenset[str],
        explicit: Sequence[tuple[Node, int]] = (),
        fixed_length: bool = False,
        refused: Callable[[PlannedRegion], Stop | None] = lambda region: None,
    ):
        self.scene = scene
        self.fixed_length = fixed_length
        self.refused = refused
        self.max_slices = max_slices
        self.kinds = kinds
        self.explicit = explicit
        self.regions: list[PlannedRegion] = []
        self.region_of: dict[Node, PlannedRegion] = {}
        self.stops: dict[Node, Refusal] = {}
        self._written: dict[PlannedRegion, int] = {}  # the number of slices in which `refused` had nothing against it
        self._insides: dict[tuple[PlannedRegion, int], int] = {}
        self._order = list(scene.nodes)
        self.unsliced = int(self._layout().live.max(initial=0))
        self.budget = budget
        self.target = budget
        self._traced: dict[tuple[Node, int, object], Axis] = {}

    def plan(self) -> Plan:
        layout = self._layout()
        stuck: set[Node] = set()
        for _ in range(64):  # rounds; each makes progress or ends the loop
            if not self._round(layout, stuck):
                break
            layout = self._layout()
        return self._result(self._writable(self._relaxed(layout)))

    # --- rounds ---

    def _round(self, layout: _Layout, stuck: set[Node]) -> bool:
        """Works on each hot spot once; whether anything changed."""
        changed = False
        touched = np.zeros(len(layout.items), dtype=bool)
        for spot in self._hot_spots(layout):
            if touched[spot] or layout.live[spot] <= self.target:
                continue
            item = layout.items[spot]
            anchor = item.members[0] if isinstance(item, PlannedRegion) else item
            if anchor in stuck:
                continue
            window = self._treat(layout, spot)
            if window is None:
                stuck.add(anchor)
                self.target = max(self.target, int(layout.live[spot]))
                continue
            touched[window[0] : window[1] + 1] = True
            changed = True
        return changed

    def _hot_spots(self, layout: _Layout) -> list[int]:
        """Positions above the target, worst first, one for each run of hot calls."""
        hot = layout.live > self.target
        edges = np.flatnonzero(np.diff(np.concatenate([[0], hot.astype(np.int8), [0]])))
        spots = [int(begin + layout.live[begin:end].argmax()) for begin, end in edges.reshape(-1, 2)]
        return sorted(spots, key=lambda i: (-int(layout.live[i]), i))

    def _treat(self, layout: _Layout, spot: int) -> tuple[int, int] | None:
        """Lowers one hot spot: more slices for its region, or a new region. Returns the items touched, None if nothing helps."""
        item = layout.items[spot]
        if isinstance(item, PlannedRegion):
            return (spot, spot) if self._slice_finer(layout, spot, item) else self._new_region(layout, spot, item.members[-1])
        return self._new_region(layout, spot, item)

    def _slice_finer(self, layout: _Layout, spot: int, region: PlannedRegion) -> bool:
        inside = int(layout.live[spot] - layout.full[spot])
        whole = inside * hint(region.units) // region.longest
        count = self._count_for(region.units, int(layout.full[spot]), whole, int(layout.live[spot]))
        if count is None or count <= region.count:
            return False
        region.count = count
        return True

    def _count_for(self, axis_units: Size, full: int, transient: int, now: int) -> int | None:
        """The least good number of slices that meets the target, else the one beyond which little is gained; None if none helps."""
        units = hint(axis_units)
        most = min(units, self.max_slices)
        if not isinstance(axis_units, int) and not self.fixed_length and units > _FEW_UNITS:
            most = min(most, units // 2)  # a fixed n needs slices of two units and more at capture
        room = self.target - full
        if room > 0:
            longest = room * units // transient if transient else units
            if longest >= 1:
                least = -(-units // longest)
                if least <= most:
                    return max(2, _divisor(axis_units, least, most)) if units > 1 else None
        worthwhile = max(1, int(_LEAST_GAIN * now))
        count = min(most, max(2, -(-transient // worthwhile)))
        count = _divisor(axis_units, count, most)
        gain = now - (full + -(-transient * -(-units // count) // units))
        return count if gain >= worthwhile and count >= 2 else None

    # --- no slice more than it takes ---

    def _relaxed(self, layout: _Layout) -> _Layout:
        """The same peak in the fewest slices: counts were chosen for a budget that a floor elsewhere may have lifted since."""
        limit = max(self.budget, int(layout.live.max(initial=0)))
        for region in list(self.regions):
            room = limit - int(layout.full[layout.index[region.members[0]]])
            if self._transient(region, 1) <= room:
                layout = self._without(region, layout, limit)
            if region in self.regions:
                least = bisect.bisect_left(range(2, region.count), True, key=lambda n: self._transient(region, n) <= room) + 2
                region.count = _divisor(region.units, least, region.count)
        settled = self._layout()
        assert settled is not None, "counts do not change the order"
        return settled

    def _without(self, region: PlannedRegion, layout: _Layout, limit: int) -> _Layout:
        """The layout with the members of `region` on their own again, if that keeps to the limit; else as it was."""
        regions = self.regions
        self._set_regions([r for r in regions if r is not region])
        freed = self._layout()
        if freed is not None and freed.live.max() <= limit:
            return freed
        self._set_regions(regions)
        return layout

    def _set_regions(self, regions: list[PlannedRegion]) -> None:
        self.regions = regions
        self.region_of = {member: region for region in regions for member in region.members}

    def _writable(self, layout: _Layout) -> _Layout:
        """The layout without regions that cannot be written in the number of slices that they have come to."""
        for region in [r for r in self.regions if self._written[r] != r.count]:
            stop = self.refused(region)
            if stop is not None:
                self.stops.setdefault(stop.node, stop.refusal)
                self._set_regions([r for r in self.regions if r is not region])
        return self._layout() or layout

    # --- candidates ---

    def _new_region(self, layout: _Layout, spot: int, node: Node) -> tuple[int, int] | None:
        now = int(layout.live[spot])
        ranked: list[tuple[tuple, int, Candidate, int]] = []
        for candidate in self._candidates(layout, spot, node):
            count = self._count_for(candidate.units, candidate.base + candidate.escaping, candidate.transient, now)
            if count is None:
                continue
            peak = candidate.peak(count)
            if now - peak < _LEAST_GAIN * now:
                continue
            ranked.append((self._rank(layout, candidate, count, peak), len(ranked), candidate, count))
        trials: dict[tuple, tuple[Candidate, int]] = {}
        for _, _, candidate, count in sorted(ranked, key=lambda trial: trial[:2]):
            key = candidate.members[0], candidate.members[-1], len(candidate.members), identity(candidate.units)
            trials.setdefault(key, (candidate, count))
        for candidate, count in list(trials.values())[:_MAX_TRIALS]:
            window = self._accept(layout, candidate, count)
            if window is not None:
                return window
        return None

    def _rank(self, layout: _Layout, candidate: Candidate, count: int, peak: int) -> tuple:
        lived = layout.live[[layout.index[member] for member in candidate.members]]
        cleared = int((lived > max(self.target, peak)).sum())
        met = peak <= self.target
        inside = set(candidate.members)
        overlapped = {self.region_of[member] for member in candidate.members if member in self.region_of}
        dissolves = any(not inside.issuperset(region.members) for region in overlapped)
        return (
            dissolves,
            not met,
            0 if met else peak,
            -cleared,
            count * candidate.weight_bytes + count * len(candidate.members) * 2**14,
            len(candidate.members),
        )

    def _candidates(self, layout: _Layout, spot: int, node: Node) -> Iterable[Candidate]:
        flat_scene = self._reordered(layout)
        position = flat_scene.position[node]
        cuts = self._cuts(layout, spot, position)
        seen: set[tuple[object, frozenset]] = set()
        for axis in self._axes_at(flat_scene, layout, node):
            fingerprint = (identity(axis.units), frozenset((value, tag.dim) for value, tag in axis.tags.items()))
            if fingerprint in seen:
                continue
            seen.add(fingerprint)
            for cut, base in cuts:
                stops: list[Stop] = []
                yield from sweep(flat_scene, axis, cut, position, base, self.kinds, stops=stops)
                for stop in stops:
                    self.stops.setdefault(stop.node, stop.refusal)

    def _reordered(self, layout: _Layout) -> Scene:
        self.scene.nodes = layout.flat
        self.scene.position = {node: i for i, node in enumerate(layout.flat)}
        return self.scene

    def _axes_at(self, scene: Scene, layout: _Layout, node: Node) -> Iterable[Axis]:
        """The axes of the values that weigh at `node`: its results and operands, every dim, with coarser units where asked."""
        if self.explicit:
            choices = [(value, dim) for value, dim in self.explicit]
        else:
            around = [node, *scene.operands[node], *scene.users[node]]
            values = [
                v
                for v in around
                if v.op == "call_function" and len(tensors_of(v.meta["val"])) == 1 and not isinstance(v.meta["val"], tuple)
            ]
            values.sort(key=lambda v: -value_bytes(v))
            choices = [(v, d) for v in values[:6] for d in range(v.meta["val"].dim())]
        for value, dim in choices:
            size = value.meta["val"].size(dim)
            yield from self._axes(scene, value, dim, size)

    def _axes(self, scene: Scene, value: Node, dim: int, size: Size) -> Iterable[Axis]:
        tried: set[object] = set()
        pending = [size]
        while pending and len(tried) < 3:
            units = pending.pop()
            unit = quotient(size, units)
            if identity(units) in tried or hint(units) < 2 or unit is None or not scene.sizes.knows(units):
                continue
            tried.add(identity(units))
            key = (value, dim, identity(units))
            if key not in self._traced:
                axis, stops = trace(scene, value, Tag(dim, unit), units)
                self._traced[key] = axis
                retry = {identity(n): n for s in stops if s.refusal.reason == "unit" and (n := s.refusal.retry_units) is not None}
                pending += sorted(retry.values(), key=str)
            yield self._traced[key]

    def _cuts(self, layout: _Layout, spot: int, position: int) -> list[tuple[int, int]]:
        """Flat positions before which a region may start, with the bytes that cross there: where the fewest do, near and far."""
        low = max(0, spot - 300)
        window = np.arange(low, spot + 1)
        crossing = layout.crossing[low : spot + 1]
        order = window[np.lexsort((-window, crossing))]
        chosen = list(order[: _MAX_CUTS - 4])
        for near in (8, 24, 64, 160):  # the best cut near the spot too: a far one may be cheaper but out of reach of the axis
            part = window[max(0, len(window) - near) :]
            chosen.append(int(part[int(layout.crossing[part].argmin())]))
        chosen += range(max(low, spot - 2), spot + 1)  # right before the spot: what it needs whole stays outside
        cuts = {layout.flat_of_item[int(i)]: int(layout.crossing[int(i)]) for i in chosen}
        item = layout.items[spot]
        if isinstance(item, PlannedRegion):
            cuts |= self._cuts_inside(item, layout.flat_of_item[spot], int(layout.crossing[spot]))
        return sorted((cut, base) for cut, base in cuts.items() if cut <= position)

    def _cuts_inside(self, region: PlannedRegion, start: int, outside: int) -> dict[int, int]:
        """Cuts between the members of a region that another might replace: what crosses there is at full size then."""
        place = {member: i for i, member in enumerate(region.members)}
        crossing = np.zeros(len(region.members) + 1, dtype=np.int64)
        for member, i in place.items():
            last = max((place.get(user, len(place)) for user in self.scene.users[member]), default=i)
            if self.scene.makes[member]:
                crossing[i + 1 : last + 1] += self.scene.makes[member]
        best = [*(np.argsort(crossing[1:-1], kind="stable")[: _MAX_CUTS - 4] + 1), len(place) - 1]
        return {start + int(i): outside + int(crossing[i]) for i in best}

    def _accept(self, layout: _Layout, candidate: Candidate, count: int) -> tuple[int, int] | None:
        """Lays the region if the exact profile confirms that it helps."""
        swallowed = {self.region_of[m] for m in candidate.members if m in self.region_of}
        around = {*layout.flat[candidate.first : candidate.last + 1], *(m for r in swallowed for m in r.members)}
        before_regions = self.regions
        before = int(max(layout.live[layout.index[node]] for node in around))
        region = PlannedRegion(candidate.units, count, candidate.members, candidate.tags, self.fixed_length)
        self._set_regions([*(r for r in before_regions if r not in swallowed), region])
        fresh = self._layout()
        helps = fresh is not None and fresh.live.max() <= layout.live.max() and max(fresh.live[fresh.index[n]] for n in around) < before
        stop = self.refused(region) if helps else None
        if stop is not None:
            self.stops.setdefault(stop.node, stop.refusal)
        elif helps:
            self._written[region] = count
            touched = [layout.index[node] for node in around]
            return min(touched), max(touched)
        self._set_regions(before_regions)
        return None

    # --- layout ---

    def _layout(self) -> _Layout | None:
        items = self._schedule()
        if items is None:
            return None
        index: dict[Node, int] = {}
        flat: list[Node] = []
        flat_of_item: list[int] = []
        for i, item in enumerate(items):
            flat_of_item.append(len(flat))
            members = item.members if isinstance(item, PlannedRegion) else (item,)
            for member in members:
                index[member] = i
            flat += members
        full = np.zeros(len(items), dtype=np.int64)
        delta = np.zeros(len(items) + 2, dtype=np.int64)
        cross = np.zeros(len(items) + 2, dtype=np.int64)
        for born, dies, nbytes in self._lifetimes(items, index):
            delta[born] += nbytes
            delta[min(dies, len(items) - 1) + 1] -= nbytes
            if dies > born:
                cross[born + 1] += nbytes
                cross[min(dies, len(items) - 1) + 1] -= nbytes
        full = np.cumsum(delta)[: len(items)]
        inside = np.array([self._inside(item) for item in items], dtype=np.int64)
        return _Layout(items, index, full + inside, full, np.cumsum(cross)[: len(items)], flat, flat_of_item)

    def _schedule(self) -> list["Node | PlannedRegion"] | None:
        """Program order with each region where its last member stands; None if a region would need its own results.

        A region waits for all its operands; what depends on an early member waits for the region.
        """
        home: dict[Node, Node | PlannedRegion] = dict(self.region_of)
        original = self._order
        place = {node: i for i, node in enumerate(original)}
        waits: dict[Node | PlannedRegion, set[Node | PlannedRegion]] = {}
        followers: dict[Node | PlannedRegion, list[Node | PlannedRegion]] = {}
        key: dict[Node | PlannedRegion, int] = {}
        for node in original:
            item = home.get(node, node)
            key[item] = place[node]
            sources = {home.get(o, o) for o in self.scene.operands[node] if o.op == "call_function"} - {item}
            for source in sources - waits.setdefault(item, set()):
                followers.setdefault(source, []).append(item)
            waits[item] |= sources
        ready = [(key[item], item) for item, sources in waits.items() if not sources]
        heap = [(k, i) for i, (k, _) in enumerate(ready)]
        heapq.heapify(heap)
        arrived = [item for _, item in ready]
        left = {item: len(sources) for item, sources in waits.items()}
        items: list[Node | PlannedRegion] = []
        while heap:
            item = arrived[heapq.heappop(heap)[1]]
            items.append(item)
            for follower in followers.get(item, ()):
                left[follower] -= 1
                if left[follower] == 0:
                    arrived.append(follower)
                    heapq.heappush(heap, (key[follower], len(arrived) - 1))
        return items if len(items) == len(waits) else None

    def _lifetimes(self, items: Sequence["Node | PlannedRegion"], index: dict[Node, int]) -> Iterable[tuple[int, int, int]]:
        """(born, dies, bytes) of each storage that exists in full."""
        born: dict[int, int] = {}
        dies: dict[int, int] = {}
        size: dict[int, int] = {}
        aliases: dict[int, int] = {}
        for i, item in enumerate(items):
            if isinstance(item, PlannedRegion):
                self._region_lifetimes(item, i, index, born, dies, size, aliases)
                continue
            last = max((index.get(u, END) for u in self.scene.users[item]), default=i)
            for tensor, key in zip(tensors_of(item.meta["val"]), self.scene.keys[item], strict=True):
                key = aliases.get(key, key)
                if key in self.scene.outside_keys:
                    continue
                if key not in born:
                    born[key], dies[key], size[key] = i, i, hint(tensor.untyped_storage().nbytes())
                dies[key] = max(dies[key], last)
        return [(born[key], dies[key], size[key]) for key in born]

    def _region_lifetimes(self, region: PlannedRegion, i: int, index: dict, born: dict, dies: dict, size: dict, aliases: dict) -> None:
        outputs = escaping_members(self.scene, region)
        donors = self._donors(region, i, index, dies, aliases)
        for node in outputs:
            last = max((index.get(u, END) for u in self.scene.users[node]), default=i)
            key = self.scene.keys[node][0]
            if key in self.scene.outside_keys:
                continue
            tag = region.tags[node][0]
            layout = layout_of(node, tag)
            if key not in born and donors.get(layout):
                aliases[key] = donors[layout].pop()
                dies[aliases[key]] = max(dies[aliases[key]], last)
                continue
            if key in aliases:
                dies[aliases[key]] = max(dies[aliases[key]], last)
                continue
            if key not in born:
                born[key], dies[key], size[key] = i, i, 0
            size[key] += value_bytes(node)
            dies[key] = max(dies[key], last)

    def _donors(self, region: PlannedRegion, i: int, index: dict, dies: dict, aliases: dict) -> dict[tuple, list[int]]:
        """Storages of sliced operands that die at this region, by layout."""
        inside = set(region.members)
        donors: dict[tuple, list[int]] = {}
        seen: set[Node] = set()
        for member in region.members:
            for operand, tag in sliced_operands(self.scene, region, member):
                if operand in seen or operand in inside or operand.op != "call_function" or tag is None:
                    continue
                seen.add(operand)
                key = self.scene.keys[operand][0]
                key = aliases.get(key, key)
                if key in dies and dies[key] <= i and key not in self.scene.outside_keys and not self._passed_whole(region, operand):
                    donors.setdefault(layout_of(operand, tag), []).append(key)
        return donors

    def _passed_whole(self, region: PlannedRegion, operand: Node) -> bool:
        for member in region.members:
            if operand in self.scene.operands[member]:
                if any(o is operand and tag is None for o, tag in sliced_operands(self.scene, region, member)):
                    return True
        return False

    def _inside(self, item: "Node | PlannedRegion") -> int:
        """Bytes that an item needs besides storages that exist in full."""
        if not isinstance(item, PlannedRegion):
            return self.scene.workspace_of[item].total
        # Every trial lays out every region anew, but what is inside one depends on its members and count alone.
        key = (item, item.count)
        if key not in self._insides:
            self._insides[key] = self._transient(item, item.count)
        return self._insides[key]

    def _transient(self, region: PlannedRegion, count: int) -> int:
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
                last = max((position[u] for u in self.scene.users[member] if u in position), default=i)
                if key not in born:
                    born[key], dies[key] = i, i
                    size[key] = hint(tensor.untyped_storage().nbytes())
                dies[key] = max(dies[key], last)
        delta = np.zeros(len(position) + 2, dtype=np.int64)
        for key in born:
            nbytes = ceil_div(size[key] * longest, units)
            delta[born[key]] += nbytes
            delta[dies[key] + 1] -= nbytes
        scratch = [self.scene.workspace_of[m] for m in region.members]
        work = np.array([w.moving * longest // units + w.fixed for w in scratch], dtype=np.int64)
        return int((np.cumsum(delta)[: len(position)] + work).max(initial=0))

    # --- result ---

    def _result(self, layout: _Layout) -> Plan:
        planned = int(layout.live.max(initial=0))
        floor = int(layout.full.max(initial=0))
        ordered = [item for item in layout.items if isinstance(item, PlannedRegion)]
        return Plan(ordered, self.unsliced, planned, floor, self.budget, self._held(layout), layout.flat)

    def _held(self, layout: _Layout) -> list[Held]:
        """The tensors live in full at the peak, with the reason."""
        if not len(layout.live):
            return []
        at = int(layout.live.argmax())
        held: dict[int, Held] = {}
        for node in layout.flat:
            born = layout.index[node]
            if born > at or (self.region_of.get(node) is not None and node not in escaping_members(self.scene, self.region_of[node])):
                continue
            last = max((layout.index.get(u, END) for u in self.scene.users[node]), default=born)
            if last < at or not self.scene.makes[node]:
                continue
            held[id(node)] = Held(node, value_bytes(node), self._reason(layout, node, at))
        return sorted(held.values(), key=lambda h: -h.nbytes)

    def _reason(self, layout: _Layout, node: Node, at: int) -> str:
        users = [u for u in self.scene.users[node] if layout.index.get(u, END) >= at]
        if any(u.op == "output" for u in users):
            return "it is an output"
        last = max(users, key=lambda u: layout.index.get(u, END))
        where = str(last.meta.get("where") or "")
        stop = next((self.stops[u] for u in users if u in self.stops), None)
        if stop is not None:
            return f"{stop.reason}: {stop.detail}"
        for user in users:
            for dim in range(node.meta["val"].dim()):
                size = node.meta["val"].size(dim)
                if hint(size) > 1:
                    tags = self.scene.forward(user, node, Tag(dim), size)
                    if isinstance(tags, Refusal) and tags.reason in ("barrier", "reduced", "halo", "no-row", "sym-unproved"):
                        return f"{tags.reason}: {tags.detail} ({where})"
        return f"kept for {last.target} at {where}, {layout.index.get(last, END) - at} calls later"


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


def _divisor(units: Size, least: int, most: int) -> int:
    """The next divisor of N within 1.25 x `least`, else `least`: equal slices need one kernel shape, not two."""
    if not isinstance(units, int):
        return least
    for count in range(least, min(most, int(1.25 * least) + 1) + 1):
        if units % count == 0:
            return count
    return least


__all__ = ["Held", "Plan", "PlannedRegion", "Planner", "escaping_members", "sliced_operands"]
