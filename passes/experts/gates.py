"""The gate between the two products of an expert: act(first half) * second half."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from ...ir import Node
from ...ir.calls import GETITEM, name_of
from ...ir.pattern import NoMatch, named_arguments
from .products import ExpertProduct, operation

aten = torch.ops.aten

_SPLITS = (aten.split.Tensor, aten.split_with_sizes.default, aten.chunk.default)
_GELU = {"none": "gelu", "tanh": "gelu_tanh"}
_ACTIVATIONS = {aten.silu.default: "silu", aten.relu.default: "relu"}


@dataclass(frozen=True)
class Gated:
    """The first product, whose halves are gate and value, and the activation of the gate."""

    product: ExpertProduct
    activation: str


def is_gated(product: ExpertProduct) -> bool:
    """Whether halves of a product's result are read: it is the first of an expert's two."""
    return any(user.target in (*_SPLITS, aten.slice.Tensor) for user in product.result.users)


def gated_of(down: ExpertProduct, products: Mapping[Node, ExpertProduct]) -> Gated | NoMatch:
    """What the second product of an expert reads."""
    product: Any = down.x
    if operation(product) is not aten.mul.Tensor:
        return _between(down, products)
    for activated, value in (product.args, product.args[::-1]):
        gate, other = _half(_first(activated)), _half(value)
        if gate is None or other is None or gate[0] is not other[0]:
            continue
        if gate[0] not in products:
            break
        if products[gate[0]].form != down.form or products[gate[0]].experts is not down.experts:
            return NoMatch("the two products of its experts are not of the same rows", product)
        activation = _activation(activated)
        if activation is None:
            return NoMatch(f"the activation of its experts, {name_of(activated.target)}, is unknown", activated)
        if (gate[1], other[1]) != (0, 1):
            return NoMatch("the gate of its experts stands in the second half of their weights", activated)
        return Gated(products[gate[0]], activation)
    return _between(down, products)


def _between(down: ExpertProduct, products: Mapping[Node, ExpertProduct]) -> NoMatch:
    """What stands between the two products of an expert, in the place of a gate."""
    first = [each for each in products.values() if each.weight is not down.weight and _is_read_by(each.result, down.x)]
    if len(first) > 1:
        advice = "stack both into one weight [experts, 2 * inner, width], gate rows first"
        return NoMatch(f"gate and value of its experts are products of their own, with a weight each: {advice}", down.result)
    before = _before(down.x, products)
    last = max((product for product in products if not before.isdisjoint(product.users)), default=None)
    if last is None:
        return NoMatch("what it reads is no result of a product with weights [experts, .., ..]", down.result)
    between = {last}
    for node in sorted(before):
        if not between.isdisjoint(node.all_input_nodes):
            between.add(node)
    names = list(dict.fromkeys(name_of(node.target) for node in sorted(between - {last}) if node.target is not GETITEM))  # type: ignore
    bias = ", a bias among them" if {"aten.add.Tensor", "aten.addmm.default"} & set(names) else ""
    what = f"between the products of its experts stand {', '.join(names)}{bias}"
    return NoMatch(f"{what}, and not an activation of one half of the first times the other half", down.result)


def _before(node: Node, products: Mapping[Node, ExpertProduct]) -> set[Node]:
    """The calls that `node` is computed by, itself among them, back to products."""
    found, pending = set[Node](), [node]
    while pending:
        each = pending.pop()
        if each not in found and each not in products and each.op == "call_function":
            found.add(each)
            pending += each.all_input_nodes
    return found


def _is_read_by(value: Node, reader: Node) -> bool:
    """Whether `reader` is a product of `value`, or of an activation of it, with another."""
    return operation(reader) is aten.mul.Tensor and any(each is value or _first(each) is value for each in reader.args)


def _activation(node: Node) -> str | None:
    if node.target is aten.gelu.default:
        return _GELU.get(named_arguments(node)["approximate"])
    return _ACTIVATIONS.get(node.target)


def _half(node: Any) -> tuple[Node, int] | None:
    """(x, i) where `node` is the first (0) or second (1) half of the columns of x."""
    if operation(node) is GETITEM and operation(node.args[0]) in _SPLITS:
        split, number = node.args
        last = split.args[0].meta["val"].dim() - 1
        dim = list(named_arguments(split).values())[2]
        is_halved = len(split.meta["val"]) == 2 and split.meta["val"][0].shape == split.meta["val"][1].shape
        return (split.args[0], number) if is_halved and dim in (last, -1) else None
    if operation(node) is not aten.slice.Tensor:
        return None
    named = named_arguments(node)
    source, width = named["self"], named["self"].meta["val"].size(-1)
    if named["dim"] not in (-1, source.meta["val"].dim() - 1) or named["step"] != 1 or 2 * node.meta["val"].size(-1) != width:
        return None
    return {0: (source, 0), width // 2: (source, 1)}.get(named["start"] or 0)


def _first(node: Any) -> Any:
    return node.args[0] if isinstance(node, Node) and node.op == "call_function" and node.args else None
