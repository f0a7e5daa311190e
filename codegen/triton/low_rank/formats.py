"""Which halves of `gw.lowrank_linear` kernels compute, and how a left operand goes from the first to the second."""

import torch

from ....ir.low_bit.formats import FORMATS

DTYPES = {torch.bfloat16, torch.float16, torch.float32}
WEIGHTS = frozenset(name for name, form in FORMATS.items() if form.weight and form.bits in (4, 8))
ACTIVATIONS = frozenset(name for name, form in FORMATS.items() if form.activation and form.bits in (4, 8) and name != "u8-tensor")
LONGEST_ROTATION = 128  # neighbours along K: of 256, registers are spilled
FEW_ROWS = 16  # of one tile
PART = 256  # neighbours along K: 3072 make 12 programs for few rows, whose sums a product adds up
SHORTEST_BLOCK = 64  # of codes, whose sums are rescaled block by block


def multiplies_codes(act_format: str, weight_format: str) -> bool:
    """Whether codes are multiplied as integers; else both operands are the numbers that codes stand for, in the model's dtype.

    Sums of blocks of 64 take as long to rescale, in float32, as to multiply on an H100; of 32 they are no faster than bfloat16's.
    """
    if act_format == "none":
        return False
    forms = FORMATS[act_format], FORMATS[weight_format]
    return all(form.element in ("int", "uint") and (form.group == 0 or form.group >= SHORTEST_BLOCK) for form in forms)
