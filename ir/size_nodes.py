"""Sizes as nodes: a symbolic size is computed, before a given node, from the sizes of the function's inputs.

What a captured graph writes as a size of some intermediate is a size of its inputs too, so no body and no count needs a tensor that
slicing takes apart.
"""

import operator
from collections.abc import Callable
from dataclasses import dataclass
from functools import reduce
from typing import Any

import sympy
import torch
from torch.utils._sympy.functions import FloorDiv, Max, Min, Mod, PythonMod

from .program import Function, Node
from .rewriter import Rewriter

_BINARY: dict[type, Callable[..., Any]] = {
    sympy.Add: operator.add,
    sympy.Mul: operator.mul,
    sympy.Pow: operator.pow,
    FloorDiv: operator.floordiv,
    Mod: operator.mod,
    PythonMod: operator.mod,
    Min: torch.sym_min,
    Max: torch.sym_max,
}


@dataclass(frozen=True)
class _Place:
    """Where a size stands among the inputs; `dim` None: the input is the size itself. The size is `factor` times what is sought."""

    source: Node
    dim: int | None
    factor: int = 1


class SizeNodes:
    """The sizes that the inputs of one function tell."""

    def __init__(self, function: Function):
        self._graph = function.graph
        self._places: dict[sympy.Basic, _Place] = {}
        multiples: dict[sympy.Basic, _Place] = {}
        for source in function.placeholders:
            value = source.meta["val"]
            sizes = list(enumerate(value.shape)) if isinstance(value, torch.Tensor) else [(None, value)]
            for dim, size in sizes:
                if not isinstance(size, torch.SymInt):
                    continue
                self._places.setdefault(size.node.expr, _Place(source, dim))
                factor, symbol = size.node.expr.as_coeff_Mul()
                if symbol.is_Symbol and factor.is_Integer:
                    multiples.setdefault(symbol, _Place(source, dim, int(factor)))
        self._places = {**multiples, **self._places}

    def knows(self, size: Any) -> bool:
        """Whether `node` can compute the size."""
        return isinstance(size, int) or (isinstance(size, torch.SymInt) and self._knows(size.node.expr))

    def _knows(self, expr: sympy.Basic) -> bool:
        if expr in self._places or expr.is_Integer:
            return True
        return type(expr) in _BINARY and all(map(self._knows, expr.args))

    def node(self, rewriter: Rewriter, size: Any, before: Node) -> Any:
        """A node of the value `size` that stands before `before`, made unless there is one; a plain number stays one.

        `size` must be known.
        """
        return size if isinstance(size, int) else self._of(rewriter, size.node.expr, before)

    def _of(self, rewriter: Rewriter, expr: sympy.Basic, before: Node) -> Any:
        if expr.is_Integer:
            return int(expr)
        place = self._places.get(expr)
        if place is None:
            operands = sorted(expr.args, key=lambda arg: (arg.is_Integer, str(arg))) if expr.is_Add or expr.is_Mul else expr.args
            values = [self._of(rewriter, operand, before) for operand in operands]
            return reduce(lambda a, b: self._call(rewriter, _BINARY[type(expr)], (a, b), before), values)
        size = place.source if place.dim is None else self._call(rewriter, torch.ops.aten.sym_size.int, (place.source, place.dim), before)
        return size if place.factor == 1 else self._call(rewriter, operator.floordiv, (size, place.factor), before)

    def _call(self, rewriter: Rewriter, target: Callable[..., Any], args: tuple[Any, ...], before: Node) -> Node:
        for node in self._graph.nodes:
            if node is before:
                return rewriter.insert(target, args, before=before)
            if node.op == "call_function" and node.target is target and node.args == args and not node.kwargs:
                return node
        raise AssertionError("the node that a size is needed before is in another graph")
