"""Removes operations that return their operand, and merges chains of views.

    view | reshape | expand | permute | slice | ..(x) -> x      of x's own type (shape, strides, dtype)
    clone | _to_copy | contiguous | alias | dropout(eval)(x) -> x
    mul(x, 1) | div(x, 1) | sub(x, 0) | pow(x, 1) -> x          of x's own dtype; add(x, 0) of integers, add(x, -0.0) of floats
    view(view(x, _), s) -> view(x, s)
    permute(permute(x, p), q) -> permute(x, p[q])               also transpose and t; nothing where p[q] is the identity

`x + 0.0` is no no-op: it turns -0.0 into 0.0, and 1/x then changes sign. A copy stays where without it an output would lie in the
memory of an input, a weight or another output.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..ir import Node, Rewriter
from ..ir.infer import InferenceError, infer, same_type
from ..ir.pattern import named_arguments
from .aliases import OutputAliases
from .base import LeftAlone, Outcome, Pass
from .contract import Contract

_aten = torch.ops.aten

_VIEWS = {
    _aten.view.default,
    _aten._unsafe_view.default,
    _aten.reshape.default,
    _aten.expand.default,
    _aten.permute.default,
    _aten.transpose.int,
    _aten.t.default,
    _aten.slice.Tensor,
    _aten.squeeze.default,
    _aten.squeeze.dim,
    _aten.squeeze.dims,
    _aten.flatten.using_ints,
    _aten.alias.default,
    _aten.detach.default,
}
_COPIES = {_aten.clone.default, _aten._to_copy.default, _aten.contiguous.default, _aten.to.dtype, _aten.lift_fresh_copy.default}
_DROPOUTS = {_aten.dropout.default, _aten.feature_dropout.default, _aten.alpha_dropout.default}
_RESHAPES = {_aten.view.default, _aten._unsafe_view.default, _aten.reshape.default}
_ARITHMETIC = {
    _aten.mul.Tensor: 1,
    _aten.mul.Scalar: 1,
    _aten.div.Tensor: 1,
    _aten.div.Scalar: 1,
    _aten.pow.Tensor_Scalar: 1,
    _aten.add.Tensor: 0,
    _aten.add.Scalar: 0,
    _aten.sub.Tensor: 0,
    _aten.sub.Scalar: 0,
}


@dataclass(frozen=True)
class RemoveNoOps(Pass):
    """What remains computes something, or the report says why it stays."""

    name = "remove-no-ops"
    contract = Contract.EXACT

    def run(self, rewriter: Rewriter) -> Outcome:
        while True:
            before, sweep = len(rewriter.records), _Sweep(rewriter)
            for node in rewriter.nodes():
                sweep.visit(node)
            if len(rewriter.records) == before:
                return Outcome(tuple(sweep.left))


class _Sweep:
    """One pass over the nodes in order; a removal can make a later one possible, rarely an earlier one."""

    def __init__(self, rewriter: Rewriter):
        self.rewriter = rewriter
        self.outputs = OutputAliases(rewriter)
        self.left: list[LeftAlone] = []

    def visit(self, node: Node) -> None:
        if _returns_operand(node):
            self._bypass(node)
        elif node.target in _RESHAPES:
            self._merge(node, "merge-views", _merged_view)
        elif _permutation(node) is not None:
            self._merge(node, "merge-permutes", _merged_permutation)
        elif _is_signed_zero_trap(node):
            self.left.append(LeftAlone.at(node, "x + 0.0 turns -0.0 into 0.0"))

    def _bypass(self, node: Node) -> None:
        source = node.args[0]
        reason = None if node.target in _VIEWS else self.outputs.reason_to_keep(node, source)
        if reason is not None:
            self.left.append(LeftAlone.at(node, reason))
            return
        with self.rewriter.step("remove-no-op"):
            self.outputs.merged(node, source)
            self.rewriter.replace(node, source)

    def _merge(self, node: Node, rule: str, merged: "Callable[[Node], tuple[Any, ...] | None]") -> None:
        call = merged(node)
        if call is None:
            return
        target, *arguments = call
        try:
            value = infer(self.rewriter.symbols, target, arguments, {})
        except InferenceError:
            return  # the inner view made a copy, or strides that the outer one needs
        if not same_type(value, node.meta["val"]):
            return
        with self.rewriter.step(rule):
            new = self.rewriter.insert(target, arguments, before=node, origin=[node.args[0], node])
            self.outputs.merged(node, new)
            self.rewriter.replace(node, new)


def _returns_operand(node: Node) -> bool:
    """Whether `node` computes its first operand, bit for bit and of the same type."""
    source = node.args[0] if node.args else None
    if not isinstance(source, Node) or not isinstance(source.meta["val"], torch.Tensor) or not same_type(source.meta["val"], node.meta["val"]):
        return False
    if node.target in _VIEWS or node.target in _COPIES:
        return True
    if node.target in _DROPOUTS:
        arguments = named_arguments(node)
        return not arguments["train"] or arguments["p"] == 0
    return node.target in _ARITHMETIC and _is_neutral(node, source.meta["val"].dtype)


def _is_neutral(node: Node, dtype: torch.dtype) -> bool:
    """Whether the second operand of arithmetic leaves every element as it is, NaN and both zeros included."""
    scalar = node.args[1]
    if isinstance(scalar, bool) or not isinstance(scalar, int | float) or scalar != _ARITHMETIC[node.target]:
        return False
    if named_arguments(node).get("alpha", 1) != 1:
        return False
    if not (dtype.is_floating_point or dtype.is_complex):
        return True
    negative = math.copysign(1.0, scalar) < 0
    if node.target in (_aten.add.Tensor, _aten.add.Scalar):
        return negative
    return not (negative and node.target in (_aten.sub.Tensor, _aten.sub.Scalar))


def _is_signed_zero_trap(node: Node) -> bool:
    scalar = node.args[1] if node.target in (_aten.add.Tensor, _aten.add.Scalar) else None
    return isinstance(scalar, int | float) and scalar == 0 and same_type(node.args[0].meta["val"], node.meta["val"])


def _merged_view(node: Node) -> tuple[Any, ...] | None:
    inner = node.args[0]
    if inner.target not in _RESHAPES or len(inner.users) != 1:
        return None
    return _aten.view.default, inner.args[0], node.args[1]


def _merged_permutation(node: Node) -> tuple[Any, ...] | None:
    inner = node.args[0]
    first, second = _permutation(inner), _permutation(node)
    if first is None or second is None or len(inner.users) != 1:
        return None
    return _aten.permute.default, inner.args[0], [first[dim] for dim in second]


def _permutation(node: Node) -> Sequence[int] | None:
    """The dims of the operand in the order in which the result has them; None when `node` does not permute."""
    if node.target not in (_aten.permute.default, _aten.transpose.int, _aten.t.default):
        return None
    rank = node.meta["val"].dim()
    if node.target is _aten.permute.default:
        return [dim % rank for dim in node.args[1]]
    order = list(range(rank))
    a, b = (dim % rank for dim in node.args[1:3]) if node.target is _aten.transpose.int and rank else (0, max(rank - 1, 0))
    if rank:
        order[a], order[b] = order[b], order[a]
    return order
