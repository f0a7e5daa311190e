"""A function of a program as an ONNX model: what is translated, with sites put back, names, weights, and where each node came from."""

import itertools
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch

from ...errors import CaptureError
from ...program import Function, Node, Program
from ...region import sliced
from ..dialect import DOMAIN
from ..dtypes import element_type
from . import functions, low_bit, opaque, regions
from .data_sites import SITE
from .lower import Lowering, Site
from .names import output_names, unique
from .translate import Piece, Translated, quiet, translate

DIALECTS, REGIONS = ("function", "inline", "custom"), ("loop", "unroll")
_IR_VERSION = 10  # the first with metadata of nodes


def to_onnx(program: Program, function: str, *, dialect: str, regions_as: str, opset: int) -> Any:
    """`function` of `program` as an onnx_ir.Model, its weights in memory. Arguments are those of `export_onnx`.

    Raises:
        CaptureError: something has no ONNX form; the message names it and the user's line.
    """
    lowering = Lowering(program, inline=dialect == "inline", unroll=regions_as == "unroll")
    assembly = _Assembly(lowering, dialect, opset, program.functions[function])
    with quiet():
        return assembly.model()


@dataclass
class _Assembly:
    lowering: Lowering
    dialect: str
    opset: int
    function: Function

    def model(self) -> Any:
        import onnx_ir as ir

        self.pieces: list[Piece] = [self.lowering.function(self.function)]
        self.bodies: dict[int, int] = {}  # site -> the piece of its function's or region's body
        self.local: dict[tuple[Any, ...], tuple[functions.LocalFunction, int]] = {}
        self.opsets = {"": self.opset}
        self.functions: list[Any] = []
        done = 0
        while done < len(self.lowering.sites):  # bodies of regions have sites of their own
            self._add_body(done, self.lowering.sites[done])
            done += 1
        self.parts = translate(self.pieces, self.opset)
        main = self.parts[0]
        self._name_values(main)
        initializers = self._initializers(main)
        graph = ir.Graph(
            main.inputs,
            main.outputs,
            nodes=self._nodes(main),
            initializers=initializers,
            opset_imports=self.opsets,
            name=self.function.name,
        )
        self.functions += [
            each.defined(self.parts[piece], self._nodes(self.parts[piece], self._constants(piece)), self.opset)
            for each, piece in self.local.values()
        ]
        if self.functions or self.dialect == "custom":
            self.opsets[DOMAIN] = 1
        program = self.lowering.program
        model = ir.Model(graph, ir_version=_IR_VERSION, producer_name="graphwright", functions=self.functions)
        graph.opset_imports.update(self.opsets)
        model.metadata_props.update({"graphwright.pipeline": program.pipeline, "graphwright.function": self.function.name})
        _clean(model)
        self._number_values(model)
        return model

    # --- sites ---------------------------------------------------------------------------------------------------------------------

    def _add_body(self, number: int, site: Site) -> None:
        if site.is_weight or opaque.is_opaque(site.call):
            return
        if site.call.target is sliced:
            self.bodies[number] = len(self.pieces)
            self.pieces.append(regions.body(self.lowering, site))
        elif self.dialect == "function":
            key = functions.key(site, self.lowering.symbols)
            if key not in self.local:
                name = f"{functions.op_name(site)}__{len(self.local)}"
                self.local[key] = functions.LocalFunction(name, site), len(self.pieces)
                self.pieces.append(functions.body(site, self.lowering.symbols))

    def _nodes(self, part: Translated, before: Iterable[Any] = ()) -> list[Any]:
        """The nodes of a part, with what sites stand for in their place."""
        result = list(before)
        for node in part.nodes:
            if node.domain == DOMAIN and node.op_type == SITE:
                result += self._put_back(node)
            else:
                result.append(node)
        return result

    def _put_back(self, node: Any) -> list[Any]:
        import onnx_ir as ir

        number = node.attributes["number"].as_int()
        site = self.lowering.sites[number]
        inputs = dict(zip(site.inputs, node.inputs, strict=True))
        made, outputs = self._replacement(number, site, inputs)
        for each in made:
            each.metadata_props.update(node.metadata_props)
        for old, new in zip(node.outputs, outputs, strict=True):
            new.dtype, new.shape, new.name = old.dtype, old.shape, old.name
            ir.convenience.replace_all_uses_with(old, new)
            for part in self.parts:
                part.outputs[:] = [new if each is old else each for each in part.outputs]
        return made

    def _replacement(self, number: int, site: Site, inputs: dict[Node, Any]) -> tuple[list[Any], list[Any]]:
        """Nodes, and the values that stand for the site's results."""
        if site.is_weight:
            made = low_bit.dequantized(site.call, list(inputs.values()))
            return made, [made[-1].outputs[0]]
        if opaque.is_opaque(site.call):
            return opaque.put_back(site, list(inputs.values()), self.opsets, self.functions)
        if site.call.target is sliced:
            part, piece = self.parts[self.bodies[number]], self.bodies[number]
            return regions.loop(site, inputs, part, self._nodes(part, self._constants(piece)))
        if self.dialect == "custom":
            made = [functions.call(site, functions.op_name(site), inputs, attributes=functions.attributes(site))]
        else:
            made = [functions.call(site, self.local[functions.key(site, self.lowering.symbols)][0].name, inputs)]
        return made, list(made[0].outputs)

    # --- values --------------------------------------------------------------------------------------------------------------------

    def _name_values(self, main: Translated) -> None:
        """Inputs and outputs keep their names, and dims those of their symbols; everything between is numbered."""
        import onnx_ir as ir

        piece, symbols = self.pieces[0], self.lowering.symbols
        taken: set[str] = set()
        names = [unique(name, taken) for name in piece.names]
        results = [unique(name, taken) for name in output_names(self.function)]
        for value, name, node in zip([*main.inputs, *main.outputs], [*names, *results], [*piece.inputs, *piece.outputs], strict=True):
            value.name = name
            type_ = node.meta["val"]
            if isinstance(type_, torch.Tensor):
                value.shape = ir.Shape([size if isinstance(size, int) else symbols.text(size) for size in type_.shape])
                value.dtype = ir.DataType(element_type(type_.dtype))
        for value, (name, _) in zip(main.constants, piece.constants.values(), strict=True):
            value.name = unique(name, taken)
        self.taken = taken

    def _number_values(self, model: Any) -> None:
        """Names for what lies between: a graph inside another must not have a name of it."""
        import onnx_ir as ir

        keep = {id(value) for value in (*model.graph.inputs, *model.graph.outputs, *model.graph.initializers.values())}
        numbers = (n for n in itertools.count() if f"v{n}" not in self.taken)
        for graph in (model.graph, *(function.graph for function in model.functions.values())):
            for value in [] if graph is model.graph else graph.inputs:
                value.name = f"v{next(numbers)}"
            for node in ir.traversal.RecursiveGraphIterator(graph):
                inner = [
                    value
                    for attribute in node.attributes.values()
                    if attribute.type == ir.AttributeType.GRAPH
                    for value in attribute.value.inputs
                ]
                for value in (*node.outputs, *inner):
                    if id(value) not in keep:
                        value.name = f"v{next(numbers)}"
                        if value.shape is not None and any(not isinstance(size, int) for size in value.shape):
                            value.shape = None  # torch's names of sizes say nothing here
                node.name = None

    def _initializers(self, main: Translated) -> list[Any]:
        """Weights that something reads."""
        packed = {inputs[0]: site.call for site in self.lowering.sites if site.is_weight for inputs in [list(site.inputs)]}
        found = []
        for value, (node, (_, tensor)) in zip(main.constants, self.pieces[0].constants.items(), strict=True):
            value.const_value = low_bit.codes(packed[node], tensor, value.name) if node in packed else _tensor(tensor, value.name)
            value.dtype, value.shape = value.const_value.dtype, value.const_value.shape
            found.append(value)
        return found

    def _constants(self, piece: int) -> list[Any]:
        """Constants of a body, as nodes of it."""
        import onnx_ir as ir

        made: list[Any] = []
        for value, (name, tensor) in zip(self.parts[piece].constants, self.pieces[piece].constants.values(), strict=True):
            node = ir.node("Constant", [], {"value": ir.tensor(tensor.numpy(), name=name)})
            node.outputs[0].name = f"{name}_{piece}_{len(made)}"
            ir.convenience.replace_all_uses_with(value, node.outputs[0])
            made.append(node)
        return made


def _tensor(tensor: torch.Tensor, name: str) -> Any:
    """A weight as it lies in memory, on the CPU."""
    from onnx_ir.tensor_adapters import TorchTensor

    if tensor.is_complex():
        raise CaptureError(f"weight {name} is of complex numbers, which ONNX models have none of")
    return TorchTensor(tensor.to("cpu").contiguous(), name=name)


def _clean(model: Any) -> None:
    """Drops what nothing reads. Nothing else is changed: no constant is looked at."""
    from onnx_ir.passes.common import IdentityEliminationPass, RemoveUnusedNodesPass

    IdentityEliminationPass()(model)
    RemoveUnusedNodesPass()(model)
