"""R16-R18, R23: ops that lay the same elements out anew, and those that repeat them along new or grown dims.

View rule (3.3): input shape I, tag (d, m), N units, output shape O: find o with prod(O[:o]) = prod(I[:d]) and N | O[o]; the new tag
is (o, O[o]/N); backwards the same. Then unit u is one contiguous block of outer index prod(I[:d]) on both sides.
"""

import torch

from .call import Call, Key
from .sizes import Size, common, differ, product, quotient, same
from .table import Moves, Refusal, Tag, aligned, declare, row
from .tag import Localized

aten = torch.ops.aten


def tag_through_view(source, target, tag: Tag, units: Size) -> Tag | Refusal:
    """The tag on shape `target` of a view of shape `source` that carries `tag`.

    Refuses with `unit` where a coarser axis of `retry_units` would pass, `inner` where the dim is not the outermost factor of a
    merged one, `sym-unproved` where symbols leave it open.
    """
    outer, target_outer = product(source[: tag.dim]), 1
    retry, unproved = None, False
    for dim, size in enumerate(target):
        if same(target_outer, outer):
            unit = quotient(size, units)
            if unit is not None:
                return Tag(dim, unit)
            coarser = common(size, units)
            retry = coarser if retry is None or (coarser is not None and not same(coarser, 1)) else retry
            unproved |= coarser is None and not (type(size) is int and type(units) is int)
        elif not differ(target_outer, outer):
            unproved = True
        target_outer = target_outer * size
    crossing = f"{list(source)} -> {list(target)}, dim {tag.dim} in {units} units"
    if retry is not None:
        return Refusal("unit", f"{crossing}: passes in {retry} units", retry_units=retry)
    if unproved:
        return Refusal("sym-unproved", f"{crossing}: equal factors are not proved")
    return Refusal("inner", f"{crossing}: not the outermost factor of a dim")


class ViewRow:
    """Ops that keep the elements in row-major order: the view rule, which depends on N, in place of links."""

    def backward(self, call: Call, output: int, tag: Tag, units: Size) -> dict[Key, Tag] | Refusal:
        return self._wrap(call, tag_through_view(call.out_shape(), call.shape("self"), tag, units), as_dict=True)

    def forward(self, call: Call, keys: list[Key], output: int, tag: Tag, units: Size) -> Tag | Refusal:
        return self._wrap(call, tag_through_view(call.shape("self"), call.out_shape(), tag, units), as_dict=False)

    def _wrap(self, call: Call, found: Tag | Refusal, as_dict: bool):
        if call.overload == "dtype":
            return Refusal("no-row", "a view as another dtype has no row")
        if isinstance(found, Refusal):
            return Refusal(found.reason, f"{call.op} {found.detail}", call.operand("self"), found.retry_units)
        return {"self": found} if as_dict else found

    def localize(self, call: Call, output: int, tag: Tag, units: Size) -> Localized | None:
        return _LOCAL[call.node.target._schema.name](call, tag)

    def kind(self, call: Call, tag: Tag) -> str:
        return "rows"

    def halo(self, call: Call, dim: int) -> str:
        return "[a, b)"


def _open_sizes(sizes: list, shape, dim: int) -> list:
    """The stated sizes with -1 at `dim`, where the slice's length goes, and any other -1 made concrete."""
    sizes = [full if type(size) is int and size == -1 else size for size, full in zip(sizes, shape)]
    sizes[dim] = -1
    return sizes


def _local_view(call: Call, tag: Tag) -> Localized:
    """As `reshape`: a slice may come from another kernel than the full tensor did, in strides that `view` would reject."""
    sizes = call["size"] if call["size"] is not None else call["shape"]
    return Localized(aten.reshape.default, (call.operand("self"), _open_sizes(sizes, call.out_shape(), tag.dim)), {})


def _local_flatten(call: Call, tag: Tag) -> None:
    return None


def _local_unflatten(call: Call, tag: Tag) -> Localized | None:
    sizes = call["sizes"]
    first = call.dim("dim", len(call.shape("self")))
    if not first <= tag.dim < first + len(sizes):
        return None
    shape = call.out_shape()[first : first + len(sizes)]
    opened = _open_sizes(sizes, shape, tag.dim - first)
    return Localized(aten.unflatten.int, (call.operand("self"), call["dim"], opened), {})


