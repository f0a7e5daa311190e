"""Views as changes of index: which element of its operand an element of a view's result is.

`source(node)` is the operand; `index_of(node, index)` the position in it. A remainder of a division stays symbolic where sizes
are. What has no such form (`as_strided`, a view of bits) is no view here, and a group takes its result as an input.
"""

from collections.abc import Callable
from typing import Any

import torch

from ...ir import Node
from ...ir.calls import GETITEM
from .index import Index, Size, linear, product, size_of

aten = torch.ops.aten

Indices = tuple[Index, ...]


def is_view(node: Node) -> bool:
    """Whether a call only rearranges or selects elements of one operand."""
    if node.op != "call_function":
        return False
    if node.target is GETITEM:
        return isinstance(node.args[0], Node) and node.args[0].target in _SPLITS
    return node.target in _VIEWS


def is_split(node: Node) -> bool:
    """Whether a call gives a list of views."""
    return node.op == "call_function" and node.target in _SPLITS


def source(node: Node) -> Node:
    """The operand that a view looks at; for an item of a split, the operand of the split."""
    operand: Any = node.args[0]
    return operand.args[0] if node.target is GETITEM else operand


def base(node: Node) -> Node:
    """The value behind a chain of views."""
    while is_view(node):
        node = source(node)
    return node


def index_of(node: Node, index: Indices) -> Indices:
    """The position in `source(node)` of the element at `index` of `node`."""
    if node.target is GETITEM:
        return _SPLITS[node.args[0].target](node.args[0], node.args[1], index)
    return _VIEWS[node.target](node, index)


def shape_of(node: Node) -> tuple[Size, ...]:
    return tuple(size_of(n) for n in node.meta["val"].shape)


def _argument(node: Node, position: int, name: str, default: Any) -> Any:
    value = node.args[position] if len(node.args) > position else node.kwargs.get(name, default)
    if isinstance(value, Node):
        return size_of(value.meta["val"])
    return value


def _dim(node: Node, position: int, name: str, rank: int, default: int = 0) -> int:
    dim: int = _argument(node, position, name, default)
    return dim % rank if rank else 0


def reshape(shape: tuple[Size, ...], old: tuple[Size, ...], index: Indices) -> Indices:
    """The position in a tensor of `old` sizes of the element that its reshape to `shape` has at `index`.

    Dims are matched in the smallest runs of equal products, so dims that the reshape leaves alone keep their index.
    """
    result: list[Index] = []
    new_run: list[int] = []
    old_run: list[int] = []
    i = j = 0
    while i < len(shape) or j < len(old) or new_run:
        if not new_run and i < len(shape) and shape[i] == 1:
            i += 1
            continue
        if not old_run and not new_run and j < len(old) and old[j] == 1:
            result.append(Index())
            j += 1
            continue
        if not new_run:
            new_run.append(i)
            i += 1
        if not old_run and j < len(old):
            old_run.append(j)
            j += 1
        new_size, old_size = product(shape[k] for k in new_run), product(old[k] for k in old_run)
        if new_size == old_size:
            result += _unravel(linear([index[k] for k in new_run], [shape[k] for k in new_run]), [old[k] for k in old_run])
            new_run, old_run = [], []
        elif i < len(shape) and (j >= len(old) or _is_smaller(new_size, old_size)):
            new_run.append(i)
            i += 1
        elif j < len(old):
            old_run.append(j)
            j += 1
        else:
            # No boundary of sizes is known to agree: the whole of both.
            return tuple(_unravel(linear(index, shape), old))
    return tuple(result)


def _is_smaller(a: Size, b: Size) -> bool:
    if isinstance(a, int) and isinstance(b, int):
        return a < b
    return isinstance(a, int) or (not isinstance(b, int) and len(a.free_symbols) < len(b.free_symbols))


def _unravel(position: Index, sizes: Any) -> list[Index]:
    indices: list[Index] = []
    sizes = list(sizes)
    while len(sizes) > 1:
        position, last = position.divided(sizes.pop())
        indices.insert(0, last)
    return [position if sizes and sizes[0] != 1 else Index(), *indices] if sizes else []


def _reshape(node: Node, index: Indices) -> Indices:
    return reshape(shape_of(node), shape_of(source(node)), index)


