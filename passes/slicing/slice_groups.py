"""slice-groups: groups of operations run slice by slice, so that what lies between them exists at slice size only.

    a; b; c                      -> gw.sliced(body = a; b; c)            over an axis that all of them carry
    group_norm(x)                -> norm_apply(x, norm_stats(x))         where the axis is normalised over (exact, Chan's merge)
    attention(q, k, v, causal)   -> causal_attention(q, k, v, rows)      where queries are sliced

Exact: the same sums over the same elements, except that GroupNorm statistics are merged from partial ones.
Source: "Fast and Memory-Efficient Video Diffusion Using Streamlined Inference" (NeurIPS 2024, arXiv 2411.01171): feature slicer and
operator grouping. Its released code takes GroupNorm statistics per slice; this pass does not.
"""

from dataclasses import dataclass, replace
from typing import Any

import torch

from ...ir import Node, Rewriter, SymbolTable
from ...ir.errors import BudgetError, PassError
from ...ir.infer import tensors_of
from ...ir.liveness import format_bytes, profile
from ...ir.printer import named_values
from ...ir.symbols import hint
from ..base import LeftAlone, Outcome, Pass
from ..contract import Contract
from ..options import at_least, is_share, is_size, option, share, size_in_bytes
from .body import parted, unwritable
from .candidate import Stop
from .emit import emit
from .plan import Plan, PlannedRegion, Planner
from .prepare import Prepared, prepare
from .scene import Scene

KINDS = ("rows", "query", "features")
_FEW_CALLS = 2000  # up to here a second plan is worth its time: it gained up to 14 % there, and nothing at 3,801 and 5,091 calls


def _is_budget(value: Any) -> bool:
    if isinstance(value, float):
        return 0 < value <= 1
    # 25 is meant as 25 %, not as 25 bytes; who means bytes writes "25B".
    return is_size(value) and not (isinstance(value, int) and value <= 100) or (is_share(value) and 0 < share(value) <= 1)


def _are_axes(value: Any) -> bool:
    if not isinstance(value, tuple) or not value:
        return False
    return all(axis in KINDS if isinstance(axis, str) and ":" not in axis else _place(axis) is not None for axis in value)


def _place(axis: Any) -> tuple[str, int] | None:
    """("x", 2) or "x:2" -> ("x", 2); None for anything else."""
    if isinstance(axis, str):
        name, _, digits = axis.rpartition(":")
        return (name, int(digits)) if name and digits.isdecimal() else None
    if not isinstance(axis, tuple) or len(axis) != 2:
        return None
    name, dim = axis
    is_dim = isinstance(dim, int) and not isinstance(dim, bool) and dim >= 0
    return (name, dim) if isinstance(name, str) and name and is_dim else None


