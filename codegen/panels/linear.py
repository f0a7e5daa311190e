"""y = x W' + b by the kernel in C++ on a copy of the weight in panels, with the operation that follows it in the same call.

Float32, two threads, AMD Zen 4, weights that come from memory, over oneDNN on packed weights: 2 rows 1.9 times as fast, 4 to 6 rows 1.4, 16
rows 1.2 to 1.3, from 64 rows on 1.0, where both reach nine tenths of what the processor can multiply. Errors are half of oneDNN's.
"""

import struct
from typing import Any

import torch
from torch import Tensor

from ..cpu_packed import PackedCall, PackedLinear, hinted_bytes, is_dense
from .library import library

_CALL = struct.Struct("=13q")  # `Call` in native/kernel.cpp
_ACTIVATIONS = {"none": 0, "silu": 1, "sigmoid": 2, "tanh": 3, "gelu": 4, "gelu_tanh": 5}
_BINARIES = {"none": 0, "add": 1, "mul": 2}


def on_panels(call: PackedLinear, dtype: torch.dtype) -> "PanelLinear | None":
    """What oneDNN's `call` does, by the kernel; None where there is none for this type of elements."""
    native = library()
    if native is None or not (dtype == torch.float32 or (dtype == torch.bfloat16 and native.takes_pairs())):
        return None
    return PanelLinear(call.transposed, call.activation, call.binary)


class PanelLinear(PackedCall):
    """activation(x W' + bias), or x W' + bias with `other` added ("add") or multiplied ("mul") in, x: [..., K] -> [..., N], all float32 or
    all bfloat16; sums are float32.

    The weight is W [N, K], or W' [K, N] where `transposed`. A row's result depends neither on the rows beside it nor on the number of
    threads.
    """

    kind = "linear"

    def __init__(self, transposed: bool, activation: str = "none", binary: str = "none"):
        assert activation == "none" or binary == "none", "one of the two follows"
        self.transposed, self.activation, self.binary = transposed, activation, binary
        self._follows = (_ACTIVATIONS[activation], _BINARIES[binary])

    def layout(self) -> tuple[Any, ...]:
        return "panels", self.transposed

    def lay_out(self, weight: Tensor) -> Tensor:
        native = library()
        return panels(weight.t() if self.transposed else weight, native.panel_width(), native.panel_step())

    def __call__(self, x: Tensor, weight: Tensor, bias: Tensor | None = None, other: Tensor | None = None) -> Tensor:
        packed = self.pack(weight)
        depth, width = x.size(-1), weight.size(1 if self.transposed else 0)
        y = torch.empty(*x.shape[:-1], width, dtype=x.dtype)
        if y.numel() == 0:
            return y
        assert depth > 0, "a product over nothing has no panels"
        rows = x.reshape(-1, depth)
        is_bfloat16 = x.dtype == torch.bfloat16
        if is_bfloat16 and depth % 2:
            rows = torch.nn.functional.pad(rows, (0, 1))
        elif rows.stride(1) != 1:
            rows = rows.contiguous()
        bias, other = None if bias is None else bias.contiguous(), None if other is None else other.contiguous()
        library().panel_linear(
            _CALL.pack(
                rows.data_ptr(), rows.stride(0) * rows.element_size(), packed.data_ptr(), 0 if bias is None else bias.data_ptr(),
                0 if other is None else other.data_ptr(), y.data_ptr(), is_bfloat16, rows.size(0),
                -(-depth // 2) if is_bfloat16 else depth, width, *self._follows, torch.get_num_threads(),
            )
        )  # fmt: skip
        return y

    def scratch(self, x: Tensor, result: Tensor) -> int:
        return 0 if is_dense(x) else hinted_bytes(x)

    def with_activation(self, activation: str) -> "PanelLinear":
        return PanelLinear(self.transposed, activation)

    def with_operand(self, binary: str) -> "PanelLinear":
        return PanelLinear(self.transposed, binary=binary)

    def alone(self, channels_last: bool) -> "PanelLinear":
        return PanelLinear(self.transposed)

    def __str__(self) -> str:
        follows = next((f" with {name}" for name in (self.activation, self.binary) if name != "none"), "")
        return f"linear on panels{follows}"


def panels(weight: Tensor, width: int, step: int) -> Tensor:
    """The matrix [N, K] as panels of `width` rows, the last one's number rounded up to a multiple of `step`: in each a word of every row,
    then the next word of every row. A word is a float32, or two bfloat16. 0 stands for what is beyond the matrix."""
    per_word = 4 // weight.element_size()
    count, depth = weight.shape
    words = -(-depth // per_word)
    if depth % per_word:
        weight = torch.nn.functional.pad(weight, (0, words * per_word - depth))
    full, last = count // width * width, -(-(count % width) // step) * step
    result = weight.new_zeros((full + last) * words * per_word)
    split = full * words * per_word
    for rows, height, part in ((weight[:full], width, result[:split]), (weight[full:], last, result[split:])):
        if len(rows) > 0:
            there = min(height, len(rows))
            part.view(-1, words, height, per_word).transpose(1, 2)[:, :there] = rows.reshape(-1, there, words, per_word)
    return result
