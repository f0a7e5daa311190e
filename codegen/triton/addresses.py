"""Positions as Triton text: which variables a kernel needs, which sizes and strides are its arguments.

A run of neighbouring dims that a tensor steps through evenly is one variable, so a contiguous tensor has one. Strides other than 1
are arguments. Sizes that divide positions are compile-time constants where the program knows them (a division by a constant is a
multiplication) and arguments where it does not.
"""

import keyword
from dataclasses import dataclass, field
from typing import Any

import sympy

from ...ir.symbols import UNBOUNDED, SymbolTable
from .index import Index, Quotient, Remainder, Size, Var, product
from .values import Domain

_NARROW = 2**31

# Names that generated files give a meaning of their own; a symbol or an input of that name gets another.
RESERVED = frozenset(
    """n i row col mask n_rows n_cols in_rows in_cols start tl triton torch os aten run reference check laid_out example_inputs device
    ROWS COLS BLOCK NUM_WARPS TOLERANCE error_of norm_stats norm_apply tanh sigmoid low_bit_product M N K R
    m k r tiles part""".split()
)


def unique(hint: str, taken: set[str]) -> str:
    """`hint`, or with a number where it is taken or a keyword; adds it to `taken`."""
    hint = f"{hint}_" if keyword.iskeyword(hint) else hint
    name, n = hint, 1
    while name in taken:
        n += 1
        name = f"{hint}_{n}"
    taken.add(name)
    return name


@dataclass
class Arguments:
    """The arguments of a kernel beside its pointers: name -> size; those in `constants` are known when it is compiled."""

    sizes: dict[str, Size] = field(default_factory=dict)
    constants: set[str] = field(default_factory=set)
    taken: set[str] = field(default_factory=set)

    def add(self, name: str, size: Size, constant: bool = False) -> str:
        """`name`, or `name_2` and so on where another size, or a value, has it."""
        unique, n = name, 1
        while unique in self.taken or self.sizes.get(unique, size) != size:
            n += 1
            unique = f"{name}_{n}"
        self.sizes[unique] = size
        if constant:
            self.constants.add(unique)
        return unique


