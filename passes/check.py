"""The numeric check of the `exact` contract: is a rewritten program still the same function, as precise as it was?

Two questions, not to be mixed. *Rewrite*: both programs in float64 agree to 1e-10. *Numerics*: in its working dtype the
rewritten program is no further from the float64 result than a small multiple of the original's own error. The original's noise,
found by perturbing it at rounding level, stands where others set floors by hand, and tells programs too ill-conditioned to judge.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch

from ..ir import Node, Program
from ..ir.float64 import NoFloat64, Widening, widened
from ..ir.run import run

# Why these: over 15,364 correct rewrites of random programs none is off by 1e-10 in float64 and one by 4 x the larger of the
# original's error and noise; of planted faults 90 to 98% are.
PROMISE = 1e-10
RMSE_FACTOR = 4.0
ILL_CONDITIONED = 1e-12
NOISE_RUNS = 3

_ROUNDING = {torch.float64: 2.0**-52, torch.float32: 2.0**-23, torch.float16: 2.0**-10, torch.bfloat16: 2.0**-7}


@dataclass(frozen=True)
class Worst:
    """The element of an output that is furthest off: where, what was expected, what came, and the user's line behind it."""

    output: str
    index: tuple[int, ...]
    expected: float
    got: float
    where: str

    def __str__(self) -> str:
        at = f"[{', '.join(map(str, self.index))}]" if self.index else ""
        return f"{self.output}{at} is {self.got!r}, expected {self.expected!r}" + (f" (from {self.where})" if self.where else "")


