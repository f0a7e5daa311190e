"""Sizes of a body that are symbols of its own: in one graph torch reads a size off the first input that has it, whosever body that is."""

from collections.abc import Sequence
from typing import Any

import sympy
import torch

from ...infer import contiguous_stride, fake_like
from ...symbols import UNBOUNDED, Symbol, SymbolTable

_OF_DATA = Symbol("data", 0, UNBOUNDED, 2)  # what stands for a size that only the data tell


def of_own_sizes(symbols: SymbolTable, values: Sequence[Any]) -> list[Any]:
    """Contiguous tensors of the same types, and sizes, each symbol in them replaced by a new one of its range."""
    known: dict[sympy.Basic, sympy.Basic] = {}

    def own(size: Any) -> Any:
        if not isinstance(size, torch.SymInt):
            return size
        for symbol in size.node.expr.free_symbols:
            if symbol not in known:
                name = symbols.expression(symbol)
                known[symbol] = new_symbol(symbols, symbols.symbol(name) if name in symbols else _OF_DATA).node.expr
        return symbols.env.create_symintnode(size.node.expr.xreplace(known), hint=None)

    made: list[Any] = []
    for value in values:
        if not isinstance(value, torch.Tensor):
            made.append(own(value))
            continue
        shape = [own(size) for size in value.shape]
        made.append(fake_like(symbols, value.dtype, shape, contiguous_stride(shape), value.device))
    return made


def new_symbol(symbols: SymbolTable, like: Symbol) -> Any:
    """A size of that range under a name that no other has."""
    number = len(symbols)
    while f"{like.name}_{number}" in symbols:
        number += 1
    return symbols.declare(Symbol(f"{like.name}_{number}", like.low, like.high, like.hint))
