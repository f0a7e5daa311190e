"""The pass `append-lora`: a low-rank adapter joins the branch of a layer that is quantized already; nothing is quantized again.

    down' = [down; A],  up' = [up, s B]        y' = y + s (x A.T) B.T

The rank is padded with zeros to a multiple of 16, as kernels take it. Where the layer's input carries folded factors a, A is divided by
them. A layer of a concatenation that was split takes it in parts. Other layers on the same down-projection get columns of zeros.
Source: SVDQuant (arXiv 2411.05007), section 4.3.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import count, takewhile
from typing import Any

import torch

from ...ir import Node, Program, Rewriter
from ...ir.errors import PassError
from ...ir.float64 import exact_value
from ...ir.pattern import named_arguments
from ..base import Outcome, Pass
from ..contract import Contract
from ..options import option
from .folds import folded_factors_name, folded_rows_name
from .layers import Layer, computed, find_layers, layer_name, layer_of, part_name
from .recipe import stored_dtype
from .rewrite import LOWRANK, forget_factors, product_of

_PADDING = 16


@dataclass(frozen=True)
class AppendLoRA(Pass):
    """A low-rank adapter joins the branch of a layer that is quantized already; nothing is quantized again.

    adapters: layer name -> (A [r, K], B [N, r]), as in W + scale B A. scale: s, often alpha / r.

    Equal to the program before where every B is 0.
    """

    name = "append-lora"
    contract = Contract.SUBSTITUTION
    before = frozenset({"slice-groups"})  # layers inside a region are not seen
    after = frozenset({"smooth", "split-low-rank", "quantize", "absorb-outliers"})

    adapters: Any = option(None, "a mapping of layer names to (A, B)", lambda v: v is None or isinstance(v, Mapping), spelled=False)
    scale: float = option(1.0, "a finite number", lambda v: isinstance(v, int | float) and not isinstance(v, bool) and math.isfinite(v))

    def run(self, rewriter: Rewriter) -> Outcome:
        adapters: Mapping[str, Any] = self.adapters or {}
        if any(weight.tensor is None for weight in rewriter.program.weights.values()):
            raise PassError(f"pass {self.name}: the program was read from text and its weights have no values: give parse() a weight table")
        layers = _layers(rewriter)
        parts = {name: _parts(name, layers) for name in adapters}
        unknown = sorted(name for name in adapters if not parts[name])
        if unknown:
            raise PassError(f"pass {self.name}: no layer is called {unknown[0]}; there are {', '.join(sorted(layers)) or 'none'}")
        for name, pair in adapters.items():
            widths = [_input(layers[part], rewriter.program).meta["val"].shape[-1] for part in parts[name]]
            a, b = self._checked(name, pair, layers[parts[name][0]].meta["val"].shape[-1], sum(widths))
            with rewriter.step("append-lora"):
                for part, columns in zip(parts[name], a.split(widths, 1), strict=True):
                    self._append(rewriter, layers, part, columns, b)
        return Outcome(lines=(f"{len(adapters)} adapters",))

    def _checked(self, name: str, pair: Any, n: int, k: int) -> tuple[torch.Tensor, torch.Tensor]:
        if not (isinstance(pair, tuple | list) and len(pair) == 2 and all(isinstance(each, torch.Tensor) for each in pair)):
            raise PassError(f"pass {self.name}: the adapter of {name} is no pair of tensors (A, B)")
        if any(each.is_complex() for each in pair):
            raise PassError(f"pass {self.name}: the adapter of {name} holds complex numbers, and its layer real ones")
        a, b = (each.detach().to(torch.float64) for each in pair)
        if a.dim() != 2 or b.dim() != 2 or a.size(1) != k or b.size(0) != n or a.size(0) != b.size(1):
            shapes = f"A {list(a.shape)} and B {list(b.shape)}"
            raise PassError(f"pass {self.name}: {name} takes A [r, {k}] and B [{n}, r], not {shapes}")
        if not (bool(torch.isfinite(a).all()) and bool(torch.isfinite(b).all())):
            raise PassError(f"pass {self.name}: the adapter of {name} holds NaN or infinity")
        return a, b

    def _append(self, rewriter: Rewriter, layers: dict[str, Node], name: str, a: torch.Tensor, b: torch.Tensor) -> None:
        node = layers[name]
        if node.target is not LOWRANK:
            node = layers[name] = _with_branch(rewriter, node)
        records = rewriter.program.weights
        if folded_factors_name(name) in records:  # the layer reads x a
            a = a / exact_value(records[folded_factors_name(name)])
        if folded_rows_name(name) in records:  # its result is read as y a
            b = b * exact_value(records[folded_rows_name(name)]).unsqueeze(1)
        arguments = named_arguments(node)
        down = _value(rewriter, arguments["down"], (0, a.size(1)))
        padding = -(down.size(0) + a.size(0)) % _PADDING
        store = stored_dtype(arguments["x"].meta["val"].dtype)
        shared = self._stored(rewriter, name, arguments["down"], "down", torch.cat([down, a, a.new_zeros(padding, a.size(1))]), store)
        for other, member in list(layers.items()):
            if member is not node and (arguments["down"] is None or member.target is not LOWRANK):
                continue
            own = named_arguments(member)
            if member is not node and own["down"] is not arguments["down"]:
                continue
            up = _value(rewriter, own["up"], (member.meta["val"].shape[-1], 0))
            added = self.scale * b if member is node else up.new_zeros(up.size(0), b.size(1))
            columns = torch.cat([up, added, up.new_zeros(up.size(0), padding)], 1)
            own["down"], own["up"] = shared, self._stored(rewriter, other, own["up"], "up", columns, store)
            layers[other] = _called(rewriter, member, own)

    def _stored(self, rewriter: Rewriter, layer: str, node: Node | None, which: str, value: torch.Tensor, store: torch.dtype) -> Node:
        stored = value.to(store)
        if not bool(torch.isfinite(stored).all()):
            raise PassError(f"pass {self.name}: with the adapter the branch of {layer} holds numbers too large for {store}")
        return computed(rewriter, _lora_name(layer, node, which), stored)


def _layers(rewriter: Rewriter) -> dict[str, Node]:
    """Layers by name: those on codes or residuals, and those left as they were."""
    found = {layer.name: layer.node for layer in find_layers(rewriter)[0]}
    for node in rewriter.nodes():
        if node.target is LOWRANK:
            found[layer_name(str(named_arguments(node)["weight_q"].target))] = node
    return found


def _parts(name: str, layers: Mapping[str, Node]) -> list[str]:
    """The layer of that name, or those that it became where it reads a concatenation, each by its own columns of A; [] for none."""
    if name in layers:
        return [name]
    return list(takewhile(layers.__contains__, (part_name(name, i) for i in count())))


def _input(node: Node, program: Program) -> Node:
    if node.target is LOWRANK:
        return named_arguments(node)["x"]
    layer = layer_of(node, program)
    assert isinstance(layer, Layer)
    return layer.x


def _with_branch(rewriter: Rewriter, node: Node) -> Node:
    """A layer as the dialect's operation on its float weight, without a branch yet."""
    product = product_of(node, rewriter.program)
    assert product is not None
    weight, table = product.matrix, rewriter.program.weights
    if product.transposed:
        source = table[str(product.matrix.target)]
        assert source.tensor is not None
        weight = computed(rewriter, f"{product.name}.residual", source.tensor.T, lambda: exact_value(source).T)
    options = {"weight_format": "none"} | ({} if product.smooth is None else {"smooth": product.smooth})
    new = rewriter.insert(LOWRANK, (product.x, weight, None, None, None, product.bias), options, before=node, origin=node)
    rewriter.replace(node, new)
    forget_factors(rewriter, product)
    return new


def _called(rewriter: Rewriter, node: Node, arguments: dict[str, Any]) -> Node:
    positional = ("x", "weight_q", "weight_scale", "down", "up", "bias")
    defaults = {argument.name: argument.default_value for argument in LOWRANK._schema.arguments}
    options = {name: value for name, value in arguments.items() if name not in positional and value != defaults[name]}
    return rewriter.set_arguments(node, [arguments[name] for name in positional], options)


def _value(rewriter: Rewriter, node: Node | None, empty: tuple[int, int]) -> torch.Tensor:
    if node is None:
        return torch.zeros(empty, dtype=torch.float64)
    return exact_value(rewriter.program.weights[str(node.target)])


def _lora_name(layer: str, node: Node | None, which: str) -> str:
    stem = f"{layer}.{which}" if node is None else str(node.target)
    return stem if stem.endswith(f".lora.{which}") else f"{stem.rpartition('.')[0]}.lora.{which}"
