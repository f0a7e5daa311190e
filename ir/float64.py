"""The float64 program of a program: the same function where every float is a float64.

It is the oracle of every numeric check. `model.double()` is none: casts inside the model survive it (measured on three of
seven networks: off by 1e-8 to 2e-7). Here floating inputs, weights, `dtype=` arguments, casts and creation operations all
become float64 (complex ones complex128). Integers, booleans and literals stay: a mask of -3.4e38 stays itself.
"""

import functools
from collections.abc import Callable, Collection, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from .build import add_call, add_placeholder, add_weight, set_outputs
from .calls import name_of
from .derive import ancestors
from .errors import GraphwrightError, InputError
from .infer import InferenceError, fake_like
from .op import declaration
from .pattern import named_arguments
from .program import Function, Node, Program, Weight, Where, new_function
from .region import Region
from .run import run
from .strides import laid_out
from .symbols import SymbolTable

WIDENING = "widening"  # in the meta of a call that the float64 program has beside those of the program
_INTEGERS = {torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8}
_WIDE = {torch.complex64: torch.complex128, torch.complex32: torch.complex128}


class NoFloat64(GraphwrightError):
    """A program has no float64 form: it looks at the bits of a float, or an operation has no float64 implementation."""


@dataclass(frozen=True)
class RoundedWeight(Weight):
    """A weight that a pass computed: `exact()` is its value in float64, of which `tensor` is the rounding.

    Without it a folded constant would freeze the working dtype's rounding into the float64 program, and an exact fold would
    look like an error of 1e-8.
    """

    exact: Callable[[], torch.Tensor] | None = field(default=None, compare=False, repr=False)

    @staticmethod
    def computed(name: str, tensor: torch.Tensor, exact: Callable[[], torch.Tensor], kind: str = "constant") -> "RoundedWeight":
        shape, stride = tuple(tensor.shape), tensor.stride()
        return RoundedWeight(name, kind, tensor.dtype, shape, stride, tensor.device, tensor, exact=exact)


def widened(dtype: torch.dtype) -> torch.dtype:
    """float64 for a floating dtype, complex128 for a complex one, any other itself."""
    return torch.float64 if dtype.is_floating_point else _WIDE.get(dtype, dtype)


class Widening:
    """Makes float64 programs that share their converted weights, so that a program and its rewrites hold each weight once.

    With `keeps_programs` a program that is asked for again is not made again; none may be edited meanwhile.
    """

    def __init__(self, *, keeps_programs: bool = False) -> None:
        self._weights: dict[int, tuple[Weight, Weight]] = {}
        self._programs: dict[int, tuple[Program, Program]] | None = {} if keeps_programs else None

    def program(self, program: Program) -> Program:
        """The float64 program of `program`.

        Raises:
            NoFloat64: it views a float as another dtype bit by bit, or an operation refuses float64.
        """
        if self._programs is None:
            return self._made(program)
        if id(program) not in self._programs:
            self._programs[id(program)] = (program, self._made(program))
        return self._programs[id(program)][1]

    def _made(self, program: Program) -> Program:
        used = {str(node.target) for node in program.nodes() if node.op == "get_attr"}
        states = {name for f in program.functions.values() for name in (s.name for s in f.signature().states)}
        weights = {name: self.weight(weight) for name, weight in program.weights.items() if name in used | states}
        functions = [
            Function(f.name, _GraphWidening(program.symbols, weights).graph(f.graph), f.in_tree, f.out_tree)
            for f in program.functions.values()
        ]
        return Program(functions, weights, program.symbols, program.schedules, program.history)

    def weight(self, weight: Weight) -> Weight:
        known = self._weights.get(id(weight))
        if known is None:
            known = self._weights[id(weight)] = (weight, _wide_weight(weight))
        return known[1]


def to_float64(program: Program) -> Program:
    """The same function with every float a float64; integers, booleans and literals stay.

    Raises:
        NoFloat64: the program views a float as another dtype bit by bit, or an operation refuses float64.
    """
    return Widening().program(program)


def exact_value(weight: Weight) -> torch.Tensor:
    """The weight in float64: what it was rounded from where a pass computed it, else its own elements.

    Raises:
        InputError: the weight has no tensor (a program read from text alone).
    """
    if isinstance(weight, RoundedWeight) and weight.exact is not None:
        return weight.exact()
    if weight.tensor is None:
        raise InputError(f"weight {weight.name} has no values: this program was read from text, give parse() a weight table")
    return weight.tensor.to(widened(weight.dtype))


