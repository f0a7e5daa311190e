"""A low-rank linear: a row of the result comes from the row of x alone, a feature from the rows of what has features."""

from .call import Call, Key
from .table import Moves, Refusal, row

_OF_FEATURES = ("weight_q", "weight_scale", "weight_scale2", "up", "bias")


@row("gw::lowrank_linear")
def lowrank_linear(call: Call, output: int, dim: int) -> Moves | Refusal:
    """d<last <- x d,   last <- weight_q 0, weight_scale 0, weight_scale2 0 where it has rows, up 0, bias 0 [features]."""
    if call["act_format"] == "u8-tensor" and dim < len(call.out_shape()) - 1:
        return Refusal("mixed", "activations in u8-tensor share one scale", call.operand("x"))
    if dim < len(call.out_shape()) - 1:
        return Moves({"x": dim})
    of_rows = {name: shape for name in _OF_FEATURES if (shape := call.shape(name)) is not None and shape[0] == call.out_shape()[dim]}
    return Moves(dict.fromkeys(of_rows, 0), "features")


@lowrank_linear.stuck
def _(call: Call, key: Key, dim: int) -> Refusal:
    return Refusal("reduced", f"lowrank_linear sums over dim {dim} of {call.operand(key)}", call.operand(key))
