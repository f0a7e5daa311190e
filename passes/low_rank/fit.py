"""One candidate for a site, worked out: factors, branch, codes, and the error on rows that none of these were chosen by.

    Ws = W / a;   down = store(D a);   R = Ws - U (down / a);   codes = Q(rot(R))
    err = |Y - Yc| / |Y| over the rows and all layers of the site

R is what the *stored* factors leave, so their rounding is no error. Refinement alternates the branch and the codes (SVDQuant's
released code) and keeps the best. Without rows err is |W - Wc| / |W|.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch

from ...ir.low_bit import Quantized, dequantize, fake_quantize, format_of, quantize, rotate
from ...ir.low_bit.quantize import tensor_scale
from .factorize import best_factors
from .gptq import gptq_codes
from .recipe import Recipe, Setting, stored_dtype

Branch = tuple[torch.Tensor, torch.Tensor]  # up [N, r], down [r, K], as stored


@dataclass(frozen=True)
class Problem:
    """A site as matrices. weights: W [N, K] of each layer, float32. branches: which layers share a down-projection. rows: input rows
    [n, K] to work with, selection: those to judge by, both float32; None without calibration. dtype: the model's."""

    weights: tuple[torch.Tensor, ...]
    branches: tuple[tuple[int, ...], ...]
    rows: torch.Tensor | None
    selection: torch.Tensor | None
    dtype: torch.dtype

    @cached_property
    def joined(self) -> torch.Tensor:
        return torch.cat(self.weights)

    @cached_property
    def expected(self) -> torch.Tensor:
        """Y of the selection rows."""
        assert self.selection is not None
        return self.selection @ self.joined.T

    @property
    def slices(self) -> list[slice]:
        ends = torch.tensor([weight.size(0) for weight in self.weights]).cumsum(0).tolist()
        return [slice(end - weight.size(0), end) for end, weight in zip(ends, self.weights, strict=True)]

    def searching(self, count: int = 512) -> "Problem":
        """The same judged by at most `count` of the rows to work with, for the search of factors."""
        assert self.rows is not None
        return replace(self, selection=self.rows[:count])

    def folded(self, a: torch.Tensor) -> "Problem":
        """The problem when what makes the input carries the factors already."""
        wide = a.to(torch.float32)
        scaled = [None if rows is None else rows * wide for rows in (self.rows, self.selection)]
        problem = replace(self, weights=tuple(weight / wide for weight in self.weights), rows=scaled[0], selection=scaled[1])
        if self.selection is not None:
            problem.__dict__["expected"] = self.expected  # (x a) (W / a).T is x W.T
        return problem


@dataclass(frozen=True)
class Fit:
    """A worked-out setting: its error, the branch of each group of layers, and the codes of each layer."""

    setting: Setting
    error: float
    branches: tuple[Branch | None, ...]
    quantized: tuple[Quantized, ...]
    act_scale2: float = 1.0

    def branch_of(self, problem: Problem, layer: int) -> Branch | None:
        """(up of that layer, the down that it shares)."""
        for members, branch in zip(problem.branches, self.branches, strict=True):
            if layer in members and branch is not None:
                up, down = branch
                rows = [problem.weights[i].size(0) for i in members]
                start = sum(rows[: members.index(layer)])
                return up[start : start + problem.weights[layer].size(0)], down
        return None


def fit(problem: Problem, setting: Setting, recipe: Recipe, *, refine: int, quick: bool = False) -> Fit:
    """The best of `refine` + 1 rounds for `setting`; `quick` takes the randomized factors, for a search."""
    if setting.folded and setting.smooth is not None:
        inner = fit(problem.folded(setting.smooth), replace(setting, smooth=None, folded=False), recipe, refine=refine, quick=quick)
        return replace(inner, setting=setting)
    return _Fitting(problem, setting, recipe, quick).best(refine)


