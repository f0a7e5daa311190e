"""What one call runs, kernel by kernel: which calls of the program each computes, the bytes that it reads and writes, its time, and
what was emitted for it."""

from collections.abc import Iterator, Sequence
from typing import Any

from torch import fx

from ..codegen.library_call import LibraryCall
from ..explorer.story import KernelRun
from ..ir import Node, Program
from ..ir.calls import name_of
from ..ir.infer import storage_key, tensors_of
from ..ir.printer import node_lines
from ..ir.program import Function, walk
from ..ir.symbols import SymbolTable, hint
from ..ir.tree import Tree, flat
from .flat import Boxed
from .sliced import SlicedRun

_MOST_LINES = 400  # of the operations that a compiler was given
_MOST_EMITTED = 2000  # of what it made of them


def kernel_runs(program: Program, function: str, calls: Sequence[Node], seconds: Sequence[float] | None = None) -> tuple[KernelRun, ...]:
    """The kernels of the lowered `calls`, in order; views, which move nothing and take no time worth telling, are left out."""
    finder = _Finder(program.functions[function].graph)
    times = [None] * len(calls) if seconds is None else seconds
    runs = (_run(node, finder, program.symbols, time) for node, time in zip(calls, times, strict=True))
    return tuple(run for run in runs if run.nbytes or run.kind != "library")


def _run(node: Node, finder: "_Finder", symbols: SymbolTable, seconds: float | None) -> KernelRun:
    from ..codegen.triton.launch import Launch

    target: Any = node.target
    nbytes, nodes = bytes_moved(node), finder.nodes(node)
    if isinstance(target, Launch):
        kernel = target.kernel
        return KernelRun(kernel.name, "triton", nodes, kernel.roofline.bytes_moved, kernel.source, "python", seconds)
    if isinstance(target, Boxed):
        shown = _shown(target.graph, symbols)
        return KernelRun(f"{len(nodes)} calls in one", "compiled", nodes, nbytes, shown, "ir", seconds, emitted_for(target))
    if isinstance(target, SlicedRun):
        body = target.call.body.graph
        name = f"gw.sliced, {sum(each.op == 'call_function' for each in body.nodes)} calls a slice"
        return KernelRun(name, "region", nodes, nbytes, _shown(body, symbols), "ir", seconds, emitted_for(target))
    name = str(target) if isinstance(target, LibraryCall) else _name(target)
    return KernelRun(name, "library", nodes, nbytes, seconds=seconds)


def emitted_for(target: Any) -> str:
    """The C++ of a compiled piece, or of a region's body for the first length of its slices; "" where library kernels run."""
    bodies = [body for body, _ in target.compiled[:1]] if isinstance(target, SlicedRun) else [getattr(target, "run", None)]
    lines = "".join(getattr(body, "source", "") for body in bodies).splitlines()
    more = [f"// .. {len(lines) - _MOST_EMITTED} more lines"] if len(lines) > _MOST_EMITTED else []
    return "\n".join([*lines[:_MOST_EMITTED], *more])


def _name(target: Any) -> str:
    try:
        return name_of(target)
    except (KeyError, TypeError):
        return getattr(target, "__name__", type(target).__name__)


def _shown(graph: fx.Graph, symbols: SymbolTable) -> str:
    """The operations of a graph as the IR's text has them; "" where they are none of the IR."""
    inputs = sum(node.op == "placeholder" for node in graph.nodes)
    function = Function("piece", graph, Tree("tuple", (flat(inputs), Tree("dict"))), flat(1))
    try:
        lines = list(node_lines(function, symbols).values())
    except (KeyError, TypeError):
        return ""
    more = [f"  .. {len(lines) - _MOST_LINES} more"] if len(lines) > _MOST_LINES else []
    return "\n".join([*lines[:_MOST_LINES], *more])


def bytes_moved(node: Node) -> int:
    """Bytes of the operands and of the results of a call, symbols at their hints; 0 for a view, whose results lie in its operands."""
    operands = {storage_key(tensor): tensor for operand in node.all_input_nodes for tensor in tensors_of(operand.meta.get("val"))}
    made = [tensor for tensor in tensors_of(node.meta.get("val")) if storage_key(tensor) not in operands]
    return sum(_nbytes(tensor) for tensor in (*operands.values(), *made)) if made else 0


def _nbytes(tensor: Any) -> int:
    return hint(tensor.numel()) * tensor.element_size()


class _Finder:
    """Which calls of a function a lowered call computes: those of its operation and its origin, of several the first that was not found."""

    def __init__(self, graph: fx.Graph):
        self._exact: dict[Any, list[Node]] = {}
        self._by_origin: dict[Any, list[Node]] = {}
        for node in walk(graph):
            if node.op == "call_function":
                origin = node.meta.get("origin", ())
                self._exact.setdefault((node.target, origin), []).append(node)
                self._by_origin.setdefault(origin, []).append(node)

    def nodes(self, lowered: Node) -> tuple[Node, ...]:
        return tuple(found for each in _computed(lowered) if (found := self._found(each)) is not None)

    def _found(self, node: Node) -> Node | None:
        origin = node.meta.get("origin", ())
        exact = self._exact.get((node.target, origin))
        if exact:
            return exact.pop(0) if len(exact) > 1 else exact[0]
        others = self._by_origin.get(origin) if origin else None
        return others[-1] if others else None


def _computed(node: Node) -> Iterator[Node]:
    """The calls of a compiled piece, else the call itself."""
    target: Any = node.target
    if isinstance(target, Boxed):
        yield from (each for each in target.graph.nodes if each.op == "call_function")
    else:
        yield node
