"""Values and stores of a plan as statements of a kernel."""

import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from ...ir import Node
from .addresses import RESERVED, Addresses, unique
from .values import TL_TYPES, Condition, Count, Ref, Store, Value

NEUTRAL = {"sum": "0.0", "max": 'float("-inf")', "min": 'float("inf")'}
_READ = re.compile(r"\b[A-Za-z_]\w*\b(?!=)")  # a name that is not that of a keyword argument
_ACCUMULATE = {"sum": "{0} + {1}", "max": "tl.maximum({0}, {1})", "min": "tl.minimum({0}, {1})"}


class Statements:
    """Writes `values` and stores over one domain.

    `inputs` and `outputs` are the nodes behind the pointers, by their names. `masks` says, by whether a block varies along rows and
    along columns, what is true where it lies inside; "" where it does anyway.
    """

    def __init__(
        self,
        values: Sequence[Value],
        addresses: Addresses,
        inputs: Mapping[str, Node],
        outputs: Mapping[str, Node],
        masks: Mapping[tuple[bool, bool], str],
        taken: set[str],
    ):
        self.values = values
        self.addresses = addresses
        self.inputs = list(inputs.items())
        self.outputs = list(outputs.items())
        self.masks = masks
        self.names = self._value_names(taken)
        addresses.arguments.taken |= {*self.names, *(f"{name}_block" for name in self.names)}

    def define(self, number: int) -> str:
        """`name = expression` of one value."""
        return f"{self.names[number]} = {self._expression(self.values[number])}"

    def store(self, store: Store, needs_block: bool = False) -> str:
        """Writes a value to its output; `needs_block` where it is to be a block even if it is one element."""
        domain, variables = self.addresses.domain, store.index.variables
        mask = self.masks[bool(variables & {v.name for v in domain.rows}), bool(variables & {v.name for v in domain.columns})]
        address = self.addresses.address(store.index, self.outputs[store.output][0])
        if needs_block and not variables:
            address, mask = f"{address} + {domain.names[0]} * 0", self.masks[True, False]
        return self._stored(store, address, mask)

    def store_tile(self, store: Store) -> str:
        """Writes the part of a whole tile that lies inside, also where the output has one row or one column."""
        domain, variables = self.addresses.domain, store.index.variables
        address = self.addresses.address(store.index, self.outputs[store.output][0])
        for name, axis in zip(domain.names, (domain.rows, domain.columns), strict=True):
            address = address if variables & {v.name for v in axis} else f"{address} + {name} * 0"
        return self._stored(store, address, self.masks[True, True])

    def _stored(self, store: Store, address: str, mask: str) -> str:
        name, output = self.outputs[store.output]
        dtype = output.meta["val"].dtype
        value = self.operand(store.ref)
        if isinstance(store.ref, Ref) and self.values[store.ref.id].dtype != dtype:
            value = f"{value}.to({TL_TYPES[dtype]})"
        pointer = f"{name}_ptr + {address}" if address != "0" else f"{name}_ptr"
        return f"tl.store({pointer}, {value}{f', mask={mask}' if mask else ''})"

    def operand(self, operand: Any) -> str:
        if isinstance(operand, Ref):
            return self.names[operand.id]
        if isinstance(operand, Count):
            return self.addresses.count(operand.size)
        return number_text(operand)

    def accumulator(self, number: int, block: str) -> str:
        """What a reduction in a loop starts from."""
        value = self.values[number]
        return f"{self.names[number]}_block = tl.full([{block}], {self._neutral(value)}, {TL_TYPES[value.dtype]})"

    def accumulate(self, number: int) -> str:
        """What a reduction does with each block of a loop."""
        value, name = self.values[number], f"{self.names[number]}_block"
        return f"{name} = {_ACCUMULATE[value.text].format(name, self._masked(value))}"

    def total(self, number: int) -> str:
        """What a reduction is after its loop."""
        return f"{self.names[number]} = tl.{self.values[number].text}({self.names[number]}_block, 1, keep_dims=True)"

    def ready(self, stage: int, done: set[int]) -> list[int]:
        """What does not vary along the columns, is known after `stage` reductions, and is not in `done`, which it joins."""
        values = enumerate(self.values)
        found = [n for n, v in values if not v.columns and v.kind != "reduce" and v.stage <= stage and n not in done]
        done.update(found)
        return found

    def reductions(self, stage: int) -> list[int]:
        """The reductions over what is known after `stage` others."""
        return [n for n, v in enumerate(self.values) if v.kind == "reduce" and v.stage == stage + 1]

    def needed(self, refs: Sequence[Any], along_rows: bool = False) -> list[int]:
        """What varies along the columns (or the rows) among `refs` and their operands, in order."""
        found: set[int] = set()
        waiting = [ref.id for ref in refs if isinstance(ref, Ref)]
        while waiting:
            number = waiting.pop()
            value = self.values[number]
            if number in found or not (value.rows if along_rows else value.columns):
                continue
            found.add(number)
            waiting += [o.id for o in value.operands if isinstance(o, Ref)]
        return sorted(found)

    def _expression(self, value: Value) -> str:
        if value.kind == "load":
            return self._load(value)
        if value.kind == "index":
            return self.addresses.position(value.index)
        if value.kind == "inside":
            return self._conditions(value.guard)[1:-1]
        if value.kind == "reduce":
            return f"tl.{value.text}({self._masked(value)}, 1, keep_dims=True)"
        return _format(value.text, [self.operand(o) for o in value.operands])

    def _load(self, value: Value) -> str:
        name, node = self.inputs[value.input]
        address = self.addresses.address(value.index, name)
        mask = self.masks[value.rows, value.columns]
        if value.guard:
            conditions = self._conditions(value.guard)
            mask = f"{mask} & {conditions}" if mask else conditions
        pointer = f"{name}_ptr + {address}" if address != "0" else f"{name}_ptr"
        stored = node.meta["val"].dtype
        cast = "" if stored == value.dtype else f".to({TL_TYPES[value.dtype]})"
        if not mask:
            return f"tl.load({pointer}){cast}"
        return f"tl.load({pointer}, mask={mask}, other={'0.0' if stored.is_floating_point else '0'}){cast}"

    def _conditions(self, guard: Sequence[Condition]) -> str:
        parts = []
        for index, low, high in guard:
            position = self.addresses.position(index)
            parts += [f"({position} >= {self.addresses.size(low)})"] if low is not None else []
            parts += [f"({position} < {self.addresses.size(high)})"] if high is not None else []
        return " & ".join(parts)

    def _masked(self, value: Value) -> str:
        return f"tl.where({self.masks[False, True]}, {self.operand(value.operands[0])}, {self._neutral(value)})"

    def _neutral(self, value: Value) -> str:
        return NEUTRAL[value.text] if value.dtype.is_floating_point else "0"

    def _value_names(self, taken: set[str]) -> list[str]:
        domain = self.addresses.domain
        taken |= {*RESERVED, *self.addresses.symbol_names.values(), *(v.name for v in (*domain.batch, *domain.rows, *domain.columns))}
        names: list[str] = []
        for value in self.values:
            hint = self.inputs[value.input][0] if value.kind == "load" else value.name
            if value.text.startswith("{0}.to("):
                hint = self._hint_of_cast(value, names)
            names.append(unique(hint, taken))
        return names

    def _hint_of_cast(self, value: Value, names: Sequence[str]) -> str:
        operand = value.operands[0] if value.operands else None
        return re.sub(r"_\d+$", "", names[operand.id]) if isinstance(operand, Ref) else "value"


