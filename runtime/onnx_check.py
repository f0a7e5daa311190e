"""Whether an ONNX file is the function that it was made from: checked, loaded in onnxruntime, and run beside the program on inputs that
neither was made with."""

from collections.abc import Callable
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


def check_values(path: Path, program: Program, function: str) -> Verdict:
    """How far onnxruntime's results of the file are from those of `function`, on random, hard and zero inputs.

    Raises:
        ContractError: they differ by more than the rounding of the program itself (specs/trust.md, section 2).
        TargetError: onnxruntime is missing, does not load the file, or fails on it.
    """
    session, alone = _session(path), _alone(program, program.functions[function])
    verdicts = []
    for kind, inputs in ((kind, _fitting(alone, make(alone, _SEED))) for kind, make in _KINDS):
        verdict = Reference(alone, inputs, _states(alone)).judge_values(_results(session, alone, inputs))
        if verdict.fails:
            raise ContractError(f"the ONNX model of {function} is not the program on {kind} inputs: {verdict}")
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
        raise TargetError(f"onnxruntime does not load the ONNX model of this program: {first_line(error)}") from error


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


def _results(session: Any, program: Program, inputs: list[Any]) -> dict[str, Any]:
    """Outputs and new states by label, as `Reference` has them; constants are no outputs of a model."""
    states, given = _states(program), iter(inputs)
    values = [states[str(node.target)] if node.meta.get("role", "input") == "state" else next(given) for node in program.main.placeholders]
    fed = [value for node, value in zip(program.main.placeholders, values, strict=True) if _is_fed(node)]
    arrays = [to_array(value if isinstance(value, torch.Tensor) else torch.tensor(value)) for value in fed]
    try:
        results = iter(session.run(None, dict(zip([each.name for each in session.get_inputs()], arrays, strict=True))))
    except Exception as error:
        raise TargetError(f"onnxruntime fails on the ONNX model of this program: {first_line(error)}") from error
    signature, leaves = program.main.signature(), program.main.outputs
    labels = [f"output {place}" for place in range(len(signature.outputs))] + [f"state {name}" for name in signature.new_states]
    return {label: _value(leaf, results) for label, leaf in zip(labels, leaves, strict=True)}


def _is_fed(node: Node) -> bool:
    return isinstance(node.meta["val"], torch.Tensor | torch.SymInt)


def _value(leaf: Any, results: Any) -> Any:
    if not isinstance(leaf, Node):
        return leaf
    kind = leaf.meta["val"]
    return from_array(next(results), kind.dtype) if isinstance(kind, torch.Tensor) else int(next(results))
