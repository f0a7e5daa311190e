"""Inductor's C++ for a functional graph: straight from FX, without Dynamo, and boxed, so that inputs die at their last use.

Compiling guesses at dynamic sizes and records what it took for granted; `CompiledGraph` holds these guards against the sizes of
each call and runs ATen where one fails. Symbols are declared anew for it, so that no guess reaches the program. Code for fixed sizes
took nothing for granted, and can be kept.
"""

import warnings
import weakref
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import sympy
import torch
from torch import fx

from ..ir import Node, Symbol, SymbolTable
from ..ir.infer import fake_like
from .inductor_source import cpp_kernels
from .stored_code import restore, source_of, store

Boxed = Callable[[list[Any]], Any]


class Shelf(Protocol):
    """Where the code of one graph is kept, for this version of everything and this machine."""

    def get(self) -> bytes | None: ...

    def put(self, value: bytes) -> None: ...


class CompiledGraph:
    """A graph compiled for inputs of the types `examples` (FakeTensors and SymInts), called with a list that it empties.

    `fallback` runs the same graph for sizes that the compiled code was not made for. What lies on `shelf` is not compiled again.
    """

    def __init__(self, graph: fx.Graph, examples: Sequence[Any], symbols: SymbolTable, fallback: Boxed, shelf: Shelf | None = None):
        self._fallback = fallback
        leaves: Any = graph.output_node().args[0]
        self._strides = [_static_stride(leaf) for leaf in leaves]
        self._guards: list[Any] = []
        self._sizes: list[tuple[Any, int, int | None]] = []
        self._verdicts: dict[tuple[int, ...], bool] = {}
        if not all(map(_is_static, examples)):
            shelf = None
        self._shelf, self._made = shelf, None
        kept = _taken(shelf)
        self._run = self._compiled(graph, examples, symbols, shelf) if kept is None else kept

    def _compiled(self, graph: fx.Graph, examples: Sequence[Any], symbols: SymbolTable, shelf: Shelf | None) -> Boxed:
        fresh = _FreshSymbols(symbols)
        inputs = [fresh.value(example) for example in examples]
        whole, function, self._made = _compile(graph, inputs)
        self._owner = whole  # torch's CompiledFxGraph takes the parts of its function apart when it goes
        self._guards, self._sizes = fresh.guards(), _size_places(inputs)
        code = (
            store(function, cpp_kernels(_written(self._made))) if shelf is not None and function is not None and not self._guards else None
        )
        if shelf is not None and code is not None:
            shelf.put(code)
        return function or whole

    @property
    def source(self) -> str:
        """The kernels of C++ that Inductor wrote; "" where there are none, or where nobody knows them any more."""
        if self._made is not None:
            return cpp_kernels(_written(self._made))
        code = self._shelf.get() if self._shelf is not None else None
        return "" if code is None else source_of(code)

    def __call__(self, arguments: list[Any]) -> list[Any]:
        if self._guards and not self._holds(arguments):
            return self._fallback(arguments)
        passed = [weakref.ref(argument) for argument in arguments if isinstance(argument, torch.Tensor)]
        outputs = list(self._run(arguments))
        return [self._as_typed(n, output) for n, output in enumerate(_distinct(outputs, passed))]

    def _holds(self, arguments: list[Any]) -> bool:
        sizes = tuple(arguments[n] if dim is None else arguments[n].size(dim) for _, n, dim in self._sizes)
        if sizes not in self._verdicts:
            known = {symbol: size for (symbol, _, _), size in zip(self._sizes, sizes, strict=True)}
            self._verdicts[sizes] = all(guard.xreplace(known) == sympy.true for guard in self._guards)
        return self._verdicts[sizes]

    def _as_typed(self, index: int, output: Any) -> Any:
        """Inductor may choose strides; later operations rely on those of the program."""
        stride = self._strides[index]
        if stride is None or all(n <= 1 or a == b for n, a, b in zip(output.shape, output.stride(), stride, strict=True)):
            return output
        return torch.empty_strided(output.shape, stride, dtype=output.dtype, device=output.device).copy_(output)


def _taken(shelf: Shelf | None) -> Boxed | None:
    code = shelf.get() if shelf is not None else None
    if code is None:
        return None
    try:
        return restore(code)
    except Exception:  # libraries that this machine does not load, a full disk for temporary files: it is compiled again
        return None


def _written(made: Any) -> str:
    """The file that Inductor wrote for what it gave."""
    return getattr(made, "source_code", None) or ""


