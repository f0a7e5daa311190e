"""The pass `absorb-outliers`: calibrate, choose for each site, then smooth, split and quantize. Source: SVDQuant (arXiv 2411.05007).

    linear(x, W, b) -> gw.lowrank_linear(x, Q(W/a - U D), D, U, b, smooth=a, ...)

A site is all layers that read one value in one block. Smoothing and branch are exact; only the quantizers lose, and what they lose is
measured on rows that nothing was chosen by: a site over its budget stays as it was.
"""

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ...ir import Node, Program, Rewriter
from ...ir.errors import PassError
from ..base import LeftAlone, Outcome, Pass
from ..check import Reference
from ..contract import Contract
from ..options import at_least, between, is_size, is_texts, one_of, option, size_in_bytes
from ..progress import progress_bar
from ..verdict import Verdict
from .apply import Plan, carry_out, problem_of
from .calibrate import collect_waves, copied
from .choose import choose, lower_bound
from .concat import rejoin, split_concatenations
from .examples import Examples
from .fit import is_static
from .folds import Fold, find_fold
from .formats import ACTIVATIONS, AUTO, WEIGHTS, group_of, resolved
from .layers import Layer, find_layers, idle_lines, matches
from .plan_store import PlanStore
from .quality import judge_outputs, smoothing_error
from .recipe import Recipe
from .report import summary
from .sites import Site, find_sites
from .statistics import Statistics

# After deepcompressor's recipes for diffusion transformers, and what language models keep: embeddings, heads, routers.
SKIP = tuple(
    "*embed* *time_emb* *time_proj* *conv_shortcut* *downsamplers* *upsamplers* proj_in proj_out *attentions.*.proj_in "
    "*attentions.*.proj_out caption_projection* lm_head *pooler* *classifier* *router* *.gate".split()
)
WEIGHT_ONLY = ("*norm*.linear", "adaln_single.linear", "time_embed.linear")


