"""What a program is: named functions over one weight table, with symbols, schedules and a history.

An `fx.Graph` is the storage of a function and nothing more. Inputs are its placeholders, outputs its output node; the
signature is read off them on demand. Every node carries in `meta`: `val` (its type, a FakeTensor in the program's mode),
`origin` (indices of the captured nodes it came from) and `where` (the user's file, line and module path).
"""

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from .region import Region
from .symbols import Symbol, SymbolTable
from .tree import Tree, flat

Node = fx.Node


@dataclass(frozen=True)
class Where:
    """The user's line behind a node: file relative to its package's root, line, module path (`down.0.attn`)."""

    file: str = ""
    line: int = 0
    module: str = ""

    def __str__(self) -> str:
        place = f"{self.file}:{self.line}" if self.file else ""
        return " ".join(part for part in (place, self.module) if part)


@dataclass(frozen=True)
class Weight:
    """A tensor that the program owns. `kind`: parameter; added, which is a parameter that a pass put beside those of the model, for
    training to find; buffer; constant; state; or record, which no call reads and passes of later need.

    `tensor` is None in a program read from text.
    """

    name: str
    kind: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    device: torch.device
    tensor: torch.Tensor | None = field(default=None, compare=False, repr=False)
    known_digest: str | None = field(default=None, compare=False, repr=False)
    _memo: dict[str, str] = field(default_factory=dict, compare=False, repr=False)

    @staticmethod
    def of(name: str, tensor: torch.Tensor, kind: str = "constant") -> "Weight":
        """The weight that holds `tensor`, shared and not copied; `kind` is parameter, added, buffer, constant, state or record."""
        return Weight(name, kind, tensor.dtype, tuple(tensor.shape), tensor.stride(), tensor.device, tensor)

    @property
    def digest(self) -> str:
        """SHA-256 of dtype, shape and elements in row-major order, hex; "?" when neither elements nor digest are known."""
        if self.known_digest is not None:
            return self.known_digest
        if self.tensor is None:
            return "?"
        if "digest" not in self._memo:
            self._memo["digest"] = content_digest(self.tensor)
        return self._memo["digest"]

    @property
    def nbytes(self) -> int:
        """Of its elements."""
        return self.dtype.itemsize * torch.Size(self.shape).numel()


def content_digest(tensor: torch.Tensor) -> str:
    """SHA-256 over dtype, shape and elements in row-major order."""
    header = f"{tensor.dtype}{list(tensor.shape)}".encode() + b"\0"
    if tensor.numel() == 0:  # whose stride may be 0, which has no view as bytes
        return hashlib.sha256(header).hexdigest()
    return _sha256(header, tensor.detach().to("cpu").contiguous().flatten().view(torch.uint8).numpy())


def _sha256(header: bytes, elements: Any) -> str:
    digest = hashlib.sha256(header)
    digest.update(memoryview(elements))
    return digest.hexdigest()


@dataclass(frozen=True)
class Argument:
    """One leaf of a function's inputs: a tensor, a size, or a constant that the program was captured for."""

    name: str
    role: str  # "input" or "state"
    value: Any  # FakeTensor, SymInt, or the constant

    @property
    def is_constant(self) -> bool:
        return not isinstance(self.value, torch.Tensor | torch.SymInt)


@dataclass(frozen=True)
class Signature:
    """Derived from a function's placeholders and output, never stored beside them."""

    inputs: tuple[Argument, ...]
    states: tuple[Argument, ...]
    outputs: tuple[Any, ...]
    new_states: tuple[str, ...]


@dataclass
class Function:
    """A graph with the nesting of its inputs `(args, kwargs)` and outputs."""

    name: str
    graph: fx.Graph
    in_tree: Tree
    out_tree: Tree

    @property
    def placeholders(self) -> list[Node]:
        """Its inputs and states, in order."""
        return [node for node in self.graph.nodes if node.op == "placeholder"]

    @property
    def calls(self) -> list[Node]:
        """Its calls in order, those inside of regions left out."""
        return [node for node in self.graph.nodes if node.op == "call_function"]

    @property
    def outputs(self) -> tuple[Any, ...]:
        """What it returns, flat: results, nodes or plain values, then the new states."""
        return tuple(self.graph.output_node().args[0])

    def signature(self) -> Signature:
        """Inputs, states, results and new states with their types, derived from the graph each time."""
        arguments = [Argument(str(node.target), node.meta.get("role", "input"), node.meta["val"]) for node in self.placeholders]
        output = self.graph.output_node()
        new_states = tuple(output.meta.get("new_states", ()))
        values = tuple(leaf.meta["val"] if isinstance(leaf, Node) else leaf for leaf in self.outputs)
        return Signature(
            inputs=tuple(a for a in arguments if a.role == "input"),
            states=tuple(a for a in arguments if a.role == "state"),
            outputs=values[: len(values) - len(new_states)],
            new_states=new_states,
        )