def _local_squeeze(call: Call, tag: Tag) -> Localized:
    """Only dims that are 1 in the full graph: a slice of length 1 keeps its dim."""
    shape = call.shape("self")
    asked = call.dims("dim", len(shape)) if call.overload != "default" else range(len(shape))
    return Localized(aten.squeeze.dims, (call.operand("self"), [d for d in asked if same(shape[d], 1)]), {})


_LOCAL = {
    "aten::view": _local_view, "aten::_unsafe_view": _local_view, "aten::reshape": _local_view, "aten::view_copy": _local_view,
    "aten::flatten": _local_flatten, "aten::unsqueeze": _local_flatten,
    "aten::unflatten": _local_unflatten, "aten::squeeze": _local_squeeze,
}  # fmt: skip

for _name in _LOCAL:
    declare(_name, ViewRow())


@row("aten::permute")
def permute(call: Call, output: int, dim: int) -> Moves:
    """o d <- x dims[d]."""
    return Moves({"self": call["dims"][dim] % len(call["dims"])})


@row("aten::transpose", "aten::swapaxes", "aten::swapdims")
def transpose(call: Call, output: int, dim: int) -> Moves:
    rank = len(call.out_shape())
    first, second = ("dim0", "dim1") if call["dim0"] is not None else ("axis0", "axis1")
    a, b = call.dim(first, rank), call.dim(second, rank)
    return Moves({"self": {a: b, b: a}.get(dim, dim)})


@row("aten::t")
def t(call: Call, output: int, dim: int) -> Moves:
    return Moves({"self": len(call.out_shape()) - 1 - dim})


@row("aten::movedim", "aten::moveaxis")
def movedim(call: Call, output: int, dim: int) -> Moves:
    rank = len(call.out_shape())
    to_source = dict(zip(call.dims("destination", rank), call.dims("source", rank)))
    others = iter(d for d in range(rank) if d not in to_source.values())
    order = [to_source[d] if d in to_source else next(others) for d in range(rank)]
    return Moves({"self": order[dim]})


@row("aten::expand", "aten::broadcast_to")
def expand(call: Call, output: int, dim: int) -> Moves | Refusal:
    """Equal size <- x d; new or grown: x whole."""
    moves = aligned(call, ["self"], dim)
    return moves if isinstance(moves, Refusal) else Moves(moves)


@expand.local
def _(call: Call, output: int, tag: Tag) -> Localized | None:
    """-1 keeps the operand's size, whatever it is."""
    if not aligned(call, ["self"], tag.dim):
        return None
    sizes = list(call["size"])
    sizes[tag.dim] = -1
    return Localized(aten.expand.default, (call.operand("self"), sizes), {})


@row("aten::expand_as")
def expand_as(call: Call, output: int, dim: int) -> Moves | Refusal:
    """`other` lends its sizes, so it is sliced too."""
    moves = aligned(call, ["self", "other"], dim)
    return moves if isinstance(moves, Refusal) else Moves(moves)


@row("aten::repeat")
def repeat(call: Call, output: int, dim: int) -> Moves | Refusal:
    """Factor 1 <- x d; new, or grown from 1: x whole."""
    shape, rank = call.shape("self"), len(call.out_shape())
    source = dim - (rank - len(shape))
    if source < 0 or same(shape[source], 1):
        return Moves({})
    if type(call["repeats"][dim]) is int and call["repeats"][dim] == 1:
        return Moves({"self": source})
    return Refusal("mixed", f"repeat lays dim {dim} out {call['repeats'][dim]} times", call.operand("self"))


@row("aten::view_as_complex")
def view_as_complex(call: Call, output: int, dim: int) -> Moves:
    return Moves({"self": dim})


@row("aten::view_as_real")
def view_as_real(call: Call, output: int, dim: int) -> Moves | Refusal:
    if dim < len(call.out_shape()) - 1:
        return Moves({"self": dim})
    return Refusal("mixed", "real and imaginary part", call.operand("self"))
