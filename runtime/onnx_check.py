"""Whether an ONNX file is the function that it was made from: checked, loaded in onnxruntime, and run beside the program on inputs that
neither was made with."""

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..ir import Function, Node, Program
from ..ir.errors import ContractError, TargetError, first_line
from ..ir.ops.onnx_node import from_array, to_array
from ..passes.check import Reference
from ..passes.inputs import hard_inputs, random_inputs, zero_inputs
from ..passes.verdict import Verdict, worst_of

_SEED = 20  # of no inputs that a program was captured or checked with
_KINDS: tuple[tuple[str, Callable[[Program, int], list[Any]]], ...] = (
    ("random", random_inputs),
    ("hard", hard_inputs),
    ("zero", zero_inputs),
)


def check_form(path: Path) -> None:
    """Raises ContractError where onnx's checker finds something wrong with the file."""
    import onnx

    try:
        onnx.checker.check_model(str(path))
    except Exception as error:  # of whatever class
        raise ContractError(
            f"the ONNX model that was made is not valid, which is a defect of graphwright's: {first_line(error)}"
        ) from error


@dataclass(frozen=True)
class Trial:
    """A function on inputs of one kind: `inputs` are what a model of it takes, in order."""

    kind: str
    inputs: list[torch.Tensor]
    program: Program  # the function alone
    _reference: Reference

    def judge(self, results: Sequence[Any]) -> Verdict:
        """The verdict on what a model gave: tensors, one for each output and new state that is no constant."""
        given, signature = iter(results), self.program.main.signature()
        labels = [f"output {place}" for place in range(len(signature.outputs))] + [f"state {name}" for name in signature.new_states]
        leaves = zip(labels, self.program.main.outputs, strict=True)
        return self._reference.judge_values({label: _given(leaf, given) for label, leaf in leaves})


def trials(program: Program, function: str) -> Iterator[Trial]:
    """`function` of `program` on random, hard and zero inputs that it was not made with; on random ones alone where a Loop of ONNX ends by
    data, since it may never end on zeros."""
    alone = _alone(program, program.functions[function])
    states = _states(alone)
    loops = any(str(node.kwargs.get("op")).endswith(".Loop") for node in alone.main.calls)
    for kind, make in _KINDS[:1] if loops else _KINDS:
        inputs = _fitting(alone, make(alone, _SEED))
        yield Trial(kind, _fed(alone, inputs, states), alone, Reference(alone, inputs, states))


def check_values(path: Path, program: Program, function: str) -> Verdict:
    """How far onnxruntime's results of the file are from those of `function`, on random, hard and zero inputs.

    Raises:
        ContractError: they differ by more than the rounding of the program itself (specs/trust.md, section 2).
        TargetError: onnxruntime is missing, does not load the file, or fails on it.
    """
    session, verdicts = _session(path), []
    for trial in trials(program, function):
        verdict = trial.judge(_results(session, trial))
        if verdict.fails:
            raise ContractError(f"the ONNX model of {function} is not the program on {trial.kind} inputs: {verdict}")
        verdicts.append(verdict)
    return worst_of(verdicts)


def _session(path: Path) -> Any:
    try:
        import onnxruntime
    except ImportError as error:
        raise TargetError("an ONNX model is checked in onnxruntime before it is written: pip install 'graphwright[onnx]'") from error
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = torch.get_num_threads()
    try:
        return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime has an exception of its own for each status
        raise TargetError(_why_not_loaded(first_line(error))) from error


_LACKING = re.compile(r"NOT_IMPLEMENTED : Could not find an implementation for (\w+)")


def _why_not_loaded(reason: str) -> str:
    lacking = _LACKING.search(reason)
    if lacking is None:
        return f"onnxruntime does not load the ONNX model of this program: {reason}"
    return (
        f"onnxruntime has no {lacking[1]} on a CPU for a type of this program, so that the ONNX model of it cannot be "
        "checked: export the model in float32"
    )


def _alone(program: Program, function: Function) -> Program:
    """The function as the main one of a program."""
    main = Function("main", function.graph, function.in_tree, function.out_tree)
    return Program([main], program.weights, program.symbols)


def _states(program: Program) -> dict[str, torch.Tensor]:
    states = {argument.name: program.weights[argument.name].tensor for argument in program.main.signature().states}
    return {name: tensor for name, tensor in states.items() if tensor is not None}


def _fitting(program: Program, inputs: list[Any]) -> list[Any]:
    """Inputs of a decoder's step that are positions: rows are all different, and tokens lie within the cache."""
    named = {str(node.target): node.meta["val"] for node in program.main.placeholders if node.meta.get("role", "input") == "input"}
    places = {name: place for place, name in enumerate(named)}
    caches = [inputs[place] for name, place in places.items() if name.startswith("cache_k")]
    if not {"tokens", "position", "rows"} <= places.keys() or not caches:
        return inputs
    batch, length = inputs[places["tokens"]].shape
    given = {
        "rows": torch.arange(batch),
        "position": torch.arange(batch) % max(1, caches[0].size(2) - length),
        "lengths": torch.arange(batch) % length + 1,
    }
    return [given.get(name, value) for name, value in zip(named, inputs, strict=True)]


def _fed(program: Program, inputs: list[Any], states: dict[str, torch.Tensor]) -> list[torch.Tensor]:
    """States and inputs in the order of the function's; constants of the capture are no inputs of a model, and sizes are tensors."""
    given = iter(inputs)
    nodes = program.main.placeholders
    values = [states[str(node.target)] if node.meta.get("role", "input") == "state" else next(given) for node in nodes]
    fed = [value for node, value in zip(nodes, values, strict=True) if isinstance(node.meta["val"], torch.Tensor | torch.SymInt)]
    return [value if isinstance(value, torch.Tensor) else torch.tensor(value) for value in fed]


def _results(session: Any, trial: Trial) -> list[torch.Tensor]:
    names = [each.name for each in session.get_inputs()]
    try:
        arrays = session.run(None, dict(zip(names, map(to_array, trial.inputs), strict=True)))
    except Exception as error:
        raise TargetError(f"onnxruntime fails on the ONNX model of this program: {first_line(error)}") from error
    kinds = [leaf.meta["val"] for leaf in trial.program.main.outputs if isinstance(leaf, Node)]
    return [from_array(array, getattr(kind, "dtype", torch.int64)) for array, kind in zip(arrays, kinds, strict=True)]


def _given(leaf: Any, results: Iterator[Any]) -> Any:
    if not isinstance(leaf, Node):
        return leaf
    value = next(results)
    return value if isinstance(leaf.meta["val"], torch.Tensor) else int(value)