@dataclass(frozen=True)
class SliceGroups(Pass):
    """Lowers the peak of activation memory to `memory_budget` by running groups of operations slice by slice.

    `memory_budget`: bytes, text such as "512MiB", or a share of the predicted unsliced peak ("25%", 0.25). A budget that cannot be
    met gives the nearest reachable plan and a line that says what stands in the way; with `insist` it is a BudgetError.
    Over a size known at the call only, a share fixes the number of slices and bytes fix their length, as planned for the sizes of
    capture. `max_slices`: the most slices of one region (at capture, where the length is fixed). `axes`: kinds of links that may
    be cut ("rows", "query", "features"), or places where an axis starts: ("sample", 2), also spelled "sample:2", is dim 2 of an
    input; ("%12", 0) is dim 0 of a value as the text of the program before this pass numbers it.
    """

    name = "slice-groups"
    rules = ("outline-region", "split-group-norm", "attention-rows")
    contract = Contract.EXACT
    ensures = frozenset({"sliced"})
    after = frozenset({"fold-batch-norm", "fold-constants", "share-subexpressions"})

    memory_budget: Any = option(
        "25%", 'a share such as "25%" or 0.25, or a size such as "512MiB" (bytes as a number from 101 on)', _is_budget
    )
    max_slices: int = option(64, "an integer of at least 1", at_least(1))
    axes: tuple[str | tuple[str, int], ...] = option(
        ("rows", "query"), f'a tuple of some of {", ".join(KINDS)}, or of places such as "sample:2" or ("%12", 0)', _are_axes
    )
    insist: bool = option(False, "true or false", lambda value: isinstance(value, bool))

    def run(self, rewriter: Rewriter) -> Outcome:
        before = profile(rewriter.function)
        budget = self.budget_bytes(before.peak_bytes)
        prepared = prepare(rewriter.program, rewriter.function.name)
        spelled_out = prepared.program.functions[rewriter.function.name]
        kinds = frozenset(axis for axis in self.axes if axis in KINDS) or frozenset({"rows", "query"})
        scene = Scene.of(spelled_out)
        places = self._places(rewriter, prepared)

        def refused(region: PlannedRegion) -> Stop | None:
            return parted(prepared, region) or (unwritable(prepared, region) if len(rewriter.symbols) else None)

        def planned(target: int) -> Plan:
            return Planner(scene, target, self.max_slices, kinds, places, not self._is_share, refused).plan()

        plan = planned(budget)
        if not plan.met and len(scene.program_order) <= _FEW_CALLS:
            # Regions are taken one by one, the widest that help first; a lower aim takes others, which at times reach lower.
            lower = planned(budget // 2)
            plan = replace(lower, budget=budget) if lower.planned < plan.planned else plan
        declined = emit(rewriter, prepared, plan)
        laid_out = plan.planned
        # The plan is made on a copy that spells norms and masks out; what counts is the program that came of it.
        plan.planned = profile(rewriter.function).peak_bytes
        if self.insist and not plan.met:
            nearest = f"the nearest peak that was found is {format_bytes(plan.planned)}"
            raise BudgetError(f"the memory budget of {format_bytes(budget)} cannot be met, {nearest}: {_obstacles(plan, rewriter.symbols)}")
        named = rewriter.symbols.named
        left = tuple(
            LeftAlone.at(held.node, f"{format_bytes(held.nbytes)} live in full at the peak: {named(held.reason)}", "outline-region")
            for held in plan.held
        )
        data = {
            "unsliced": before.peak_bytes,
            "planned": plan.planned,
            "laid out": laid_out,
            "floor": min(plan.floor, plan.planned),
            "budget": budget,
            "regions": len(plan.regions),
        }
        return Outcome(left, tuple(_lines(plan, before.peak_bytes, rewriter.symbols)), data, declined)

    @property
    def _is_share(self) -> bool:
        return isinstance(self.memory_budget, float) or is_share(self.memory_budget)

    def budget_bytes(self, unsliced: int) -> int:
        """The budget in bytes, given the predicted unsliced peak."""
        if self._is_share:
            part = self.memory_budget if isinstance(self.memory_budget, float) else share(self.memory_budget)
            return int(part * unsliced)
        return size_in_bytes(self.memory_budget)

    def _places(self, rewriter: Rewriter, prepared: Prepared) -> list[tuple[Node, int]]:
        """The places among `axes`, in the copy that the planner looks at."""
        wanted = [place for axis in self.axes if axis not in KINDS and (place := _place(axis)) is not None]
        if not wanted:
            return []
        places = []
        values = named_values(rewriter.function, rewriter.symbols)
        for name, dim in wanted:
            node = values.get(name, values.get(f"%{name}"))
            if node is None:
                inputs = ", ".join(str(p.target) for p in rewriter.function.placeholders if tensors_of(p.meta["val"]))
                known = f"the inputs {inputs or '(none)'} and the values %0, %1, ... of its text"
                raise PassError(f"pass {self.name}: axes names {name}:{dim}, but the program has {known}")
            value = node.meta["val"]
            if not isinstance(value, torch.Tensor):
                raise PassError(f"pass {self.name}: axes names {name}:{dim}, but that is no tensor: name one of those taken from it")
            if dim >= value.dim():
                raise PassError(f"pass {self.name}: axes names {name}:{dim}, but {name} has {value.dim()} dims, numbered from 0")
            places.append((prepared.counterpart(node), dim))
        return places


def _lines(plan: Plan, unsliced: int, symbols: SymbolTable) -> list[str]:
    share_left = 100 * plan.planned / unsliced if unsliced else 100.0
    verdict = "met" if plan.met else "not met"
    figures = f"peak {format_bytes(unsliced)} -> {format_bytes(plan.planned)} ({share_left:.1f} %)"
    lines = [f"{figures}, budget {format_bytes(plan.budget)} {verdict}, floor {format_bytes(min(plan.floor, plan.planned))}"]
    if not plan.met:
        lines.append(f"no plan was found that goes lower: {_obstacles(plan, symbols)}")
    for i, region in enumerate(plan.regions):
        first = next((str(m.meta["where"]) for m in region.members if str(m.meta.get("where") or "")), "")
        lines.append(f"region {i}: {_cut(region, symbols)}, {len(region.members)} calls from {first}")
    if len(symbols):
        lines.append("planned for the sizes of capture: " + ", ".join(f"{symbol.name}={symbol.hint}" for symbol in symbols))
    return lines


def _cut(region: PlannedRegion, symbols: SymbolTable) -> str:
    """N and n of a region; of one over a dynamic axis also what n is for any N."""
    if isinstance(region.units, int):
        return f"N={region.units} n={region.count}"
    units = symbols.text(region.units)
    rule = f"min({region.count}, N)" if region.length is None else f"ceil(N/{region.length})" if region.length > 1 else "N"
    return f"N={units} n={rule}"


def _obstacles(plan: Plan, symbols: SymbolTable) -> str:
    shown = []
    for held in plan.held[:4]:
        shape = [hint(n) for n in tensors_of(held.node.meta["val"])[0].shape]
        shown.append(f"{held.node.target} {shape} {format_bytes(held.nbytes)} ({symbols.named(held.reason)})")
    return "; ".join([*([plan.limit] if plan.limit else []), "live at the peak in full: " + "; ".join(shown)])
