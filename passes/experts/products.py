"""Products of rows with the matrices of their experts, in the forms in which they are captured.

    grouped   grouped_mm(x[N, K], transpose(W), ends)                          rows sorted by expert
    batched   squeeze(bmm(index(W, [experts]), unsqueeze(x[N, K], -1)))        a copy of the weights for each row
    dense     matmul | bmm(x[E or 1, T, K], transpose(W))                      every expert on every row
    einsum    einsum(x[T, K] | x[E, C, K], W) -> [E, C, M] | [T, E, M]         every expert on every row, or on those dispatched to it
              einsum(x[T, K] | x[T, k, K], index(W, [experts[T, k]])) -> [T, k, M]

W is a weight [E, M, K], or [E, K, M] where it is not transposed.
"""

from dataclasses import dataclass
from typing import Any

import torch

from ...ir import Node
from ...ir.pattern import NoMatch, named_arguments

aten, gw = torch.ops.aten, torch.ops.gw

_UNSQUEEZED = (aten.unsqueeze.default, aten.view.default, aten.reshape.default, aten._unsafe_view.default)
_GROUPED = {aten._grouped_mm.default: ("self", "mat2"), gw.grouped_mm.default: ("x", "weight")}


@dataclass(frozen=True)
class ExpertProduct:
    """`result` = x @ W[expert of the row].T: [N, M], for dense [E, T, M], for einsum any of those above. The weight is [E, K, M] where
    `transposed`. `experts` says which expert a row has: the ends of groups, or an index a row; None for all."""

    form: str
    result: Node
    x: Node
    weight: Node
    transposed: bool
    experts: Node | None


def product_of(node: Node) -> ExpertProduct | NoMatch | None:
    """The product that `node` is; why it is none of experts' that are known; None where it has no matrices by expert at all."""
    if node.target in _GROUPED:
        return _grouped(node)
    if node.target is aten.bmm.default and any(_is_gathered(operand) for operand in node.args):
        return _batched(node)
    if node.target in (aten.bmm.default, aten.matmul.default):
        return _dense(node)
    if node.target is aten.einsum.default:
        return _einsum(node)
    return None


def _grouped(node: Node) -> ExpertProduct | NoMatch:
    named = named_arguments(node)
    x, matrices = (named[name] for name in _GROUPED[node.target])
    found = _weight_of(matrices)
    if found is None or x.meta["val"].dim() != 2:
        return NoMatch("its groups are not of rows, with a matrix of a weight for each", node)
    if named.get("bias") is not None:
        return NoMatch("its experts have a bias", node)
    return ExpertProduct("grouped", node, x, *found, named["offs"])


def _batched(node: Node) -> ExpertProduct | NoMatch:
    first, second = node.args
    gathered: Any
    turned = _is_gathered(second)  # row times matrix [K, M], or matrix [M, K] times column
    gathered, rows = (second, first) if turned else (first, second)
    if operation(rows) not in _UNSQUEEZED or rows.args[0].meta["val"].dim() != 2 or rows.meta["val"].size(1 if turned else 2) != 1:
        return NoMatch("what it multiplies with a matrix each is not rows [tokens * k, width] that got a dim of 1", node)
    result = only_user(node)
    if result is None or result.meta["val"].dim() != 2:
        return NoMatch("what it multiplies is not squeezed to one row for each row, and read as such alone", node)
    weight, (index,) = gathered.args
    if not _is_weight(weight):
        return NoMatch("the matrices that it copies are no weight [experts, .., ..]", gathered)
    return ExpertProduct("batched", result, rows.args[0], weight, turned, index)


def _dense(node: Node) -> ExpertProduct | None:
    x, matrices = node.args
    found = _weight_of(matrices)
    if found is None or node.meta["val"].dim() != 3:
        return None  # any other product
    return ExpertProduct("dense", node, x, *found, None)


def _einsum(node: Node) -> ExpertProduct | None:
    """A product in which the first dim of the weight is in the result, the contracted one is of the rows, and the last of the result is the
    weight's own; None for any other."""
    equation, operands = node.args[0], node.args[1]
    inputs, _, out = equation.replace(" ", "").partition("->")  # type: ignore[union-attr]
    labels = inputs.split(",")
    if len(labels) != 2 or not out or "." in equation:  # type: ignore[operator]
        return None
    for own, other, matrices, x in ((labels[0], labels[1], *operands), (labels[1], labels[0], *operands[::-1])):  # type: ignore[misc,index]
        index = None
        if _is_gathered(matrices) and len(own) == 4:
            (index,), matrices, own = matrices.args[1], matrices.args[0], own[1:]  # [T, k] rows of matrices: k stands for the expert
        if not _is_weight(matrices) or len(own) != 3 or own[0] not in out or (index is not None and index.meta["val"].dim() != 2):
            continue
        contracted, kept = (
            [each for each in own[1:] if (each in other) is is_in and (each in out) is not is_in] for is_in in (True, False)
        )
        rows = [each for each in out if each in other and each != own[0]]
        if len(contracted) == len(kept) == len(rows) == 1 and out[-1] == kept[0] and len(out) == 3 and other[-1] == contracted[0]:
            return ExpertProduct("einsum", node, x, matrices, own[1] == contracted[0], index)
    return None


def _weight_of(matrices: Any) -> tuple[Node, bool] | None:
    """The weight that `matrices` [E, K, M] are, and whether it is laid out so; None where they are none."""
    swapped = operation(matrices) is aten.transpose.int and {dim % 3 for dim in matrices.args[1:]} == {1, 2}
    if swapped or (operation(matrices) is aten.permute.default and [dim % 3 for dim in matrices.args[1]] == [0, 2, 1]):
        return (matrices.args[0], False) if _is_weight(matrices.args[0]) else None
    return (matrices, True) if _is_weight(matrices) else None


def _is_gathered(value: Any) -> bool:
    return operation(value) is aten.index.Tensor and value.args[0].meta["val"].dim() == 3 and len(value.args[1]) == 1


def _is_weight(value: Any) -> bool:
    return isinstance(value, Node) and value.op == "get_attr" and value.meta["val"].dim() == 3


def operation(value: Any) -> Any:
    """What `value` calls; None where it is no call."""
    return value.target if isinstance(value, Node) and value.op == "call_function" else None


def only_user(node: Node) -> Node | None:
    """The one call that reads `node`, where there is one."""
    return next(iter(node.users)) if len(node.users) == 1 else None
