"""A new function made from a part of another, node by node, at the types of its own inputs.

Metadata is inferred anew as each call is copied, so that a function whose `length` was symbolic can be made again for one token. A size
that has become a number is no node any more: it stands as a literal where it was read.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import sympy
import torch
from torch import fx

from .build import add_call, add_placeholder, add_weight, set_outputs
from .calls import is_pure, name_of
from .errors import VerifyError
from .infer import InferenceError, contiguous_stride, fake_like
from .program import Function, Node, Program, Where, region_of
from .tree import Tree, flat


class Derivation:
    """A function of `program` in the making. `values` maps nodes of the source to what stands for them: a node of the new graph, or a
    number."""

    def __init__(self, program: Program):
        self.program = program
        self.graph = fx.Graph()
        self.values: dict[Node, Any] = {}
        self._weights: dict[str, Node] = {}

    def input(self, name: str, dtype: Any, shape: Sequence[Any], device: Any, stride: Sequence[Any] | None = None) -> Node:
        """A tensor that the new function takes, contiguous unless a stride is given."""
        value = fake_like(self.program.symbols, dtype, shape, contiguous_stride(shape) if stride is None else stride, device)
        first_call = next((node for node in self.graph.nodes if node.op != "placeholder"), self.graph._root)
        with self.graph.inserting_before(first_call):
            return add_placeholder(self.graph, name, value)

    def call(self, target: Callable[..., Any], *args: Any, like: Node | None = None, **kwargs: Any) -> Any:
        """A new call on values of the new graph; its result is a number where that is what its types say."""
        meta = like.meta if like is not None else {}
        origin, where = meta.get("origin", ()), meta.get("where") or Where()
        try:
            node = add_call(self.graph, self.program.symbols, target, args, kwargs, origin=origin, where=where)
        except InferenceError as error:
            raise VerifyError(f"{name_of(target)} does not type-check in the function that is made from another: {error}") from error
        if isinstance(node.meta["val"], int | float | bool):
            number = node.meta["val"]
            self.graph.erase_node(node)
            return number
        return node

    def copy(self, node: Node, numbers: Mapping[int, int] | None = None) -> Any:
        """`node` of the source in the new graph, made unless it is there; so must be its operands, weights apart. Of its literals those in
        `numbers` stand for others."""
        if node in self.values:
            return self.values[node]
        if node.op == "get_attr":
            self.values[node] = self._weight(str(node.target))
        else:
            args, kwargs = fx.map_arg((_renumbered(node.args, numbers), _renumbered(node.kwargs, numbers)), self.copy_of)
            self.values[node] = self.call(node.target, *args, like=node, **kwargs)  # type: ignore[arg-type]
        return self.values[node]

    def copy_of(self, operand: Node) -> Any:
        """What stands for an operand: a weight is made where it is first read."""
        return self.copy(operand) if operand.op == "get_attr" else self.values[operand]

    def _weight(self, name: str) -> Node:
        if name not in self._weights:
            first_call = next((node for node in self.graph.nodes if node.op == "call_function"), self.graph._root)
            with self.graph.inserting_before(first_call):
                self._weights[name] = add_weight(self.graph, self.program.weights[name], self.program.symbols)
        return self._weights[name]

    def finish(self, name: str, outputs: Sequence[Any], new_states: dict[str, Node]) -> Function:
        """The function, which takes its inputs by name and gives a flat tuple; `new_states` are the values that inputs are given."""
        set_outputs(self.graph, [*outputs, *new_states.values()], tuple(new_states))
        drop_unused(self.graph)
        inputs = [node for node in self.graph.nodes if node.op == "placeholder"]
        return Function(name, self.graph, Tree("tuple", (flat(len(inputs)), Tree("dict"))), flat(len(outputs)))


def specialised(
    program: Program, function: Function, sizes: Mapping[str, int], made_of: Callable[[Derivation, Node], Any] = lambda made, node: None
) -> Function:
    """`function` at given values of some symbols, by name: the same calls, typed anew. What `made_of` gives for a call stands in its place,
    unless that is None."""
    made = Derivation(program)
    numbers = {program.symbols.size(name).node.expr: sympy.Integer(value) for name, value in sizes.items() if name in program.symbols}

    def known(size: Any) -> Any:
        if not isinstance(size, torch.SymInt):
            return size
        expr = size.node.expr.xreplace(numbers)
        return int(expr) if expr.is_Integer else size if expr == size.node.expr else program.symbols.env.create_symintnode(expr, hint=None)

    for node in function.placeholders:
        value = node.meta["val"]
        if isinstance(value, torch.Tensor):
            shape, stride = (list(map(known, each)) for each in (value.shape, value.stride()))
            made.values[node] = made.input(str(node.target), value.dtype, shape, value.device, stride)
        else:
            made.values[node] = known(value)
    for node in function.calls:
        other = made_of(made, node)
        if other is not None:
            made.values[node] = other
        else:
            made.copy(node)
    leaves = [made.values[leaf] if isinstance(leaf, Node) else leaf for leaf in function.outputs]
    names = function.signature().new_states
    results, news = leaves[: len(leaves) - len(names)], leaves[len(leaves) - len(names) :]
    return made.finish(function.name, results, dict(zip(names, news, strict=True)))


def drop_unused(graph: fx.Graph) -> None:
    """Erases calls and weights that reach no output, and regions' results with them."""
    for node in reversed(list(graph.nodes)):
        is_idle = not node.users and (
            node.op == "get_attr" or (node.op == "call_function" and (is_pure(node) or region_of(node) is not None))
        )
        if is_idle:
            graph.erase_node(node)


def _renumbered(value: Any, numbers: Mapping[int, int] | None) -> Any:
    if not numbers:
        return value
    if isinstance(value, tuple | list):
        return type(value)(_renumbered(item, numbers) for item in value)
    if isinstance(value, Mapping):
        return {name: _renumbered(item, numbers) for name, item in value.items()}
    return numbers.get(value, value) if type(value) is int else value


def ancestors(nodes: Iterable[Node]) -> set[Node]:
    """`nodes` and every node that they are computed from."""
    found, pending = set(nodes), list(nodes)
    while pending:
        for source in pending.pop().all_input_nodes:
            if source not in found:
                found.add(source)
                pending.append(source)
    return found
