"""Every row of the legality table, on random shapes, links and slices (feature_slicing.md, properties 1 and 2).

A row that has no sample here does not exist: `test_every_row_has_a_sample` says so.
"""

import random

import pytest
import torch

from graphwright.ir.links import ROWS, Moves, Row, declare
from graphwright.ir.links.probe import call_node, check_links
from graphwright.ir.links.table import Never
from graphwright.ir.low_bit import quantize

aten = torch.ops.aten
SEEDS = 3
SAMPLES = {}  # op name -> functions of a random.Random that give calls (op, args, kwargs)


pytestmark = pytest.mark.usefixtures("one_thread")


def sample(*names):
    def register(function):
        for name in names:
            SAMPLES.setdefault(name, []).append((function, name))
        return function

    return register


def op_of(name):
    """The default (or only, or named) overload of `aten::x` or `aten::x.y`."""
    namespace, _, rest = name.partition("::")
    packet_name, _, overload = rest.partition(".")
    packet = getattr(getattr(torch.ops, namespace), packet_name)
    if overload:
        return getattr(packet, overload)
    return getattr(packet, "default" if "default" in packet.overloads() else packet.overloads()[0])


def t(*shape):
    return torch.randn(shape, dtype=torch.float64)


def shape_of(rng, low=1, high=4):
    return [rng.randint(1, 6) for _ in range(rng.randint(low, high))]


def broadcastable(rng, shape):
    """A shape that broadcasts to `shape`: leading dims dropped, some dims 1."""
    kept = shape[rng.randint(0, len(shape)) :]
    return [1 if rng.random() < 0.3 else s for s in kept]


# ---------------------------------------------------------------- R1, R2: elementwise

UNARY = """
    abs absolute neg negative exp sin relu relu6 gelu silu sigmoid tanh softplus hardswish hardsigmoid hardtanh leaky_relu elu celu selu mish
    log_sigmoid log1p sqrt rsqrt reciprocal floor ceil round fix erf isnan logical_not square sign nan_to_num
    real conj resolve_conj resolve_neg contiguous clone alias detach lift_fresh_copy zeros_like ones_like empty_like imag
""".split()


@sample("pointwise", *(f"aten::{n}" for n in UNARY if f"aten::{n}" in ROWS))
def unary(rng, name):
    for op in UNARY if name == "pointwise" else [name[6:]]:
        x = t(*shape_of(rng))
        yield op_of(f"aten::{op}"), (x.to(torch.complex128) if op == "imag" else x,), {}


BINARY = """
    add.Tensor sub.Tensor mul.Tensor div.Tensor maximum minimum max.other pow.Tensor_Tensor atan2 eq.Tensor lt.Tensor logical_and
    floor_divide true_divide.Tensor divide.Tensor multiply.Tensor subtract.Tensor greater.Tensor greater_equal.Tensor less.Tensor
    less_equal.Tensor not_equal.Tensor float_power.Tensor_Tensor isclose polar complex remainder.Tensor __and__.Tensor __or__.Tensor
""".split()


@sample("pointwise", *(f"aten::{n.split('.')[0]}" for n in BINARY if f"aten::{n.split('.')[0]}" in ROWS))
def binary(rng, name):
    for op in BINARY if name == "pointwise" else [b for b in BINARY if b.split(".")[0] == name[6:]]:
        shape = shape_of(rng)
        pair = [t(*shape), t(*broadcastable(rng, shape))]
        rng.shuffle(pair)
        yield op_of(f"aten::{op}"), [p > 0 for p in pair] if op.startswith("__") else pair, {}
    x = t(2, 3)
    yield aten.mul.Tensor, (x, x), {}


@sample("pointwise", "aten::where", "aten::masked_fill", "aten::clip", "aten::copy", "aten::fill", "aten::full_like")
def assorted_elementwise(rng, name):
    shape = shape_of(rng)
    x, y, mask = t(*shape), t(*broadcastable(rng, shape)), t(*broadcastable(rng, shape)) > 0
    yield from {
        "pointwise": [(aten.clamp.default, (x, -1, 1), {}), (aten.addcmul.default, (x, y, y), {}), (aten.add.Scalar, (x, 2), {}),
                      (aten.lerp.Scalar, (x, x, 0.5), {})],
        "aten::where": [(aten.where.self, (mask, x, y), {}), (aten.where.ScalarOther, (mask, x, 1.0), {})],
        "aten::masked_fill": [(aten.masked_fill.Scalar, (x, mask, 1.0), {}), (aten.masked_fill.Tensor, (x, mask, t()), {})],
        "aten::clip": [(aten.clip.default, (x, -1, 1), {})],
        "aten::copy": [(aten.copy.default, (x, y), {})],
        "aten::fill": [(aten.fill.Scalar, (x, 1.0), {}), (aten.fill.Tensor, (x, t()), {})],
        "aten::full_like": [(aten.full_like.default, (x, 2.0), {})],
    }[name]  # fmt: skip


