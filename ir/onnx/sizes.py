"""Arithmetic on shapes: integers some of which are sizes known only at call time.

ONNX computes shapes with tensors (Shape, Gather, Concat, Mul, ..). Here such a tensor is a NumPy array of objects, each an `int` or a
`Size`, and is folded as it is computed: what is left in the program are sizes, not tensors of them.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch.fx.experimental.symbolic_shapes import statically_known_true

from ..build import add_call
from ..program import Node
from ..symbols import SymbolTable, same_size


class Size:
    """A symbolic size: a node whose value is a SymInt."""

    def __init__(self, node: Node, symbols: SymbolTable):
        self.node, self._symbols = node, symbols

    @property
    def value(self) -> torch.SymInt:
        return self.node.meta["val"]

    def _apply(self, function: Callable[..., Any], *operands: Any) -> Any:
        nodes = [each.node if isinstance(each, Size) else int(each) for each in operands]
        return size_of(add_call(self.node.graph, self._symbols, function, tuple(nodes)), self._symbols)

    def __add__(self, other: Any) -> Any:
        return self if _is(other, 0) else self._apply(operator.add, self, other)

    def __radd__(self, other: Any) -> Any:
        return self if _is(other, 0) else self._apply(operator.add, other, self)

    def __sub__(self, other: Any) -> Any:
        return self if _is(other, 0) else self._apply(operator.sub, self, other)

    def __rsub__(self, other: Any) -> Any:
        return self._apply(operator.sub, other, self)

    def __mul__(self, other: Any) -> Any:
        return self if _is(other, 1) else self._apply(operator.mul, self, other)

    def __rmul__(self, other: Any) -> Any:
        return self if _is(other, 1) else self._apply(operator.mul, other, self)

    def __floordiv__(self, other: Any) -> Any:
        return self if _is(other, 1) else self._apply(operator.floordiv, self, other)

    def __rfloordiv__(self, other: Any) -> Any:
        return self._apply(operator.floordiv, other, self)

    def __mod__(self, other: Any) -> Any:
        return self._apply(operator.mod, self, other)

    def __rmod__(self, other: Any) -> Any:
        return self._apply(operator.mod, other, self)

    def __neg__(self) -> Any:
        return self._apply(operator.neg, self)


def size_of(node: Node, symbols: SymbolTable) -> int | Size:
    """What a node of a size stands for: a number where its type says which."""
    value = node.meta["val"]
    if isinstance(value, torch.SymInt):
        expr = value.node.expr
        if not expr.is_Integer:
            return Size(node, symbols)
        value = int(expr)
    if not node.users:
        node.graph.erase_node(node)
    return int(value)


def maximum(a: Any, b: Any) -> Any:
    """The larger of two sizes."""
    return _extreme(a, b, max, torch.sym_max)


def minimum(a: Any, b: Any) -> Any:
    """The smaller of two sizes."""
    return _extreme(a, b, min, torch.sym_min)


def _extreme(a: Any, b: Any, of_numbers: Callable[..., Any], of_sizes: Callable[..., Any]) -> Any:
    symbolic = a if isinstance(a, Size) else b
    return symbolic._apply(of_sizes, a, b) if isinstance(symbolic, Size) else of_numbers(a, b)


def quotient(a: Any, b: Any) -> Any:
    """a / b cut off towards zero, as ONNX divides integers; floor division of sizes that are never negative.

    Raises:
        ValueError: the divisor is a size that may be negative.
    """
    if not isinstance(a, Size) and not isinstance(b, Size):
        whole = abs(int(a)) // abs(int(b))
        return whole if (a < 0) == (b < 0) else -whole
    if isinstance(b, Size) and not _is_never_negative(b):
        raise ValueError("it divides by a size that may be negative")
    if not isinstance(b, Size) and b < 0:
        return -quotient(a, -b)
    if _is_never_negative(a):
        return a // b
    return maximum(a, 0) // b - maximum(-a, 0) // b


def _is_never_negative(size: Any) -> bool:
    return statically_known_true(size.value >= 0) if isinstance(size, Size) else size >= 0


def same(a: Any, b: Any) -> bool:
    """Whether two sizes are provably one."""
    if isinstance(a, Size) and isinstance(b, Size):
        return same_size(a.value, b.value)
    return not isinstance(a, Size) and not isinstance(b, Size) and int(a) == int(b)


def provably_not(a: Any, number: int) -> bool:
    """Whether a size can never be `number`: sizes are at least 0."""
    return number < 0 if isinstance(a, Size) else int(a) != number


def sizes_of(tensor: torch.Tensor) -> np.ndarray:
    """A constant tensor of integers as an array of sizes."""
    array = np.empty(tuple(tensor.shape), object)
    flat = array.reshape(-1)
    flat[:] = [int(value) for value in tensor.flatten().tolist()]
    return flat.reshape(tuple(tensor.shape))


def is_known(array: np.ndarray) -> bool:
    """Whether each size is a number."""
    return not any(isinstance(size, Size) for size in array.reshape(-1))


def known(array: np.ndarray, dtype: torch.dtype = torch.int64) -> torch.Tensor:
    """Sizes that are all numbers, as a tensor."""
    return torch.tensor([int(size) for size in array.reshape(-1)], dtype=dtype).reshape(array.shape)


def _is(value: Any, number: int) -> bool:
    return not isinstance(value, Size) and value == number
