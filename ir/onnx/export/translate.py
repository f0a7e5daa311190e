"""ATen to ONNX by torch's exporter: graphs in, ONNX values and nodes out.

Several graphs go through it as one that holds them side by side, since it takes a second to start, and each comes back by itself. Their
inputs are tensors alone: weights and constants get their values where a model is put together. torch's optimizer does not run, which turns
constants below 1e-8 into nothing.
"""

import io
import logging
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import fx
from torch.export import ExportedProgram
from torch.export.exported_program import ModuleCallEntry, ModuleCallSignature
from torch.export.graph_signature import ExportGraphSignature, InputKind, InputSpec, OutputKind, OutputSpec, SymIntArgument, TensorArgument

from ...calls import name_of
from ...errors import CaptureError
from ...program import Node, Where
from . import data_sites
from .translations import translations

_MARK = "graphwright node "


@dataclass
class Piece:
    """A graph of placeholders, calls of ATen and sites, and `outputs`. `constants` are the values of placeholders that are no inputs,
    each with its name; `names` are those of the inputs."""

    graph: fx.Graph = field(default_factory=fx.Graph)
    inputs: list[Node] = field(default_factory=list)
    names: list[str] = field(default_factory=list)
    constants: dict[Node, tuple[str, torch.Tensor]] = field(default_factory=dict)
    outputs: list[Node] = field(default_factory=list)

    def input(self, name: str, value: Any) -> Node:
        self.inputs.append(self._placeholder(value))
        self.names.append(name)
        return self.inputs[-1]

    def constant(self, name: str, tensor: torch.Tensor, value: Any) -> Node:
        node = self._placeholder(value)
        self.constants[node] = (name, tensor)
        return node

    def call(self, target: Any, args: Any, kwargs: Any, value: Any, origin: Node | None) -> Node:
        """A call of type `value`, made for `origin` of the program."""
        node = self.graph.call_function(target, args, kwargs)
        node.meta.update(val=value, origin_call=origin)
        return node

    def _placeholder(self, value: Any) -> Node:
        node = self.graph.placeholder(f"x{len(self.inputs) + len(self.constants)}")
        node.meta["val"] = value
        return node


@dataclass(frozen=True)
class Translated:
    """The ONNX form of a piece: values of its inputs and constants, in order, and of its outputs, and nodes."""

    inputs: list[Any]
    constants: list[Any]
    outputs: list[Any]
    nodes: list[Any]


def translate(pieces: Sequence[Piece], opset: int) -> list[Translated]:
    """Each piece in ONNX. Metadata of a node say which call it came from: `meta["origin_call"]` of nodes of a piece.

    Raises:
        CaptureError: an operator has no ONNX form; the message names it and the user's line.
    """
    graph, spans, origins = _joined(pieces)
    exported = _exported(graph)
    table = {**translations(), torch.ops.gw_export.site.default: data_sites.translated}
    try:
        with quiet():
            model = torch.onnx.export(
                exported, dynamo=True, optimize=False, verbose=False, opset_version=opset, custom_translation_table=table
            ).model
    except Exception as error:
        raise _explained(error, pieces) from error
    values, results = list(model.graph.inputs), list(model.graph.outputs)
    nodes = list(model.graph)
    model.graph.inputs.clear()
    model.graph.outputs.clear()
    model.graph.remove(nodes)
    for node in nodes:
        mark = node.metadata_props.get("pkg.torch.onnx.stack_trace", "")
        origin = origins[int(mark.removeprefix(_MARK))] if mark.startswith(_MARK) else None
        node.metadata_props.clear()
        node.metadata_props.update(_provenance(origin))
    return _split(pieces, spans, values, results, nodes)


def _provenance(origin: Node | None) -> dict[str, str]:
    """What an ONNX node says of the call that it came from."""
    if origin is None:
        return {}
    where = origin.meta.get("where") or Where()
    line = f"{where.file}:{where.line}" if where.file else ""
    found = {"graphwright.op": name_of(origin.target), "graphwright.line": line, "graphwright.module": where.module}
    return {key: text for key, text in found.items() if text}


# --- in --------------------------------------------------------------------------------------------------------------------------


def _joined(pieces: Sequence[Piece]) -> tuple[fx.Graph, list[tuple[int, int]], list[Node | None]]:
    """One graph of all; of each piece where its inputs and outputs end among those of all; and the calls that marks are numbers of."""
    graph, copies, spans, origins = fx.Graph(), dict[Node, Node](), [], list[Node | None]()
    sources = [source for piece in pieces for source in (*piece.inputs, *piece.constants)]
    for number, source in enumerate(sources):
        copies[source] = graph.placeholder(f"x{number}")
        copies[source].meta["val"] = source.meta["val"]
    outputs: list[Node] = []
    ends = 0
    for piece in pieces:
        for node in piece.graph.nodes:
            if node.op == "call_function":
                copies[node] = graph.node_copy(node, copies.__getitem__)
                # What torch keeps of a node through its decompositions is where it stood in a file; the exporter writes it down.
                copies[node].meta = {"val": node.meta["val"], "stack_trace": f"{_MARK}{len(origins)}"}
                origins.append(node.meta.get("origin_call"))
        for leaf in piece.outputs:
            outputs.append(_own(graph, copies[leaf], outputs))
        ends += len(piece.inputs) + len(piece.constants)
        spans.append((ends, len(outputs)))
    graph.output(tuple(outputs))
    return graph, spans, origins


