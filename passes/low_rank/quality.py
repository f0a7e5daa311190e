"""How far a program's outputs are from another's: the end-to-end measure of the bounded contract."""

import math
from collections.abc import Mapping
from typing import Any

import torch

from ...ir import Program
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


def relative_error(expected: Mapping[str, Any], got: Mapping[str, Any]) -> float:
    """sqrt(sum |y - yc|^2 / sum |y|^2) over the floating outputs and new states."""
    floats = [(y.double(), got[label].double()) for label, y in expected.items() if isinstance(y, torch.Tensor) and y.is_floating_point()]
    whole = sum(float(y.square().sum()) for y, _ in floats)
    difference = sum(float((y - yc).square().sum()) for y, yc in floats)
    return math.sqrt(difference / whole) if whole > 0 else (0.0 if difference == 0 else math.inf)
