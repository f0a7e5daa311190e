"""Dependence of dims: which dims of a node's operands move with a dim of its output, and why others cannot be cut.

The slicing pass asks `backward`, `forward`, `localize`, `kind` and `halo`; a dialect op declares its `row` beside its reference.
Nothing here changes a graph, adds a guard or looks at more than one node. Source: specs/feature_slicing.md, sections 2 to 3.3.
"""

from . import attention, conv, elementwise, experts, index, kv_cache, low_rank, matmul, norm, pieces, reduce, views  # noqa: F401  (register rows)
from .call import Call
from .table import ROWS, Move, Moves, Row, backward, declare, forward, halo, kind, localize, row
from .tag import WHOLE, Localized, OperandSlot, Refusal, Tag
from .views import tag_through_view

__all__ = [
    "ROWS", "WHOLE", "Call", "Localized", "Move", "Moves", "OperandSlot", "Refusal", "Row", "Tag",
    "backward", "declare", "forward", "halo", "kind", "localize", "row", "tag_through_view",
]  # fmt: skip
