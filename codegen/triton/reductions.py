"""Reductions and normalisations of rows: which dims each one reduces, and what it computes in terms of sums and maxima.

Variances take two passes, the mean first, then the squares of what is left: E[x^2] - E[x]^2 cancels.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch

from ...ir import Node
from .index import Size, product
from .pointwise import NotFusible, arguments_of
from .views import shape_of

aten, gw = torch.ops.aten, torch.ops.gw

_TAKES_TENSOR = {"input", "self", "x"}


@dataclass(frozen=True)
class Rows:
    """How a reduction sees its operand: dims of sizes `kept` (the rows) and `reduced` (the columns).

    `groups` is set where dim 1 is split in (groups, channels of a group), the groups being kept: group normalisation.
    """

    operand: Node
    shape: tuple[Size, ...]
    dims: tuple[int, ...]
    groups: int | None = None

    @property
    def kept(self) -> tuple[Size, ...]:
        if self.groups is not None:
            return (self.shape[0], self.groups)
        return tuple(size for d, size in enumerate(self.shape) if d not in self.dims)

    @property
    def reduced(self) -> tuple[Size, ...]:
        if self.groups is not None:
            return (self.channels, *self.shape[2:])
        return tuple(self.shape[d] for d in self.dims)

    @property
    def channels(self) -> int:
        """Channels of a group."""
        assert self.groups is not None
        return int(self.shape[1]) // self.groups

    @property
    def count(self) -> Size:
        return product(self.reduced)


def rows_of(node: Node) -> Rows | None:
    """The rows that `node` reduces; None for an operation without any.

    Raises:
        NotFusible: it reduces, but not in a way that a kernel has.
    """
    if node.target not in REDUCTIONS:
        return None
    arguments = arguments_of(node)
    operand = next(value for name, value in arguments.items() if name in _TAKES_TENSOR)
    shape = shape_of(operand)
    if node.target in (aten.group_norm.default, gw.norm_stats.default):
        groups = arguments.get("num_groups", arguments.get("groups"))
        if len(shape) < 2 or not isinstance(shape[1], int):
            raise NotFusible("channels of unknown number")
        return Rows(operand, shape, (), groups)
    return Rows(operand, shape, tuple(sorted(_dims(node, arguments, len(shape)))))


def _dims(node: Node, arguments: dict[str, Any], rank: int) -> Iterable[int]:
    if rank == 0:
        raise NotFusible("a tensor without dims has no rows")
    if "normalized_shape" in arguments:
        return range(rank - len(arguments["normalized_shape"]), rank)
    dims = arguments.get("dim")
    if dims is None or dims == []:
        return range(rank)
    return [d % rank for d in ([dims] if isinstance(dims, int) else dims)]


def keeps_shape(node: Node) -> bool:
    """Whether the result has its operand's shape (a normalisation), not one element a row."""
    return node.target in _SHAPED


def correction(arguments: dict[str, Any]) -> float:
    """What a variance subtracts from the number of elements."""
    if "unbiased" in arguments:
        return 1 if arguments["unbiased"] else 0
    return 1 if arguments["correction"] is None else arguments["correction"]


def eps_of(node: Node) -> float:
    """The eps of a normalisation; rms_norm's default is that of the operand's dtype."""
    eps = arguments_of(node)["eps"]
    if eps is not None:
        return float(eps)
    dtype = node.args[0].meta["val"].dtype
    if dtype not in (torch.float32, torch.float64):
        raise NotFusible("rms_norm of half precision without eps")
    return torch.finfo(dtype).eps


_SHAPED: set[Callable[..., Any]] = {
    aten.layer_norm.default,
    aten.rms_norm.default,
    aten.group_norm.default,
    aten.softmax.int,
    aten._softmax.default,
    aten.log_softmax.int,
    aten._log_softmax.default,
}
# target -> flops an element
REDUCTIONS: dict[Callable[..., Any], int] = {
    **{target: 10 for target in _SHAPED},
    gw.norm_stats.default: 4,
    aten.sum.dim_IntList: 1,
    aten.sum.default: 1,
    aten.mean.dim: 1,
    aten.mean.default: 1,
    aten.amax.default: 1,
    aten.amin.default: 1,
    aten.var.correction: 4,
    aten.var.dim: 4,
}
