"""R1, R2: ops that compute each output element from the elements at the same place of their operands.

    o d <- every operand, right-aligned, of equal size; size 1 or absent: whole

Ops that ATen tags `pointwise` need no name here; the rest are listed.
"""

from .call import Call
from .table import Moves, Refusal, aligned, row

POINTWISE_UNTAGGED = """
    where masked_fill floor_divide true_divide divide multiply subtract absolute negative
    greater greater_equal less less_equal not_equal clip fix float_power isclose hardswish log_sigmoid __and__ __or__
    polar complex real imag conj resolve_conj resolve_neg
    contiguous clone alias detach lift_fresh_copy copy fill zeros_like ones_like full_like empty_like
""".split()


@row("pointwise", *(f"aten::{name}" for name in POINTWISE_UNTAGGED))
def elementwise(call: Call, output: int, dim: int) -> Moves | Refusal:
    moves = aligned(call, call.operands, dim, call.out_shape(output))
    return moves if isinstance(moves, Refusal) else Moves(moves)


@row("aten::to", "aten::_to_copy", "aten::type_as")
def cast(call: Call, output: int, dim: int) -> Moves:
    """`other` lends its dtype only, and its shape may be unrelated."""
    return Moves({"self": dim})


@row("aten::dropout")
def dropout(call: Call, output: int, dim: int) -> Moves | Refusal:
    if call["train"]:
        return Refusal("rng", f"{call.op} in training mode draws random numbers")
    return Moves({"input": dim})
