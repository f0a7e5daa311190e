"""ONNX operators that stay ONNX: a model of one node, which onnxruntime runs and an export puts back."""

import base64
import importlib.util
import re
import zlib
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
    builder: Builder, node: Any, inputs: list[Value], opsets: dict[str, int], names: Names, functions: list[Any]
) -> tuple[Value, ...]:
    """`gw.onnx_node` of the node: one value an output, None for unused ones.

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
    types = _output_types(model, node, outputs)
    sizes = [size for shape, _ in types for size in (_output_size(dim, dims) for dim in shape)]
    for info, (shape, kind) in zip(model.graph.output, types):
        info.CopyFrom(onnx.helper.make_tensor_value_info(info.name, kind, shape))
    content = base64.b85encode(zlib.compress(model.SerializeToString(deterministic=True), 9)).decode()
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


def _output_types(model: Any, node: Any, outputs: list[str]) -> list[tuple[list[Any], int]]:
    """Of each output its dims, numbers, names or None, and its element type."""
    import onnx

    # Where values are followed, the package makes one for each element that a vector is said to have.
    vectors = [each.type.tensor_type.shape.dim for each in model.graph.input if len(each.type.tensor_type.shape.dim) == 1]
    follow = all(dim.dim_value <= _MOST_EMBEDDED for (dim,) in vectors)
    try:
        inferred = onnx.shape_inference.infer_shapes(model, data_prop=follow)
    except Exception as error:
        raise Unsupported(f"its types cannot be inferred: {str(error).splitlines()[0]}") from error
    infos = {each.name: each.type for each in inferred.graph.output}
    types = []
    for name in outputs:
        tensor = infos[name].tensor_type if infos[name].WhichOneof("value") == "tensor_type" else None
        if tensor is None or not tensor.elem_type or not tensor.HasField("shape"):
            raise Unsupported("it is no operator of ATen, and the type of its result is not known")
        torch_dtype(tensor.elem_type)
        shape = [dim.dim_value if dim.HasField("dim_value") else dim.dim_param or None for dim in tensor.shape.dim]
        types.append((shape, tensor.elem_type))
    return types


def _output_size(dim: Any, dims: dict[str, Size]) -> Any:
    if isinstance(dim, int):
        return dim
    return dims.get(dim, -1)
