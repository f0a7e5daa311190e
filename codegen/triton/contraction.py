"""Products of matrices: which positions of its operands an element of each one's result sums over, and what is added to it.

y[batch, i, j] = alpha sum_k left[batch, i, k] right[batch, k, j] + beta addend
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from ...ir import Node
from .index import Index, Size, Var
from .pointwise import NotFusible, arguments_of
from .views import Indices, broadcast, shape_of

aten = torch.ops.aten


@dataclass(frozen=True)
class Contraction:
    """One product. The first `num_batch` dims of the result count matrices, its last dim is j, those between are i.

    `is_transposed` where the last dim of `right` is k: the weight of a linear layer. The sum is multiplied by `scales`, which are
    broadcast. `is_fast` where sums of 8-bit floats may lose what the hardware's own accumulator loses. With `ends`, rows up to ends[0]
    meet right[0], those up to ends[1] right[1], and so on: a product of each expert with its tokens.
    """

    node: Node
    left: Node
    right: Node
    num_batch: int
    is_transposed: bool = False
    addend: Node | None = None
    alpha: float = 1
    beta: float = 1
    scales: tuple[Node, ...] = ()
    is_fast: bool = False
    ends: Node | None = None

    @property
    def group(self) -> Var | None:
        """The variable that counts groups of rows."""
        return None if self.ends is None else Var("g", shape_of(self.right)[0])

    @property
    def k(self) -> Size:
        """How many products an element sums."""
        return shape_of(self.left)[-1]

    def left_at(self, index: Indices, k: Index) -> Indices:
        """The position in `left` of term k of the element at `index`."""
        return (*index[:-1], k)

    def right_at(self, index: Indices, k: Index) -> Indices:
        """The position in `right` of term k of the element at `index`."""
        batch = index[: self.num_batch] if self.group is None else (Index.of(self.group),)
        return (*batch, *((index[-1], k) if self.is_transposed else (k, index[-1])))

    def addend_at(self, index: Indices) -> Indices:
        """The position in `addend`, which is broadcast."""
        assert self.addend is not None
        return broadcast(index, shape_of(self.addend))


def contraction(node: Node) -> Contraction | None:
    """The product that `node` is; None for an operation that is none.

    Raises:
        NotFusible: it is one, but of a form that no kernel has.
    """
    if node.op != "call_function" or node.target not in _PRODUCTS:
        return None
    found = _PRODUCTS[node.target](node, arguments_of(node))
    if not all(isinstance(n, int | float) for n in (found.alpha, found.beta)):
        raise NotFusible("a product with a factor that is a size")
    return found


def _linear(node: Node, a: dict[str, Any]) -> Contraction:
    if len(shape_of(a["weight"])) != 2:
        raise NotFusible("a linear layer of one feature")
    return Contraction(node, a["input"], a["weight"], 0, True, a["bias"])


def _mm(node: Node, a: dict[str, Any]) -> Contraction:
    return Contraction(node, a["self"], a["mat2"], 0)


def _addmm(node: Node, a: dict[str, Any]) -> Contraction:
    return Contraction(node, a["mat1"], a["mat2"], 0, False, a["self"], a["alpha"], a["beta"])


def _bmm(node: Node, a: dict[str, Any]) -> Contraction:
    return Contraction(node, a["self"], a["mat2"], 1)


def _baddbmm(node: Node, a: dict[str, Any]) -> Contraction:
    return Contraction(node, a["batch1"], a["batch2"], 1, False, a["self"], a["alpha"], a["beta"])


def _matmul(node: Node, a: dict[str, Any]) -> Contraction:
    """Of matrices, or of matrices and one matrix: no vectors, and no batch that is broadcast."""
    left, right = shape_of(a["self"]), shape_of(a["other"])
    if len(right) == 2 <= len(left):
        return Contraction(node, a["self"], a["other"], 0)
    if len(left) != len(right) or len(left) < 3 or left[:-2] != right[:-2]:
        raise NotFusible("a product that broadcasts matrices")
    return Contraction(node, a["self"], a["other"], len(left) - 2)


def _scaled_mm(node: Node, a: dict[str, Any]) -> Contraction:
    """Of 8-bit floats, scaled as a whole or by row and column: y = scale_a scale_b sum + bias."""
    scales = (a["scale_a"], a["scale_b"])
    columns = shape_of(node)[-1]
    for scale, shape in zip(scales, ((shape_of(node)[0], 1), (1, columns)), strict=True):
        if scale.meta["val"].dtype != torch.float32 or (shape_of(scale) != shape and any(size != 1 for size in shape_of(scale))):
            raise NotFusible("scales of blocks")
    if a["scale_result"] is not None:
        raise NotFusible("a product that is scaled to 8 bits")
    return Contraction(node, a["self"], a["mat2"], 0, False, a["bias"], scales=scales, is_fast=a["use_fast_accum"])


def _grouped_mm(node: Node, a: dict[str, Any]) -> Contraction:
    """Of groups of rows, each with a matrix of its own."""
    if a["offs"] is None or len(shape_of(a["self"])) != 2 or len(shape_of(a["mat2"])) != 3:
        raise NotFusible("groups that are not of rows")
    if a["bias"] is not None or a["out_dtype"] not in (None, a["self"].meta["val"].dtype):
        raise NotFusible("a grouped product with a bias or of another type")
    if not isinstance(shape_of(a["mat2"])[0], int) or a["offs"].meta["val"].dtype != torch.int32:
        raise NotFusible("groups of unknown number")
    return Contraction(node, a["self"], a["mat2"], 0, ends=a["offs"])


_PRODUCTS: dict[Callable[..., Any], Callable[[Node, dict[str, Any]], Contraction]] = {
    aten.linear.default: _linear,
    aten.mm.default: _mm,
    aten._int_mm.default: _mm,
    aten._scaled_mm.default: _scaled_mm,
    aten._grouped_mm.default: _grouped_mm,
    aten.addmm.default: _addmm,
    aten.bmm.default: _bmm,
    aten.baddbmm.default: _baddbmm,
    aten.matmul.default: _matmul,
}
