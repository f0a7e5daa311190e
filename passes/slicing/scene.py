"""What the planner looks at: the calls of a function in order, who uses what, which storage each value lives in, and memoised links.

Only the order of calls changes while a plan is made; regions are laid over it.
"""

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from ...ir import Function, Node
from ...ir.calls import draws
from ...ir.infer import contiguous_stride, storage_key, tensors_of
from ...ir.links import OperandSlot, Refusal, Tag, backward, forward, kind, localize
from ...ir.links.sizes import Size, identity
from ...ir.liveness import node_workspace, storage_bytes
from ...ir.program import region_of
from ...ir.region import memory_order
from ...ir.size_nodes import SizeNodes
from ...ir.symbols import hint, same_size
from ...ir.workspace import Workspace, slice_workspace, workspace

END = 2**62  # the position of the function's return


@dataclass
class Scene:
    """The calls of one function with their positions, users, storages and links. `program_order` is that of the function."""

    nodes: list[Node]
    position: dict[Node, int]
    operands: dict[Node, tuple[Node, ...]]
    users: dict[Node, tuple[Node, ...]]
    keys: dict[Node, tuple[int, ...]]
    outside_keys: frozenset[int]
    storages: dict[Node, tuple[tuple[int, int], ...]]  # key and bytes of each storage that the value lies in
    makes: dict[Node, int]
    bytes_of: dict[Node, int]  # of a value laid out densely, as a region's output is
    workspace_of: dict[Node, Workspace]
    weight_bytes: dict[Node, int]
    sizes: SizeNodes
    program_order: tuple[Node, ...] = ()
    random: frozenset[Node] = frozenset()  # calls that draw random numbers
    answers: dict[Any, Any] = field(default_factory=dict)  # how a call joins a sweep, by how its operands carry the axis
    _backward: dict[Any, Any] = field(default_factory=dict)
    _forward: dict[Any, Any] = field(default_factory=dict)
    _kind: dict[Any, str] = field(default_factory=dict)
    _local: dict[Any, Any] = field(default_factory=dict)
    _dense: dict[Node, bool] = field(default_factory=dict)
    _layouts: dict[Any, tuple] = field(default_factory=dict)

    @staticmethod
    def of(function: Function) -> "Scene":
        nodes: list[Node] = []
        outside: set[int] = set()
        for node in function.graph.nodes:
            if node.op == "call_function":
                nodes.append(node)
            elif node.op != "output":
                outside.update(storage_key(tensor) for tensor in tensors_of(node.meta["val"]))
        position = {node: i for i, node in enumerate(nodes)}
        keys = {node: tuple(storage_key(t) for t in tensors_of(node.meta["val"])) for node in nodes}
        made: set[int] = set()
        makes: dict[Node, int] = {}
        for node in nodes:
            fresh = [t for t, key in zip(tensors_of(node.meta["val"]), keys[node], strict=True) if key not in outside | made]
            makes[node] = sum(storage_bytes(t) for t in fresh)
            made.update(storage_key(t) for t in fresh)
        return Scene(
            nodes=nodes,
            position=position,
            operands={node: tuple(node.all_input_nodes) for node in nodes},
            users={node: tuple(node.users) for node in function.graph.nodes},
            keys=keys,
            storages={node: _storages(node) for node in nodes},
            outside_keys=frozenset(outside),
            makes=makes,
            bytes_of={node: sum(hint(t.numel()) * t.dtype.itemsize for t in tensors_of(node.meta["val"])) for node in nodes},
            workspace_of={node: _scratch(node) for node in nodes},
            weight_bytes={n: sum(storage_bytes(o.meta["val"]) for o in n.all_input_nodes if o.op == "get_attr") for n in nodes},
            sizes=SizeNodes(function.placeholders),
            program_order=tuple(nodes),
            random=frozenset(filter(draws, nodes)),
        )

    def reorder(self, nodes: list[Node]) -> None:
        """Puts the calls in another order."""
        self.nodes = nodes
        self.position = {node: i for i, node in enumerate(nodes)}

    def at(self, node: Node) -> int:
        """The position of a call; the return stands at the end, inputs and weights before everything."""
        if node.op == "call_function":
            return self.position[node]
        return END if node.op == "output" else -1

    def backward(self, node: Node, tag: Tag, units: Size, output: int = 0) -> dict[OperandSlot, Tag | None] | Refusal:
        """`links.backward`, remembered."""
        key = (node, tag.dim, identity(tag.unit), identity(units), output)
        if key not in self._backward:
            self._backward[key] = backward(node, tag, units, output)
        return self._backward[key]

    def forward(self, node: Node, operand: Node, tag: Tag, units: Size) -> tuple[Tag | None, ...] | Refusal:
        """`links.forward`, remembered, with one tag for each output."""
        key = (node, operand, tag.dim, identity(tag.unit), identity(units))
        if key not in self._forward:
            tags = forward(node, operand, tag, units)
            self._forward[key] = (tags,) if isinstance(tags, Tag) else tags
        return self._forward[key]

    def unknown_size(self, node: Node, tags: Sequence[Tag | None], units: Size) -> Refusal | None:
        """Why the call of `node` on slices cannot be written: it states a size that the function's inputs do not tell."""
        output, tag = first_tag(tags)
        key = (node, tag.dim, identity(tag.unit), identity(units), output)
        if key not in self._local:
            local = localize(node, tag, units, output)
            unknown = [size for size in symbolic_sizes((local.args, local.kwargs)) if not self.sizes.knows(size)]
            detail = f"{node.target} states the size {unknown[0]}, which no input tells" if unknown else ""
            self._local[key] = Refusal("sym-unproved", detail, node) if unknown else None
        return self._local[key]

    def kind(self, node: Node, tag: Tag) -> str:
        """`links.kind`, remembered: the kind of link by which `node` carries `tag`."""
        key = (node, tag.dim, identity(tag.unit))
        if key not in self._kind:
            self._kind[key] = kind(node, tag)
        return self._kind[key]

    def slice_scratch(self, node: Node, tag: Tag, length: int, units: int, views: Collection[Node]) -> int:
        """Bytes beside operands and results of a call on `length` of `units` units, which are views of the operands in `views`."""
        if region_of(node) is not None or not self.workspace_of[node].total:
            return self.workspace_of[node].total
        return slice_workspace(node, tag.dim, length, units, views=views)

    def is_dense(self, node: Node) -> bool:
        """Whether a value is one tensor that fills its storage in some order of dims, so that a region can lay it out again."""
        if node not in self._dense:
            self._dense[node] = isinstance(node.meta["val"], torch.Tensor) and _fills_storage(node.meta["val"])
        return self._dense[node]

    def layout_of(self, node: Node, tag: Tag | None) -> tuple:
        """What must agree for one tensor to take another's storage slice by slice."""
        assert tag is not None
        key = (node, tag.dim, identity(tag.unit))
        if key not in self._layouts:
            value = tensors_of(node.meta["val"])[0]
            sizes, strides = tuple(map(hint, value.shape)), tuple(map(hint, value.stride()))
            self._layouts[key] = (tag.dim, identity(tag.unit), value.dtype, sizes, strides)
        return self._layouts[key]