@dataclass(frozen=True)
class Stage:
    """One entry of a program's history: the pass as pipelines spell it, and what it was made from."""

    pipeline: str
    source: "Program | None" = field(default=None, repr=False, compare=False)


class Program:
    """A model as the compiler sees it. Change it through a `Rewriter` only; `str(program)` is its text.

    Two programs are equal when their texts are: same functions, symbols, weights (by content), schedules and history.
    """

    def __init__(
        self,
        functions: Iterable[Function],
        weights: dict[str, Weight],
        symbols: SymbolTable,
        schedules: dict[str, Any] | None = None,
        history: tuple[Stage, ...] = (),
    ):
        self.functions = {function.name: function for function in functions}
        self.weights = weights
        self.symbols = symbols
        self.schedules = dict(schedules or {})
        self.history = history

    @property
    def main(self) -> Function:
        """The function that a call of the compiled model runs."""
        return self.functions["main"]

    @property
    def pipeline(self) -> str:
        """The passes that made this program, in order."""
        return ",".join(stage.pipeline for stage in self.history)

    def copy(self) -> "Program":
        """An independent program over the same weights. Metadata and regions are immutable and shared."""
        functions = [Function(f.name, copy_graph(f.graph), f.in_tree, f.out_tree) for f in self.functions.values()]
        return Program(functions, dict(self.weights), self.symbols, self.schedules, self.history)

    def used_symbols(self) -> list[Symbol]:
        """The symbols that sizes of its functions' inputs are made of, as they were declared; its table may know more, which programs
        made from this one have."""
        sizes = [
            size
            for function in self.functions.values()
            for source in function.placeholders
            for size in (source.meta["val"].shape if isinstance(source.meta["val"], torch.Tensor) else [source.meta["val"]])
            if isinstance(size, torch.SymInt)
        ]
        expressions = {symbol for size in sizes for symbol in size.node.expr.free_symbols}
        return [symbol for symbol in self.symbols if self.symbols.size(symbol.name).node.expr in expressions]

    def nodes(self) -> Iterator[Node]:
        """Every node of every function, regions included, in order."""
        for function in self.functions.values():
            yield from walk(function.graph)

    def __str__(self) -> str:
        from .printer import print_program

        return print_program(self)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Program) and str(self) == str(other)

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        calls = sum(len(f.calls) for f in self.functions.values())
        return f"<Program: {len(self.functions)} functions, {calls} calls, {len(self.weights)} weights, {len(self.symbols)} symbols>"


def walk(graph: fx.Graph) -> Iterator[Node]:
    """The nodes of `graph` and, after each region call, those of its body."""
    for node in graph.nodes:
        yield node
        body = region_of(node)
        if body is not None:
            yield from walk(body.graph)


def region_of(node: Node) -> Region | None:
    """The body of a region call, None for any other node."""
    first = node.args[0] if node.op == "call_function" and node.args else None
    return first if isinstance(first, Region) else None


def copy_graph(graph: fx.Graph) -> fx.Graph:
    """A graph with equal nodes in equal order, `meta` shallow-copied."""
    result = fx.Graph()
    copies: dict[Node, Node] = {}
    for node in graph.nodes:
        copies[node] = result.node_copy(node, copies.__getitem__)
    return result


def new_function(name: str, graph: fx.Graph) -> Function:
    """A function whose inputs and outputs are flat tuples."""
    inputs = sum(node.op == "placeholder" and node.meta.get("role", "input") == "input" for node in graph.nodes)
    outputs = len(graph.output_node().args[0]) - len(graph.output_node().meta.get("new_states", ()))
    return Function(name, graph, Tree("tuple", (flat(inputs), Tree("dict"))), flat(outputs))
