"""From a function of a program to the graph that is translated: what torch's exporter does not know, or would change, becomes a site or
another call.

A *site* stands for a call that is put in its place afterwards: an operator of the dialect, a region, an ONNX node, a low-bit weight.
Float64 scalars are constants here, since the exporter writes scalars as float32.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx
from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols

from ...calls import GETITEM, is_assertion, name_of
from ...errors import CaptureError
from ...infer import InferenceError, fake_like, infer
from ...op import declaration
from ...program import Function, Node, Program
from ...region import Region, narrow, slice_bounds, sliced
from ...region_call import RegionCall
from ...symbols import SymbolTable
from ..dialect import DOMAIN
from ..dtypes import element_type
from . import low_bit
from .apart import has_float64, loses, taken_apart
from .data_sites import SITE
from .scalars import exact
from .translate import Piece

aten = torch.ops.aten


@dataclass(frozen=True)
class Site:
    """A call that is put back in ONNX: `call` of the program, `args` and `kwargs` as they are in the piece, `inputs` the nodes in them,
    each with the tensor that the site's node reads for it."""

    call: Node
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    inputs: dict[Node, Node]
    is_weight: bool = False  # the site stands for the weight of a low-bit layer, not for the layer


@dataclass
class Lowering:
    """Pieces in the making, and the sites in them by number."""

    program: Program
    inline: bool = False  # operators of the dialect are taken apart, instead of being sites
    unroll: bool = False  # and so are regions
    sites: list[Site] = field(default_factory=list)

    @property
    def symbols(self) -> SymbolTable:
        return self.program.symbols

    def function(self, function: Function) -> Piece:
        """The piece of a function: states and inputs that are written to are inputs whose new values are outputs."""
        piece, copies = Piece(), dict[Node, Any]()
        for node in function.placeholders:
            value = node.meta["val"]
            is_input = isinstance(value, torch.Tensor | torch.SymInt)
            copies[node] = piece.input(str(node.target), value) if is_input else value  # else a constant of the capture
        for node in function.graph.nodes:
            if node.op == "get_attr":
                copies[node] = piece.constant(str(node.target), self._tensor(str(node.target)), node.meta["val"])
        self._copy_calls(piece, function.graph.nodes, copies)
        piece.outputs = [copies[leaf] for leaf in function.outputs if isinstance(leaf, fx.Node)]
        return piece

    def body(self, call: RegionCall, operands: Iterable[Any]) -> Piece:
        """The piece of a region's body, whose inputs are of the types `operands`."""
        piece = Piece()
        inputs = [piece.input(f"operand_{place}", value) for place, value in enumerate(operands)]
        piece.outputs = self._run_body(piece, call.body, inputs)
        return piece

    def _tensor(self, name: str) -> torch.Tensor:
        tensor = self.program.weights[name].tensor
        if tensor is None:
            raise CaptureError(f"weight {name} has no values: this program was read from text, give parse() a weight table")
        return tensor.detach()

    # --- calls ---------------------------------------------------------------------------------------------------------------------

    def _copy_calls(self, piece: Piece, nodes: Iterable[Node], copies: dict[Node, Any], *, typed_anew: bool = False) -> None:
        for node in nodes:
            if node.op != "call_function" or is_assertion(node.target):
                continue
            args, kwargs = fx.map_arg((node.args, node.kwargs), copies.__getitem__)
            copies[node] = self._copy(piece, node, args, kwargs, self._type(node, args, kwargs) if typed_anew else node.meta["val"])

    def _copy(self, piece: Piece, node: Node, args: Any, kwargs: Any, value: Any) -> Any:
        if node.target is sliced and self.unroll:
            return self._unrolled(piece, node, args, kwargs)
        if node.target is GETITEM and isinstance(args[0], list):
            return args[0][args[1]]
        target: Any = _SAME.get(node.target, node.target)
        if low_bit.has_standard_weight(node):
            args, kwargs = self._with_float_weight(piece, node, args, kwargs)
        declared = declaration(target)
        if target is sliced or (declared is not None and (declared.is_opaque or not self.inline)):
            return self._site(piece, Site(node, args, kwargs, _operands(piece, node, args, kwargs)), value)
        if has_float64(value, (args, kwargs)):
            target, args, kwargs = exact(piece, self.symbols, target, args, kwargs)
            if declared is not None or loses(target, args, kwargs):
                return taken_apart(piece, self.symbols, target, args, kwargs, node)
        return piece.call(target, args, kwargs, value, node)

    def _type(self, node: Node, args: Any, kwargs: Any) -> Any:
        """The type of a call on operands other than it was captured with: those of a shorter slice."""
        if node.target is GETITEM and isinstance(args[0], list):
            return None
        try:
            return infer(self.symbols, node.target, args, kwargs)  # type: ignore[arg-type]
        except InferenceError as error:
            raise CaptureError(f"{name_of(node.target)} at {node.meta.get('where')} does not type-check on a slice: {error}") from error

    def _site(self, piece: Piece, site: Site, value: Any) -> Node:
        """A node of the exporter's own for any ONNX operator. It is private: torch.onnx.ops.symbolic_multi_out makes it, and takes
        no nodes of a graph."""
        import torch.onnx.ops  # noqa: F401 - declares it

        if not hasattr(torch.ops.onnx_symbolic, "_symbolic_multi_out"):
            raise CaptureError("this torch's ONNX exporter has no nodes for operators of others: use torch 2.11 to 2.13")
        single = isinstance(value, torch.Tensor)
        results = (value,) if single else tuple(value)
        number = len(self.sites)
        self.sites.append(site)
        if any(free_unbacked_symbols(list(result.shape)) for result in results):
            made = _site_of_data(piece, site, number, results)
            return piece.call(GETITEM, (made, 0), {}, value, site.call) if single else made
        kwargs = {
            "shapes": [list(result.shape) for result in results],
            "attr_keys": ["number"], "attr_types": ["i"], "attr_pos": [[0, 1]], "attr_ints": [number], "attr_floats": [], "attr_strs": [],
            "metadata_props_keys": [], "metadata_props_values": [], "domain": DOMAIN, "version": 1,
        }  # fmt: skip
        args = (list(site.inputs.values()), SITE, [element_type(result.dtype) for result in results])
        made = piece.call(torch.ops.onnx_symbolic._symbolic_multi_out.default, args, kwargs, results, site.call)
        return piece.call(GETITEM, (made, 0), {}, value, site.call) if single else made

    def _with_float_weight(self, piece: Piece, node: Node, args: Any, kwargs: Any) -> tuple[Any, Any]:
        """The arguments of a low-bit layer with its weight as the floats that a site gives."""
        codes, scale, scale2 = args[1], args[2], kwargs.get("weight_scale2")
        symbols, shape = self.symbols, low_bit.weight_shape(node)
        value = fake_like(symbols, torch.float32, shape, (shape[1], 1), codes.meta["val"].device)
        inputs = {each: each for each in (codes, scale, scale2) if each is not None}
        weight = self._site(piece, Site(node, args, kwargs, inputs, is_weight=True), value)
        return (args[0], weight, None, *args[3:]), {**kwargs, "weight_format": "none", "weight_scale2": None}

    # --- regions -------------------------------------------------------------------------------------------------------------------

    def _run_body(self, piece: Piece, body: Region, operands: list[Any]) -> list[Any]:
        copies = dict(zip(body.placeholders, operands, strict=True))
        self._copy_calls(piece, body.graph.nodes, copies, typed_anew=True)
        return [copies[leaf] for leaf in body.outputs]

    def _unrolled(self, piece: Piece, node: Node, args: Any, kwargs: Any) -> list[Node]:
        """The body once for each slice, and its results side by side."""
        call = RegionCall.of(node)
        units, count = _region_size(call)
        parts = []
        for begin, end in slice_bounds(units, min(count, units)):
            operands = [
                self._narrowed(piece, node, operand, dim, begin, end, units) for operand, dim in zip(args[4:], call.in_dims, strict=True)
            ]
            parts.append(self._run_body(piece, call.body, operands))
        return [
            piece.call(aten.cat.default, ([part[place] for part in parts], dim), {}, whole, node)
            for place, (dim, whole) in enumerate(zip(call.out_dims, node.meta["val"], strict=True))
        ]

    def _narrowed(self, piece: Piece, node: Node, operand: Node, dim: int, begin: int, end: int, units: int) -> Node:
        if dim < 0 or units == 0:
            return operand
        whole = operand.meta["val"]
        unit = whole.size(dim) // units
        with self.symbols.inference():
            value = narrow(whole, dim, begin, end, units)
        return piece.call(aten.slice.Tensor, (operand, dim, begin * unit, end * unit), {}, value, node)


