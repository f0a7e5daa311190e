"""From plans to rewrites: all smoothing first, then for each site the branch, then the codes.

Folding scales rows of other layers' weights, so what a site is quantized from is worked out again on the weights as folds left them.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from ...ir import Program, Rewriter
from .choose import Choice
from .fit import Fit, Problem, fit
from .folds import Fold
from .held import Original, hold
from .layers import computed
from .recipe import Recipe, Setting
from .report import SiteReport
from .rewrite import Product, product_behind, product_of, quantize_product, split
from .sites import Site
from .smoothing import Moved, apply_smoothing
from .statistics import Statistics

Gather = Callable[[], Iterator[dict[str, Statistics]]]


@dataclass(frozen=True)
class Plan:
    """What was chosen for a site. `fold` is how its input could carry factors, or why not. `statistics` are None where there is no
    calibration, and where they were too large to be kept."""

    site: Site
    recipe: Recipe
    setting: Setting
    choice: Choice
    fold: Fold | str
    statistics: Statistics | None
    was_calibrated: bool = False

    def without_statistics(self) -> "Plan":
        return replace(self, statistics=None, was_calibrated=self.was_calibrated or self.statistics is not None)


def problem_of(site: Site, recipe: Recipe, statistics: Statistics | None, weights: Sequence[torch.Tensor]) -> Problem:
    """A site as matrices; `weights` [N, K] of its layers."""
    rows, selection = (None, None) if statistics is None else (statistics.rows, statistics.selection)
    wide = [None if values is None else values.to(torch.float32) for values in (rows, selection)]
    floats = tuple(weight.to(torch.float32) for weight in weights)
    return Problem(floats, tuple(site.branches(recipe.share_down)), wide[0], wide[1], site.layers[0].dtype)


def carry_out(rewriter: Rewriter, plans: Sequence[Plan], gather: Gather, smoothed: Callable[[], None]) -> list[SiteReport | str]:
    """Rewrites every planned site, or says why it is left after all; smoothing, branch and codes are rewrites of their own.

    `gather()` gives again, wave by wave, the statistics of plans that have none left: of the program in which they were planned, so that
    the number of waves changes nothing. `smoothed()` is called when the program is smoothed, and nothing else yet.
    """
    moved = Moved()
    for plan in plans:
        if plan.setting.smooth is not None:
            fold = plan.fold if plan.setting.folded and isinstance(plan.fold, Fold) else None
            apply_smoothing(rewriter, moved, plan.site, plan.setting.smooth, fold)
    smoothed()
    waiting = {plan.site.name: plan for plan in plans if plan.was_calibrated}
    results = {plan.site.name: _quantized(rewriter, moved, plan, _seen(plan)) for plan in plans if not plan.was_calibrated}
    if waiting:
        for wave in gather():
            for name, statistics in wave.items():
                results[name] = _quantized(rewriter, moved, waiting[name], _seen(replace(waiting[name], statistics=statistics)))
    return [results[plan.site.name] for plan in plans]


def _seen(plan: Plan) -> Statistics | None:
    """The plan's statistics as its site's input is after smoothing."""
    if plan.statistics is None or plan.setting.smooth is None or not plan.setting.folded:
        return plan.statistics
    a = plan.setting.smooth.to(torch.float32)
    rows, selection = (values.to(torch.float32) * a for values in (plan.statistics.rows, plan.statistics.selection))
    return replace(plan.statistics, rows=rows, selection=selection)


def _quantized(rewriter: Rewriter, moved: Moved, plan: Plan, statistics: Statistics | None) -> SiteReport | str:
    """Splits and quantizes one site on the weights as they are now, and on its input as it is now.

    Other sites' folds may have scaled rows of its weights, and so what its error is a share of; it is held to its budget again.
    """
    problem, setting = _problem_now(rewriter.program, moved, plan, statistics)
    fitted = fit(problem, setting, plan.recipe, refine=plan.recipe.refine)
    # The smoothing stays where it is; only what comes after it can still be taken back.
    simple = fit(problem, Setting(act=plan.recipe.act, smooth=setting.smooth), plan.recipe, refine=0)
    if fitted.error > (1 + plan.recipe.min_gain) * simple.error:
        fitted = simple
    if not fitted.error <= plan.recipe.limit:
        return f"its error of {fitted.error:.3g} is over the budget of {plan.recipe.limit:.3g}, once other sites were smoothed"
    layers = plan.site.layers
    source, originals = moved.now(plan.site.source), [_original(rewriter.program, moved, plan, problem, i) for i in range(len(layers))]
    for members, branch in zip(problem.branches, fitted.branches, strict=True):
        if branch is None:
            continue
        with rewriter.step("split-low-rank"):
            down = computed(rewriter, f"{layers[members[0]].name}.down", branch[1])
            for i in members:
                own = fitted.branch_of(problem, i)
                assert own is not None
                moved.put(layers[i].node, split(rewriter, _product(rewriter.program, moved, plan, i), own[0], down))
    for i, quantized in enumerate(fitted.quantized):
        with rewriter.step("quantize"):
            product = _product(rewriter.program, moved, plan, i)
            new = quantize_product(rewriter, product, quantized, plan.recipe.weight, _activations(fitted), fitted.setting.rotate)
            moved.put(layers[i].node, new)
    calls = [(moved.now(layer.node), original) for layer, original in zip(layers, originals, strict=True)]
    hold(rewriter, source, calls, problem.selection, fitted.error, fitted.setting.act)
    shown = fitted if fitted is simple else replace(fitted, setting=plan.setting)
    return SiteReport.of(plan.site, plan.recipe, plan.choice, shown, plan.fold)


def _problem_now(program: Program, moved: Moved, plan: Plan, statistics: Statistics | None) -> tuple[Problem, Setting]:
    """Factors that were folded are in weights and input already; those that are multiplied in are undone in the weights."""
    a = plan.setting.smooth
    weights = [moved.layer(layer.node, program).exact_matrix(program) for layer in plan.site.layers]
    if a is not None and not plan.setting.folded:
        weights = [weight * a.to(torch.float64) for weight in weights]
    problem = problem_of(plan.site, plan.recipe, statistics, weights)
    return problem, plan.setting if not plan.setting.folded else replace(plan.setting, smooth=None, folded=False)


def _original(program: Program, moved: Moved, plan: Plan, problem: Problem, index: int) -> Original:
    bias = moved.layer(plan.site.layers[index].node, program).bias
    return Original.of(problem.weights[index], bias, program)


def _product(program: Program, moved: Moved, plan: Plan, index: int) -> Product:
    layer, smooth = plan.site.layers[index], plan.setting.smooth
    node = moved.now(layer.node)
    is_multiplied = smooth is not None and not plan.setting.folded
    product = product_behind(node, program, smooth) if is_multiplied else product_of(node, program)
    assert product is not None and (product.smooth is not None or not is_multiplied), "the branch reads what is before the factors"
    return replace(product, name=layer.name)


def _activations(fitted: Fit) -> dict[str, Any]:
    """The attributes of the op that say how activations are quantized."""
    setting = fitted.setting
    values: dict[str, Any] = {"act_format": setting.act, "act_shift": setting.act_shift, "act_scale2": fitted.act_scale2}
    defaults = {"act_format": "none", "act_shift": 0.0, "act_scale2": 1.0}
    return {name: value for name, value in values.items() if value != defaults[name]}
