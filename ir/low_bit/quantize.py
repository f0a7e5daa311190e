"""The reference quantizers: scales from the largest magnitude of each block, codes from the scales as they are stored.

    amax = max|v| per block;  s = store(amax / qmax);  code = element(v / s);  value = code * s

Scales and codes are formed in float32, also for float64 values, so that a float64 program has the codes of the program itself.
Nothing is clipped but by the ends of a scale's dtype.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .elements import decode, encode, pack, round_to_values, unpack
from .formats import Format, format_of

_E4M3_MAX = 448.0
_E4M3_TINY = 2.0**-9


@dataclass(frozen=True)
class Quantized:
    """A weight [N, K] in a format: codes, scales of its blocks, and of the NV formats the tensor's scale f32[1]."""

    codes: Tensor
    scale: Tensor
    scale2: Tensor | None = None


def quantize(weight: Tensor, name: str, scale_dtype: torch.dtype | None = None) -> Quantized:
    """`weight` [N, K] in format `name`; the scales of int4 are `scale_dtype`, the weight's own (float32 for float64) when None.

    Raises:
        ValueError: the format is not for weights.
        RuntimeError: K is no multiple of its group.
    """
    form = _usable(name, "weight", weight.size(-1))
    if scale_dtype is None:
        scale_dtype = torch.float32 if weight.dtype == torch.float64 else weight.dtype
    blocks = in_blocks(weight.to(torch.float32), form)
    amax = blocks.abs().amax(-1)
    scale2 = tensor_scale(amax, form) if form.scale == "nv" else None
    scale = _stored_scale(amax, form, scale_dtype, scale2)
    codes = encode(blocks / _scale_value(scale, form, scale2).unsqueeze(-1), form).flatten(-2)
    return Quantized(pack(codes) if form.is_packed else codes, scale, scale2)


def encode_on(values: Tensor, name: str, scale: Tensor, scale2: Tensor | None = None) -> Tensor:
    """The codes (packed where the format packs) of `values` [N, K] on scales that are given, as `quantize` gives them."""
    form = _usable(name, "weight", values.size(-1))
    step = _scale_value(scale, form, scale2).unsqueeze(-1)
    codes = encode(in_blocks(values.to(torch.float32), form) / step, form).flatten(-2)
    return pack(codes) if form.is_packed else codes


def dequantize(codes: Tensor, scale: Tensor, scale2: Tensor | None, name: str, dtype: torch.dtype) -> Tensor:
    """The weight [N, K] that codes and scales stand for, in `dtype` (float32 or float64)."""
    form = format_of(name)
    if form.is_packed:
        codes = unpack(codes, signed=form.element == "int")
    values = in_blocks(decode(codes, form, dtype), form)
    return (values * step_of(scale, scale2, name, dtype).unsqueeze(-1)).flatten(-2)


def step_of(scale: Tensor, scale2: Tensor | None, name: str, dtype: torch.dtype = torch.float32) -> Tensor:
    """What a code of each block is multiplied by: [N, K/g]."""
    return _scale_value(scale, format_of(name), scale2).to(dtype)


def fake_quantize(x: Tensor, name: str, scale_dtype: torch.dtype, scale2: float = 1.0) -> Tensor:
    """x [.., K] as its codes in format `name` have it, each row by itself; "none" is x.

    `scale_dtype` is that of scales in the model's dtype, `scale2` the tensor's scale of the NV formats. `u8-tensor` has one scale
    and one zero point for all of x: s = (max - min)/255, z = rne(-min/s).

    Raises:
        ValueError: the format is not for activations.
        RuntimeError: K is no multiple of its group.
    """
    if name == "none":
        return x
    form = _usable(name, "activation", x.size(-1))
    narrow = x.to(torch.float32)
    if name == "u8-tensor":
        return _affine(narrow, form).to(x.dtype)
    step = row_steps(narrow, form, scale_dtype, scale2).unsqueeze(-1)
    return (round_to_values(in_blocks(narrow, form) / step, form).to(x.dtype) * step.to(x.dtype)).flatten(-2)


