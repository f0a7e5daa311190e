"""Sequences, which exist while the model is read and not in the program: a sequence is a list of values."""

from typing import Any

import torch

from ..builder import Unsupported, Value, aten
from ..registry import Call, reader
from ..sizes import Size


def _list(value: Value) -> list[Value]:
    if not isinstance(value, list):
        raise Unsupported("the sequence is an input of the model or comes from data")
    return value


def _place(call: Call, position: Value, default: int) -> int:
    return default if position is None else call.builder.integers(position, "position")[0]


@reader("SequenceEmpty")
def empty(call: Call) -> Value:
    return []


@reader("SequenceConstruct")
def construct(call: Call, *inputs: Value) -> Value:
    return list(inputs)


@reader("SequenceInsert")
def insert(call: Call, sequence: Value, value: Value, position: Value = None) -> Value:
    values = list(_list(sequence))
    place = _place(call, position, len(values))
    values.insert(place if place >= 0 else len(values) + place, value)
    return values


@reader("SequenceErase")
def erase(call: Call, sequence: Value, position: Value = None) -> Value:
    values = list(_list(sequence))
    del values[_place(call, position, -1)]
    return values


@reader("SequenceAt")
def at(call: Call, sequence: Value, position: Value) -> Value:
    return _list(sequence)[_place(call, position, 0)]


@reader("SequenceLength")
def length(call: Call, sequence: Value) -> Value:
    return torch.tensor(len(_list(sequence)))


@reader("ConcatFromSequence")
def concat_from_sequence(call: Call, sequence: Value) -> Value:
    values, axis = _list(sequence), call.get("axis")
    if call.get("new_axis", 0):
        return call.builder.call(aten.stack.default, values, axis)
    return call.builder.cat(values, axis)


@reader("SplitToSequence")
def split_to_sequence(call: Call, x: Value, split: Value = None) -> Value:
    builder = call.builder
    axis = builder.dims([call.get("axis", 0)], builder.rank(x))[0]
    length = builder.shape(x)[axis]
    if isinstance(length, Size):
        raise Unsupported("it splits a symbolic size")
    given = torch.tensor(1) if split is None else builder.constant(split, "sizes")
    if given.dim():
        sizes = [int(size) for size in given]
    else:
        step = int(given)
        sizes = [min(step, length - start) for start in range(0, length, step)]
    parts, start = [], 0
    for size in sizes:
        part = builder.narrow(x, axis, start, size)
        if split is None and not call.get("keepdims", 1):
            part = builder.call(aten.squeeze.dims, part, [axis])
        parts.append(part)
        start += size
    return parts


# --- optionals -----------------------------------------------------------------------------------------------------------------


@reader("Optional")
def optional(call: Call, value: Value = None) -> Value:
    return value


@reader("OptionalHasElement")
def has_element(call: Call, value: Value = None) -> Value:
    return torch.tensor(value is not None)


@reader("OptionalGetElement")
def get_element(call: Call, value: Any) -> Value:
    if value is None:
        raise Unsupported("an absent value is asked for")
    return value
