"""Low-bit number formats: which there are, their reference quantizers, how codes are packed, and block rotations.

Kernels and exporters are held to these bodies. Sources: SVDQuant (arXiv 2411.05007) for int4 with blocks, "INT v.s. FP"
(arXiv 2510.25602) for the formats under MX and NV block scales.
"""

from .formats import FORMATS, Format, format_of
from .hadamard import hadamard, rotate
from .quantize import Quantized, dequantize, fake_quantize, quantize

__all__ = ["FORMATS", "Format", "Quantized", "dequantize", "fake_quantize", "format_of", "hadamard", "quantize", "rotate"]
