"""`layer-skip`: a schedule of active layers over the generated sequence, and self-speculation from a part of the layers."""

from .layer_skip import LayerSkip

__all__ = ["LayerSkip"]