@sample("aten::to", "aten::_to_copy", "aten::type_as")
def casts(rng, name):
    x = t(*shape_of(rng))
    yield from {
        "aten::to": [(aten.to.dtype, (x, torch.float32), {}), (aten.to.other, (x, torch.ones(5, 7, 2)), {})],
        "aten::_to_copy": [(aten._to_copy.default, (x,), {"dtype": torch.float32})],
        "aten::type_as": [(aten.type_as.default, (x, torch.ones(5, 7, 2)), {})],
    }[name]


@sample("aten::dropout")
def dropout(rng, name):
    yield aten.dropout.default, (t(*shape_of(rng)), 0.5, False), {}


# ---------------------------------------------------------------- R3-R5: products


@sample("aten::linear")
def linear(rng, name):
    i, o = rng.randint(1, 5), rng.randint(1, 6)
    for bias in ((), (t(o),)):
        yield aten.linear.default, (t(*shape_of(rng, 0, 3), i), t(o, i), *bias), {}


@sample("gw::lowrank_linear")
def lowrank_linear(rng, name):
    n, k = rng.randint(2, 5), 32
    for weight_format, act_format in (("int8-channel", "int8-token"), ("int4-g16", "none")):
        weight, x = quantize(t(n, k), weight_format), t(*shape_of(rng, 0, 3), k)
        options = {"weight_format": weight_format, "act_format": act_format, "smooth": t(k).abs() + 1}
        yield torch.ops.gw.lowrank_linear.default, (x, weight.codes, weight.scale, t(2, k), t(n, 2), t(n)), options


@sample("gw::cached_attention")
def caches(rng, name):
    rows, capacity, group, kv_heads = rng.randint(2, 5), 12, rng.randint(1, 3), rng.randint(1, 3)
    batch, queries = rng.randint(1, rows), rng.randint(1, 4)
    cache_k, cache_v = t(rows, kv_heads, capacity, 3), t(rows, kv_heads, capacity, 2)
    position = torch.tensor([rng.randint(0, capacity - queries) for _ in range(batch)])
    chosen = torch.tensor(rng.sample(range(rows), batch))
    q = t(batch, kv_heads * group, queries, 3)
    yield torch.ops.gw.cached_attention.default, (q, cache_k, cache_v, position, chosen), {"scale": 0.5, "window": rng.choice([0, 3])}


@sample("gw::token_choice_moe", "gw::expert_choice", "gw::expert_mlp")
def experts(rng, name):
    batch, length, depth, count, inner, k = (rng.randint(2, 5) for _ in range(6))
    weights, gw = (t(count, 2 * inner, depth), t(count, depth, inner)), torch.ops.gw
    capacity = rng.randint(1, length)
    valid, at_most = torch.rand(batch, length) < 0.8, torch.randint(0, capacity + 1, (batch,))
    index = torch.randint(-1, length, (batch, count, capacity))
    yield from {
        "gw::token_choice_moe": [
            (gw.token_choice_moe.default, (t(length, depth), torch.randint(0, count, (length, k)), t(length, k), *weights),
             {"activation": "silu", "combine_dtype": torch.float64}),
        ],
        "gw::expert_choice": [
            (gw.expert_choice.default, (t(batch, length, count), *masks), {"capacity": capacity, "rule": rule})
            for rule in ("orig", "post") for masks in ((None, None), (valid, None), (valid, at_most))
        ],
        "gw::expert_mlp": [(gw.expert_mlp.default, (t(batch, length, depth), index, t(batch, count, capacity), *weights), {"activation": "gelu"})],
    }[name]  # fmt: skip


@sample("aten::matmul", "aten::mm", "aten::bmm", "aten::addmm", "aten::baddbmm")
def products(rng, name):
    m, k, n, b = (rng.randint(1, 6) for _ in range(4))
    batch = shape_of(rng, 0, 2)
    square = t(b, m, m)
    yield from {
        "aten::matmul": [(aten.matmul.default, (t(*batch, m, k), t(*broadcastable(rng, batch), k, n)), {}),
                         (aten.matmul.default, (t(m, k), t(*batch, k, n)), {}), (aten.matmul.default, (square, square), {})],
        "aten::mm": [(aten.mm.default, (t(m, k), t(k, n)), {})],
        "aten::bmm": [(aten.bmm.default, (t(b, m, k), t(b, k, n)), {})],
        "aten::addmm": [(aten.addmm.default, (t(*rng.choice([(n,), (m, n), (m, 1), (1, n)])), t(m, k), t(k, n)), {"beta": 2})],
        "aten::baddbmm": [(aten.baddbmm.default, (t(*rng.choice([(b, m, n), (m, n), (1, 1, n), (b, 1, 1)])), t(b, m, k), t(b, k, n)), {})],
    }[name]  # fmt: skip


