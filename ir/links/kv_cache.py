"""Attention over caches, cut into rows of the batch or into heads; appends are not cut.

q[B, H, T, E], cache_k[R, Hk, C, E], cache_v[R, Hk, C, Ev], position[B], rows[B] -> o[B, H, T, Ev]:

    0 <- q 0, position 0, rows 0 [rows];   caches whole
    1 <- q 1, and cache_k 1, cache_v 1 by H/Hk times smaller units
    T: position counts from the first query;   Ev: no link
"""

from .call import Call, Key
from .sizes import quotient, same
from .table import Move, Moves, Refusal, never, row


@row("gw::cached_attention")
def cached_attention(call: Call, output: int, dim: int) -> Moves | Refusal:
    if dim == 0:
        return Moves({"q": 0, "position": 0, "rows": 0})
    if dim == 2:
        return Refusal("position", f"{call.op} counts positions from its first query", call.operand("q"))
    if dim == 3:
        return Refusal("mixed", f"{call.op}: features of the values", call.operand("cache_v"))
    heads = call.shape("cache_k")[1]
    if same(heads, 1):
        return Moves({"q": 1})
    group = quotient(call.out_shape()[1], heads)
    if group is None:
        return Refusal("sym-unproved", f"{call.op}: {heads} key heads are not proved to divide the heads", call.operand("cache_k"))
    return Moves({"q": 1, **{name: Move(1, over=group) for name in ("cache_k", "cache_v")}})


@cached_attention.stuck
def _(call: Call, key: Key, dim: int) -> Refusal | None:
    if key in ("cache_k", "cache_v") and dim == 0:
        return Refusal("data-dependent", f"{call.op} takes the rows of {call.operand(key)} that are in `rows`", call.operand(key))
    if dim >= 2:
        return Refusal("reduced", f"{call.op} sums over dim {dim} of {call.operand(key)}", call.operand(key))
    return None


never("mutates", "it writes where its caches lie, and slices of these would be copies", "gw::kv_append")
