"""The pass `smooth`: outliers of activations move into weights, by factors for each channel of a site's input. Exact.

    linear(x, W, b) -> linear(x a, W / a, b),   a = amax(W)^(1 - alpha) / amax(x)^alpha

The product x a is folded into what makes x where that is possible. Source: SmoothQuant (arXiv 2211.10438), equation 4.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch

from ...ir import Rewriter
from ...ir.errors import PassError
from ..base import LeftAlone, Outcome, Pass
from ..contract import Contract
from ..options import at_least, between, is_size, is_texts, one_of, option, size_in_bytes
from ..progress import progress_bar
from .calibrate import collect
from .folds import Fold, find_fold
from .layers import find_layers, idle_lines, matches
from .sites import find_sites
from .smoothing import Moved, apply_smoothing, factors, tied


@dataclass(frozen=True)
class Smooth(Pass):
    """Outliers of activations move into weights, by factors that are folded into what is before where nothing else reads it.

    alpha: how much of the outliers moves, 0 none and 1 all. fold: into what is before, where possible. pow2: factors of two's
    powers, so that every rounding stays what it was (but where a modulation takes them). min_numel, skip: smaller weights, and layers
    of these names, stay. max_calib_bytes: of what calibration gathers, 8 bytes for each channel, as it keeps the largest number and
    no rows; more sites than fit go in waves. calibration: example inputs, each a tuple of arguments or (args, kwargs).

    Raises (on construction): PassError: there is no calibration, without which no outlier is known.
    """

    name = "smooth"
    rules = ("fold-smoothing", "multiply-by-smoothing")
    contract = Contract.EXACT
    before = frozenset({"slice-groups"})  # layers inside a region are not seen

    alpha: float = option(0.5, "a number from 0 to 1", between(0.0, 1.0))
    fold: bool = option(True, "true or false", one_of((True, False)))
    pow2: bool = option(False, "true or false", one_of((True, False)))
    min_numel: int = option(65536, "an integer of at least 0", at_least(0))
    max_calib_bytes: Any = option("2GiB", "a size such as 2GiB", is_size)
    skip: tuple[str, ...] = option((), "a list of patterns", is_texts)
    calibration: Any = option(None, "an iterable of example inputs", lambda v: v is None or isinstance(v, Iterable), spelled=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.calibration is None:
            raise PassError(
                f"pass {self.name} needs example inputs: give it as an object, with calibration=, an iterable of argument tuples"
            )

    def run(self, rewriter: Rewriter) -> Outcome:
        layers, left = find_layers(rewriter)
        sites = find_sites([layer for layer in layers if layer.numel >= self.min_numel and not matches(layer.name, self.skip)])
        idle = idle_lines((layer.name for layer in layers), skip=self.skip)
        if not sites:
            return Outcome(tuple(left), tuple(idle))
        program = rewriter.program
        with progress_bar() as tell:
            taps = {site.name: site.source for site in sites}
            size = size_in_bytes(self.max_calib_bytes)
            statistics = collect(program, taps, self.calibration, function=rewriter.function.name, max_rows=0, max_bytes=size, tell=tell)
        lines, moved, declined = [], Moved(), []
        found = [(site, find_fold(site, program) if self.fold else "folding is off") for site in sites]
        for site, fold in found:
            seen = statistics[site.name]
            if seen.refusal:
                left += [LeftAlone.at(layer.node, f"{layer.name}: {seen.refusal}") for layer in site.layers]
                continue
            if self.fold and isinstance(fold, str):
                declined += [LeftAlone.at(moved.now(layer.node), fold, "fold-smoothing") for layer in site.layers]
            ties = fold.ties if isinstance(fold, Fold) else None
            amax_w = torch.cat([layer.matrix(program) for layer in site.layers]).abs().amax(0)
            dtype = site.layers[0].dtype
            a = factors(tied(seen.amax, ties), tied(amax_w, ties), self.alpha, 1 - self.alpha, dtype, pow2=self.pow2)
            if not all(_is_held(layer.matrix(program) / a.to(torch.float64), layer.dtype) for layer in site.layers):
                held = str(dtype).removeprefix("torch.")
                left += [LeftAlone.at(layer.node, f"{layer.name}: smoothed its weight is too large for {held}") for layer in site.layers]
                continue
            apply_smoothing(rewriter, moved, site, a, fold if isinstance(fold, Fold) else None)
            where = f"folded into {fold.producer}" if isinstance(fold, Fold) else f"multiplied in: {fold}"
            lines.append(f"{', '.join(layer.name for layer in site.layers)}: {where}")
        return Outcome(tuple(left), (*lines, *idle), declined=tuple(declined))


def _is_held(weight: torch.Tensor, dtype: torch.dtype) -> bool:
    """Whether `dtype` holds what is finite in `weight`."""
    return bool((weight.to(dtype).isfinite() | ~weight.isfinite()).all())
