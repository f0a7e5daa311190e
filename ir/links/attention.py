"""R15: scaled dot product attention, and the causal form that can be sliced over queries.

q[.., H, L, E], k[.., Hk, S, E], v[.., Hk, S, Ev] -> o[.., H, L, Ev]:

    leading, head <- q, k, v, mask aligned (grouped queries: k and v carry H/Hk times smaller units)
    L [query]     <- q -2, mask -2;   k and v whole
    Ev: no link
"""

from .call import Call, Key
from .sizes import quotient, same
from .table import Move, Moves, Refusal, aligned, row


@row("aten::scaled_dot_product_attention", "gw::causal_attention")
def attention(call: Call, output: int, dim: int) -> Moves | Refusal:
    if call["dropout_p"]:
        return Refusal("rng", f"{call.op} with dropout draws random numbers")
    rank = len(call.out_shape())
    if dim == rank - 1:
        return Refusal("mixed", f"{call.op}: features of the values")
    if dim == rank - 2:
        return _over_queries(call, dim)
    query, key, value = _names(call)
    if dim != rank - 3 or not call["enable_gqa"]:
        moves = aligned(call, [query, key, value, "attn_mask"], dim)
        return moves if isinstance(moves, Refusal) else Moves(moves)
    moves = aligned(call, [query, "attn_mask"], dim)
    if isinstance(moves, Refusal):
        return moves
    for name in (key, value):
        heads = call.shape(name)[-3]
        group = quotient(call.out_shape()[dim], heads)
        if group is None:
            return Refusal("sym-unproved", f"{call.op}: {heads} key heads are not proved to divide the heads", call.operand(name))
        if not same(heads, 1):
            moves[name] = Move(len(call.shape(name)) - 3, over=group)
    return Moves(moves)


def _names(call: Call) -> tuple[str, str, str]:
    return ("query", "key", "value") if "query" in call.parameters.by_name else ("q", "k", "v")


def _over_queries(call: Call, dim: int) -> Moves | Refusal:
    query, _, _ = _names(call)
    if call["is_causal"]:
        detail = "is_causal counts queries from the start of a slice; gw.causal_attention takes their rows"
        return Refusal("position", detail, call.operand(query))
    mask = aligned(call, ["attn_mask"], dim)
    if isinstance(mask, Refusal):
        return mask
    rows = {"rows": 0} if call.operand("rows") is not None else {}
    return Moves({query: len(call.shape(query)) - 2, **mask, **rows}, "query")


@attention.stuck
def _(call: Call, key: Key, dim: int) -> Refusal | None:
    query, key_name, _ = _names(call)
    if key in (query, key_name) and dim == len(call.shape(key)) - 1:
        return Refusal("reduced", f"{call.op} sums over dim {dim} of {call.operand(key)}", call.operand(key))
    return None
