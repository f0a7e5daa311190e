"""The dialect's operators; importing this package declares them."""

from . import attention, experts, kv_cache, low_rank, norm

__all__ = ["attention", "experts", "kv_cache", "low_rank", "norm"]
