"""What kernels of low-rank layers are compared with, as text of plain PyTorch."""

import math

import torch

from ....ir.low_bit.elements import E2M1_VALUES
from ....ir.low_bit.formats import Format
from .plan import OperandPlan, ProductPlan

_ROTATED = '''def rotated(x, size):
    """Blocks of `size` neighbours times a Hadamard matrix, and half of its scale as a power of two."""
    h = torch.ones(1, 1, device=x.device)
    while h.size(0) < size:
        h = torch.cat([torch.cat([h, h], 1), torch.cat([h, -h], 1)])
    return (x.unflatten(-1, (-1, size)) @ (h * FACTOR)).flatten(-2)
'''
_ROUNDED = {
    "int": "y.round()",
    "uint": "y.round()",
    "e4m3": "y.to(torch.float8_e4m3fn).float()",
    "e2m1": "(y / unit).round() * unit",
}
_UNIT = "    unit = torch.where(y.abs() < 2, 0.5, torch.where(y.abs() < 4, 1.0, 2.0))\n"


def rotated_text(size: int) -> str:
    """The function that turns blocks of K."""
    return _ROTATED.replace("FACTOR", repr(2.0 ** -math.floor(math.log2(size) / 2)))


def quantized_text(plan: OperandPlan) -> str:
    """The function that gives numbers of a format, before they are scaled, and scales of their blocks."""
    form = plan.form
    assert form is not None
    blocks = f"xs.unflatten(-1, (-1, {plan.block}))" if plan.block else "xs.unsqueeze(-2)"
    largest = "blocks.clamp(min=0).amax(-1)" if form.element == "uint" else "blocks.abs().amax(-1)"
    low = 0 if form.element == "uint" else -form.qmax
    return (
        f'def quantized(xs):\n    """Numbers of {form.name} in blocks, and what each block is multiplied by, in float32."""\n'
        f"    blocks = {blocks}\n    amax = {largest}\n    scale = amax / {form.qmax!r}\n"
        f"{_stored(plan, form)}"
        f"    y = (blocks / steps.unsqueeze(-1)).clamp({low!r}, {form.qmax!r})\n"
        f"{_UNIT if form.element == 'e2m1' else ''}"
        f"    return {_ROUNDED[form.element]}, steps\n"
    )


def _stored(plan: OperandPlan, form: Format) -> str:
    if form.scale == "e8m0":
        return (
            "    fraction, exponent = torch.frexp(scale)\n"
            "    exponent = torch.where(fraction == 0.5, exponent - 1, exponent).clamp(-127, 127)\n"
            "    steps = torch.where(amax == 0, 1.0, torch.ldexp(torch.ones_like(scale), exponent))\n"
        )
    if form.scale == "nv":
        scale2 = f"torch.tensor({plan.scale2!r}, device=xs.device)"
        return (
            f"    scale2 = {scale2}\n    relative = (scale / scale2).clamp(2.0**-9, 448.0).to(torch.float8_e4m3fn).float()\n"
            "    steps = torch.where(amax == 0, 1.0, relative) * scale2\n"
        )
    dtype = torch.float32 if form.scale == "f32" else plan.dtype
    least = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
    return f"    steps = torch.where(amax == 0, 1.0, scale).to({dtype}).float().clamp(min={least!r})\n"


def product_text(plan: ProductPlan) -> str:
    """The function that multiplies codes, in float64."""
    form = plan.form
    lines = ["def low_bit_product(a, a_scale, weight, weight_scale, weight_scale2, half, up, bias, weight_format, dtype):"]
    lines += [f'    """a times a weight of codes of {form.name}, and the other half of the branch, in float64."""']
    if form.is_packed:
        lines += ["    weight = torch.stack([weight & 15, weight >> 4], -1).flatten(-2)"]
    if form.element == "int" and form.is_packed:
        lines += ["    weight = (weight.to(torch.int8) ^ 8) - 8"]
    if form.element == "e2m1":
        table = [*E2M1_VALUES, *(-value for value in E2M1_VALUES)]
        lines += [f"    values = torch.tensor({table}, device=a.device)", "    weight = values[weight.long()]"]
    lines += ["    steps = " + ("2.0 ** (weight_scale.double() - 127)" if form.scale == "e8m0" else "weight_scale.double()")]
    if "weight_scale2" in plan.roles:
        lines += ["    steps = steps * weight_scale2.double().reshape(-1, 1)"]
    lines += ["    weight = (weight.double().unflatten(-1, (steps.size(-1), -1)) * steps.unsqueeze(-1)).flatten(-2)", "    a = a.double()"]
    if plan.has_codes:
        lines += ["    a = (a.unflatten(-1, (a_scale.size(-1), -1)) * a_scale.double().unsqueeze(-1)).flatten(-2)"]
    lines += ["    y = a @ weight.T"]
    half = "half.double()" if plan.parts == 1 else "half.double().sum(0)"
    lines += [f"    y = y + {half} @ up.double().T"] if plan.rank else []
    lines += ["    return y if bias is None else y + bias.double()"]
    return "\n".join(lines)
