"""Example inputs that fit a program's signature, for when the user gives none."""

from typing import Any

import torch

from ..ir import Node, Program
from ..ir.pattern import named_arguments
from ..ir.symbols import hint

_DEFAULT_BOUND = 4
_INDEXED = {
    torch.ops.aten.embedding.default: ("weight", "indices"),
    torch.ops.aten.index_select.default: ("self", "index"),
    torch.ops.aten.gather.default: ("self", "index"),
    torch.ops.aten.index.Tensor: ("self", "indices"),
    torch.ops.aten.take_along_dim.default: ("self", "indices"),
}


def random_inputs(program: Program, seed: int = 0) -> list[Any]:
    """One value for each input leaf of `main`: floats are normal, booleans mostly true, symbols stand at their hints.

    Integers are small and not negative, and below the size of whatever they index; captured constants stay.
    """
    generator = torch.Generator().manual_seed(seed)
    return [_random_value(node, generator) for node in program.main.placeholders if node.meta.get("role", "input") == "input"]


def _random_value(node: Node, generator: torch.Generator) -> Any:
    value = node.meta["val"]
    if isinstance(value, torch.SymInt):
        return hint(value)
    if not isinstance(value, torch.Tensor):
        return value
    shape, stride = [hint(size) for size in value.shape], [hint(step) for step in value.stride()]
    length = 0 if 0 in shape else 1 + sum((size - 1) * step for size, step in zip(shape, stride, strict=True))
    if value.dtype == torch.bool:
        memory = torch.rand(length, generator=generator) < 0.75
    elif value.dtype.is_floating_point or value.dtype.is_complex:
        real = torch.complex64 if value.dtype.is_complex else torch.float32
        memory = torch.randn(length, generator=generator, dtype=real).to(value.dtype)
    else:
        memory = torch.randint(0, max(_index_bound(node), 1), (length,), generator=generator).to(value.dtype)
    return memory.to(value.device).as_strided(shape, stride) if length else torch.empty_strided(shape, stride, dtype=value.dtype)


def _index_bound(source: Node) -> int:
    """The smallest size that values derived from `source` index, over all its uses."""
    bound, pending, seen = None, [source], {source}
    while pending:
        node = pending.pop()
        for user in node.users:
            size = _size_indexed(user, node)
            if size is not None:
                bound = size if bound is None else min(bound, size)
            elif user not in seen and _holds_integers(user):
                seen.add(user)
                pending.append(user)
    return _DEFAULT_BOUND if bound is None else bound


def _size_indexed(user: Node, index: Node) -> int | None:
    """The size of the dim that `user` indexes with `index`, None where it does not."""
    if user.target not in _INDEXED:
        return None
    arguments = named_arguments(user)
    table, indices = (arguments[name] for name in _INDEXED[user.target])
    if isinstance(indices, list | tuple):
        return next((hint(table.meta["val"].size(dim)) for dim, item in enumerate(indices) if item is index), None)
    return hint(table.meta["val"].size(arguments.get("dim") or 0)) if indices is index else None


def _holds_integers(node: Node) -> bool:
    value = node.meta.get("val")
    return isinstance(value, torch.Tensor) and not value.dtype.is_floating_point and value.dtype != torch.bool
