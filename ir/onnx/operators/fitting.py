"""Of which symbolic sizes a reshape is possible, where it is not of all: what its error says to do."""

from collections.abc import Sequence
from typing import Any

import sympy
import torch

from ...errors import CaptureError
from ..builder import Builder, Unsupported, Value
from ..sizes import Size

_MOST_TRIED = 512


def misfit(builder: Builder, x: Value, sizes: Sequence[Any]) -> CaptureError | Unsupported | None:
    """Why x has no view of these sizes, with what would give it one; None where that hangs on no symbol. Where it hangs on one symbol
    alone the error is the user's: in onnxruntime, too, it would run at those sizes only, and all behind it have none that are known."""
    have, want = (sympy.Mul(*map(_expression, side)) for side in (builder.shape(x), sizes))
    difference = sympy.factor(have - want)
    names = {builder.symbols.size(symbol.name).node.expr: symbol.name for symbol in builder.symbols}
    behind = sorted(names[symbol] for symbol in difference.free_symbols if symbol in names)
    if not behind or -1 in map(_expression, sizes):
        return None
    common = set(sympy.Mul.make_args(sympy.factor(have)))  # factors that are 0 for tensors of no elements alone
    for factor in sympy.Mul.make_args(difference):  # it is 0 where one of them is
        fitting = [] if factor in common else _zeros(factor)
        if fitting:
            name = names[next(iter(factor.free_symbols))]
            value = fitting[0] if len(fitting) == 1 else ".."
            fits = f"fits only where {name} is {_ranges(fitting)}: give that a value, sizes={{{name!r}: {value}}}"
            return CaptureError(f"the shape at {builder.where.module} {fits}")
    return Unsupported(f"whether its shape fits depends on the size {', '.join(behind)}: give that a value, sizes={{{behind[0]!r}: ..}}")


def _expression(size: Any) -> sympy.Basic:
    value = size.value if isinstance(size, Size) else size
    return value.node.expr if isinstance(value, torch.SymInt) else sympy.Integer(int(value))


def _zeros(factor: sympy.Basic) -> list[int]:
    """Of the first few hundred values of the one symbol of `factor` those at which it is 0."""
    if len(factor.free_symbols) != 1:
        return []
    (symbol,) = factor.free_symbols
    return [value for value in range(1, _MOST_TRIED + 1) if factor.xreplace({symbol: sympy.Integer(value)}) == 0]


def _ranges(values: list[int]) -> str:
    """1, 2, 3, 7 as `1 to 3, 7`."""
    runs: list[list[int]] = []
    for value in values:
        if runs and value == runs[-1][-1] + 1:
            runs[-1].append(value)
        else:
            runs.append([value])
    shown = [f"{run[0]} to {run[-1]}" if len(run) > 1 else str(run[0]) for run in runs[:3]]
    return ", ".join([*shown, ".."] if len(runs) > 3 else shown)
