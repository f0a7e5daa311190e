"""Dynamic sizes by name: each symbol has a range and a hint, and lives in the ShapeEnv of one FakeTensorMode.

torch names a symbol after a hash of its source; users see the names they gave (`batch`) or `s0, s1, ...` in order of
appearance, so equal programs print equal bytes.
"""

import functools
import math
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import sympy
import torch
from torch._dispatch.python import enable_python_dispatcher
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, free_unbacked_symbols
from torch.utils._sympy.functions import FloorDiv, Max, Min, Mod, PythonMod
from torch.utils._sympy.value_ranges import ValueRanges

from .torch_log import silenced

UNBOUNDED = 2**63 - 1
MAX_EXPONENT = 64
MAX_TERMS = 1024  # of a size, and of the number of elements of a tensor


@dataclass(frozen=True)
class Symbol:
    """A size known only at call time: `low <= size <= high`; `hint` is the size at capture."""

    name: str
    low: int
    high: int
    hint: int


class _Sizes(ShapeEnv):
    """Answers questions about sizes by their hints wherever they are asked, and narrows no symbol to the answer.

    But sizes of different symbols are different, also where their hints are one: what needs them equal does not type-check.
    """

    def __init__(self, **options: Any):
        super().__init__(**options)
        self.free: set[sympy.Symbol] = set()  # those that may have more than one value

    def evaluate_expr(self, orig_expr: sympy.Basic, *args: Any, **kwargs: Any) -> Any:
        if isinstance(orig_expr, sympy.Eq | sympy.Ne) and self._are_independent(*orig_expr.args):
            return sympy.false if isinstance(orig_expr, sympy.Eq) else sympy.true
        with self.suppress_guards():
            return super().evaluate_expr(orig_expr, *args, **kwargs)

    def _are_independent(self, a: sympy.Basic, b: sympy.Basic) -> bool:
        """Whether each is a polynomial of symbols that the other does not have."""
        left, right = a.free_symbols, b.free_symbols
        if not left or not right or left & right or not left | right <= self.free:
            return False
        return bool(a.is_polynomial() and b.is_polynomial())


