"""Which setting a site gets: every candidate is worked out, and the cheapest class that is nearly as good as the best wins.

No candidate is better by theorem: a branch can make an error larger than rounding alone, smoothing too. So each competes with plain
rounding, on rows that none of them was chosen by, and a site whose best is over its budget is left alone.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch

from ...ir import Node
from .fit import Fit, Problem, fit
from .folds import Fold
from .recipe import LOWER_BOUNDS, Recipe, Setting, bits_of, usable_rank
from .smoothing import factors, tied


@dataclass(frozen=True)
class Choice:
    """The setting that a site gets, what plain rounding would have given, and the error of every candidate; or why it is `left` alone."""

    setting: Setting | None
    plain_error: float
    errors: tuple[tuple[str, float], ...]
    left: str = ""
    note: str = ""


def choose(problem: Problem, recipe: Recipe, *, amax: torch.Tensor | None, fold: Fold | None, bound: float | None) -> Choice:
    """The choice for a site. `amax` is the largest |x| of each channel (None without calibration), `bound` says that its input is
    never below -bound."""
    rank, note = _rank(problem, recipe)
    searching = None if problem.rows is None else problem.searching()
    settings = _settings(problem, searching, recipe, rank, amax, fold, bound)
    fits = [fit(problem, setting, recipe, refine=recipe.refine) for setting in settings]
    errors = tuple((str(each.setting), each.error) for each in fits)
    plain = fits[0].error
    usable = [each for each in fits if math.isfinite(each.error)]
    if not usable:
        return Choice(None, plain, errors, "no format holds its numbers", note)
    least = min(each.error for each in usable)
    good = [each for each in usable if each.error <= (1 + recipe.min_gain) * least]
    cheapest = min(each.setting.cost for each in good)
    best = min((each for each in good if each.setting.cost == cheapest), key=lambda each: each.error)
    left = _reason_against(best, problem, recipe)
    return Choice(None if left else best.setting, plain, errors, left, note)


def _reason_against(best: Fit, problem: Problem, recipe: Recipe) -> str:
    if best.error > recipe.limit:
        return f"its error of {best.error:.3g} is over the budget of {recipe.limit:.3g}"
    k = problem.joined.size(1)
    bits = max(bits_of(recipe.weight, best.setting.rank, weight.size(0), k) for weight in problem.weights)
    own = problem.dtype.itemsize * 8
    if bits >= own:
        return f"it would take {bits:.2f} bits a weight, and has {own}"
    return ""


def _rank(problem: Problem, recipe: Recipe) -> tuple[int, str]:
    """The rank that every branch of the site can have."""
    k = problem.joined.size(1)
    shapes = [sum(problem.weights[i].size(0) for i in members) for members in problem.branches]
    found = [usable_rank(recipe, n, k) for n in shapes]
    return min(found, key=lambda each: each[0])


def _settings(
    problem: Problem,
    searching: Problem | None,
    recipe: Recipe,
    rank: int,
    amax: torch.Tensor | None,
    fold: Fold | None,
    bound: float | None,
) -> Iterator[Setting]:
    """Plain rounding first; then each smoothing, branch, rotation, shift and GPTQ that the recipe asks for."""
    plain = Setting(act=recipe.act, gptq=False)
    ranks = [0, rank] if rank else [0]
    for base in (replace(plain, rank=r) for r in ranks):
        smoothed = [] if searching is None or amax is None else _smoothed(searching, recipe, base, amax, fold)
        for setting in (base, *smoothed):
            yield from _variants(setting, recipe, problem, bound)


def _variants(setting: Setting, recipe: Recipe, problem: Problem, bound: float | None) -> Iterator[Setting]:
    yield setting
    variants = [setting]
    if recipe.shift and bound is not None and recipe.act == "int4-g64" and not setting.folded:
        variants.append(replace(setting, act="uint4-g64", act_shift=bound))
    if recipe.rotate:
        variants.append(replace(setting, rotate=recipe.rotate))
    yield from variants[1:]
    if recipe.gptq and problem.rows is not None:
        yield from (replace(each, gptq=True) for each in variants)


def _smoothed(problem: Problem, recipe: Recipe, base: Setting, amax: torch.Tensor, fold: Fold | None) -> list[Setting]:
    """`base` with the best factors of the search, or with those of a fixed strength."""
    if recipe.smooth == "none":
        return []
    candidates = [_with_factors(problem, recipe, base, amax, fold, alpha, beta) for alpha, beta in _strengths(recipe)]
    if len(candidates) == 1:
        return candidates
    errors = [fit(problem, each, recipe, refine=0, quick=True).error for each in candidates]
    finite = [(error, index) for index, error in enumerate(errors) if math.isfinite(error)]
    return [candidates[min(finite)[1]]] if finite else []


def _strengths(recipe: Recipe) -> list[tuple[float, float]]:
    """(alpha, beta) of lambda = amax_x^alpha / amax_w^beta; (0, 0), no smoothing, is a candidate anyway."""
    if recipe.smooth != "search":
        return [(float(recipe.smooth), 1 - float(recipe.smooth))]
    steps = [i / recipe.grid for i in range(1, recipe.grid)]
    return [pair for alpha in steps for pair in ((alpha, 0.0), (alpha, 1 - alpha))]


def _with_factors(
    problem: Problem, recipe: Recipe, base: Setting, amax: torch.Tensor, fold: Fold | None, alpha: float, beta: float
) -> Setting:
    ties = None if fold is None else fold.ties
    amax_w = problem.joined.abs().amax(0)
    a = factors(tied(amax, ties), tied(amax_w, ties), alpha, beta, problem.dtype, pow2=recipe.pow2)
    return replace(base, smooth=a, folded=fold is not None)


def lower_bound(source: Node) -> float | None:
    """-min of the activation function that makes a site's input: with it added, nothing is negative; None where no bound is known."""
    schema = getattr(source.target, "_schema", None)
    return None if schema is None else LOWER_BOUNDS.get(schema.name)
