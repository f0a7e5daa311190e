"""Low-rank outlier absorption (SVDQuant, arXiv 2411.05007): smoothing, low-rank branches, low-bit residuals of linear layers."""

from .absorb_outliers import AbsorbOutliers
from .lora import AppendLoRA
from .quantize import Quantize
from .smooth import Smooth
from .split import SplitLowRank

__all__ = ["AbsorbOutliers", "AppendLoRA", "Quantize", "Smooth", "SplitLowRank"]
