"""Removes run-time assertions that cannot fail.

_assert_scalar(true) -> nothing
_assert_scalar(c) -> nothing                          c follows from the ranges of the symbols
sym_constrain_range_for_size(n, min, max) -> nothing  n's range lies within [min, max]
"""

from dataclasses import dataclass
from typing import Any

import torch

from ..ir import Node, Rewriter
from ..ir.calls import is_assertion
from ..ir.pattern import named_arguments
from ..ir.symbols import SymbolTable
from .base import LeftAlone, Outcome, Pass
from .contract import Contract


@dataclass(frozen=True)
class RemoveProvenAssertions(Pass):
    """An assertion goes when the symbols' ranges prove it; one that depends on data stays."""

    name = "remove-proven-assertions"
    contract = Contract.EXACT

    def run(self, rewriter: Rewriter) -> Outcome:
        left = []
        for node in rewriter.nodes():
            target: Any = node.target
            if not is_assertion(target):
                continue
            if _is_proven(node, rewriter.symbols):
                with rewriter.step("remove-assertion"):
                    rewriter.erase(node)
            else:
                left.append(LeftAlone.at(node, "the ranges of the symbols do not prove it"))
        return Outcome(tuple(left))


def _is_proven(node: Node, symbols: SymbolTable) -> bool:
    arguments = {name: _value(value) for name, value in named_arguments(node).items()}
    if node.target is torch.ops.aten._assert_scalar.default:
        return _is_true(arguments["self"], symbols)
    if node.target in (torch.ops.aten.sym_constrain_range_for_size.default, torch.ops.aten.sym_constrain_range.default):
        return _lies_within(arguments["size"], arguments["min"], arguments["max"], symbols)
    return False


def _value(value: Any) -> Any:
    return value.meta["val"] if isinstance(value, Node) else value


def _is_true(condition: Any, symbols: SymbolTable) -> bool:
    if isinstance(condition, torch.SymBool):
        bounds = symbols.env.bound_sympy(condition.node.expr)
        return bounds.is_singleton() and bool(bounds.lower)
    return not isinstance(condition, torch.Tensor | torch.SymInt | torch.SymFloat) and bool(condition)


def _lies_within(size: Any, low: int | None, high: int | None, symbols: SymbolTable) -> bool:
    if not isinstance(size, int | torch.SymInt):
        return False
    bounds = symbols.env.bound_sympy(size.node.expr) if isinstance(size, torch.SymInt) else None
    lower, upper = (size, size) if bounds is None else (bounds.lower, bounds.upper)
    return bool(lower >= (0 if low is None else low)) and (high is None or bool(upper <= high))
