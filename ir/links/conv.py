"""R6-R8, R24, R25: convolutions, pooling, pixel shuffling and upsampling: ops with spatial dims.

    0 <- x 0;   spatial dims only where windows neither overlap nor leave gaps, else `halo`
    channels of an ungrouped conv <- w 0, b 0 [features]

An input without batch dim has its channels at 0. Weights [Co, Ci/groups, *k].
"""

from dataclasses import dataclass

import torch

from .call import Call, Key
from .sizes import quotient, same
from .table import Move, Moves, Refusal, Tag, row
from .tag import Localized


@dataclass(frozen=True, slots=True)
class Window:
    """Along one spatial dim: kernel size k, stride s, padding p on the low side, dilation."""

    k: int
    s: int
    p: int
    dilation: int
    clean: bool = True  # False: ceil_mode or output_padding, which add windows at the border

    def rows(self) -> str:
        """Rows of x that output rows [a, b) need: [a*s - p, (b-1)*s - p + dilation*(k-1) + 1), clipped to x."""
        low = _affine("a", self.s, -self.p)
        high = _affine("(b-1)", self.s, self.dilation * (self.k - 1) + 1 - self.p)
        return f"[{low}, {high})"

    def transposed_rows(self) -> str:
        """Rows of x that reach output rows [a, b) of a transposed convolution: x row i reaches i*s - p + dilation*(0..k-1)."""
        reach = self.dilation * (self.k - 1)
        return f"[ceil(({_affine('a', 1, self.p - reach)})/{self.s}), floor(({_affine('b', 1, self.p - 1)})/{self.s}) + 1)"


def _affine(variable: str, factor: int, shift: int) -> str:
    scaled = variable if factor == 1 else f"{variable}*{factor}"
    return scaled if shift == 0 else f"{scaled} {'-' if shift < 0 else '+'} {abs(shift)}"


def _each(values: list, i: int, count: int, default=None) -> object:
    """Item i of an argument that may be a lone value for all `count` dims, or empty for `default`."""
    if not values:
        return default
    return values[0] if len(values) == 1 else values[i]


def _through_window(call: Call, x: Key, window: Window, dim: int) -> Moves | Refusal:
    size, out = call.shape(x)[dim], call.out_shape()[dim]
    if window.clean and window.p == 0 and window.k == window.s == 1:
        return Moves({x: dim})
    if window.clean and window.p == 0 and window.k == window.s and window.dilation == 1 and same(size, out * window.k):
        return Moves({x: Move(dim, times=window.k)})
    return Refusal("halo", f"{call.op}: output rows [a, b) of dim {dim} need rows {window.rows()} of {call.operand(x)}", call.operand(x))


def _conv_window(call: Call, i: int) -> Window:
    kernel = call.shape("weight")[2:]
    dilation = _each(call.integers("dilation"), i, len(kernel))
    padding = call["padding"]
    if padding == "valid":
        low = 0
    elif padding == "same":
        low = dilation * (kernel[i] - 1) // 2
    else:
        low = _each(call.integers("padding"), i, len(kernel))
    clean = all(p == 0 for p in call.integers("output_padding"))
    return Window(kernel[i], _each(call.integers("stride"), i, len(kernel), 1), low, dilation, clean)


def _channel_dim(call: Call) -> int:
    """1, or 0 for an input without batch dim."""
    return len(call.out_shape()) - len(call.shape("weight")) + 1


@row("aten::conv1d", "aten::conv2d", "aten::conv3d")
def conv(call: Call, output: int, dim: int) -> Moves | Refusal:
    channel = _channel_dim(call)
    if dim < channel:
        return Moves({"input": dim})
    if dim > channel:
        return _through_window(call, "input", _conv_window(call, dim - channel - 1), dim)
    if call["groups"] != 1:
        return Refusal("mixed", f"channels of a convolution in {call['groups']} groups")
    bias = {"bias": 0} if call.operand("bias") is not None else {}
    return Moves({"weight": 0, **bias}, "features")


@conv.stuck
def _(call: Call, key: Key, dim: int) -> Refusal | None:
    if key == "input" and dim != _channel_dim(call):
        return None
    return Refusal("reduced", f"{call.op} sums over dim {dim} of {call.operand(key)}", call.operand(key))


@conv.halo_rows
def _(call: Call, dim: int) -> str:
    spatial = dim - _channel_dim(call) - 1
    return _conv_window(call, spatial).rows() if spatial >= 0 else "[a, b)"


@row("aten::conv_transpose1d", "aten::conv_transpose2d", "aten::conv_transpose3d")
def conv_transpose(call: Call, output: int, dim: int) -> Moves | Refusal:
    """Spatial with k = s, no padding: each x row makes k output rows of its own."""
    channel = _channel_dim(call)
    if dim < channel:
        return Moves({"input": dim})
    if dim == channel:
        return Refusal("mixed", "output channels of a transposed convolution")
    window = _conv_window(call, dim - channel - 1)
    if window.clean and window.p == 0 and window.k == window.s and window.dilation == 1:
        return Moves({"input": Move(dim, over=window.k)})
    detail = f"{call.op}: output rows [a, b) of dim {dim} need rows {window.transposed_rows()} of {call.operand('input')}"
    return Refusal("halo", detail, call.operand("input"))


conv_transpose.stuck(conv._stuck)


@conv_transpose.halo_rows
def _(call: Call, dim: int) -> str:
    spatial = dim - _channel_dim(call) - 1
    return _conv_window(call, spatial).transposed_rows() if spatial >= 0 else "[a, b)"


