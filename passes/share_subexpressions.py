"""Computes each expression once.

    f(A(x), A(x)) -> f(y, y)   with y = A(x)

Two calls are one expression when operation, operands and every attribute agree; 0.0 and -0.0, 1 and 1.0, and two dtypes differ.
Random operations are never shared, nor are two values that the caller receives: a write into one would change the other.
"""

from collections.abc import Hashable
from dataclasses import dataclass
from typing import Any

from ..ir import Node, Rewriter
from ..ir.calls import is_pure
from ..ir.infer import same_type
from ..ir.pattern import named_arguments
from .aliases import OutputAliases
from .base import LeftAlone, Outcome, Pass
from .contract import Contract


@dataclass(frozen=True)
class ShareSubexpressions(Pass):
    """A call equal to an earlier one is replaced by it."""

    name = "share-subexpressions"
    rules = ("share",)
    contract = Contract.EXACT

    def run(self, rewriter: Rewriter) -> Outcome:
        outputs, left = OutputAliases(rewriter), []
        first: dict[Hashable, Node] = {}
        for node in rewriter.nodes():
            if not is_pure(node):
                continue
            earlier = first.setdefault((node.target, _key(named_arguments(node))), node)
            if earlier is node or not same_type(earlier.meta["val"], node.meta["val"]):
                continue
            if node in outputs and earlier in outputs:
                left.append(LeftAlone.at(node, "two outputs would come to share memory"))
                continue
            with rewriter.step("share"):
                outputs.merged(node, earlier)
                rewriter.replace(node, earlier)
        return Outcome(tuple(left))


def _key(value: Any) -> Hashable:
    """Equal for equal arguments; a literal's type and spelling keep 1, 1.0 and true apart, and both zeros."""
    if isinstance(value, Node):
        return id(value)
    if isinstance(value, dict):
        return tuple((name, _key(item)) for name, item in value.items())
    if isinstance(value, tuple | list):
        return tuple(map(_key, value))
    return (type(value), repr(value)) if isinstance(value, float | complex) else (type(value), value)
