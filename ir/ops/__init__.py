"""The dialect's operators; importing this package declares them."""

from . import attention, experts, grouped, kv_cache, low_rank, norm, onnx_node, rat

__all__ = ["attention", "experts", "grouped", "kv_cache", "low_rank", "norm", "onnx_node", "rat"]
