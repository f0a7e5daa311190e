"""What the standard says of its operators: the functions that it defines some by, and the attributes of each."""

import functools
from collections.abc import Callable
from typing import Any

from .builder import Value

_WRITTEN_FOR = 24  # the opset whose operators' attributes the readers know


def body_of(node: Any, inputs: list[Value], version: int, domain: str, type_of: Callable[[Value], Any]) -> Any:
    """The FunctionProto that the standard defines an operator by, for operands of these types; None where it does not."""
    import onnx

    try:
        schema: Any = onnx.defs.get_schema(node.op_type, version, domain)
    except onnx.defs.SchemaError:
        return None
    if schema.has_function:
        return _with_defaults(schema, schema.function_body, version)
    if not schema.has_context_dependent_function:
        return None
    types = [type_of(value).SerializeToString() for value in inputs]
    try:
        content = schema.get_context_dependent_function(node.SerializeToString(), types)
    except Exception:  # the package says no for types that the body is not defined for
        return None
    function = onnx.FunctionProto()
    function.ParseFromString(content)
    return _with_defaults(schema, function, version)


@functools.cache
def known_attributes(domain: str, op_type: str) -> frozenset[str]:
    """The attributes that an operator had when the readers were written."""
    import onnx

    try:
        return frozenset(onnx.defs.get_schema(op_type, _WRITTEN_FOR, domain).attributes)
    except onnx.defs.SchemaError:
        return frozenset()


def misfit(node: Any, version: int, domain: str) -> str:
    """Which attribute of a node is of another kind than its operator's, "" where none is."""
    import onnx

    try:
        known: Any = onnx.defs.get_schema(node.op_type, version, domain).attributes
    except onnx.defs.SchemaError:
        return ""
    wrong = [each for each in node.attribute if each.name in known and each.type != int(known[each.name].type.value)]
    return f"its attribute {wrong[0].name!r} is of another kind than the operator's" if wrong else ""


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
