"""ONNX operators that stay ONNX: a model of one node, which onnxruntime runs and an export puts back."""

import base64
import importlib.util
import re
import zlib
from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np
import torch

from ..errors import TargetError
from ..ops.onnx_node import session
from .builder import Builder, Unsupported, Value
from .dtypes import element_type, torch_dtype
from .sizes import Size, is_known, known

_MOST_EMBEDDED = 1024  # elements of a constant operand that shape inference is told of
_IR_VERSION = 10


class Names(Protocol):
    def __getitem__(self, name: str) -> Value: ...

    def __contains__(self, name: str) -> bool: ...


def opaque(
    builder: Builder,
    node: Any,
    inputs: list[Value],
    opsets: dict[str, int],
    names: Names,
    functions: list[Any],
    declared: Mapping[str, Any],
) -> tuple[Value, ...]:
    """`gw.onnx_node` of the node: one value an output, None for unused ones. `declared` are types that the file gives values, by name.

    Raises:
        Unsupported: an operand or result is no tensor, or the type of a result is not known.
    """
    import onnx

    captured = [name for name in _free_names(node) if name in names]
    operands = dict(zip([name for name in node.input if name], [v for name, v in zip(node.input, inputs) if name]))
    operands |= {name: names[name] for name in captured}
    outputs = [name for name in node.output if name]
    dims: dict[str, Size] = {}
    infos, constants, tensors = [], [], []
    for name, value in operands.items():
        if value is None or isinstance(value, list):
            raise Unsupported("an operand is no tensor")
        small = _embedded(value)
        if small is not None:
            constants.append(onnx.numpy_helper.from_array(small, name))
        else:
            infos.append(onnx.helper.make_value_info(name, type_proto(builder, value, dims)))
            tensors.append(value)
    graph = onnx.helper.make_graph([node], "opaque", infos, [onnx.ValueInfoProto(name=name) for name in outputs], constants)
    imports = [onnx.helper.make_opsetid(domain, version) for domain, version in sorted(opsets.items())]
    model = onnx.helper.make_model(graph, opset_imports=imports, functions=functions, ir_version=_IR_VERSION)
    types = _output_types(model, outputs, declared)
    sizes = [size for shape, _ in types for size in (_output_size(dim, dims) for dim in shape)]
    for info, (shape, kind) in zip(model.graph.output, types):
        info.CopyFrom(onnx.helper.make_tensor_value_info(info.name, kind, shape))
    content = _content(model)
    _check_runs(content)
    title = f"{node.domain or 'ai.onnx'}.{re.sub('[^A-Za-z0-9_]', '_', node.op_type)}"
    results = builder.call(
        torch.ops.gw.onnx_node.default,
        [builder.node(tensor) for tensor in tensors],
        sizes,
        op=title,
        model=content,
        dtypes=[kind for _, kind in types],
        ranks=[len(shape) for shape, _ in types],
    )
    made = dict(zip(outputs, results, strict=True))
    return tuple(made.get(name) for name in node.output)


def _check_runs(content: str) -> None:
    """That onnxruntime takes the model, where it is installed: an error now tells more than one in some call.

    Raises:
        Unsupported: it does not.
    """
    if importlib.util.find_spec("onnxruntime") is None:
        return
    try:
        session(content)
    except TargetError as error:
        raise Unsupported(str(error)) from error


def _embedded(value: Value) -> np.ndarray | None:
    """A small constant, which the model holds."""
    if isinstance(value, np.ndarray):
        return known(value).numpy() if is_known(value) else None
    if isinstance(value, torch.Tensor) and value.numel() <= _MOST_EMBEDDED and value.dtype != torch.bfloat16 and value.dtype.itemsize > 0:
        try:
            return value.numpy()
        except TypeError:
            return None
    return None


def type_proto(builder: Builder, value: Value, dims: dict[str, Size]) -> Any:
    """The ONNX type of a value; symbolic sizes get names, which `dims` maps back."""
    import onnx

    shape = []
    for size in builder.shape(value):
        if isinstance(size, Size):
            text = builder.symbols.text(size.value)
            dims.setdefault(text, size)
            shape.append(text)
        else:
            shape.append(int(size))
    return onnx.helper.make_tensor_type_proto(element_type(builder.dtype(value)), shape)


def _free_names(node: Any) -> list[str]:
    """The values that subgraphs of a node read from around it."""
    found: dict[str, None] = {}

    def visit(graph: Any, outer: frozenset[str]) -> None:
        here = outer | {each.name for each in graph.input} | {each.name for each in graph.initializer}
        here = here | {name for inner in graph.node for name in inner.output}
        for inner in graph.node:
            found.update(dict.fromkeys(name for name in inner.input if name and name not in here))
            for attribute in inner.attribute:
                for below in [attribute.g] if attribute.HasField("g") else attribute.graphs:
                    visit(below, here)
        found.update(dict.fromkeys(each.name for each in graph.output if each.name not in here))

    for attribute in node.attribute:
        for graph in [attribute.g] if attribute.HasField("g") else attribute.graphs:
            visit(graph, frozenset())
    return list(found)


Type = tuple[list[Any], int]  # dims, which are numbers, names or None, and an element type


