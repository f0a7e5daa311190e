"""The dialect's operators; importing this package declares them."""

from . import attention, low_rank, norm

__all__ = ["attention", "low_rank", "norm"]
