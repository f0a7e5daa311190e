"""Bytes that a CPU kernel allocates beside its operands and results, as measured with torch 2.13.

Where a kernel wants an operand in another layout, it makes a copy: oneDNN's convolutions take input and weight in blocks, norms
take contiguous input. Attention keeps a tile of scores for each thread. Plans must not depend on the thread count of the machine
that makes them, so a nominal one stands in unless the caller knows better.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from .infer import contiguous_stride, tensors_of
from .pattern import named_arguments
from .program import Node
from .symbols import hint

NOMINAL_THREADS = 2
_FLOAT = 4
_SMALL_IMAGE = 20480  # elements of one image up to which ATen does not call oneDNN


class Workspace(NamedTuple):
    """Scratch bytes of a call: `moving` shrink with a slice of its rows, `fixed` do not."""

    moving: int = 0
    fixed: int = 0

    @property
    def total(self) -> int:
        return self.moving + self.fixed


def workspace(node: Node, threads: int = NOMINAL_THREADS) -> Workspace:
    """The scratch of one call, symbols at their hints; none for an operation that is not known to need any."""
    name = getattr(getattr(node.target, "_schema", None), "name", "")
    rule = _RULES.get(name)
    return rule(named_arguments(node), node, threads) if rule is not None else Workspace()


def slice_workspace(node: Node, dim: int, length: int, units: int, threads: int = NOMINAL_THREADS) -> int:
    """Scratch bytes of a call on `length` of the `units` units that lie along `dim` of its result."""
    name = getattr(getattr(node.target, "_schema", None), "name", "")
    if name in _RULES_OF_SLICES:
        return _RULES_OF_SLICES[name](named_arguments(node), node, threads, Part(dim, length, units)).total
    moving, fixed = workspace(node, threads)
    return moving * length // units + fixed


class Part(NamedTuple):
    """A slice: `length` of `units` units along `dim`."""

    dim: int = 0
    length: int = 1
    units: int = 1

    def sizes(self, node: Any) -> list[int]:
        """The sizes of a slice of an operand that is cut along the same dim as the result."""
        sizes = _sizes(node)
        sizes[self.dim] = sizes[self.dim] * self.length // self.units
        return sizes


WHOLE = Part()


def _conv(a: dict[str, Any], node: Node, threads: int, part: Part = WHOLE) -> Workspace:
    """oneDNN's input and weight in blocks; ATen's own kernel, which takes one small image or float64, unfolds the image for each
    group: [B, C_in / groups * prod(k), prod(out)]."""
    sizes, itemsize = part.sizes(a["input"]), _tensor(a["input"]).dtype.itemsize
    _, inputs, *kernel = _sizes(a["weight"])
    is_large = sizes[0] > 1 or _product(sizes) > _SMALL_IMAGE or a["groups"] > 1 or min(kernel) > 3
    if _tensor(a["input"]).dtype is not torch.float64 and is_large:
        return Workspace(_product(sizes) * itemsize, _bytes(a["weight"]))
    if _product(kernel) == 1:
        return Workspace()
    places = _numel(node) // _sizes(node)[1] * part.length // part.units  # of all images
    return Workspace(places * inputs * _product(kernel) * itemsize)


def _layer_norm(a: dict[str, Any], node: Node, threads: int) -> Workspace:
    x = a["input"]
    rows = _numel(x) // max(1, _product(a["normalized_shape"]))
    return Workspace((0 if _is_contiguous(x) else _bytes(x)) + 2 * rows * _FLOAT)


def _group_norm(a: dict[str, Any], node: Node, threads: int) -> Workspace:
    return Workspace(0 if _is_contiguous(a["input"]) else _bytes(a["input"]))


def _upsample(a: dict[str, Any], node: Node, threads: int) -> Workspace:
    return Workspace(_bytes(a["input"]) + _bytes(node))


def _attention(a: dict[str, Any], node: Node, threads: int, part: Part = WHOLE) -> Workspace:
    """ATen's flash kernel: for each thread a tile of scores, its row maxima and sums, and a tile of the result; the row
    log-sum-exp for all rows. Tiles are 256, 64 or 32 queries by 512 keys; narrow types have their scores once more in float32.
    Where the last dim is not dense, the plain form: scores twice, and which of them are -inf."""
    *batch, length, width = part.sizes(a["query"])
    keys, itemsize = _sizes(a["key"])[-2], _tensor(a["query"]).dtype.itemsize
    if any(hint(_tensor(a[name]).stride(-1)) != 1 for name in ("query", "key", "value")):
        return Workspace(_product(batch) * length * keys * (2 * itemsize + 1))
    tile = min(length, 256 if length >= 768 else 64 if length >= 192 else 32)
    wide, narrow = max(itemsize, _FLOAT), itemsize if itemsize < _FLOAT else 0
    scores = tile * min(keys, 512)
    return Workspace(_product(batch) * length * _FLOAT, threads * ((scores + 2 * tile + tile * width) * wide + scores * narrow))


def _causal_attention(a: dict[str, Any], node: Node, threads: int, part: Part = WHOLE) -> Workspace:
    """As attention, with the mask that the body makes: booleans [L, S] and their float form."""
    mask = part.sizes(a["q"])[-2] * _sizes(a["k"])[-2]
    moving, fixed = _attention({"query": a["q"], "key": a["k"], "value": a["v"]}, node, threads, part)
    return Workspace(moving + mask * (1 + _FLOAT), fixed)


def _norm_stats(a: dict[str, Any], node: Node, threads: int) -> Workspace:
    return Workspace(_bytes(a["x"]) // max(1, a["groups"]))


_RULES: dict[str, Callable[[dict[str, Any], Node, int], Workspace]] = {
    "aten::conv1d": _conv,
    "aten::conv2d": _conv,
    "aten::conv3d": _conv,
    "aten::layer_norm": _layer_norm,
    "aten::rms_norm": _layer_norm,
    "aten::group_norm": _group_norm,
    "aten::upsample_nearest2d": _upsample,
    "aten::scaled_dot_product_attention": _attention,
    "gw::causal_attention": _causal_attention,
    "gw::norm_stats": _norm_stats,
}

# Rules by which the scratch of a slice is not its share of the whole's: another kernel or tile serves small sizes.
_RULES_OF_SLICES: dict[str, Callable[[dict[str, Any], Node, int, Part], Workspace]] = {
    "aten::conv1d": _conv,
    "aten::conv2d": _conv,
    "aten::conv3d": _conv,
    "aten::scaled_dot_product_attention": _attention,
    "gw::causal_attention": _causal_attention,
}


def _tensor(node: Any) -> torch.Tensor:
    return tensors_of(node.meta["val"])[0]


def _sizes(node: Any) -> list[int]:
    return [hint(size) for size in _tensor(node).shape]


def _product(sizes: Any) -> int:
    result = 1
    for size in sizes:
        result *= hint(size) if not isinstance(size, Node) else 1
    return result


def _numel(node: Any) -> int:
    return _product(_sizes(node))


def _bytes(node: Any) -> int:
    return _numel(node) * _tensor(node).dtype.itemsize


def _is_contiguous(node: Any) -> bool:
    value = _tensor(node)
    expected = contiguous_stride(_sizes(node))
    return all(hint(n) <= 1 or hint(s) == e for n, s, e in zip(value.shape, value.stride(), expected, strict=True))
