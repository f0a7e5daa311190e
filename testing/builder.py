"""Builds one program from decisions: leaves, calls whose operands fit, guards that keep values where an operation is defined.

A maker of `testing/ops` asks the builder for operands and calls with them; what does not type-check is dropped, and no node is left of it.
"""

import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx

from ..ir import Node, Symbol, SymbolTable, Weight, Where
from ..ir.build import add_call, add_placeholder, add_weight
from ..ir.infer import InferenceError, contiguous_stride, fake_like, tensors_of
from ..ir.symbols import UNBOUNDED, hint, same_size
from .choices import Choices
from .values import FLOATS, INTEGERS, LIMIT, Value, numel

aten = torch.ops.aten

MAX_ELEMENTS = 2**14  # of one value: a trial runs each call about ten times
INPUT_BOUND = 128.0  # hard inputs have rows 100 away from zero, and normal numbers stay below 6
WEIGHT_BOUND = 3.0
INTEGER_BOUND = 127.0

# Small ones first, since most calls want several dims; 0 and the ends of tiles are where kernels go wrong.
_SIZES = (2, 3, 4, 1, 5, 8, 7, 16, 0, 31, 33, 63, 64, 65, 127, 129, 1000)
_COMMON = 7  # how many of these stand for nine in ten sizes


class Rejected(Exception):
    """What was drawn does not fit; the program is as it was."""


