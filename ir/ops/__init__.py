"""The dialect's operators; importing this package declares them."""

from . import attention, kv_cache, low_rank, norm, onnx_node

__all__ = ["attention", "kv_cache", "low_rank", "norm", "onnx_node"]
