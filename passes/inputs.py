"""Example inputs that fit a program's signature, for when the user gives none."""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import torch

from ..ir import Node, Program
from ..ir.pattern import named_arguments
from ..ir.strides import laid_out
from ..ir.symbols import hint

_DEFAULT_BOUND = 4
_INDEXED = {
    torch.ops.aten.embedding.default: ("weight", "indices"),
    torch.ops.aten.index_select.default: ("self", "index"),
    torch.ops.aten.gather.default: ("self", "index"),
    torch.ops.aten.index.Tensor: ("self", "indices"),
    torch.ops.aten.take_along_dim.default: ("self", "indices"),
}


def random_inputs(program: Program, seed: int = 0, sizes: Mapping[str, int] | None = None) -> list[Any]:
    """One value for each input leaf of `main`: floats are normal, booleans mostly true, symbols stand at their hints or at `sizes`.

    Integers are small and not negative, and below the size of whatever they index; captured constants stay.
    """
    generator = torch.Generator().manual_seed(seed)
    number = functools.partial(_number, {program.symbols.size(name).node.expr: size for name, size in (sizes or {}).items()})
    return [_random_value(node, generator, number) for node in program.main.placeholders if node.meta.get("role", "input") == "input"]


def _number(sizes: Mapping[Any, int], size: Any) -> int:
    """The size where symbols stand at `sizes`, the rest at their hints."""
    if isinstance(size, int) or not sizes:
        return hint(size)
    expression = size.node.expr.subs(sizes)
    return int(expression) if expression.is_Integer else hint(size)


def hard_inputs(program: Program, seed: int = 0, sizes: Mapping[str, int] | None = None) -> list[Any]:
    """As `random_inputs`, with rows of floats that networks stumble over: zeros, one value throughout, all small, all far from zero.

    Source: specs/trust.md, section 3; a dropped `+ 1e-15` shows on 1 of 493 programs with normal inputs, and on 440 of 487 with these.
    """
    return [_with_hard_rows(value) for value in random_inputs(program, seed, sizes)]


def zero_inputs(program: Program, seed: int = 0) -> list[Any]:
    """As `random_inputs`, with every float 0."""
    return [torch.zeros_like(value) if _is_float(value) else value for value in random_inputs(program, seed)]


def _is_float(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.dtype.is_floating_point


def _with_hard_rows(value: Any) -> Any:
    """The value with hard rows, laid out as it is; an expanded one, whose rows may be one, stays."""
    if not _is_float(value) or value.dim() == 0 or 0 in value.stride():
        return value
    hard = value.clone()
    rows = hard.unbind(0) if value.dim() == 1 else hard.flatten(0, -2).unbind(0) if hard.is_contiguous() else hard.unbind(0)
    for place, row in enumerate(rows):
        row.copy_((torch.zeros_like(row), torch.full_like(row, 0.5), row * 1e-4, row + 100, row)[place % 5])
    return laid_out(hard, value.stride())


def _random_value(node: Node, generator: torch.Generator, number: Callable[[Any], int]) -> Any:
    value = node.meta["val"]
    if isinstance(value, torch.SymInt):
        return number(value)
    if not isinstance(value, torch.Tensor):
        return value
    shape, stride = [number(size) for size in value.shape], [number(step) for step in value.stride()]
    length = 0 if 0 in shape else 1 + sum((size - 1) * step for size, step in zip(shape, stride, strict=True))
    if value.dtype == torch.bool:
        memory = torch.rand(length, generator=generator) < 0.75
    elif value.dtype.is_floating_point or value.dtype.is_complex:
        real = torch.complex64 if value.dtype.is_complex else torch.float32
        memory = torch.randn(length, generator=generator, dtype=real).to(value.dtype)
    else:
        bound = min(max(_index_bound(node), 1), torch.iinfo(value.dtype).max)  # a narrow integer cannot name places of a long table
        memory = torch.randint(0, bound, (length,), generator=generator).to(value.dtype)
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
