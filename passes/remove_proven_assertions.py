"""Removes run-time assertions that cannot fail.

_assert_scalar(true) -> nothing
_assert_scalar(c) -> nothing                          c follows from the ranges of the symbols
sym_constrain_range_for_size(n, min, max) -> nothing  n's range lies within [min, max]
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._sympy.numbers import int_oo
from torch.utils._sympy.value_ranges import ValueRanges, bound_sympy

from ..ir import Node, Rewriter
from ..ir.calls import is_assertion
from ..ir.pattern import named_arguments
from ..ir.symbols import UNBOUNDED, SymbolTable
from .base import LeftAlone, Outcome, Pass
from .contract import Contract


@dataclass(frozen=True)
class RemoveProvenAssertions(Pass):
    """An assertion goes when the symbols' ranges prove it; one that depends on data stays."""

    name = "remove-proven-assertions"
    rules = ("remove-assertion",)
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
        bounds = _bounds(condition, symbols)
        return bounds.is_singleton() and bool(bounds.lower)
    return not isinstance(condition, torch.Tensor | torch.SymInt | torch.SymFloat) and bool(condition)


def _lies_within(size: Any, low: int | None, high: int | None, symbols: SymbolTable) -> bool:
    if isinstance(size, int):
        lower = upper = size
    elif isinstance(size, torch.SymInt):
        bounds = _bounds(size, symbols)
        lower, upper = bounds.lower, bounds.upper
    else:
        return False
    return bool(lower >= (0 if low is None else low)) and (high is None or bool(upper <= high))


def _bounds(size: torch.SymInt | torch.SymBool, symbols: SymbolTable) -> Any:
    """The range of an expression over the declared ranges. Those of the ShapeEnv are no proof: each assertion narrows them."""
    declared = {symbols.size(s.name).node.expr: ValueRanges(s.low, s.high if s.high < UNBOUNDED else int_oo) for s in symbols}
    return bound_sympy(size.node.expr, declared)
