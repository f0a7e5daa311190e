"""The two rewrites of a layer: into a weight beside a branch (exact), and of that weight into codes (bounded).

linear(x, W, b)                     -> gw.lowrank_linear(x, R, D, U, b, weight_format="none")
linear(mul(x, a), W, b)             -> gw.lowrank_linear(x, R, D, U, b, weight_format="none", smooth=a)
either                              -> gw.lowrank_linear(x, codes, scale, D, U, b, weight_format=..., ...)
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from ...ir import Node, Program, Rewriter, Weight
from ...ir.float64 import exact_value
from ...ir.low_bit import Quantized, dequantize
from ...ir.pattern import named_arguments
from .folds import folded_factors_name
from .layers import Layer, aten, computed, gw, layer_name, layer_of

LOWRANK = gw.lowrank_linear.default


@dataclass(frozen=True)
class Product:
    """A layer in any of its forms. `matrix` is the weight (or residual) [N, K]; x carries `smooth` already where that is None."""

    node: Node
    x: Node
    matrix: Node
    transposed: bool
    bias: Node | None
    smooth: Node | None
    down: Node | None
    up: Node | None
    name: str

    @property
    def shape(self) -> tuple[int, int]:
        """(N, K)."""
        n, k = self.matrix.meta["val"].shape
        return (int(k), int(n)) if self.transposed else (int(n), int(k))

    @property
    def dtype(self) -> torch.dtype:
        """That of its activations."""
        return self.x.meta["val"].dtype

    def exact_matrix(self, program: Program) -> torch.Tensor:
        """[N, K] in float64."""
        value = exact_value(program.weights[str(self.matrix.target)])
        return value.T if self.transposed else value


def product_of(node: Node, program: Program) -> Product | None:
    """`node` as a layer, a constant factor of its input taken to it; None where it is none, or holds codes already."""
    if node.target is LOWRANK:
        arguments = named_arguments(node)
        if arguments["weight_format"] != "none" or arguments["weight_q"].op != "get_attr":
            return None
        weight = arguments["weight_q"]
        optional = {name: arguments[name] for name in ("bias", "smooth", "down", "up")}
        return Product(node, arguments["x"], weight, False, **optional, name=layer_name(str(weight.target)))
    layer = layer_of(node, program)
    if not isinstance(layer, Layer):
        return None
    x, smooth = _without_factor(layer, program)
    return Product(node, x, layer.weight, layer.transposed, layer.bias, smooth, None, None, layer.name)


def product_behind(node: Node, program: Program, factors: torch.Tensor) -> Product | None:
    """`node` as a layer whose input was multiplied by these `factors`, and by no other that is taken to it."""
    layer = layer_of(node, program)
    if not isinstance(layer, Layer):
        return product_of(node, program)
    x, smooth = _without(layer, program, factors)
    return Product(node, x, layer.weight, layer.transposed, layer.bias, smooth, None, None, layer.name)


def _without_factor(layer: Layer, program: Program) -> tuple[Node, Node | None]:
    """The layer's input before smoothing multiplied it, and the factors: a product that is the smoothing on record, and no other."""
    record = program.weights.get(folded_factors_name(layer.name))
    return (layer.x, None) if record is None else _without(layer, program, exact_value(record))


def _without(layer: Layer, program: Program, record: torch.Tensor) -> tuple[Node, Node | None]:
    """The layer's input without the factors `record`, and these; the input and None where it is no product by them."""
    x = layer.x
    if x.target is not aten.mul.Tensor or x.kwargs or len(x.all_input_nodes) != 2:
        return x, None
    inner, vector = x.args
    if not isinstance(vector, Node) or vector.op != "get_attr" or not isinstance(inner, Node):
        return x, None
    if inner.meta["val"].dtype != x.meta["val"].dtype or inner.meta["val"].shape != x.meta["val"].shape:
        return x, None
    factors = program.weights[str(vector.target)]
    is_it = factors.shape == record.shape and torch.equal(exact_value(factors), record.to(torch.float64))
    return (inner, vector) if is_it else (x, None)


