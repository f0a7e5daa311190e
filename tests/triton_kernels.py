"""Functions as single kernels in Triton's interpreter, for the tests of the code generator."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from graphwright import ir
from graphwright.codegen.triton import Kernel, emit, plan
from graphwright.codegen.triton.launch import Launch
from graphwright.codegen.triton.plan import is_known
from graphwright.codegen.triton.targets import DEFAULT, Target
from graphwright.codegen.triton.views import base
from graphwright.ir.printer import node_lines


class Function(nn.Module):
    """A function of tensors as a module."""

    def __init__(self, function: Callable[..., Any]):
        super().__init__()
        self.function = function

    def forward(self, *args):
        return self.function(*args)


def capture(function: Callable[..., Any], args: Sequence[torch.Tensor], dynamic_shapes: Any = None) -> ir.Program:
    return ir.capture(Function(function), tuple(args), {}, dynamic_shapes=None if dynamic_shapes is None else {"args": dynamic_shapes})


def kernel_of(program: ir.Program, target: Target = DEFAULT) -> Kernel:
    """All of a program as one kernel; NotFusible where that is not possible."""
    nodes = [node for node in program.main.calls if is_known(node)]
    outputs = list(dict.fromkeys(base(output) for output in program.main.outputs))
    return emit(plan(nodes, outputs), program.symbols, node_lines(program.main, program.symbols), target=target)


def run(kernel: Kernel, program: ir.Program, args: Sequence[torch.Tensor]) -> tuple[torch.Tensor, ...]:
    """One launch; memory is NaN before, so what the kernel never writes shows."""
    values = dict(zip(program.main.placeholders, args, strict=True))
    inputs = [values[node] for node in kernel.plan.inputs]
    was = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        return Launch(kernel)(*inputs)
    finally:
        torch.use_deterministic_algorithms(was)


def double(args: Sequence[Any]) -> list[Any]:
    return [x.double() if isinstance(x, torch.Tensor) and x.is_floating_point() else x for x in args]


# Relative to the largest element of the result. float32: a few roundings in functions of two ulps, and sums of 1000 terms. Half types:
# the one rounding of the store (2^-9 and 2^-12, and
# twice that for bfloat16 in the interpreter, which rounds to it towards zero), with as much again for casts inside.
TOLERANCE = {torch.float64: 1e-11, torch.float32: 2e-5, torch.float16: 2**-10, torch.bfloat16: 2**-7}


def assert_close(actual: torch.Tensor, exact: torch.Tensor, tolerance: float) -> None:
    assert actual.shape == exact.shape
    if not actual.dtype.is_floating_point:
        assert torch.equal(actual, exact)
        return
    actual, exact = actual.double(), exact.double()
    assert torch.equal(actual.isnan(), exact.isnan())
    finite = exact.isfinite()
    assert torch.equal(actual[~finite].nan_to_num(), exact[~finite].nan_to_num())
    if finite.any():
        error = (actual - exact)[finite].abs().max() / exact[finite].abs().max().clamp(min=1)
        assert error <= tolerance, f"error {error:.3g}, more than {tolerance:.3g}"


def check(
    function: Callable[..., Any], args: Sequence[torch.Tensor], dtype: torch.dtype | None = None, tolerance: float | None = None
) -> Kernel:
    """`function` as one kernel equals the same function in float64, with the strides that the program has."""
    program = capture(function, args)
    kernel = kernel_of(program)
    results = run(kernel, program, args)
    expected = function(*double(args))
    expected = expected if isinstance(expected, tuple) else (expected,)
    for y, exact, leaf in zip(results, expected, program.main.outputs, strict=True):
        assert y.dtype == leaf.meta["val"].dtype and y.stride() == leaf.meta["val"].stride()
        assert_close(y, exact, tolerance or TOLERANCE.get(dtype or y.dtype, 0.0))
    return kernel
