"""What a kernel must move and compute, and the time that a machine needs for it at least.

A tensor is read once however many blocks look at it, from as many bytes as the kernel addresses. Rows longer than the cache of one
multiprocessor's share are read once for each loop.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ...ir import Node
from ...ir.infer import tensors_of
from ...ir.symbols import hint
from .index import Size, product
from .plan import flops_of
from .tiles import default_tile
from .values import Plan

_CACHED_ROW = 2**18  # bytes: 50 MB of L2 for 132 multiprocessors with one row each is 380 KB


@dataclass(frozen=True)
class Machine:
    """Peak bandwidth in bytes/s and float32 rate in flop/s, by the vendor's data sheet."""

    name: str
    bandwidth: float
    flops: float


H100 = Machine("H100 SXM", 3.35e12, 67e12)


@dataclass(frozen=True)
class Roofline:
    """Bytes moved between memory and the kernel, and floating point operations, at the hints of symbolic sizes."""

    bytes_moved: int
    flops: int

    def seconds(self, machine: Machine = H100) -> float:
        """The least time that `machine` needs."""
        return max(self.bytes_moved / machine.bandwidth, self.flops / machine.flops)

    def bound(self, machine: Machine = H100) -> str:
        """What limits it: "memory" or "compute"."""
        return "memory" if self.bytes_moved / machine.bandwidth >= self.flops / machine.flops else "compute"

    def line(self, machine: Machine = H100) -> str:
        """One line for people."""
        return (
            f"{self.bytes_moved} bytes, {self.flops} flops, {self.flops / max(self.bytes_moved, 1):.2f} flops/byte: "
            f"bound by {self.bound(machine)}, at least {self.seconds(machine) * 1e6:.3g} us on {machine.name}"
        )


def roofline(plan: Plan) -> Roofline:
    """The roofline of a planned kernel."""
    flops = sum(flops_of(node) * max(map(_elements, _tensors(node)), default=0) for node in plan.nodes)
    return Roofline(bytes_after(plan), flops)


def bytes_after(plan: Plan) -> int:
    """Bytes that the kernel reads and writes."""
    known = known_sizes(plan)
    sizes = {v.name: known(v.size) for v in (*plan.domain.rows, *plan.domain.columns)}
    read = [0] * len(plan.inputs)
    for value in plan.values:
        if value.kind == "load":
            read[value.input] += int(product(sizes[name] for name in sorted(value.index.variables)))
    row_bytes = known(plan.domain.num_columns) * max(node.meta["val"].dtype.itemsize for node in plan.inputs)
    loops = plan.num_stages if default_tile(plan).looped and row_bytes > _CACHED_ROW else 1
    total = 0
    for node, elements in zip(plan.inputs, read, strict=True):
        value = node.meta["val"]
        total += min(elements, _elements(value)) * value.dtype.itemsize * loops
    return total + sum(_bytes(output.meta["val"]) for output in plan.outputs)


def bytes_before(nodes: Sequence[Node]) -> int:
    """Bytes that the nodes read and write when each runs by itself; ATen's group_norm reads its operand twice."""
    total = 0
    for node in nodes:
        operands = [_bytes(tensor) for operand in node.all_input_nodes for tensor in tensors_of(operand.meta["val"])]
        total += sum(operands) + sum(_bytes(tensor) for tensor in tensors_of(node.meta["val"]))
        if node.target in (torch.ops.aten.group_norm.default, torch.ops.gw.norm_stats.default):
            total += operands[0]
    return total


def _tensors(node: Node) -> list[Any]:
    return [t for n in (node, *node.all_input_nodes) for t in tensors_of(n.meta["val"])]


def _bytes(value: Any) -> int:
    return _elements(value) * value.dtype.itemsize


def _elements(value: Any) -> int:
    """Distinct elements: dims that a tensor repeats by a stride of 0 count once."""
    return int(
        product(
            hint(size) for size, stride in zip(value.shape, value.stride(), strict=True) if not (isinstance(stride, int) and stride == 0)
        )
    )


def known_sizes(plan: Plan) -> Callable[[Size], int]:
    """Sizes of the domain as numbers: those of symbols are read off the tensors that have them."""
    hints: dict[Any, int] = {}
    for node in (*plan.inputs, *plan.outputs):
        for size in (*node.meta["val"].shape, *node.meta["val"].stride()):
            if isinstance(size, torch.SymInt):
                env = size.node.shape_env
                hints |= {s: int(env.backed_var_to_val[s]) for s in size.node.expr.free_symbols if s in env.backed_var_to_val}

    def known(size: Size) -> int:
        return size if isinstance(size, int) else int(size.xreplace(hints))

    return known
