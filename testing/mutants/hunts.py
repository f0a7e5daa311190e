"""How planted mistakes are looked for: programs that make the mistaken code run, one after another, and what is asked of each.

A hunt names passes and what their programs are made of. Programs are made before the mistake is planted, so that it is the compiler that is
mistaken and not what tries it.
"""

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch

from ... import models
from ...ir import Fuel, Program, Weight, capture
from ...ir.errors import GraphwrightError
from ...passes import Pass, PassManager, SliceGroups, Verdict, parse_pipeline
from ...passes.check import Reference
from ...passes.inputs import random_inputs
from ...runtime.executor import Executor
from ...runtime.pass_cache import NotKept, pass_key
from ..choices import RandomChoices
from ..inputs import input_sets
from ..pipelines import as_arguments, calibrated_on, calibrates
from ..programs import random_program
from ..verdict import TrialResult, try_passes


@dataclass(frozen=True)
class Subject:
    """A program with inputs and the passes that are tried on it."""

    program: Program
    passes: tuple[Pass, ...]
    inputs: tuple[Sequence[Any], ...]


@dataclass(frozen=True)
class Found:
    """What saw a mistake, and on which inputs (None: none are needed)."""

    catcher: str
    verdict: Verdict
    inputs: Sequence[Any] | None = None


Question = Callable[[Subject], Found | None]


@dataclass(frozen=True)
class Hunt:
    """`ops` and `max_nodes` are those of random programs; or `network` is a network of the zoo, or "decoder" with symbols for its sizes.
    `question` is what is asked of each subject: that passes keep their contracts, unless told otherwise."""

    passes: str | tuple[Pass, ...]
    ops: tuple[str, ...] = ()
    max_nodes: int = 6
    network: str = ""
    question: str = "contracts"

    def subjects(self, seed: int) -> Iterator[Subject]:
        """Without end, equal for equal seeds."""
        number = 0
        while True:
            yield self._subject(seed, number)
            number += 1

    def _subject(self, seed: int, number: int) -> Subject:
        choices = RandomChoices(random.Random(f"{seed}/{number}"))
        program = _network(self.network) if self.network else random_program(choices, self.ops, self.max_nodes)
        inputs = tuple(input_sets(program, number)) if not self.network else (random_inputs(program, number),)
        return Subject(program, _ready(self.passes, program, inputs), inputs)

    def ask(self, subject: Subject) -> Found | None:
        """What sees a mistake on `subject`; None where nothing does."""
        return QUESTIONS[self.question](subject)


def _ready(passes: str | tuple[Pass, ...], program: Program, inputs: Sequence[Sequence[Any]]) -> tuple[Pass, ...]:
    pipeline = parse_pipeline(passes)
    if not any(map(calibrates, pipeline)):
        return pipeline
    return tuple(calibrated_on(each, [as_arguments(program, leaves) for leaves in inputs[:2]]) for each in pipeline)


@cache
def _network(name: str) -> Program:
    module, args, kwargs = models.load(name.removeprefix("dynamic "), "tiny")
    if not name.startswith("dynamic "):
        return capture(module, args, kwargs)
    from ...ir.decoder_example import decoder_example

    example = decoder_example(module)
    return capture(module, (), example.kwargs, dynamic_shapes=example.dynamic_shapes)


# --- questions -------------------------------------------------------------------------------------------------------------------


def _contracts(subject: Subject) -> Found | None:
    """Whether each pass keeps its contract, the verifier behind each."""
    result = try_passes(subject.program, subject.passes, subject.inputs)
    if result.verdict.kind == "refused":
        return Found("refusal", result.verdict)
    if not result.fails:
        return None
    inputs = None if result.input_set is None else subject.inputs[result.input_set]
    return Found(_catcher(result), result.verdict, inputs)


def _catcher(result: TrialResult) -> str:
    reason, kind = str(result.verdict), result.verdict.kind
    if kind == "crashed":
        return "verifier" if "breaks a rule of the IR" in reason else "error"
    if kind == "unstable":
        return "rmse"
    if result.verdict.worst is not None:
        return "float64"
    known = {"its text": "text", "shares memory": "aliasing", "states": "states"}
    return next((catcher for part, catcher in known.items() if part in reason), "types" if "has " in reason else "float64")


