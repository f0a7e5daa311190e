"""y = x W' + b of a few rows by the kernel in C++, or by ATen where the kernel has no form for the operands.

The weight is read where it lies, in float32, bfloat16 or float16, and nothing is packed, so nothing has to follow when it is written to.
"""

import struct

import torch
from torch import Tensor

from ..library_call import LibraryCall
from .library import library

MOST_ROWS = 8  # the kernel takes more, and reads the weight from the nearest cache for each further eight
_CALL = struct.Struct("=11q")  # `Call` in native/kernel.cpp
_TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


def few_rows_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x [..., K] @ weight [N, K].T + bias [N] -> [..., N], sums in float32. A row's result depends neither on the rows beside it nor on
    the number of threads."""
    native = library() if is_fit(x, weight, bias) else None
    if native is None:
        return torch._C._nn.linear(x, weight, bias)
    width, depth = weight.shape
    y = torch.empty(*x.shape[:-1], width, dtype=x.dtype)
    rows = x.reshape(-1, depth)
    if x.dtype == torch.float16 or (x.dtype == torch.bfloat16 and not native.takes_pairs()):
        rows = rows.float()
    if rows.stride(1) != 1:
        rows = rows.contiguous()
    native.few_rows_linear(
        _CALL.pack(
            rows.data_ptr(), weight.data_ptr(), 0 if bias is None else bias.data_ptr(), y.data_ptr(), _TYPES[x.dtype],
            rows.stride(0), weight.stride(0), rows.size(0), depth, width, torch.get_num_threads(),
        )
    )  # fmt: skip
    return y


def is_fit(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Whether the operands have the types, sizes and layouts that the kernel reads."""
    if x.dtype not in _TYPES or weight.dtype != x.dtype or x.device.type != "cpu" or weight.device.type != "cpu":
        return False
    if x.dim() == 0 or weight.dim() != 2 or x.size(-1) != weight.size(1) or weight.stride(1) != 1 or x.numel() == 0:
        return False
    return bias is None or (bias.dtype == x.dtype and bias.shape == weight.shape[:1] and bias.stride(0) == 1 and bias.is_cpu)


class FewRowsLinear(LibraryCall):
    """`few_rows_linear` as an operation of a graph."""

    def __call__(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        return few_rows_linear(x, weight, bias)

    def scratch(self, x: Tensor, result: Tensor) -> int:
        """x in float32."""
        return 4 * x.numel()

    def __str__(self) -> str:
        return "a product of few rows"
