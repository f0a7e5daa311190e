"""The numeric check of the `exact` contract: is a rewritten program still the same function, as precise as it was?

Runs both programs, in float64 and in their working dtype, and hands the values to the verdict rule. The original's noise, found by
perturbing it at rounding level, stands where others set floors by hand, and tells programs too ill-conditioned to judge.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch

from ..ir import Node, Program
from ..ir.calls import draws
from ..ir.errors import GraphwrightError, InputError
from ..ir.float64 import NoFloat64, Widening, widened
from ..ir.run import run
from ..ir.strides import laid_out
from .inputs import random_inputs
from .jumps import first_jump
from .outputs import aliases_of, computed_by, leaves_of, listed, type_difference, where_of
from .verdict import Comparison, Verdict, distance, worst_of

NOISE_RUNS = 3
DOUBTFUL_RUNS = (
    15  # before a program is called unstable: three runs leave a single number where it was in one case of 27, and more by rounding
)

_ROUNDING = {torch.float64: 2.0**-52, torch.float32: 2.0**-23, torch.float16: 2.0**-10, torch.bfloat16: 2.0**-7}


def check_exact(before: Program, after: Program, inputs: Sequence[Any], *, states: Mapping[str, torch.Tensor] | None = None) -> Verdict:
    """Whether `after` is the function of `before` on flat `inputs` (one a leaf, constants included), as the exact contract has it.

    Raises:
        InputError: the inputs do not fit, or a program read from text has no weights.
    """
    return Reference(before, inputs, states).judge_exact(after)


@dataclass(frozen=True)
class _Values:
    """The outputs and new states of one run by label, and which of them share storage with what."""

    tensors: dict[str, Any]
    aliases: dict[str, frozenset[str]]


@dataclass(frozen=True)
class _Judged:
    """The candidate judged last, with its runs."""

    program: Program
    own: _Values
    wide_program: Program | None = None
    float64: _Values | None = None


class Reference:
    """A program on given inputs: its outputs, those of its float64 program, and its noise, each computed once when first asked for.

    Many candidates can be judged against it. The runs of the one judged last are kept until `forget` or `followed_by`. References to one
    program on several inputs may share a `widening`.
    """

    def __init__(
        self,
        program: Program,
        inputs: Sequence[Any],
        states: Mapping[str, torch.Tensor] | None = None,
        widening: Widening | None = None,
    ):
        self.program = program
        self.inputs = list(inputs)
        self.states = dict(states or {})
        self._widening = Widening() if widening is None else widening
        self._judged: _Judged | None = None
        self._others: dict[int, Reference] = {}

    def on_other_inputs(self, seed: int) -> "Reference":
        """The same program on inputs made up from `seed`; made once for each seed."""
        if seed not in self._others:
            self._others[seed] = Reference(self.program, random_inputs(self.program, seed))
        return self._others[seed]

    def followed_by(self, candidate: Program, inputs: Sequence[Any] | None = None) -> "Reference":
        """A reference that holds `candidate` on `inputs` (made up from its signature when None); runs made here are not made again."""
        judged = self._judged
        following = Reference(candidate, random_inputs(candidate) if inputs is None else inputs, self.states)
        if judged is None or judged.program is not candidate or not _same_values(following.inputs, self.inputs):
            return following
        following.inputs = self.inputs  # the outputs may lie in their memory
        following._widening = self._widening
        following.__dict__["own"] = judged.own
        if judged.float64 is not None:
            following.__dict__["wide_program"], following.__dict__["float64"] = judged.wide_program, judged.float64
        return following

    def in_float64(self, candidate: Program) -> Program:
        """The float64 program of `candidate`. Raises NoFloat64 where there is none."""
        return self._widening.program(candidate)

    def outputs(self) -> dict[str, Any]:
        """The program's outputs and new states by label, in its working dtype."""
        return self.own.tensors

    def outputs_of(self, candidate: Program) -> dict[str, Any] | Verdict:
        """Those of `candidate`, or the verdict that it fails to run."""
        values = self._run_candidate(candidate) if self._judged is None or self._judged.program is not candidate else self._judged.own
        return values if isinstance(values, Verdict) else values.tensors

    def forget(self) -> None:
        """Lets go of the outputs of the candidate judged last."""
        self._judged = None
        for other in self._others.values():
            other.forget()

    def judge_exact(self, candidate: Program, *, strict: bool = False) -> Verdict:
        """The verdict of the exact contract on `candidate`; `strict` is the bound of tests of our own passes.

        A failure is none where an operation that jumps (a comparison, argmax, round) stands so near its jump in the original that rounding
        alone may take it across: such a verdict is inconclusive.
        """
        verdict = self._judge_exact(candidate, strict)
        jump = first_jump(self, verdict) if verdict.fails and verdict.worst is not None else ""
        return Verdict("inconclusive", jump) if jump else verdict

    def _judge_exact(self, candidate: Program, strict: bool) -> Verdict:
        working = self._run_candidate(candidate)
        if isinstance(working, Verdict):
            return working
        structure = self._judge_structure(candidate, working)
        if structure.fails:
            return structure
        try:
            wide = self._run_candidate_wide(candidate)
            verdict = self._compare(candidate, wide, working, self.noise, strict)
            return verdict if verdict.kind != "unstable" else self._compare(candidate, wide, working, self.noise_in_doubt, strict)
        except NoFloat64 as error:
            return Verdict("inconclusive", str(error))

    def _compare(
        self, candidate: Program, wide: _Values, working: _Values, noise: Mapping[str, Sequence[torch.Tensor]], strict: bool
    ) -> Verdict:
        leaves = leaves_of(candidate)
        return worst_of(
            [
                Comparison(
                    label=label,
                    where=where_of(leaves[label]),
                    node=computed_by(leaves[label]),
                    r=r,
                    c=wide.tensors[label],
                    own=self.own.tensors[label],
                    working=working.tensors[label],
                    noise64=self.noise64[label],
                    noise=noise[label],
                ).judge(random=self._is_random, strict=strict)
                for label, r in self.float64.tensors.items()
            ]
        )

    def judge_values(self, values: Mapping[str, Any]) -> Verdict:
        """The verdict on outputs and new states, by label, that something else computed in the program's working dtype (an exported
        file in its runtime): types, and the second rule. Of a program that draws random numbers, types alone."""
        for label, own in self.own.tensors.items():
            got = values[label]
            if isinstance(own, torch.Tensor) and (got.dtype, got.shape) != (own.dtype, own.shape):
                return Verdict("wrong", f"{label} is {got.dtype}{list(got.shape)}, not {own.dtype}{list(own.shape)}")
        try:
            r, noise64, noise = self.float64.tensors, self.noise64, self.noise
        except NoFloat64 as error:
            return Verdict("inconclusive", str(error))
        leaves = leaves_of(self.program)
        comparisons = [
            Comparison(label, where_of(leaves[label]), value, value, self.own.tensors[label], values[label], noise64[label], noise[label])
            for label, value in r.items()
        ]
        return worst_of([each.judge(random=self._is_random) for each in comparisons])

    def judge_structure(self, candidate: Program) -> Verdict:
        """Whether `candidate` returns the same tree of the same types, strides and aliases."""
        working = self._run_candidate(candidate)
        return working if isinstance(working, Verdict) else self._judge_structure(candidate, working)

    def _judge_structure(self, candidate: Program, working: _Values) -> Verdict:
        before, after = self.program.main, candidate.main
        if before.in_tree != after.in_tree or before.out_tree != after.out_tree:
            return Verdict("wrong", "the nesting of inputs or outputs changed")
        if self.own.tensors.keys() != working.tensors.keys():
            return Verdict("wrong", "the states that the program updates changed")
        leaves = leaves_of(candidate)
        for label, value in self.own.tensors.items():
            difference = type_difference(value, working.tensors[label])
            if not difference and self.own.aliases[label] != working.aliases[label]:
                difference = f"shares memory with {listed(working.aliases[label])}, not {listed(self.own.aliases[label])}"
            if difference:
                place = where_of(leaves[label])
                return Verdict("wrong", f"{label} {difference}" + (f" (from {place})" if place else ""))
        return Verdict("right")

    @cached_property
    def _is_random(self) -> bool:
        return any(node.op == "call_function" and draws(node) for node in self.program.nodes())

    # --- runs, each made once ---

    @cached_property
    def own(self) -> _Values:
        """The program's outputs in its working dtype. Raises InputError when it fails on the inputs."""
        try:
            return self._run(self.program)
        except GraphwrightError:
            raise
        except Exception as error:
            raise InputError(f"the program fails on the example inputs ({type(error).__name__}: {error}): give others") from error

    @cached_property
    def float64(self) -> _Values:
        """r: the outputs of the float64 program. Raises NoFloat64 where there is none."""
        return self._run(self.wide_program, *self._wide_arguments())

    @cached_property
    def wide_program(self) -> Program:
        """The float64 program. Raises NoFloat64 where there is none."""
        return self._widening.program(self.program)

    @cached_property
    def noise64(self) -> dict[str, list[torch.Tensor]]:
        """Per output: its distance from r in each run of the float64 program perturbed at float64 rounding."""
        return self._distances(self.wide_program, *self._wide_arguments(), NOISE_RUNS)

    @cached_property
    def noise(self) -> dict[str, list[torch.Tensor]]:
        """Per output: its distance from r in each run of the program perturbed at its own rounding."""
        return self._distances(self.program, self.inputs, self.states, NOISE_RUNS)

    @cached_property
    def noise_in_doubt(self) -> dict[str, list[torch.Tensor]]:
        """As `noise`, of more runs."""
        return self._distances(self.program, self.inputs, self.states, DOUBTFUL_RUNS)

    def _distances(
        self, program: Program, inputs: Sequence[Any], states: Mapping[str, torch.Tensor], count: int
    ) -> dict[str, list[torch.Tensor]]:
        runs = [self._perturbed(program, inputs, states, _Perturbation(seed)) for seed in range(count)]
        return {
            label: [_distance(label, run.tensors[label], r) for run in (self.own, *runs)][1:] if isinstance(r, torch.Tensor) else []
            for label, r in self.float64.tensors.items()
        }

    def observed(self, seed: int, scale: float, observe: Callable[[Node, Any], None], *, wide: bool) -> None:
        """Runs the program, or its float64 program, perturbed at `scale` times its rounding (0: not at all); shows what each call gives."""

        def show(node: Node, value: Any) -> Any:
            observe(node, value)
            return perturb(value) if _may_round(node) else value

        perturb = _Perturbation(seed, scale)
        arguments = self._wide_arguments() if wide else (self.inputs, self.states)
        self._perturbed(self.wide_program if wide else self.program, *arguments, perturb, show)

    def _perturbed(
        self,
        program: Program,
        inputs: Sequence[Any],
        states: Mapping[str, torch.Tensor],
        perturb: "_Perturbation",
        observe: Callable[[Node, Any], Any] | None = None,
    ) -> _Values:
        weights = {name: replace(w, tensor=perturb(w.tensor), known_digest="?") for name, w in program.weights.items()}
        noisy = Program(program.functions.values(), weights, program.symbols)
        moved_inputs = [perturb(value) for value in inputs]
        moved_states = {name: perturb(value) for name, value in states.items()}
        moved = observe or (lambda node, value: perturb(value) if _may_round(node) else value)
        return self._run(noisy, moved_inputs, moved_states, moved)

    def _run_candidate(self, candidate: Program) -> _Values | Verdict:
        self.own  # noqa: B018  inputs that the original itself refuses are an InputError, not a verdict
        self._judged = None
        try:
            values = self._run(candidate)
        except GraphwrightError:
            raise
        except Exception as error:
            return Verdict("wrong", f"the rewritten program fails to run: {type(error).__name__}: {error}")
        self._judged = _Judged(candidate, values)
        return values

    def _run_candidate_wide(self, candidate: Program) -> _Values:
        wide_program = self._widening.program(candidate)
        values = self._run(wide_program, *self._wide_arguments())
        if self._judged is not None:
            self._judged = replace(self._judged, wide_program=wide_program, float64=values)
        return values

    def _run(
        self,
        program: Program,
        inputs: Sequence[Any] | None = None,
        states: Mapping[str, torch.Tensor] | None = None,
        observe: Callable[[Node, Any], Any] | None = None,
    ) -> _Values:
        inputs = self.inputs if inputs is None else inputs
        states = self.states if states is None else states
        with _seeded([*inputs, *states.values(), *(weight.tensor for weight in program.weights.values())]):
            outputs, new_states = run(program, inputs, states=states, observe=observe)
        labelled = {f"output {index}": value for index, value in enumerate(outputs)}
        labelled |= {f"state {name}": value for name, value in new_states.items()}
        return _Values(labelled, aliases_of(program, labelled, inputs, states))

    def _wide_arguments(self) -> tuple[list[Any], dict[str, torch.Tensor]]:
        return [_wide(value) for value in self.inputs], {name: _wide(value) for name, value in self.states.items()}


