"""Sites: the layers that read one value in one block of the network, and so share their smoothing.

Blocks are told by name, up to the last `.<number>.`: cross-attention of all blocks of a U-Net reads one tensor of text, and its
layers must not share factors across blocks.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ...ir import Node
from ...ir.calls import draws
from ...ir.infer import same_tensor_type
from .layers import Layer

aten = torch.ops.aten

_BLOCK = re.compile(r".*\.\d+(?=\.)|^\d+(?=\.)")
_ATTENTION = re.compile(r"(^|_)(q|k|v|query|key|value)(_|$)")
_LOOK_THROUGH = (aten.dropout.default, aten.alias.default, aten._to_copy.default, aten.to.dtype, aten.type_as.default, aten.clone.default)
_VIEWS = (aten.view.default, aten.reshape.default, aten._unsafe_view.default, aten.flatten.using_ints, aten.unsqueeze.default)


@dataclass(frozen=True)
class Site:
    """Layers with the same `source`: `layers[i].x` is it, or a view of it that keeps its last dim."""

    source: Node
    layers: tuple[Layer, ...]

    @property
    def name(self) -> str:
        return self.layers[0].name

    @property
    def in_features(self) -> int:
        return self.layers[0].in_features

    @property
    def operands(self) -> list[Node]:
        """The distinct nodes that the layers read."""
        return list(dict.fromkeys(layer.x for layer in self.layers))

    def branches(self, share_down: bool) -> list[tuple[int, ...]]:
        """Which of the layers, by number, share one down-projection: those of queries, keys and values, where `share_down`."""
        attention = [i for i, layer in enumerate(self.layers) if is_attention_input(layer.name)] if share_down else []
        shared = [tuple(attention)] if len(attention) > 1 else []
        alone = [(i,) for i in range(len(self.layers)) if not shared or i not in attention]
        return sorted(shared + alone)


def find_sites(layers: Sequence[Layer]) -> list[Site]:
    """The sites of `layers`, in the order of their first layers."""
    grouped: dict[tuple[Node, str], list[Layer]] = {}
    for layer in layers:
        grouped.setdefault((source_of(layer.x), block_of(layer.name)), []).append(layer)
    return [Site(source, tuple(members)) for (source, _), members in grouped.items()]


def block_of(name: str) -> str:
    """`blocks.3.attn.to_q` -> `blocks.3`; "" for a name without a number."""
    found = _BLOCK.match(name)
    return found[0] if found else ""


def is_attention_input(name: str) -> bool:
    """Whether the last part of a layer's name says that it makes queries, keys or values: `to_q`, `k_proj`, `value`."""
    return _ATTENTION.search(name.rpartition(".")[2]) is not None


def source_of(x: Node) -> Node:
    """The value that `x` shows: dropout in eval mode, copies to the same dtype and views that keep the last dim are looked through."""
    while x.op == "call_function" and shows_operand(x):
        x = x.all_input_nodes[0]
    return x


def shows_operand(node: Node) -> bool:
    """Whether each row, over the last dim, of `node` is one of its operand's."""
    if not node.all_input_nodes:
        return False
    operand = node.all_input_nodes[0].meta["val"]
    value = node.meta["val"]
    if not isinstance(operand, torch.Tensor) or not isinstance(value, torch.Tensor) or operand.dim() < 1 or value.dim() < 1:
        return False
    if node.target in _LOOK_THROUGH:
        return not draws(node) and same_tensor_type(operand, value)
    return node.target in _VIEWS and value.shape[-1] == operand.shape[-1] and operand.dtype == value.dtype