class Builder:
    """A program in the making; `values` are those that later calls may read, in order."""

    def __init__(self, choices: Choices, *, dynamic: bool = False):
        self.choices = choices
        self.graph = fx.Graph()
        self.symbols = SymbolTable()
        self.weights: dict[str, Weight] = {}
        self.values: list[Value] = []
        self.inputs = 0
        self.states: dict[str, Value] = {}  # the new value of each
        self.returned: list[Value] = []  # by main for sure
        self.keeps_unused = False
        self.calls = 0
        self._numbers = torch.Generator().manual_seed(choices.integer(0, 2**31 - 1))
        self._first_call: Node | None = None
        self._dims: list[Any] = [self._dim() for _ in range(3)]  # sizes meet where values share them
        self._dims += self._declared(dynamic)

    def _dim(self) -> int:
        common = not self.choices.chance(10)
        return self.choices.pick(_SIZES[:_COMMON] if common else _SIZES[_COMMON:])

    def _declared(self, dynamic: bool) -> list[Any]:
        """One symbol, or two that stand at one size at capture; none unless `dynamic`, for which as much is decided, so that a program
        shrinks to one without symbols."""
        at_capture, count = self.choices.pick((3, 2, 6, 9)), self.choices.pick((1, 1, 2))
        ends = [self.choices.pick((32, 12, UNBOUNDED)) for _ in range(2)]
        names = ("s0", "s1")[:count] if dynamic else ()
        return [self.symbols.declare(Symbol(name, 2, end, at_capture)) for name, end in zip(names, ends)]

    def symbolic(self) -> list[Any]:
        """The sizes that are symbols."""
        return [self.symbols.size(symbol.name) for symbol in self.symbols]

    # --- shapes and dtypes ---

    def shape(self, low: int = 0, high: int = 4) -> tuple[Any, ...]:
        """Sizes that this program has elsewhere, and others; at most MAX_ELEMENTS in all."""
        rank = self.choices.pick([r for r in (2, 3, 1, 4, 0, 5, 6) if low <= r <= high])
        sizes: list[Any] = []
        for _ in range(rank):
            size = self._dim() if self.choices.chance(20) else self.choices.pick(self._dims)
            sizes.append(size if numel([*sizes, size]) <= MAX_ELEMENTS else 2)
        return tuple(sizes)

    def float_dtype(self) -> torch.dtype:
        return self.choices.pick((*FLOATS[:1] * 4, *FLOATS))

    def integer_dtype(self) -> torch.dtype:
        return self.choices.pick((*INTEGERS[:1] * 4, *INTEGERS))

    def static(self, size: Any) -> int:
        """The size, which an operation must know.

        Raises:
            Rejected: it is known at the call only.
        """
        if not isinstance(size, int):
            raise Rejected
        return size

    def size(self, value: Value, dim: int) -> Any:
        """The size as an argument: a number, or the node that reads it."""
        size = value.shape[dim]
        return size if isinstance(size, int) else self._add(aten.sym_size.int, (value.node, dim % value.rank))

    # --- leaves ---

    def leaf(self, shape: Sequence[Any], dtype: torch.dtype = torch.float32) -> Value:
        """A new input or, where its size is known, perhaps a weight."""
        static = all(isinstance(size, int) for size in shape)
        return self.weight(shape, dtype) if static and self.choices.chance(35) else self.input(shape, dtype)

    def input(self, shape: Sequence[Any], dtype: torch.dtype = torch.float32) -> Value:
        """A new input, whose memory may be laid out in any way that a caller's tensor is."""
        value = fake_like(self.symbols, dtype, shape, self._stride(shape), torch.device("cpu"))
        with self._before_calls():
            node = add_placeholder(self.graph, f"x{self.inputs}", value)
        self.inputs += 1
        return self.put(self._leaf_value(node, INPUT_BOUND))

    def _leaf_value(self, node: Node, bound: float) -> Value:
        dtype = node.meta["val"].dtype
        if dtype == torch.bool:
            return Value(node, 0.0, 1.0)
        return Value(node, -bound, bound) if dtype.is_floating_point else Value(node, 0.0, INTEGER_BOUND)

    def weight(
        self,
        shape: Sequence[Any],
        dtype: torch.dtype = torch.float32,
        *,
        low: float = -WEIGHT_BOUND,
        high: float = WEIGHT_BOUND,
        kind: str = "parameter",
    ) -> Value:
        """A new weight with elements between `low` and `high`; integers are whole ones, `high` included.

        Raises:
            Rejected: a size is known at the call only.
        """
        sizes = [self.static(size) for size in shape]
        if dtype == torch.bool:
            tensor = torch.rand(sizes, generator=self._numbers) < 0.6
            low, high = 0.0, 1.0
        elif dtype.is_floating_point:
            tensor = torch.rand(sizes, generator=self._numbers, dtype=torch.float64).mul(high - low).add(low).to(dtype)
        else:
            low, high = max(low, 0.0), max(high, 0.0)
            tensor = torch.randint(int(low), int(high) + 1, sizes, generator=self._numbers).to(dtype)
        if len(sizes) > 1 and self.choices.chance(10):
            tensor = tensor.transpose(0, 1).contiguous().transpose(0, 1)
        return self.constant(tensor, low, high, kind=kind)

    def constant(self, tensor: torch.Tensor, low: float, high: float, *, kind: str = "buffer") -> Value:
        """A weight that holds `tensor`."""
        weight = Weight.of(f"w{len(self.weights)}", tensor, kind)
        self.weights[weight.name] = weight
        with self._before_calls():
            node = add_weight(self.graph, weight, self.symbols)
        return self.put(Value(node, low, high))

    def state(self, shape: Sequence[int], dtype: torch.dtype = torch.float32) -> Value:
        """A buffer that the program gives a new value; `states` holds that."""
        tensor = torch.rand(tuple(shape), generator=self._numbers, dtype=torch.float64).to(dtype)
        weight = Weight.of(f"state{len(self.states)}", tensor, "state")
        self.weights[weight.name] = weight
        value = fake_like(self.symbols, dtype, weight.shape, weight.stride, weight.device)
        with self._before_calls():
            node = add_placeholder(self.graph, weight.name, value, role="state")
        return self.put(Value(node, 0.0, 1.0))

    def _stride(self, shape: Sequence[Any]) -> tuple[Any, ...]:
        dense = contiguous_stride(shape)
        static = all(isinstance(size, int) for size in shape)
        if not shape or not static or 0 in shape or not self.choices.chance(15):
            return dense
        layout = self.choices.pick(("transposed", "stepped", "stride 0", "channels last"))
        if layout == "transposed" and len(shape) > 1:
            swapped = contiguous_stride([*shape[:-2], shape[-1], shape[-2]])
            return (*swapped[:-2], swapped[-1], swapped[-2])
        if layout == "stepped":
            return tuple(2 * step for step in dense)
        if layout == "stride 0":
            return (0, *dense[1:])
        if layout == "channels last" and len(shape) == 4:
            n, c, h, w = shape
            return (h * w * c, 1, w * c, c)
        return dense

    def _before_calls(self) -> Any:
        return self.graph.inserting_before(self._first_call if self._first_call is not None else self.graph._root)

    # --- operands ---

    def operand(
        self,
        fits: Callable[[Value], bool] = lambda value: value.is_float,
        *,
        low: int = 0,
        high: int = 4,
        dtype: torch.dtype | None = None,
    ) -> Value:
        """A value that `fits`, of a rank from `low` to `high`: a recent one, any, or a new leaf (of `dtype`, else of a floating one)."""
        known = [value for value in reversed(self.values) if low <= value.rank <= high and fits(value)]
        if known and not self.choices.chance(15):
            return self.choices.pick(known[:3]) if self.choices.chance(60) else self.choices.pick(known)
        return self.leaf(self.shape(low, high), dtype or self.float_dtype())

    def integer(self, *, low: int = 0, high: int = 4) -> Value:
        """A value of integers."""
        return self.operand(lambda value: value.is_integer, low=low, high=high, dtype=self.integer_dtype())

    def mask(self, shape: Sequence[Any]) -> Value:
        """Booleans that broadcast to `shape`."""
        known = [value for value in self.values if value.dtype == torch.bool and self.broadcasts(value.shape, shape)]
        return self.choices.pick(known) if known and self.choices.chance(60) else self.leaf(self.broadcastable(shape), torch.bool)

    def partner(self, value: Value, fits: Callable[[Value], bool] = lambda other: other.is_float) -> Value:
        """A value that broadcasts with `value`."""
        known = [other for other in self.values if fits(other) and (self.broadcasts(other.shape, value.shape))]
        if known and self.choices.chance(55):
            return self.choices.pick(known)
        return self.leaf(self.broadcastable(value.shape), value.dtype if not self.choices.chance(15) else self.float_dtype())

    def broadcastable(self, shape: Sequence[Any]) -> tuple[Any, ...]:
        """A shape that broadcasts to `shape`."""
        kept = shape[self.choices.integer(0, len(shape)) if self.choices.chance(40) else 0 :]
        return tuple(1 if self.choices.chance(15) else size for size in kept)

    def broadcasts(self, shape: Sequence[Any], to: Sequence[Any]) -> bool:
        """Whether a value of `shape` broadcasts to `to`."""
        if len(shape) > len(to):
            return False
        return all(same_size(a, b) or a == 1 for a, b in zip(reversed(shape), reversed(to)))

    def like(self, value: Value, fits: Callable[[Value], bool] | None = None) -> Value:
        """A value of the shape and dtype of `value`."""
        known = [
            other
            for other in self.values
            if other.dtype == value.dtype and self.same_shape(other.shape, value.shape) and (fits is None or fits(other))
        ]
        return self.choices.pick(known) if known and self.choices.chance(70) else self.leaf(value.shape, value.dtype)

    def same_shape(self, a: Sequence[Any], b: Sequence[Any]) -> bool:
        return len(a) == len(b) and all(map(same_size, a, b))

    def dim(self, value: Value) -> int:
        """A dim of `value`, counted from either end.

        Raises:
            Rejected: it has none.
        """
        if not value.rank:
            raise Rejected
        return self.choices.integer(-1, value.rank - 1)

    # --- guards ---

    def within(self, value: Value, bound: float) -> Value:
        """`value` with elements of at most `bound`: itself where it is so, else squashed, clamped or scaled."""
        if value.bound <= bound:
            return value
        way = self.choices.pick(("scale", "tanh", "clamp"))
        if way == "tanh" and bound >= 1:
            return self.call(aten.tanh.default, value, low=-1.0, high=1.0)
        if way == "clamp":
            return self.call(aten.clamp.default, value, -bound, bound, low=-bound, high=bound)
        factor = 2.0 ** int(torch.tensor(bound / value.bound).log2().floor())
        return self.call(aten.mul.Scalar, value, factor, low=value.low * factor, high=value.high * factor)

    def positive(self, value: Value, least: float = 0.125) -> Value:
        """`value`, or something made of it, with elements of at least `least`."""
        if value.low >= least:
            return value
        way = self.choices.pick(("abs", "sigmoid", "square"))
        if way == "sigmoid":
            inner = self.call(aten.sigmoid.default, value, low=0.0, high=1.0)
        elif way == "square":
            small = self.within(value, 64.0)
            inner = self.call(aten.mul.Tensor, small, small, low=0.0, high=small.bound**2)
        else:
            inner = self.call(aten.abs.default, value, low=0.0, high=value.bound)
        return self.call(aten.add.Scalar, inner, least, low=least, high=inner.high + least)

    def index(self, value: Value, size: Any) -> Value:
        """The integers of `value` as places in a dim of `size`.

        Raises:
            Rejected: the dim is empty.
        """
        if isinstance(size, int) and size == 0:
            raise Rejected
        wide = value if value.dtype == torch.int64 else self.cast(value, torch.int64)
        if wide.low >= 0 and isinstance(size, int) and wide.high < size:
            return wide
        argument = size if isinstance(size, int) else self.size_node(size)
        if not isinstance(size, int):
            length = self.call(aten.scalar_tensor.default, argument, dtype=torch.int64)
            return self.call(aten.remainder.Tensor, wide, length, low=0.0, high=float(hint(size) - 1))
        return self.call(aten.remainder.Scalar, wide, argument, low=0.0, high=float(size - 1))

    def size_node(self, size: Any) -> Any:
        """A node of the value of a symbolic `size`, read from some value that has it."""
        for value in self.values:
            for dim, own in enumerate(value.shape):
                if not isinstance(own, int) and same_size(own, size):
                    return self.size(value, dim)
        raise Rejected

    def cast(self, value: Value, dtype: torch.dtype) -> Value:
        """`value` in another dtype."""
        if value.dtype == dtype:
            return value
        if dtype == torch.bool:
            return self.call(aten._to_copy.default, value, dtype=dtype, low=0.0, high=1.0)
        if dtype.is_floating_point:
            return self.call(aten._to_copy.default, value, dtype=dtype, low=value.low, high=value.high)
        lowest, highest = float(torch.iinfo(dtype).min), float(torch.iinfo(dtype).max)
        if value.low < lowest or value.high > highest:  # what a float beyond an integer's range becomes is not defined
            value = self.call(aten.clamp.default, value, 0, 100, low=0.0, high=100.0)
        return self.call(aten._to_copy.default, value, dtype=dtype, low=value.low, high=value.high)

    # --- calls ---

    def call(self, target: Any, *args: Any, low: float = -LIMIT, high: float = LIMIT, **kwargs: Any) -> Value:
        """A call whose one result is a tensor with elements from `low` to `high`; values among the arguments stand for their nodes.

        Raises:
            Rejected: it does not type-check, or is too large.
        """
        node = self._add(target, args, kwargs)
        if not isinstance(node.meta["val"], torch.Tensor):
            raise Rejected
        return self.put(Value(node, low, high))

    def calls_of(self, target: Any, *args: Any, bounds: Sequence[tuple[float, float]] | None = None, **kwargs: Any) -> list[Value]:
        """A call of several results, with the intervals of `bounds`; some or all of them are taken out.

        Raises:
            Rejected: as for `call`.
        """
        node = self._several(target, args, kwargs)
        wanted = self.choices.subset(range(len(node.meta["val"])), 60) or [0]
        return self._taken_out(node, wanted, bounds)

    def all_of(self, target: Any, *args: Any, bounds: Sequence[tuple[float, float]] | None = None, **kwargs: Any) -> list[Value]:
        """As `calls_of`, with every result taken out."""
        node = self._several(target, args, kwargs)
        return self._taken_out(node, range(len(node.meta["val"])), bounds)

    def _several(self, target: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Node:
        node = self._add(target, args, kwargs)
        if not isinstance(node.meta["val"], tuple) or not node.meta["val"]:
            raise Rejected
        return node

    def _taken_out(self, node: Node, places: Sequence[int], bounds: Sequence[tuple[float, float]] | None) -> list[Value]:
        each = [(-LIMIT, LIMIT)] if bounds is None else bounds
        return [self.put(Value(self._add(operator.getitem, (node, place)), *each[place % len(each)])) for place in places]

    def size_call(self, target: Any, *args: Any) -> Node:
        """Arithmetic on sizes.

        Raises:
            Rejected: as for `call`.
        """
        return self._add(target, args)

    def check(self, target: Any, *args: Any, **kwargs: Any) -> None:
        """A call for what it asserts, without a result.

        Raises:
            Rejected: as for `call`.
        """
        self._add(target, args, kwargs)

    def put(self, value: Value) -> Value:
        self.values.append(value)
        return value

    def _add(self, target: Any, args: Sequence[Any], kwargs: dict[str, Any] | None = None) -> Node:
        plain_args, plain_kwargs = _plain(tuple(args)), _plain(dict(kwargs or {}))
        try:
            node = add_call(
                self.graph, self.symbols, target, plain_args, plain_kwargs, origin=(self.calls,), where=Where("program.py", self.calls + 1)
            )
        except InferenceError as error:
            raise Rejected(str(error)) from error
        if any(numel(tensor.shape) > MAX_ELEMENTS for tensor in tensors_of(node.meta["val"])):
            self.graph.erase_node(node)
            raise Rejected("too large")
        self.calls += 1
        if self._first_call is None:
            self._first_call = node
        return node


def _plain(value: Any) -> Any:
    if isinstance(value, Value):
        return value.node
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return type(value)(_plain(item) for item in value) if isinstance(value, tuple | list) else value