@contextmanager
def _seeded(values: Sequence[Any]) -> Iterator[None]:
    """Seeds the generators of the CPU and of the GPUs that hold `values`; all are put back, and no other is touched."""
    gpus = sorted({value.get_device() for value in values if isinstance(value, torch.Tensor) and value.is_cuda})
    with torch.random.fork_rng(devices=gpus):
        for generator in (torch.default_generator, *(torch.cuda.default_generators[gpu] for gpu in gpus)):
            generator.manual_seed(0)
        yield


def _may_round(node: Node) -> bool:
    """Whether a call's result may be rounded: counts are not, nor are integers that are converted, on which sizes and places depend."""
    if node.target is torch.ops.aten._to_copy.default:
        source: Any = node.args[0]
        return bool(source.meta["val"].dtype in _ROUNDING)
    return node.target is not torch.ops.aten.histc.default


def _distance(label: str, value: torch.Tensor, r: torch.Tensor) -> torch.Tensor:
    if value.shape != r.shape:  # of how many are not zero, or are no duplicates
        raise NoFloat64(f"{label} is of other sizes when values move by their rounding")
    return distance(value, r)


class _Perturbation:
    """Multiplies floats by 1 + e*d, d drawn from {-1, 0, 1} for each element, e `scale` times the dtype's distance from 1 to the next
    number."""

    def __init__(self, seed: int, scale: float = 1.0):
        self.generator = torch.Generator().manual_seed(seed)
        self.scale = scale

    def __call__(self, value: Any) -> Any:
        if isinstance(value, tuple | list):
            return type(value)(self(item) for item in value)
        if not isinstance(value, torch.Tensor) or value.dtype not in _ROUNDING:
            return value
        step = torch.randint(-1, 2, value.shape, generator=self.generator, dtype=torch.int8).to(value.device, value.dtype)
        moved = value * (1 + step * (self.scale * _ROUNDING[value.dtype]))
        # A mask at the end of the dtype's range must not become infinite.
        return torch.where(torch.isfinite(moved) | ~torch.isfinite(value), moved, value)


def _wide(value: Any) -> Any:
    return laid_out(value.to(widened(value.dtype)), value.stride()) if isinstance(value, torch.Tensor) else value


def _same_values(some: Sequence[Any], others: Sequence[Any]) -> bool:
    return len(some) == len(others) and all(a is b or _same_value(a, b) for a, b in zip(some, others, strict=True))


def _same_value(a: Any, b: Any) -> bool:
    if not isinstance(a, torch.Tensor) or not isinstance(b, torch.Tensor):
        return type(a) is type(b) and not isinstance(a, torch.Tensor) and bool(a == b)
    same_type = (a.dtype, a.device, a.shape, a.stride()) == (b.dtype, b.device, b.shape, b.stride())
    return same_type and torch.equal(a, b)
