"""What the rules ask of a call's operands: sizes at the hints of symbols, bytes, layouts, and the slice that is looked at."""

from collections.abc import Collection
from typing import Any, NamedTuple

import torch

from .. import infer
from ..infer import contiguous_stride, tensors_of
from ..program import Node
from ..symbols import hint


class Workspace(NamedTuple):
    """Scratch bytes of a call: `moving` shrink with a slice of its rows, `fixed` do not."""

    moving: int = 0
    fixed: int = 0

    @property
    def total(self) -> int:
        return self.moving + self.fixed


class Part(NamedTuple):
    """A slice: `length` of `units` units along `dim`; of the operands in `views` it is a view."""

    dim: int = 0
    length: int = 1
    units: int = 1
    views: Collection[Node] = ()

    def sizes(self, node: Any) -> list[int]:
        """The sizes of a slice of an operand that is cut along the same dim as the result."""
        result = sizes(node)
        result[self.dim] = self.of(result[self.dim])
        return result

    def is_strided(self, node: Any) -> bool:
        """Whether the slice of an operand has gaps in memory that the operand has not."""
        return node in self.views and self.length < self.units and product(sizes(node)[: self.dim]) > 1

    def of(self, count: int) -> int:
        """The share of `count` things that lie evenly along the dim."""
        return count * self.length // self.units


WHOLE = Part()


def tensor(node: Any) -> torch.Tensor:
    return tensors_of(node.meta["val"])[0]


def sizes(node: Any) -> list[int]:
    return [hint(size) for size in tensor(node).shape]


def strides(node: Any) -> list[int]:
    return [hint(step) for step in tensor(node).stride()]


def product(counts: Any) -> int:
    result = 1
    for count in counts:
        result *= hint(count) if not isinstance(count, Node) else 1
    return result


def numel(node: Any) -> int:
    return product(sizes(node))


def nbytes(node: Any) -> int:
    """Bytes of a value laid out densely."""
    return numel(node) * tensor(node).dtype.itemsize


def is_contiguous(node: Any) -> bool:
    return _is_dense(sizes(node), strides(node))


def is_channels_last(node: Any) -> bool:
    """Whether ATen takes the channels, dim 1, to lie innermost, with gaps or without."""
    return infer.is_channels_last(sizes(node), strides(node))


def is_dense_channels_last(node: Any) -> bool:
    """Whether the channels lie innermost and the dims after them in order, without gaps."""
    return is_channels_last(node) and _is_dense(*[[*each[:1], *each[2:], each[1]] for each in (sizes(node), strides(node))])


def copied(node: Any) -> int:
    """Bytes of the copy that a kernel makes which takes contiguous operands only."""
    return 0 if is_contiguous(node) else nbytes(node)


def copied_image(node: Any) -> int:
    """Bytes of the copy that a kernel makes which takes channels innermost as well as contiguous images."""
    return 0 if is_dense_channels_last(node) else copied(node)


def is_one_dim(counts: list[int], steps: list[int]) -> bool:
    """Whether dims of these sizes and strides can be viewed as one."""
    real = [(n, s) for n, s in zip(counts, steps, strict=True) if n != 1]
    return all(s == n * t for (_, s), (n, t) in zip(real, real[1:], strict=False))


def _is_dense(counts: list[int], steps: list[int]) -> bool:
    return all(n <= 1 or s == e for n, s, e in zip(counts, steps, contiguous_stride(counts), strict=True))
