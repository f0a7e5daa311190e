"""Passes, the contracts that they declare, and the manager that holds them to it. Programs are seen through `ir` alone."""

from .base import LeftAlone, Outcome, Pass
from .check import Reference, check_exact
from .cleanups import CLEANUPS
from .contract import Contract
from .experts import CapacitySchedule, ExpertChoice, RegroupExperts
from .fold_batch_norm import FoldBatchNorm
from .fold_constants import FoldConstants
from .inputs import random_inputs
from .kv_cache import KVCache
from .layer_skip import LayerSkip
from .low_rank import AbsorbOutliers, AppendLoRA, Quantize, Smooth, SplitLowRank
from .manager import PassManager, PassReport, PipelineResult
from .pipeline import parse_pipeline, spell
from .rat import RatRecurrence
from .registry import all_passes, pass_named
from .remove_dead_code import RemoveDeadCode
from .remove_no_ops import RemoveNoOps
from .remove_proven_assertions import RemoveProvenAssertions
from .share_subexpressions import ShareSubexpressions
from .slicing import SliceGroups
from .verdict import Verdict, Worst

__all__ = [
    "AbsorbOutliers",
    "AppendLoRA",
    "CLEANUPS",
    "CapacitySchedule",
    "Contract",
    "ExpertChoice",
    "FoldBatchNorm",
    "FoldConstants",
    "KVCache",
    "LayerSkip",
    "LeftAlone",
    "Outcome",
    "Pass",
    "PassManager",
    "PassReport",
    "PipelineResult",
    "Quantize",
    "RatRecurrence",
    "Reference",
    "RegroupExperts",
    "RemoveDeadCode",
    "RemoveNoOps",
    "RemoveProvenAssertions",
    "ShareSubexpressions",
    "SliceGroups",
    "Smooth",
    "SplitLowRank",
    "Verdict",
    "Worst",
    "all_passes",
    "check_exact",
    "parse_pipeline",
    "pass_named",
    "random_inputs",
    "spell",
]
