"""Removes operations that return their operand, and merges chains of views.

    view | reshape | expand | permute | slice | ..(x) -> x      of x's own type (shape, strides, dtype)
    clone | _to_copy | contiguous | alias | dropout(eval)(x) -> x
    copy(y, x) -> x                                             of y's type
    mul(x, 1) | div(x, 1) | sub(x, 0) | pow(x, 1) -> x          of x's own dtype; add(x, 0) of integers, add(x, -0.0) of floats
    view(view(x, _), s) -> view(x, s)
    permute(permute(x, p), q) -> permute(x, p[q])               also transpose and t; nothing where p[q] is the identity

`x + 0.0` is no no-op: it turns -0.0 into 0.0, and 1/x then changes sign. A copy stays where without it an output would lie in the
memory of an input, a weight or another output.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..ir import Node, Rewriter
from ..ir.calls import draws
from ..ir.infer import InferenceError, infer, same_type
from ..ir.pattern import named_arguments
from .aliases import OutputAliases, share_memory
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
_COPIES = {
    _aten.clone.default,
    _aten._to_copy.default,
    _aten.contiguous.default,
    _aten.to.dtype,
    _aten.lift_fresh_copy.default,
    _aten.copy.default,
}
_DROPOUTS = {_aten.dropout.default, _aten.feature_dropout.default, _aten.alpha_dropout.default}
_RESHAPES = {_aten.view.default, _aten._unsafe_view.default, _aten.reshape.default}
_ADDITIONS = {_aten.add.Tensor, _aten.add.Scalar}
_SUBTRACTIONS = {_aten.sub.Tensor, _aten.sub.Scalar}
_ARITHMETIC: dict[Any, int] = {
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
    rules = ("remove-no-op", "merge-views", "merge-permutes")
    contract = Contract.EXACT

    def run(self, rewriter: Rewriter) -> Outcome:
        while True:
            before, sweep = len(rewriter.records), _Sweep(rewriter)
            for node in rewriter.nodes():
                sweep.visit(node)
            if len(rewriter.records) == before:
                return Outcome(tuple(sweep.left), declined=tuple(sweep.declined))


class _Sweep:
    """One pass over the nodes in order; a removal can make a later one possible, rarely an earlier one."""

    def __init__(self, rewriter: Rewriter):
        self.rewriter = rewriter
        self.outputs = OutputAliases(rewriter)
        self.left: list[LeftAlone] = []
        self.declined: list[LeftAlone] = []

    def visit(self, node: Node) -> None:
        source = _source(node)
        if source is None:
            return
        if _returns_operand(node, source):
            self._bypass(node, source)
        elif node.target in _RESHAPES:
            self._replace_by_view(node, "merge-views", _merged_view(node, source))
        elif _permutation(node) is not None:
            self._replace_by_view(node, "merge-permutes", _merged_permutation(node, source))
        elif _is_signed_zero_trap(node, source):
            self.left.append(LeftAlone.at(node, "x + 0.0 turns -0.0 into 0.0", "remove-no-op"))

    def _bypass(self, node: Node, source: Node) -> None:
        reason = self.outputs.reason_to_keep(node, source)
        if reason is not None:
            self.left.append(LeftAlone.at(node, reason, "remove-no-op"))
            return
        with self.rewriter.step("remove-no-op"):
            self.outputs.merged(node, source)
            self.rewriter.replace(node, source)

    def _replace_by_view(self, node: Node, rule: str, view: "_View | str | None") -> None:
        if view is None:
            return
        reason = view if isinstance(view, str) else self._reason_against(node, view)
        if reason is not None or isinstance(view, str):
            self.declined.append(LeftAlone.at(node, str(reason), rule))
            return
        with self.rewriter.step(rule):
            new = self.rewriter.insert(view.target, (view.source, view.argument), before=node, origin=[*node.all_input_nodes, node])
            self.rewriter.replace(node, new)

    def _reason_against(self, node: Node, view: "_View") -> str | None:
        if not share_memory(node, view.source):
            return "one of the two copies"
        try:
            value = infer(self.rewriter.symbols, view.target, (view.source, view.argument), {})
        except InferenceError:
            return "the one before it changes strides in a way that it needs"
        return None if same_type(value, node.meta["val"]) else "one in their place would lay out its result in another way"


@dataclass(frozen=True)
class _View:
    """One view that does the work of two."""

    target: Any
    source: Node
    argument: Any


def _source(node: Node) -> Node | None:
    """The first operand, of a copy into another tensor the second, if it is a value."""
    index = 1 if node.target is _aten.copy.default else 0
    first = node.args[index] if len(node.args) > index else None
    return first if isinstance(first, Node) else None


def _returns_operand(node: Node, source: Node) -> bool:
    """Whether `node` computes `source`, bit for bit and of the same type."""
    if not same_type(source.meta["val"], node.meta["val"]):
        return False
    if node.target in _DROPOUTS:
        return not draws(node)
    return node.target in _VIEWS or node.target in _COPIES or _is_neutral(node, source.meta["val"].dtype)


def _is_neutral(node: Node, dtype: torch.dtype) -> bool:
    """Whether the second operand of arithmetic leaves every element as it is, NaN and both zeros included."""
    target: Any = node.target
    scalar = node.args[1] if target in _ARITHMETIC else None
    if isinstance(scalar, bool) or not isinstance(scalar, int | float) or scalar != _ARITHMETIC[target]:
        return False
    if named_arguments(node).get("alpha", 1) != 1 or dtype.is_complex:
        return False  # a complex infinity times 1 has a NaN part
    negative = math.copysign(1.0, scalar) < 0
    if not dtype.is_floating_point:
        return True
    return negative if target in _ADDITIONS else not (negative and target in _SUBTRACTIONS)


def _is_signed_zero_trap(node: Node, source: Node) -> bool:
    scalar = node.args[1] if node.target in _ADDITIONS else None
    return isinstance(scalar, int | float) and scalar == 0 and same_type(source.meta["val"], node.meta["val"])


def _merged_view(node: Node, inner: Node) -> _View | str | None:
    """One view for `node` and `inner`, or why they stay two; None where `inner` is no view of that kind."""
    source = _source(inner)
    if source is None or inner.target not in _RESHAPES:
        return None
    return _View(_aten.view.default, source, node.args[1]) if len(inner.users) == 1 else _read_often(inner)


def _merged_permutation(node: Node, inner: Node) -> _View | str | None:
    source, first, second = _source(inner), _permutation(inner), _permutation(node)
    if source is None or first is None or second is None:
        return None
    return _View(_aten.permute.default, source, [first[dim] for dim in second]) if len(inner.users) == 1 else _read_often(inner)


def _read_often(inner: Node) -> str:
    return f"the one before it is read {len(inner.users)} times"


def _permutation(node: Node) -> Sequence[int] | None:
    """The dims of the operand in the order in which the result has them; None when `node` does not permute."""
    if node.target not in (_aten.permute.default, _aten.transpose.int, _aten.t.default):
        return None
    arguments, rank = named_arguments(node), node.meta["val"].dim()
    if "dims" in arguments:
        return [dim % rank for dim in arguments["dims"]]
    order = list(range(rank))
    if rank:
        a, b = arguments.get("dim0", 0) % rank, arguments.get("dim1", rank - 1) % rank
        order[a], order[b] = order[b], order[a]
    return order
