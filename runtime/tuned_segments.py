"""Runs of calls between library calls, compiled where that is faster; runs that are alike are compiled once.

Two runs are alike when they are the same calls on operands of the same types: the norms of a network's layers are, whichever weights
they have.
"""

import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx

from ..codegen.cpu_packed import hinted
from ..codegen.cpu_rows import with_rows_spelled_out
from ..ir import Node, SymbolTable
from ..ir.calls import GETITEM
from ..ir.pattern import named_arguments
from ..ir.symbols import hint
from .code_cache import CodeCache
from .flat import FlatGraph
from .probe import Probe
from .segments import AtenLowering, InductorLowering, Segment, computes, cut_out, ends

_log = logging.getLogger(__name__)
Run = Callable[[list[Any]], list[Any]]

aten = torch.ops.aten

_SORTS = (aten.sort.default, aten.sort.stable)
_ARGSORTS = (aten.argsort.default, aten.argsort.stable)
_SAME_ELEMENTS = (
    aten.view.default, aten.reshape.default, aten._unsafe_view.default, aten.unsqueeze.default, aten.squeeze.dim, aten.clone.default,
    aten._to_copy.default,
)  # fmt: skip


class TunedSegments(InductorLowering):
    """Segments by Inductor where the probe finds it faster than each call by its own kernel."""

    form = "rows spelled out"

    def __init__(self, symbols: SymbolTable, probe: Probe, code: CodeCache | None):
        super().__init__(symbols, code)
        self._probe = probe
        self._alike: dict[tuple[Any, ...], Segment | None] = {}

    def compiled_segment(self, nodes: Sequence[Node], lowered: fx.Graph, copies: dict[Node, Node]) -> None:
        inputs, outputs = ends(nodes)
        if nodes[0] in self.left or not computes(outputs, inputs):
            return AtenLowering.segment(self, nodes, lowered, copies)
        key = likeness(nodes, inputs, outputs)
        if key not in self._alike:
            self._alike[key] = self._fastest(cut_out(nodes, inputs, outputs), inputs, str(key))
        compiled = self._alike[key]
        if compiled is None:
            return AtenLowering.segment(self, nodes, lowered, copies)
        self.add_call(compiled, nodes, inputs, outputs, lowered, copies)

    def _fastest(self, graph: fx.Graph, inputs: Sequence[Node], question: str) -> Segment | None:
        """The compiled form of `graph`, None where the kernels of its calls are faster."""
        if self._probe.known("segment", question) == "aten":
            return None
        types = [node.meta["val"] for node in inputs]
        try:
            compiled = Segment(graph, self._compiled(graph, types))
        except Exception as error:  # a compiler that fails on some segment is no reason to have no model
            _log.warning("a segment of %d calls stays with library kernels, Inductor fails on it: %s", len(graph.nodes), error)
            return None
        by_kernels = FlatGraph(graph)
        values = [example_of(node) for node in inputs]
        ways = {"aten": lambda: by_kernels(list(values)), "inductor": lambda: compiled(list(values))}
        with torch.no_grad(), torch._C._DisableAutocast(), torch.random.fork_rng(devices=[]):
            return compiled if self._probe.fastest("segment", question, ways) == "inductor" else None

    def loop(self, graph: fx.Graph, types: Sequence[Any]) -> Run:
        """`graph` compiled as a segment is."""
        return self._compiled(graph, types)

    def _formed(self, graph: fx.Graph) -> fx.Graph:
        return with_rows_spelled_out(graph)


def likeness(nodes: Sequence[Node], inputs: Sequence[Node], outputs: Sequence[Node]) -> tuple[Any, ...]:
    """Equal for two runs that are the same calls on operands of the same types."""
    place = {node: n for n, node in enumerate((*inputs, *nodes))}
    calls = tuple((str(node.target), _written(node.args, place), _written(node.kwargs, place)) for node in nodes)
    return tuple(_type(node.meta["val"]) for node in inputs), calls, tuple(place[node] for node in outputs)


def _written(value: Any, place: dict[Node, int]) -> str:
    return str(fx.map_arg(value, lambda node: f"%{place[node]}"))


def _type(value: Any) -> tuple[str, ...]:
    if not isinstance(value, torch.Tensor):
        return (type(value).__name__, str(value))
    return str(value.dtype), str(value.device), str(tuple(value.shape)), str(value.stride())


def example_of(node: Node) -> Any:
    """A value that a segment can be timed with: `random_like` its type, but the order that a sort gives is one, behind views too, since a
    segment that inverts an order writes only where that points, and reads all."""
    if node.target is GETITEM and node.args[1] == 1 and node.args[0].target in _SORTS:  # type: ignore[union-attr]
        return _orders(node, named_arguments(node.args[0])["dim"])  # type: ignore[arg-type]
    if node.target in _ARGSORTS:
        return _orders(node, named_arguments(node)["dim"])
    if node.target in _SAME_ELEMENTS and isinstance(node.meta["val"], torch.Tensor) and not node.meta["val"].dtype.is_floating_point:
        args, kwargs = fx.map_arg((node.args, node.kwargs), example_of)
        return node.target(*args, **kwargs)  # type: ignore[operator]
    return random_like(node.meta["val"])


def _orders(node: Node, dim: int) -> torch.Tensor:
    """0, 1, .. along `dim`, in the memory of what `node` gives."""
    order = random_like(node.meta["val"])
    if order.dim() and order.numel():
        order.transpose(dim, -1).copy_(torch.arange(order.size(dim), device=order.device))
    return order


def random_like(value: Any) -> Any:
    """A value of that type, symbols at their hints: normal numbers, and zeros where they are whole, which index anything."""
    if not isinstance(value, torch.Tensor):
        return hint(value)
    shape, stride = hinted(value)
    extent = 1 + sum((n - 1) * step for n, step in zip(shape, stride, strict=True)) if 0 not in shape else 0
    memory = torch.zeros(extent, dtype=value.dtype, device=value.device)  # elements of an expanded tensor share theirs
    if value.dtype.is_floating_point:
        memory.normal_(generator=torch.Generator(value.device).manual_seed(0))
    return memory.as_strided(shape, stride)