def _running(subject: Subject) -> Found | None:
    """Whether the program that passes make runs as it says: the executor beside the reference run, a second call as the first, and the
    inputs as they were."""
    after = PassManager(subject.passes).run(subject.program).program
    executor = Executor(after)
    for inputs in subject.inputs:
        reference = Reference(after, inputs)
        expected = reference.outputs()
        for _ in range(2):
            own = [_own(value) for value in inputs]
            try:
                outputs, states = executor(own)
            except GraphwrightError:
                raise
            except Exception as error:
                return Found("running", Verdict("crashed", f"{type(error).__name__}: {error}"), inputs)
            if not all(map(_is_as_it_was, own, inputs)):
                return Found("running", Verdict("wrong", "a call wrote into an input"), inputs)
            values = dict(zip(expected, [*outputs, *states.values()], strict=True))
            verdict = reference.judge_values(values)
            if verdict.fails:
                return Found("running", verdict, inputs)
    return None


def _own(value: Any) -> Any:
    if not isinstance(value, torch.Tensor):
        return value
    return value if 0 in value.stride() else value.detach().clone()


def _is_as_it_was(own: Any, given: Any) -> bool:
    return not isinstance(own, torch.Tensor) or torch.equal(own.nan_to_num(), given.nan_to_num())


def _fuel(subject: Subject) -> Found | None:
    """Whether n units of fuel are n rewrites, and these are those of a whole run."""
    whole = [record for report in PassManager(subject.passes).run(subject.program).reports for record in report.records]
    for count in range(len(whole)):
        fuel = Fuel(left=count)
        records = [r for report in PassManager(subject.passes, fuel=fuel).run(subject.program).reports for r in report.records]
        if [(r.rule, r.before) for r in records] != [(r.rule, r.before) for r in whole[:count]]:
            return Found("fuel", Verdict("wrong", f"{count} units of fuel gave {len(records)} rewrites"))
    return None


def _keys(subject: Subject) -> Found | None:
    """Whether what gives another result has another key: a weight's element, an attribute, an option, a pass less."""
    program, passes = subject.program, subject.passes
    key = _key(program, passes)
    if key is None:
        return None  # programs with symbols are not kept
    for what, other, others in _perturbed(program, passes):
        if key == _key(other, others) and _made(program, passes) != _made(other, others):
            return Found("key", Verdict("wrong", f"with {what} changed the key is the same"))
    return None


def _key(program: Program, passes: Sequence[Pass]) -> dict[str, str] | None:
    try:
        return pass_key(program, passes)
    except NotKept:
        return None


def _made(program: Program, passes: Sequence[Pass]) -> str:
    result = PassManager(passes).run(program)
    return f"{result.program}{[w.digest for w in result.program.weights.values()]}{result.program.history[-1:]}"


def _perturbed(program: Program, passes: tuple[Pass, ...]) -> Iterator[tuple[str, Program, tuple[Pass, ...]]]:
    for name, weight in program.weights.items():
        if weight.tensor is not None and weight.tensor.numel() and weight.tensor.dtype.is_floating_point:
            changed = program.copy()
            tensor = weight.tensor.detach().clone()
            tensor.view(-1)[-1] += 1
            changed.weights[name] = Weight.of(name, tensor, weight.kind)
            yield f"an element of {name}", changed, passes
    for place, node in enumerate(program.main.calls):
        for position, value in enumerate(node.args):
            if isinstance(value, float):
                for other in (-value if value == 0 else value * 1.5,):
                    changed = program.copy()
                    twin = changed.main.calls[place]
                    twin.args = (*twin.args[:position], other, *twin.args[position + 1 :])
                    yield f"an attribute of {node.target}", changed, passes
    yield "a pass left out", program, passes[:-1]
    for place, each in enumerate(passes):
        if isinstance(each, SliceGroups):
            yield "an option", program, (*passes[:place], replace(each, memory_budget="100%"), *passes[place + 1 :])


QUESTIONS: dict[str, Question] = {"contracts": _contracts, "running": _running, "fuel": _fuel, "keys": _keys}
