"""The kernel function of a plan, as text.

Blocks are [ROWS, COLS]; what varies along one axis alone is [ROWS, 1] or [1, COLS]. Where a row is longer than a block, each reduction
is a loop over its blocks, and what later loops need of the columns is loaded and computed again.
"""

import itertools
import keyword
import math
import re
from collections.abc import Iterable, Sequence
from typing import Any

from .addresses import RESERVED, Addresses
from .tiles import Tile
from .values import TL_TYPES, Condition, Count, Plan, Ref, Store, Value

_NEUTRAL = {"sum": "0.0", "max": 'float("-inf")', "min": 'float("inf")'}
_ACCUMULATE = {"sum": "{0} + {1}", "max": "tl.maximum({0}, {1})", "min": "tl.minimum({0}, {1})"}


class KernelBody:
    """Writes one kernel. `pointers` are the names of inputs and outputs; `addresses.arguments` lists what else it takes."""

    def __init__(self, plan: Plan, tile: Tile, addresses: Addresses, inputs: Sequence[str], outputs: Sequence[str]):
        self.plan = plan
        self.tile = tile
        self.addresses = addresses
        self.inputs = inputs
        self.outputs = outputs
        self.by_rows = plan.domain.by_rows
        self.is_wide = addresses.needs_int64([v.index for v in plan.values] + [s.index for s in plan.stores])
        self.names = self._value_names()
        addresses.arguments.taken |= {*self.names, *(f"{name}_block" for name in self.names)}

    def lines(self) -> list[str]:
        """The statements of the kernel, indented by four."""
        body = self._looped() if self.tile.looped else self._straight()
        head = self._rows_head() if self.by_rows else self._pointwise_head()
        return ["    " + line if line else "" for line in _single_blanks([*head, *body])]

    # --- positions ---

    def _pointwise_head(self) -> list[str]:
        program = "tl.program_id(0).to(tl.int64)" if self.is_wide else "tl.program_id(0)"
        lines = [f"i = {program} * BLOCK + tl.arange(0, BLOCK)", "mask = i < n"]
        return [*lines, *(f"{name} = {text}" for name, text in self.addresses.column_variables.items())]

    def _rows_head(self) -> list[str]:
        program = "tl.program_id(0).to(tl.int64)" if self.is_wide else "tl.program_id(0)"
        lines = [f"row = {program} * ROWS + tl.arange(0, ROWS)[:, None]", "in_rows = row < n_rows"]
        lines += [f"{name} = {text}" for name, text in self.addresses.row_variables.items()]
        return lines if self.tile.looped else [*lines, *self._columns_head("")]

    def _columns_head(self, start: str) -> list[str]:
        column = f"{start}tl.arange(0, COLS)[None, :]"
        column = f"({column}).to(tl.int64)" if self.is_wide else column
        lines = [f"col = {column}", "in_cols = col < n_cols", "mask = in_rows & in_cols"]
        return [*lines, *(f"{name} = {text}" for name, text in self.addresses.column_variables.items())]

    # --- order of statements ---

    def _straight(self) -> list[str]:
        lines: list[str] = []
        loads = [n for n, value in enumerate(self.plan.values) if value.kind == "load"]
        lines += ["", *(self._define(n, self.plan.values[n]) for n in loads), ""]
        rest = [n for n, value in enumerate(self.plan.values) if value.kind != "load"]
        for node, numbers in itertools.groupby(rest, key=lambda n: self.plan.values[n].node):
            statements = [self._define(n, self.plan.values[n]) for n in numbers]
            # One statement has the operation's name already.
            lines += ["", f"# {node.target}", *statements, ""] if node is not None and len(statements) > 1 else statements
        lines.append("")
        return lines + [self._store(store) for store in self.plan.stores]

    def _looped(self) -> list[str]:
        values, lines = self.plan.values, [""]
        done: set[int] = set()

        def before(stage: int) -> list[str]:
            """What does not vary along the columns and is known by now."""
            ready = [n for n, v in enumerate(values) if not v.columns and v.kind != "reduce" and v.stage <= stage and n not in done]
            done.update(ready)
            return [self._define(n, values[n]) for n in ready]

        for stage in range(self.plan.num_stages):
            lines += before(stage)
            reduces = [n for n, v in enumerate(values) if v.kind == "reduce" and v.stage == stage + 1]
            stores = [s for s in self.plan.stores if s.columns and self._stage(s) == stage]
            if not reduces and not stores:
                continue
            lines += [self._accumulator(n) for n in reduces]
            lines.append("for start in range(0, n_cols, COLS):")
            inside = self._columns_head("start + ")
            inside += [
                self._define(n, values[n]) for n in self._needed([*(values[n].operands[0] for n in reduces), *(s.ref for s in stores)])
            ]
            inside += [self._accumulate(n) for n in reduces]
            inside += [self._store(store) for store in stores]
            lines += ["    " + line for line in inside]
            lines += [f"{self.names[n]} = tl.{values[n].text}({self.names[n]}_block, 1, keep_dims=True)" for n in reduces]
            lines.append("")
        return lines + [self._store(store) for store in self.plan.stores if not store.columns]

    def _stage(self, store: Store) -> int:
        return self.plan.values[store.ref.id].stage if isinstance(store.ref, Ref) else 0

    def _needed(self, refs: Iterable[Any]) -> list[int]:
        """What varies along the columns among `refs` and their operands, in order."""
        found: set[int] = set()
        waiting = [ref.id for ref in refs if isinstance(ref, Ref)]
        while waiting:
            number = waiting.pop()
            value = self.plan.values[number]
            if number in found or not value.columns:
                continue
            found.add(number)
            waiting += [o.id for o in value.operands if isinstance(o, Ref)]
        return sorted(found)

    # --- statements ---

    def _define(self, number: int, value: Value) -> str:
        return f"{self.names[number]} = {self._expression(value)}"

    def _expression(self, value: Value) -> str:
        if value.kind == "load":
            return self._load(value)
        if value.kind == "index":
            return self.addresses.position(value.index)
        if value.kind == "inside":
            return self._conditions(value.guard)[1:-1]
        if value.kind == "reduce":
            return f"tl.{value.text}({self._masked(value)}, 1, keep_dims=True)"
        return _format(value.text, [self._operand(o) for o in value.operands])

    def _operand(self, operand: Any) -> str:
        if isinstance(operand, Ref):
            return self.names[operand.id]
        if isinstance(operand, Count):
            return self.addresses.count(operand.size)
        return number_text(operand)

    def _load(self, value: Value) -> str:
        name = self.inputs[value.input]
        address = self.addresses.address(value.index, name)
        mask = self._mask(value.rows, value.columns)
        if value.guard:
            conditions = self._conditions(value.guard)
            mask = f"{mask} & {conditions}" if mask else conditions
        pointer = f"{name}_ptr + {address}" if address != "0" else f"{name}_ptr"
        stored = self.plan.inputs[value.input].meta["val"].dtype
        cast = "" if stored == value.dtype else f".to({TL_TYPES[value.dtype]})"
        if not mask:
            return f"tl.load({pointer}){cast}"
        return f"tl.load({pointer}, mask={mask}, other={'0.0' if stored.is_floating_point else '0'}){cast}"

    def _store(self, store: Store) -> str:
        output = self.plan.outputs[store.output]
        dtype = output.meta["val"].dtype
        value = self._operand(store.ref)
        if isinstance(store.ref, Ref) and self.plan.values[store.ref.id].dtype != dtype:
            value = f"{value}.to({TL_TYPES[dtype]})"
        name = self.outputs[store.output]
        variables = store.index.variables
        mask = self._mask(
            bool(variables & {v.name for v in self.plan.domain.rows}), bool(variables & {v.name for v in self.plan.domain.columns})
        )
        address = self.addresses.address(store.index, name)
        if self.by_rows and not variables:  # one element, and a block of one to go there
            address, mask = f"{address} + row * 0", "in_rows"
        pointer = f"{name}_ptr + {address}" if address != "0" else f"{name}_ptr"
        return f"tl.store({pointer}, {value}{f', mask={mask}' if mask else ''})"

    def _mask(self, rows: bool, columns: bool) -> str:
        if not self.by_rows:
            return "mask" if columns else ""
        return {(True, True): "mask", (True, False): "in_rows", (False, True): "in_cols", (False, False): ""}[rows, columns]

    def _conditions(self, guard: Sequence[Condition]) -> str:
        parts = []
        for index, low, high in guard:
            position = self.addresses.position(index)
            parts += [f"({position} >= {self.addresses.size(low)})"] if low is not None else []
            parts += [f"({position} < {self.addresses.size(high)})"] if high is not None else []
        return " & ".join(parts)

    def _masked(self, value: Value) -> str:
        neutral = _NEUTRAL[value.text] if value.dtype.is_floating_point else "0"
        return f"tl.where(in_cols, {self._operand(value.operands[0])}, {neutral})"

    def _accumulator(self, number: int) -> str:
        value = self.plan.values[number]
        neutral = _NEUTRAL[value.text] if value.dtype.is_floating_point else "0"
        return f"{self.names[number]}_block = tl.full([ROWS, COLS], {neutral}, {TL_TYPES[value.dtype]})"

    def _accumulate(self, number: int) -> str:
        value, name = self.plan.values[number], f"{self.names[number]}_block"
        return f"{name} = {_ACCUMULATE[value.text].format(name, self._masked(value))}"

    # --- names ---

    def _value_names(self) -> list[str]:
        taken = {*RESERVED, *self.addresses.symbol_names.values(), *(v.name for v in (*self.plan.domain.rows, *self.plan.domain.columns))}
        names: list[str] = []
        for value in self.plan.values:
            hint = self.inputs[value.input] if value.kind == "load" else value.name
            if value.text.startswith("{0}.to("):
                hint = self._hint_of_cast(value, names)
            names.append(unique(hint, taken))
        return names

    def _hint_of_cast(self, value: Value, names: Sequence[str]) -> str:
        operand = value.operands[0] if value.operands else None
        return re.sub(r"_\d+$", "", names[operand.id]) if isinstance(operand, Ref) else "value"


def _single_blanks(lines: Sequence[str]) -> list[str]:
    """`lines` without blank ones that follow another."""
    return [line for before, line in zip(["", *lines], lines, strict=False) if before or line]


def unique(hint: str, taken: set[str]) -> str:
    """`hint`, or with a number where it is taken or a keyword; adds it to `taken`."""
    hint = f"{hint}_" if keyword.iskeyword(hint) else hint
    name, n = hint, 1
    while name in taken:
        n += 1
        name = f"{hint}_{n}"
    taken.add(name)
    return name


def number_text(value: Any) -> str:
    """A number as Python, and so Triton, writes it."""
    if isinstance(value, float) and not math.isfinite(value):
        return f'float("{value}")'
    return repr(value)


def _format(text: str, operands: Sequence[str]) -> str:
    """`text` with its operands; a negative number in parentheses, and no outer ones."""
    return text.format(*(f"({o})" if o.startswith("-") else o for o in operands))
