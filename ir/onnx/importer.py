"""From an ONNX model to a Program: nodes in order, each onto ATen, by the body that the standard gives, or as an opaque operator."""

import functools
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from ..build import set_outputs
from ..derive import drop_unused
from ..errors import ArtifactError, CaptureError, GraphwrightError, InputError
from ..infer import contiguous_stride, fake_like
from ..parser import is_symbol_name
from ..program import Function, Node, Program, Where
from ..symbols import UNBOUNDED, Symbol, SymbolTable
from ..tree import LEAF, Tree, flat
from . import operators  # noqa: F401 - declares the readers
from .builder import Builder, Unsupported, Value
from .dialect import declaration_of, read_call
from .dtypes import torch_dtype
from .opaque import opaque
from .reading import Tensors, read_model
from .registry import READERS, Call

_OPSETS = range(7, 29)
_WRITTEN_FOR = 24  # the opset whose operators' attributes the readers know
_MOST_NESTED = 64
# Sizes at capture, by which questions about symbolic sizes are answered: multiples of this, since networks halve images and double them
# again; from 256 on, since windows of audio are as long, and no more than what tables of positions commonly have.
_HINT = 64


def read(model: Any, sizes: dict[str, int], constants: dict[str, torch.Tensor], folder: "str | Path | None") -> Program:
    """As `from_onnx`."""
    if isinstance(model, str | Path):
        folder, model = Path(model).resolve().parent, read_model(model)
    importer = _Importer(model, sizes, constants, None if folder is None else Path(folder))
    try:
        return importer.program()
    except GraphwrightError:
        raise
    except Exception as error:  # whatever the package and the readers raise for fields of other types and sizes than an operator has
        at = f" at {importer.builder.where.module}" if importer.builder.where.module else ""
        reason = f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0][:200]}"
        raise ArtifactError(f"the model is malformed{at}: what stands there is not what the operator takes ({reason})") from error


class _Scope:
    """Values by name; an inner scope sees those of the outer one."""

    def __init__(self, opsets: Mapping[str, int], outer: "_Scope | None" = None, attributes: Mapping[str, Any] | None = None):
        self.values: dict[str, Value] = {}
        self.opsets, self.outer, self.attributes = opsets, outer, attributes or {}

    def __getitem__(self, name: str) -> Value:
        scope: _Scope | None = self
        while scope is not None:
            if name in scope.values:
                return scope.values[name]
            scope = scope.outer
        raise ArtifactError(f"value {name!r} is read before it is made, or by nobody: the graph is out of order, has a cycle or lacks it")

    def has(self, name: str) -> bool:
        return name in self.values or (self.outer is not None and self.outer.has(name))


