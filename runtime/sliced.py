"""Runs `gw.sliced`: outputs are allocated once, each slice writes its part in place, and its intermediates die at last use.

A part is written by its last operation where that has an `out=` kernel, else copied when the slice has run; compiled bodies store
it where it belongs. An output that takes a donated operand's storage is written only after every read of that operand's slice.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import fx

from ..codegen.library_call import LibraryCall
from ..codegen.low_rank.sites import SiteCall
from ..ir import Node, Region
from ..ir.infer import operands_of, same_strides, storage_key
from ..ir.links.sizes import quotient
from ..ir.liveness import node_workspace, profile_graph
from ..ir.region import dense_stride, empty_whole, memory_order, narrow, slice_bounds, units_of
from ..ir.region_call import RegionCall
from .flat import FlatGraph
from .out_variant import is_pointwise, out_variant

Body = Callable[[list[Any]], list[Any]]
Types = Callable[[], list[Any]]  # computes the types of a body's operands
Compile = Callable[[fx.Graph, Types], Body]


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
        return whole.narrow(self.dim, cut.index, 1) if self.is_partial else cut.narrow(whole, self.dim)


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
    """One region call, ready to run on `(count, units, *operands)`; with `compile`, its body is compiled for each slice length. `body`
    is run in the place of the call's own: the same function by other calls."""

    def __init__(self, node: Node, donors: Mapping[int, int], compile: Compile | None = None, body: Region | None = None):
        self.call = call = RegionCall.of(node) if body is None else replace(RegionCall.of(node), body=body)
        self.donors = donors
        self._body = body
        self.in_dims = call.in_dims
        self._outputs = [
            _Output.of(whole, part.meta["val"], dim, donors.get(j), [operand.meta["val"] for operand in call.operands])
            for j, (whole, part, dim) in enumerate(zip(call.outputs, call.body.outputs, call.out_dims, strict=True))
        ]
        self._compiled = self._bodies(call, donors, compile) if compile is not None else {}
        self._parts = FlatGraph(call.body.graph)
        self._in_place = FlatGraph(_writing_body(call.body, call.outputs, donors))

    def __call__(self, count: int, units: int | None, *operands: torch.Tensor) -> list[torch.Tensor]:
        total = units_of(self.in_dims, operands, units)
        count = min(count, total)
        wholes: list[Any] = [self._donated(o, operands) if o.donor is not None else o.allocate(operands, count) for o in self._outputs]
        if all(whole is not None and whole.numel() == 0 for whole in wholes):
            return wholes  # a `reshape` to -1 cannot tell the length of a slice without elements
        read = self._with_outputs_for_donors(operands, wholes) if self._compiled else operands
        for index, (begin, end) in enumerate(slice_bounds(total, count)):
            cut = _Cut(index, count, begin, end - begin, total)
            inputs = [cut.narrow(operand, dim) for operand, dim in zip(read, self.in_dims, strict=True)]
            if None in wholes:
                self._copy_parts(self._parts(inputs), wholes, cut)
            elif cut.length in self._compiled:
                self._compiled[cut.length][0]([*inputs, *self._destinations(wholes, cut, fresh_only=True)])
            else:
                self._in_place([*inputs, *self._destinations(wholes, cut)])
        return wholes

    @property
    def is_plain(self) -> bool:
        """Whether the body runs as the program has it, each call by its own kernel."""
        return not self._compiled and self._body is None

    @property
    def workspace(self) -> int:
        """Bytes that library kernels need for a slice."""
        return profile_graph(self.call.body.graph, workspace_of=call_workspace).peak_bytes

    @property
    def compiled(self) -> list[tuple[Body, Types]]:
        """The compiled bodies with what gives the types of their operands."""
        return list(self._compiled.values())

    def _donated(self, output: _Output, operands: Sequence[torch.Tensor]) -> torch.Tensor:
        """The donor itself; a tensor like it should another turn out to share its storage."""
        assert output.donor is not None
        donor = operands[output.donor]
        return donor if _is_sole_owner(donor) else torch.empty_strided(donor.shape, donor.stride(), dtype=donor.dtype, device=donor.device)

    def _with_outputs_for_donors(self, operands: Sequence[torch.Tensor], wholes: Sequence[Any]) -> list[torch.Tensor]:
        """The operands, each donor as the output that compiled bodies store into where they read it."""
        result = list(operands)
        for output, whole in zip(self._outputs, wholes, strict=True):
            if output.donor is not None and whole is not operands[output.donor]:
                result[output.donor] = whole.copy_(operands[output.donor])
        return result

    def _copy_parts(self, parts: list[torch.Tensor], wholes: list[Any], cut: _Cut) -> None:
        for j, (output, part) in enumerate(zip(self._outputs, parts, strict=True)):
            if wholes[j] is None:
                wholes[j] = output.allocate_for(part, cut)
            output.destination(wholes[j], cut).copy_(part)

    def _destinations(self, wholes: Sequence[torch.Tensor], cut: _Cut, fresh_only: bool = False) -> list[torch.Tensor]:
        """Where the parts of a slice go; with `fresh_only`, without those that go where an operand was."""
        chosen = [(o, whole) for o, whole in zip(self._outputs, wholes, strict=True) if o.donor is None or not fresh_only]
        return [output.destination(whole, cut) for output, whole in chosen]

    def _bodies(self, call: RegionCall, donors: Mapping[int, int], compile: Compile) -> dict[int, tuple[Body, Types]]:
        """The body compiled for each length of its slices; none where the lengths are not known before the call."""
        values = [operand.meta["val"] for operand in call.operands]
        total = units_of(call.in_dims, values, call.units)
        if not isinstance(total, int) or not isinstance(call.count, int):
            return {}
        count = min(call.count, total)
        graph = _storing_body(call, donors)
        cuts = {end - begin: _Cut(0, count, 0, end - begin, total) for begin, end in slice_bounds(total, count)}
        types = {length: partial(self._body_operands, call, values, cut) for length, cut in sorted(cuts.items())}
        return {length: (compile(graph, of_slice), of_slice) for length, of_slice in types.items()}

    def _body_operands(self, call: RegionCall, values: Sequence[torch.Tensor], cut: _Cut) -> list[torch.Tensor]:
        """The types of what a compiled body takes for one slice."""
        inputs = [cut.narrow(value, dim) for value, dim in zip(values, call.in_dims, strict=True)]
        return [*inputs, *self._destinations(call.outputs, cut, fresh_only=True)]


def call_workspace(node: Node) -> int:
    """Bytes that a call of a library kernel needs beside operands and results."""
    if isinstance(node.target, SiteCall):
        return node_workspace(node.target.first)
    if not isinstance(node.target, LibraryCall):
        return node_workspace(node)
    x: Any = node.args[0]
    return node.target.scratch(x.meta["val"], node.meta["val"])


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


def _storing_body(call: RegionCall, donors: Mapping[int, int]) -> fx.Graph:
    """The body in the form that is compiled: it copies each output into the operand that gives its storage, else into an operand of
    its own, after those of the region. A compiler that sees the copies computes the values in place."""
    graph = fx.Graph()
    copies = {node: _copy(graph, node, {}) for node in call.body.placeholders}
    operands = list(copies.values())
    destinations = [operands[donors[j]] if j in donors else graph.placeholder(f"output_{j}") for j in range(len(call.outputs))]
    for node in call.body.graph.nodes:
        if node.op == "call_function":
            copies[node] = _copy(graph, node, copies)
    for destination, part in zip(destinations, call.body.outputs, strict=True):
        graph.call_function(torch.ops.aten.copy_.default, (destination, copies[part]))
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
