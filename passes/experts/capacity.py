"""How many tokens each expert takes: from the mean number of experts a token, and that from how much of a row is masked.

    C = min(S, ceil_to(max(rounding(S k / E), least), multiple))         k(r) = clamp(round(kmin + (kmax - kmin) s(r)), kmin, kmax)

r = m / n is the share of masked ones among the valid positions of a row. Source: specs/expert_choice.md, section 2.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

from ...ir import Program
from ...ir.errors import InputError, PassError

SCHEDULE = "expert-choice"  # the name under which a program keeps what a call has to know

ROUNDINGS: dict[str, Callable[[int, int], int]] = {
    "floor": lambda a, b: a // b,
    "ceil": lambda a, b: -(-a // b),
    "round": lambda a, b: _half_to_even(a, b),
}

_WIDTH = 2 * 0.22**2  # twice the variance of the gaussian shape
_EDGE = math.exp(-0.25 / _WIDTH)  # its value at r = 0 and 1, which is taken off

SHAPES: dict[str, Callable[[float], float]] = {
    "linear": lambda r: r,
    "linear_reverse": lambda r: 1 - r,
    "cosine": lambda r: (1 - math.cos(math.pi * r)) / 2,
    "cosine_reverse": lambda r: (1 + math.cos(math.pi * r)) / 2,
    "bell": lambda r: 1 - 4 * (r - 0.5) ** 2,
    "gaussian": lambda r: (math.exp(-((r - 0.5) ** 2) / _WIDTH) - _EDGE) / (1 - _EDGE),
    "bell_reverse": lambda r: 1 - SHAPES["bell"](r),
    "gaussian_reverse": lambda r: 1 - SHAPES["gaussian"](r),
}
RATIOS = ("row", "generation")


@dataclass(frozen=True)
class Capacity:
    """Tokens that each of `experts` takes of a row: `rounding` of the even share, at least `least`, a multiple of `multiple`."""

    experts: int
    rounding: str = "floor"
    least: int = 1
    multiple: int = 1

    def of(self, length: int, k: int) -> int:
        """C of a row of `length` valid positions at k experts a token in the mean."""
        share = max(ROUNDINGS[self.rounding](length * k, self.experts), self.least)
        return min(length, -(-share // self.multiple) * self.multiple)


@dataclass(frozen=True)
class CapacitySchedule:
    """k experts a token, by how much of a row is masked: from kmin to kmax along `shape`, one of `SHAPES`.

    With ratio="row" the share is that of the whole row, its prompt included; with "generation" that of the places masked at first.

    Raises:
        PassError: not 1 <= kmin <= kmax, or shape or ratio are unknown.
    """

    kmin: int
    kmax: int
    shape: str = "linear_reverse"
    ratio: str = "row"

    def __post_init__(self) -> None:
        if not all(type(k) is int for k in (self.kmin, self.kmax)) or not 1 <= self.kmin <= self.kmax:
            raise PassError(f"a schedule of capacities goes from kmin to kmax, 1 <= kmin <= kmax, not from {self.kmin!r} to {self.kmax!r}")
        for name, value, known in (("shape", self.shape, tuple(SHAPES)), ("ratio", self.ratio, RATIOS)):
            if value not in known:
                raise PassError(f"{name} {value!r} of a schedule of capacities is unknown: it is one of {', '.join(known)}")

    def k(self, masked: int, valid: int) -> int:
        """Experts a token where `masked` of `valid` positions are masked; half is rounded to even.

        Raises:
            InputError: not 0 <= masked <= valid, in integers, or no position is valid.
        """
        if not (type(masked) is type(valid) is int and 0 <= masked <= valid > 0):
            raise InputError(
                f"a row has {masked!r} masked of {valid!r} valid positions: give integers, 0 <= masked <= valid, and at least one valid"
            )
        wanted = self.kmin + (self.kmax - self.kmin) * SHAPES[self.shape](masked / valid)
        return min(max(round(wanted), self.kmin), self.kmax)

    def mean(self, steps: int = 1000) -> float:
        """E[k] where the share of masked positions is spread evenly over 0 .. 1, at so many of them.

        Raises:
            InputError: steps is no number from 1 on.
        """
        if type(steps) is not int or steps < 1:
            raise InputError(f"steps is an integer from 1 on, not {steps!r}")
        return sum(self.k(2 * i + 1, 2 * steps) for i in range(steps)) / steps


def schedule_of(program: Program) -> CapacitySchedule | None:
    """The schedule of capacities that `expert-choice` left with the program."""
    data = program.schedules.get(SCHEDULE, {})
    return CapacitySchedule(data["kmin"], data["kmax"], data["shape"], data["ratio"]) if "kmin" in data else None


def leaks_future(program: Program) -> bool:
    """Whether experts of a program choose among positions some of which do not see one another."""
    return bool(program.schedules.get(SCHEDULE, {}).get("leaks_future"))


def _half_to_even(a: int, b: int) -> int:
    whole, rest = divmod(a, b)
    return whole + (2 * rest > b or (2 * rest == b and whole % 2 == 1))
