"""The program in the making: calls are added as ONNX nodes are read, and what depends on constants alone is computed at once.

An ONNX value is, while it is read, one of: a node of the graph; a `torch.Tensor`, which is a constant; an array of sizes (`sizes.py`); a
list of values, which is a sequence; None, which is an absent optional.
"""

import math
from collections.abc import Callable, Sequence
from itertools import count
from typing import Any

import numpy as np
import torch
from torch import fx

from ..build import add_call, add_placeholder, add_weight
from ..calls import GETITEM, name_of
from ..derive import ancestors
from ..errors import CaptureError, first_line
from ..infer import InferenceError, fake_like, infer, tensors_of
from ..program import Node, Weight, Where
from ..symbols import SymbolTable
from .modules import is_made_up
from .sizes import Size, is_known, known, size_of, sizes_of

aten = torch.ops.aten

Value = Any  # Node | torch.Tensor | np.ndarray | list | None

# Constants are computed at once up to this many elements: shapes, tables, scales. A larger result may be many times what it is made of.
_MOST_FOLDED = 2**16

WIDER = (torch.uint16, torch.uint32, torch.uint64)


class Unsupported(Exception):
    """An ONNX node has no form in ATen here, and why; it becomes an opaque one."""


class Builder:
    """Adds calls to `graph`; `weights` are those that a call reads."""

    def __init__(self, symbols: SymbolTable) -> None:
        self.graph, self.symbols = fx.Graph(), symbols
        self.weights: dict[str, Weight] = {}
        self.where = Where()
        self.module = ""  # of the model that was exported, of the node that is read
        self._named: dict[int, tuple[torch.Tensor, str]] = {}  # constants by identity, kept alive
        self._names: set[str] = set()
        self._weight_nodes: dict[str, Node] = {}
        self._turned: dict[int, torch.Tensor] = {}
        self._header: Node | None = None  # the last input or weight: calls follow

    def input(self, name: str, value: torch.Tensor) -> Node:
        """A tensor that the function takes, of type `value`."""
        self._header = add_placeholder(self.graph, name, value)
        return self._header

    # --- values ---------------------------------------------------------------------------------------------------------------

    def name_constant(self, tensor: torch.Tensor, name: str) -> torch.Tensor:
        """Notes under which name a constant enters the weight table if a call reads it."""
        unique, number = name, 1
        while unique in self._names:
            number += 1
            unique = f"{name}.{number}"
        self._names.add(unique)
        self._named[id(tensor)] = (tensor, unique)
        return tensor

    def node(self, value: Value) -> Node:
        """The node of a value that is one tensor."""
        if isinstance(value, Node):
            return value
        if isinstance(value, np.ndarray):
            return self._tensor_of_sizes(value)
        if isinstance(value, torch.Tensor):
            return self._weight(value)
        raise Unsupported("a sequence or an absent value stands where a tensor is needed")

    def _weight(self, tensor: torch.Tensor) -> Node:
        if id(tensor) not in self._named:
            self.name_constant(tensor, f"constant_{len(self._named)}")
        name = self._named[id(tensor)][1]
        if name not in self._weight_nodes:
            self.weights[name] = Weight.of(name, tensor)
            with self.graph.inserting_after(self._header):
                self._header = self._weight_nodes[name] = add_weight(self.graph, self.weights[name], self.symbols)
        return self._weight_nodes[name]

    def _tensor_of_sizes(self, sizes: np.ndarray) -> Node:
        if is_known(sizes):
            return self.node(known(sizes))
        parts = [
            self.call(aten.scalar_tensor.default, size.node if isinstance(size, Size) else size, dtype=torch.int64)
            for size in sizes.reshape(-1)
        ]
        if sizes.ndim == 0:
            return self.node(parts[0])
        stacked = self.call(aten.stack.default, [self.node(part) for part in parts])
        return stacked if sizes.ndim == 1 else self.call(aten.view.default, stacked, list(sizes.shape))

    def sizes(self, value: Value) -> np.ndarray | None:
        """An integer value as sizes, None where it depends on data."""
        if isinstance(value, np.ndarray):
            return value
        if isinstance(value, torch.Tensor) and not value.is_floating_point() and value.numel() <= 1024:
            return sizes_of(value)
        return None

    def shape(self, value: Value) -> list[Any]:
        """The sizes of a tensor: numbers, or `Size`s."""
        if isinstance(value, torch.Tensor | np.ndarray):
            return list(value.shape)
        result: list[Any] = []
        for dim, size in enumerate(self.node(value).meta["val"].shape):
            if isinstance(size, int):
                result.append(size)
            else:
                result.append(size_of(self._add(aten.sym_size.int, (value, dim), {}), self.symbols))
        return result

    def dtype(self, value: Value) -> torch.dtype:
        if isinstance(value, np.ndarray):
            return torch.int64
        return value.dtype if isinstance(value, torch.Tensor) else self.node(value).meta["val"].dtype

    def rank(self, value: Value) -> int:
        return value.ndim if isinstance(value, torch.Tensor | np.ndarray) else self.node(value).meta["val"].dim()

    def constant(self, value: Value, what: str) -> torch.Tensor:
        """A value that must be known.

        Raises:
            Unsupported: it is not.
        """
        if isinstance(value, np.ndarray) and is_known(value):
            return known(value)
        if not isinstance(value, torch.Tensor):
            raise self.depends(value, what)
        return value

    def depends(self, value: Value, what: str) -> Unsupported:
        """Why a value is not known, and what would make it so."""
        sources = (
            [size.node for size in value.reshape(-1) if isinstance(size, Size)] if isinstance(value, np.ndarray) else [self.node(value)]
        )
        behind = ancestors(sources)
        names = sorted({name for node in behind if isinstance(node.meta["val"], torch.SymInt) for name in self._symbols_of(node)})
        if names:
            return Unsupported(f"its {what} depends on the size {', '.join(names)}: give that a value, sizes={{{names[0]!r}: ..}}")
        inputs = sorted(str(node.target) for node in behind if node.op == "placeholder" and not node.meta["val"].is_floating_point())
        if inputs:
            return Unsupported(f"its {what} depends on data of input {inputs[0]}: give that a value, constants={{{inputs[0]!r}: ..}}")
        return Unsupported(f"its {what} depends on data")

    def _symbols_of(self, size: Node) -> list[str]:
        free = size.meta["val"].node.expr.free_symbols
        return [symbol.name for symbol in self.symbols if self.symbols.size(symbol.name).node.expr in free]

    def integers(self, value: Value, what: str) -> list[int]:
        return [int(each) for each in self.constant(value, what).flatten().tolist()]

    def turned(self, matrix: torch.Tensor) -> torch.Tensor:
        """A constant matrix with rows and columns exchanged, once for all its readers."""
        if id(matrix) not in self._turned:
            name = self._named[id(matrix)][1] if id(matrix) in self._named else f"constant_{len(self._named)}"
            self._turned[id(matrix)] = self.name_constant(matrix.T.contiguous(), self._module_weight(name) or f"{name}.T")
            self._named.setdefault(id(matrix), (matrix, f"{name}.whole"))  # its identity stays its own while it is kept
        return self._turned[id(matrix)]

    def placed(self, matrix: torch.Tensor) -> torch.Tensor:
        """The matrix as the weight of a layer, which gives it a name where it has none yet that says anything."""
        name = self._named[id(matrix)][1] if id(matrix) in self._named else f"constant_{len(self._named)}"
        better = self._module_weight(name)
        if better and name not in self._weight_nodes:
            self.name_constant(matrix, better)
        return matrix

    def _module_weight(self, name: str) -> str:
        """`layers.0.q_proj.weight` for a weight whose own name is made up; "" where that says more, or the file tells no module."""
        if not self.module or not is_made_up(name):
            return ""
        modules = (self.module if number == 1 else f"{self.module}_{number}" for number in count(1))
        return next(each for module in modules if (each := f"{module}.weight") not in self._names)

    # --- calls ----------------------------------------------------------------------------------------------------------------

    def call(self, target: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """The result of a call: a constant where all operands are, else a node, or a tuple of either.

        Raises:
            Unsupported: the call does not type-check.
        """
        operands = _leaves((args, list(kwargs.values())))
        if not any(isinstance(each, Node | Size | np.ndarray) for each in operands):
            folded = self._folded(target, args, kwargs)
            if folded is not None:
                return folded
        args, kwargs = self._as_nodes(args), {key: self._as_nodes(value) for key, value in kwargs.items()}
        node = self._add(target, args, kwargs)
        value = node.meta["val"]
        if isinstance(value, tuple):
            return tuple(self._add(GETITEM, (node, index), {}) for index in range(len(value)))
        if isinstance(value, torch.SymInt | int) and not isinstance(value, bool):
            return size_of(node, self.symbols)
        return node

    def _folded(self, target: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        if self._is_large(target, args, kwargs):
            return None
        try:
            with torch.no_grad():
                result = target(*args, **kwargs)
        except Exception as error:
            raise Unsupported(f"{name_of(target)} fails on constants: {first_line(error)}") from error
        results = result if isinstance(result, tuple | list) else [result]
        if sum(each.numel() for each in results if isinstance(each, torch.Tensor)) > _MOST_FOLDED:
            return None
        return tuple(result) if isinstance(result, tuple | list) else result

    def _is_large(self, target: Callable[..., Any], args: Any, kwargs: Any) -> bool:
        """Whether types alone say that a result is no constant: a few bytes of a file may ask for gigabytes."""
        if target is torch.ops.gw.onnx_node.default and -1 in args[1]:  # of a size that nothing tells before onnxruntime has made it
            return True
        operands = _leaves((args, list(kwargs.values())))
        bounds = [abs(each) if isinstance(each, int) else each.numel() for each in operands if isinstance(each, int | torch.Tensor)]
        if math.prod(max(1, bound) for bound in bounds) <= _MOST_FOLDED:
            return False
        try:
            types = infer(self.symbols, target, self._as_types(args), {key: self._as_types(value) for key, value in kwargs.items()})
        except InferenceError:  # what is wrong with it is said where it is computed; and data tell no size that is beyond the operands'
            return False
        return sum(each.numel() for each in tensors_of(types)) > _MOST_FOLDED

    def _as_types(self, value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            return fake_like(self.symbols, value.dtype, value.shape, value.stride(), value.device)
        return type(value)(self._as_types(each) for each in value) if isinstance(value, tuple | list) else value

    def _as_nodes(self, value: Any) -> Any:
        if isinstance(value, Size):
            return value.node
        if isinstance(value, torch.Tensor | np.ndarray):
            return self.node(value)
        if isinstance(value, tuple | list):
            return type(value)(self._as_nodes(each) for each in value)
        return value

    def _add(self, target: Callable[..., Any], args: Any, kwargs: Any) -> Node:
        try:
            return add_call(self.graph, self.symbols, target, args, kwargs, where=self.where)
        except InferenceError as error:
            raise Unsupported(f"{name_of(target)} does not type-check: {self.symbols.named(str(error))}") from error

    # --- what most operators are made of -----------------------------------------------------------------------------------------

    def cast(self, x: Value, dtype: torch.dtype) -> Value:
        if isinstance(x, np.ndarray):
            if dtype in (torch.int64, torch.int32):  # sizes have no width; what is made of them as a tensor is int64
                return x
            x = self.node(x)
        return x if self.dtype(x) == dtype else self.call(aten._to_copy.default, x, dtype=dtype)

    @staticmethod
    def node_or_number(size: Any) -> Any:
        """A size as an argument that is a number."""
        return size.node if isinstance(size, Size) else size

    def reshape(self, x: Value, shape: Sequence[Any]) -> Value:
        return self.call(aten.reshape.default, x, list(shape))

    def permute(self, x: Value, dims: Sequence[int]) -> Value:
        return x if list(dims) == list(range(len(dims))) else self.call(aten.permute.default, x, list(dims))

    def unsqueeze(self, x: Value, dims: Sequence[int]) -> Value:
        """`dims` are those of the result."""
        rank = self.rank(x) + len(dims)
        for dim in sorted(dim % rank for dim in dims):
            x = self.call(aten.unsqueeze.default, x, dim)
        return x

    def narrow(self, x: Value, dim: int, start: Any, length: Any) -> Value:
        return self.call(aten.narrow.default, x, dim, start, length)

    def cat(self, parts: Sequence[Value], dim: int) -> Value:
        return self.call(aten.cat.default, list(parts), dim)

    def full(self, shape: Sequence[Any], value: Any, dtype: torch.dtype) -> Value:
        return self.call(aten.full.default, list(shape), value, dtype=dtype)

    def binary(self, name: str, a: Value, b: Value) -> Value:
        """`aten.<name>` of two tensors of one dtype, a number where the second is a constant of one element."""
        packet = getattr(aten, name)
        if self.dtype(a) in WIDER:
            return self.widened(packet.Tensor, a, b)
        if isinstance(b, torch.Tensor) and b.numel() == 1 and b.dim() <= self.rank(a) and not isinstance(a, torch.Tensor):
            if hasattr(packet, "Scalar") and _is_plain_number(b, self.dtype(a)):
                return self.call(packet.Scalar, a, b.item())
        return self.call(packet.Tensor, a, b)

    def widened(self, target: Callable[..., Any], *operands: Value, **options: Any) -> Value:
        """A call on unsigned integers that torch has no arithmetic for: int64 holds them, and what it gives is taken modulo again.

        Raises:
            Unsupported: they are of 64 bits.
        """
        dtype = self.dtype(operands[0])
        if dtype == torch.uint64:
            raise Unsupported("torch has no arithmetic for unsigned integers of 64 bits")
        result = self.call(target, *[self.cast(each, torch.int64) for each in operands], **options)
        return result if self.dtype(result) == torch.bool else self.cast(result, dtype)

    def add(self, a: Value, b: Value) -> Value:
        return self.binary("add", a, b)

    def sub(self, a: Value, b: Value) -> Value:
        return self.binary("sub", a, b)

    def mul(self, a: Value, b: Value) -> Value:
        return self.binary("mul", a, b)

    def div(self, a: Value, b: Value) -> Value:
        return self.binary("div", a, b)

    def dims(self, axes: Sequence[int], rank: int) -> list[int]:
        """Axes, counted from the end where negative, as dims.

        Raises:
            CaptureError: one is none of `rank` dims.
        """
        if any(not -rank <= axis < max(rank, 1) for axis in axes):
            raise CaptureError(f"axis {next(a for a in axes if not -rank <= a < rank)} is none of a tensor of {rank} dims")
        return [axis % rank if rank else 0 for axis in axes]


def _is_plain_number(value: torch.Tensor, dtype: torch.dtype) -> bool:
    """Whether Python's number is exactly this element, and does not change the result's dtype."""
    return value.dtype == dtype and dtype in (torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int32, torch.int64)


def _leaves(value: Any) -> list[Any]:
    if isinstance(value, tuple | list):
        return [leaf for each in value for leaf in _leaves(each)]
    return [value]
