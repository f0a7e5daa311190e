"""The dialect's own operations. `gw.onnx_node` is left out: what it computes is onnxruntime's."""

import torch

from ...ir.low_bit.quantize import quantize
from ..builder import Builder, Rejected
from ..values import LIMIT, Value
from .convolutions import image
from .products import fitting
from .registry import maker

gw, aten = torch.ops.gw, torch.ops.aten
_WEIGHT_FORMATS = ("none", "int4-g16", "int8-channel", "mxint8", "nvint4")
_ACT_FORMATS = ("none", "none", "int8-token")


def tokens(b: Builder, rank: int, depth: int | None = None) -> Value:
    """A value of floats with elements, [.., T, D] in `rank` dims."""
    fits = [v for v in b.values if v.rank == rank and v.is_float and v.is_static and 0 not in v.shape and depth in (None, v.shape[-1])]
    if fits and b.choices.chance(60):
        return b.within(b.choices.pick(fits[-3:]), 10.0)
    sizes = [b.choices.pick((2, 3, 1)) for _ in range(rank - 2)]
    return b.within(b.leaf((*sizes, b.choices.pick((5, 4, 1, 8)), depth or b.choices.pick((8, 16, 4))), torch.float32), 10.0)


@maker("dialect", weight=2)
def lowrank_linear(b: Builder) -> Value:
    depth = b.choices.pick((32, 64))
    x = tokens(b, b.choices.pick((2, 3)), depth)
    width, rank, form = b.choices.pick((8, 5)), b.choices.pick((2, 0, 4)), b.choices.pick(_WEIGHT_FORMATS)
    weight = b.weight((width, depth), torch.float32, low=-1.0, high=1.0)
    scale, scale2, before = None, None, len(b.values)
    if form != "none":
        made = quantize(b.weights[str(weight.node.target)].tensor, form)
        weight = b.constant(made.codes, 0.0, 255.0)
        scale = b.constant(made.scale, 0.0, 1.0)
        scale2 = None if made.scale2 is None else b.constant(made.scale2, 0.0, 1.0)
        del b.values[before:]  # codes and 8-bit scales are no operands of other operations
    down, up = (b.weight((rank, depth), x.dtype), b.weight((width, rank), x.dtype)) if rank else (None, None)
    bias = b.weight((width,), x.dtype) if b.choices.chance(50) else None
    options = {"weight_format": form, "act_format": b.choices.pick(_ACT_FORMATS), "weight_scale2": scale2}
    if b.choices.chance(30):
        options["smooth"] = b.weight((depth,), x.dtype, low=0.5, high=2.0)
    return b.call(gw.lowrank_linear.default, b.within(x, 1.0), weight, scale, down, up, bias, **options)


@maker("dialect", weight=2)
def group_norm_in_halves(b: Builder) -> Value:
    x = image(b)
    channels = b.static(x.shape[1])
    groups = b.choices.pick([g for g in (2, 1, channels) if channels % g == 0])
    stats = b.call(gw.norm_stats.default, b.within(x, 100.0), groups, low=-LIMIT, high=1e6)
    affine = [b.weight((channels,), x.dtype) if b.choices.chance(60) else None for _ in range(2)]
    b.values.remove(stats)  # counts and sums of squares beyond the range of others
    return b.call(gw.norm_apply.default, b.within(x, 100.0), stats, *affine, groups, 1e-5, low=-300.0, high=300.0)


def _experts(b: Builder, depth: int, count: int, inner: int, dtype: torch.dtype) -> tuple[Value, Value]:
    gate_up = b.weight((count, 2 * inner, depth), dtype, low=-0.5, high=0.5)
    return gate_up, b.weight((count, depth, inner), dtype, low=-0.5, high=0.5)


@maker("dialect")
def token_choice(b: Builder) -> Value:
    x = tokens(b, 2)
    count, taken = b.choices.pick((4, 3, 1)), b.choices.pick((2, 1))
    places, depth = x.shape
    index = b.index(b.leaf((places, taken), torch.int64), count)
    weight = b.call(aten.sigmoid.default, b.leaf((places, taken), x.dtype), low=0.0, high=1.0)
    options = {"activation": b.choices.pick(("silu", "gelu", "relu", "gelu_tanh")), "combine_dtype": torch.float32}
    if x.dtype == torch.float64:
        options["combine_dtype"] = torch.float64
    return b.call(gw.token_choice_moe.default, x, index, weight, *_experts(b, depth, count, 4, x.dtype), **options)


