"""The ratio of signal to quantization noise (QSNR, dB) of a format: as a model has it from the crest factor, and as it is measured.

The model takes values for normal, with blocks whose largest is k times their root mean square. Source: "INT v.s. FP"
(arXiv 2510.25602), section 4; within 1.2 dB of simulation at the crest factors of normal blocks.
"""

import math

import torch
from torch import Tensor

from ...ir.low_bit.formats import Format, format_of

# By how much a block's scale is above the least that holds its largest value: on average, for one rounded up to a power of two, for an
# e4m3 number, and for what is stored as it is.
_SCALE_EXCESS = {"e8m0": 1.5, "nv": 1.05, "model": 1.0, "f32": 1.0}
_FLOATS = {"e4m3": (3, 7), "e2m3": (3, 1), "e2m1": (1, 1)}  # mantissa bits, bias of the exponent


def predicted_qsnr(format: str, crest: float) -> float:
    """The QSNR in dB of normal values in blocks of crest factor `crest`, 1 or more.

    Raises:
        ValueError: the format is none that the model knows: shifted and unsigned ones are not.
    """
    form = format_of(format)
    if form.element == "uint":
        raise ValueError(f"the model of QSNR is of formats with signed codes, not of {format}")
    noise = _integer_noise(form, crest) if form.element == "int" else _float_noise(form, crest)
    return -10 * math.log10(noise)


def crest_factor(values: Tensor, group: int) -> float:
    """The mean of max|x| / rms(x) over blocks of `group` along the last dim, a multiple of it; zero blocks do not count.

    1 where all is zero, as for blocks of one magnitude.
    """
    blocks = values.to(torch.float32).unflatten(-1, (-1, group))
    amax = blocks.abs().amax(-1)
    relative = blocks / torch.where(amax > 0, amax, 1.0).unsqueeze(-1)  # squares of tiny numbers would be 0
    crests = relative.square().mean(-1)[amax > 0].rsqrt()
    return float(crests.mean()) if crests.numel() else 1.0


def measured_qsnr(values: Tensor, quantized: Tensor) -> float:
    """10 log10(|v|^2 / |v - q|^2) of values and what stands for them; infinite where they are equal."""
    noise = (values.to(torch.float64) - quantized.to(torch.float64)).square().sum()
    if noise == 0:
        return math.inf
    signal = values.to(torch.float64).square().sum()
    return 10 * math.log10(float(signal / noise)) if signal > 0 else -math.inf


def _integer_noise(form: Format, crest: float) -> float:
    """Noise over signal: steps of p k / 2^(b - 1) have a variance of a twelfth of their square.

    Where the scale holds it, the largest value of a block of 16 has no error; larger blocks show little of that.
    """
    share = 1 - 1 / form.group if form.scale == "nv" else 1.0
    return (_SCALE_EXCESS[form.scale] * crest) ** 2 / (12 * 4 ** (form.bits - 1)) * share


def _float_noise(form: Format, crest: float) -> float:
    """Noise over signal: of values with a full mantissa, of those below the smallest normal number, and of those that become 0."""
    mantissa, bias = _FLOATS[form.element]
    largest = _SCALE_EXCESS[form.scale] * crest / form.qmax
    zero_below, normal_above = largest * 2.0 ** (-bias - mantissa), largest * 2.0 ** (1 - bias)
    normal = 2 * (normal_above * _density(normal_above) + 1 - _distribution(normal_above))
    if form.scale == "nv":
        normal = max(0.0, normal - crest**2 / form.group)  # the largest value of each block has no error
    subnormal = 2 * (_distribution(normal_above) - _distribution(zero_below))
    zero = 2 * _distribution(zero_below) - 1 - 2 * zero_below * _density(zero_below)
    step = largest * 2.0 ** (1 - bias - mantissa)
    return normal / (24 * 4**mantissa) + step**2 / 12 * subnormal + zero


def _distribution(x: float) -> float:
    """Phi, of the normal distribution."""
    return (1 + math.erf(x / math.sqrt(2))) / 2


def _density(x: float) -> float:
    return math.exp(-x * x / 2) / math.sqrt(2 * math.pi)
