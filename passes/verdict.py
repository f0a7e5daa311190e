"""The verdict rule of the `exact` contract, on values: r of the original in float64, c of the candidate, and the original's noise.

*Rewrite*: in float64 the two agree to 1e-10 of the output's scale. *Numerics*: in its working dtype the candidate is no further
from r than a small multiple of the original's own error. Both hold for a whole output and for each index of its dim 0, because a
whole-tensor norm hides a wrong sample of small scale.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

# Why these: over 15,364 correct rewrites of random programs none is off by 1e-10 in float64 and one by 4 x the larger of the
# original's error and noise; of planted faults 90 to 98% are.
PROMISE = 1e-10
RMSE_FACTOR = 4.0
_FLUSHED = {torch.float64: 2.0**-1022, torch.float32: 2.0**-126, torch.bfloat16: 2.0**-126}  # below these kernels may compute zeros
ILL_CONDITIONED = 1e-12

# What tests hold our own passes to: the worst correct one of 7,680 random programs was off by 7.7 x the original's noise.
STRICT = 1e-13
STRICT_NOISE = 100.0


@dataclass(frozen=True)
class Worst:
    """The element of an output that is furthest off: where, what was expected, what came, the operation that computes it in the
    rewritten program, and the user's line behind that."""

    output: str
    index: tuple[int, ...]
    expected: float
    got: float
    where: str
    node: str = ""

    def __str__(self) -> str:
        at = f"[{', '.join(map(str, self.index))}]" if self.index else ""
        source = " at ".join(part for part in (self.node, self.where) if part)
        return f"{self.output}{at} is {self.got!r}, expected {self.expected!r}" + (f" (from {source})" if source else "")


@dataclass(frozen=True)
class Verdict:
    """`right`; `wrong` (another function); `unstable` (right in float64, too imprecise in the working dtype); `inconclusive`;
    `unmeasured` (the pass has no measure of its own, so only types were compared). Of a trial as a whole also `refused` (a typed error
    of ours) and `crashed` (any other end).

    `rewrite_error`: the largest abs(c - r) / max(abs r) in float64. `error`: the largest RMSE(c, r) / RMS(r) in the working
    dtype; `error_ratio`: the largest RMSE(c, r) / max(RMSE(original, r), noise), which must stay within 4.
    """

    kind: str
    reason: str = ""
    worst: Worst | None = None
    rewrite_error: float = 0.0
    error: float = 0.0
    error_ratio: float = 0.0

    @property
    def fails(self) -> bool:
        """Whether the contract was seen to be broken: wrong, unstable or crashed. What is inconclusive or unmeasured is no failure."""
        return self.kind in ("wrong", "unstable", "crashed")

    def __str__(self) -> str:
        parts = [self.kind, self.reason, str(self.worst) if self.worst is not None else ""]
        return ": ".join(part for part in parts if part)


