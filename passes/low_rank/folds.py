"""Folding a site's factors into what makes its input, so that smoothing costs nothing at run time.

    layer_norm, rms_norm with a weight; mul(., w)       w *= a, bias *= a
    linear, also through attention's values, or as u    rows *= a, bias *= a
      in act(g) * u
    n (1 + s) + t with s, t from linear layers          rows of t *= a, bias of t *= a;
      (adaLN)                                           rows of s *= a, bias_s' = a (1 + bias_s) - 1

A fold is possible where the site's layers are all that read the value. Query heads that share a head of keys share its factors.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from ...ir import Node, Program, Rewriter, Weight
from ...ir.float64 import exact_value
from ...ir.pattern import named_arguments
from .channels import Path, Untraceable, path_to
from .layers import Layer, aten, computed, count_uses, layer_of, smoothed_name
from .sites import Site, source_of

_NORMS = (aten.layer_norm.default, aten.rms_norm.default)


@dataclass(frozen=True)
class Edit:
    """One producer that takes factors. `kind`: "affine" (weight and bias of a norm), "factor" (the weight of a product), "rows"
    (rows of a linear layer) or "one plus" (rows that become 1 + s). rows[k] is the row that makes channel k."""

    node: Node
    kind: str
    rows: torch.Tensor


@dataclass(frozen=True)
class Fold:
    """All that must be edited for one site. `ties[k]`: channels with equal numbers must have equal factors."""

    edits: tuple[Edit, ...]
    ties: torch.Tensor

    @property
    def producer(self) -> str:
        return str(self.edits[-1].node.target).removeprefix("aten.").partition(".")[0]


def find_fold(site: Site, program: Program) -> "Fold | str":
    """How the site's input takes factors, or why it does not."""
    try:
        edits = _edits(site, program)
    except Untraceable as reason:
        return str(reason)
    edited = [str(weight.target) for edit in edits for weight in _weights_of(edit.node)]
    if any(count_uses(program, name) > 1 for name in edited):
        return "a weight of what is before it is used elsewhere"
    if any(program.weights[name].tensor is None for name in edited):
        return "the program was read from text and its weights have no values"
    return Fold(tuple(edits), edits[-1].rows)


def _edits(site: Site, program: Program) -> list[Edit]:
    value = site.source
    _check_readers(site)
    readers = list(value.users)
    if value.target in _NORMS:
        weight = named_arguments(value)["weight"]
        if weight is None:
            raise Untraceable(f"the {_named(value)} before it has no weight")
        _check_constant(value, weight, site)
        return [Edit(value, "affine", torch.arange(site.in_features))]
    scaled = _constant_factor(value)
    if scaled is not None:
        return [Edit(value, "factor", torch.arange(site.in_features))]
    modulated = _modulated(value)
    if modulated is not None:
        one_plus, scale, shift = modulated
        is_product = partial(_is_product, program=program)
        edits = [
            _rows(path_to(scale, [one_plus], is_product, views_only=True), "one plus", site, program),
            _rows(path_to(shift, [value], is_product), "rows", site, program),
        ]
        if not torch.equal(_numbered(edits[0].rows), _numbered(edits[1].rows)):
            raise Untraceable("its shift and scale are not one row each for each channel")
        return edits
    return [_rows(path_to(value, readers, partial(_is_product, program=program)), "rows", site, program)]


def _numbered(rows: torch.Tensor) -> torch.Tensor:
    """Which channels have equal rows, whatever the rows: the place where each row comes first."""
    return (rows.unsqueeze(1) == rows).to(torch.int8).argmax(1)


def _check_readers(site: Site) -> None:
    """Only the site's layers, and views of the value on the way to them, may read it."""
    layers = {layer.node for layer in site.layers}
    pending = [site.source]
    while pending:
        for user in pending.pop().users:
            if user in layers:
                continue
            if user.op != "call_function" or source_of(user) is not site.source:
                raise Untraceable("something else reads its input")
            pending.append(user)


def _check_constant(norm: Node, weight: Node, site: Site) -> None:
    bias = named_arguments(norm).get("bias")
    if weight.op != "get_attr" or (bias is not None and bias.op != "get_attr"):
        raise Untraceable(f"the weight of the {_named(norm)} before it is no constant")
    if list(weight.meta["val"].shape) != [site.in_features]:
        raise Untraceable(f"the {_named(norm)} before it is over several dims")


def _constant_factor(value: Node) -> Node | None:
    """The weight [K] of `mul(., w)`."""
    if value.target is not aten.mul.Tensor:
        return None
    width = value.meta["val"].shape[-1]
    weights = [operand for operand in value.all_input_nodes if operand.op == "get_attr" and tuple(operand.meta["val"].shape) == (width,)]
    return weights[0] if len(weights) == 1 else None


def _modulated(value: Node) -> tuple[Node, Node, Node] | None:
    """(1 + s, s, t) of value = n (1 + s) + t."""
    if value.target is not aten.add.Tensor or value.kwargs or len(value.all_input_nodes) != 2:
        return None
    for product, shift in _both_orders(value):
        if product.target is not aten.mul.Tensor or len(product.all_input_nodes) != 2 or list(product.users) != [value]:
            continue
        for _, one_plus in _both_orders(product):
            if one_plus.target is aten.add.Tensor and _adds_one(one_plus) and list(one_plus.users) == [product]:
                return one_plus, one_plus.all_input_nodes[0], shift
    return None


def _both_orders(node: Node) -> list[tuple[Node, Node]]:
    first, second = node.all_input_nodes
    return [(first, second), (second, first)]


