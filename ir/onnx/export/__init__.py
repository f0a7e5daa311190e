"""Programs as ONNX models."""

from .model import DIALECTS, REGIONS, to_onnx

__all__ = ["DIALECTS", "REGIONS", "to_onnx"]
