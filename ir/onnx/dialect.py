"""Operators of the dialect in ONNX models, as exports have them: functions of the domain `graphwright`, or nodes there without a body.

What a function is stands in its metadata and attributes, so that it is read as the call that it was. One whose body is not what these say
(`claims.py`) is read by its body, as any function.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from ..op import REGISTRY, OpDeclaration
from .builder import Builder, Unsupported, Value
from .dtypes import torch_dtype

DOMAIN, OP_KEY = "graphwright", "graphwright.op"


def declaration_of(node: Any, function: Any) -> OpDeclaration | None:
    """The operator that a node of our domain calls; None where it is none."""
    if node.domain != DOMAIN:
        return None
    name = node.op_type
    if function is not None:
        said = {entry.key: entry.value for entry in function.metadata_props}
        name = said.get(OP_KEY, "").removeprefix("gw.")
    declared = REGISTRY.get(name)
    return None if declared is None or declared.is_opaque else declared


def read_call(builder: Builder, declared: OpDeclaration, attributes: Mapping[str, Any], inputs: Sequence[Value]) -> tuple[Value, ...]:
    """The call of `declared` on `inputs`, in the order of its schema, with `attributes` by name.

    Raises:
        Unsupported: these are not what the operator takes.
    """
    args, kwargs = arguments(declared, attributes, inputs)
    result = builder.call(declared.overload, *args, **kwargs)
    return result if isinstance(result, tuple) else (result,)


def arguments(declared: OpDeclaration, attributes: Mapping[str, Any], inputs: Sequence[Any]) -> tuple[list[Any], dict[str, Any]]:
    """What the operator is called with, by place and by name.

    Raises:
        Unsupported: it takes lists of tensors, or an attribute is none of its.
    """
    given = iter(inputs)
    args, kwargs = [], {}
    for argument in declared.overload._schema.arguments:
        kind = str(argument.type)
        if "List[Tensor]" in kind:
            raise Unsupported(f"gw.{declared.name} takes lists of tensors, which have no place in a function's inputs")
        value = next(given, None) if "Tensor" in kind else _plain(attributes.get(argument.name), str(argument.real_type))
        if argument.kwarg_only:
            kwargs[argument.name] = value
        else:
            args.append(value)
    return args, kwargs


def _plain(value: Any, kind: str) -> Any:
    """An attribute as an argument of the schema's `kind`: floats are float64 tensors of no dims, bools and dtypes integers."""
    if kind == "ScalarType" and isinstance(value, int):
        return torch_dtype(value)
    if kind == "bool" and value in (0, 1):
        return bool(value)
    if isinstance(value, torch.Tensor):
        if value.dtype != torch.float64 or value.dim():
            raise Unsupported("an attribute is a tensor, and operators of graphwright have floats, which are float64 tensors of no dims")
        return float(value)
    return value
