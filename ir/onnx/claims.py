"""Whether a function that says it is an operator of the dialect is one: its body, read as standard operators, beside the operator's own.

Both run in their working dtype, where they take the same steps, so that no rounding to low bits falls apart: on numbers of several scales,
by which a constant such as eps is told, and on integers of several ranges, which are positions and indices.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import sympy
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from ..build import set_outputs
from ..errors import TargetError
from ..infer import contiguous_stride, fake_like, tensors_of
from ..op import OpDeclaration
from ..program import Function, Node, Program
from ..run import run
from ..symbols import SymbolTable, hint
from ..tree import Tree, flat
from .builder import Builder, Value
from .dialect import arguments

# What normal numbers become: as they are, small, of many sizes and no sign, and nothing.
_NUMBERS: tuple[Callable[[torch.Tensor], torch.Tensor], ...] = (lambda x: x, lambda x: x * 1e-3, lambda x: x.abs() ** 5, torch.zeros_like)
_BOUNDS = (64, 16, 5, 2, 1)  # integers are below these: the larger ones fit few operators, and tell most
_ROUNDINGS = 128  # units of the dtype by which sums in another order may be off; those of 4,096 terms are by some 20
_REFUSALS = (RuntimeError, IndexError, ValueError)
_SMALLEST_SIZE = 3  # of symbolic dims, all of which are different


def holds(
    declared: OpDeclaration,
    attributes: Mapping[str, Any],
    inputs: Sequence[Value],
    symbols: SymbolTable,
    read_body: Callable[[Builder, list[Value]], Sequence[Value]],
    most: int,
) -> bool:
    """Whether `read_body`, which adds a function's body on given operands to a program, gives what `declared` does on operands of the types
    of `inputs`. It does not where a tensor on the way has more than `most` elements, which a file may ask for in a few bytes.

    Raises:
        Unsupported, CaptureError: the body has no form in a program.
    """
    types = _types(symbols, inputs)
    if not _is_small(declared, attributes, types, most):
        return False
    body, is_told = _program(types, read_body), False
    if any(hint(each.numel()) > most for node in body.nodes() for each in tensors_of(node.meta.get("val"))):
        return False
    for given in _draws(types):
        args, kwargs = arguments(declared, attributes, given)
        try:
            results = declared.overload(*args, **kwargs)
        except _REFUSALS:  # integers that the operator does not take
            continue
        expected = list(results) if isinstance(results, tuple | list) else [results]
        try:
            found, _ = run(body, [each for each, kind in zip(given, types, strict=True) if _is_drawn(kind)])
        except (*_REFUSALS, TargetError):
            return False
        if len(found) != len(expected) or not all(map(_same, found, expected)):
            return False
        is_told = is_told or any(bool(torch.isfinite(each).any()) for each in expected)
    return is_told


def _is_drawn(kind: Any) -> bool:
    return isinstance(kind, torch.Tensor) and kind.is_meta


def _types(symbols: SymbolTable, inputs: Sequence[Value]) -> list[Any]:
    """Of each operand a constant, None, or a tensor of the meta device, of small sizes where its own are symbols."""
    chosen: dict[sympy.Basic, sympy.Integer] = {}

    def small(size: Any) -> int:
        if isinstance(size, int):
            return size
        for each in sorted(size.node.expr.free_symbols, key=str):
            if each not in chosen:
                name = symbols.expression(each)
                low, high = (symbols.symbol(name).low, symbols.symbol(name).high) if name in symbols else (0, _SMALLEST_SIZE)
                chosen[each] = sympy.Integer(min(max(low, _SMALLEST_SIZE + len(chosen)), high))
        return int(size.node.expr.xreplace(chosen))

    def kind(value: Value) -> Any:
        if isinstance(value, np.ndarray):
            return torch.empty(value.shape, dtype=torch.int64, device="meta")
        if not isinstance(value, Node):
            return value
        whole = value.meta["val"]
        return torch.empty([small(size) for size in whole.shape], dtype=whole.dtype, device="meta")

    return [kind(value) for value in inputs]


class _NoLarger(TorchDispatchMode):
    """Raises RuntimeError where a result has more than `most` elements."""

    def __init__(self, most: int):
        super().__init__()
        self._most = most

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if any(each.numel() > self._most for each in tensors_of(result)):
            raise RuntimeError(f"{func} gives more than {self._most} elements")
        return result


def _is_small(declared: OpDeclaration, attributes: Mapping[str, Any], types: Sequence[Any], most: int) -> bool:
    """Whether no tensor that the operator makes on its way has more than `most` elements."""
    shapes = [each.to("meta") if isinstance(each, torch.Tensor) else each for each in types]
    args, kwargs = arguments(declared, attributes, shapes)
    try:
        with _NoLarger(most):
            declared.body(*args, **kwargs)
    except _REFUSALS:
        return False
    return all(each.numel() <= most for each in types if _is_drawn(each))


def _program(types: Sequence[Any], read_body: Callable[[Builder, list[Value]], Sequence[Value]]) -> Program:
    builder = Builder(SymbolTable())
    cpu = torch.device("cpu")
    values = [
        builder.input(f"x{place}", fake_like(builder.symbols, kind.dtype, kind.shape, contiguous_stride(list(kind.shape)), cpu))
        if _is_drawn(kind)
        else kind
        for place, kind in enumerate(types)
    ]
    results = read_body(builder, values)
    set_outputs(builder.graph, [builder.node(each) for each in results])
    in_tree = Tree("tuple", (flat(sum(map(_is_drawn, types))), Tree("dict")))
    return Program([Function("main", builder.graph, in_tree, flat(len(results)))], builder.weights, builder.symbols)


def _draws(types: Sequence[Any]) -> Iterator[list[Any]]:
    """Operands of these types, constants as they are."""
    generator = torch.Generator().manual_seed(0)
    has_integers = any(_is_drawn(kind) and not kind.is_floating_point() for kind in types)
    for numbers in _NUMBERS:
        for bound in _BOUNDS if has_integers else _BOUNDS[:1]:
            yield [_drawn(kind, numbers, bound, generator) if _is_drawn(kind) else kind for kind in types]


def _drawn(kind: torch.Tensor, numbers: Callable[[torch.Tensor], torch.Tensor], bound: int, generator: torch.Generator) -> torch.Tensor:
    if kind.is_floating_point():
        return numbers(torch.randn(kind.shape, generator=generator)).to(kind.dtype)
    if kind.dtype == torch.bool:
        return torch.rand(kind.shape, generator=generator) < 0.5
    # Counted down: rows of a cache must differ, and late positions are those that windows cut off.
    return ((bound - 1 - torch.arange(kind.numel())) % bound).to(kind.dtype).reshape(kind.shape)


def _same(found: Any, expected: torch.Tensor) -> bool:
    if not isinstance(found, torch.Tensor) or (found.dtype, found.shape) != (expected.dtype, expected.shape):
        return False
    if not expected.is_floating_point():
        return torch.equal(found, expected)
    a, b = found.double(), expected.double()
    finite = torch.isfinite(b)
    if not torch.equal(torch.isfinite(a), finite) or not torch.equal(a[~finite].nan_to_num(), b[~finite].nan_to_num()):
        return False
    scale = float(b[finite].norm())
    return float((a - b)[finite].norm()) <= _ROUNDINGS * torch.finfo(expected.dtype).eps * scale