def _adds_one(node: Node) -> bool:
    numbers = [argument for argument in node.args if not isinstance(argument, Node)]
    return not node.kwargs and len(node.all_input_nodes) == 1 and numbers == [1]


def _is_product(node: Node, program: Program) -> bool:
    return isinstance(layer_of(node, program), Layer)


def _rows(path: Path, kind: str, site: Site, program: Program) -> Edit:
    layer = layer_of(path.base, program)
    assert isinstance(layer, Layer)
    if layer.bias is not None and layer.bias.op != "get_attr":
        raise Untraceable("the bias of the layer before it is no constant")
    if kind == "one plus" and layer.bias is None and layer.node.target is not aten.linear.default:
        raise Untraceable("the layer before it takes no bias")
    rows = path.channels()
    if len(rows) != site.in_features:
        raise Untraceable("what it is scaled by is not one number for each channel")
    return Edit(path.base, kind, rows)


def _weights_of(node: Node) -> list[Node]:
    return [operand for operand in node.all_input_nodes if operand.op == "get_attr"]


def _named(node: Node) -> str:
    return str(node.target).removeprefix("aten.").partition(".")[0]


# --- applying ------------------------------------------------------------------------------------------------------------


def apply_edit(rewriter: Rewriter, node: Node, edit: Edit, factors: torch.Tensor) -> Node:
    """The producer `node` anew with `factors` (float64, for each channel of the site's input) in its parameters."""
    program = rewriter.program
    if edit.kind == "affine":
        arguments = named_arguments(node)
        for name in ("weight", "bias"):
            if arguments.get(name) is not None:
                arguments[name] = _scaled(rewriter, arguments[name], factors)
        return rewriter.set_arguments(node, list(arguments.values()))
    if edit.kind == "factor":
        weight = _constant_factor(node)
        new = _scaled(rewriter, weight, factors) if weight is not None else None
        return rewriter.set_arguments(node, [new if argument is weight else argument for argument in node.args], dict(node.kwargs))
    layer = layer_of(node, program)
    assert isinstance(layer, Layer)
    rows = torch.ones(layer.out_features, dtype=torch.float64, device=factors.device)
    rows[edit.rows.to(factors.device)] = factors
    _record_rows(rewriter, layer, rows)
    weight = computed_rows(rewriter, layer, rows)
    bias = _new_bias(rewriter, layer, edit, factors, rows)
    return rewriter.set_arguments(node, relinked(layer, weight, bias))


def folded_factors_name(layer: str) -> str:
    """The record of the factors that a layer's input carries: it reads x a."""
    return f"{layer}.folded_smooth"


def folded_rows_name(layer: str) -> str:
    """The record of the factors that a layer's own rows carry, for what reads its result."""
    return f"{layer}.folded_rows"


def record_factors(rewriter: Rewriter, name: str, factors: torch.Tensor) -> None:
    """Records `factors`, times those that are recorded already: who adds to a layer later, as a LoRA does, must know them."""
    known = rewriter.program.weights.get(name)
    product = factors.to(torch.float64) * (1 if known is None else exact_value(known))
    dtype = torch.float64 if factors.dtype == torch.float64 else torch.float32
    rewriter.record(Weight.of(name, product.to(dtype), "record"))


def _record_rows(rewriter: Rewriter, layer: Layer, rows: torch.Tensor) -> None:
    record_factors(rewriter, folded_rows_name(layer.name), rows)


def _scaled(rewriter: Rewriter, node: Node | None, factors: torch.Tensor) -> Node:
    assert node is not None
    weight = rewriter.program.weights[str(node.target)]

    def exact() -> torch.Tensor:
        return exact_value(weight) * factors

    return computed(rewriter, smoothed_name(weight.name), exact().to(weight.dtype), exact)


def computed_rows(rewriter: Rewriter, layer: Layer, rows: torch.Tensor) -> Node:
    """The weight of `layer` with its rows multiplied, stored as it was."""
    source = rewriter.program.weights[str(layer.weight.target)]
    factors = rows if layer.transposed else rows.unsqueeze(1)

    def exact() -> torch.Tensor:
        return exact_value(source) * factors

    return computed(rewriter, smoothed_name(source.name), exact().to(source.dtype), exact)


def _new_bias(rewriter: Rewriter, layer: Layer, edit: Edit, factors: torch.Tensor, rows: torch.Tensor) -> Node | None:
    """bias * a; for rows that become 1 + s, a (1 + bias) - 1."""
    if layer.bias is None and edit.kind == "rows":
        return None
    source = None if layer.bias is None else rewriter.program.weights[str(layer.bias.target)]
    is_scale = torch.zeros_like(rows, dtype=torch.bool)
    if edit.kind == "one plus":
        is_scale[edit.rows.to(rows.device)] = True

    def exact() -> torch.Tensor:
        bias = torch.zeros_like(rows) if source is None else exact_value(source)
        return torch.where(is_scale, rows * (1 + bias) - 1, rows * bias)

    name = source.name if source is not None else f"{layer.name}.bias"
    dtype = source.dtype if source is not None else layer.dtype
    return computed(rewriter, smoothed_name(name), exact().to(dtype), exact)


def relinked(layer: Layer, weight: Node, bias: Node | None) -> Sequence[Any]:
    """The arguments of the layer's own operation on another weight and bias."""
    if layer.node.target is aten.linear.default:
        return [layer.x, weight, bias]
    if layer.node.target is aten.addmm.default:
        return [bias, layer.x, weight]
    return [layer.x, weight]