@dataclass(frozen=True)
class AbsorbOutliers(Pass):
    """Linear layers on low-bit weights, their outliers taken by smoothing factors and a low-rank branch in 16 bits.

    weight, act: formats (`gw.ir.low_bit.FORMATS`); auto is the one of 4 bits with the least noise. rank: of the branch, lowered where
    it would save nothing. refine: rounds that alternate branch and codes. gptq: codes by GPTQ. smooth: search of the strength, none,
    or a fixed alpha. grid: steps of the search. pow2: factors of two's powers, bitwise exact. fold: factors go into what is before,
    where that is possible. share_down: queries, keys and values share a down-projection. split_concat: a layer that reads a
    concatenation becomes one for each part. shift: activations that are never far below 0 are shifted and take all 16 codes.
    rotate: Hadamard blocks as a candidate. svd: exact, randomized or auto. min_gain: a dearer class must be better by this share.
    budget: the largest error of a site, as a share of its output; auto is 1.5 x what the formats make of normal numbers.
    max_bits: of a weight with scales and branch. min_numel: smaller weights stay. max_rows: input rows kept for a site.
    max_calib_bytes: of all rows together; more sites than fit go in waves, whose number changes the time and no bit of the result.
    skip, weight_only: patterns of layers that stay, or that take int4-g64 weights alone. output_budget: the largest error of the
    program's outputs that verify="numeric" lets pass.
    calibration: example inputs, each a tuple of arguments or (args, kwargs); without them nothing is smoothed and errors are those
    of weights. resume: a folder in which a run that was killed goes on.

    Raises (on construction): PassError: options that need calibration, and there is none; formats or numbers out of range.
    """

    name = "absorb-outliers"
    contract = Contract.BOUNDED
    before = frozenset({"slice-groups"})  # layers inside a region are not seen

    rank: int = option(32, "an integer of at least 0", at_least(0))
    refine: int = option(10, "an integer of at least 0", at_least(0))
    gptq: bool = option(False, "true or false", one_of((True, False)))
    weight: str = option("int4-g64", f"auto, or one of {', '.join(WEIGHTS)}", one_of((AUTO, *WEIGHTS)))
    act: str = option("none", f"auto, or one of {', '.join(ACTIVATIONS)}", one_of((AUTO, *ACTIVATIONS)))
    smooth: Any = option("search", "search, none, or a number from 0 to 1", lambda v: v in ("search", "none") or between(0.0, 1.0)(v))
    grid: int = option(20, "an integer of at least 2", at_least(2))
    pow2: bool = option(False, "true or false", one_of((True, False)))
    fold: bool = option(True, "true or false", one_of((True, False)))
    share_down: bool = option(True, "true or false", one_of((True, False)))
    split_concat: bool = option(True, "true or false", one_of((True, False)))
    shift: bool = option(True, "true or false", one_of((True, False)))
    rotate: int = option(0, "0, 16, 32 or 64", one_of((0, 16, 32, 64)))
    svd: str = option("auto", "auto, exact or randomized", one_of(("auto", "exact", "randomized")))
    min_gain: float = option(0.05, "a number of at least 0", at_least(0.0))
    budget: Any = option("auto", "auto, or a number of at least 0", lambda v: v == "auto" or at_least(0.0)(v))
    output_budget: Any = option(None, "none, or a number of at least 0", lambda v: v is None or at_least(0.0)(v))
    max_bits: Any = option(None, "none, or a number of at least 4", lambda v: v is None or at_least(4.0)(v))
    min_numel: int = option(65536, "an integer of at least 0", at_least(0))
    max_rows: int = option(4096, "an integer of at least 8", at_least(8))
    max_calib_bytes: Any = option("2GiB", "a size such as 2GiB", is_size)
    seed: int = option(0, "an integer from 0 to 2**63 - 1", between(0, 2**63 - 1))
    skip: tuple[str, ...] = option(SKIP, "a list of patterns", is_texts)
    weight_only: tuple[str, ...] = option(WEIGHT_ONLY, "a list of patterns", is_texts)
    calibration: Any = option(None, "an iterable of example inputs", lambda v: v is None or isinstance(v, Iterable), spelled=False)
    resume: Any = option(None, "a folder", lambda v: v is None or isinstance(v, str | Path), spelled=False)

    def __post_init__(self) -> None:
        for name in ("act", "smooth"):
            if getattr(self, name) is None:  # what a pipeline's text calls none
                object.__setattr__(self, name, "none")
        super().__post_init__()
        needs = {
            "a fixed smooth": self.smooth not in ("search", "none"),
            "gptq": self.gptq,
            f"act {self.act}": self.act == AUTO or is_static(self.act),
        }
        for wanted, is_set in needs.items():
            if is_set and self.calibration is None:
                raise PassError(f"pass {self.name}: {wanted} needs example inputs: give calibration=, an iterable of argument tuples")

    def run(self, rewriter: Rewriter) -> Outcome:
        halves = split_concatenations(rewriter, self._takes_parts) if self.split_concat else []
        left: list[LeftAlone] = []
        layers, refused = find_layers(rewriter)
        left += refused
        own = {name: [each for each in getattr(self, name) if each not in getattr(type(self), name)] for name in ("skip", "weight_only")}
        idle = idle_lines((layer.name for layer in layers), **own)
        sites = self._sites(layers, left)
        if not sites:
            return Outcome(tuple(left), tuple(idle))
        plans = self._plans(rewriter, sites, left)
        before, nodes = copied(rewriter)
        rejoin(rewriter, halves, {layer.name for plan in plans for layer in plan.site.layers})
        reports = []
        taps = {plan.site.name: nodes[plan.site.source] for plan in plans}
        gather, hold = partial(self._waves, rewriter, before, taps), partial(self._hold_smoothing, before, rewriter)
        for plan, result in zip(plans, carry_out(rewriter, plans, gather, hold), strict=True):
            if isinstance(result, str):
                left += [LeftAlone.at(layer.node, f"{layer.name}: {result}") for layer in plan.site.layers]
            else:
                reports.append(result)
        order = [site.layers[0].name for site, _ in sites]
        reports.sort(key=lambda report: order.index(report.layers[0]))
        lines = summary(reports, checked=self.calibration is not None)
        return Outcome(tuple(left), (*lines, *idle), {"sites": [report.data for report in reports]})

    def check(self, reference: Reference, after: Program) -> Verdict:
        """Types and strides as they were, and the outputs within `output_budget` where one is declared."""
        return judge_outputs(reference, after, self.output_budget)

    def _hold_smoothing(self, before: Program, rewriter: Rewriter) -> None:
        """Errors of sites take smoothing to be exact, as it is; a fold that were not would be off by its factors, which this sees.

        Raises:
            PassError: the smoothed program gives other outputs on the first of the calibration inputs.
        """
        if self.calibration is None or isinstance(self.calibration, Iterator) or not rewriter.changed:
            return
        function = rewriter.function.name
        inputs = Examples(self.calibration, before, before.functions[function]).first()
        error = smoothing_error(before, rewriter.program, inputs, function)
        if error > 0:
            raise PassError(
                f"pass {self.name}: smoothing moved the outputs by {error:.3g} of their size, which is a mistake of this pass: "
                "report it, and go on with fold=False"
            )

    # --- what to work on ---

    def _sites(self, layers: list[Layer], left: list[LeftAlone]) -> list[tuple[Site, Recipe]]:
        full = Recipe(**{field.name: getattr(self, field.name) for field in fields(Recipe)})
        if self.calibration is None:
            full = replace(full, smooth="none", shift=False)
        light = replace(full, weight="int4-g64", act="none", rank=0, smooth="none", rotate=0, gptq=False)
        taken = [layer for layer in layers if self._takes(layer, left)]
        with_weights_only = [layer for layer in taken if matches(layer.name, self.weight_only)]
        others = [layer for layer in taken if layer not in with_weights_only]
        return [(site, full) for site in find_sites(others)] + [(site, light) for site in find_sites(with_weights_only)]

    def _takes(self, layer: Layer, left: list[LeftAlone]) -> bool:
        reason = self._reason_against(layer)
        if reason:
            left.append(LeftAlone.at(layer.node, f"{layer.name}: {reason}"))
        return not reason

    def _reason_against(self, layer: Layer) -> str:
        is_light = matches(layer.name, self.weight_only)
        if not is_light and matches(layer.name, self.skip):
            return "its name is among those to skip"
        if layer.numel < self.min_numel:
            return f"its weight has {layer.numel} elements, fewer than min_numel {self.min_numel}"
        if not is_light and self.act != "none" and math.prod(layer.node.meta["val"].shape[:-1]) == 1:
            return "it has one row in every call, and quantized activations save nothing there"
        weight, k = "int4-g64" if is_light else self.weight, layer.in_features
        sizes = {f"the blocks of {weight}": group_of(weight, k)}
        if not is_light:
            sizes |= {"the rotation": self.rotate or 1, f"the blocks of {self.act}": group_of(self.act, k)}
        for what, size in sizes.items():
            if k % size:
                return f"K = {k} is no multiple of {size}, {what}"
        return ""

    def _takes_parts(self, layer: Layer, sizes: list[int]) -> bool:
        """Whether a layer that reads a concatenation of such sizes may become one for each part."""
        fits = all(k % size == 0 for k in sizes for size in (group_of(self.weight, k), group_of(self.act, k), max(self.rotate, 1)))
        return fits and not self._reason_against(layer) and min(sizes) * layer.out_features >= self.min_numel

    def _waves(self, rewriter: Rewriter, program: Program, taps: Mapping[str, Node]) -> Iterator[dict[str, Statistics]]:
        with progress_bar() as tell:
            yield from collect_waves(
                program,
                taps,
                self.calibration,
                function=rewriter.function.name,
                max_rows=self.max_rows,
                max_bytes=size_in_bytes(self.max_calib_bytes),
                resume=None if self.resume is None else Path(self.resume),
                tell=tell,
            )

    # --- choosing ---

    def _plans(self, rewriter: Rewriter, sites: list[tuple[Site, Recipe]], left: list[LeftAlone]) -> list[Plan]:
        """What each site gets. Where statistics come in several waves, none of them is kept for later."""
        by_name = {site.name: (site, recipe) for site, recipe in sites}
        if self.calibration is None:
            waves: Iterable[dict[str, Any]] = [dict.fromkeys(by_name)]
        else:
            waves = self._waves(rewriter, rewriter.program, {name: site.source for name, (site, _) in by_name.items()})
        plans: list[Plan] = []
        for number, wave in enumerate(waves):
            if number == 1:
                plans = [plan.without_statistics() for plan in plans]
            with progress_bar("choosing") as tell:
                for index, (name, statistics) in enumerate(wave.items()):
                    if tell is not None:
                        tell(index, len(wave), None)
                    site, recipe = by_name[name]
                    plan = self._plan(rewriter.program, site, recipe, statistics)
                    if isinstance(plan, str):
                        left += [LeftAlone.at(layer.node, f"{layer.name}: {plan}") for layer in site.layers]
                    else:
                        plans.append(plan if number == 0 else plan.without_statistics())
        return plans

    def _plan(self, program: Program, site: Site, recipe: Recipe, statistics: Statistics | None) -> "Plan | str":
        if statistics is not None and statistics.reason_against_judging:
            return statistics.reason_against_judging
        problem = problem_of(site, recipe, statistics, [layer.matrix(program) for layer in site.layers])
        if not all(bool(torch.isfinite(weight).all()) for weight in problem.weights):
            return "its weight holds NaN or infinity"
        recipe = resolved(recipe, problem)
        fold = find_fold(site, program) if recipe.fold else "folding is off"
        is_editable = all(layer.bias is None or layer.bias.op == "get_attr" for layer in site.layers)
        bound = lower_bound(site.source) if is_editable else None  # a shift is taken back in the bias
        store = None
        if self.resume is not None and statistics is not None:
            store = PlanStore(Path(self.resume), problem, statistics, recipe, fold, bound)
        choice = store.load() if store is not None else None
        if choice is None:
            choice = choose(
                problem,
                recipe,
                amax=None if statistics is None else statistics.amax,
                fold=fold if isinstance(fold, Fold) else None,
                bound=bound,
            )
            if store is not None:
                store.save(choice)
        if choice.setting is None:
            return choice.left
        return Plan(site, recipe, choice.setting, choice, fold, statistics)