@dataclass(frozen=True)
class Comparison:
    """One output of a candidate beside the original's: tensors, or sizes and constants that must be equal.

    r, c: original and candidate in float64. own, working: the same in their working dtype. noise64, noise: distances from r of the
    original when it is perturbed at float64 and at working precision, one a run.
    """

    label: str
    where: str
    r: Any
    c: Any
    own: Any
    working: Any
    noise64: Sequence[torch.Tensor]
    noise: Sequence[torch.Tensor]
    node: str = ""

    def judge(self, *, random: bool, strict: bool = False) -> Verdict:
        """Both rules. A program that draws random numbers is held to the first alone: float32 and float64 draw differently. With `strict`
        the first is abs(c - r) <= max(1e-13 max(abs r), 100 noise64)."""
        if not isinstance(self.r, torch.Tensor):
            same = repr(self.r) == repr(self.c)
            return Verdict("right") if same else Verdict("wrong", f"{self.label} is {self.c!r}, expected {self.r!r}")
        rewrite = self._judge_rewrite(strict)
        return rewrite if random or rewrite.kind != "right" else self._judge_numerics(rewrite)

    def _judge_rewrite(self, strict: bool) -> Verdict:
        """Equal NaN and infinities, equal integers, and abs(c - r) <= 1e-10 max(abs r)."""
        if self.c.shape != self.r.shape:
            return Verdict("inconclusive", f"{self.label} is of other sizes in float64")
        moved = _moved_nonfinite(self.r, self.c)
        if moved.any():
            return Verdict("wrong", "NaN or infinity moved", self._worst(moved, self.c), math.inf)
        error = distance(self.c, self.r)
        if not _is_inexact(self.r):
            return Verdict("wrong", "integers differ", self._worst(error, self.c), math.inf) if error.any() else Verdict("right")
        largest, noise = 0.0, torch.stack(list(self.noise64)).amax(0)
        for e, scale, n in zip(_rows(error), _rows(_magnitude(self.r)), _rows(noise)):
            top, size, own = e.amax(1), scale.amax(1), n.amax(1)
            judged = own <= ILL_CONDITIONED * size
            if len(top) == 1 and not judged.all():
                reason = f"{self.label} is too ill-conditioned to judge on these inputs (noise {own.item():.1e} of {size.item():.1e})"
                return Verdict("inconclusive", reason)
            largest = max(largest, _largest_ratio(top[judged], size[judged]))
            allowed = torch.maximum(STRICT * size, STRICT_NOISE * own) if strict else PROMISE * size
            if (top > allowed)[judged].any():
                relative = torch.where(judged.unsqueeze(1), e / size.clamp_min(_TINY).unsqueeze(1), 0.0)
                worst = self._worst(relative.reshape(error.shape), self.c)
                return Verdict("wrong", f"off by {largest:.1e} of the output's scale in float64", worst, largest)
        return Verdict("right", rewrite_error=largest)

    def _judge_numerics(self, rewrite: Verdict) -> Verdict:
        """Equal NaN and infinities in the working dtype, and RMSE(working, r) <= 4 max(RMSE(own, r), noise, 2**-126).

        For integers, of which rounding flips ties, the share that differs takes the place of the RMSE. 2**-126 is the least normal float32:
        whether ATen's gelu of a bfloat16 makes zeros of subnormal numbers hangs on how its operand lies in memory.
        """
        moved = _moved_nonfinite(self.own, self.working)
        if moved.any():
            worst = self._worst(moved, self.working)
            near_overflow = abs(worst.expected) > torch.finfo(self.own.dtype).max / 8
            kind = "inconclusive" if near_overflow else "unstable"
            return replace(rewrite, kind=kind, reason="NaN or infinity moved in the working dtype", worst=worst)
        error, mean = distance(self.working, self.r), _rms if _is_inexact(self.r) else _share
        floors = [distance(self.own, self.r), *self.noise]
        verdict = rewrite
        for e, size, *fs in zip(_rows(error), _rows(_magnitude(self.r)), *map(_rows, floors)):
            ratio = _largest_ratio(mean(e), torch.stack([mean(f) for f in fs]).amax(0).clamp_min(_FLUSHED.get(self.own.dtype, 0.0)))
            relative = max(verdict.error, _largest_ratio(mean(e), mean(size)))
            verdict = replace(verdict, error=relative, error_ratio=max(verdict.error_ratio, ratio))
            if ratio > RMSE_FACTOR:
                reason = f"{ratio:.3g} x as far from float64 as the original"
                return replace(verdict, kind="unstable", reason=reason, worst=self._worst(error, self.working))
        return verdict

    def _worst(self, badness: torch.Tensor, got: torch.Tensor) -> Worst:
        flat = int(badness.reshape(-1).to(torch.float64).argmax())
        index = tuple(int(i) for i in torch.unravel_index(torch.tensor(flat), badness.shape)) if badness.dim() else ()
        return Worst(self.label, index, self.r[index].item(), got[index].item(), self.where, self.node)


def worst_of(verdicts: Sequence[Verdict]) -> Verdict:
    """The gravest verdict, with the largest errors of all."""
    if not verdicts:
        return Verdict("right")
    return replace(
        min(verdicts, key=lambda verdict: _GRAVITY.index(verdict.kind)),
        rewrite_error=max(v.rewrite_error for v in verdicts),
        error=max(v.error for v in verdicts),
        error_ratio=max(v.error_ratio for v in verdicts),
    )


def distance(value: torch.Tensor, r: torch.Tensor) -> torch.Tensor:
    """Element-wise abs(value - r) where both are finite, else 0 (masks are compared apart); for integers 1 where they differ."""
    if not _is_inexact(r):
        return (value != r).to(torch.float64)
    difference = (value.to(r.dtype) - r).abs()
    return _finite(difference, difference)


_GRAVITY = ("wrong", "unstable", "inconclusive", "right")
_TINY = torch.finfo(torch.float64).tiny


def _is_inexact(value: torch.Tensor) -> bool:
    return value.dtype.is_floating_point or value.dtype.is_complex


def _finite(value: torch.Tensor, where: torch.Tensor) -> torch.Tensor:
    return torch.where(torch.isfinite(where), value, torch.zeros_like(value))


def _magnitude(r: torch.Tensor) -> torch.Tensor:
    """abs(r) where it is finite, else 0; 1 for an integer, so that a mean error over it is a share."""
    return _finite(r.abs(), r) if _is_inexact(r) else torch.ones_like(r, dtype=torch.float64)


def _moved_nonfinite(r: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
    if not r.dtype.is_floating_point:
        return r.isnan() != c.isnan()
    return (r.isnan() != c.isnan()) | (r.isposinf() != c.isposinf()) | (r.isneginf() != c.isneginf())


def _rows(value: torch.Tensor) -> list[torch.Tensor]:
    """The whole as one row and, where dim 0 has several indices, a row for each."""
    if value.numel() == 0:
        return []
    whole = value.reshape(1, -1)
    return [whole, value.reshape(value.size(0), -1)] if value.dim() > 1 and value.size(0) > 1 else [whole]


def _rms(rows: torch.Tensor) -> torch.Tensor:
    return rows.square().mean(1).sqrt()


def _share(rows: torch.Tensor) -> torch.Tensor:
    return rows.mean(1)


def _largest_ratio(top: torch.Tensor, bottom: torch.Tensor) -> float:
    """max(top / bottom), where 0/0 is 0."""
    return float(torch.where(top == 0, torch.zeros_like(top), top / bottom).max()) if top.numel() else 0.0