def row_steps(x: Tensor, form: Format, scale_dtype: torch.dtype, scale2: float = 1.0) -> Tensor:
    """What codes of the blocks of x (float32 [.., K]) are multiplied by, each row by itself: float32 [.., K/g]."""
    blocks = in_blocks(x, form)
    amax = (blocks.clamp(min=0) if form.element == "uint" else blocks.abs()).amax(-1)
    scale = _stored_scale(amax, form, scale_dtype, _as_tensor(scale2, amax))
    return _scale_value(scale, form, _as_tensor(scale2, amax))


def tensor_scale(amax: Tensor, form: Format) -> Tensor:
    """f32[1]: the scale of a whole tensor under which no block's e4m3 scale passes 448; 1 where all is zero."""
    largest = (amax / form.qmax).amax().reshape(1) / _E4M3_MAX if amax.numel() else torch.zeros(1, device=amax.device)
    tiny = torch.finfo(torch.float32).tiny
    return torch.where(largest > 0, largest.clamp(min=tiny), torch.ones_like(largest))


def _usable(name: str, use: str, k: Any) -> Format:
    form = format_of(name)
    if not getattr(form, use):
        raise ValueError(f"format {name} is none for {use}s")
    torch._check(k % form.group_of(k) == 0, lambda: f"format {name} needs K to be a multiple of {form.group}, and it is {k}")
    if form.is_packed:
        torch._check(k % 2 == 0, lambda: f"format {name} packs two codes a byte, and K is {k}")
    return form


def in_blocks(values: Tensor, form: Format) -> Tensor:
    """[.., K] -> [.., K/g, g]."""
    return values.unflatten(-1, (-1, form.group)) if form.group else values.unsqueeze(-2)


def _stored_scale(amax: Tensor, form: Format, dtype: torch.dtype, scale2: Tensor | None) -> Tensor:
    """amax / qmax in the scale's dtype (e8m0: the exponent above it, as u8); 1 where a block is zero, never 0 and never infinite."""
    wanted = amax / form.qmax
    if form.scale == "e8m0":
        mantissa, exponent = torch.frexp(wanted)
        largest = math.floor(math.log2(torch.finfo(torch.float32).max / form.qmax))  # beyond it the largest code would be infinite
        exponent = torch.where(mantissa == 0.5, exponent - 1, exponent).clamp(-127, largest)
        return torch.where(amax == 0, 127, exponent + 127).to(torch.uint8)
    if form.scale == "nv":
        assert scale2 is not None
        relative = (wanted / scale2).clamp(_E4M3_TINY, _E4M3_MAX)
        return torch.where(amax == 0, 1.0, relative).to(torch.float8_e4m3fn)
    stored = torch.float32 if form.scale == "f32" else dtype
    return torch.where(amax == 0, 1.0, wanted).to(stored).clamp(_smallest(stored), torch.finfo(stored).max)


def _scale_value(scale: Tensor, form: Format, scale2: Tensor | None) -> Tensor:
    """The scales as float32 numbers."""
    if form.scale == "e8m0":
        exponent = scale.to(torch.int32)
        # The bits of 2^(e - 127): exact on every device, where pow may not be. 2^-127 is subnormal.
        return torch.where(exponent == 0, 1 << 22, exponent << 23).to(torch.int32).view(torch.float32)
    value = scale.to(torch.float32)
    if form.scale != "nv" or scale2 is None:
        return value
    return value * scale2.to(torch.float32).reshape(-1, *[1] * (value.dim() - 1))


def _affine(x: Tensor, form: Format) -> Tensor:
    if x.numel() == 0:
        return x
    low, high = x.amin().clamp(max=0), x.amax().clamp(min=0)
    scale = torch.where(high == low, 1.0, ((high - low) / form.qmax).clamp(min=_smallest(x.dtype)))
    zero = (-low / scale).round()
    return ((x / scale).round() + zero).clamp(0, form.qmax).sub(zero) * scale


def _smallest(dtype: torch.dtype) -> float:
    """The smallest positive number, a subnormal one."""
    return torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps


def _as_tensor(scale2: float, like: Tensor) -> Tensor:
    return torch.full((1,), scale2, dtype=torch.float32, device=like.device)
