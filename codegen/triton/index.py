"""Integer arithmetic of positions: sums of multiples of variables, of quotients and of remainders, simplified as they are built.

Sizes are numbers, or sympy expressions over a program's symbols; both take `+ - * ==`. A view of a tensor is a change of index, so
that no view is ever materialised: `(16 a + b) // 16` is `a` where `b < 16`.
"""

from dataclasses import dataclass
from typing import Any

import sympy
import torch

from ...ir.symbols import without_clamps

Size = Any  # int, or sympy.Expr over the program's symbols


def size_of(value: Any) -> Size:
    """A size or stride of metadata as a number or a sympy expression."""
    if isinstance(value, torch.SymInt):
        expr = sympy.expand(without_clamps(value.node.expr))
        return int(expr) if expr.is_Integer else expr
    return int(value)


def product(sizes: Any) -> Size:
    result: Size = 1
    for size in sizes:
        result = result * size
    return result if isinstance(result, int) else sympy.expand(result)


@dataclass(frozen=True)
class Var:
    """A position along one dim of the domain: `0 <= name < size`."""

    name: str
    size: Size


@dataclass(frozen=True)
class Quotient:
    index: "Index"
    divisor: Size


@dataclass(frozen=True)
class Remainder:
    index: "Index"
    divisor: Size


Atom = Var | Quotient | Remainder


@dataclass(frozen=True)
class Index:
    """`constant + sum(coefficient * atom)`, atoms in the order in which they came."""

    terms: tuple[tuple[Atom, Size], ...] = ()
    constant: Size = 0

    @staticmethod
    def of(var: Var) -> "Index":
        return Index(((var, 1),)) if var.size != 1 else Index()

    def __add__(self, other: "Index | Size") -> "Index":
        if not isinstance(other, Index):
            return Index(self.terms, self.constant + other)
        coefficients = dict(self.terms)
        for atom, coefficient in other.terms:
            coefficients[atom] = coefficients.get(atom, 0) + coefficient
        constant = self.constant + other.constant + _join(coefficients)
        return Index(tuple((a, c) for a, c in coefficients.items() if c != 0), constant)

    def __mul__(self, factor: Size) -> "Index":
        if factor == 0:
            return Index()
        return Index(tuple((atom, _expand(c * factor)) for atom, c in self.terms), _expand(self.constant * factor))

    def divided(self, divisor: Size) -> "tuple[Index, Index]":
        """(self // divisor, self % divisor)."""
        if divisor == 1:
            return self, Index()
        whole = Index(tuple((a, _ratio(c, divisor)) for a, c in self.terms if divides(divisor, c)))
        rest = Index(tuple((a, c) for a, c in self.terms if not divides(divisor, c)), self.constant)
        if divides(divisor, self.constant):
            whole, rest = whole + _ratio(self.constant, divisor), Index(rest.terms)
        if rest.within(divisor):
            return whole, rest
        if len(rest.terms) == 1 and rest.constant == 0 and rest.terms[0][1] == 1 and isinstance(inner := rest.terms[0][0], Quotient):
            quotient = Quotient(inner.index, inner.divisor * divisor)
        else:
            quotient = Quotient(rest, divisor)
        return whole + Index(((quotient, 1),)), Index(((Remainder(rest, divisor), 1),))

    def within(self, bound: Size) -> bool:
        """Whether 0 <= self < bound, provably."""
        low, high = self.constant, self.constant
        for atom, coefficient in self.terms:
            top = _highest(atom)
            if top is None or not _is_nonnegative(coefficient):
                return False
            high = high + coefficient * top
        return _is_nonnegative(low) and _is_nonnegative(_expand(bound - 1 - high))

    @property
    def variables(self) -> frozenset[str]:
        """Names of the domain's variables that it depends on."""
        found: set[str] = set()
        for atom, _ in self.terms:
            found |= {atom.name} if isinstance(atom, Var) else atom.index.variables
        return frozenset(found)


def linear(indices: Any, sizes: Any) -> Index:
    """The row-major position of `indices` in a tensor of `sizes`."""
    result = Index()
    for index, size in zip(indices, sizes, strict=True):
        result = result * size + index
    return result


def _join(coefficients: dict[Atom, Size]) -> Size:
    """Replaces `d * (x // d) + x % d` by the terms of `x`; returns what its constant adds."""
    constant: Size = 0
    for atom in [a for a in coefficients if isinstance(a, Remainder)]:
        quotient = Quotient(atom.index, atom.divisor)
        if quotient in coefficients and coefficients[quotient] == _expand(coefficients[atom] * atom.divisor):
            factor = coefficients.pop(atom)
            del coefficients[quotient]
            for inner, coefficient in atom.index.terms:
                coefficients[inner] = coefficients.get(inner, 0) + coefficient * factor
            constant = constant + atom.index.constant * factor
    return constant


def _expand(size: Size) -> Size:
    if isinstance(size, int):
        return size
    expr = sympy.expand(size)
    return int(expr) if expr.is_Integer else expr


def divides(divisor: Size, size: Size) -> bool:
    """Whether `size` is a multiple of `divisor`, provably."""
    if divisor == 0:  # of a tensor without elements
        return False
    if isinstance(divisor, int) and isinstance(size, int):
        return size % divisor == 0
    ratio = sympy.cancel(sympy.sympify(size) / divisor)
    return bool(ratio.is_polynomial()) and all(c.is_Integer for c in ratio.as_coefficients_dict().values())


def _ratio(size: Size, divisor: Size) -> Size:
    if isinstance(divisor, int) and isinstance(size, int):
        return size // divisor
    return _expand(sympy.cancel(sympy.sympify(size) / divisor))


def _is_nonnegative(size: Size) -> bool:
    return size >= 0 if isinstance(size, int) else bool(sympy.sympify(size).is_nonnegative)


def _highest(atom: Atom) -> Size | None:
    if isinstance(atom, Var):
        return atom.size - 1
    if isinstance(atom, Remainder):
        return atom.divisor - 1
    high: Size = atom.index.constant
    for inner, coefficient in atom.index.terms:
        top = _highest(inner)
        if top is None or not (isinstance(coefficient, int) and isinstance(top, int) and coefficient >= 0):
            return None
        high = high + coefficient * top
    return high // atom.divisor if isinstance(high, int) and isinstance(atom.divisor, int) else None
