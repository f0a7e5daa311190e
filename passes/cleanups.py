"""The exact clean-ups in the order in which they help each other: copies go first, so that equal expressions meet."""

from .base import Pass
from .fold_batch_norm import FoldBatchNorm
from .fold_constants import FoldConstants
from .remove_dead_code import RemoveDeadCode
from .remove_no_ops import RemoveNoOps
from .remove_proven_assertions import RemoveProvenAssertions
from .share_subexpressions import ShareSubexpressions

CLEANUPS: tuple[Pass, ...] = (
    RemoveProvenAssertions(),
    RemoveDeadCode(),
    RemoveNoOps(),
    ShareSubexpressions(),
    FoldBatchNorm(),
    FoldConstants(),
)