def _permute(node: Node, index: Indices) -> Indices:
    dims = [d % len(index) for d in _argument(node, 1, "dims", [])]
    return tuple(index[dims.index(d)] for d in range(len(index)))


def _transpose(node: Node, index: Indices) -> Indices:
    a, b = _dim(node, 1, "dim0", len(index)), _dim(node, 2, "dim1", len(index))
    swapped = list(index)
    swapped[a], swapped[b] = index[b], index[a]
    return tuple(swapped)


def _t(node: Node, index: Indices) -> Indices:
    return tuple(reversed(index))


def _expand(node: Node, index: Indices) -> Indices:
    return broadcast(index, shape_of(source(node)))


def broadcast(index: Indices, sizes: tuple[Size, ...]) -> Indices:
    """The position in a tensor of `sizes` that is broadcast to where `index` counts."""
    aligned = index[len(index) - len(sizes) :]
    return tuple(Index() if size == 1 else i for i, size in zip(aligned, sizes, strict=True))


def _slice(node: Node, index: Indices) -> Indices:
    dim = _dim(node, 1, "dim", len(index))
    size = shape_of(source(node))[dim]
    start, step = _argument(node, 2, "start", 0) or 0, _argument(node, 4, "step", 1)
    if isinstance(start, int) and start < 0:
        start = start + size
    if isinstance(start, int) and isinstance(size, int):
        start = min(max(start, 0), size)
    return (*index[:dim], index[dim] * step + start, *index[dim + 1 :])


def _select(node: Node, index: Indices) -> Indices:
    rank = len(index) + 1
    dim, at = _dim(node, 1, "dim", rank), _argument(node, 2, "index", 0)
    at = at + shape_of(source(node))[dim] if isinstance(at, int) and at < 0 else at
    return (*index[:dim], Index((), at), *index[dim:])


def _flip(node: Node, index: Indices) -> Indices:
    sizes, dims = shape_of(node), [d % len(index) for d in _argument(node, 1, "dims", [])]
    return tuple(i * -1 + (sizes[d] - 1) if d in dims and sizes[d] != 1 else i for d, i in enumerate(index))


def _split(node: Node, item: int, index: Indices) -> Indices:
    dim = _dim(node, 2, "dim", len(index))
    return _shifted(index, dim, item * _argument(node, 1, "split_size", 1))


def _split_with_sizes(node: Node, item: int, index: Indices) -> Indices:
    before: Size = 0
    for piece in node.args[1][:item]:
        before = before + (size_of(piece.meta["val"]) if isinstance(piece, Node) else piece)
    return _shifted(index, _dim(node, 2, "dim", len(index)), before)


def _chunk(node: Node, item: int, index: Indices) -> Indices:
    dim = _dim(node, 2, "dim", len(index))
    before: Size = 0
    for piece in node.meta["val"][:item]:
        before = before + size_of(piece.shape[dim])
    return _shifted(index, dim, before)


def _shifted(index: Indices, dim: int, start: Size) -> Indices:
    return (*index[:dim], index[dim] + start, *index[dim + 1 :])


def _unbind(node: Node, item: int, index: Indices) -> Indices:
    dim = _dim(node, 1, "dim", len(index) + 1)
    return (*index[:dim], Index((), item), *index[dim:])


_VIEWS: dict[Callable[..., Any], Callable[[Node, Indices], Indices]] = {
    aten.view.default: _reshape,
    aten._unsafe_view.default: _reshape,
    aten.reshape.default: _reshape,
    aten.flatten.using_ints: _reshape,
    aten.unflatten.int: _reshape,
    aten.unsqueeze.default: _reshape,
    aten.squeeze.dim: _reshape,
    aten.squeeze.dims: _reshape,
    aten.squeeze.default: _reshape,
    aten.permute.default: _permute,
    aten.transpose.int: _transpose,
    aten.t.default: _t,
    aten.expand.default: _expand,
    aten.slice.Tensor: _slice,
    aten.select.int: _select,
    aten.flip.default: _flip,
    aten.alias.default: lambda node, index: index,
    aten.detach.default: lambda node, index: index,
    aten.contiguous.default: lambda node, index: index,
}
_SPLITS: dict[Callable[..., Any], Callable[[Node, int, Indices], Indices]] = {
    aten.split.Tensor: _split,
    aten.split_with_sizes.default: _split_with_sizes,
    aten.chunk.default: _chunk,
    aten.unbind.int: _unbind,
}
