"""Random decoders of tokens: embedding, blocks of causal attention, logits, both sizes symbolic; often one that no cache is right for."""

import torch

from ..ir import Program, Symbol
from ..ir.build import set_outputs
from ..ir.program import new_function
from .builder import Builder
from .choices import Choices
from .values import Value

aten = torch.ops.aten
_ATTENTION = aten.scaled_dot_product_attention.default

_MISSES = 45  # percent
_LONGEST = 12
_VOCABULARY = 11
_DEPTH = 8


def random_decoder(choices: Choices, max_nodes: int = 12) -> Program:
    """tokens i64[s0, s1] (and positions, at times) -> logits [s0, s1, 11].

    Near misses: an attention that sees what is to come, tokens that meet outside of attention, hidden states among the outputs.
    """
    b = Builder(choices)
    sizes = [b.symbols.declare(Symbol("s0", 2, 5, 2)), b.symbols.declare(Symbol("s1", 3, _LONGEST, choices.pick((5, 7))))]
    miss = choices.pick(("not causal", "tokens meet", "two outputs")) if choices.chance(_MISSES) else ""
    tokens = b.input(sizes, torch.int64)
    x = _looked_up(b, tokens, _VOCABULARY)
    if choices.chance(40):
        places = _looked_up(b, b.input(sizes, torch.int64), _LONGEST)
        x = b.call(aten.add.Tensor, x, places, low=-6.0, high=6.0)
    for _ in range(choices.pick((1, 1, 1, 2)) if max_nodes > 6 else 1):
        x = _block(b, x, is_causal=miss != "not causal")
    if miss == "tokens meet":
        x = b.call(aten.add.Tensor, x, b.call(aten.mean.dim, x, [1], True))
    logits = _layer(b, x, _VOCABULARY)
    set_outputs(b.graph, [logits.node, *([x.node] if miss == "two outputs" else [])], ())
    used = {str(node.target) for node in b.graph.nodes if node.op == "get_attr" and node.users}
    for node in [node for node in b.graph.nodes if node.op == "get_attr" and not node.users]:
        b.graph.erase_node(node)
    return Program([new_function("main", b.graph)], {name: weight for name, weight in b.weights.items() if name in used}, b.symbols)


def _looked_up(b: Builder, index: Value, count: int) -> Value:
    return b.call(aten.embedding.default, b.weight((count, _DEPTH), torch.float32), index, low=-3.0, high=3.0)


def _block(b: Builder, x: Value, *, is_causal: bool) -> Value:
    """Norm, attention of one head or several and, at times, a layer with an activation, added to what came in."""
    if b.choices.chance(50):
        x = b.call(aten.layer_norm.default, x, [_DEPTH], b.weight((_DEPTH,), torch.float32), low=-9.0, high=9.0)
    joined = _attention_of_heads(b, x, is_causal) if b.choices.chance(40) else _attention_of_one(b, x, is_causal)
    after = b.call(aten.add.Tensor, x, _layer(b, joined, _DEPTH))
    if b.choices.chance(75):
        return after
    wide = b.call(b.choices.pick((aten.gelu.default, aten.silu.default)), _layer(b, after, 2 * _DEPTH), low=-0.5)
    return b.call(aten.add.Tensor, after, _layer(b, wide, _DEPTH))


def _attention_of_one(b: Builder, x: Value, is_causal: bool) -> Value:
    q, k, v = (b.call(aten.unsqueeze.default, _layer(b, x, _DEPTH), 1) for _ in range(3))
    return b.call(aten.squeeze.dim, b.call(_ATTENTION, q, k, v, None, 0.0, is_causal), 1)


def _attention_of_heads(b: Builder, x: Value, is_causal: bool) -> Value:
    kv_heads = b.choices.pick((2, 1))
    q = _heads(b, x, 2)
    k, v = (_heads(b, x, kv_heads) for _ in range(2))
    options = {"enable_gqa": True} if kv_heads < 2 else {}
    back = b.call(aten.transpose.int, b.call(_ATTENTION, q, k, v, None, 0.0, is_causal, **options), 1, 2)
    dense = b.call(aten.clone.default, back, memory_format=torch.contiguous_format)
    return b.call(aten.view.default, dense, [b.size(x, 0), b.size(x, 1), _DEPTH])


def _heads(b: Builder, x: Value, count: int) -> Value:
    """[B, count, T, D / 2] of a layer of `x` [B, T, D]."""
    apart = b.call(aten.view.default, _layer(b, x, count * _DEPTH // 2), [b.size(x, 0), b.size(x, 1), count, _DEPTH // 2])
    return b.call(aten.transpose.int, apart, 1, 2)


def _layer(b: Builder, x: Value, width: int) -> Value:
    """Weights are small and tokens few kinds, so that nothing grows: no guard stands before it."""
    return b.call(aten.linear.default, x, b.weight((width, b.static(x.shape[-1])), torch.float32, low=-0.5, high=0.5))