class _Fitting:
    def __init__(self, problem: Problem, setting: Setting, recipe: Recipe, quick: bool):
        self.problem, self.setting, self.recipe = problem, setting, recipe
        self.method = "randomized" if quick else recipe.svd
        self.a = None if setting.smooth is None else setting.smooth.to(torch.float32)
        self.smoothed = problem.joined if self.a is None else problem.joined / self.a
        self.store = stored_dtype(problem.dtype)
        self.act_scale2 = self._activation_scale()
        self.seen = None if problem.selection is None else self._seen(problem.selection)

    def best(self, refine: int) -> Fit:
        rounds = refine if self.setting.rank else 0
        best: Fit | None = None
        codes = torch.zeros_like(self.smoothed)  # what the codes stand for, not rotated
        for number in range(rounds + 1):
            # After rounding no gap is left in the spectrum that exact factors would serve: the range finder takes a tenth of the time.
            method = "randomized" if number and self.method == "auto" else self.method
            branches = self._branches(self.smoothed - codes, method)
            residual = self._residual(branches)
            quantized = self._quantized(residual)
            values = self._values(quantized)
            error = self._error(branches, values)
            if best is not None and not error < best.error:
                break
            best = Fit(self.setting, error, branches, quantized, self.act_scale2)
            codes = rotate(values, self.setting.rotate, weight=False) if self.setting.rotate else values
        assert best is not None
        return self._with_gptq(best) if self.setting.gptq else best

    # --- branch and residual ---

    def _branches(self, target: torch.Tensor, method: str) -> tuple[Branch | None, ...]:
        if not self.setting.rank:
            return tuple(None for _ in self.problem.branches)
        joined = (torch.cat([target[self.problem.slices[i]] for i in members]) for members in self.problem.branches)
        return tuple(self._branch(each, method) for each in joined)

    def _branch(self, target: torch.Tensor, method: str) -> Branch:
        rank = min(self.setting.rank, *target.shape)
        up, down = best_factors(target, rank, method, self.recipe.seed)
        raw = down if self.a is None else down * self.a
        return up.to(self.store), raw.to(self.store)

    def _residual(self, branches: Sequence[Branch | None]) -> torch.Tensor:
        """R = Ws - U (down / a)."""
        residual = self.smoothed.clone()
        for members, branch in zip(self.problem.branches, branches, strict=True):
            if branch is None:
                continue
            product = self._product(branch)
            start = 0
            for i in members:
                rows = self.problem.weights[i].size(0)
                residual[self.problem.slices[i]] -= product[start : start + rows]
                start += rows
        return residual

    def _product(self, branch: Branch) -> torch.Tensor:
        up, down = (factor.to(torch.float32) for factor in branch)
        return up @ (down if self.a is None else down / self.a)

    # --- codes ---

    def _quantized(self, residual: torch.Tensor) -> tuple[Quantized, ...]:
        turned = rotate(residual, self.setting.rotate, weight=True) if self.setting.rotate else residual
        return tuple(quantize(turned[rows], self.recipe.weight, self.store) for rows in self.problem.slices)

    def _values(self, quantized: Sequence[Quantized]) -> torch.Tensor:
        return torch.cat([dequantize(q.codes, q.scale, q.scale2, self.recipe.weight, torch.float32) for q in quantized])

    def _with_gptq(self, plain: Fit) -> Fit:
        """`plain` with codes by GPTQ where these are better on the selection rows."""
        assert self.problem.rows is not None
        seen = self._seen(self.problem.rows)
        residual = self._residual(plain.branches)
        turned = rotate(residual, self.setting.rotate, weight=True) if self.setting.rotate else residual
        quantized = []
        for rows, q in zip(self.problem.slices, plain.quantized, strict=True):
            codes = gptq_codes(turned[rows], seen, self.recipe.weight, q.scale, q.scale2)
            quantized.append(q if codes is None else replace(q, codes=codes))
        error = self._error(plain.branches, self._values(quantized))
        return replace(plain, quantized=tuple(quantized), error=error) if error < plain.error else plain

    # --- error ---

    def _seen(self, rows: torch.Tensor) -> torch.Tensor:
        """The rows that the quantized weight is multiplied with."""
        setting = self.setting
        xs = rows + setting.act_shift if setting.act_shift else rows
        xs = xs if self.a is None else xs * self.a
        xs = rotate(xs, setting.rotate, weight=False) if setting.rotate else xs
        scale_dtype = self.problem.dtype if self.problem.dtype in (torch.float16, torch.bfloat16) else torch.float32
        return fake_quantize(xs, setting.act, scale_dtype, self.act_scale2)

    def _activation_scale(self) -> float:
        """The static scale of NV activations: what the rows to work with need."""
        if not is_static(self.setting.act):
            return 1.0
        assert self.problem.rows is not None
        rows = self.problem.rows if self.a is None else self.problem.rows * self.a
        rows = rotate(rows, self.setting.rotate, weight=False) if self.setting.rotate else rows
        return static_scale(rows, self.setting.act)

    def _error(self, branches: Sequence[Branch | None], values: torch.Tensor) -> float:
        if self.seen is None:
            values = rotate(values, self.setting.rotate, weight=False) if self.setting.rotate else values
            difference, whole = self.smoothed - values, self.smoothed
            for members, branch in zip(self.problem.branches, branches, strict=True):
                if branch is not None:
                    self._subtract(difference, members, self._product(branch), dim=0)
            return relative_norm(difference, whole)
        assert self.problem.selection is not None
        difference = self.problem.expected - self.seen @ values.T
        if self.setting.act_shift:
            difference += self.setting.act_shift * (values.sum(1) if self.a is None else values @ self.a)
        for members, branch in zip(self.problem.branches, branches, strict=True):
            if branch is not None:
                up, down = (factor.to(torch.float32) for factor in branch)
                self._subtract(difference, members, (self.problem.selection @ down.T) @ up.T, dim=1)
        return relative_norm(difference, self.problem.expected)

    def _subtract(self, whole: torch.Tensor, members: Sequence[int], part: torch.Tensor, dim: int) -> None:
        start = 0
        for i in members:
            place = self.problem.slices[i]
            length = place.stop - place.start
            whole.narrow(dim, place.start, length).sub_(part.narrow(dim, start, length))
            start += length


def is_static(act: str) -> bool:
    """Whether activations of that format have a scale that is known before the call: those of the NV formats do."""
    return act != "none" and format_of(act).scale == "nv"


def static_scale(rows: torch.Tensor, act: str) -> float:
    """The tensor's scale that an NV format needs for `rows`."""
    return float(tensor_scale(rows.abs().amax(1), format_of(act)))


def relative_norm(difference: torch.Tensor, whole: torch.Tensor) -> float:
    """|difference| / |whole|, summed in float64; 0/0 is 0."""
    norm = torch.linalg.vector_norm(whole, dtype=torch.float64)
    error = torch.linalg.vector_norm(difference, dtype=torch.float64)
    return float(error / norm) if norm > 0 else (0.0 if error == 0 else float("inf"))
