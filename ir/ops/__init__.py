"""The dialect's operators; importing this package declares them."""

from . import attention, norm

__all__ = ["attention", "norm"]