def single_blanks(lines: Sequence[str]) -> list[str]:
    """`lines` without blank ones that follow another."""
    return [line for before, line in zip(["", *lines], lines, strict=False) if before or line]


def number_text(value: Any) -> str:
    """A number, or a string, as Python, and so Triton, writes it."""
    if isinstance(value, float) and not math.isfinite(value):
        return f'float("{value}")'
    return json.dumps(value) if isinstance(value, str) else repr(value)


def tuple_text(elements: Iterable[str]) -> str:
    """A tuple of what `elements` say."""
    texts = [*elements]
    return f"({texts[0]},)" if len(texts) == 1 else f"({', '.join(texts)})"


def without_unread(lines: Sequence[str], rest: Sequence[str]) -> list[str]:
    """Those of `lines`, each of which defines a name, whose name the others or `rest` read."""
    kept: list[str] = []
    read = set(_READ.findall("\n".join(rest)))
    for line in reversed(lines):
        name, _, text = line.partition(" = ")
        if name in read:
            kept.append(line)
            read.update(_READ.findall(text))
    return kept[::-1]


def _format(text: str, operands: Sequence[str]) -> str:
    """`text` with its operands; a negative number in parentheses, and no outer ones."""
    return text.format(*(f"({o})" if o.startswith("-") else o for o in operands))