def computed_weights(program: Program, nodes: Mapping[str, Node]) -> list[RoundedWeight]:
    """What constant `nodes` (name -> node) compute, as weights of those names that remember their float64 values.

    Raises:
        InputError: a weight has no tensor (a program read from text alone).
    """
    part = _part(program, list(nodes.values()))
    values, _ = run(part, [])

    @functools.cache
    def exact() -> list[torch.Tensor]:
        return run(to_float64(part), [])[0]

    return [
        RoundedWeight.computed(name, value, functools.partial(_pick, exact, index))
        for index, (name, value) in enumerate(zip(nodes, values, strict=True))
    ]


def _pick(values: Callable[[], list[torch.Tensor]], index: int) -> torch.Tensor:
    return values()[index]


def _part(program: Program, nodes: list[Node]) -> Program:
    """The program without inputs that returns `nodes`, each of which depends on weights and literals alone."""
    needed = ancestors(nodes)
    graph = fx.Graph()
    copies: dict[Node, Node] = {}
    for node in nodes[0].graph.nodes:
        if node in needed:
            copies[node] = graph.node_copy(node, copies.__getitem__)
    set_outputs(graph, [copies[node] for node in nodes])
    weights = {str(node.target): program.weights[str(node.target)] for node in copies if node.op == "get_attr"}
    return Program([new_function("main", graph)], weights, program.symbols)


def _wide_weight(weight: Weight) -> Weight:
    rounded = isinstance(weight, RoundedWeight) and weight.exact is not None
    if not rounded and widened(weight.dtype) == weight.dtype:
        return weight
    if weight.tensor is None:
        return Weight(weight.name, weight.kind, widened(weight.dtype), weight.shape, weight.stride, weight.device)
    return Weight.of(weight.name, laid_out(exact_value(weight), weight.stride), weight.kind)


