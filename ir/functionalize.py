"""What torch.export leaves undecided, decided from types: whether an operation copies or aliases, and what a write becomes.

    reshape(x, s)  -> view(x, s), or _unsafe_view(clone(x), s)       to(x, dtype) -> x or _to_copy(x, dtype)
    contiguous(x)  -> x or clone(x)                                   chunk(x, n) -> split(x, size)
    add_(x, y)     -> add(x, y)
    instance_norm(x, mean, var, training)  -> instance_norm(x, training), and new values of mean and var

These are the rules by which torch functionalises, save the last, which it does not know. They are read off torch itself, by running
the operation once on metadata and taking down what it dispatches to.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch._decomp import _should_decompose_because_unsafe_op
from torch._dispatch.python import enable_python_dispatcher
from torch._export.utils import _is_preservable_cia_op
from torch.utils._python_dispatch import TorchDispatchMode

from .calls import GETITEM, is_mutating, name_of, target_of, written_statistics
from .errors import CaptureError
from .infer import tensors_of
from .program import Node
from .symbols import SymbolTable

Add = Callable[[Any, tuple[Any, ...], dict[str, Any]], Node]


class NotFunctional(CaptureError):
    """The graph writes to memory that others may see, or cannot be taken apart call by call."""


@functools.cache
def is_ambiguous(target: Any) -> bool:
    """Whether `target` is a composite that may return an operand, a view or a copy, or may write to an operand."""
    if not isinstance(target, torch._ops.OpOverload):
        return False
    if _should_decompose_because_unsafe_op(target):
        return True
    has_body = torch._C._dispatch_has_kernel_for_dispatch_key(target.name(), "CompositeImplicitAutograd")
    return has_body and not _is_preservable_cia_op(target)


def take_apart(
    target: Any, args: tuple[Any, ...], kwargs: dict[str, Any], symbols: SymbolTable, add: Add, node_of_size: Callable[[Any], Any]
) -> Any:
    """The nodes of the results of `target(*args, **kwargs)`, an operand's own where it is returned; `add` makes each call, and
    `node_of_size` gives the node of a symbolic size that is no operand's.

    Raises:
        NotFunctional: the operation writes to an operand, or works on something that is no node.
    """
    recorder = _Recorder(add, node_of_size)
    operands, keywords = pytree.tree_map_only(Node, recorder.value_of, (args, kwargs))
    try:
        with symbols.inference(), torch.amp.autocast("cpu", enabled=False), enable_python_dispatcher(), recorder:
            results = target(*operands, **keywords)
    except Exception as error:
        raise NotFunctional(f"{target} cannot be taken apart: {error}") from error
    return pytree.tree_map(recorder.node_of, results)


class _Recorder(TorchDispatchMode):
    """Makes a node of each operation that reaches the dispatcher."""

    def __init__(self, add: Add, node_of_size: Callable[[Any], Any]):
        super().__init__()
        self.add, self.node_of_size = add, node_of_size
        self.nodes: dict[int, Node] = {}

    def value_of(self, node: Node) -> Any:
        value = node.meta["val"]
        for part in [value] if isinstance(value, torch.SymInt) else tensors_of(value):
            self.nodes[id(part)] = node
        return value

    def node_of(self, value: Any) -> Any:
        if id(value) not in self.nodes:
            if isinstance(value, torch.SymInt):
                return self.node_of_size(value)
            raise NotFunctional(f"a {type(value).__name__} that no call makes")
        return self.nodes[id(value)]

    def __torch_dispatch__(self, target: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        if is_mutating(target) or written_statistics(target, args, kwargs or {}):
            raise NotFunctional(f"{target} writes to an operand")
        operands, keywords = pytree.tree_map_only((torch.Tensor, torch.SymInt), self.node_of, (args, kwargs or {}))
        node = self.add(target, operands, keywords)
        value = node.meta["val"]
        for result in [self.add(GETITEM, (node, i), {}) for i in range(len(value))] if isinstance(value, tuple) else [node]:
            self.value_of(result)
        return value


@functools.cache
def functional_variant(target: Any) -> Any | None:
    """The operation that returns what `target` writes to its first operand: add for add_; None where torch has none."""
    schema, (namespace, name, overload) = target._schema, name_of(target).split(".")
    try:
        variant: Any = target_of(f"{namespace}.{name.removesuffix('_')}.{overload}")
    except KeyError:
        return None
    if is_ambiguous(variant):
        return None
    takes, gives = variant._schema.arguments, variant._schema.returns
    is_pure = all(part.alias_info is None for part in (*takes, *gives)) and len(gives) == 1
    writes_first = [argument.is_write for argument in schema.arguments] == [True] + [False] * (len(takes) - 1)
    return variant if is_pure and writes_first and [a.name for a in takes] == [a.name for a in schema.arguments] else None


def instance_norm(args: tuple[Any, ...], kwargs: dict[str, Any], add: Add) -> tuple[Node, dict[str, Node]]:
    """The nodes of `aten.instance_norm` in training without its running statistics, and of the new value of each.

    new = running + momentum * (s - running), s the mean or the unbiased variance over an instance's pixels, averaged over instances.
    """
    target = torch.ops.aten.instance_norm.default
    named = dict(zip((a.name for a in target._schema.arguments), args, strict=False)) | kwargs
    running = written_statistics(target, args, kwargs)
    x: Node = named["input"]
    news: dict[str, Node] = {}
    for name, old in running.items():
        dtype = old.meta["val"].dtype
        wide = x if x.meta["val"].dtype == dtype else add(torch.ops.aten._to_copy.default, (x,), {"dtype": dtype})
        pixels = list(range(2, x.meta["val"].dim()))
        if name == "running_mean":
            each = add(torch.ops.aten.mean.dim, (wide, pixels), {})
        else:
            each = add(torch.ops.aten.var.correction, (wide, pixels), {"correction": 1})
        news[name] = add(torch.ops.aten.lerp.Scalar, (old, add(torch.ops.aten.mean.dim, (each, [0]), {}), named["momentum"]), {})
    return add(target, tuple(None if name in running else value for name, value in named.items()), {}), news
