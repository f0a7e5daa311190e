"""Reads nodes in order: each onto ATen by its reader, by the body that the standard gives, or as an opaque operator."""

import inspect
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import cached_property, partial
from typing import Any

from ..errors import ArtifactError, CaptureError
from ..op import OpDeclaration
from ..program import Node, Where
from ..types import type_text
from . import operators  # noqa: F401 - declares the readers
from .builder import Builder, Unsupported, Value
from .claims import holds
from .dialect import declaration_of, read_call
from .modules import module_of
from .opaque import opaque, type_proto
from .reading import Tensors
from .registry import READERS, Call
from .scope import Scope, domain_of, shown
from .standard import body_of, known_attributes, misfit

_MOST_NESTED = 64
_MOST_SAID = 500  # characters of a reason, which may have names of the file in it
# Nodes of functions and graphs inside others, read once for each call: a file of 64 functions that call the next one twice has 2^64.
_LEAST_EXPANDED, _EXPANDED_A_NODE = 2**14, 64
# Elements of a tensor of functions that are compared with what they say they are; more in files of large weights, of 4 bits each perhaps.
_MOST_COMPARED, _COMPARED_A_BYTE = 2**24, 2
# What Python and torch say of attributes that are missing or of another type, as a file may have them.
_MISFITS = (TypeError, ValueError, KeyError, IndexError, AttributeError, ArithmeticError, RuntimeError, NotImplementedError)