class SymbolTable:
    """The symbols of one program and the mode in which all its metadata lives."""

    def __init__(self) -> None:
        # duck_shape would merge two symbols with one hint; specialize_zero_one would turn a hint of 1 into a constant.
        self.env = _Sizes(duck_shape=False, specialize_zero_one=False)
        # Of an operator without a type of its own torch would run the kernel on zeros of that size: gigabytes, and some kernels crash.
        self.mode = FakeTensorMode(shape_env=self.env, allow_non_fake_inputs=False, allow_fallback_kernels=False)
        self.inferred: dict[Any, Any] = {}  # the types that calls were found to give, by what they follow from (ir/infer.py)
        self._symbols: dict[str, Symbol] = {}
        self._sizes: dict[str, torch.SymInt] = {}
        self._names: dict[sympy.Symbol, str] = {}
        self._expressions: dict[sympy.Basic, torch.SymInt] = {}

    def __iter__(self) -> Iterator[Symbol]:
        return iter(self._symbols.values())

    def __len__(self) -> int:
        return len(self._symbols)

    def __contains__(self, name: str) -> bool:
        return name in self._symbols

    def declare(self, symbol: Symbol) -> torch.SymInt:
        """Adds `symbol` and returns it as a size."""
        from torch._dynamo.source import ConstantSource  # loads all of dynamo, a second, which programs without symbols never need

        self.mode.cache_enabled = False  # torch's, of calls: with symbols an entry costs more than the calls that find it save
        source = ConstantSource(f"graphwright_{symbol.name}")
        positive = True if symbol.low > 0 else None
        expr = self.env.create_symbol(
            symbol.hint, source, dynamic_dim=DimDynamic.DYNAMIC, positive=positive, do_not_specialize_zero_one=True
        )
        self.env.var_to_range[expr] = ValueRanges(max(symbol.low, 0), symbol.high if symbol.high < UNBOUNDED else sympy.oo)
        if symbol.low < symbol.high:
            self.env.free.add(expr)
        size: Any = self.env.create_symintnode(expr, hint=symbol.hint)
        self._symbols[symbol.name], self._sizes[symbol.name], self._names[expr] = symbol, size, symbol.name
        return size

    def size(self, name: str) -> torch.SymInt:
        """The symbol `name` as a size. Raises KeyError for an unknown name."""
        return self._sizes[name]

    def symbol(self, name: str) -> Symbol:
        """The declaration of `name`. Raises KeyError for an unknown name."""
        return self._symbols[name]

    def declared(self, symbols: Iterable[sympy.Symbol]) -> frozenset[tuple[sympy.Symbol, Symbol]] | None:
        """The declarations of `symbols` of expressions; None where one is not declared, as a size that depends on data."""
        names = {each: self._names.get(each) for each in symbols}
        known = {(each, self._symbols[name]) for each, name in names.items() if name is not None}
        return frozenset(known) if len(known) == len(names) else None

    def sized(self, size: "int | sympy.Basic") -> Any:
        """An expression of this program's symbols as a size; numbers are sizes already."""
        if isinstance(size, int):
            return size
        if size not in self._expressions:
            made: Any = self.env.create_symintnode(size, hint=None)
            self._expressions[size] = made
        return self._expressions[size]

    def highest(self, size: "int | torch.SymInt") -> int:
        """The most that a size can be that is a number or a symbol; UNBOUNDED for others, which are computed of several."""
        if not isinstance(size, torch.SymInt):
            return size
        name = self.text(size)
        return self._symbols[name].high if name in self._symbols else UNBOUNDED

    def text(self, size: "int | torch.SymInt | torch.SymFloat | torch.SymBool") -> str:
        """The size as an expression over symbol names with `+ - * // %`."""
        if not isinstance(size, torch.SymInt | torch.SymFloat | torch.SymBool):
            return str(size)
        return _expression_text(self.env.simplify(size.node.expr), self._names)

    def expression(self, expr: sympy.Basic, renamed: dict[str, str] | None = None) -> str:
        """A sympy expression of sizes over symbol names, some of them `renamed`."""
        renamed = renamed or {}
        return _expression_text(expr, {symbol: renamed.get(name, name) for symbol, name in self._names.items()})

    def stride_text(self, step: "int | torch.SymInt") -> str:
        """The stride as an expression, Max(1, n) written n."""
        if not isinstance(step, torch.SymInt):
            return str(step)
        return _expression_text(without_clamps(self.env.simplify(step.node.expr)), self._names)

    def named(self, text: str) -> str:
        """`text` in which sizes stand as torch writes them, with the names that users gave."""
        names = {str(symbol): name for symbol, name in self._names.items()}
        return re.sub(r"\bs\d+\b", lambda match: names.get(match[0], match[0]), text)

    @contextmanager
    def inference(self) -> Iterator[None]:
        """Within it, calls compute metadata only; questions about sizes are answered by hints and leave no guard."""
        # Without it some composites run C++ code that takes a symbol for its hint: a padded [n, 16] would be typed [34, 16].
        python_code = enable_python_dispatcher() if self._symbols else nullcontext()
        with silenced(), self.mode, torch.no_grad(), self.env.suppress_guards(), self.env.ignore_fresh_unbacked_symbols(), python_code:
            yield


def hint(size: Any) -> int:
    """A size as a number: itself, or the size at capture of a symbolic one (1 where only the data tell)."""
    return size if isinstance(size, int) else int(size.node.hint if size.node.hint is not None else 1)


def is_short_product(sizes: Iterable[Any]) -> bool:
    """Whether the product of sizes has at most MAX_TERMS terms when it is multiplied out, as torch does, before any are put together."""
    count = 1
    for size in sizes:
        count *= _terms(size.node.expr) if isinstance(size, torch.SymInt) else 1
        if count > MAX_TERMS:
            return False
    return True


def _terms(expr: sympy.Basic) -> int:
    """An upper bound, MAX_TERMS + 1 where it is more."""
    if isinstance(expr, sympy.Add):
        count = sum(map(_terms, expr.args))
    elif isinstance(expr, sympy.Mul):
        count = math.prod(map(_terms, expr.args))
    elif isinstance(expr, sympy.Pow) and expr.exp.is_Integer:
        base = _terms(expr.base)
        count = base ** min(abs(int(expr.exp)), MAX_TERMS) if base > 1 else 1
    else:
        count = 1
    return min(count, MAX_TERMS + 1)


def fits(size: "int | torch.SymInt") -> bool:
    """Whether a size is within 64 bits, so that each number of its expression is and no power is large: one that is 0 at capture may be
    any at a call."""
    numbers: list[Any] = [hint(size)]
    if isinstance(size, torch.SymInt):
        numbers += size.node.expr.atoms(sympy.Integer)
        if any(power.exp.is_Integer and power.exp > MAX_EXPONENT for power in size.node.expr.atoms(sympy.Pow)):
            return False
    return all(-(2**63) <= int(number) < 2**63 for number in numbers)


