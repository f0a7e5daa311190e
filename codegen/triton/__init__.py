"""Triton for groups of pointwise operations and row reductions: readable files, one a group, each of which checks itself.

Nothing here imports triton until a kernel is loaded or compiled.
"""

from .emit import Kernel, emit
from .plan import plan
from .pointwise import NotFusible
from .values import Plan

__all__ = ["Kernel", "NotFusible", "Plan", "emit", "plan"]
