"""Sizes as nodes: a symbolic size is computed from the sizes of the function's inputs.

What a captured graph writes as a size of some intermediate is a size of its inputs too, so no body and no count needs a tensor that
slicing takes apart.
"""

import operator
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import reduce
from typing import Any

import sympy
import torch
from torch.utils._sympy.functions import FloorDiv, Max, Min, Mod, PythonMod

from .program import Node
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


Make = Callable[[Callable[..., Any], tuple[Any, ...]], Node]  # the node of a call: one that is there already, or a new one


@dataclass(frozen=True)
class _Place:
    """Where a size stands among the inputs; `dim` None: the input is the size itself. The size is `factor` times what is sought."""

    source: Node
    dim: int | None
    factor: int = 1


class SizeNodes:
    """The sizes that `inputs` tell: placeholders, or other nodes that stand before those that need one."""

    def __init__(self, inputs: Iterable[Node]):
        self._places: dict[sympy.Basic, _Place] = {}
        multiples: dict[sympy.Basic, _Place] = {}
        for source in inputs:
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
        return self.made(size, lambda target, args: _found_or_inserted(rewriter, target, args, before))

    def made(self, size: Any, make: Make) -> Any:
        """The node of the value `size`, of calls that `make` gives; a plain number stays one. `size` must be known."""
        return size if isinstance(size, int) else self._of(size.node.expr, make)

    def _of(self, expr: sympy.Basic, make: Make) -> Any:
        if expr.is_Integer:
            return int(expr)
        place = self._places.get(expr)
        if place is None:
            operands = sorted(expr.args, key=lambda arg: (arg.is_Integer, str(arg))) if expr.is_Add or expr.is_Mul else expr.args
            values = [self._of(operand, make) for operand in operands]
            return reduce(lambda a, b: make(_BINARY[type(expr)], (a, b)), values)
        size = place.source if place.dim is None else make(torch.ops.aten.sym_size.int, (place.source, place.dim))
        return size if place.factor == 1 else make(operator.floordiv, (size, place.factor))


def _found_or_inserted(rewriter: Rewriter, target: Callable[..., Any], args: tuple[Any, ...], before: Node) -> Node:
    for node in rewriter.function.graph.nodes:
        if node is before:
            return rewriter.insert(target, args, before=before)
        if node.op == "call_function" and node.target is target and node.args == args and not node.kwargs:
            return node
    raise AssertionError("the node that a size is needed before is in another graph")
