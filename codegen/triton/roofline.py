"""What a kernel must move and compute, and the time that a machine needs for it at least.

A tensor is read once however many blocks look at it, from as many bytes as the kernel addresses. Rows longer than the cache of one
multiprocessor's share are read once for each loop.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from ...ir import Node
from ...ir.infer import tensors_of
from ...ir.symbols import hint
from .index import Size, product
from .matmul_plan import MatmulPlan
from .plan import flops_of
from .tiles import default_tile
from .values import Plan

if TYPE_CHECKING:
    from .emit import AnyPlan

_LAUNCH = 2e-6  # seconds between two kernels of a CUDA graph, at least
_CACHED_ROW = 2**18  # bytes: 50 MB of L2 for 132 multiprocessors with one row each is 380 KB


@dataclass(frozen=True)
class Machine:
    """Peak bandwidth in bytes/s, float32 rate in flop/s, and the rates of products of matrices by the type of their operands ("tf32"
    for float32 that is rounded to it), by the vendor's data sheet."""

    name: str
    bandwidth: float
    flops: float
    products: Mapping[str, float]

    def product_flops(self, kind: str) -> float:
        return self.products.get(kind, self.flops)


_HALF, _QUARTER = 989e12, 1979e12
H100 = Machine(
    "H100 SXM",
    3.35e12,
    67e12,
    {"tf32": 494e12, "bfloat16": _HALF, "float16": _HALF, "int8": _QUARTER, "float8_e4m3fn": _QUARTER, "float8_e5m2": _QUARTER},
)


@dataclass(frozen=True)
class Roofline:
    """Bytes moved between memory and the kernel, and operations on numbers, at the hints of symbolic sizes; `product_flops` are those
    of products of matrices of type `product_kind`."""

    bytes_moved: int
    flops: int
    product_flops: int = 0
    product_kind: str = ""

    def seconds(self, machine: Machine = H100) -> float:
        """The least time that `machine` needs."""
        return max(self.bytes_moved / machine.bandwidth, self._computing(machine))

    def bound(self, machine: Machine = H100) -> str:
        """What limits it: "memory" or "compute"."""
        return "memory" if self.bytes_moved / machine.bandwidth >= self._computing(machine) else "compute"

    def _computing(self, machine: Machine) -> float:
        return max(self.flops / machine.flops, self.product_flops / machine.product_flops(self.product_kind))

    def line(self, machine: Machine = H100) -> str:
        """One line for people."""
        return (
            f"{self.bytes_moved} bytes, {self.flops + self.product_flops} flops, "
            f"{(self.flops + self.product_flops) / max(self.bytes_moved, 1):.2f} flops/byte: "
            f"bound by {self.bound(machine)}, at least {self.seconds(machine) * 1e6:.3g} us on {machine.name}"
        )


def roofline(plan: "AnyPlan") -> Roofline:
    """The roofline of a planned kernel."""
    products = getattr(plan, "products", ())
    flops = sum(flops_of(node) * max(map(_elements, _tensors(node)), default=0) for node in plan.nodes if node not in products)
    if isinstance(plan, Plan):
        return Roofline(bytes_after(plan), flops)
    return Roofline(bytes_after(plan), flops, 2 * int(known_sizes(plan)(plan.product_terms)), plan.product_kind)


def bytes_after(plan: "AnyPlan") -> int:
    """Bytes that the kernel reads and writes; products read each operand once, as their tiles meet in a cache."""
    if not isinstance(plan, Plan):
        return sum(_bytes(node.meta["val"]) for node in (*plan.inputs, *plan.outputs))
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


def gains(plan: MatmulPlan, saved: int, machine: Machine = H100) -> bool:
    """Whether a product with its surroundings, which saves `saved` bytes and a launch, is likely faster than the library's product and
    kernels for the rest. (Measured on an H100, bfloat16: 0.91 to 1.02 of cuBLAS's rate by blocks that the hardware copies, 0.72 to 0.86
    by addresses, 1.1 for 16 rows. Float32 without tf32 has no such unit, and the library's kernels are far ahead.)"""
    cost = roofline(plan)
    if cost.product_kind == "float32":
        return False
    few_rows = isinstance(plan.m, int) and plan.m <= 16
    by_blocks = all(side.blocks is not None for side in (plan.left, *plan.rights))
    behind = 0.0 if few_rows else 0.09 if by_blocks else 0.28
    return saved / machine.bandwidth + _LAUNCH > behind * cost.product_flops / machine.product_flops(cost.product_kind)


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


def known_sizes(plan: "AnyPlan") -> Callable[[Size], int]:
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
