"""Passes, the contracts that they declare, and the manager that holds them to it. Programs are seen through `ir` alone."""

from .base import LeftAlone, Outcome, Pass
from .check import Reference, Verdict, Worst, check_exact
from .contract import Contract
from .inputs import random_inputs
from .manager import PassManager, PassReport, PipelineResult
from .pipeline import parse_pipeline, spell
from .registry import all_passes, pass_named

__all__ = [
    "Contract",
    "LeftAlone",
    "Outcome",
    "Pass",
    "PassManager",
    "PassReport",
    "PipelineResult",
    "Reference",
    "Verdict",
    "Worst",
    "all_passes",
    "check_exact",
    "parse_pipeline",
    "pass_named",
    "random_inputs",
    "spell",
]
