"""Scratch of a low-rank linear: rows made ready for the product, and for each thread the weights of 64 columns as it multiplies them."""

from typing import Any

from ..low_bit.formats import FORMATS
from ..program import Node
from .operands import Workspace, is_contiguous, nbytes, numel, sizes, tensor

_FLOAT = 4
_PAD = 128  # elements to which rows are filled up
_COLUMNS = 64  # of a panel of weights
_BLOCK = 256  # depth of a panel of floats, and rows that meet it before the next
_FEW_ROWS = 8  # that meet the weight where it lies


def lowrank_linear(a: dict[str, Any], node: Node, threads: int) -> Workspace:
    """Codes and scales of rows whose activations are quantized, or the rows as they meet the weight where that is not x as it lies; what
    `down` makes of them."""
    x, form = a["x"], FORMATS.get(a["act_format"])
    k, size = sizes(x)[-1], tensor(x).element_size()
    if k == 0 or a["weight_format"] == "none":
        return Workspace()
    rows, padded = numel(x) // k, -(-k // _PAD) * _PAD
    rank = sizes(a["down"])[0] if a["down"] is not None else 0
    weight_form = FORMATS[a["weight_format"]]
    is_integer = form is not None and form.element in ("int", "uint") and {form.scale, weight_form.scale} <= {"f32", "model"}
    segments = max(1, k // min(group for each in (form, weight_form) if each is not None and (group := each.group_of(k))))
    is_few = rows <= _FEW_ROWS
    if is_integer:
        of_row, of_thread = padded + 2 * _FLOAT * segments, padded * _COLUMNS
    else:
        is_direct = form is None and a["smooth"] is None and not a["act_shift"] and not a["rotate"] and not is_few
        of_row, of_thread = 0 if is_direct else padded * size, _COLUMNS * _BLOCK * (1 + _FLOAT) + min(rows, _BLOCK) * _COLUMNS * _FLOAT
    if a["rotate"] or (form is not None and not is_integer):
        of_row += 4 * k * _FLOAT  # by the reference, before the kernel
    of_thread = 0 if is_few else of_thread + (k // weight_form.group_of(k) + rank) * _COLUMNS * _FLOAT
    moving = rows * (of_row + rank * _FLOAT) + (0 if is_contiguous(x) else nbytes(x))
    return Workspace(moving, threads * max(of_thread, 2 * padded * _FLOAT))
