"""How ONNX operators are read, one file a family; importing this package declares them."""

from . import (
    attention,
    control,
    elementwise,
    indexing,
    linear,
    norms,
    pooling,
    quantization,
    recurrent,
    reductions,
    resize,
    sequences,
    shapes,
)

__all__ = [
    "attention",
    "control",
    "elementwise",
    "indexing",
    "linear",
    "norms",
    "pooling",
    "quantization",
    "recurrent",
    "reductions",
    "resize",
    "sequences",
    "shapes",
]