def _compile(graph: fx.Graph, inputs: list[Any]) -> tuple[Boxed, Boxed | None, Any]:
    """The compiled graph; the one function that Inductor wrote for it, None where the graph needs what AOTAutograd puts around that:
    sizes of the call as arguments, writes to inputs from outside, more values than the graph gives; and what Inductor itself gave."""
    from torch._functorch import config as functorch_config
    from torch._inductor import config
    from torch._inductor.compile_fx import compile_fx, compile_fx_inner

    from .inductor_checks import KeepChecks

    made: list[tuple[int, Any]] = []

    def compile_inner(module: fx.GraphModule, *arguments: Any, **keywords: Any) -> Any:
        results: Any = module.graph.output_node().args[0]
        made.append((len(results), compile_fx_inner(module, *arguments, **keywords)))
        return made[-1][1]

    module = fx.GraphModule({}, _boxed(graph))
    options = config.patch(fallback_random=True, post_grad_custom_post_pass=KeepChecks())
    # AOTAutograd's own cache would not ask for a function to be compiled.
    with torch.no_grad(), torch.random.fork_rng(devices=[]), options, functorch_config.patch(enable_autograd_cache=False):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            whole: Any = compile_fx(module, [inputs], inner_compile=compile_inner)  # type: ignore[list-item]
    leaves: Any = graph.output_node().args[0]
    if len(made) != 1 or made[0][0] != len(leaves) or not all(map(_is_static, inputs)):
        return whole, None, made[0][1] if made else None
    # `current_callable` is what torch's CompiledFxGraph calls: what Inductor's file defines, or a wrapper where inputs must be aligned.
    return whole, getattr(made[0][1], "current_callable", None), made[0][1]


def _boxed(graph: fx.Graph) -> fx.Graph:
    """`graph` taking its inputs as one list, which torch empties (`steal_arg`)."""
    result, copies = fx.Graph(), {}
    box = result.placeholder("inputs")
    box.meta["steal_arg"] = True
    index = 0
    for node in graph.nodes:
        if node.op == "placeholder":
            copies[node] = result.call_function(_item, (box, index))
            index += 1
        else:
            copies[node] = result.node_copy(node, copies.__getitem__)
            copies[node].meta = {}
    return result


def _item(values: list[Any], index: int) -> Any:
    return values[index]


class _FreshSymbols:
    """The symbols of a program, declared in a table of their own."""

    def __init__(self, symbols: SymbolTable):
        self.table = SymbolTable()
        self._of = {symbols.size(s.name).node.expr: self.table.declare(Symbol(s.name, s.low, s.high, s.hint)).node.expr for s in symbols}

    def value(self, example: Any) -> Any:
        if isinstance(example, torch.Tensor):
            shape, stride = map(self._size, example.shape), map(self._size, example.stride())
            return fake_like(self.table, example.dtype, shape, stride, example.device)
        return self._size(example)

    def _size(self, size: Any) -> Any:
        if not isinstance(size, torch.SymInt):
            return size
        return self.table.env.create_symintnode(size.node.expr.xreplace(self._of), hint=size.node.hint)

    def guards(self) -> list[Any]:
        """What compiling took for granted about the sizes."""
        env = self.table.env
        fixed = [sympy.Eq(symbol, value) for symbol, value in env.replacements.items()]
        return [*(guard.expr for guard in env.guards), *fixed]


def _size_places(inputs: Sequence[Any]) -> list[tuple[Any, int, int | None]]:
    """(symbol, input, dim) of a place where each symbol stands alone; dim None for an input that is a size."""
    places: dict[Any, tuple[int, int | None]] = {}
    for n, value in enumerate(inputs):
        sizes = list(enumerate(value.shape)) if isinstance(value, torch.Tensor) else [(None, value)]
        for dim, size in sizes:
            if isinstance(size, torch.SymInt) and size.node.expr.is_Symbol:
                places.setdefault(size.node.expr, (n, dim))
    return [(symbol, n, dim) for symbol, (n, dim) in places.items()]


def _distinct(outputs: list[Any], passed: Sequence[Any]) -> list[Any]:
    """Outputs that are the same object as an input, or as another output, as tensors of their own on that memory.

    Inductor drops clones that nobody can tell apart; whoever counts the owners of a storage can.
    """
    seen = {id(tensor) for reference in passed if (tensor := reference()) is not None}
    result = []
    for output in outputs:
        result.append(torch.ops.aten.alias(output) if id(output) in seen and isinstance(output, torch.Tensor) else output)
        seen.add(id(output))
    return result


def _is_static(value: Any) -> bool:
    """Whether a type has no size that is known at the call only."""
    return isinstance(value, torch.Tensor) and all(isinstance(n, int) for n in (*value.shape, *value.stride()))


def _static_stride(leaf: Any) -> tuple[int, ...] | None:
    value = leaf.meta["val"] if isinstance(leaf, Node) else None
    stride = value.stride() if isinstance(value, torch.Tensor) else ()
    return tuple(stride) if isinstance(value, torch.Tensor) and all(isinstance(step, int) for step in stride) else None