def forget_factors(rewriter: Rewriter, product: Product) -> None:
    """Once the factors are an operand of the layer its input carries them no more: none, or those of a smoothing before."""
    if product.smooth is None or product.node.target is LOWRANK:
        return
    name, table = folded_factors_name(product.name), rewriter.program.weights
    record = table.get(name)
    rest = None if record is None else exact_value(record) / exact_value(table[str(product.smooth.target)])
    rewriter.forget(name)
    if record is not None and rest is not None and not bool((rest == 1).all()):
        rewriter.record(Weight.of(name, rest.to(record.dtype), "record"))


def split(rewriter: Rewriter, product: Product, up: torch.Tensor, down: Node) -> Node:
    """The layer as a float residual beside the branch `up`, `down` (which reads x as it is, before `smooth`)."""
    table = rewriter.program.weights
    source, low = table[str(product.matrix.target)], table[str(down.target)]
    smooth = None if product.smooth is None else table[str(product.smooth.target)]
    wide_up = up.to(torch.float64)

    def exact() -> torch.Tensor:
        whole = exact_value(source).T if product.transposed else exact_value(source)
        raw = exact_value(low) if smooth is None else exact_value(low) / exact_value(smooth)
        return whole - wide_up @ raw

    wide = torch.float64 if product.dtype == torch.float64 else torch.float32  # in which the operation sums
    residual = computed(rewriter, f"{product.name}.residual", exact().to(wide), exact)
    raised = computed(rewriter, f"{product.name}.up", up)
    arguments = (product.x, residual, None, down, raised, product.bias)
    options = {"weight_format": "none"} | ({} if product.smooth is None else {"smooth": product.smooth})
    new = rewriter.insert(LOWRANK, arguments, options, before=product.node, origin=product.node)
    rewriter.replace(product.node, new)
    forget_factors(rewriter, product)
    return new


def quantize_product(
    rewriter: Rewriter, product: Product, quantized: Quantized, weight_format: str, activations: Mapping[str, Any], rotate: int
) -> Node:
    """The layer on codes; `activations` holds act_format, act_shift and act_scale2 where they are not the op's defaults."""
    program = rewriter.program
    codes = computed(rewriter, f"{product.name}.codes", quantized.codes)
    scale = computed(rewriter, f"{product.name}.scale", quantized.scale)
    options: dict[str, Any] = {"weight_format": weight_format, **activations}
    if product.smooth is not None:
        options["smooth"] = product.smooth
    if quantized.scale2 is not None:
        options["weight_scale2"] = computed(rewriter, f"{product.name}.scale2", quantized.scale2)
    if rotate:
        options["rotate"] = rotate
    bias = product.bias
    if activations.get("act_shift"):
        bias = _shifted_bias(rewriter, product, quantized, weight_format, activations["act_shift"], program)
    arguments = (product.x, codes, scale, product.down, product.up, bias)
    new = rewriter.insert(LOWRANK, arguments, options, before=product.node, origin=product.node)
    rewriter.replace(product.node, new)
    forget_factors(rewriter, product)
    return new


def _shifted_bias(rewriter: Rewriter, product: Product, quantized: Quantized, form: str, shift: float, program: Program) -> Node:
    """bias - shift * (dequantize(codes) @ a): what the shift of the activations adds."""
    bias = None if product.bias is None else program.weights[str(product.bias.target)]
    smooth = None if product.smooth is None else program.weights[str(product.smooth.target)]

    def exact() -> torch.Tensor:
        values = dequantize(quantized.codes, quantized.scale, quantized.scale2, form, torch.float64)
        added = shift * (values.sum(1) if smooth is None else values @ exact_value(smooth))
        return -added if bias is None else exact_value(bias) - added

    dtype = product.x.meta["val"].dtype
    return computed(rewriter, f"{product.name}.shifted.bias", exact().to(dtype), exact)