def first_tag(tags: Sequence[Tag | None]) -> tuple[int, Tag]:
    """The first output that carries the axis, and its tag."""
    return next((output, tag) for output, tag in enumerate(tags) if tag is not None)


def symbolic_sizes(arguments: Any) -> Iterator[torch.SymInt]:
    """The sizes among nested arguments that are neither numbers nor nodes."""
    if isinstance(arguments, torch.SymInt):
        yield arguments
    elif isinstance(arguments, (list, tuple)):
        for item in arguments:
            yield from symbolic_sizes(item)
    elif isinstance(arguments, dict):
        yield from symbolic_sizes(list(arguments.values()))


def _scratch(node: Node) -> Workspace:
    return Workspace(fixed=node_workspace(node)) if region_of(node) is not None else workspace(node)


def _storages(node: Node) -> tuple[tuple[int, int], ...]:
    tensors = tensors_of(node.meta["val"])
    return tuple({storage_key(tensor): hint(tensor.untyped_storage().nbytes()) for tensor in tensors}.items())


def _fills_storage(value: torch.Tensor) -> bool:
    dims = memory_order(value)
    expected = contiguous_stride([value.size(d) for d in dims])
    return all(same_size(value.size(d), 1) or same_size(value.stride(d), step) for d, step in zip(dims, expected, strict=True))
