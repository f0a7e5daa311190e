"""The words of slicing: an axis of N units, the tag by which a tensor carries it, the operand that a tag is asked of, a refusal.

An axis has N *units*. A tensor t carries it with `Tag(d, m)` when size(t, d) = N*m and unit u is the index range [u*m, (u+1)*m) of dim d.
Source: specs/feature_slicing.md, section 2.
"""

from dataclasses import dataclass

import torch
from torch import fx

from .sizes import same

WHOLE = None
"""What `backward` says of an operand that every slice needs at full size."""


@dataclass(frozen=True, eq=False, slots=True)
class Tag:
    """Tensor t carries the axis along `dim` (>= 0), `unit` indices a unit: size(t, dim) = N * unit.

    `unit` = 0 marks a partial: one index a slice, whatever the slice's length (`gw.norm_stats` over a sliced normalised dim);
    n slices lay n indices along `dim`.
    """

    dim: int
    unit: int | torch.SymInt = 1

    @property
    def is_partial(self) -> bool:
        """Whether each slice leaves one index, whatever its length."""
        return type(self.unit) is int and self.unit == 0

    # The generated __eq__ would compare SymInts with bool(), which adds a guard to the program's shapes.
    def __eq__(self, other: object) -> bool:
        return isinstance(other, Tag) and self.dim == other.dim and same(self.unit, other.unit)

    def __hash__(self) -> int:
        return hash(self.dim)


@dataclass(frozen=True, slots=True)
class OperandSlot:
    """One occurrence of tensor operand `node`: at `position` (index into args, or keyword), and at `index` if that argument is a list."""

    position: int | str
    index: int | None
    node: fx.Node


@dataclass(frozen=True, slots=True)
class Refusal:
    """Why a tag goes no further. `operand` is the culprit; `retry_units` (reason `unit`) the N' with which the axis would pass.

    Reasons: mixed reduced inner unit halo position barrier mutates rng data-dependent no-row sym-unproved
    alias.
    """

    reason: str
    detail: str
    operand: fx.Node | None = None
    retry_units: int | torch.SymInt | None = None


@dataclass(frozen=True, slots=True)
class Localized:
    """The call that a body makes on slices in place of a node's own call; operands are the same nodes."""

    target: object
    args: tuple
    kwargs: dict
