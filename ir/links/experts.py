"""Mixtures of experts: rows of tokens, or whole sequences, go their own way; what picks tokens needs all of its sequence.

x[T, D], index[T, k], weight[T, k] -> [T, D]:                        0 <- x 0, index 0, weight 0 [rows];  1 <- down 1 [features]
logits[B, S, E], valid[B, S], capacity_rows[B] -> [B, E, C] twice:   0 <- logits 0, valid 0, capacity_rows 0 [rows]
x[B, S, D], index[B, E, C], gate[B, E, C] -> [B, S, D]:              0 <- x 0, index 0, gate 0 [rows];    2 <- down 1 [features]
"""

from .call import Call, Key
from .table import Moves, Refusal, row

_EXPERTS = ("gate_up", "down")


@row("gw::token_choice_moe")
def token_choice_moe(call: Call, output: int, dim: int) -> Moves | Refusal:
    return Moves({"x": 0, "index": 0, "weight": 0}) if dim == 0 else Moves({"down": 1}, "features")


@row("gw::expert_choice")
def expert_choice(call: Call, output: int, dim: int) -> Moves | Refusal:
    if dim == 0:
        present = (name for name in ("logits", "valid", "capacity_rows") if call.shape(name) is not None)
        return Moves(dict.fromkeys(present, 0))
    return Refusal("mixed", f"{call.op} compares all positions of a sequence, by scores of all experts", call.operand("logits"))


@row("gw::expert_mlp")
def expert_mlp(call: Call, output: int, dim: int) -> Moves | Refusal:
    if dim == 1:
        return Refusal("data-dependent", f"{call.op} puts its results where `index` says", call.operand("index"))
    return Moves({"x": 0, "index": 0, "gate": 0}) if dim == 0 else Moves({"down": 1}, "features")


@token_choice_moe.stuck
@expert_mlp.stuck
def _(call: Call, key: Key, dim: int) -> Refusal | None:
    node = call.operand(key)
    if key in _EXPERTS and dim == 0:
        return Refusal("data-dependent", f"{call.op} takes the experts that `index` names", node)
    last = len(call.shape(key)) - 1
    if dim == last:
        return Refusal("reduced", f"{call.op} sums over dim {dim} of {node}", node)
    return None


@expert_choice.stuck
def _(call: Call, key: Key, dim: int) -> Refusal:
    return Refusal("mixed", f"{call.op} compares all positions of a sequence, by scores of all experts", call.operand(key))