class Nodes:
    """Adds to `builder` what nodes compute; `functions` are the model's own, by domain, name and overload."""

    def __init__(self, builder: Builder, tensors: Tensors, functions: dict[tuple[str, str, str], Any]):
        self.builder, self.tensors, self.functions = builder, tensors, functions
        self.depth = 0
        self.declared: Mapping[str, Any] = {}  # types that the file gives values of its graph
        self.left = [_LEAST_EXPANDED + _EXPANDED_A_NODE * sum(len(each.node) for each in functions.values())]  # one count for all bodies
        self.claims: dict[tuple[Any, ...], bool] = {}  # of functions that say they are an operator of ours, whether they are

    def read(self, nodes: Any, scope: Scope) -> None:
        self._spend(len(nodes) if self.depth else -_EXPANDED_A_NODE * len(nodes))
        for node in nodes:
            before, module = self.builder.where, self.builder.module
            self.builder.module = module_of(node) or module  # a function's own nodes are of the module that calls it
            self.builder.where = Where(module=_printable(node.name or (node.output[0] if node.output else node.op_type)))
            inputs = [scope[name] if name else None for name in node.input]
            results = self._read(self._resolved(node, scope), inputs, scope)
            for name, value in zip(node.output, results, strict=False):
                if name in scope.values:
                    raise ArtifactError(f"value {shown(name)} is made twice")
                if name:
                    scope.values[name] = value
            self.builder.where, self.builder.module = before, module

    def _spend(self, count: int) -> None:
        self.left[0] -= count
        if self.left[0] < 0:
            raise CaptureError(
                f"functions and graphs in one another are too many nodes when each is put in its place, at {self.builder.where.module}: "
                "call fewer, or export the model without functions"
            )

    def _read(self, node: Any, inputs: list[Value], scope: Scope) -> tuple[Value, ...]:
        domain = domain_of(node.domain)
        local = self.functions.get((domain, node.op_type, node.overload))
        ours = self._call_of_ours(node, local, inputs)
        if ours is not None:
            return ours
        if local is not None:
            return self._call_function(local, node, inputs, scope)
        version = scope.opsets.get(domain, 1)
        wrong = misfit(node, version, domain)
        if wrong:
            raise ArtifactError(f"{_plain(node.op_type)} at {self.builder.where.module}: {wrong}")
        reasons = []
        mark = next(iter(reversed(self.builder.graph.nodes)), None)
        reader = READERS.get((domain, node.op_type))
        if reader is not None:
            try:
                return self._by_reader(reader, domain, self._call(node, version, scope), inputs)
            except Unsupported as reason:
                reasons.append(str(reason))
        self._forget_after(mark)
        body = body_of(node, inputs, version, domain, self._type_proto)
        if body is not None:
            try:
                return self._call_function(body, node, inputs, scope)
            except (Unsupported, CaptureError) as reason:
                if not reasons:
                    reasons.append(str(reason))
            self._forget_after(mark)
        held, opsets = self.tensors.held(node), {**scope.opsets, domain: version}
        try:
            return opaque(self.builder, held, inputs, opsets, scope, self._held_functions, self.declared)
        except Unsupported as reason:
            reasons = reasons or [str(reason)]
        name, said = f"{_plain(domain or 'ai.onnx')}.{_plain(node.op_type)}", " ".join(reasons[0].split())[:_MOST_SAID]
        raise CaptureError(f"{name} at {self.builder.where.module} has no form in a program: {said}")

    def _call_of_ours(self, node: Any, local: Any, inputs: list[Value]) -> tuple[Value, ...] | None:
        """The call of a dialect operator that the node is; None where it is none, or where its function's body says what it is."""
        declared = declaration_of(node, local)
        if declared is None:
            return None
        mark = next(iter(reversed(self.builder.graph.nodes)), None)
        protos = [*(local.attribute_proto if local is not None else ()), *node.attribute]
        attributes = {each.name: self._attribute(each) for each in protos}
        try:
            results = read_call(self.builder, declared, attributes, inputs)
            if local is None or self._is(declared, local, node, attributes, inputs):
                return results
        except Unsupported as reason:
            if local is None:
                raise CaptureError(f"{node.op_type} at {self.builder.where.module} is no call of gw.{declared.name}: {reason}") from reason
        self._forget_after(mark)
        return None

    def _is(self, declared: OpDeclaration, local: Any, node: Any, attributes: Mapping[str, Any], inputs: list[Value]) -> bool:
        """Whether the body of a function is the operator that it says; found once for calls alike."""
        symbols = self.builder.symbols
        types = [
            type_text(each.meta["val"], symbols) if isinstance(each, Node) else (getattr(each, "dtype", None), getattr(each, "shape", None))
            for each in inputs
        ]
        key = (local.name, tuple(each.SerializeToString() for each in node.attribute), tuple(types))
        if key not in self.claims:
            self.claims[key] = False  # while it is found out, in bodies that call the function itself
            with self._one_deeper(), suppress(Unsupported, CaptureError):
                most = max(_MOST_COMPARED, _COMPARED_A_BYTE * self.tensors.bytes)
                body = partial(self._body_on, local, node)
                self.claims[key] = holds(declared, attributes, inputs, symbols, body, most)
        return self.claims[key]

    def _body_on(self, function: Any, node: Any, builder: Builder, values: list[Value]) -> tuple[Value, ...]:
        """What a function gives on `values`, as calls added to `builder`."""
        inside = Nodes(builder, self.tensors, self.functions)
        inside.depth, inside.claims, inside.left = self.depth, self.claims, self.left
        return inside._call_function(function, node, values, Scope({}))

    def _by_reader(self, reader: Any, domain: str, call: Call, inputs: list[Value]) -> tuple[Value, ...]:
        try:
            inspect.signature(reader).bind(call, *inputs)
        except TypeError as error:
            place = self.builder.where.module
            raise ArtifactError(f"{call.op_type} at {place}: it has {len(inputs)} inputs, which it does not take") from error
        try:
            results = reader(call, *inputs)
        except _MISFITS as error:
            raise Unsupported(f"its operands or attributes are none that it has ({type(error).__name__}: {error})") from error
        new = [name for name in call.unread() if name not in known_attributes(domain, call.op_type)]
        if new:  # of a version that came after the readers
            raise Unsupported(f"its attribute {', '.join(new)} is not understood")
        return results if isinstance(results, tuple) else (results,)

    def _forget_after(self, mark: Node | None) -> None:
        """Erases calls that an attempt left behind."""
        for node in reversed(list(_after(self.builder.graph, mark))):
            if node.op == "call_function" and not node.users:
                self.builder.graph.erase_node(node)

    def _call(self, node: Any, version: int, scope: Scope) -> Call:
        attributes = {each.name: self._attribute(each) for each in node.attribute}

        def subgraph(graph: Any, inputs: list[Value]) -> list[Value]:
            try:
                return self._read_subgraph(graph, inputs, scope)
            except CaptureError as error:  # then the whole may run in onnxruntime
                raise Unsupported(str(error)) from error

        return Call(self.builder, node.op_type, version, attributes, tuple(node.output), subgraph)

    def _resolved(self, node: Any, scope: Scope) -> Any:
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

    @cached_property
    def _held_functions(self) -> list[Any]:
        return [self.tensors.held(each) for each in self.functions.values()]

    # --- graphs inside ------------------------------------------------------------------------------------------------------------

    def _read_subgraph(self, graph: Any, inputs: list[Value], outer: Scope) -> list[Value]:
        scope = Scope(outer.opsets, outer, outer.attributes)
        for proto in graph.initializer:
            scope.values[proto.name] = self.builder.name_constant(self.tensors.tensor(proto), proto.name)
        for info, value in zip(graph.input, inputs, strict=False):
            scope.values[info.name] = value
        with self._one_deeper():
            self.read(graph.node, scope)
        return [scope[each.name] for each in graph.output]

    def _call_function(self, function: Any, node: Any, inputs: list[Value], outer: Scope) -> tuple[Value, ...]:
        attributes = {each.name: each for each in (*function.attribute_proto, *node.attribute)}
        opsets = {domain_of(each.domain): each.version for each in function.opset_import} or dict(outer.opsets)
        scope = Scope(opsets, None, attributes)
        for place, name in enumerate(function.input):
            scope.values[name] = inputs[place] if place < len(inputs) else None
        with self._one_deeper():
            self.read(function.node, scope)
        return tuple(scope[name] if name in scope else None for name in function.output)

    @contextmanager
    def _one_deeper(self) -> Iterator[None]:
        self.depth += 1
        if self.depth > _MOST_NESTED:
            raise ArtifactError(f"functions or graphs lie more than {_MOST_NESTED} deep in one another: one may call itself")
        try:
            yield
        finally:
            self.depth -= 1

    def _type_proto(self, value: Value) -> Any:
        import onnx

        if value is None or isinstance(value, list):
            return onnx.TypeProto()
        return type_proto(self.builder, value, {})


def _after(graph: Any, mark: Node | None) -> list[Node]:
    found: list[Node] = []
    for node in reversed(graph.nodes):
        if node is mark:
            break
        found.append(node)
    return found[::-1]


def _plain(name: str) -> str:
    """A name of an operator in a message: as it is where it is one."""
    return name if re.fullmatch(r"[A-Za-z0-9_./-]{1,128}", name) else shown(name)


def _printable(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9_./-]", "_", name)[:128]