def _site_of_data(piece: Piece, site: Site, number: int, results: Sequence[torch.Tensor]) -> Node:
    """A site whose results have sizes that only the data tell: those that an input has are read off it, others are new."""
    inputs = list(site.inputs.values())
    sizes = [_known_size(piece, site, inputs, size) for result in results for size in result.shape]
    args = (inputs, sizes, number, [result.dtype for result in results], [result.dim() for result in results])
    return piece.call(torch.ops.gw_export.site.default, args, {}, tuple(results), site.call)


def _known_size(piece: Piece, site: Site, inputs: Sequence[Node], size: Any) -> Any:
    if isinstance(size, int):
        return size
    tensors = [(node, node.meta["val"]) for node in inputs if isinstance(node.meta["val"], torch.Tensor)]
    places = ((node, dim, other) for node, value in tensors for dim, other in enumerate(value.shape))
    for node, dim, other in places:
        if isinstance(other, torch.SymInt) and other.node.expr == size.node.expr:
            return piece.call(aten.sym_size.int, (node, dim), {}, other, site.call)
    return -1


def value_of(size: Any) -> Any:
    """A number, or the size that a node is."""
    return size.meta["val"] if isinstance(size, fx.Node) else size


def units_of(call: RegionCall) -> Any:
    """Units of a region: as declared, or the size of the dims that are sliced."""
    if call.units is not None:
        return value_of(call.units)
    return next(operand.meta["val"].size(dim) for operand, dim in zip(call.operands, call.in_dims, strict=True) if dim >= 0)


def _region_size(call: RegionCall) -> tuple[int, int]:
    """Units and slices of a region.

    Raises:
        CaptureError: they are known at the call only.
    """
    units = units_of(call)
    if not isinstance(units, int) or not isinstance(call.count, int):
        raise CaptureError("a region whose number of slices is known at the call only cannot be written out: export it as a loop")
    return units, call.count


def _operands(piece: Piece, node: Node, args: Any, kwargs: Any) -> dict[Node, Node]:
    """The nodes that a call reads, each once, as tensors: a size is made one. The sizes of an ONNX node's results are none of its
    inputs."""
    found: dict[Node, Node] = {}

    def note(each: Node) -> None:
        if isinstance(each.meta["val"], torch.Tensor):
            found[each] = each
        elif each not in found:
            found[each] = piece.call(aten.scalar_tensor.default, (each,), {"dtype": torch.int64}, None, node)

    fx.map_arg(args[0] if "onnx_node" in str(node.target) else (args, kwargs), note)
    return found


# Of the strides of what a site gives the exporter knows nothing, and a view may be none of these.
_SAME = {aten.view.default: aten.reshape.default, aten._unsafe_view.default: aten.reshape.default}
