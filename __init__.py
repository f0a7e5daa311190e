"""A compiler for PyTorch models whose passes are published research ideas, each with a checked contract.

Names are imported on first use: `import graphwright` costs no more than `import torch` does.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from . import ir as ir
    from . import models as models
    from .compiler import compile as compile
    from .compiler import compile_decoder as compile_decoder
    from .compiler import load as load
    from .explorer import Profile as Profile
    from .ir import Program as Program
    from .ir import parse as parse
    from .ir.capture import capture as capture
    from .ir.diff import diff as diff
    from .ir.errors import ArtifactError as ArtifactError
    from .ir.errors import BudgetError as BudgetError
    from .ir.errors import CalibrationError as CalibrationError
    from .ir.errors import CaptureError as CaptureError
    from .ir.errors import ContractError as ContractError
    from .ir.errors import GraphwrightError as GraphwrightError
    from .ir.errors import InputError as InputError
    from .ir.errors import ParseError as ParseError
    from .ir.errors import PassError as PassError
    from .ir.errors import StateError as StateError
    from .ir.errors import TargetError as TargetError
    from .ir.errors import VerifyError as VerifyError
    from .ir.onnx import from_onnx as from_onnx
    from .ir.op import op as op
    from .passes import CLEANUPS as CLEANUPS
    from .passes import AbsorbOutliers as AbsorbOutliers
    from .passes import AppendLoRA as AppendLoRA
    from .passes import CapacitySchedule as CapacitySchedule
    from .passes import Contract as Contract
    from .passes import ExpertChoice as ExpertChoice
    from .passes import FoldBatchNorm as FoldBatchNorm
    from .passes import FoldConstants as FoldConstants
    from .passes import KVCache as KVCache
    from .passes import LayerSkip as LayerSkip
    from .passes import Pass as Pass
    from .passes import PassManager as PassManager
    from .passes import Quantize as Quantize
    from .passes import RatRecurrence as RatRecurrence
    from .passes import RegroupExperts as RegroupExperts
    from .passes import RemoveDeadCode as RemoveDeadCode
    from .passes import RemoveNoOps as RemoveNoOps
    from .passes import RemoveProvenAssertions as RemoveProvenAssertions
    from .passes import ShareSubexpressions as ShareSubexpressions
    from .passes import SliceGroups as SliceGroups
    from .passes import Smooth as Smooth
    from .passes import SplitLowRank as SplitLowRank
    from .passes import all_passes as all_passes
    from .passes.experts import RoutingStatistics as RoutingStatistics
    from .passes.experts import routing_statistics as routing_statistics
    from .runtime.cache import Cache as Cache
    from .runtime.compiled import CompiledModel as CompiledModel
    from .runtime.decoding.generated import Generated as Generated
    from .runtime.decoding.generated import Token as Token
    from .runtime.denoising.generate import Denoised as Denoised
    from .runtime.denoising.generate import masked_diffusion_generate as masked_diffusion_generate
    from .runtime.memory import Measurement as Measurement
    from .runtime.memory import measure_peak as measure_peak

_HOMES = {
    ".compiler": ("compile", "compile_decoder", "load"),
    ".explorer": ("Profile",),
    ".ir": ("Program", "capture", "op", "parse"),
    ".ir.diff": ("diff",),
    ".ir.errors": (
        "ArtifactError", "BudgetError", "CalibrationError", "CaptureError", "ContractError", "GraphwrightError", "InputError", "ParseError",
        "PassError", "StateError", "TargetError", "VerifyError",
    ),
    ".ir.onnx": ("from_onnx",),
    ".passes": (
        "AbsorbOutliers", "AppendLoRA", "CLEANUPS", "CapacitySchedule", "Contract", "ExpertChoice", "FoldBatchNorm", "FoldConstants",
        "KVCache", "LayerSkip", "Pass", "PassManager", "Quantize", "RatRecurrence", "RegroupExperts",
        "RemoveDeadCode", "RemoveNoOps", "RemoveProvenAssertions", "ShareSubexpressions", "SliceGroups", "Smooth", "SplitLowRank",
        "all_passes",
    ),
    ".passes.experts": ("RoutingStatistics", "routing_statistics"),
    ".runtime.cache": ("Cache",),
    ".runtime.compiled": ("CompiledModel",),
    ".runtime.decoding.generated": ("Generated", "Token"),
    ".runtime.denoising.generate": ("Denoised", "masked_diffusion_generate"),
    ".runtime.memory": ("Measurement", "measure_peak"),
}  # fmt: skip
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}

_MODULES = ("ir", "models")

__all__ = [*_MODULES, *_HOME_OF]  # noqa: PLE0604


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return importlib.import_module(f".{name}", __name__)
    if name not in _HOME_OF:
        raise AttributeError(f"module 'graphwright' has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOME_OF[name], __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