@maker("dialect")
def expert_choice(b: Builder) -> Value:
    x = tokens(b, 3)
    batch, places, depth = x.shape
    count, capacity = b.choices.pick((3, 2)), b.choices.integer(0, b.static(places))
    logits = b.within(b.leaf((batch, places, count), x.dtype), 10.0)
    valid = b.leaf((batch, places), torch.bool) if b.choices.chance(30) else None
    rule = b.choices.pick(("orig", "post", "sigmoid"))
    before = len(b.values)
    results = b.all_of(gw.expert_choice.default, logits, valid, None, capacity=capacity, rule=rule)
    index, gate = results
    del b.values[before:]  # -1 stands for no place, which is no index
    return b.call(gw.expert_mlp.default, x, index, gate, *_experts(b, depth, count, 4, x.dtype), activation="silu")


@maker("dialect")
def grouped_product(b: Builder) -> Value:
    x = tokens(b, 2)
    rows, depth = x.shape
    first = b.choices.integer(0, b.static(rows))
    last = rows if b.choices.chance(70) else b.choices.integer(first, b.static(rows))  # rows behind it belong to no matrix
    ends = b.constant(torch.tensor([first, last], dtype=torch.int32), 0.0, float(rows))
    return b.call(gw.grouped_mm.default, fitting(b, x, b.static(depth)), b.weight((2, depth, 4), x.dtype), ends)


@maker("dialect", weight=2)
def cached_attention(b: Builder) -> list[Value] | Value:
    batch, heads, kv_heads, capacity, depth = 2, b.choices.pick((2, 4)), 2, b.choices.pick((8, 5)), b.choices.pick((4, 8))
    caches = [b.leaf((batch + 1, kv_heads, capacity, depth), torch.float32) for _ in range(2)]
    length = b.choices.pick((1, 2))
    new = [b.leaf((batch, kv_heads, length, depth), torch.float32) for _ in range(2)]
    position = b.index(b.leaf((batch,), torch.int64), capacity - length + 1)
    rows = b.constant(torch.tensor([2, 0]), 0.0, 2.0)
    written = b.all_of(gw.kv_append.default, *caches, *new, position, rows)
    if b.choices.chance(20):
        return written
    q = b.within(b.leaf((batch, heads, length, depth), torch.float32), 10.0)
    options = {"scale": 0.125, "window": b.choices.pick((0, 3)), "softcap": b.choices.pick((0.0, 20.0))}
    return b.call(gw.cached_attention.default, q, *written, position, rows, low=-128.0, high=128.0, **options)


@maker("dialect", weight=2)
def chunked_recurrence(b: Builder) -> Value:
    heads, kv_heads = b.choices.pick(((2, 2), (4, 2)))
    length, depth, chunk = b.choices.pick((9, 5, 8, 16)), b.choices.pick((4, 8)), b.choices.pick((4, 3, 1))
    q = b.within(b.leaf((2, heads, length, depth), torch.float32), 10.0)
    k, v, gate = (b.within(b.leaf((2, kv_heads, length, depth), torch.float32), 10.0) for _ in range(3))
    bias = b.weight((chunk, kv_heads, 1), torch.float32) if b.choices.chance(50) else None
    angles = b.weight((1, length, depth // 2), torch.float32) if b.choices.chance(40) else None
    cos, sin = (None, None) if angles is None else (b.call(f, angles, low=-1.0, high=1.0) for f in (aten.cos.default, aten.sin.default))
    options = {"window": b.choices.pick((0, 4)), "sinks": b.choices.pick((0, 2)), "local": b.choices.pick(("state", "raw"))}
    if length > chunk and b.choices.chance(20):
        options["reset"] = False
    return b.call(gw.rat_attention.default, q, k, v, gate, bias, cos, sin, chunk=chunk, scale=0.25, low=-10.0, high=10.0, **options)


@maker("dialect")
def chunked_recurrence_in_steps(b: Builder) -> Value:
    batch, heads, depth, chunk, length = 2, 2, 4, b.choices.pick((4, 3)), b.choices.pick((1, 3))
    window, sinks, summaries = b.choices.pick((4, 0)), b.choices.pick((0, 2)), 4
    slots = sinks + summaries + window + 1
    q, k, v, gate = (b.within(b.leaf((batch, heads, length, depth), torch.float32), 10.0) for _ in range(4))
    held = [b.within(b.leaf((batch, heads, slots, depth), torch.float32), 10.0) for _ in range(2)]
    states = [b.within(b.leaf((batch, heads, depth), torch.float32), 10.0) for _ in range(2)]
    position = b.index(b.leaf((batch,), torch.int64), summaries * chunk - length)
    rows = b.constant(torch.tensor([1, 0]), 0.0, 1.0)
    operands = (q, k, v, gate, None, None, None, *held, *states, position, rows, None)
    results = b.all_of(gw.rat_cached_attention.default, *operands, chunk=chunk, scale=0.25, window=window, sinks=sinks)
    if not results:
        raise Rejected
    return results[0]
