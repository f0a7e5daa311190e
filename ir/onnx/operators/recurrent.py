"""Recurrent layers, as torch's own where these compute the same: usual activations, no clipping, no peepholes, sequences of one length."""

from typing import Any

import torch

from ..builder import Builder, Unsupported, Value, aten
from ..registry import Call, reader

_GATES = {"LSTM": 4, "GRU": 3, "RNN": 1}
# ONNX orders gates i o f c and z r h; torch i f c o and r z h.
_ORDER = {"LSTM": (0, 2, 3, 1), "GRU": (1, 0, 2), "RNN": (0,)}
_DEFAULTS = {"LSTM": ["Sigmoid", "Tanh", "Tanh"], "GRU": ["Sigmoid", "Tanh"], "RNN": ["Tanh"]}


@reader("LSTM", "GRU", "RNN")
def recurrent(
    call: Call,
    x: Value,
    weight: Value,
    recurrence: Value,
    bias: Value = None,
    lengths: Value = None,
    hidden: Value = None,
    cell: Value = None,
    peepholes: Value = None,
) -> tuple[Value, ...]:
    """x [T, B, I] ([B, T, I] with layout 1), weights [directions, gates H, I] -> Y [T, directions, B, H], last state, last cell."""
    builder, kind = call.builder, call.op_type
    _check(call, lengths, peepholes)
    size = call.get("hidden_size") or builder.shape(recurrence)[-1]
    directions = 2 if call.get("direction", "forward") == "bidirectional" else 1
    reverse = call.get("direction", "forward") == "reverse"
    if call.get("layout", 0):
        x = builder.permute(x, [1, 0, 2])
        hidden, cell = [each if each is None else builder.permute(each, [1, 0, 2]) for each in (hidden, cell)]
    x = builder.call(aten.flip.default, x, [0]) if reverse else x
    if lengths is not None and _differs(builder, lengths, builder.shape(x)[0]):
        raise Unsupported("its sequences have different lengths")
    steps, batch = builder.shape(x)[:2]
    zeros = builder.full([directions, batch, size], 0.0, builder.dtype(x))
    hidden = zeros if hidden is None else hidden
    parameters = [part for d in range(directions) for part in _parameters(builder, kind, d, size, weight, recurrence, bias)]
    states = [hidden] if kind != "LSTM" else [hidden, zeros if cell is None else cell]
    common = (parameters, True, 1, 0.0, False, directions == 2, False)
    if kind == "LSTM":
        results = builder.call(aten.lstm.input, x, states, *common)
    elif kind == "GRU":
        results = builder.call(aten.gru.input, x, hidden, *common)
    else:
        target = aten.rnn_relu.input if _activations(call)[0] == "Relu" else aten.rnn_tanh.input
        results = builder.call(target, x, hidden, *common)
    y, *last = results
    y = builder.call(aten.flip.default, y, [0]) if reverse else y
    y = builder.permute(builder.reshape(y, [steps, batch, directions, size]), [0, 2, 1, 3])
    if call.get("layout", 0):
        y = builder.permute(y, [2, 0, 1, 3])
        last = [builder.permute(each, [1, 0, 2]) for each in last]
    return (y, *last)


def _activations(call: Call) -> list[str]:
    given = [str(each) for each in call.get("activations", [])]
    return given or _DEFAULTS[call.op_type] * 2


def _check(call: Call, lengths: Value, peepholes: Value) -> None:
    per = len(_DEFAULTS[call.op_type])
    activations = _activations(call)
    groups = {tuple(activations[at : at + per]) for at in range(0, len(activations), per)}
    known = {tuple(_DEFAULTS[call.op_type])} | ({("Relu",)} if call.op_type == "RNN" else set())
    if len(groups) != 1 or not groups <= known:
        raise Unsupported(f"its activations are {', '.join(activations)}")
    if call.get("clip") or peepholes is not None or call.get("input_forget", 0):
        raise Unsupported("it clips, has peepholes, or couples gates")
    if call.op_type == "GRU" and not call.get("linear_before_reset", 0):
        raise Unsupported("its reset gate works before the product, and torch's after it")


def _differs(builder: Builder, lengths: Value, steps: Any) -> bool:
    """Whether sequences may be shorter than the tensor."""
    return not isinstance(lengths, torch.Tensor) or any(length != steps for length in lengths.tolist())


def _parameters(builder: Builder, kind: str, direction: int, size: int, weight: Value, recurrence: Value, bias: Value) -> list[Value]:
    """w_ih, w_hh, b_ih, b_hh of a direction, in torch's order of gates."""
    gates = _GATES[kind]

    def ordered(x: Value, start: int) -> Value:
        part = builder.call(aten.select.int, x, 0, direction)
        return builder.cat([builder.narrow(part, 0, start + gate * size, size) for gate in _ORDER[kind]], 0)

    weights = [ordered(weight, 0), ordered(recurrence, 0)]
    if bias is None:
        zeros = torch.zeros(gates * size, dtype=builder.dtype(weight))
        return [*weights, zeros, zeros]
    return [*weights, ordered(bias, 0), ordered(bias, gates * size)]
