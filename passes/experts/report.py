"""What a mixture whose experts choose costs and is, in numbers that depend on shapes alone."""

from dataclasses import asdict, dataclass
from typing import Any

from ...ir.pattern import named_arguments
from .capacity import CapacitySchedule
from .emit import Choice
from .router import Routed


@dataclass(frozen=True)
class Figures:
    """Of one row of `length` tokens. `factor` = E C / (S k) compares the pairs of token and expert with those of the k that tokens chose;
    `bytes` are those of the weights, all of which are read."""

    layer: int
    rule: str
    key: str
    experts: int
    length: int
    k: int
    chosen_before: int
    capacity: int
    factor: float
    flops: int
    flops_before: int
    bytes: int

    def data(self) -> dict[str, Any]:
        return asdict(self)


def figures(layer: int, site: Routed, choice: Choice) -> Figures:
    """Before the site's nodes go."""
    gate_up = named_arguments(site.moe)["gate_up"].meta["val"]
    experts, inner, depth = gate_up.shape
    pair = 3 * depth * inner  # FLOPs of a token in an expert: 6 D I, inner being 2 I
    length = int(site.length)
    capacity = choice.capacity(length)
    weights = experts * (inner + inner // 2) * depth * gate_up.dtype.itemsize
    return Figures(
        layer, choice.rule, choice.key, experts, length, choice.k, site.k, capacity, experts * capacity / (length * choice.k),
        pair * experts * capacity, pair * length * site.k, weights,
    )  # fmt: skip


def described(each: Figures, automatic: bool, renormalized: bool) -> str:
    why = f" (the weights of its experts {'had a sum of 1' if renormalized else 'were probabilities'})" if automatic else ""
    change = f"{each.flops / each.flops_before:.2f} x the FLOPs of tokens that chose {each.chosen_before}"
    return (
        f"{each.experts} experts take {each.capacity} of {each.length} tokens by {each.key}, gates {each.rule}{why}; "
        f"E C / (S k) {each.factor:.2f}, {each.flops:.3g} FLOPs a row, {change}, {each.bytes:.3g} bytes of weights"
    )


def described_schedule(schedule: CapacitySchedule) -> str:
    ends = f"{schedule.kmin} to {schedule.kmax} experts a token, {schedule.shape} in the share of masked positions of a {schedule.ratio}"
    return f"{ends}; {schedule.mean():.2f} in the mean where that is spread evenly"
