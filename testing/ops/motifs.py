"""What rules look for, as networks have it, each at times a *near miss* that a rule must leave alone.

Source: specs/trust.md, section 3.5.
"""

import torch

from ...ir.symbols import hint
from ..builder import Builder, Rejected
from ..values import FLOATS, Value
from .convolutions import convolution, image
from .norms import normalised
from .products import fitting, layer
from .registry import maker

aten = torch.ops.aten


@maker("motifs", weight=3)
def layer_then_batch_norm(b: Builder) -> object:
    """Near misses: the layer's result is read twice, the norm's other channels, a weight that is computed."""
    if b.choices.chance(60):
        x = b.within(image(b), 4.0)
        inner = convolution(b, x, b.choices.pick((4, 2, 8)), plain=b.choices.chance(50))
    else:
        x = b.within(b.operand(low=2, high=b.choices.pick((2, 3))), 8.0)
        inner = layer(b, x, b.choices.pick((4, 5)))
    after = normalised(b, inner)
    if isinstance(after, list):
        return after
    if b.choices.chance(25):
        return b.call(aten.add.Tensor, after, inner)  # read twice
    return b.call(b.choices.pick((aten.relu.default, aten.silu.default)), after, low=-0.5, high=after.high)


@maker("motifs", weight=3)
def attention_block(b: Builder) -> Value:
    """Projections of one value, heads, attention, projection back, residual."""
    x = tokens_of(b)
    batch, length, depth = x.shape
    heads = 2 if b.static(depth) % 2 == 0 else 1

    def split(value: Value) -> Value:
        sizes = [b.size(value, 0), b.size(value, 1), heads, b.static(depth) // heads]
        apart = b.call(aten.view.default, value, sizes, low=value.low, high=value.high)
        return b.call(aten.transpose.int, apart, 1, 2, low=value.low, high=value.high)

    q, k, v = (split(b.within(layer(b, x, b.static(depth)), 10.0)) for _ in range(3))
    kind = b.choices.pick(("plain", "causal", "spelled out"))
    if kind == "spelled out":
        turned = b.call(aten.transpose.int, k, -2, -1, low=k.low, high=k.high)
        scores = b.call(aten.matmul.default, b.call(aten.mul.Scalar, q, 0.5, low=-5.0, high=5.0), turned, low=-1000.0, high=1000.0)
        together = b.call(aten.matmul.default, b.call(aten.softmax.int, scores, -1, low=0.0, high=1.0), v, low=v.low, high=v.high)
    else:
        together = b.call(aten.scaled_dot_product_attention.default, q, k, v, None, 0.0, kind == "causal", low=v.low, high=v.high)
    back = b.call(aten.transpose.int, together, 1, 2, low=v.low, high=v.high)
    dense = b.call(aten.clone.default, back, memory_format=torch.contiguous_format, low=v.low, high=v.high)
    joined = b.call(aten.view.default, dense, [b.size(x, 0), b.size(x, 1), b.static(depth)], low=v.low, high=v.high)
    return b.call(aten.add.Tensor, x, b.within(layer(b, joined, b.static(depth)), 1000.0), low=-2000.0, high=2000.0)


def tokens_of(b: Builder) -> Value:
    """[B, T, D] with a known D."""
    known = [v for v in b.values if v.rank == 3 and v.is_float and isinstance(v.shape[-1], int) and 0 not in v.shape]
    if known and b.choices.chance(70):
        return b.within(b.choices.pick(known[-3:]), 100.0)
    sizes = (b.choices.pick((2, 1, *b.symbolic())), b.choices.pick((5, 8, 3, *b.symbolic())))
    return b.leaf((*sizes, b.choices.pick((8, 4, 16))), b.choices.pick((*FLOATS[:1] * 4, *FLOATS)))


@maker("motifs", weight=2)
def gated_layers(b: Builder) -> Value:
    """down(act(gate(x)) * up(x)), at times with one projection that is cut in two, or with the halves swapped."""
    x = tokens_of(b)
    depth = b.static(x.shape[-1])
    activation = b.choices.pick((aten.silu.default, aten.gelu.default, aten.sigmoid.default))
    if b.choices.chance(50):
        gate, up = (b.within(layer(b, x, 8), 100.0) for _ in range(2))
    else:
        both = b.within(layer(b, x, 16), 100.0)
        gate, up = b.all_of(aten.split.Tensor, both, 8, -1, bounds=[(both.low, both.high)])
    if b.choices.chance(30):
        gate, up = up, gate
    product = b.call(aten.mul.Tensor, b.call(activation, gate, low=-0.5, high=100.0), up)
    return layer(b, product, depth)


@maker("motifs", weight=2)
def norm_spelled_out(b: Builder) -> Value:
    """An RMS norm or a layer norm in parts, its eps where it belongs or outside of the root."""
    x = b.within(tokens_of(b), 50.0)
    rms = b.choices.chance(60)
    if not rms:
        mean = b.call(aten.mean.dim, x, [-1], True, low=x.low, high=x.high)
        x = b.call(aten.sub.Tensor, x, mean, low=-100.0, high=100.0)
    square = b.call(aten.pow.Tensor_Scalar, x, 2, low=0.0, high=x.bound**2)
    mean_square = b.call(aten.mean.dim, square, [-1], True, low=0.0, high=square.high)
    eps = b.choices.pick((1e-5, 1e-6, 0.1))
    inside = b.call(aten.add.Scalar, mean_square, eps, low=eps, high=square.high + eps)
    scaled = b.call(aten.mul.Tensor, x, b.call(aten.rsqrt.default, inside, low=0.0, high=eps**-0.5), low=-50.0, high=50.0)
    return b.call(aten.mul.Tensor, scaled, b.weight((b.static(x.shape[-1]),), x.dtype), low=-150.0, high=150.0)


@maker("motifs", weight=2)
def residual_convolutions(b: Builder) -> Value:
    """Norm, activation, convolution, added to what came in: U-Nets are made of these."""
    x = image(b, 2)
    channels = b.static(x.shape[1])
    groups = 2 if channels % 2 == 0 else 1
    norm = b.call(aten.group_norm.default, x, groups, *[b.weight((channels,), x.dtype) for _ in range(2)], 1e-5, low=-300.0, high=300.0)
    active = b.call(aten.silu.default, norm, low=-0.5, high=300.0)
    after = convolution(b, active, channels, plain=True)
    return b.call(aten.add.Tensor, b.within(x, 1000.0), b.within(after, 1000.0), low=-2000.0, high=2000.0)


@maker("motifs", weight=2)
def repeated(b: Builder) -> Value:
    """One expression two or three times, which may be shared; in a near miss one of them differs."""
    x = b.operand()
    target, number = b.choices.pick(((aten.mul.Scalar, 0.5), (aten.add.Scalar, 1.0), (aten.sub.Scalar, 2)))
    numbers = [number, number if b.choices.chance(70) else 0.25]
    parts = [b.call(target, b.within(x, 1000.0), each, low=-1100.0, high=1100.0) for each in numbers]
    shape = b.choices.pick(("add", "stack", "apart"))
    if shape == "add":
        return b.call(aten.add.Tensor, *parts, low=-2200.0, high=2200.0)
    return b.call(aten.stack.default, parts, 0, low=-1100.0, high=1100.0) if shape == "stack" else parts[1]


@maker("motifs", weight=3)
def what_changes_nothing(b: Builder) -> Value:
    """Several calls in a row that give their operand, and traps that only look so: + 0.0, a cast there and back, 1 in another dtype."""
    x = b.operand(lambda value: value.dtype != torch.bool, low=1)
    for _ in range(b.choices.integer(1, 4)):
        same = {"low": x.low, "high": x.high}
        sizes = [b.size(x, dim) for dim in range(x.rank)]
        kind = b.choices.pick(("one", "view", "copy", "slice", "expand", "twice turned", "zero", "cast back", "permute"))
        if kind == "one":
            x = b.call(b.choices.pick((aten.mul.Tensor, aten.mul.Scalar, aten.div.Scalar)), x, b.choices.pick((1, 1.0)), **same)
        elif kind == "view":
            x = b.call(b.choices.pick((aten.view.default, aten.reshape.default)), x, sizes, **same)
        elif kind == "copy":
            x = b.call(b.choices.pick((aten.clone.default, aten.alias.default, aten.contiguous.default)), x, **same)
        elif kind == "slice":
            x = b.call(aten.slice.Tensor, x, b.dim(x), 0, 2**63 - 1, **same)
        elif kind == "expand":
            x = b.call(aten.expand.default, x, [-1] * x.rank, **same)
        elif kind == "twice turned":
            x = b.call(aten.transpose.int, b.call(aten.transpose.int, x, 0, -1, **same), 0, -1, **same)
        elif kind == "zero":
            x = b.call(b.choices.pick((aten.add.Tensor, aten.sub.Tensor, aten.add.Scalar)), x, b.choices.pick((0, 0.0, -0.0)), **same)
        elif kind == "cast back" and x.is_float:
            x = b.cast(b.cast(x, b.choices.pick((torch.float64, torch.bfloat16))), x.dtype)
        else:
            x = b.call(aten.permute.default, x, list(range(x.rank)), **same)
    return x


@maker("motifs", weight=2)
def chain_of_views(b: Builder) -> Value:
    """Views of views, some of which cancel out."""
    x = b.operand(lambda value: True, low=1)
    for _ in range(b.choices.integer(2, 4)):
        kind = b.choices.pick(("transpose", "view", "permute", "unsqueeze", "clone", "select back"))
        bounds = {"low": x.low, "high": x.high}
        if kind == "transpose" and x.rank > 1:
            x = b.call(aten.transpose.int, x, 0, 1, **bounds)
        elif kind == "permute":
            x = b.call(aten.permute.default, x, list(reversed(range(x.rank))), **bounds)
        elif kind == "unsqueeze" and x.rank < 6:
            x = b.call(aten.unsqueeze.default, x, 0, **bounds)
        elif kind == "clone":
            x = b.call(aten.clone.default, x, **bounds)
        elif kind == "select back" and x.rank and x.shape[0] == 1:
            x = b.call(aten.select.int, x, 0, 0, **bounds)
        elif x.is_static and x.rank:
            x = b.call(aten.view.default, x, _other_sizes(b, x), **bounds)
    return x


def _other_sizes(b: Builder, x: Value) -> list[int]:
    sizes = [b.static(size) for size in x.shape]
    return b.choices.pick(([1, *sizes], [*sizes, 1], sizes, [-1] if 0 not in sizes else sizes))


@maker("motifs", weight=2)
def constant_expression(b: Builder) -> Value:
    """A weight of a weight, which is computed once, in use beside an input."""
    x = b.within(b.operand(low=1), 100.0)
    depth = b.static(x.shape[-1])
    value = b.weight((depth,), x.dtype)
    for _ in range(b.choices.integer(1, 3)):
        target = b.choices.pick((aten.sigmoid.default, aten.tanh.default, aten.relu.default, aten.cos.default, aten.neg.default))
        value = b.call(target, value, low=-3.0, high=3.0)
    if b.choices.chance(40):
        value = b.call(aten.unsqueeze.default, value, 0, low=-3.0, high=3.0)
    return b.call(b.choices.pick((aten.mul.Tensor, aten.add.Tensor)), x, value, low=-400.0, high=400.0)


@maker("motifs")
def mixture_of_experts(b: Builder) -> Value:
    """Dense experts: all see all tokens, weights of a softmax over the best few. Near misses: the gate is the second half, its activation
    is another, a value inside is read elsewhere, or tokens are summed in the place of experts."""
    miss = b.choices.pick(("second half", "activation", "read twice", "tokens")) if b.choices.chance(45) else ""
    rows, depth, count, inner, best = b.choices.pick((5, 8)), b.choices.pick((4, 8)), b.choices.pick((4, 3)), 4, b.choices.pick((2, 1))
    x = b.within(b.leaf((rows, depth), torch.float32), 10.0)
    logits = b.within(b.call(aten.linear.default, x, b.weight((count, depth), x.dtype, low=-1.0, high=1.0)), 50.0)
    shares = b.call(aten.softmax.int, logits, -1, low=0.0, high=1.0)
    values, places = b.all_of(aten.topk.default, shares, best, -1, bounds=[(0.0, 1.0), (0.0, float(count - 1))])
    zeros = b.call(aten.zeros_like.default, shares, low=0.0, high=0.0)
    gates = b.call(aten.scatter.src, zeros, 1, places, values, low=0.0, high=1.0)  # [T, E]
    gate_up = b.weight((count, depth, 2 * inner), x.dtype, low=-0.5, high=0.5)
    down = b.weight((count, inner, depth), x.dtype, low=-0.5, high=0.5)
    many = b.call(aten.expand.default, b.call(aten.unsqueeze.default, x, 0, low=-10.0, high=10.0), [count, -1, -1], low=-10.0, high=10.0)
    hidden = b.call(aten.bmm.default, many, gate_up, low=-100.0, high=100.0)
    gate, up = b.all_of(aten.chunk.default, hidden, 2, -1, bounds=[(-100.0, 100.0)])
    if miss == "second half":
        gate, up = up, gate
    activation = aten.sigmoid.default if miss == "activation" else b.choices.pick((aten.silu.default, aten.gelu.default))
    act = b.call(aten.mul.Tensor, b.call(activation, gate, low=-0.5, high=100.0), up)
    out = b.call(aten.bmm.default, act, down)  # [E, T, D]
    if miss == "read twice":
        b.returned.append(b.call(aten.neg.default, out))
    weight = b.call(aten.unsqueeze.default, b.call(aten.transpose.int, gates, 0, 1, low=0.0, high=1.0), -1, low=0.0, high=1.0)
    return b.call(aten.sum.dim_IntList, b.call(aten.mul.Tensor, out, weight), [1 if miss == "tokens" else 0])


@maker("motifs")
def pooled_sum(b: Builder) -> Value:
    x = b.within(image(b, 2), 50.0)
    pooled = b.call(aten.avg_pool2d.default, x, [2, 2], low=x.low, high=x.high)
    flat = b.call(aten.flatten.using_ints, pooled, 1, -1, low=x.low, high=x.high)
    return b.call(aten.sum.dim_IntList, flat, [1], low=-8000.0, high=8000.0)


@maker("motifs")
def low_rank_adapter(b: Builder) -> Value:
    x = tokens_of(b)
    depth, width, rank = b.static(x.shape[-1]), b.choices.pick((8, 4)), b.choices.pick((2, 1))
    own = layer(b, x, width)
    down = b.call(aten.linear.default, fitting(b, x, depth), b.weight((rank, depth), x.dtype))
    up = b.call(aten.linear.default, fitting(b, down, rank), b.weight((width, rank), x.dtype))
    return b.call(aten.add.Tensor, b.within(own, 1000.0), b.within(up, 1000.0), low=-2000.0, high=2000.0)


@maker("motifs")
def rotated_by_position(b: Builder) -> Value:
    """Rotary positions: x cos + rotate_half(x) sin, angles from constants, from weights or from an input."""
    x = tokens_of(b)
    depth = b.static(x.shape[-1])
    if depth % 2:
        raise Rejected
    length = hint(x.shape[1])
    if not isinstance(x.shape[1], int):
        raise Rejected
    small = b.within(x, 100.0)
    cos, sin = (b.weight((length, depth), x.dtype, low=-1.0, high=1.0, kind="buffer") for _ in range(2))
    first = b.call(aten.slice.Tensor, small, -1, 0, depth // 2, low=small.low, high=small.high)
    second = b.call(aten.slice.Tensor, small, -1, depth // 2, 2**63 - 1, low=small.low, high=small.high)
    turned = b.call(aten.cat.default, [b.call(aten.neg.default, second, low=-100.0, high=100.0), first], -1, low=-100.0, high=100.0)
    a = b.call(aten.mul.Tensor, small, cos, low=-100.0, high=100.0)
    return b.call(aten.add.Tensor, a, b.call(aten.mul.Tensor, turned, sin, low=-100.0, high=100.0), low=-200.0, high=200.0)
