"""`gw.onnx_node` put back: the node that it was read from, on the values that it reads here."""

import base64
import zlib
from typing import Any

from ...errors import CaptureError
from .lower import Site


def is_opaque(call: Any) -> bool:
    return "gw.onnx_node" in str(call.target)


def put_back(site: Site, inputs: list[Any], opsets: dict[str, int], functions: list[Any]) -> tuple[list[Any], list[Any]]:
    """The node with the small constants that came with it, and its outputs. `opsets` and `functions` of the model take what it needs.

    Raises:
        CaptureError: it is of another version of its operator set than the model, in which the operator changed.
    """
    import onnx
    import onnx_ir as ir

    proto = onnx.ModelProto()
    proto.ParseFromString(zlib.decompress(base64.b85decode(site.call.kwargs["model"])))
    model = ir.serde.deserialize_model(_at_version(proto, opsets[""], site))
    graph = model.graph
    for inner, outer in zip(graph.inputs, inputs, strict=True):
        ir.convenience.replace_all_uses_with(inner, outer)
    made = []
    for value in list(graph.initializers.values()):
        constant = ir.node("Constant", [], {"value": value.const_value})
        ir.convenience.replace_all_uses_with(value, constant.outputs[0])
        made.append(constant)
    nodes, outputs = list(graph), list(graph.outputs)
    graph.outputs.clear()
    graph.remove(nodes)
    for domain, version in model.opset_imports.items():
        opsets.setdefault(domain, version)
    known = {each.identifier() for each in functions}
    functions += [each for name, each in model.functions.items() if name not in known]
    return [*made, *nodes], outputs


def _at_version(model: Any, opset: int, site: Site) -> Any:
    """The one-node model at the opset of the export."""
    import onnx

    standard = [each for each in model.opset_import if each.domain in ("", "ai.onnx")]
    if not standard or standard[0].version == opset:
        return model
    try:
        same = all(
            onnx.defs.get_schema(node.op_type, standard[0].version).since_version == onnx.defs.get_schema(node.op_type, opset).since_version
            for node in model.graph.node
            if node.domain in ("", "ai.onnx")
        )
        if not same:
            return onnx.version_converter.convert_version(model, opset)
    except Exception as error:
        where, version = site.call.meta.get("where"), standard[0].version
        raise CaptureError(
            f"{site.call.kwargs['op']} at {where} is of opset {version} and has no form in {opset}: export at opset={version}"
        ) from error
    standard[0].version = opset
    return model