POOLS = {f"aten::{kind}_pool{n}d": n for kind in ("max", "avg") for n in (1, 2, 3)}


def _pool_window(call: Call, i: int) -> Window:
    count = POOLS[call.node.target._schema.name]
    k = _each(call.integers("kernel_size"), i, count)
    dilation = _each(call.integers("dilation"), i, count, 1)
    return Window(
        k, _each(call.integers("stride"), i, count, k), _each(call.integers("padding"), i, count, 0), dilation, not call["ceil_mode"]
    )


@row(*POOLS)
def pool(call: Call, output: int, dim: int) -> Moves | Refusal:
    spatial = dim - (len(call.out_shape()) - POOLS[call.node.target._schema.name])
    if spatial < 0:
        return Moves({"self": dim})
    return _through_window(call, "self", _pool_window(call, spatial), dim)


@pool.halo_rows
def _(call: Call, dim: int) -> str:
    spatial = dim - (len(call.out_shape()) - POOLS[call.node.target._schema.name])
    return _pool_window(call, spatial).rows() if spatial >= 0 else "[a, b)"


PER_PLANE = {f"aten::adaptive_{kind}_pool{n}d": n for kind in ("avg", "max") for n in (1, 2, 3)}
PER_PLANE |= {"aten::max_pool2d_with_indices": 2, "aten::max_pool3d_with_indices": 3}


@row(*PER_PLANE)
def plane_pool(call: Call, output: int, dim: int) -> Moves | Refusal:
    """Adaptive windows depend on the size of the plane, and indices count within it: leading dims only."""
    spatial = PER_PLANE[call.node.target._schema.name]
    if dim < len(call.out_shape(output)) - spatial:
        return Moves({"self": dim})
    return Refusal("halo", f"{call.op}: a window of dim {dim} is placed by the whole plane", call.operand("self"))


@row("aten::pixel_shuffle")
def pixel_shuffle(call: Call, output: int, dim: int) -> Moves:
    """o[.., c, h*r+i, w*r+j] = x[.., c*r*r + i*r + j, h, w]:   H, W: o x r <- x;   C: o <- x x r*r."""
    r, rank = call["upscale_factor"], len(call.out_shape())
    if dim < rank - 3:
        return Moves({"self": dim})
    return Moves({"self": Move(dim, times=r * r) if dim == rank - 3 else Move(dim, over=r)})


@row("aten::pixel_unshuffle")
def pixel_unshuffle(call: Call, output: int, dim: int) -> Moves:
    """The inverse of pixel_shuffle."""
    r, rank = call["downscale_factor"], len(call.out_shape())
    if dim < rank - 3:
        return Moves({"self": dim})
    return Moves({"self": Move(dim, over=r * r) if dim == rank - 3 else Move(dim, times=r)})


NEAREST = [f"aten::{name}{n}d" for name in ("upsample_nearest", "_upsample_nearest_exact") for n in (1, 2, 3)]
SMOOTH = [f"aten::upsample_{name}" for name in ("linear1d", "bilinear2d", "trilinear3d", "bicubic2d")]
SMOOTH += ["aten::_upsample_bilinear2d_aa", "aten::_upsample_bicubic2d_aa"]


def _upsampled(call: Call) -> Key:
    return "input" if call.overload == "vec" else "self"


@row(*NEAREST)
def upsample_nearest(call: Call, output: int, dim: int) -> Moves | Refusal:
    """With integer factors f: o[i] = x[i // f]:   o x f <- x."""
    x = _upsampled(call)
    if dim < 2:
        return Moves({x: dim})
    factors = _integer_factors(call)
    if factors is None:
        return Refusal("halo", f"{call.op}: only integer factors have rows of their own", call.operand(x))
    return Moves({x: Move(dim, over=factors[dim - 2])})


def _integer_factors(call: Call) -> list[int] | None:
    """The factor of each spatial dim, if all are integers and the scales given, if any, say the same."""
    sizes, outs = call.shape(_upsampled(call))[2:], call.out_shape()[2:]
    if call.overload == "vec" and call["scale_factors"] is not None:
        scales = call["scale_factors"]
    else:
        names = ("scales",) if len(sizes) == 1 else ("scales_d", "scales_h", "scales_w")[-len(sizes) :]
        scales = [call[name] for name in names] if call.overload != "vec" else [None] * len(sizes)
    factors = []
    for size, out, scale in zip(sizes, outs, scales):
        factor = int(scale) if scale is not None else _static_factor(out, size)
        if factor is None or factor < 1 or (scale is not None and scale != factor) or not same(out, size * factor):
            return None
        factors.append(factor)
    return factors


def _static_factor(out, size) -> int | None:
    factor = quotient(out, size)
    return factor if type(factor) is int else None


@upsample_nearest.local
def _(call: Call, output: int, tag: Tag) -> Localized | None:
    """A stated output size would hold for one slice length only; the `vec` overload takes factors."""
    if tag.dim < 2 or (call.overload == "vec" and call["scale_factors"] is not None):
        return None
    factors = [float(f) for f in _integer_factors(call)]
    packet = getattr(torch.ops.aten, call.node.target._schema.name.removeprefix("aten::"))
    return Localized(packet.vec, (call.operand(_upsampled(call)), None, factors), {})


@row(*SMOOTH)
def upsample_smooth(call: Call, output: int, dim: int) -> Moves | Refusal:
    x = _upsampled(call)
    if dim < 2:
        return Moves({x: dim})
    return Refusal("halo", f"{call.op} blends neighbouring rows of dim {dim}", call.operand(x))