class _Importer:
    def __init__(self, model: Any, sizes: dict[str, int], constants: dict[str, torch.Tensor], folder: Path | None):
        self.model, self.sizes, self.constants = model, sizes, constants
        self.symbols = SymbolTable()
        self.builder = Builder(self.symbols)
        self.tensors = Tensors(folder)
        self.functions = {(each.domain, each.name): each for each in model.functions}
        self.depth = self.unnamed = 0

    def program(self) -> Program:
        graph = self.model.graph
        opsets = {_domain(each.domain): each.version for each in self.model.opset_import}
        if opsets.get("", 21) not in _OPSETS:
            raise CaptureError(f"the model is of opset {opsets['']}, and {_OPSETS.start} to {_OPSETS.stop - 1} are read")
        scope = _Scope(opsets)
        self._read_initializers(graph, scope)
        _check_names([each.name for each in graph.input])
        self._fix_inputs(graph, scope)
        inputs = [each for each in graph.input if each.name not in scope.values]
        for each in inputs:
            scope.values[each.name] = self._input(each)
        self._read_nodes(graph.node, scope)
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
            raise CaptureError(f"input {_shown(info.name)} is {what}: a program takes tensors whose number of dims is known")
        tensor = info.type.tensor_type
        shape = [self._dim(dim) for dim in tensor.shape.dim]
        value = fake_like(self.symbols, torch_dtype(tensor.elem_type), shape, contiguous_stride(shape), torch.device("cpu"))
        return self.builder.input(_identifier(info.name), value)

    def _next_name(self) -> str:
        """s0, s1, .. for the dims without a name, in order."""
        while True:
            name = f"s{self.unnamed}"
            self.unnamed += 1
            if name not in self.symbols:
                return name

    def _fix_inputs(self, graph: Any, scope: _Scope) -> None:
        types = {each.name: each.type.tensor_type for each in graph.input}
        for name, tensor in self.constants.items():
            if name not in types:
                raise InputError(f"the model has no input {_shown(name)}: it takes {', '.join(map(_shown, types))}")
            if torch_dtype(types[name].elem_type) != tensor.dtype:
                raise InputError(f"input {_shown(name)} is of {torch_dtype(types[name].elem_type)}, and its constant of {tensor.dtype}")
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

    def _read_initializers(self, graph: Any, scope: _Scope) -> None:
        _check_names([each.name for each in graph.initializer])
        if graph.sparse_initializer:
            raise CaptureError("the model has sparse initializers, which have no place in the IR: store them dense")
        for proto in graph.initializer:
            scope.values[proto.name] = self.builder.name_constant(self.tensors.tensor(proto), proto.name)

    def _output(self, scope: _Scope, info: Any) -> Node:
        """The node of an output, of the dtype that the model declares: sizes have none of their own."""
        declared = info.type.tensor_type.elem_type
        try:
            node = self.builder.node(scope[info.name])
            return self.builder.node(self.builder.cast(node, torch_dtype(declared))) if declared else node
        except Unsupported as error:
            raise CaptureError(f"output {_shown(info.name)} is no tensor: {error}") from error

    # --- nodes ------------------------------------------------------------------------------------------------------------------

    def _read_nodes(self, nodes: Any, scope: _Scope) -> None:
        for node in nodes:
            before = self.builder.where
            self.builder.where = Where(module=_printable(node.name or (node.output[0] if node.output else node.op_type)))
            inputs = [scope[name] if name else None for name in node.input]
            results = self._read(self._resolved(node, scope), inputs, scope)
            for name, value in zip(node.output, results, strict=False):
                if name in scope.values:
                    raise ArtifactError(f"value {_shown(name)} is made twice")
                if name:
                    scope.values[name] = value
            self.builder.where = before

    def _read(self, node: Any, inputs: list[Value], scope: _Scope) -> tuple[Value, ...]:
        domain = _domain(node.domain)
        local = self.functions.get((node.domain, node.op_type)) or self.functions.get((domain, node.op_type))
        declared = declaration_of(node, local)
        if declared is not None:
            mark = next(iter(reversed(self.builder.graph.nodes)), None)
            attributes = [*(local.attribute_proto if local is not None else ()), *node.attribute]
            try:
                return read_call(self.builder, declared, {each.name: self._attribute(each) for each in attributes}, inputs)
            except Unsupported as reason:
                if local is None:
                    raise CaptureError(
                        f"{node.op_type} at {self.builder.where.module} is no call of gw.{declared.name}: {reason}"
                    ) from reason
            self._forget_after(mark)
        if local is not None:
            return self._call_function(local, node, inputs, scope)
        version = scope.opsets.get(domain, 1)
        reasons = []
        mark = next(iter(reversed(self.builder.graph.nodes)), None)
        reader = READERS.get((domain, node.op_type))
        if reader is not None:
            try:
                return self._by_reader(reader, domain, self._call(node, version, scope), inputs)
            except Unsupported as reason:
                reasons.append(str(reason))
            except TypeError as error:
                if "positional argument" not in str(error):
                    raise
                raise ArtifactError(
                    f"{node.op_type} at {self.builder.where.module}: it has {len(inputs)} inputs, which it does not take"
                ) from error
        self._forget_after(mark)
        body = self._standard_body(node, inputs, version, domain)
        if body is not None:
            try:
                return self._call_function(body, node, inputs, scope)
            except (Unsupported, CaptureError) as reason:
                if not reasons:
                    reasons.append(str(reason))
            self._forget_after(mark)
        try:
            return opaque(self.builder, node, inputs, {**scope.opsets, domain: version}, scope, list(self.model.functions))
        except Unsupported as reason:
            reasons.append(str(reason))
        raise CaptureError(
            f"{domain or 'ai.onnx'}.{node.op_type} at {self.builder.where.module} has no form in a program: " + "; ".join(reasons)
        )

    def _by_reader(self, reader: Any, domain: str, call: Call, inputs: list[Value]) -> tuple[Value, ...]:
        results = _as_tuple(reader(call, *inputs))
        new = [name for name in call.unread() if name not in _known_attributes(domain, call.op_type)]
        if new:  # of a version that came after the readers
            raise Unsupported(f"its attribute {', '.join(new)} is not understood")
        return results

    def _forget_after(self, mark: Node | None) -> None:
        """Erases calls that an attempt left behind."""
        for node in reversed(list(_after(self.builder.graph, mark))):
            if node.op == "call_function" and not node.users:
                self.builder.graph.erase_node(node)

    def _call(self, node: Any, version: int, scope: _Scope) -> Call:
        attributes = {each.name: self._attribute(each) for each in node.attribute}

        def subgraph(graph: Any, inputs: list[Value]) -> list[Value]:
            return self._read_subgraph(graph, inputs, scope)

        return Call(self.builder, node.op_type, version, attributes, tuple(node.output), subgraph)

    def _resolved(self, node: Any, scope: _Scope) -> Any:
        """The node with the values of attributes that it takes from the function around it."""
        if not any(each.ref_attr_name for each in node.attribute):
            return node
        result = type(node)()
        result.CopyFrom(node)
        del result.attribute[:]
        for each in node.attribute:
            if not each.ref_attr_name:
                result.attribute.append(each)
            elif each.ref_attr_name in scope.attributes:
                result.attribute.add().CopyFrom(scope.attributes[each.ref_attr_name])
                result.attribute[-1].name = each.name
        return result

    def _attribute(self, proto: Any) -> Any:
        import onnx

        kinds = onnx.AttributeProto
        if proto.type == kinds.TENSOR:
            return self.tensors.tensor(proto.t)
        if proto.type == kinds.STRING:
            return proto.s.decode("utf-8", "replace")
        if proto.type == kinds.STRINGS:
            return [each.decode("utf-8", "replace") for each in proto.strings]
        if proto.type == kinds.GRAPH:
            return proto.g
        if proto.type in (kinds.FLOAT, kinds.INT):
            return proto.f if proto.type == kinds.FLOAT else proto.i
        if proto.type in (kinds.FLOATS, kinds.INTS):
            return list(proto.floats if proto.type == kinds.FLOATS else proto.ints)
        return proto

    # --- graphs inside ------------------------------------------------------------------------------------------------------------

    def _read_subgraph(self, graph: Any, inputs: list[Value], outer: _Scope) -> list[Value]:
        scope = _Scope(outer.opsets, outer, outer.attributes)
        for proto in graph.initializer:
            scope.values[proto.name] = self.builder.name_constant(self.tensors.tensor(proto), proto.name)
        for info, value in zip(graph.input, inputs, strict=False):
            scope.values[info.name] = value
        with self._nested():
            self._read_nodes(graph.node, scope)
        return [scope[each.name] for each in graph.output]

    def _call_function(self, function: Any, node: Any, inputs: list[Value], outer: _Scope) -> tuple[Value, ...]:
        attributes = {each.name: each for each in (*function.attribute_proto, *node.attribute)}
        opsets = {_domain(each.domain): each.version for each in function.opset_import} or dict(outer.opsets)
        scope = _Scope(opsets, None, attributes)
        for place, name in enumerate(function.input):
            scope.values[name] = inputs[place] if place < len(inputs) else None
        with self._nested():
            self._read_nodes(function.node, scope)
        return tuple(scope[name] if scope.has(name) else None for name in function.output)

    def _nested(self) -> "_Nesting":
        return _Nesting(self)

    def _standard_body(self, node: Any, inputs: list[Value], version: int, domain: str) -> Any:
        """The function that the standard defines an operator by, None where it does not."""
        import onnx

        try:
            schema: Any = onnx.defs.get_schema(node.op_type, version, domain)
        except onnx.defs.SchemaError:
            return None
        if schema.has_function:
            return _with_defaults(schema, schema.function_body, version)
        if not schema.has_context_dependent_function:
            return None
        types = [self._type_proto(value).SerializeToString() for value in inputs]
        try:
            content = schema.get_context_dependent_function(node.SerializeToString(), types)
        except Exception:  # the package says no for types that the body is not defined for
            return None
        function = onnx.FunctionProto()
        function.ParseFromString(content)
        return _with_defaults(schema, function, version)

    def _type_proto(self, value: Value) -> Any:
        import onnx

        from .opaque import type_proto

        if value is None or isinstance(value, list):
            return onnx.TypeProto()
        return type_proto(self.builder, value, {})


