"""Control flow that is decided while the model is read: branches whose condition is known, loops of known length.

What data decide has no place in a program and becomes an opaque operator.
"""

from typing import Any

import numpy as np
import torch

from ..builder import Unsupported, Value, aten
from ..registry import Call, reader
from ..sizes import Size

_MOST_ROUNDS = 64  # longer loops stay loops, in an opaque operator: unrolled they would be most of the program


@reader("If")
def if_(call: Call, condition: Value) -> Any:
    known = call.builder.constant(condition, "condition")
    branch = call.get("then_branch" if bool(known.reshape(-1)[0]) else "else_branch")
    return tuple(call.subgraph(branch, []))


@reader("Loop")
def loop(call: Call, rounds: Value = None, condition: Value = None, *carried: Value) -> Any:
    """Values that are carried from round to round, then what each round gives, stacked."""
    builder, body = call.builder, call.get("body")
    most = _MOST_ROUNDS if rounds is None else builder.integers(rounds, "number of rounds")[0]
    going = True if condition is None else bool(builder.constant(condition, "condition").reshape(-1)[0])
    scanned: list[list[Value]] = []
    values, number = list(carried), 0
    while going and number < most:
        if number == _MOST_ROUNDS:
            raise Unsupported(f"it has more than {_MOST_ROUNDS} rounds")
        again, *results = call.subgraph(body, [torch.tensor(number), torch.tensor(True), *values])
        values, given = results[: len(values)], results[len(values) :]
        scanned.append(given)
        going = bool(builder.constant(again, "condition").reshape(-1)[0])
        number += 1
    if going and rounds is None:
        raise Unsupported(f"it has more than {_MOST_ROUNDS} rounds")
    outputs = len(call.outputs) - len(values)
    if not scanned and outputs:
        raise Unsupported("it has no rounds, and the type of what each would give is unknown")
    return (*values, *(_stacked(call, [given[place] for given in scanned], 0) for place in range(outputs)))


def _stacked(call: Call, parts: list[Value], axis: int) -> Value:
    if any(isinstance(part, list) for part in parts):
        raise Unsupported("rounds give sequences")
    return call.builder.call(aten.stack.default, [_tensor(call, part) for part in parts], axis)


def _tensor(call: Call, value: Value) -> Value:
    return call.builder.node(value) if isinstance(value, np.ndarray) else value


@reader("Scan")
def scan(call: Call, *inputs: Value) -> Any:
    builder, body, count = call.builder, call.get("body"), call.get("num_scan_inputs")
    states, sequences = list(inputs[: len(inputs) - count]), inputs[len(inputs) - count :]
    axes = _axes(call, "scan_input_axes", sequences)
    length = builder.shape(sequences[0])[axes[0]]
    if isinstance(length, Size) or length > _MOST_ROUNDS:
        raise Unsupported(f"it has more than {_MOST_ROUNDS} rounds, or a symbolic number of them")
    backwards = call.get("scan_input_directions", [0] * count)
    rounds: list[list[Value]] = []
    for step in range(length):
        parts = [
            builder.call(aten.select.int, sequence, axis, length - 1 - step if back else step)
            for sequence, axis, back in zip(sequences, axes, backwards, strict=True)
        ]
        results = call.subgraph(body, [*states, *parts])
        states = results[: len(states)]
        rounds.append(results[len(states) :])
    outputs = len(call.outputs) - len(states)
    if not rounds and outputs:
        raise Unsupported("it has no rounds, and the type of what each would give is unknown")
    directions = call.get("scan_output_directions", [0] * outputs)
    places = call.get("scan_output_axes", [0] * outputs)
    scanned = []
    for index in range(outputs):
        parts = [given[index] for given in rounds]
        axis = places[index] % (builder.rank(parts[0]) + 1)
        scanned.append(_stacked(call, parts[::-1] if directions[index] else parts, axis))
    return (*states, *scanned)


def _axes(call: Call, name: str, values: Any) -> list[int]:
    given = call.get(name, [0] * len(values))
    return [call.builder.dims([axis], call.builder.rank(value))[0] for axis, value in zip(given, values, strict=True)]