def _output_types(model: Any, outputs: list[str], declared: Mapping[str, Any]) -> list[Type]:
    """Of each output what onnx infers, or else onnxruntime, or what the file says, `declared` by name.

    Raises:
        Unsupported: none of them knows one.
    """
    found: dict[str, Type] = {}
    reason = "it is no operator of ATen, and the type of its result is not known"
    try:
        found |= _inferred(model)
    except Exception as error:
        reason = f"its types cannot be inferred: {str(error).splitlines()[0]}"
    (node,) = model.graph.node
    known = {name: _type_of(declared[name]) for name in outputs if name in declared and _is_tensor(declared[name])}
    for more in (lambda: _of_loop(model, node), lambda: known, lambda: _asked_of_onnxruntime(model, node)):
        if any(name not in found for name in outputs):
            found = more() | found
    for name in outputs:
        if name not in found:
            raise Unsupported(reason)
        torch_dtype(found[name][1])
    return [found[name] for name in outputs]


def _inferred(model: Any) -> dict[str, Type]:
    import onnx

    # Where values are followed, the package makes one for each element that a vector is said to have.
    vectors = [each.type.tensor_type.shape.dim for each in model.graph.input if len(each.type.tensor_type.shape.dim) == 1]
    follow = all(dim.dim_value <= _MOST_EMBEDDED for (dim,) in vectors)
    inferred = onnx.shape_inference.infer_shapes(model, data_prop=follow)
    return {each.name: _type_of(each.type) for each in inferred.graph.output if _is_tensor(each.type)}


def _is_tensor(kind: Any) -> bool:
    return kind.WhichOneof("value") == "tensor_type" and bool(kind.tensor_type.elem_type) and kind.tensor_type.HasField("shape")


def _type_of(kind: Any) -> Type:
    tensor = kind.tensor_type
    return [dim.dim_value if dim.HasField("dim_value") else dim.dim_param or None for dim in tensor.shape.dim], tensor.elem_type


_ORT_TENSOR = re.compile(r"tensor\((\w+)\)")


def _asked_of_onnxruntime(model: Any, node: Any) -> dict[str, Type]:
    """What onnxruntime says of the outputs of operators of its own; nothing where it is missing or refuses the model. It has the sizes
    of a scalar for those of a tensor whose rank it does not know, so that neither is taken from it. Of the standard's operators the onnx
    package knows as much, and does not end the process where one claims 2^62 elements."""
    import onnx

    if node.domain in ("", "ai.onnx"):
        return {}
    try:
        infos = session(_content(model)).get_outputs()
    except TargetError:
        return {}
    kinds = {each.name: _ORT_TENSOR.fullmatch(each.type) for each in infos}
    return {
        each.name: (list(each.shape), onnx.TensorProto.DataType.Value(kind[1].upper()))
        for each in infos
        if each.shape and (kind := kinds[each.name]) and kind[1].upper() in onnx.TensorProto.DataType.keys()
    }


def _of_loop(model: Any, node: Any) -> dict[str, Type]:
    """Of a Loop whose carried values keep their types: these, and one more dim of unknown size for what it collects."""
    import onnx

    if node.op_type != "Loop" or node.domain not in ("", "ai.onnx"):
        return {}
    types = {each.name: each.type for each in model.graph.input}
    types |= {each.name: onnx.helper.make_tensor_type_proto(each.data_type, list(each.dims)) for each in model.graph.initializer}
    body = onnx.GraphProto()
    body.CopyFrom(next(each.g for each in node.attribute if each.name == "body"))
    carried = [types.get(name) for name in node.input[2:]]
    if None in carried or len(body.input) != len(carried) + 2:
        return {}
    body.input[0].type.CopyFrom(onnx.helper.make_tensor_type_proto(onnx.TensorProto.INT64, []))
    body.input[1].type.CopyFrom(onnx.helper.make_tensor_type_proto(onnx.TensorProto.BOOL, []))
    for info, kind in zip(body.input[2:], carried):
        info.type.CopyFrom(kind)
    body.input.extend(each for each in model.graph.input if each.name not in {info.name for info in body.input})
    body.initializer.extend(model.graph.initializer)
    for each in body.output:
        each.ClearField("type")
    alone = onnx.helper.make_model(body, opset_imports=model.opset_import, functions=model.functions, ir_version=_IR_VERSION)
    try:
        found = _inferred(alone)
    except Exception:  # whatever the package says of a body that is none
        return {}
    made = [found[each.name] for each in body.output[1:] if each.name in found]
    if len(made) < len(body.output) - 1 or any(each != _type_of(kind) for each, kind in zip(made, carried)):
        return {}
    collected = [([None, *dims], kind) for dims, kind in made[len(carried) :]]
    return {name: each for name, each in zip(node.output, [*made[: len(carried)], *collected]) if name}


def _content(model: Any) -> str:
    return base64.b85encode(zlib.compress(model.SerializeToString(deterministic=True), 9)).decode()


def _output_size(dim: Any, dims: dict[str, Size]) -> Any:
    if isinstance(dim, int):
        return dim
    return dims.get(dim, -1)
