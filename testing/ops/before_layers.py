"""What stands before linear layers in networks and can take factors of their inputs: norms with weights, products with a vector, shifts and
scales that layers make, other layers. At times something else reads the value too, which must stop a pass that folds.
"""

import torch

from ..builder import Builder
from ..values import FLOATS, Value
from .registry import maker

aten = torch.ops.aten


def _tokens(b: Builder, depth: int) -> Value:
    return b.within(b.leaf((b.choices.pick((2, 1)), b.choices.pick((5, 3)), depth), b.choices.pick((*FLOATS[:1] * 5, *FLOATS[:2]))), 16.0)


def _layer(b: Builder, x: Value, width: int) -> Value:
    """On a weight of its own, small enough that nothing need keep its result in range."""
    depth = b.static(x.shape[-1])
    bias = [b.weight((width,), x.dtype, low=-1.0, high=1.0)] if b.choices.chance(70) else []
    bound = depth * x.bound / 4 + 1
    return b.call(aten.linear.default, x, b.weight((width, depth), x.dtype, low=-0.25, high=0.25), *bias, low=-bound, high=bound)


def _layers(b: Builder, x: Value) -> Value:
    """One to three layers that read `x`, their results added up; in a near miss `x` is read elsewhere."""
    y = _layer(b, x, 8)
    for _ in range(b.choices.integer(0, 2)):
        other = _layer(b, x, 8)
        y = b.call(aten.add.Tensor, y, other, low=y.low + other.low, high=y.high + other.high)
    if b.choices.chance(25):
        b.returned.append(b.call(aten.tanh.default, x, low=-1.0, high=1.0))
    return y


@maker("motifs", weight=2)
def norm_before_layers(b: Builder) -> Value:
    depth = b.choices.pick((8, 4, 16))
    x = _tokens(b, depth)
    weight, bias = (b.weight((depth,), x.dtype) for _ in range(2))
    if b.choices.chance(50):
        norm = b.call(aten.rms_norm.default, x, [depth], weight, 1e-5, low=-20.0, high=20.0)
    else:
        norm = b.call(aten.layer_norm.default, x, [depth], weight, bias if b.choices.chance(70) else None, 1e-5, low=-20.0, high=20.0)
    return _layers(b, norm)


@maker("motifs")
def factor_before_layers(b: Builder) -> Value:
    depth = b.choices.pick((8, 4))
    x = b.call(aten.silu.default, _tokens(b, depth), low=-0.5, high=16.0)
    return _layers(b, b.call(aten.mul.Tensor, x, b.weight((depth,), x.dtype), low=-50.0, high=50.0))


@maker("motifs")
def modulated_before_layers(b: Builder) -> Value:
    """n (1 + s) + t, with s and t from layers of one vector, as in diffusion transformers."""
    depth = b.choices.pick((8, 4))
    x = _tokens(b, depth)
    condition = b.within(b.leaf((b.static(x.shape[0]), 1, 4), x.dtype), 4.0)
    shift, scale = (_layer(b, condition, depth) for _ in range(2))
    norm = b.call(aten.layer_norm.default, x, [depth], None, None, 1e-5, low=-5.0, high=5.0)
    one_plus = b.call(aten.add.Tensor, scale, 1, low=scale.low + 1, high=scale.high + 1)
    product = b.call(aten.mul.Tensor, norm, one_plus, low=-5 * one_plus.bound, high=5 * one_plus.bound)
    return _layers(b, b.call(aten.add.Tensor, product, shift, low=product.low + shift.low, high=product.high + shift.high))


@maker("motifs")
def layer_before_layers(b: Builder) -> Value:
    """act(gate(x)) * up(x) or a plain layer, then layers."""
    x = _tokens(b, b.choices.pick((8, 4)))
    y = _layer(b, x, 8)
    if b.choices.chance(60):
        gate = b.call(aten.sigmoid.default, _layer(b, x, 8), low=0.0, high=1.0)
        y = b.call(aten.mul.Tensor, gate, y, low=y.low, high=y.high)
    return _layers(b, y)


@maker("motifs")
def layer_then_norm_of_tokens(b: Builder) -> Value:
    """A near miss: the norm's channels are the tokens, of which there are at times as many as the layer has outputs."""
    x = _tokens(b, 4)
    count = b.static(x.shape[1])
    y = _layer(b, x, b.choices.pick((count, 8)))
    mean, weight, bias = (b.weight((count,), x.dtype) for _ in range(3))
    variance = b.weight((count,), x.dtype, low=0.5, high=2.0)
    bound = 5 * (y.bound + 3) + 3
    return b.call(aten.batch_norm.default, y, weight, bias, mean, variance, False, 0.1, 1e-5, False, low=-bound, high=bound)