class Addresses:
    """Writes indices of one kernel; `variables` collects the definitions that they use, in order."""

    def __init__(self, domain: Domain, symbols: SymbolTable, arguments: Arguments | None = None, count_name: str = "n_cols"):
        self.domain = domain
        self.count_name = count_name  # of the argument that holds the number of columns
        self.symbols = symbols
        self.arguments = Arguments() if arguments is None else arguments
        self.symbol_names = {s.name: f"{s.name}_size" if s.name in RESERVED or keyword.iskeyword(s.name) else s.name for s in symbols}
        self.batch_variables: dict[str, str] = {}
        self.row_variables: dict[str, str] = {}
        self.column_variables: dict[str, str] = {}

    def address(self, index: Index, tensor: str) -> str:
        """The element of `tensor` at `index`, as an expression."""
        return self._text(index, tensor)

    def position(self, index: Index) -> str:
        """`index` as an expression of its own."""
        return self._text(index, None)

    def count(self, size: Size) -> str:
        """A number of elements as an expression over the kernel's arguments."""
        return self.count_name if self.domain.by_rows and size == self.domain.num_columns else self.size(size)

    def size(self, size: Size) -> str:
        """A size as an expression over the kernel's arguments."""
        if isinstance(size, int):
            return str(size)
        return self.symbolic(size, in_kernel=True)

    def symbolic(self, size: Size, in_kernel: bool = False) -> str:
        """A size over the symbols' names."""
        if isinstance(size, int):
            return str(size)
        if in_kernel:
            for symbol in sorted(size.free_symbols, key=str):
                self.arguments.add(self.symbol_names[self.symbols.named(str(symbol))], symbol)
        return self.symbols.expression(size, self.symbol_names).replace("*", " * ")

    def _text(self, index: Index, tensor: str | None) -> str:
        terms = []
        remaining = dict(index.terms)
        row, column = self.domain.names
        for variables, prefix, defined in (
            (self.domain.batch, "batch", self.batch_variables),
            (self.domain.rows, row, self.row_variables),
            (self.domain.columns, column if self.domain.by_rows else "i", self.column_variables),
        ):
            for run, coefficient in runs(remaining, [v for v in variables if v.size != 1]):
                name = self._variable(run, [v for v in variables if v.size != 1], prefix, defined)
                terms.append(self._term(name, coefficient, tensor))
                for variable in run:
                    del remaining[variable]
        for atom, coefficient in remaining.items():
            assert isinstance(atom, Quotient | Remainder)
            sign = "//" if isinstance(atom, Quotient) else "%"
            position = self._text(atom.index, None)
            position = position if position.isidentifier() else f"({position})"
            terms.append(self._term(f"{position} {sign} {self._factor(atom.divisor)}", coefficient, None))
        if index.constant != 0 or not terms:
            terms.append(self.size(index.constant))
        return " + ".join(terms).replace("+ -", "- ")

    def _term(self, name: str, coefficient: Size, tensor: str | None) -> str:
        if coefficient == 1:
            return name
        name = f"({name})" if " " in name else name
        if tensor is None or coefficient == -1:
            return f"-{name}" if coefficient == -1 else f"{name} * {self._factor(coefficient)}"
        return f"{name} * {self.arguments.add(f'{tensor}_{name}' if name.isidentifier() else f'{tensor}_step', coefficient)}"

    def _factor(self, size: Size) -> str:
        text = self.size(size)
        return text if text.isidentifier() or text.isdigit() else f"({text})"

    def _variable(self, run: list[Var], variables: list[Var], prefix: str, defined: dict[str, str]) -> str:
        """The name of the variable that counts the positions of `run`, defined from the count of all `variables`."""
        first, last = variables.index(run[0]), variables.index(run[-1])
        if (first, last) == (0, len(variables) - 1):
            return prefix
        name = "_".join(v.name for v in run)
        if name not in defined:
            after = product(v.size for v in variables[last + 1 :])
            text = prefix if after == 1 else f"{prefix} // {self._constant(variables[last + 1 :])}"
            if first > 0:
                text = f"{text} % {self._constant(run)}"
            defined[name] = text
        return name

    def _constant(self, run: list[Var]) -> str:
        size = product(v.size for v in run)
        return self.arguments.add("size_" + "_".join(v.name for v in run), size, constant=isinstance(size, int))

    def needs_int64(self, indices: Any) -> bool:
        """Whether a position of the domain, or one of these addresses, may lie beyond 2^31 elements."""
        domain = self.domain
        return any(self._reach(size) >= _NARROW for size in (domain.num_rows, domain.num_columns)) or any(
            self._highest(index) >= _NARROW for index in indices
        )

    def _highest(self, index: Index) -> float:
        high = abs(self._reach(index.constant))
        for atom, coefficient in index.terms:
            if isinstance(atom, Quotient):
                size: float = self._highest(atom.index)
            else:
                size = self._reach(atom.size if isinstance(atom, Var) else atom.divisor)
            high += size * abs(self._reach(coefficient))
        return high

    def _reach(self, size: Size) -> float:
        """The largest value of a size."""
        if isinstance(size, int):
            return size
        highs = {}
        for symbol in size.free_symbols:
            name = self.symbols.named(str(symbol))
            high = self.symbols.symbol(name).high if name in self.symbols else UNBOUNDED
            if high >= UNBOUNDED:
                return float("inf")
            highs[symbol] = high
        return float(size.xreplace({symbol: sympy.Integer(high) for symbol, high in highs.items()}))


def runs(terms: dict[Any, Size], variables: list[Var]) -> list[tuple[list[Var], Size]]:
    """(neighbouring variables, step of the last) wherever the steps of all in the run are those of one count."""
    found: list[tuple[list[Var], Size]] = []
    for variable in variables:
        if variable not in terms:
            continue
        step = terms[variable]
        if found:
            run, before = found[-1]
            is_next = variables.index(run[-1]) + 1 == variables.index(variable)
            if is_next and before == product([step, variable.size]):
                found[-1] = ([*run, variable], step)
                continue
        found.append(([variable], step))
    return found
