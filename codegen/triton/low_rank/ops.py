"""The two halves of `gw.lowrank_linear` as operators of a lowered graph. Their bodies are what runs where a kernel has no tile."""

import torch
from torch import Tensor

from ....ir.low_bit.elements import encode
from ....ir.low_bit.formats import format_of
from ....ir.low_bit.hadamard import rotate as rotated
from ....ir.low_bit.quantize import dequantize, fake_quantize, in_blocks, row_steps

_LIBRARY = torch.library.Library("gw_triton", "DEF")


def _low_bit_operand(
    x: Tensor,
    smooth: Tensor | None,
    down: Tensor | None,
    *,
    act_format: str,
    act_scale2: float,
    act_shift: float,
    rotate: int,
    gives: str,
    part: int = 0,
) -> list[Tensor]:
    """What a product takes of x [.., K], and x @ down.T, float32 [.., r], where there is a branch.

    `gives` "codes": s8 [.., K] and the float32 [.., K/g] that each of their blocks is multiplied by; "values": the numbers that those
    stand for, in x's dtype; "nothing": x goes into the product as it is. With a `part`, the last result is [K/part, .., r], rounded up: the
    sums over so many neighbours along K, which the product adds up. Results are dense, however x lies.
    """
    raw = x.to(torch.float32)
    branch = [] if down is None else [_half(raw, down.to(torch.float32), part).contiguous()]
    if gives == "nothing":
        return branch
    xs = raw + act_shift if act_shift else raw
    xs = xs if smooth is None else xs * smooth.to(torch.float32)
    xs = rotated(xs, rotate, weight=False) if rotate else xs
    if gives == "values":
        return [fake_quantize(xs, act_format, x.dtype, act_scale2).to(x.dtype).contiguous(), *branch]
    form = format_of(act_format)
    steps = row_steps(xs, form, x.dtype, act_scale2)
    codes = encode(in_blocks(xs, form) / steps.unsqueeze(-1), form).flatten(-2).to(torch.int8)
    return [codes.contiguous(), steps.contiguous(), *branch]


def _half(x: Tensor, down: Tensor, part: int) -> Tensor:
    """x @ down.T, the sums over each part of K apart where there are some."""
    if not part:
        return x @ down.T
    return torch.stack([piece @ factor.T for piece, factor in zip(x.split(part, -1), down.split(part, -1), strict=True)])


def _low_bit_product(
    a: Tensor,
    a_scale: Tensor | None,
    weight: Tensor,
    weight_scale: Tensor,
    weight_scale2: Tensor | None,
    half: Tensor | None,
    up: Tensor | None,
    bias: Tensor | None,
    *,
    weight_format: str,
    dtype: torch.dtype,
) -> Tensor:
    """y = (a, blocks times a_scale) @ dequantize(weight).T + half @ up.T + bias in `dtype`: a [.., K], a_scale [.., K/g], half [.., r] or
    parts of it that are to be added, [parts, .., r]."""
    left = a.to(torch.float32)
    if a_scale is not None:
        left = (left.unflatten(-1, (a_scale.size(-1), -1)) * a_scale.unsqueeze(-1)).flatten(-2)
    y = left @ dequantize(weight, weight_scale, weight_scale2, weight_format, torch.float32).T
    if half is not None and up is not None:
        y = y + (half.sum(0) if half.dim() > a.dim() else half) @ up.to(torch.float32).T
    return (y if bias is None else y + bias.to(torch.float32)).to(dtype)


def _declared(name: str, body):  # type: ignore[no-untyped-def]
    _LIBRARY.define(torch.library.infer_schema(body, mutates_args=(), op_name=name))
    _LIBRARY.impl(name, body, "CompositeImplicitAutograd")
    return getattr(torch.ops.gw_triton, name).default


low_bit_operand = _declared("low_bit_operand", _low_bit_operand)
low_bit_product = _declared("low_bit_product", _low_bit_product)