def is_tractable(size: "int | torch.SymInt") -> bool:
    """Whether questions about a size are answered in time. sympy takes twice as long with each product of symbols in a quotient or a
    remainder in which the one before lies: a second for seven of them, a minute for twenty."""
    return isinstance(size, int) or _work(size.node.expr) <= MAX_TERMS


@functools.lru_cache(maxsize=2**12)
def _work(expr: sympy.Basic) -> int:
    factor = 2 if isinstance(expr, sympy.Mul) and sum(not each.is_number for each in expr.args) > 1 else 1
    return min(factor * sum(map(_work, expr.args)), MAX_TERMS + 1) if expr.args else 1


def ceil_div(a: Any, n: Any) -> Any:
    """a / n rounded up, for sizes that are numbers or symbolic."""
    return (a + n - 1) // n


def same_size(a: Any, b: Any, *, exact: bool = False) -> bool:
    """Whether two sizes are provably one; unless `exact`, as strides, where Max(1, n) is n.

    Data-dependent sizes have no stable name and compare equal to each other.
    """
    if isinstance(a, int) and isinstance(b, int):
        return a == b
    if isinstance(a, torch.SymInt) and isinstance(b, torch.SymInt):
        if free_unbacked_symbols(a) or free_unbacked_symbols(b):
            return bool(free_unbacked_symbols(a)) == bool(free_unbacked_symbols(b))
        left, right = a.node.expr, b.node.expr
        if not exact:
            left, right = without_clamps(left), without_clamps(right)
        return left == right or sympy.expand(left - right) == 0
    return False


def without_clamps(expr: sympy.Basic) -> sympy.Basic:
    """Strides count a dim of size 0 as 1, so torch writes Max(1, s0) for s0; where that differs there is no element to address."""
    if not expr.has(Max):
        return expr
    return expr.replace(lambda e: isinstance(e, Max) and len(e.args) == 2 and 1 in e.args, lambda e: next(a for a in e.args if a != 1))


_PRECEDENCE = {"or": 0, "cmp": 1, "+": 2, "*": 3, "atom": 4}


def _expression_text(expr: sympy.Basic, names: dict[sympy.Symbol, str]) -> str:
    text, _ = _render(expr, names)
    return text


def _wrap(expr: sympy.Basic, names: dict[sympy.Symbol, str], at_least: int) -> str:
    text, level = _render(expr, names)
    return text if level >= at_least else f"({text})"


def _render(expr: sympy.Basic, names: dict[sympy.Symbol, str]) -> tuple[str, int]:
    product, atom = _PRECEDENCE["*"], _PRECEDENCE["atom"]
    if isinstance(expr, sympy.Symbol):
        return names.get(expr, str(expr)), atom
    if isinstance(expr, sympy.Integer | int):
        return str(expr), atom if int(expr) >= 0 else product
    if isinstance(expr, sympy.Add):
        terms = sorted((_wrap(term, names, product) for term in expr.args), key=lambda t: (t.lstrip("-").isdigit(), t))
        return " + ".join(terms).replace("+ -", "- "), _PRECEDENCE["+"]
    if isinstance(expr, sympy.Mul):
        number = [str(f) for f in expr.args if isinstance(f, sympy.Integer)]
        rest = sorted(_wrap(f, names, atom) for f in expr.args if not isinstance(f, sympy.Integer))
        return "*".join(number + rest), product
    if isinstance(expr, FloorDiv):
        return f"{_wrap(expr.args[0], names, atom)} // {_wrap(expr.args[1], names, atom)}", product
    if isinstance(expr, Mod | PythonMod):
        return f"{_wrap(expr.args[0], names, atom)} % {_wrap(expr.args[1], names, atom)}", product
    if isinstance(expr, sympy.Pow) and isinstance(expr.exp, sympy.Integer) and 1 < int(expr.exp) <= 8:
        return "*".join([_wrap(expr.base, names, atom)] * int(expr.exp)), product
    rendered = [_render(argument, names)[0] for argument in expr.args]
    arguments = ", ".join(sorted(rendered) if isinstance(expr, Min | Max) else rendered)
    return f"{type(expr).__name__}({arguments})", atom
