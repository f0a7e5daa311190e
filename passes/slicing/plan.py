"""The plan: which calls run in which regions, in how many slices, so that the peak meets the budget.

Rounds over the hot spots (calls above the budget). At each, the widest good candidate wins: it must lower the spot, meet the
budget if any candidate does, clear the most hot calls, then take the fewest slices. A spot that no candidate lowers by 1 % is a
floor, and the budget rises to it: slicing elsewhere below a floor would only cost time.
"""

import bisect
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np

from ...ir import Node
from ...ir.infer import tensors_of
from ...ir.links import Refusal, Tag
from ...ir.links.sizes import Size, identity, quotient
from ...ir.liveness import format_bytes
from ...ir.symbols import ceil_div, hint
from .candidate import Axis, Candidate, Stop, is_getitem, sweep, trace
from .layout import Layout, Layouts, PlannedRegion
from .scene import Scene

_LEAST_GAIN = 0.01  # of the peak: below this a region or a further slice is not worth its time
_MAX_CUTS = 10
_FEW_UNITS = 8  # at capture: a batch or a few frames may go one by one, however many there are at a call
_MAX_TRIALS = 6  # candidates whose exact profile is computed; the estimate is seldom far off


@dataclass(frozen=True)
class Held:
    """A tensor that is live in full at the final peak, and what keeps it so."""

    node: Node
    nbytes: int
    reason: str


