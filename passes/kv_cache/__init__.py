"""`kv-cache`: a decoder as functions of one step, with keys and values as explicit state."""

from .kv_cache import KVCache

__all__ = ["KVCache"]