@dataclass(frozen=True)
class Verdict:
    """`right`; `wrong` (another function); `unstable` (right in float64, too imprecise in the working dtype); `inconclusive`.

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
        return self.kind in ("wrong", "unstable")

    def __str__(self) -> str:
        parts = [self.kind, self.reason, str(self.worst) if self.worst is not None else ""]
        return ": ".join(part for part in parts if part)


def check_exact(before: Program, after: Program, inputs: Sequence[Any], *, states: Mapping[str, torch.Tensor] | None = None) -> Verdict:
    """Whether `after` is the function of `before` on flat `inputs` (one a leaf, constants included), as the exact contract has it.

    Raises:
        InputError: the inputs do not fit, or a program read from text has no weights.
    """
    return Reference(before, inputs, states).judge_exact(after)


@dataclass(frozen=True)
class _Values:
    """The outputs and new states of one run by label, which of them share storage with what, and whether it drew random numbers."""

    tensors: dict[str, Any]
    aliases: dict[str, frozenset[str]]
    random: bool


class Reference:
    """A program on given inputs: its outputs, those of its float64 program, and its noise, each computed once when first asked for.

    Many candidates can be judged against it.
    """

    def __init__(self, program: Program, inputs: Sequence[Any], states: Mapping[str, torch.Tensor] | None = None):
        self.program = program
        self.inputs = list(inputs)
        self.states = dict(states or {})
        self._widening = Widening()

    def judge_exact(self, candidate: Program) -> Verdict:
        """The verdict of the exact contract on `candidate`."""
        structure = self.judge_structure(candidate)
        if structure.fails:
            return structure
        try:
            wide = self._run_wide(candidate)
            expected, noise64 = self.float64, self.noise64
        except NoFloat64 as error:
            return Verdict("inconclusive", str(error))
        places = _places(candidate)
        verdicts = []
        for label, r in expected.tensors.items():
            rewrite = _judge_rewrite(label, r, wide.tensors[label], noise64[label], places.get(label, ""))
            # float32 and float64 draw differently from one generator state, so random numbers have no float64 counterpart.
            if rewrite.kind == "right" and not self.own.random:
                working = _Precision(self.own.tensors[label], self._candidate_values.tensors[label], r, self.noise[label])
                rewrite = working.judge(label, places.get(label, ""), rewrite.rewrite_error)
            verdicts.append(rewrite)
        return _worst_of(verdicts)

    def judge_structure(self, candidate: Program) -> Verdict:
        """Whether `candidate` returns the same tree of the same types, strides and aliases."""
        before, after = self.program.main, candidate.main
        if before.in_tree != after.in_tree or before.out_tree != after.out_tree:
            return Verdict("wrong", "the nesting of inputs or outputs changed")
        self._candidate_values = self._run(candidate)
        own, places = self.own, _places(candidate)
        if own.tensors.keys() != self._candidate_values.tensors.keys():
            return Verdict("wrong", "the states that the program updates changed")
        for label, value in own.tensors.items():
            difference = _type_difference(value, self._candidate_values.tensors[label])
            if not difference and own.aliases[label] != self._candidate_values.aliases[label]:
                difference = f"shares storage with {_listed(self._candidate_values.aliases[label])}, not {_listed(own.aliases[label])}"
            if difference:
                where = f" (from {places[label]})" if places.get(label) else ""
                return Verdict("wrong", f"{label} {difference}{where}")
        return Verdict("right")

    # --- runs, each made once ---

    @cached_property
    def own(self) -> _Values:
        """The program's outputs in its working dtype."""
        return self._run(self.program)

    @cached_property
    def float64(self) -> _Values:
        """r: the outputs of the float64 program. Raises NoFloat64 where there is none."""
        return self._run_wide(self.program)

    @cached_property
    def noise64(self) -> dict[str, Any]:
        """Per output: the largest element-wise error of the float64 program under perturbation at float64 rounding."""
        runs = [self._perturbed(self._widening.program(self.program), seed, wide=True) for seed in range(NOISE_RUNS)]
        return {label: _largest_error(r, [each.tensors[label] for each in runs]) for label, r in self.float64.tensors.items()}

    @cached_property
    def noise(self) -> dict[str, Any]:
        """Per output: the error of each run of the program under perturbation at its own rounding."""
        runs = [self._perturbed(self.program, seed, wide=False) for seed in range(NOISE_RUNS)]
        return {label: [_error(each.tensors[label], r) for each in runs] for label, r in self.float64.tensors.items()}

    def _run(self, program: Program, inputs: "list[Any] | None" = None, states: Any = None, observe: Any = None) -> _Values:
        inputs = self.inputs if inputs is None else inputs
        states = self.states if states is None else states
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            start = torch.get_rng_state()
            outputs, new_states = run(program, inputs, states=states, observe=observe)
            random = not torch.equal(start, torch.get_rng_state())
        labelled = {f"output {index}": value for index, value in enumerate(outputs)}
        labelled |= {f"state {name}": value for name, value in new_states.items()}
        return _Values(labelled, _aliases(program, labelled, inputs, states), random)

    def _run_wide(self, program: Program) -> _Values:
        return self._run(self._widening.program(program), *self._wide_arguments())

    def _wide_arguments(self) -> tuple[list[Any], dict[str, torch.Tensor]]:
        return [_wide(value) for value in self.inputs], {name: _wide(value) for name, value in self.states.items()}

    def _perturbed(self, program: Program, seed: int, *, wide: bool) -> _Values:
        inputs, states = self._wide_arguments() if wide else (self.inputs, self.states)
        perturb = _Perturbation(seed)
        noisy = Program(
            program.functions.values(),
            {name: replace(weight, tensor=perturb(weight.tensor), known_digest="?") for name, weight in program.weights.items()},
            program.symbols,
        )
        return self._run(
            noisy,
            [perturb(value) for value in inputs],
            {name: perturb(value) for name, value in states.items()},
            lambda node, value: perturb(value),
        )


class _Perturbation:
    """Multiplies floats by 1 + e*d, d drawn from {-1, 0, 1} for each element, e one unit in the last place of its dtype."""

    def __init__(self, seed: int):
        self.generator = torch.Generator().manual_seed(seed)

    def __call__(self, value: Any) -> Any:
        if isinstance(value, tuple | list):
            return type(value)(self(item) for item in value)
        if not isinstance(value, torch.Tensor) or value.dtype not in _ROUNDING:
            return value
        step = torch.randint(-1, 2, value.shape, generator=self.generator, dtype=torch.int8).to(value.device, value.dtype)
        moved = value * (1 + step * _ROUNDING[value.dtype])
        # A mask at the end of the dtype's range must not become infinite.
        return torch.where(torch.isfinite(moved) | ~torch.isfinite(value), moved, value)


def _wide(value: Any) -> Any:
    return value.to(widened(value.dtype)) if isinstance(value, torch.Tensor) else value


# --- structure -------------------------------------------------------------------------------------------------------------


