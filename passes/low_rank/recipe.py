"""What a site's layers may become: formats, rank, rotation, and how hard to search. One setting of it is a candidate."""

import math
from dataclasses import dataclass

import torch

from ...ir.low_bit import format_of

# How far below 0 an activation function goes at most, a little rounded up. relu does not; gelu to -0.16997 (-0.17004 with tanh), silu
# to -0.27846, mish to -0.30884, hardswish to -0.375.
LOWER_BOUNDS = {
    "aten::relu": 0.0,
    "aten::gelu": 0.171875,
    "aten::silu": 0.28125,
    "aten::mish": 0.3125,
    "aten::hardswish": 0.375,
}


@dataclass(frozen=True)
class Recipe:
    """The options of a pass as its sites need them. `store` is the dtype of scales and branch where the model is wider."""

    weight: str = "int4-g64"
    act: str = "none"
    rank: int = 32
    refine: int = 10
    gptq: bool = False
    smooth: "str | float" = "search"
    grid: int = 20
    pow2: bool = False
    fold: bool = True
    share_down: bool = True
    shift: bool = True
    rotate: int = 0
    svd: str = "auto"
    min_gain: float = 0.05
    budget: "str | float" = "auto"
    max_bits: "float | None" = None
    seed: int = 0

    @property
    def limit(self) -> float:
        """The largest error that a site may have: by default 1.5 x what its two formats make of normal numbers."""
        if isinstance(self.budget, float | int):
            return float(self.budget)
        own = 0.0 if self.act == "none" else format_of(self.act).gaussian_error
        return 1.5 * math.hypot(format_of(self.weight).gaussian_error, own)


@dataclass(frozen=True)
class Setting:
    """One candidate: `smooth` the factors a (None: none), folded into what is before or not; `act_shift` of unsigned activations."""

    smooth: torch.Tensor | None = None
    folded: bool = False
    rank: int = 0
    rotate: int = 0
    act: str = "none"
    act_shift: float = 0.0
    gptq: bool = False

    @property
    def cost(self) -> int:
        """What it costs at run time, as a rank: nothing, a folded smoothing, a product, a branch, a rotation."""
        if self.rotate:
            return 4
        if self.rank:
            return 3
        if self.smooth is None:
            return 0
        return 1 if self.folded else 2

    def __str__(self) -> str:
        parts = []
        if self.smooth is not None:
            parts.append("smoothing folded" if self.folded else "smoothing")
        if self.rank:
            parts.append(f"rank {self.rank}")
        if self.rotate:
            parts.append(f"rotation {self.rotate}")
        if self.act_shift:
            parts.append(f"shift {self.act_shift}")
        if self.gptq:
            parts.append("GPTQ")
        return ", ".join(parts) or "round to nearest"


def stored_dtype(model: torch.dtype) -> torch.dtype:
    """Of scales and branches: the model's own where it has 16 bits, else bfloat16.

    The residual is what the stored factors leave of the weight, and codes are formed on stored scales, so this rounding is no error.
    """
    return model if model in (torch.float16, torch.bfloat16) else torch.bfloat16


def bits_of(weight: str, rank: int, n: int, k: int, branches: int = 1) -> float:
    """Bits that a weight of a layer [n, k] takes, with its scales and its share of a branch; `branches` layers share one `down`."""
    return format_of(weight).bits_per_weight(k) + 16 * rank * (n + k / branches) / (n * k)


def usable_rank(recipe: Recipe, n: int, k: int) -> tuple[int, str]:
    """The rank that a layer [n, k] (layers that share a branch, joined) gets, and why it is less than asked for.

    A branch must cost less than a quarter of the product, and the layer may not pass `max_bits`.
    """
    limit = recipe.max_bits if recipe.max_bits is not None else math.inf

    def fits(rank: int) -> bool:
        return rank <= min(n, k) and rank * (n + k) < n * k / 4 and bits_of(recipe.weight, rank, n, k) <= limit

    if recipe.rank == 0 or fits(recipe.rank):
        return recipe.rank, ""
    lower = next((rank for rank in range(recipe.rank // 8 * 8, 0, -8) if rank < recipe.rank and fits(rank)), 0)
    largest = f"{lower} is the most" if lower else "none is small enough"
    return lower, f"a branch of rank {recipe.rank} is too large for [{n}, {k}], where {largest}"
