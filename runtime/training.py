"""Training on a program: its parameters, copies of the module's, which lie where the program's weights do, so that what an optimizer
writes is what every function of the program reads; and calls that keep gradients."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from ..ir import Program
from ..ir.ops.rat_blocks import rat_attention_by_blocks
from ..ir.run import run

TRAINED = ("parameter", "added")
# Operators whose bodies keep more for gradients than there is need to, and the same functions with gradients that do not.
LEAN = {torch.ops.gw.rat_attention.default: rat_attention_by_blocks}


def run_with_gradients(
    program: Program,
    inputs: Sequence[Any],
    parameters: Mapping[str, nn.Parameter],
    *,
    function: str = "main",
    states: Mapping[str, torch.Tensor] | None = None,
) -> tuple[list[Any], dict[str, torch.Tensor]]:
    """The flat outputs and new states of `function`, operation by operation, with gradients for `parameters`."""
    return run(program, inputs, function=function, states=states, parameters=parameters, instead=LEAN)


def trainable_copy(program: Program) -> Program:
    """`program` on parameters of its own."""
    copied = program.copy()
    for name, weight in program.weights.items():
        if weight.kind in TRAINED and weight.tensor is not None:
            with torch.inference_mode(False):  # what was made in inference mode takes no gradients
                copied.weights[name] = replace(weight, tensor=weight.tensor.detach().clone(), known_digest=None, _memo={})
    return copied


def parameters_of(program: Program, *, trainable: bool) -> dict[str, nn.Parameter]:
    """By name; of trainable ones those of floats take gradients. The weights' tensors become views of them, so that writes count there."""
    found = {}
    for name, weight in list(program.weights.items()):
        if weight.kind not in TRAINED or weight.tensor is None:
            continue
        found[name] = nn.Parameter(weight.tensor, requires_grad=trainable and weight.dtype.is_floating_point)
        if trainable:
            program.weights[name] = replace(weight, tensor=found[name].detach())
    return found


def as_trained(program: Program) -> Program:
    """A copy of `program` with the values that its parameters have now, under digests of these."""
    trained = program.copy()
    for name, weight in program.weights.items():
        if weight.kind in TRAINED and weight.tensor is not None:
            trained.weights[name] = replace(weight, tensor=weight.tensor.clone(), known_digest=None, _memo={})
    return trained