def _type_difference(own: Any, other: Any) -> str:
    if type(own) is not type(other):
        return f"is a {type(other).__name__}, not a {type(own).__name__}"
    if not isinstance(own, torch.Tensor):
        return ""
    for name in ("dtype", "shape", "device"):
        if getattr(own, name) != getattr(other, name):
            return f"has {name} {_plain(getattr(other, name))}, not {_plain(getattr(own, name))}"
    strides = [(a, b) for size, a, b in zip(own.shape, own.stride(), other.stride(), strict=True) if size > 1]
    if own.numel() > 0 and any(a != b for a, b in strides):
        return f"has strides {list(other.stride())}, not {list(own.stride())}"
    return ""


def _plain(value: Any) -> str:
    return str(list(value)) if isinstance(value, torch.Size) else str(value)


def _aliases(program: Program, labelled: dict[str, Any], inputs: Sequence[Any], states: Mapping[str, torch.Tensor]) -> dict[str, frozenset[str]]:
    """Output label -> the inputs, weights and other outputs that lie in the same memory."""
    owners: dict[int, set[str]] = {}

    def own(name: str, value: Any) -> None:
        if isinstance(value, torch.Tensor) and value.numel() > 0:
            owners.setdefault(value.untyped_storage().data_ptr(), set()).add(name)

    for index, value in enumerate(inputs):
        own(f"input {index}", value)
    for name, weight in program.weights.items():
        own("a weight", states.get(name, weight.tensor))
    for label, value in labelled.items():
        own(label, value)
    return {
        label: frozenset(owners[value.untyped_storage().data_ptr()] - {label})
        if isinstance(value, torch.Tensor) and value.numel() > 0
        else frozenset()
        for label, value in labelled.items()
    }


def _listed(names: frozenset[str]) -> str:
    return ", ".join(sorted(names)) or "nothing"


def _places(program: Program) -> dict[str, str]:
    """Output label -> the user's line of the node that computes it."""
    signature, leaves = program.main.signature(), program.main.outputs
    labels = [f"output {index}" for index in range(len(signature.outputs))] + [f"state {name}" for name in signature.new_states]
    return {label: str(leaf.meta.get("where") or "") if isinstance(leaf, Node) else "" for label, leaf in zip(labels, leaves, strict=True)}


# --- values ----------------------------------------------------------------------------------------------------------------


def _judge_rewrite(label: str, r: Any, c: Any, noise: Any, where: str) -> Verdict:
    """The float64 rule: equal non-finite masks, and abs(c - r) <= 1e-10 max(abs r), whole and per index of dim 0."""
    if not isinstance(r, torch.Tensor):
        return Verdict("right") if repr(r) == repr(c) else Verdict("wrong", f"{label} is {c!r}, expected {r!r}")
    difference = _mask_difference(label, r, c, where)
    if difference is not None:
        return Verdict("wrong", "NaN or infinity moved", difference, math.inf)
    if not r.dtype.is_floating_point and not r.dtype.is_complex:
        unequal = (r != c).to(torch.float64)
        if unequal.any():
            return Verdict("wrong", "integers differ", _worst(label, unequal, r, c, where), math.inf)
        return Verdict("right")
    error, scale = _finite_abs(c - r, r), _finite_abs(r, r)
    verdict = Verdict("right")
    for e, s, n in zip(_groups(error), _groups(scale), _groups(noise), strict=True):
        top, size, own = (_amax(x) for x in (e, s, n))
        judged = own <= ILL_CONDITIONED * size
        if len(top) == 1 and not judged.all():
            return Verdict("inconclusive", f"{label} is too ill-conditioned to judge on these inputs (noise {own.max():.1e} of {size.max():.1e})")
        share = _largest_ratio(top[judged], size[judged])
        verdict = replace(verdict, rewrite_error=max(verdict.rewrite_error, share))
        if share > PROMISE:
            relative = e / size.clamp_min(torch.finfo(torch.float64).tiny).unsqueeze(1) * judged.unsqueeze(1)
            worst = _worst(label, relative.reshape(error.shape), r, c, where)
            return replace(verdict, kind="wrong", reason=f"off by {share:.1e} of the output's scale in float64", worst=worst)
    return verdict