def _own(graph: fx.Graph, node: Node, others: list[Node]) -> Node:
    """An output of its own: ONNX has no graph that returns an input, or one value twice."""
    if node.op == "call_function" and node not in others:
        return node
    if not isinstance(node.meta["val"], torch.Tensor):
        return node
    copy = graph.call_function(torch.ops.aten.clone.default, (node,))
    copy.meta = {"val": node.meta["val"]}
    return copy


def _exported(graph: fx.Graph) -> ExportedProgram:
    """The graph as torch's exporter takes it. ExportedProgram's constructor is not documented; its parts are those of torch 2.11 to
    2.13."""
    sources = [node for node in graph.nodes if node.op == "placeholder"]
    leaves = list(graph.output_node().args[0])
    inputs = [InputSpec(InputKind.USER_INPUT, _argument(node), None) for node in sources]
    outputs = [OutputSpec(OutputKind.USER_OUTPUT, _argument(node), None) for node in leaves]
    in_spec = pytree.tree_structure(((0,) * len(sources), {}))
    calls = [ModuleCallEntry("", ModuleCallSignature([], [], in_spec, pytree.tree_structure((0,) * len(leaves))))]
    return ExportedProgram(
        root=torch.nn.Module(),
        graph=graph,
        graph_signature=ExportGraphSignature(inputs, outputs),
        state_dict={},
        range_constraints={},
        module_call_graph=calls,
        constants={},
    )


def _argument(node: Node) -> Any:
    return TensorArgument(node.name) if isinstance(node.meta["val"], torch.Tensor) else SymIntArgument(node.name)


@contextmanager
def quiet() -> Iterator[None]:
    """The exporter logs what it lacks (torchvision), warns of sizes in arguments, and prints where it is."""
    disabled = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)


def _explained(error: Exception, pieces: Sequence[Piece]) -> CaptureError:
    """The exporter's error as ours: it names the graph's node, whose origin says the user's line."""
    text = _text(error)
    targets: dict[str, list[Where]] = {}
    for piece in pieces:
        for node in piece.graph.nodes:
            origin = node.meta.get("origin_call")
            if node.op == "call_function" and origin is not None:
                targets.setdefault(str(node.target).removeprefix("torch.ops."), []).append(origin.meta.get("where") or Where())
    named = next((name for name in sorted(targets, key=len, reverse=True) if name in text or name.removesuffix(".default") in text), None)
    if named is None:
        return CaptureError(f"torch's exporter does not translate this program to ONNX: {_last_line(text)}")
    where = next((str(each) for each in targets[named] if str(each)), "")
    return CaptureError(f"{named}" + (f" at {where}" if where else "") + f" has no ONNX form: {_last_line(text)}")


def _text(error: BaseException | None) -> str:
    lines = []
    while error is not None:
        lines.append(f"{type(error).__name__}: {error}")
        error = error.__cause__
    return "\n".join(lines)


def _last_line(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return next((line for line in lines if "No ONNX function found" in line or "No decompositions" in line), lines[-1])[:300]


# --- out -------------------------------------------------------------------------------------------------------------------------


def _split(
    pieces: Sequence[Piece], spans: Sequence[tuple[int, int]], values: list[Any], results: list[Any], nodes: list[Any]
) -> list[Translated]:
    """Nodes to the piece that reads them; a constant that several read is copied."""
    place = {id(node): index for index, node in enumerate(nodes)}
    owned: set[int] = set()
    parts, begin, first = [], 0, 0
    for piece, (end, last) in zip(pieces, spans, strict=True):
        inputs, outputs = values[begin:end], results[first:last]
        mine = _reached(outputs, inputs, owned, place)
        owned |= mine.keys()
        middle = len(piece.inputs)
        ordered = sorted(mine.values(), key=lambda node: place[id(node)])
        parts.append(Translated(inputs[:middle], inputs[middle:], outputs, ordered))
        begin, first = end, last
    return parts


def _reached(outputs: list[Any], inputs: list[Any], owned: set[int], place: dict[int, int]) -> dict[int, Any]:
    """The nodes behind `outputs`, by identity; those that another piece owns are copied."""
    mine: dict[int, Any] = {}
    copies: dict[int, Any] = {}
    own_inputs = {id(value) for value in inputs}
    pending = [producer for output in outputs if (producer := output.producer()) is not None]
    while pending:
        node = pending.pop()
        if id(node) in mine:
            continue
        mine[id(node)] = node
        for index, value in enumerate(node.inputs):
            if value is None or id(value) in own_inputs:
                continue
            producer = value.producer()
            assert producer is not None, "a piece reads nothing of another's inputs"
            if id(producer) in owned:
                copy = copies.get(id(producer)) or _copied(producer, place)
                copies[id(producer)] = copy
                node.replace_input_with(index, copy.outputs[value.index()])
                producer = copy
            pending.append(producer)
    return mine


def _copied(node: Any, place: dict[int, int]) -> Any:
    import onnx_ir as ir

    copy = ir.Node(node.domain, node.op_type, node.inputs, node.attributes.values(), num_outputs=len(node.outputs), version=node.version)
    place[id(copy)] = place[id(node)]
    return copy