@dataclass
class Plan:
    """Regions in order, with the predicted peaks in bytes.

    `floor` is what these regions hold in full at their worst: the peak if every slice were infinitely thin. `limit` says of the
    region at the peak, if one is there, why it has no more slices.
    """

    regions: list[PlannedRegion]
    unsliced: int
    planned: int
    floor: int
    budget: int
    held: list[Held] = field(default_factory=list)
    order: list[Node] = field(default_factory=list)
    limit: str = ""

    @property
    def met(self) -> bool:
        return self.planned <= self.budget


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
        scene.reorder(list(scene.program_order))
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
        self.layouts = Layouts(scene)
        self.unsliced = int(self._settled().live.max(initial=0))
        self.budget = budget
        self.target = budget
        self._traced: dict[tuple[Node, int, object], Axis] = {}

    def plan(self) -> Plan:
        layout = self._settled()
        stuck: set[Node] = set()
        for _ in range(64):  # rounds; each makes progress or ends the loop
            self._look_at(layout)
            if not self._round(layout, stuck):
                break
            layout = self._settled()
        return self._result(self._writable(self._relaxed(layout)))

    def _settled(self) -> Layout:
        """The layout of the regions accepted so far."""
        layout = self.layouts.lay(self.regions)
        assert layout is not None, "an accepted region has been laid out before"
        return layout

    def _look_at(self, layout: Layout) -> None:
        """Candidates are sought in the order in which the calls run by now."""
        self.scene.reorder(layout.flat)

    # --- rounds ---

    def _round(self, layout: Layout, stuck: set[Node]) -> bool:
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

    def _hot_spots(self, layout: Layout) -> list[int]:
        """Positions above the target, worst first, one for each run of hot calls."""
        hot = layout.live > self.target
        edges = np.flatnonzero(np.diff(np.concatenate([[0], hot.astype(np.int8), [0]])))
        spots = [int(begin + layout.live[begin:end].argmax()) for begin, end in edges.reshape(-1, 2)]
        return sorted(spots, key=lambda i: (-int(layout.live[i]), i))

    def _treat(self, layout: Layout, spot: int) -> tuple[int, int] | None:
        """Lowers one hot spot: more slices for its region, or a new region. Returns the items touched, None if nothing helps."""
        item = layout.items[spot]
        if isinstance(item, PlannedRegion):
            return (spot, spot) if self._slice_finer(layout, spot, item) else self._new_region(layout, spot, item.members[-1])
        return self._new_region(layout, spot, item)

    def _slice_finer(self, layout: Layout, spot: int, region: PlannedRegion) -> bool:
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
                least = ceil_div(units, longest)
                if least <= most:
                    return max(2, _divisor(axis_units, least, most)) if units > 1 else None
        worthwhile = max(1, int(_LEAST_GAIN * now))
        count = min(most, max(2, ceil_div(transient, worthwhile)))
        count = _divisor(axis_units, count, most)
        gain = now - (full + ceil_div(transient * ceil_div(units, count), units))
        return count if gain >= worthwhile and count >= 2 else None

    # --- no slice more than it takes ---

    def _relaxed(self, layout: Layout) -> Layout:
        """The same peak in the fewest slices: counts were chosen for a budget that a floor elsewhere may have lifted since."""
        limit = max(self.budget, int(layout.live.max(initial=0)))
        for region in list(self.regions):
            room = limit - int(layout.full[layout.at(region.members[0])])
            if self.layouts.transient(region, 1) <= room:
                layout = self._without(region, layout, limit)
            if region in self.regions:
                least = bisect.bisect_left(range(2, region.count), True, key=lambda n: self.layouts.transient(region, n) <= room) + 2
                region.count = _divisor(region.units, least, region.count)
        return self._settled()

    def _without(self, region: PlannedRegion, layout: Layout, limit: int) -> Layout:
        """The layout with the members of `region` on their own again, if that keeps to the limit; else as it was."""
        regions = self.regions
        self._set_regions([r for r in regions if r is not region])
        freed = self.layouts.lay(self.regions)
        if freed is not None and freed.live.max() <= limit:
            return freed
        self._set_regions(regions)
        return layout

    def _set_regions(self, regions: list[PlannedRegion]) -> None:
        self.regions = regions
        self.region_of = {member: region for region in regions for member in region.members}

    def _writable(self, layout: Layout) -> Layout:
        """The layout without regions that cannot be written in the number of slices that they have come to."""
        for region in [r for r in self.regions if self._written[r] != r.count]:
            stop = self.refused(region)
            if stop is not None:
                self.stops.setdefault(stop.node, stop.refusal)
                self._set_regions([r for r in self.regions if r is not region])
        return self.layouts.lay(self.regions) or layout

    # --- candidates ---

    def _new_region(self, layout: Layout, spot: int, node: Node) -> tuple[int, int] | None:
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

    def _rank(self, layout: Layout, candidate: Candidate, count: int, peak: int) -> tuple:
        cleared = int((layout.live_at(candidate.members) > max(self.target, peak)).sum())
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

    def _candidates(self, layout: Layout, spot: int, node: Node) -> Iterable[Candidate]:
        position = self.scene.position[node]
        cuts = self._cuts(layout, spot, position)
        seen: set[tuple[object, frozenset]] = set()
        after = {node, *self.scene.users[node]}  # a member or none: whether they are traced changes no sweep
        for axis in self._axes_at(self.scene, node):
            fingerprint = (identity(axis.units), frozenset((value, tag.dim) for value, tag in axis.tags.items() if value not in after))
            if fingerprint in seen:
                continue
            seen.add(fingerprint)
            for cut, base in cuts:
                stops: list[Stop] = []
                yield from sweep(self.scene, axis, cut, position, base, self.kinds, stops=stops)
                for stop in stops:
                    self.stops.setdefault(stop.node, stop.refusal)

    def _axes_at(self, scene: Scene, node: Node) -> Iterable[Axis]:
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
            values.sort(key=lambda v: -scene.bytes_of[v])
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

    def _cuts(self, layout: Layout, spot: int, position: int) -> list[tuple[int, int]]:
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

    def _accept(self, layout: Layout, candidate: Candidate, count: int) -> tuple[int, int] | None:
        """Lays the region if the exact profile confirms that it helps."""
        swallowed = {self.region_of[m] for m in candidate.members if m in self.region_of}
        around = {*layout.flat[candidate.first : candidate.last + 1], *(m for r in swallowed for m in r.members)}
        before_regions = self.regions
        before = layout.live_at(around).max()
        region = PlannedRegion(candidate.units, count, candidate.members, candidate.tags, self.fixed_length)
        self._set_regions([*(r for r in before_regions if r not in swallowed), region])
        fresh = self.layouts.lay(self.regions)
        helps = fresh is not None and fresh.live.max() <= layout.live.max() and fresh.live_at(around).max() < before
        stop = self.refused(region) if helps else None
        if stop is not None:
            self.stops.setdefault(stop.node, stop.refusal)
        elif helps:
            self._written[region] = count
            touched = [layout.at(node) for node in around]
            return min(touched), max(touched)
        self._set_regions(before_regions)
        return None

    # --- result ---

    def _result(self, layout: Layout) -> Plan:
        planned = int(layout.live.max(initial=0))
        floor = int(layout.full.max(initial=0))
        ordered = [item for item in layout.items if isinstance(item, PlannedRegion)]
        return Plan(ordered, self.unsliced, planned, floor, self.budget, self._held(layout), layout.flat, self._limit(layout, ordered))

    def _limit(self, layout: Layout, regions: list[PlannedRegion]) -> str:
        at = int(layout.live.argmax()) if len(layout.live) else 0
        item = layout.items[at] if layout.items else None
        if not isinstance(item, PlannedRegion):
            return ""
        units, inside = hint(item.units), int(layout.live[at] - layout.full[at])
        if item.count == units:
            why = "a slice is one unit, n = N"
        elif item.count >= self.max_slices:
            why = f"n is at max_slices={self.max_slices}"
        elif not isinstance(item.units, int) and item.count >= units // 2:
            why = "a slice is two units, the least where N is known at the call only"
        else:
            why = "more slices would gain less than 1 %"
        return f"region {regions.index(item)} has {format_bytes(inside)} of slices there: {why}"

    def _held(self, layout: Layout) -> list[Held]:
        """The tensors live in full at the peak, with the reason."""
        if not len(layout.live):
            return []
        at = int(layout.live.argmax())
        held = [Held(node, nbytes, self._reason(layout, node, at)) for node, nbytes in self.layouts.held_at(layout, at)]
        return sorted(held, key=lambda h: (-h.nbytes, layout.at(h.node)))

    def _reason(self, layout: Layout, node: Node, at: int) -> str:
        """Why `node` is live in full at item `at`: who needs it there, and what keeps that from reading it slice by slice."""
        readers, views = self._readers(node)
        users = [u for u in readers if layout.at(u) >= at]
        if any(u.op == "output" for u in users):
            return "it is an output"
        here = [u for u in users if layout.at(u) == at]
        if not here:
            last = max(users, key=lambda u: layout.at(u))
            stop = next((self.stops[u] for u in (*users, *views) if u in self.stops), None)
            why = f"; {stop.reason}: {stop.detail}" if stop is not None else ""
            later = layout.at(last) - at
            return f"kept for {last.target} at {last.meta.get('where') or '?'}, {later} call{'s' if later > 1 else ''} later{why}"
        stop = next((self.stops[u] for u in (node, *here, *views) if u in self.stops), None)
        if isinstance(layout.items[at], PlannedRegion):
            why = f"; {stop.reason}: {stop.detail}" if stop is not None else ""
            return f"a region reads its slices, and it is made outside of it{why}"
        stop = stop or self._refusal(node, here)
        user = here[0]
        why = f"; {stop.reason}: {stop.detail}" if stop is not None else ", which no region made cheaper"
        return f"read by {user.target} at {user.meta.get('where') or '?'}{why}"

    def _readers(self, node: Node) -> tuple[list[Node], list[Node]]:
        """Who reads the memory of a value (itself if nobody does), and the views through which it is read."""
        readers: list[Node] = []
        views: list[Node] = []
        pending, seen = [node], {node}
        while pending:
            for user in self.scene.users[pending.pop()]:
                if user in seen:
                    continue
                seen.add(user)
                if user.op == "call_function" and self._is_view(user, node) and self.scene.users[user]:
                    pending.append(user)
                    views.append(user)
                else:
                    readers.append(user)
        return sorted(readers, key=self.scene.at) or [node], views

    def _is_view(self, user: Node, node: Node) -> bool:
        return not self.scene.makes[user] and not set(self.scene.keys[node]).isdisjoint(self.scene.keys[user])

    def _refusal(self, node: Node, users: Sequence[Node]) -> Refusal | None:
        """What the first of `users` says that lets no dim of `node` through."""
        for user in users:
            read = [o for o in self.scene.operands.get(user, ()) if o is node or (o.op == "call_function" and self._is_view(o, node))]
            values = tensors_of(read[0].meta["val"]) if read else []
            if len(values) != 1 or is_getitem(user):
                continue
            sizes = [(dim, size) for dim, size in enumerate(values[0].shape) if hint(size) > 1]
            answers = [self.scene.forward(user, read[0], Tag(dim), size) for dim, size in sizes]
            refusals = [answer for answer in answers if isinstance(answer, Refusal)]
            if refusals and len(refusals) == len(answers):
                return refusals[0]
        return None


def _divisor(units: Size, least: int, most: int) -> int:
    """The next divisor of N within 1.25 x `least`, else `least`: equal slices need one kernel shape, not two."""
    if not isinstance(units, int):
        return least
    for count in range(least, min(most, int(1.25 * least) + 1) + 1):
        if units % count == 0:
            return count
    return least


__all__ = ["Held", "Plan", "PlannedRegion", "Planner"]