@dataclass(frozen=True)
class _Precision:
    """The working-dtype rule for one output: RMSE(c, r) <= 4 max(RMSE(original, r), noise), whole and per index of dim 0."""

    original: Any
    candidate: Any
    r: Any
    noise: Any

    def judge(self, label: str, where: str, rewrite_error: float) -> Verdict:
        right = Verdict("right", rewrite_error=rewrite_error)
        if not isinstance(self.r, torch.Tensor):
            return right
        moved = _mask_difference(label, self.original, self.candidate, where)
        if moved is not None:
            near_overflow = abs(float(self.r[moved.index])) > torch.finfo(self.original.dtype).max / 8
            return replace(right, kind="inconclusive" if near_overflow else "unstable", reason="NaN or infinity moved in the working dtype", worst=moved)
        error, own = _error(self.candidate, self.r), _error(self.original, self.r)
        scale = _finite_abs(self.r, self.r).to(torch.float64)
        verdict = right
        floors = [own, *self.noise]
        for grouped in zip(_groups(error), _groups(scale), *map(_groups, floors), strict=True):
            e, s, *fs = (_rms(x) for x in grouped)
            ratio = _largest_ratio(e, torch.stack(fs).amax(0))
            verdict = replace(verdict, error=max(verdict.error, _largest_ratio(e, s)), error_ratio=max(verdict.error_ratio, ratio))
            if ratio > RMSE_FACTOR:
                reason = f"{ratio:.3g} x as far from float64 as the original"
                return replace(verdict, kind="unstable", reason=reason, worst=_worst(label, error, self.r, self.candidate, where))
        return verdict


def _error(value: Any, r: Any) -> Any:
    """Element-wise distance to r where both are finite; for integers 1 where they differ."""
    if not isinstance(r, torch.Tensor):
        return None
    if not r.dtype.is_floating_point and not r.dtype.is_complex:
        return (value != r).to(torch.float64)
    return _finite_abs(value.to(r.dtype) - r, r)


def _largest_error(r: Any, runs: Sequence[Any]) -> Any:
    return torch.stack([_error(value, r) for value in runs]).amax(0) if isinstance(r, torch.Tensor) else None


def _finite_abs(value: torch.Tensor, r: torch.Tensor) -> torch.Tensor:
    """abs(value) where r and it are finite, else 0: masks are compared apart."""
    return torch.where(torch.isfinite(r) & torch.isfinite(value), value.abs(), torch.zeros_like(value.abs()))


def _mask_difference(label: str, r: torch.Tensor, c: torch.Tensor, where: str) -> Worst | None:
    if not r.dtype.is_floating_point:
        return None
    unequal = (r.isnan() != c.isnan()) | (r.isposinf() != c.isposinf()) | (r.isneginf() != c.isneginf())
    return _worst(label, unequal.to(torch.float64), r, c, where) if unequal.any() else None


def _groups(value: torch.Tensor) -> list[torch.Tensor]:
    """The whole as one row and, where dim 0 has several indices, a row for each: a whole-tensor norm hides a wrong sample."""
    if value.numel() == 0:
        return []
    whole = value.reshape(1, -1)
    return [whole, value.reshape(value.size(0), -1)] if value.dim() > 1 and value.size(0) > 1 else [whole]


def _amax(rows: torch.Tensor) -> torch.Tensor:
    return rows.amax(1)


def _rms(rows: torch.Tensor) -> torch.Tensor:
    return rows.square().mean(1).sqrt()


def _largest_ratio(top: torch.Tensor, bottom: torch.Tensor) -> float:
    """max(top / bottom), where 0/0 is 0."""
    if top.numel() == 0:
        return 0.0
    return float(torch.where(top == 0, torch.zeros_like(top), top / bottom).max())


def _worst(label: str, badness: torch.Tensor, r: torch.Tensor, c: torch.Tensor, where: str) -> Worst:
    index = tuple(int(i) for i in torch.unravel_index(badness.reshape(-1).argmax(), badness.shape)) if badness.dim() else ()
    return Worst(label, index, r[index].item(), c[index].item(), where)


def _worst_of(verdicts: Sequence[Verdict]) -> Verdict:
    """The gravest verdict with the largest errors of all."""
    if not verdicts:
        return Verdict("right")
    gravest = min(verdicts, key=lambda v: ("wrong", "unstable", "inconclusive", "right").index(v.kind))
    return replace(
        gravest,
        rewrite_error=max(v.rewrite_error for v in verdicts),
        error=max(v.error for v in verdicts),
        error_ratio=max(v.error_ratio for v in verdicts),
    )
