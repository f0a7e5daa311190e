"""R19-R23: ops that join, cut, repeat or pad along one dim. The other dims move alone; along that dim rows have positions."""

from torch import fx

from .call import Call, Key
from .sizes import same
from .table import Move, Moves, Refusal, Tag, row
from .tag import Localized


@row("aten::repeat_interleave")
def repeat_interleave(call: Call, output: int, dim: int) -> Moves | Refusal:
    """o[i] = x[i // r] along `dim`:   d != dim <- x d;   dim: o x r <- x."""
    if call.overload != "self_int":
        return Refusal("data-dependent", "repeat_interleave by a tensor of counts", call.operand("repeats"))
    if call["dim"] is None:
        return Refusal("mixed", "repeat_interleave of the flattened tensor", call.operand("self"))
    if dim != call.dim("dim", len(call.out_shape())):
        return Moves({"self": dim})
    repeats = call["repeats"]
    if type(repeats) is not int:
        return Refusal("sym-unproved", f"repeat_interleave by {repeats}", call.operand("self"))
    return Moves({"self": Move(dim, over=repeats)})


@repeat_interleave.local
def _(call: Call, output: int, tag: Tag) -> Localized | None:
    """Without the stated `output_size`."""
    if call["output_size"] is None:
        return None
    return Localized(call.node.target, (call.operand("self"), call["repeats"], call["dim"]), {})


@row("aten::cat", "aten::concat")
def cat(call: Call, output: int, dim: int) -> Moves | Refusal:
    """d != dim <- every operand. (An operand of shape [0] is skipped, as cat does.)"""
    rank = len(call.out_shape())
    if dim == call.dim("dim", rank):
        return Refusal("mixed", f"cat joins along dim {dim}")
    return Moves({key: dim for key in call.operands if len(call.shape(key)) == rank})


@row("aten::stack")
def stack(call: Call, output: int, dim: int) -> Moves | Refusal:
    new = call.dim("dim", len(call.out_shape()))
    if dim == new:
        return Refusal("mixed", f"stack joins along dim {dim}")
    return Moves({key: dim - (dim > new) for key in call.operands})


SPLITS = "chunk split split_with_sizes unsafe_split unsafe_chunk unsafe_split_with_sizes tensor_split.sections tensor_split.indices".split()


@row(*(f"aten::{name}" for name in SPLITS))
def split(call: Call, output: int, dim: int) -> Moves | Refusal:
    """Every output, d != dim <- x d."""
    if dim != call.dim("dim", len(call.out_shape(output))):
        return Moves({"self": dim})
    return Refusal("mixed", f"{call.op} cuts dim {dim}", call.operand("self"))


@row("aten::unbind")
def unbind(call: Call, output: int, dim: int) -> Moves:
    return Moves({"self": dim + (dim >= call.dim("dim", len(call.shape("self"))))})


@unbind.stuck
def _(call: Call, key: Key, dim: int) -> Refusal:
    return Refusal("mixed", f"unbind cuts dim {dim}", call.operand(key))


@row("getitem")
def getitem(call: Call, output: int, dim: int) -> Moves:
    """The tag of the output that it picks."""
    return Moves({"self": dim})


@row("aten::slice", "aten::narrow")
def cut(call: Call, output: int, dim: int) -> Moves | Refusal:
    """d != dim <- x d; a full-range slice is an alias."""
    if dim != call.dim("dim", len(call.out_shape())) or _full_range(call, dim):
        return Moves({"self": dim})
    return Refusal("position", f"{call.op} cuts dim {dim} at fixed positions", call.operand("self"))


def _full_range(call: Call, dim: int) -> bool:
    """The call takes all of `dim` whatever its length: it starts at 0, and its end is open or clipped to the length."""
    start, end, step, size = call["start"], call["end"], call["step"], call.shape("self")[dim]
    if start not in (None, 0) or step != 1:
        return False
    if isinstance(end, fx.Node):
        end = end.meta["val"]
    if end is None or same(end, OPEN_END) or same(end, size):
        return True
    return type(end) is int and type(size) is int and end >= size


OPEN_END = 2**63 - 1
"""How a captured graph writes the end of x[a:]."""


@row("aten::select")
def select(call: Call, output: int, dim: int) -> Moves:
    """d != dim <- x d, shifted."""
    return Moves({"self": dim + (dim >= call.dim("dim", len(call.shape("self"))))})


@select.stuck
def _(call: Call, key: Key, dim: int) -> Refusal:
    return Refusal("position", f"select takes one position of dim {dim}", call.operand(key))


@row("aten::slice_scatter")
def slice_scatter(call: Call, output: int, dim: int) -> Moves | Refusal:
    """d != dim <- x d, src d; over the full range too."""
    if dim != call.dim("dim", len(call.out_shape())) or _full_range(call, dim):
        return Moves({"self": dim, "src": dim})
    return Refusal("position", f"slice_scatter writes fixed positions of dim {dim}", call.operand("src"))


@row("aten::select_scatter")
def select_scatter(call: Call, output: int, dim: int) -> Moves | Refusal:
    chosen = call.dim("dim", len(call.out_shape()))
    if dim == chosen:
        return Refusal("position", f"select_scatter writes one position of dim {dim}", call.operand("src"))
    return Moves({"self": dim, "src": dim - (dim > chosen)})


PADS = [f"aten::{kind}_pad{n}d" for kind in ("reflection", "replication") for n in (1, 2, 3)]


@row("aten::pad", "aten::constant_pad_nd", *PADS)
def pad(call: Call, output: int, dim: int) -> Moves | Refusal:
    """Unpadded d <- x d."""
    low, high = _padding(call, dim)
    if same(low, 0) and same(high, 0):
        return Moves({"self": dim})
    return Refusal("halo", f"{call.op}: output rows [a, b) of dim {dim} need rows {_pad_rows(call, dim)}", call.operand("self"))


def _padding(call: Call, dim: int) -> tuple:
    """(low, high) of a dim: pairs are listed from the last dim to the front."""
    amounts = call.integers("pad") or call.integers("padding")
    place = 2 * (len(call.out_shape()) - 1 - dim)
    return (amounts[place], amounts[place + 1]) if place < len(amounts) else (0, 0)


@pad.halo_rows
def _pad_rows(call: Call, dim: int) -> str:
    low, _ = _padding(call, dim)
    return f"[a - {low}, b - {low})" if not same(low, 0) else "[a, b)"