@sample("aten::einsum")
def einsum(rng, name):
    a, b, c, d = (rng.randint(1, 5) for _ in range(4))
    yield aten.einsum.default, ("abc, adc -> abd", [t(a, b, c), t(a, d, c)]), {}
    yield aten.einsum.default, ("abc,cd,b->dab", [t(a, b, c), t(c, d), t(b)]), {}
    yield aten.einsum.default, ("ab,ab->ba", [t(a, b), t(1, b)]), {}
    yield aten.einsum.default, ("abc->b", [t(a, b, c)]), {}


@sample("aten::outer")
def outer(rng, name):
    yield aten.outer.default, (t(4), t(5)), {}


# ---------------------------------------------------------------- R6-R8, R24, R25: spatial


def pick(rng, *choices):
    return rng.choice(choices)


@sample("aten::conv1d", "aten::conv2d", "aten::conv3d")
def conv(rng, name):
    n = int(name[-2])
    for k, s, p, d in ((1, 1, 0, 1), (2, 2, 0, 1), (3, 1, 1, 1), (2, 1, 0, 2), (3, 2, 1, 1)):
        groups, ci, co = pick(rng, (1, 3, 4), (2, 4, 6), (1, 2, 1))
        kernel = [k if i == 0 or rng.random() < 0.5 else 1 for i in range(n)]
        per_dim = [(s, p, d) if size == k else (1, 0, 1) for size in kernel]
        x = t(*pick(rng, (ci,), (rng.randint(1, 4), ci)), *(rng.randint(1, 3) * 2 + 1 + (k == 2) for _ in range(n)))
        weight, bias = t(co, ci // groups, *kernel), pick(rng, None, t(co))
        yield op_of(name), (x, weight, bias, *(list(v) for v in zip(*per_dim)), groups), {}
    x = t(2, 3, *[5] * n)
    yield op_of(name + ".padding"), (x, t(4, 3, *[1] * n), None, [1], "same"), {}
    yield op_of(name + ".padding"), (x, t(4, 3, *[3] * n), None, [1], "same"), {}
    yield op_of(name + ".padding"), (t(2, 3, *[6] * n), t(4, 3, *[3] * n), None, [3], "valid"), {}


@sample("aten::conv_transpose1d", "aten::conv_transpose2d", "aten::conv_transpose3d")
def conv_transpose(rng, name):
    n = int(name[-2])
    for k, s, p, extra in ((1, 1, 0, 0), (2, 2, 0, 0), (3, 2, 1, 1), (3, 3, 0, 0)):
        x = t(*pick(rng, (3,), (2, 3)), *(rng.randint(1, 4) for _ in range(n)))
        yield op_of(name), (x, t(3, 4, *[k] * n), pick(rng, None, t(4)), [s] * n, [p] * n, [extra] * n), {}


@sample(*(f"aten::{k}_pool{n}d" for k in ("max", "avg") for n in (1, 2, 3)))
def pools(rng, name):
    n = int(name[-2])
    for k, s, p, ceil in ((2, [], 0, False), (3, 3, 0, False), (3, 1, 1, False), (2, 2, 0, True), (1, 1, 0, False)):
        x = t(*pick(rng, (3,), (2, 3)), *(rng.randint(1, 2) * 6 for _ in range(n)))
        stride = [s] * n if s else []
        dilation = ([1] * n,) if "max" in name else ()
        yield op_of(name), (x, [k] * n, stride, [p] * n, *dilation, ceil), {}


@sample(*(f"aten::adaptive_{k}_pool{n}d" for k in ("max", "avg") for n in (1, 2, 3)))
def adaptive(rng, name):
    n = int(name[-2])
    yield op_of(name), (t(2, 3, *[5] * n), [2] * n), {}
    yield op_of(name), (t(3, *[4] * n), [4] * n), {}


@sample("aten::max_pool2d_with_indices", "aten::max_pool3d_with_indices")
def pool_indices(rng, name):
    n = 2 if "2d" in name else 3
    yield op_of(name), (t(2, 3, *[4] * n), [2] * n), {}


@sample("aten::pixel_shuffle", "aten::pixel_unshuffle")
def pixel(rng, name):
    r, c = rng.randint(1, 3), rng.randint(1, 3)
    h, w, lead = rng.randint(1, 4), rng.randint(1, 4), shape_of(rng, 0, 2)
    shape = (*lead, c * r * r, h, w) if name.endswith("l_shuffle") else (*lead, c, h * r, w * r)
    yield op_of(name), (t(*shape), r), {}


@sample(*(f"aten::{name}{n}d" for name in ("upsample_nearest", "_upsample_nearest_exact") for n in (1, 2, 3)))
def nearest(rng, name):
    n = int(name[-2])
    size, f = [rng.randint(1, 4) for _ in range(n)], [rng.randint(1, 3) for _ in range(n)]
    x, out = t(2, 3, *size), [a * b for a, b in zip(size, f)]
    yield op_of(name + ".default"), (x, out), {}
    yield op_of(name + ".vec"), (x, out, None), {}
    yield op_of(name + ".vec"), (x, None, [float(v) for v in f]), {}
    yield op_of(name + ".default"), (x, [s + 1 for s in size]), {}
    yield op_of(name + ".vec"), (x, None, [1.5] * n), {}


@sample("aten::upsample_linear1d", "aten::upsample_bilinear2d", "aten::upsample_trilinear3d", "aten::upsample_bicubic2d",
        "aten::_upsample_bilinear2d_aa", "aten::_upsample_bicubic2d_aa")  # fmt: skip
def smooth(rng, name):
    n = next(i for i in (1, 2, 3) if f"{i}d" in name)
    yield op_of(name + ".default"), (t(2, 3, *[4] * n), [7] * n, False), {}


# ---------------------------------------------------------------- R9-R12: norms


@sample("aten::layer_norm", "aten::rms_norm")
def layer_norm(rng, name):
    x = t(*shape_of(rng, 2, 4))
    shape = list(x.shape[rng.randint(1, x.dim() - 1) :])
    yield op_of(name), (x, shape), {}
    yield op_of(name), (x, shape, t(*shape), *([t(*shape)] if name == "aten::layer_norm" else [])), {}


@sample("aten::group_norm", "aten::instance_norm")
def group_norm(rng, name):
    x = t(rng.randint(1, 5), 4, *[rng.randint(2, 4) for _ in range(rng.randint(1, 3))])
    if name == "aten::group_norm":
        yield aten.group_norm.default, (x, 2, t(4), t(4)), {}
        return
    yield aten.instance_norm.default, (x, t(4), t(4), None, None, True, 0.1, 1e-5, False), {}


@sample("aten::batch_norm", "aten::_native_batch_norm_legit_no_training")
def batch_norm(rng, name):
    x = t(3, 4, *shape_of(rng, 0, 2))
    if name != "aten::batch_norm":
        yield op_of(name), (x, t(4), t(4), t(4), t(4) ** 2 + 1, 0.1, 1e-5), {}
        return
    yield aten.batch_norm.default, (x, t(4), t(4), t(4), t(4) ** 2 + 1, False, 0.1, 1e-5, False), {}
    yield aten.batch_norm.default, (x, None, None, t(4), t(4) ** 2 + 1, False, 0.1, 1e-5, False), {}


def norm_stats_reference(x, groups):
    b = x.size(0)
    v = x.reshape(b, groups, -1)
    mean = v.mean(-1)
    return torch.stack([torch.full_like(mean, v.size(-1)), mean, ((v - mean[..., None]) ** 2).sum(-1)], -1)[None]


def norm_apply_reference(x, stats, weight, bias, groups, eps):
    k, mean, m2 = stats[0].unbind(-1)
    for other in stats[1:]:
        k_b, mean_b, m2_b = other.unbind(-1)
        delta, total = mean_b - mean, k + k_b
        mean, m2, k = mean + delta * k_b / total, m2 + m2_b + delta**2 * k * k_b / total, total
    b, c = x.shape[:2]
    y = (x.reshape(b, groups, -1) - mean[..., None]) * torch.rsqrt(m2 / k + eps)[..., None]
    per_channel = [1, c, *[1] * (x.dim() - 2)]
    y = y.reshape(x.shape)
    y = y if weight is None else y * weight.view(per_channel)
    return y if bias is None else y + bias.view(per_channel)


def causal_attention_reference(q, k, v, rows, *, scale=None, enable_gqa=False):
    mask = torch.arange(k.size(-2))[None, :] <= rows[:, None]
    return torch.nn.functional.scaled_dot_product_attention(q, k, v, mask, scale=scale, enable_gqa=enable_gqa)


# The dialect's ops under a name of our own, so that these tests stand beside the real ones; the rows are the real ops' rows.
STAND_INS = torch.library.Library("links_test", "DEF")
for schema, reference in (
    ("norm_stats(Tensor x, *, int groups) -> Tensor", norm_stats_reference),
    ("norm_apply(Tensor x, Tensor stats, Tensor? weight, Tensor? bias, int groups, float eps) -> Tensor", norm_apply_reference),
    ("causal_attention(Tensor q, Tensor k, Tensor v, Tensor rows, *, float? scale=None, bool enable_gqa=False) -> Tensor",
     causal_attention_reference),
):  # fmt: skip
    STAND_INS.define(schema)
    STAND_INS.impl(schema.partition("(")[0], reference, "CompositeImplicitAutograd")
    declare("links_test::" + schema.partition("(")[0], ROWS["gw::" + schema.partition("(")[0]])


@sample("gw::norm_stats", "gw::norm_apply")
def split_norm(rng, name):
    x = t(rng.randint(1, 4), 4, *shape_of(rng, 1, 3))
    if name == "gw::norm_stats":
        yield torch.ops.links_test.norm_stats.default, (x,), {"groups": 2}
        return
    stats = torch.cat([norm_stats_reference(x, 2), norm_stats_reference(x + 1, 2)])
    yield torch.ops.links_test.norm_apply.default, (x, stats, t(4), None, 2, 1e-5), {}


# ---------------------------------------------------------------- R13, R14: along dims


@sample(*(f"aten::{n}" for n in "softmax.int _softmax log_softmax.int _log_softmax cumsum cumprod logcumsumexp cummax cummin "
          "sort argsort topk diff glu flip roll tril triu".split()))  # fmt: skip
def along(rng, name):
    x = t(*shape_of(rng, 2, 4))
    dim = rng.randrange(-x.dim(), x.dim())
    op = op_of(name)
    extra = {"aten::_softmax": (False,), "aten::_log_softmax": (False,)}.get(name, ())
    if name == "aten::topk":
        yield op, (x, 1, dim), {}
    elif name == "aten::diff":
        x = t(4, 5, 6)
        like = list(x.shape)
        like[dim % 3 if dim < 3 else 0] = 2
        yield op, (x, 1, dim % 3, t(*like), None), {}
        yield op, (x, 1, dim % 3, None, t(*like)), {}
    elif name == "aten::glu":
        yield op, (t(4, 2, 6), rng.randrange(3)), {}
    elif name in ("aten::flip", "aten::roll"):
        yield op, ((x, [dim]) if name == "aten::flip" else (x, [1], [dim])), {}
        yield op, ((x, [0, 1]) if name == "aten::flip" else (x, [1])), {}
    elif name in ("aten::tril", "aten::triu"):
        yield op, (x, rng.randint(-1, 1)), {}
    elif name in ("aten::sort", "aten::argsort"):
        yield op_of(name + ".default"), (x, dim), {}
        yield op_of(name + ".stable"), (x,), {"stable": True, "dim": dim}
    else:
        yield op, (x, dim, *extra), {}


@sample(*(f"aten::{n}" for n in "sum mean var std var_mean std_mean amax amin any all argmax argmin prod logsumexp linalg_vector_norm "
          "norm count_nonzero max.dim min.dim max.default min.default".split()))  # fmt: skip
def reductions(rng, name):
    x = t(*(rng.randint(2, 5) for _ in range(rng.randint(2, 4))))
    dim, keep = rng.randrange(-x.dim(), x.dim()), rng.random() < 0.5
    two = rng.sample(range(x.dim()), 2)
    base = name[6:]
    if base in ("sum", "mean"):
        variant = {"sum": "dim_IntList", "mean": "dim"}[base]
        for dims in ([dim], two, None, []):
            yield op_of(f"{name}.{variant}"), (x, dims, keep), {}
        yield op_of(f"{name}.default"), (x,), {}
    elif base in ("var", "std", "var_mean", "std_mean"):
        for dims in ([dim], two, None):
            yield op_of(f"{name}.correction"), (x, dims), {"keepdim": keep, "correction": 1}
    elif base in ("amax", "amin", "logsumexp"):
        yield op_of(name), (x, two, keep), {}
    elif base in ("any", "all"):
        yield op_of(f"{name}.dim"), (x > 0, dim, keep), {}
        yield op_of(f"{name}.dims"), (x > 0, two, keep), {}
        yield op_of(f"{name}.default"), (x > 0,), {}
    elif base in ("argmax", "argmin"):
        yield op_of(name), (x, dim, keep), {}
        yield op_of(name), (x,), {}
    elif base == "prod":
        yield aten.prod.dim_int, (x, dim, keep), {}
    elif base == "linalg_vector_norm":
        yield op_of(name), (x, 2, two, keep), {}
    elif base == "norm":
        yield aten.norm.ScalarOpt_dim, (x, 2, [dim], keep), {}
    elif base == "count_nonzero":
        yield aten.count_nonzero.dim_IntList, (x, two), {}
    elif base.endswith(".dim"):
        yield op_of(name), (x, dim, keep), {}
    else:
        yield op_of(name), (x,), {}


# ---------------------------------------------------------------- R15: attention


def attention_operands(rng, gqa):
    b, hk, g = rng.randint(1, 3), rng.randint(1, 3), rng.randint(1, 3) if gqa else 1
    length, s = rng.randint(1, 5), rng.randint(1, 5)
    q, k, v = t(b, hk * g, length, 4), t(b, hk, s, 4), t(b, hk, s, 3)
    masks = [None, t(b, 1, length, s), t(1, hk * g, 1, s), t(length, s), t(b, 1, 1, s) > -9]
    return q, k, v, masks


@sample("aten::scaled_dot_product_attention")
def attention(rng, name):
    for gqa in (False, True):
        q, k, v, masks = attention_operands(rng, gqa)
        for mask in masks:
            yield aten.scaled_dot_product_attention.default, (q, k, v, mask), {"enable_gqa": gqa}
        yield aten.scaled_dot_product_attention.default, (q, k, v, None, 0.0, True), {"enable_gqa": gqa, "scale": 0.3}
    yield aten.scaled_dot_product_attention.default, (t(3, 4, 2), t(3, 5, 2), t(3, 5, 2)), {}
    x = t(2, 3, 4)
    yield aten.scaled_dot_product_attention.default, (x, x, x), {}


@sample("gw::causal_attention")
def causal(rng, name):
    for gqa in (False, True):
        q, k, v, _ = attention_operands(rng, gqa)
        yield torch.ops.links_test.causal_attention.default, (q, k, v, torch.arange(q.size(-2))), {"enable_gqa": gqa}


# ---------------------------------------------------------------- R16-R18, R23: views


@sample("aten::view", "aten::reshape", "aten::_unsafe_view", "aten::view_copy")
def views(rng, name):
    for source, target in (([6, 4], [2, 3, 4]), ([2, 3, 4], [6, -1]), ([12, 5], [4, 3, 5]), ([1, 6, 2], [6, 1, 2]), ([2, 8], [2, -1, 4]),
                           ([3, 4, 5], [3, 20]), ([24], [2, 3, 4])):  # fmt: skip
        yield op_of(name + ".default"), (t(*source), target), {}


@sample("aten::flatten", "aten::unflatten", "aten::unsqueeze", "aten::squeeze")
def reshapes(rng, name):
    x = t(*shape_of(rng, 3, 4))
    start = rng.randrange(x.dim())
    ones = t(*pick(rng, (1, 4, 1, 3), (2, 1, 3), (4, 1)))
    yield from {
        "aten::flatten": [(aten.flatten.using_ints, (x, start, rng.randint(start, x.dim() - 1)), {})],
        "aten::unflatten": [(aten.unflatten.int, (t(3, 12, 2), 1, [4, 3]), {}), (aten.unflatten.int, (t(3, 12), -1, [-1, 3]), {})],
        "aten::unsqueeze": [(aten.unsqueeze.default, (x, rng.randint(-x.dim() - 1, x.dim())), {})],
        "aten::squeeze": [(aten.squeeze.default, (ones,), {}), (aten.squeeze.dim, (ones, 0), {}), (aten.squeeze.dims, (ones, [0, 1]), {})],
    }[name]  # fmt: skip


@sample("aten::permute", "aten::transpose", "aten::swapaxes", "aten::swapdims", "aten::t", "aten::movedim", "aten::moveaxis")
def permutations(rng, name):
    x = t(*(rng.randint(1, 5) for _ in range(4)))
    order = rng.sample(range(4), 4)
    a, b = rng.randrange(-4, 4), rng.randrange(-4, 4)
    if name == "aten::permute":
        yield aten.permute.default, (x, [order[0] - 4, *order[1:]]), {}
    elif name == "aten::t":
        yield aten.t.default, (t(3, 4),), {}
        yield aten.t.default, (t(3),), {}
    elif name in ("aten::movedim", "aten::moveaxis"):
        yield op_of(name + ".int"), (x, a, b), {}
        yield op_of(name + ".intlist"), (x, order[:2], rng.sample(range(4), 2)), {}
    else:
        yield op_of(name), (x, a, b), {}


@sample("aten::expand", "aten::broadcast_to", "aten::expand_as", "aten::repeat")
def expansions(rng, name):
    shape = shape_of(rng, 1, 4)
    x = t(*broadcastable(rng, shape))
    if name == "aten::expand_as":
        yield aten.expand_as.default, (x, t(*shape)), {}
    elif name == "aten::repeat":
        yield aten.repeat.default, (t(2, 1, 3), pick(rng, [2, 1, 3, 1], [1, 2, 1], [1, 1, 1], [2, 1, 1])), {}
    else:
        keep = [-1 if i >= len(shape) - x.dim() and rng.random() < 0.3 and x.size(i - len(shape)) == s else s for i, s in enumerate(shape)]
        yield op_of(name), (x, keep), {}


@sample("aten::view_as_complex", "aten::view_as_real")
def complex_views(rng, name):
    x = t(*shape_of(rng, 1, 3), 2)
    yield op_of(name), (x if name.endswith("complex") else torch.view_as_complex(x),), {}


# ---------------------------------------------------------------- R19-R23: pieces


@sample("aten::repeat_interleave")
def repeat_interleave(rng, name):
    x = t(3, 4)
    yield aten.repeat_interleave.self_int, (x, rng.randint(1, 3), rng.randrange(2)), {}
    yield aten.repeat_interleave.self_int, (x, 2, -1), {"output_size": 8}
    yield aten.repeat_interleave.self_int, (x, 2), {}


@sample("aten::cat", "aten::concat", "aten::stack")
def joins(rng, name):
    shape = shape_of(rng, 2, 4)
    dim = rng.randrange(-len(shape), len(shape))
    other = list(shape)
    if name != "aten::stack":
        other[dim] += 1
    x = t(*shape)
    yield op_of(name), ([x, t(*other), x], dim), {}
    if name != "aten::stack":
        yield op_of(name), ([t(0), t(2, 3)], 0), {}


@sample(*(f"aten::{n}" for n in "chunk split split_with_sizes unsafe_split unsafe_chunk unsafe_split_with_sizes tensor_split.sections "
          "tensor_split.indices unbind".split()))  # fmt: skip
def splits(rng, name):
    x = t(*(rng.randint(2, 5) for _ in range(3)))
    dim = rng.randrange(-3, 3)
    size = x.size(dim)
    argument = {"chunk": 2, "unsafe_chunk": 2, "split": 2, "unsafe_split": 2, "tensor_split.sections": 2, "tensor_split.indices": [1]}
    if name == "aten::unbind":
        yield aten.unbind.int, (x, dim), {}
    else:
        op = op_of({"aten::split": "aten::split.Tensor"}.get(name, name))
        yield op, (x, argument.get(name[6:], [1, size - 1]), dim), {}


@sample("aten::slice", "aten::narrow", "aten::select", "aten::slice_scatter", "aten::select_scatter")
def cuts(rng, name):
    x = t(3, 4, 5)
    dim = rng.randrange(-3, 3)
    size = x.size(dim)
    row = list(x.shape)
    del row[dim]
    part = list(x.shape)
    part[dim] = 2
    yield from {
        "aten::slice": [(aten.slice.Tensor, (x, dim, 1, 3), {}), (aten.slice.Tensor, (x, dim, 0, 2**63 - 1), {}),
                        (aten.slice.Tensor, (x, dim, 0, size), {}), (aten.slice.Tensor, (x, dim, 0, -1), {}),
                        (aten.slice.Tensor, (x, dim, None, None, 2), {})],
        "aten::narrow": [(aten.narrow.default, (x, dim, 0, 2), {})],
        "aten::select": [(aten.select.int, (x, dim, 1), {})],
        "aten::slice_scatter": [(aten.slice_scatter.default, (x, t(*part), dim, 1, 3), {}),
                                (aten.slice_scatter.default, (x, t(3, 4, 5), dim, 0, size), {}),
                                (aten.slice_scatter.default, (x, t(3, 4, 5), dim, 0, 2**63 - 1), {})],
        "aten::select_scatter": [(aten.select_scatter.default, (x, t(*row), dim, 1), {})],
    }[name]  # fmt: skip


@sample("aten::pad", "aten::constant_pad_nd", *(f"aten::{k}_pad{n}d" for k in ("reflection", "replication") for n in (1, 2, 3)))
def pads(rng, name):
    if name == "aten::constant_pad_nd":
        yield aten.constant_pad_nd.default, (t(3, 4, 5), pick(rng, [1, 1], [0, 0, 2, 1], [0, 0, 0, 0, 1, 0], [-1, 0])), {}
        return
    if name == "aten::pad":
        yield aten.pad.default, (t(3, 4, 5), pick(rng, [1, 1], [0, 0])), {}
        yield aten.pad.default, (t(3, 4, 5), [1, 1], "reflect"), {}
        return
    n = int(name[-2])
    amounts = [rng.randint(0, 1) for _ in range(2 * n)]
    yield op_of(name), (t(2, 3, *[4] * n), amounts), {}


# ---------------------------------------------------------------- R26-R29: look-ups and sources


@sample("aten::embedding", "aten::index_select", "aten::gather", "aten::index.Tensor")
def lookups(rng, name):
    x = t(4, 5, 6)

    def i(*shape, high=4):
        return torch.randint(0, high, shape)

    if name == "aten::embedding":
        yield aten.embedding.default, (t(4, 6), i(*shape_of(rng, 0, 3))), {}
    elif name == "aten::index_select":
        yield aten.index_select.default, (x, rng.randrange(-3, 3), i(7)), {}
    elif name == "aten::gather":
        dim = rng.randrange(-3, 3)
        shape = [pick(rng, s, s - 1) for s in x.shape]
        shape[dim] = 7
        yield aten.gather.default, (x, dim, i(*shape)), {}
    else:
        a, b = i(3, 2), i(*pick(rng, (2,), (3, 1), (3, 2)))
        yield aten.index.Tensor, (x, [a]), {}
        yield aten.index.Tensor, (x, [None, a]), {}
        yield aten.index.Tensor, (x, [None, a, b]), {}
        yield aten.index.Tensor, (x, [a, None, b]), {}
        yield aten.index.Tensor, (x, [a, b]), {}


@sample(*(f"aten::{n}" for n in "arange linspace logspace zeros ones full empty eye scalar_tensor new_zeros new_ones new_full new_empty "
          "meshgrid".split()))  # fmt: skip
def sources(rng, name):
    base = name[6:]
    args = {
        "arange": (5,), "linspace": (0, 1, 4), "logspace": (0, 1, 4), "full": ([2, 3], 1.0), "eye": (3,), "scalar_tensor": (1.0,),
        "new_zeros": (t(2), [2, 3]), "new_ones": (t(2), [2, 3]), "new_full": (t(2), [2, 3], 1.0), "new_empty": (t(2), [2, 3]),
        "meshgrid": ([t(2), t(3)],),
    }.get(base, ([2, 3],))  # fmt: skip
    op = aten.empty.memory_format if base == "empty" else op_of(name)
    yield op, args, {}


# ---------------------------------------------------------------- the properties

LINKLESS = {"aten::max.default", "aten::min.default"} | {name for name, entry in ROWS.items() if entry is ROWS["aten::arange"]}


@pytest.mark.parametrize("name", sorted(SAMPLES))
def test_row_holds_on_random_slices(name):
    compared = 0
    for function, _ in SAMPLES[name]:
        for seed in range(SEEDS):
            rng = random.Random(f"{name} {seed}")
            torch.manual_seed(seed)
            for op, args, kwargs in function(rng, name):
                node, values = call_node(op, *args, **kwargs)
                try:
                    report = check_links(node, values, rng, contents="empty" not in op.__name__)
                except Exception as error:
                    error.add_note(f"seed {seed}: {op} of {[list(v.shape) for v in values.values()]}, {node.args}, {node.kwargs}")
                    raise
                compared += report.slices
    # A full reduction keeps no dim, and a source has nothing to slice: all other rows are put to the test by at least one slice.
    assert compared or name in LINKLESS


def test_every_row_has_a_sample():
    """Barriers have nothing to sample; `getitem` is tested in test_links_rules.py."""
    barriers = {name for name, entry in ROWS.items() if isinstance(entry, Never)}
    unsampled = {name for name in ROWS if "_test::" not in name} - set(SAMPLES) - barriers - {"getitem"}
    assert not unsampled


WRONG = [
    ("aten::softmax.int", lambda call, output, dim: Moves({"self": dim}), aten.softmax.int, (t(4, 6), 1)),
    ("aten::cumsum", lambda call, output, dim: Moves({"self": dim}), aten.cumsum.default, (t(4, 6), 0)),
    (
        "aten::linear",
        lambda call, output, dim: Moves({"input": dim} if dim == 0 else {"weight": 0}),
        aten.linear.default,
        (t(2, 3), t(4, 3), t(4)),
    ),
    ("aten::permute", lambda call, output, dim: Moves({"self": dim}), aten.permute.default, (t(3, 3), [1, 0])),
    ("aten::add", lambda call, output, dim: Moves({"self": dim}), aten.add.Tensor, (t(3, 4), t(3, 4))),
]


@pytest.mark.parametrize("name, links, op, args", WRONG)
def test_the_probe_catches_a_wrong_row(name, links, op, args):
    own = ROWS.get(name)
    declare(name, Row(links))
    try:
        node, values = call_node(op, *args)
        with pytest.raises((AssertionError, RuntimeError)):
            check_links(node, values, random.Random(0), slices=8)
    finally:
        declare(name, own)
        if own is None:
            del ROWS[name]
