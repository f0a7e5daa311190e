"""From an ONNX model to a Program: its inputs, initializers and outputs; what is between them is read by `nodes.py`."""

import re
from collections import Counter
from pathlib import Path
from typing import Any

import torch

from ..build import set_outputs
from ..derive import drop_unused
from ..errors import ArtifactError, CaptureError, GraphwrightError, InputError
from ..infer import contiguous_stride, fake_like
from ..parser import is_symbol_name
from ..program import Function, Node, Program
from ..symbols import UNBOUNDED, Symbol, SymbolTable
from ..tree import LEAF, Tree, flat
from .builder import Builder, Unsupported
from .dtypes import torch_dtype
from .nodes import Nodes
from .reading import Tensors, read_model
from .scope import Scope, domain_of, shown

_OPSETS = range(7, 29)
# Sizes at capture, by which questions about symbolic sizes are answered: multiples of this, since networks halve images and double them
# again; from 256 on, since windows of audio are as long, and no more than what tables of positions commonly have.
_HINT = 64


def read(model: Any, sizes: dict[str, int], constants: dict[str, torch.Tensor], folder: "str | Path | None") -> Program:
    """As `from_onnx`."""
    if isinstance(model, str | Path):
        read_from, model = model, read_model(model)
        folder = Path(read_from).resolve().parent  # it is a file: a name without one, or a link to itself, has no folder
    importer = _Importer(model, sizes, constants, None if folder is None else Path(folder))
    try:
        return importer.program()
    except GraphwrightError:
        raise
    except Exception as error:  # whatever the package and the readers raise for fields of other types and sizes than an operator has
        at = f" at {importer.builder.where.module}" if importer.builder.where.module else ""
        reason = f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0][:200]}"
        raise ArtifactError(f"the model is malformed{at}: what stands there is not what the operator takes ({reason})") from error


class _Importer:
    def __init__(self, model: Any, sizes: dict[str, int], constants: dict[str, torch.Tensor], folder: Path | None):
        self.model, self.sizes, self.constants = model, sizes, constants
        self.symbols = SymbolTable()
        self.builder = Builder(self.symbols)
        self.tensors = Tensors(folder)
        self.nodes = Nodes(self.builder, self.tensors, {(domain_of(f.domain), f.name, f.overload): f for f in model.functions})
        self.unnamed = 0
        self.taken: set[str] = set()  # names of inputs

    def program(self) -> Program:
        graph = self.model.graph
        opsets = {domain_of(each.domain): each.version for each in self.model.opset_import}
        if opsets.get("", 21) not in _OPSETS:
            raise CaptureError(f"the model is of opset {opsets['']}, and {_OPSETS.start} to {_OPSETS.stop - 1} are read")
        scope = Scope(opsets)
        self.nodes.declared = {each.name: each.type for each in (*graph.value_info, *graph.output)}
        self._read_initializers(graph, scope)
        _check_names([each.name for each in graph.input])
        self._fix_inputs(graph, scope)
        inputs = [each for each in graph.input if each.name not in scope.values]
        for each in inputs:
            scope.values[each.name] = self._input(each)
        self.nodes.read(graph.node, scope)
        outputs = [self._output(scope, each) for each in graph.output]
        set_outputs(self.builder.graph, outputs)
        drop_unused(self.builder.graph)
        self._number_calls()
        used = {str(node.target) for node in self.builder.graph.nodes if node.op == "get_attr"}
        weights = {name: weight for name, weight in self.builder.weights.items() if name in used}
        in_tree = Tree("tuple", (flat(len(inputs)), Tree("dict")))
        main = Function("main", self.builder.graph, in_tree, LEAF if len(outputs) == 1 else flat(len(outputs)))
        return Program([main], weights, self.symbols)

    def _number_calls(self) -> None:
        calls = [node for node in self.builder.graph.nodes if node.op == "call_function"]
        for index, node in enumerate(calls):
            node.meta["origin"] = (index,)

    # --- inputs, outputs, constants -------------------------------------------------------------------------------------------

    def _input(self, info: Any) -> Node:
        kind = info.type.WhichOneof("value")
        if kind != "tensor_type" or not info.type.tensor_type.HasField("shape"):
            what = "a tensor of unknown rank" if kind == "tensor_type" else str(kind or "of no type").removesuffix("_type")
            raise CaptureError(f"input {shown(info.name)} is {what}: a program takes tensors whose number of dims is known")
        tensor = info.type.tensor_type
        shape = [self._dim(dim) for dim in tensor.shape.dim]
        value = fake_like(self.symbols, torch_dtype(tensor.elem_type), shape, contiguous_stride(shape), torch.device("cpu"))
        return self.builder.input(self._identifier(info.name), value)

    def _identifier(self, name: str) -> str:
        """A name as that of an input: what is no letter or digit becomes _."""
        plain = re.sub(r"[^A-Za-z0-9_]", "_", name)[:128]
        plain = plain if plain and not plain[0].isdigit() else f"input_{plain}"
        while plain in self.taken:
            plain += "_"
        self.taken.add(plain)
        return plain

    def _next_name(self) -> str:
        """s0, s1, .. for the dims without a name, in order."""
        while True:
            name = f"s{self.unnamed}"
            self.unnamed += 1
            if name not in self.symbols:
                return name

    def _fix_inputs(self, graph: Any, scope: Scope) -> None:
        types = {each.name: each.type.tensor_type for each in graph.input}
        for name, tensor in self.constants.items():
            if name not in types:
                raise InputError(f"the model has no input {shown(name)}: it takes {', '.join(map(shown, types))}")
            if torch_dtype(types[name].elem_type) != tensor.dtype:
                raise InputError(f"input {shown(name)} is of {torch_dtype(types[name].elem_type)}, and its constant of {tensor.dtype}")
            scope.values[name] = self.builder.name_constant(tensor, name)

    def _dim(self, dim: Any) -> Any:
        if dim.HasField("dim_value") and dim.dim_value >= 0:  # -1 is how some write that it is dynamic
            return dim.dim_value
        name = dim.dim_param
        if name in self.sizes:
            return self.sizes[name]
        if not is_symbol_name(name) or re.fullmatch(r"u\d+", name):  # u0, u1, .. are torch's names of sizes that data tell
            name = self._next_name()
            if name in self.sizes:
                return self.sizes[name]
        if name in self.symbols:
            return self.symbols.size(name)
        return self.symbols.declare(Symbol(name, 1, UNBOUNDED, _HINT * (4 + len(self.symbols))))

    def _read_initializers(self, graph: Any, scope: Scope) -> None:
        _check_names([each.name for each in graph.initializer])
        if graph.sparse_initializer:
            raise CaptureError("the model has sparse initializers, which have no place in the IR: store them dense")
        for proto in graph.initializer:
            scope.values[proto.name] = self.builder.name_constant(self.tensors.tensor(proto), proto.name)

    def _output(self, scope: Scope, info: Any) -> Node:
        """The node of an output, of the dtype that the model declares: sizes have none of their own."""
        declared = info.type.tensor_type.elem_type
        try:
            node = self.builder.node(scope[info.name])
            return self.builder.node(self.builder.cast(node, torch_dtype(declared))) if declared else node
        except Unsupported as error:
            raise CaptureError(f"output {shown(info.name)} is no tensor: {error}") from error


def _check_names(names: list[str]) -> None:
    if len(set(names)) != len(names):
        twice = next(name for name, count in Counter(names).items() if count > 1)
        raise ArtifactError(f"{shown(twice)} names two inputs or two initializers")
