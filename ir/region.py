"""The region op `gw.sliced`: a functional sub-graph run over slices of its operands.

Tensor t *carries* an axis of N units along dim d when size(t, d) = N*m; unit u is the index range [u*m, (u+1)*m). Slice k of
n is the units [k*N//n, (k+1)*N//n): exactly n slices whose lengths differ by at most one.
Source: "Fast and Memory-Efficient Video Diffusion Using Streamlined Inference" (arXiv 2411.01171), operator grouping.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import fx
from torch._C import DispatchKey
from torch._ops import HigherOrderOperator
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import statically_known_true

from .symbols import ceil_div, hint


class Region:
    """A sub-graph that is an operand: placeholders in order, one output tuple, nothing captured from outside.

    Immutable once it is an operand of a node: to change a region, outline a new one.
    """

    def __init__(self, graph: fx.Graph):
        self.graph = graph

    @property
    def placeholders(self) -> list[fx.Node]:
        """The inputs of one run of the body: slices of operands, or whole operands."""
        return [node for node in self.graph.nodes if node.op == "placeholder"]

    @property
    def outputs(self) -> tuple[fx.Node, ...]:
        """The calls whose values one run of the body gives."""
        return tuple(self.graph.output_node().args[0])

    def __call__(self, *operands: Any) -> list[Any]:
        """Runs the body once, as written."""
        values: dict[fx.Node, Any] = dict(zip(self.placeholders, operands, strict=True))
        for node in self.graph.nodes:
            if node.op == "call_function":
                args, kwargs = fx.map_arg((node.args, node.kwargs), values.__getitem__)
                values[node] = node.target(*args, **kwargs)
        return [values[node] for node in self.outputs]


def slice_bounds(units: int, count: int) -> list[tuple[int, int]]:
    """The unit ranges of `count` slices of an axis of `units` units: [k*units//count, (k+1)*units//count).

    An axis without units has one empty slice.
    """
    count = max(1, count)
    return [(k * units // count, (k + 1) * units // count) for k in range(count)]


def slice_count(count: Any, units: Any) -> Any:
    """The number of slices: `count`, or N where that is less."""
    return count if statically_known_true(count <= units) else torch.sym_min(count, units)


def units_of(in_dims: Sequence[int], operands: Sequence[torch.Tensor], units: int | None) -> int:
    """N: as declared, else the common size of the sliced dims."""
    if units is not None:
        return units
    return next(operand.size(dim) for operand, dim in zip(operands, in_dims, strict=True) if dim >= 0)


class Sliced(HigherOrderOperator):
    """gw.sliced(body, in_dims, out_dims, count, *operands, units=None, orders=None) -> list of tensors.

    For k in 0..n-1 with n = min(count, N) the body runs on every operand i narrowed to slice k along in_dims[i] (-1: passed
    whole), and output j is the concatenation of the n results along out_dims[j]. Output j is dense; its dims lie in memory in
    the order `orders[j]` (outermost first), or as those of a slice's result do.
    """

    def __init__(self) -> None:
        super().__init__("sliced")

    def __call__(self, body, in_dims, out_dims, count, *operands, units=None, orders=None):  # type: ignore[override]
        return super().__call__(body, in_dims, out_dims, count, *operands, units=units, orders=orders)


sliced = Sliced()
for _key in (DispatchKey.Autograd, DispatchKey.AutogradCPU, DispatchKey.AutogradCUDA, DispatchKey.ADInplaceOrView):
    sliced.fallthrough(_key)


def narrow(operand: Any, dim: int, begin: Any, end: Any, units: Any) -> Any:
    """Units [begin, end) of an operand that is sliced along `dim`; all of it for dim -1."""
    if dim < 0 or (isinstance(units, int) and units == 0):
        return operand
    per_unit = operand.size(dim) // units
    return operand.narrow(dim, begin * per_unit, (end - begin) * per_unit)


def whole_size(part: torch.Tensor, dim: int, length: Any, units: Any, count: Any) -> list[Any]:
    """The size of an output from that of one of its parts, made by a slice of `length` units.

    A part of size 1 along `dim` is a partial result of its slice (statistics): there are `count` of them. Where the axis
    itself has size 1 in a part, length is 1 and count equals units, so both readings agree.
    """
    size = list(part.shape)
    size[dim] = count if isinstance(size[dim], int) and size[dim] == 1 else units * (size[dim] // length)
    return size


def empty_whole(part: torch.Tensor, size: list[Any], order: Sequence[int] | None = None) -> torch.Tensor:
    """A dense tensor of `size` whose dims lie in memory in `order`, outermost first, or as those of `part` do."""
    return part.new_empty_strided(size, dense_stride(size, memory_order(part) if order is None else order))


def dense_stride(size: Sequence[Any], order: Sequence[int]) -> list[Any]:
    """The strides of a dense tensor whose dims lie in memory in `order`, outermost first; a dim of size 0 counts as 1, as in torch."""
    stride, step = [0] * len(size), 1
    for dim in reversed(order):
        stride[dim] = step
        step = step * (max(size[dim], 1) if isinstance(size[dim], int) else size[dim])
    return stride


def memory_order(tensor: torch.Tensor) -> list[int]:
    """The dims of `tensor`, outermost in memory first; of those with one step between elements one of size 1 is the innermost, as channels
    are where they lie last."""
    return sorted(range(tensor.dim()), key=lambda d: (-hint(tensor.stride(d)), hint(tensor.size(d)) == 1, d))


@sliced.py_impl(DispatchKey.CompositeExplicitAutograd)
def sliced_reference(body, in_dims, out_dims, count, *operands, units=None, orders=None):
    """The meaning of `gw.sliced`, and its oracle: run every slice, concatenate."""
    total = units_of(in_dims, operands, units)
    parts = []
    for begin, end in slice_bounds(total, min(count, total)):
        parts.append(body(*[narrow(x, d, begin, end, total) for x, d in zip(operands, in_dims, strict=True)]))
    outputs = []
    for j, dim in enumerate(out_dims):
        joined = torch.cat([part[j] for part in parts], dim)
        # As its type says, which was inferred: kernels lay out a part with a dim of size 1 in other ways.
        order = orders[j] if orders else memory_order(body.outputs[j].meta.get("val", parts[0][j]))
        whole = empty_whole(parts[0][j], list(joined.shape), order)
        outputs.append(joined if joined.stride() == whole.stride() else whole.copy_(joined))
    return outputs


@sliced.py_impl(FakeTensorMode)
def _sliced_metadata(mode, body, in_dims, out_dims, count, *operands, units=None, orders=None):
    with mode:
        total = units_of(in_dims, operands, units)
        # A count above N leaves slices of one unit, as N does.
        length = 1 if statically_known_true(count == total) else ceil_div(total, count)
        parts = body(*[narrow(x, d, 0, length, total) for x, d in zip(operands, in_dims, strict=True)])
        return [
            empty_whole(part, whole_size(part, dim, length, total, slice_count(count, total)), orders[j] if orders else None)
            for j, (part, dim) in enumerate(zip(parts, out_dims, strict=True))
        ]
