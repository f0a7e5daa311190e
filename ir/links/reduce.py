"""R13, R14: ops that work along named dims: those that keep them (softmax, sort, flip) and those that reduce them (sum, argmax)."""

from .call import Call, Key
from .table import Moves, Refusal, row

ALONG_ONE = """
    softmax.int _softmax log_softmax.int _log_softmax cumsum cumprod logcumsumexp cummax cummin sort argsort topk diff glu
""".split()


@row(*(f"aten::{name}" for name in ALONG_ONE), "aten::flip", "aten::roll", "aten::tril", "aten::triu")
def along(call: Call, output: int, dim: int) -> Moves | Refusal:
    """Every output, d not named <- x d, and d of every further operand (diff: prepend, append)."""
    if dim not in _named(call):
        return Moves({key: dim for key in call.operands})
    return Refusal("mixed", f"{call.op} works along dim {dim}", call.operand("self"))


def _named(call: Call) -> list[int]:
    rank = len(call.shape("self"))
    name = call.node.target._schema.name
    if name in ("aten::tril", "aten::triu"):
        return [rank - 2, rank - 1]
    if name in ("aten::flip", "aten::roll"):
        return call.dims("dims", rank) or list(range(rank))
    return call.dims("dim", rank)


KEPT_OR_GONE = """
    sum mean var std var_mean std_mean amax amin any all argmax argmin prod logsumexp linalg_vector_norm norm count_nonzero
    max.dim min.dim max.default min.default
""".split()


@row(*(f"aten::{name}" for name in KEPT_OR_GONE))
def reduction(call: Call, output: int, dim: int) -> Moves | Refusal:
    """Kept d <- x d, shifted by the reduced dims before it if they are gone."""
    rank, reduced = len(call.shape("self")), _reduced(call)
    if call["keepdim"]:
        kept = list(range(rank))
    else:
        kept = [d for d in range(rank) if d not in reduced]
    if kept[dim] in reduced:
        return Refusal("reduced", f"{call.op} reduces dim {kept[dim]}", call.operand("self"))
    return Moves({"self": kept[dim]})


@reduction.stuck
def _(call: Call, key: Key, dim: int) -> Refusal:
    return Refusal("reduced", f"{call.op} reduces dim {dim} of {call.operand(key)}", call.operand(key))


def _reduced(call: Call) -> list[int]:
    rank = len(call.shape("self"))
    return call.dims("dim", rank) or list(range(rank))