@functools.cache
def _known_attributes(domain: str, op_type: str) -> frozenset[str]:
    """The attributes that an operator had when the readers were written."""
    import onnx

    try:
        return frozenset(onnx.defs.get_schema(op_type, _WRITTEN_FOR, domain).attributes)
    except onnx.defs.SchemaError:
        return frozenset()


class _Nesting:
    """Counts how deep graphs lie in one another."""

    def __init__(self, importer: _Importer):
        self.importer = importer

    def __enter__(self) -> None:
        self.importer.depth += 1
        if self.importer.depth > _MOST_NESTED:
            raise ArtifactError(f"functions or graphs lie more than {_MOST_NESTED} deep in one another: one may call itself")

    def __exit__(self, *exception: object) -> None:
        self.importer.depth -= 1


def _with_defaults(schema: Any, function: Any, version: int) -> Any:
    """The function with the operator's default attributes, and the opset that it is of."""
    import onnx

    result = onnx.FunctionProto()
    result.CopyFrom(function)
    known = {each.name for each in result.attribute_proto}
    for name, attribute in schema.attributes.items():
        if name not in known and attribute.default_value.name:
            result.attribute_proto.append(attribute.default_value)
    if not result.opset_import:
        result.opset_import.append(onnx.helper.make_opsetid("", version))
    return result


def _after(graph: Any, mark: Node | None) -> list[Node]:
    found: list[Node] = []
    for node in reversed(graph.nodes):
        if node is mark:
            break
        found.append(node)
    return found[::-1]


def _as_tuple(value: Any) -> tuple[Value, ...]:
    return value if isinstance(value, tuple) else (value,)


def _domain(domain: str) -> str:
    return "" if domain == "ai.onnx" else domain


def _check_names(names: list[str]) -> None:
    if len(set(names)) != len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise ArtifactError(f"{_shown(twice)} names two inputs or two initializers")


def _identifier(name: str) -> str:
    """A name as that of an input: what is no letter or digit becomes _."""
    plain = re.sub(r"[^A-Za-z0-9_]", "_", name)[:128]
    return plain if plain and not plain[0].isdigit() else f"input_{plain}"


def _printable(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9_./-]", "_", name)[:128]


def _shown(name: str) -> str:
    return repr(name[:80])
