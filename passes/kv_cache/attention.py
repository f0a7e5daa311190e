"""The self-attentions of a decoder, in the two forms in which they are captured.

    scaled_dot_product_attention(q, repeat(k), repeat(v), mask | is_causal)
    matmul(softmax(cap(matmul(q, repeat(k)^T) * scale) + mask), repeat(v))      cap(s) = softcap * tanh(s / softcap), or s

`repeat` copies each key head for the query heads that read it (grouped queries); what is kept is what stands before.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch

from ...ir import Node
from ...ir.infer import same_size
from ...ir.pattern import NoMatch, named_arguments

aten = torch.ops.aten

_SOFTMAX = (aten.softmax.int, aten._softmax.default)
_PASSED_ON = (aten.clone.default, aten._to_copy.default, aten.alias.default, aten.dropout.default)


@dataclass(frozen=True)
class SelfAttention:
    """One attention: q [B, H, T, E], keys and values before heads are repeated, [B, Hk, T, E] each. `mask` is None where it is causal by
    its flag. `root` is the value that it gives, [B, H, T, Ev]. Keys that are there as [B, Hk, E, T] alone are `transposed`."""

    root: Node
    q: Node
    k: Node
    v: Node
    mask: Node | None
    scale: float
    softcap: float = 0.0
    transposed: bool = False

    @property
    def reads(self) -> list[Node]:
        """What a step computes for it: no mask."""
        return [self.q, self.k, self.v]


def find_attentions(nodes: Iterable[Node]) -> tuple[list[SelfAttention], list[NoMatch]]:
    """The attentions among `nodes`, and why others that look like one are none."""
    found, failures = [], []
    for node in nodes:
        match = _fused(node) if node.target is aten.scaled_dot_product_attention.default else _eager(node)
        if isinstance(match, SelfAttention):
            match = _on_one_length(match)
        if isinstance(match, SelfAttention):
            found.append(match)
        elif match is not None:
            failures.append(match)
    return found, failures


def _fused(node: Node) -> SelfAttention | NoMatch:
    a = named_arguments(node)
    if a["dropout_p"]:
        return NoMatch("attention drops weights at random: capture the model after .eval()", node)
    if a["attn_mask"] is None and not a["is_causal"]:
        return NoMatch("attention without a mask sees positions that are yet to come", node)
    if a["attn_mask"] is not None and a["is_causal"]:
        return NoMatch("attention has a mask beside is_causal", node)
    k, v = (unrepeated(a[name]) for name in ("key", "value"))
    scale = a["scale"] if a["scale"] is not None else 1 / math.sqrt(a["query"].meta["val"].size(-1))
    return SelfAttention(node, a["query"], k, v, a["attn_mask"], float(scale))


def _eager(node: Node) -> SelfAttention | NoMatch | None:
    """None where `node` is no product of a softmax with values."""
    if node.target is not aten.matmul.default or node.meta["val"].dim() != 4:
        return None
    probabilities, values = node.args
    softmax = _passed_on(probabilities)
    if softmax is None or softmax.target not in _SOFTMAX or named_arguments(softmax)["dim"] not in (-1, 3):
        return None
    scores, mask = _added(named_arguments(softmax)["self"])
    if mask is None:
        return NoMatch("attention without a mask sees positions that are yet to come", node)
    scores, softcap = _capped(scores)
    scores, scale = _scaled(scores)
    if not isinstance(scores, Node) or scores.target is not aten.matmul.default:
        return NoMatch("scores of an attention are no product of queries and keys", softmax)
    query, transposed = scores.args
    keys = _transposed(transposed)
    k = transposed if keys is None else unrepeated(keys)
    return SelfAttention(node, query, k, unrepeated(values), mask, scale, softcap, transposed=keys is None)  # type: ignore[arg-type]


def _on_one_length(attention: SelfAttention) -> SelfAttention | NoMatch:
    """Refuses what is not [B, heads, T, E] with one T, and heads that do not divide."""
    q, k, v = (each.meta["val"] for each in (attention.q, attention.k, attention.v))
    if not q.dim() == k.dim() == v.dim() == 4:
        return NoMatch("queries, keys and values of an attention are not [batch, heads, length, width]", attention.root)
    keys = k.size(3 if attention.transposed else 2)
    if not same_size(q.size(2), keys) or not same_size(keys, v.size(2)):
        return NoMatch("queries and keys have different lengths: this attention reads another sequence", attention.root)
    if not all(isinstance(each.size(1), int) for each in (q, k, v)) or k.size(1) != v.size(1) or q.size(1) % k.size(1):
        return NoMatch("the heads of keys do not divide those of queries", attention.root)
    return attention


def unrepeated(node: Node) -> Node:
    """[B, Hk, T, E] of which `node` [B, H, T, E] repeats each head: view(clone(expand(unsqueeze(x, 2)))), or repeat_interleave."""
    if node.target is aten.repeat_interleave.self_int and named_arguments(node)["dim"] == 1:
        return node.args[0]  # type: ignore[return-value]
    flat = node
    if flat.target not in (aten.view.default, aten.reshape.default, aten._unsafe_view.default):
        return node
    wide: Any = flat.args[0]
    if wide.target is aten.clone.default:
        wide = wide.args[0]
    if wide.target is not aten.expand.default or wide.meta["val"].dim() != 5:
        return node
    single = wide.args[0]
    if single.target is not aten.unsqueeze.default or named_arguments(single)["dim"] != 2:
        return node
    source = single.args[0]
    batch, heads, repeats, length, width = wide.meta["val"].shape
    wanted = (batch, heads * repeats, length, width)
    is_plain = len(node.meta["val"].shape) == 4 and all(same_size(a, b) for a, b in zip(node.meta["val"].shape, wanted, strict=True))
    return (
        source
        if is_plain and all(same_size(a, b) for a, b in zip(source.meta["val"].shape, (batch, heads, length, width), strict=True))
        else node
    )


def _passed_on(node: Any) -> Node | None:
    """What `node` copies, casts or, outside training, drops nothing of."""
    while isinstance(node, Node) and node.target in _PASSED_ON:
        if node.target is aten.dropout.default and named_arguments(node)["train"] is not False and named_arguments(node)["p"]:
            return None
        node = node.args[0]
    return node if isinstance(node, Node) else None


def _added(node: Any) -> tuple[Any, Node | None]:
    """(scores, mask) of scores + mask: the mask is what has one head for all."""
    node = _passed_on(node)
    if node is None or node.target is not aten.add.Tensor:
        return node, None
    first, second = node.args[:2]
    if not isinstance(second, Node) or not isinstance(first, Node):
        return node, None
    return (first, second) if _is_mask(second) else (second, first) if _is_mask(first) else (node, None)


def _is_mask(node: Node) -> bool:
    shape = node.meta["val"].shape
    return len(shape) < 3 or (isinstance(shape[-3], int) and shape[-3] == 1)


def _capped(node: Any) -> tuple[Any, float]:
    """(s, softcap) of softcap * tanh(s / softcap)."""
    outer = _factor(node)
    if outer is None or outer[0].target is not aten.tanh.default:
        return node, 0.0
    inner = _factor(outer[0].args[0])
    if inner is None or not math.isclose(inner[1] * outer[1], 1.0, rel_tol=1e-6):
        return node, 0.0
    return inner[0], outer[1]


def _scaled(node: Any) -> tuple[Any, float]:
    factor = _factor(node)
    return (node, 1.0) if factor is None else factor


def _factor(node: Any) -> tuple[Node, float] | None:
    """(x, c) of x * c or x / (1/c), c a number."""
    node = _passed_on(node)
    if node is None or len(node.args) != 2 or not isinstance(node.args[0], Node) or not isinstance(node.args[1], int | float):
        return None
    if node.target in (aten.mul.Tensor, aten.mul.Scalar):
        return node.args[0], float(node.args[1])
    if node.target in (aten.div.Tensor, aten.div.Scalar) and node.args[1]:
        return node.args[0], 1.0 / node.args[1]
    return None


def _transposed(node: Any) -> Node | None:
    """x of transpose(x, 2, 3)."""
    if not isinstance(node, Node):
        return None
    if node.target is aten.transpose.int and {dim % 4 for dim in node.args[1:]} == {2, 3}:  # type: ignore[operator]
        return node.args[0]  # type: ignore[return-value]
    if node.target is aten.permute.default and list(node.args[1]) in ([0, 1, 3, 2], [0, 1, -1, -2]):  # type: ignore[arg-type]
        return node.args[0]  # type: ignore[return-value]
    return None
