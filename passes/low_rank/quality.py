"""How far a program's outputs are from another's: the end-to-end measure of the bounded contract."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from ...ir import Program
from ...ir.run import run
from ..check import Reference
from ..verdict import Verdict


def judge_outputs(reference: Reference, after: Program, budget: float | None) -> Verdict:
    """Types and strides as they were, and outputs within `budget` of their size, where one is declared."""
    verdict = reference.judge_structure(after)
    if verdict.fails:
        return verdict
    outputs = reference.outputs_of(after)
    if isinstance(outputs, Verdict):
        return outputs
    error = relative_error(reference.outputs(), outputs)
    text = f"outputs are off by {error:.3g} of their size"
    if not math.isfinite(error) or (budget is not None and error > budget):
        return Verdict("wrong", f"{text}, over the budget of {budget}", error=error)
    return Verdict("right", text, error=error)


def smoothing_error(before: Program, after: Program, inputs: Sequence[Any], function: str) -> float:
    """How far `after` is from `before` where that is more than rounding may be, else 0. A wrong factor of 2 in one channel of a
    hundred moves outputs by a tenth; float32 rounds a millionth of them, and 16 bits hundredths."""
    found = []
    for program in (before, after):
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(0)
            found.append(dict(enumerate(run(program, inputs, function=function)[0])))
    is_half = any(isinstance(y, torch.Tensor) and y.dtype in (torch.float16, torch.bfloat16) for y in found[0].values())
    error = relative_error(*found)
    return error if error > (0.3 if is_half else 0.01) else 0.0


def relative_error(expected: Mapping[Any, Any], got: Mapping[Any, Any]) -> float:
    """sqrt(sum |y - yc|^2 / sum |y|^2) over the floating outputs and new states."""
    floats = [(y.double(), got[label].double()) for label, y in expected.items() if isinstance(y, torch.Tensor) and y.is_floating_point()]
    whole = sum(float(y.square().sum()) for y, _ in floats)
    difference = sum(float((y - yc).square().sum()) for y, yc in floats)
    return math.sqrt(difference / whole) if whole > 0 else (0.0 if difference == 0 else math.inf)
