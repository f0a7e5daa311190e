"""Elements: numbers already divided by their scale to codes, and codes to the numbers that they stand for.

Rounding is half to even everywhere; no code stands for -0. Codes of 4 bits are int8 here, one a byte, until they are packed.
"""

import torch
from torch import Tensor

from .formats import Format

E2M1_VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
# The magnitude code of y is how many of these it has passed; where a tie goes to the even code, meeting it is passing it.
_E2M1_MEETING = (0.75, 1.75, 3.5)
_E2M1_EXCEEDING = (0.25, 1.25, 2.5, 5.0)


def round_to_values(y: Tensor, form: Format) -> Tensor:
    """The nearest number that `form` has for each of y, in y's dtype; those beyond its range become its ends."""
    if form.element == "int":
        return y.round().clamp(-form.qmax, form.qmax) + 0.0  # + 0.0: no -0
    if form.element == "uint":
        return y.round().clamp(0, form.qmax) + 0.0
    if form.element == "e4m3":
        return y.clamp(-form.qmax, form.qmax).to(torch.float8_e4m3fn).to(y.dtype) + 0.0
    magnitude = y.abs().clamp(max=form.qmax)
    if form.element == "e2m1":
        value = _e2m1_magnitude(_e2m1_index(magnitude).to(y.dtype))
    else:
        step = torch.where(magnitude < 2, 0.125, torch.where(magnitude < 4, 0.25, 0.5)).to(y.dtype)
        value = (magnitude / step).round() * step
    return torch.where(y < 0, -value, value) + 0.0


def encode(y: Tensor, form: Format) -> Tensor:
    """Codes of y: int8 [.., K], for e4m3 float8_e4m3fn, for e2m1 and e2m3 uint8 with the sign above the magnitude's bits."""
    value = round_to_values(y, form)
    if form.element == "int":
        return value.to(torch.int8)
    if form.element == "uint":
        return value.to(torch.uint8)
    if form.element == "e4m3":
        return value.to(torch.float8_e4m3fn)
    magnitude = value.abs()
    if form.element == "e2m1":
        index, sign_bit = _e2m1_index(magnitude), 8
    else:
        eighths = torch.where(magnitude < 2, magnitude * 8, torch.where(magnitude < 4, magnitude * 4 + 8, magnitude * 2 + 16))
        index, sign_bit = eighths.to(torch.int64), 32
    return (index + sign_bit * (value < 0)).to(torch.uint8)


def decode(codes: Tensor, form: Format, dtype: torch.dtype) -> Tensor:
    """The numbers that codes stand for; codes of e4m3 may come in a wider float dtype, as a float64 program has them."""
    if form.element in ("int", "uint", "e4m3"):
        return codes.to(dtype)
    if form.element == "e2m1":
        magnitude = _e2m1_magnitude((codes & 7).to(dtype))
        return torch.where(codes >= 8, -magnitude, magnitude) + 0.0
    code = codes.to(torch.int64)
    index = (code & 31).to(dtype)
    magnitude = torch.where(index < 16, index / 8, torch.where(index < 24, (index - 8) / 4, (index - 16) / 2))
    return torch.where(code >= 32, -magnitude, magnitude)


def pack(codes: Tensor) -> Tensor:
    """Two 4-bit codes a byte, the even column in the low half: [.., K] -> u8 [.., K/2]."""
    low, high = codes[..., 0::2].to(torch.uint8), codes[..., 1::2].to(torch.uint8)
    return (low & 15) | ((high & 15) << 4)


def unpack(packed: Tensor, *, signed: bool) -> Tensor:
    """u8 [.., K/2] -> [.., K]: int8 in -8..7 where `signed`, else uint8 in 0..15."""
    codes = torch.stack([packed & 15, packed >> 4], -1).flatten(-2)
    return ((codes.to(torch.int8) ^ 8) - 8) if signed else codes


def _e2m1_magnitude(index: Tensor) -> Tensor:
    """E2M1_VALUES at indices that are floats, as the highest of three lines: exporters to ONNX take no tables that a body makes."""
    return torch.maximum(torch.maximum(index / 2, index - 2), 2 * index - 8)


def _e2m1_index(magnitude: Tensor) -> Tensor:
    passed = [magnitude >= bound for bound in _E2M1_MEETING] + [magnitude > bound for bound in _E2M1_EXCEEDING]
    return torch.stack(passed).sum(0)
