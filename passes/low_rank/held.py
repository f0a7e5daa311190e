"""A rewritten layer against what was measured of it. Errors of sites are worked out on matrices; here the calls themselves compute, on the
rows that the error was measured on, so that a layer which is put together wrongly is seen and not reported as good."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from ...ir import Node, Program, Rewriter
from ...ir.errors import PassError
from ...ir.low_bit import format_of
from .fit import relative_norm
from .sites import shows_operand

# What rounding of inputs, branch and sums in the working type may add to an error; mistakes add the size of the outputs.
_ROUNDING = {torch.bfloat16: 0.05, torch.float16: 0.01}
_FINER = 0.001
_DRAWN = 256  # rows of normal numbers, where there are none of calibration


@dataclass(frozen=True)
class Original:
    """What a layer was: of its site's input x it gave x @ weight.T + bias. weight [N, K], bias [N] or None."""

    weight: torch.Tensor
    bias: torch.Tensor | None

    @staticmethod
    def of(weight: torch.Tensor, bias: Node | None, program: Program) -> "Original":
        is_stored = bias is not None and bias.op == "get_attr"
        return Original(weight, program.weights[str(bias.target)].tensor if is_stored else None)  # type: ignore[union-attr]


def hold(
    rewriter: Rewriter, source: Node, calls: Sequence[tuple[Node, Original]], rows: torch.Tensor | None, error: float, act: str
) -> None:
    """Holds calls that read `source` to `error`, a share of what all of them gave without bias.

    rows [m, K]: values of `source`; None where there is no calibration, and then `error` is that of the weights. Nothing is held where
    what a call reads is no function of each of these rows.

    Raises:
        PassError: together they are further off.
    """
    dtype, where = source.meta["val"].dtype, calls[0][0].meta.get("where")
    limit = error
    if rows is None:
        rows = torch.randn(_DRAWN, calls[0][1].weight.shape[1], generator=torch.Generator().manual_seed(0))
        limit = 1.5 * math.hypot(error, 0.0 if act == "none" else format_of(act).gaussian_error)  # codes of activations are not in it
    rows = rows.to(dtype)
    differences, wholes = [], []
    for node, original in calls:
        whole = rows.to(torch.float32) @ original.weight.to(torch.float32).T
        given = _value(node, source, rows, rewriter.program)
        if given is None:
            return
        bias = 0.0 if original.bias is None else original.bias.to(torch.float32)
        differences.append(given.to(torch.float32) - bias - whole)
        wholes.append(whole)
    found = relative_norm(torch.cat(differences, 1), torch.cat(wholes, 1))
    if not found <= 1.1 * limit + _ROUNDING.get(dtype, _FINER):
        raise PassError(
            f"pass {rewriter.pass_name}: the layer at {where} gives outputs that are off by {found:.3g} where {error:.3g} was measured, "
            "which is a mistake of this pass: report it, and go on without the layer by skip="
        )


def _value(node: Node, source: Node, rows: torch.Tensor, program: Program) -> Any:
    """What `node` is where `source` is `rows`; None where rows alone do not tell, as of a value that is no function of each row."""
    if node is source:
        return rows
    if node.op == "get_attr":
        return program.weights[str(node.target)].tensor
    if node.op != "call_function":
        return None
    operands = {each: _value(each, source, rows, program) for each in node.all_input_nodes}
    if any(value is None for value in operands.values()):
        return None
    if shows_operand(node):  # whatever sizes are before the last
        return operands[node.all_input_nodes[0]]
    args, kwargs = fx.map_arg((node.args, node.kwargs), operands.__getitem__)
    try:
        with torch.no_grad():
            return node.target(*args, **kwargs)  # type: ignore[operator]
    except RuntimeError:  # of sizes that it was given for all rows
        return None
