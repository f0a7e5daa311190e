"""Runs `gw.sliced`: outputs are allocated once, each slice writes its part in place, and its intermediates die at last use.

A part is written by its last operation where that has an `out=` kernel, else copied when the slice has run. An output that takes
a donated operand's storage is written only after every read of that operand's slice.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from ..ir import Node, Region
from ..ir.infer import operands_of, same_strides, storage_key
from ..ir.links.sizes import quotient
from ..ir.region import dense_stride, empty_whole, memory_order, narrow, slice_bounds, units_of
from ..ir.region_call import RegionCall
from .flat import FlatGraph
from .out_variant import is_pointwise, out_variant

Body = Callable[[list[Any]], list[Any]]


@dataclass(frozen=True)
class _OperandSize:
    """A size that operand `operand` has along `dim`, `factor` times."""

    operand: int
    dim: int
    factor: int

    def of(self, operands: Sequence[torch.Tensor]) -> int:
        return operands[self.operand].size(self.dim) * self.factor


@dataclass(frozen=True)
class _Output:
    """How an output's slices lie in it. `is_partial`: each slice gives one row (statistics), so there are `count` rows.

    `size` holds numbers and sizes that an operand tells; None where no operand does. Dims lie in memory in `order`, outermost first.
    """

    dim: int
    is_partial: bool
    size: "tuple[int | _OperandSize, ...] | None"
    order: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device
    donor: int | None

    @staticmethod
    def of(whole: torch.Tensor, part: torch.Tensor, dim: int, donor: int | None, operands: Sequence[Any]) -> "_Output":
        rows = part.size(dim)
        is_partial = isinstance(rows, int) and rows == 1
        # A partial's rows are counted when it runs.
        known = [1 if is_partial and d == dim else _told_by(operands, size) for d, size in enumerate(whole.shape)]
        size = tuple(n for n in known if n is not None)
        order = tuple(memory_order(whole))
        return _Output(dim, is_partial, size if len(size) == len(known) else None, order, whole.dtype, whole.device, donor)

    def allocate(self, operands: Sequence[torch.Tensor], count: int) -> torch.Tensor | None:
        """The whole output; None where only a slice's part tells its size."""
        if self.size is None:
            return None
        size = [n if isinstance(n, int) else n.of(operands) for n in self.size]
        if self.is_partial:
            size[self.dim] = count
        return torch.empty_strided(size, dense_stride(size, self.order), dtype=self.dtype, device=self.device)

    def allocate_for(self, part: torch.Tensor, cut: "_Cut") -> torch.Tensor:
        """The whole output, known from the first slice's part."""
        size = list(part.shape)
        if self.is_partial:
            size[self.dim] = cut.count
        elif cut.length:
            size[self.dim] = cut.units * (size[self.dim] // cut.length)
        return empty_whole(part, size, self.order)

    def destination(self, whole: torch.Tensor, cut: "_Cut") -> torch.Tensor:
        if self.is_partial:
            return whole.narrow(self.dim, cut.index, 1)
        return narrow(whole, self.dim, cut.begin, cut.begin + cut.length, cut.units)


def _told_by(operands: Sequence[Any], size: Any) -> "int | _OperandSize | None":
    """`size` as a number, or by an operand that has it or a whole part of it along some dim."""
    if isinstance(size, int):
        return size
    for n, operand in enumerate(operands):
        for dim, own in enumerate(operand.shape) if isinstance(operand, torch.Tensor) else ():
            factor = quotient(size, own) if isinstance(own, torch.SymInt) else None
            if isinstance(factor, int):
                return _OperandSize(n, dim, factor)
    return None


@dataclass(frozen=True)
class _Cut:
    """Slice `index` of `count`: `length` units from unit `begin` on, of `units`."""

    index: int
    count: int
    begin: int
    length: int
    units: int

    def narrow(self, operand: torch.Tensor, dim: int) -> torch.Tensor:
        return narrow(operand, dim, self.begin, self.begin + self.length, self.units)


class SlicedRun:
    """One region call, ready to run on `(count, units, *operands)`. `compiled` holds bodies by slice length."""

    def __init__(self, node: Node, donors: Mapping[int, int], compiled: Mapping[int, Body] | None = None):
        call = RegionCall.of(node)
        self.in_dims = call.in_dims
        self._outputs = [
            _Output.of(whole, part.meta["val"], dim, donors.get(j), [operand.meta["val"] for operand in call.operands])
            for j, (whole, part, dim) in enumerate(zip(call.outputs, call.body.outputs, call.out_dims, strict=True))
        ]
        self._compiled = compiled or {}
        self._parts = FlatGraph(call.body.graph)
        self._in_place = FlatGraph(_writing_body(call.body, call.outputs, donors))

    def __call__(self, count: int, units: int | None, *operands: torch.Tensor) -> list[torch.Tensor]:
        total = units_of(self.in_dims, operands, units)
        count = min(count, total)
        wholes: list[Any] = [
            self._donated(o, operands, count) if o.donor is not None else o.allocate(operands, count) for o in self._outputs
        ]
        if all(whole is not None and whole.numel() == 0 for whole in wholes):
            return wholes  # a `reshape` to -1 cannot tell the length of a slice without elements
        for index, (begin, end) in enumerate(slice_bounds(total, count)):
            cut = _Cut(index, count, begin, end - begin, total)
            inputs = [cut.narrow(operand, dim) for operand, dim in zip(operands, self.in_dims, strict=True)]
            if None in wholes or cut.length in self._compiled:
                self._copy_parts(self._compiled.get(cut.length, self._parts)(inputs), wholes, cut)
            else:
                self._in_place([*inputs, *self._destinations(wholes, cut)])
        return wholes

    def _donated(self, output: _Output, operands: Sequence[torch.Tensor], count: int) -> torch.Tensor | None:
        """The donor itself; a fresh output should another tensor turn out to share its storage."""
        assert output.donor is not None
        donor = operands[output.donor]
        if _is_sole_owner(donor):
            return donor
        return output.allocate(operands, count)

    def _copy_parts(self, parts: list[torch.Tensor], wholes: list[Any], cut: _Cut) -> None:
        for j, (output, part) in enumerate(zip(self._outputs, parts, strict=True)):
            if wholes[j] is None:
                wholes[j] = output.allocate_for(part, cut)
            output.destination(wholes[j], cut).copy_(part)

    def _destinations(self, wholes: list[torch.Tensor], cut: _Cut) -> list[torch.Tensor]:
        return [output.destination(whole, cut) for output, whole in zip(self._outputs, wholes, strict=True)]


def _is_sole_owner(tensor: torch.Tensor) -> bool:
    # Two: the tensor and the Python storage object made to ask.
    return torch._C._storage_Use_Count(tensor.untyped_storage()._cdata) == 2


def _writing_body(region: Region, wholes: Sequence[torch.Tensor], donors: Mapping[int, int]) -> fx.Graph:
    """The body with one more input an output, its destination, which it writes; it returns nothing."""
    graph = fx.Graph()
    copies: dict[Node, Node] = {node: _copy(graph, node, {}) for node in region.placeholders}
    destinations = [graph.placeholder(f"destination_{j}") for j in range(len(wholes))]
    direct = {
        part: destinations[j]
        for j, part in enumerate(region.outputs)
        if region.outputs.count(part) == 1 and _may_write_directly(region, part, wholes[j], donors.get(j))
    }
    for node in region.graph.nodes:
        if node.op != "call_function":
            continue
        copies[node] = _copy(graph, node, copies)
        if node in direct:
            writer: Any = out_variant(node.target, node.meta["val"].device.type)
            copies[node].target = writer
            copies[node].args = (*copies[node].args, direct[node])
    for j, part in enumerate(region.outputs):
        if part not in direct:
            graph.call_function(torch.Tensor.copy_, (destinations[j], copies[part]))
    graph.output(())
    return graph


def _copy(graph: fx.Graph, node: Node, copies: Mapping[Node, Node]) -> Node:
    return graph.node_copy(node, copies.__getitem__)


def _may_write_directly(region: Region, part: Node, whole: torch.Tensor, donor: int | None) -> bool:
    """Whether `part` can be computed into its destination with the same result for every reader."""
    value = part.meta["val"]
    if part.op != "call_function" or out_variant(part.target, value.device.type) is None or len(part.args) < _positional(part.target):
        return False
    # Later operations of the body would see the destination's strides.
    if len(part.users) > 1 and not same_strides(value, whole.as_strided(value.shape, whole.stride())):
        return False
    return donor is None or _reads_are_over(region, part, region.placeholders[donor])


def _positional(target: Any) -> int:
    return sum(not argument.kwarg_only for argument in target._schema.arguments)


def _reads_are_over(region: Region, part: Node, donor: Node) -> bool:
    """Whether nothing after `part` reads the donated slice, and `part` itself only element by element."""
    aliases = {
        node
        for node in region.graph.nodes
        if isinstance(node.meta.get("val"), torch.Tensor) and storage_key(node.meta["val"]) == storage_key(donor.meta["val"])
    }
    after = False
    for node in region.graph.nodes:
        reads = aliases.intersection(operands_of((node.args, node.kwargs)))
        if node is part:
            if reads and not (reads == {donor} and is_pointwise(part.target)):
                return False
            after = True
        elif after and reads:
            return False
    return True
