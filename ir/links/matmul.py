"""R3-R5: products of matrices. Contracted dims are `reduced`; a row moves with the left operand, a column with the right one."""

from .call import Call, Key
from .table import Moves, Refusal, aligned, moves_or_whole, row


@row("aten::linear")
def linear(call: Call, output: int, dim: int) -> Moves | Refusal:
    """y[.., o] = sum_i x[.., i] w[o, i] + b[o]:   d<last <- x d,   last <- w 0, b 0 [features]."""
    if len(call.shape("weight")) != 2:
        return Refusal("mixed", "linear with a 1-D weight", call.operand("weight"))
    if dim < len(call.out_shape()) - 1:
        return Moves({"input": dim})
    bias = {"bias": 0} if call.operand("bias") is not None else {}
    return Moves({"weight": 0, **bias}, "features")


@linear.stuck
def _(call: Call, key: Key, dim: int) -> Refusal:
    return Refusal("reduced", f"linear sums over dim {dim} of {call.operand(key)}", call.operand(key))


FACTORS = {
    "aten::matmul": ("self", "other"), "aten::mm": ("self", "mat2"), "aten::bmm": ("self", "mat2"),
    "aten::addmm": ("mat1", "mat2"), "aten::baddbmm": ("batch1", "batch2"),
}  # fmt: skip


@row(*FACTORS)
def matmul(call: Call, output: int, dim: int) -> Moves | Refusal:
    """batch <- a, b aligned;   row <- a -2;   col <- b -1;   an added bias aligned."""
    a, b = FACTORS[call.node.target._schema.name]
    a_rank, b_rank, rank = len(call.shape(a)), len(call.shape(b)), len(call.out_shape())
    if a_rank < 2 or b_rank < 2:
        return Refusal("mixed", f"{call.op} with a 1-D operand", call.operand(a if a_rank < 2 else b))
    bias = aligned(call, ["self"], dim) if "self" not in (a, b) else {}
    if isinstance(bias, Refusal):
        return bias
    if dim == rank - 2:
        return Moves({a: a_rank - 2, **bias})
    if dim == rank - 1:
        return Moves({b: b_rank - 1, **bias})
    batch = aligned(call, [a, b], dim)
    return batch if isinstance(batch, Refusal) else Moves({**batch, **bias})


@matmul.stuck
def _(call: Call, key: Key, dim: int) -> Refusal | None:
    a, b = FACTORS[call.node.target._schema.name]
    contracted = {a: -1, b: -2}.get(key)
    if contracted is None or dim != len(call.shape(key)) + contracted:
        return None
    return Refusal("reduced", f"{call.op} sums over dim {dim} of {call.operand(key)}", call.operand(key))


@row("aten::einsum")
def einsum(call: Call, output: int, dim: int) -> Moves | Refusal:
    """Output letter <- each operand dim that has it."""
    equation = call["equation"].replace(" ", "")
    if "->" not in equation or "." in equation:
        return Refusal("mixed", f"einsum {equation!r}: only equations with '->' and without '...' have links")
    sources, result = equation.split("->")
    letters = sources.split(",")
    if any(len(set(source)) < len(source) for source in letters):
        return Refusal("mixed", f"einsum {equation!r} has a letter twice in one operand")
    moves = {}
    for i, source in enumerate(letters):
        place = source.find(result[dim])
        if place < 0:
            continue
        moving = moves_or_whole(call, ("tensors", i), place, call.out_shape()[dim])
        if isinstance(moving, Refusal):
            return moving
        if moving:
            moves["tensors", i] = place
    return Moves(moves)


@einsum.stuck
def _(call: Call, key: Key, dim: int) -> Refusal | None:
    sources, _, result = call["equation"].replace(" ", "").partition("->")
    letter = sources.split(",")[key[1]][dim] if "." not in sources else ""
    if not letter or letter in result:
        return None
    return Refusal("reduced", f"einsum sums over {letter!r} of {call.operand(key)}", call.operand(key))


@row("aten::outer")
def outer(call: Call, output: int, dim: int) -> Moves:
    """o[i, j] = a[i] b[j]."""
    return Moves({("self", "vec2")[dim]: 0})
