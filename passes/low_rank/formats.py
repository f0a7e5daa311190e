"""The formats that passes offer: all but those for analysis, which no kernel runs, and the unsigned one, which a shift brings.

"auto" is the format of 4 bits whose quantization noise, as measured on the site's own numbers, is least.
"""

from dataclasses import replace

import torch

from ...ir.low_bit import FORMATS, dequantize, fake_quantize, format_of, quantize
from .fit import Problem, is_static, static_scale
from .qsnr import measured_qsnr
from .recipe import Recipe, stored_dtype

WEIGHTS = tuple(name for name, form in FORMATS.items() if form.weight and form.bits != 6)
ACTIVATIONS = ("none", *(name for name, form in FORMATS.items() if form.activation and form.bits != 6 and name != "uint4-g64"))
AUTO = "auto"
_CANDIDATES = ("int4-g64", "int4-g32", "mxint4", "mxfp4", "nvint4", "nvfp4")


def group_of(name: str, k: int) -> int:
    """What K must be a multiple of; for "auto", of what every candidate needs."""
    names = _CANDIDATES if name == AUTO else () if name == "none" else (name,)
    return max((format_of(each).group_of(k) for each in names), default=1)


def resolved(recipe: Recipe, problem: Problem) -> Recipe:
    """`recipe` with the formats that "auto" means for a site."""
    if recipe.weight == AUTO:
        recipe = replace(recipe, weight=max(_CANDIDATES, key=lambda name: _weight_qsnr(problem, name)))
    if recipe.act == AUTO:
        assert problem.rows is not None
        rows = problem.rows
        recipe = replace(recipe, act=max(_CANDIDATES, key=lambda name: _activation_qsnr(rows, problem.dtype, name)))
    return recipe


def _weight_qsnr(problem: Problem, name: str) -> float:
    quantized = quantize(problem.joined, name, stored_dtype(problem.dtype))
    values = dequantize(quantized.codes, quantized.scale, quantized.scale2, name, torch.float32)
    return measured_qsnr(problem.joined, values)


def _activation_qsnr(rows: torch.Tensor, dtype: torch.dtype, name: str) -> float:
    scale2 = static_scale(rows, name) if is_static(name) else 1.0
    return measured_qsnr(rows, fake_quantize(rows, name, stored_dtype(dtype), scale2))