class _GraphWidening:
    """Rebuilds one graph; a region's body is rebuilt where its call is."""

    def __init__(self, symbols: SymbolTable, weights: dict[str, Weight]):
        self.symbols = symbols
        self.weights = weights

    def graph(self, source: fx.Graph) -> fx.Graph:
        result = fx.Graph()
        copies: dict[Node, Node] = {}
        for node in source.nodes:
            if node.op == "placeholder":
                copies[node] = add_placeholder(result, str(node.target), self._value(node.meta["val"]), node.meta.get("role", "input"))
            elif node.op == "get_attr":
                copies[node] = add_weight(result, self.weights[str(node.target)], self.symbols)
            elif node.op == "call_function":
                copies[node] = self._call(result, node, copies)
            else:
                leaves = [copies[leaf] if isinstance(leaf, fx.Node) else leaf for leaf in node.args[0]]
                set_outputs(result, leaves, node.meta.get("new_states", ()))
        return result

    def _value(self, value: Any) -> Any:
        if not isinstance(value, torch.Tensor):
            return value
        return fake_like(self.symbols, widened(value.dtype), value.shape, value.stride(), value.device)

    def _call(self, result: fx.Graph, node: Node, copies: dict[Node, Node]) -> Node:
        if _is_bit_view(node):
            raise NoFloat64(f"{_place(node)} looks at the bits of a float, which have no float64 form")
        target: Any = _wide_target(node)
        args, kwargs = fx.map_arg((node.args, node.kwargs), copies.__getitem__)
        args, kwargs = self._wide_arguments(args), self._wide_arguments(kwargs)
        declared = declaration(target)
        if declared is not None and declared.in_float64 is not None:
            kwargs = declared.in_float64(kwargs)
        meta = {"origin": node.meta.get("origin", ()), "where": node.meta.get("where") or Where()}
        try:
            copy = add_call(result, self.symbols, target, args, kwargs, **meta)
            if not _is_wide(copy.meta["val"], node.meta["val"]) and _takes_dtype(target):
                # A creation operation without dtype= makes the default float.
                result.erase_node(copy)
                copy = add_call(result, self.symbols, target, args, {**kwargs, "dtype": widened(node.meta["val"].dtype)}, **meta)
        except InferenceError as error:
            raise NoFloat64(f"{_place(node)} refuses float64: {error}") from error
        if _is_wide(copy.meta["val"], node.meta["val"]):
            return copy
        result.erase_node(copy)
        if target is torch.ops.aten.where.Scalar:
            return self._of_numbers(result, node, args, meta)
        for dtypes in (_INTEGERS, {*_INTEGERS, torch.bool}):
            with suppress(InferenceError):
                return self._on_float64(result, node, target, args, kwargs, dtypes)
        raise NoFloat64(f"{_place(node)} has no float64 implementation")

    def _of_numbers(self, result: fx.Graph, node: Node, args: Any, meta: dict[str, Any]) -> Node:
        """where(mask, 1.0, 0.0), which is in the default float, of numbers that are in float64."""
        options = {"dtype": torch.float64, "device": node.meta["val"].device}
        numbers = [add_call(result, self.symbols, torch.ops.aten.scalar_tensor.default, (number,), options) for number in args[1:]]
        for number in numbers:
            number.meta[WIDENING] = True
        return add_call(result, self.symbols, torch.ops.aten.where.self, (args[0], *numbers), **meta)

    def _on_float64(
        self, result: fx.Graph, node: Node, target: Any, args: Any, kwargs: dict[str, Any], dtypes: Collection[torch.dtype]
    ) -> Node:
        """The call on float64 copies of operands of `dtypes`: of integers alone `i / 3` and `exp(i)` are in the default float.

        Raises:
            InferenceError: it does not type-check, or is no float64 all the same.
        """
        added: list[Node] = []

        def cast(operand: Node) -> Node:
            value = operand.meta["val"]
            if not isinstance(value, torch.Tensor) or value.dtype not in dtypes:
                return operand
            added.append(add_call(result, self.symbols, torch.ops.aten._to_copy.default, (operand,), {"dtype": torch.float64}))
            added[-1].meta[WIDENING] = True
            return added[-1]

        meta = {"origin": node.meta.get("origin", ()), "where": node.meta.get("where") or Where()}
        try:
            wide_args, wide_kwargs = fx.map_arg((args, kwargs), cast)
            copy = add_call(result, self.symbols, target, wide_args, wide_kwargs, **meta)
            added.append(copy)
            if not _is_wide(copy.meta["val"], node.meta["val"]):
                raise InferenceError("it is no float64")
        except InferenceError:
            for made in reversed(added):
                result.erase_node(made)
            raise
        return copy

    def _wide_arguments(self, value: Any) -> Any:
        if isinstance(value, Region):
            return Region(self.graph(value.graph))
        if isinstance(value, torch.dtype):
            return widened(value)
        if isinstance(value, dict):
            return {key: self._wide_arguments(item) for key, item in value.items()}
        if isinstance(value, tuple | list):
            return type(value)(self._wide_arguments(item) for item in value)
        return value


def _wide_target(node: Node) -> Any:
    """The operation itself, or one of ours that is the same and has a float64 form."""
    if node.target is torch.ops.aten._grouped_mm.default:
        named = named_arguments(node)
        if (
            named["bias"] is None
            and named["out_dtype"] is None
            and named["mat2"].meta["val"].dim() == 3 == named["self"].meta["val"].dim() + 1
        ):
            return torch.ops.gw.grouped_mm.default
    return node.target


def _is_wide(value: Any, narrow: Any) -> bool:
    """Whether `value` is what `narrow` becomes: its dtype widened, part by part for several results."""
    if isinstance(narrow, tuple | list):
        return all(_is_wide(v, n) for v, n in zip(value, narrow, strict=True))
    return not isinstance(narrow, torch.Tensor) or value.dtype == widened(narrow.dtype)


def _is_bit_view(node: Node) -> bool:
    if node.target is not torch.ops.aten.view.dtype:
        return False
    arguments = named_arguments(node)
    dtypes = {arguments["self"].meta["val"].dtype, arguments["dtype"]}
    return len(dtypes) > 1 and any(dtype.is_floating_point or dtype.is_complex for dtype in dtypes)


def _takes_dtype(target: Any) -> bool:
    schema = getattr(target, "_schema", None)
    return schema is not None and any(argument.name == "dtype" for argument in schema.arguments)


def _place(node: Node) -> str:
    target: Any = node.target
    where = str(node.meta.get("where") or "")
    return name_of(target) + (f" at {where}" if where else "")
