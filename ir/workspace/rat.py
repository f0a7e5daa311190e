"""Scratch of attention over a chunked recurrence: that of attention over caches for each thread, what is near as keys and values of the
streams (rows and heads of keys) that are worked on at once, and partial results where few queries meet pieces of ranges
(codegen/rat/native/call.h)."""

from typing import Any

from ..program import Node
from .kv_cache import own_floats, padded, partial_floats
from .operands import Workspace, sizes

_FLOAT = 4
_CHUNK = 256  # keys
_TILE = 64  # queries times heads that share keys
_RANGES = 4  # what is cut into pieces of its own, beside whole pieces


def rat_attention(a: dict[str, Any], node: Node, threads: int) -> Workspace:
    return _workspace(a, 0, threads)


def rat_cached_attention(a: dict[str, Any], node: Node, threads: int) -> Workspace:
    """With every slot in use: how many are is known when it runs."""
    return _workspace(a, sizes(a["key_slots"])[2], threads)


def _workspace(a: dict[str, Any], slots: int, threads: int) -> Workspace:
    batch, heads, tokens, depth = sizes(a["q"])
    kv_heads = sizes(a["k"])[1]
    if 0 in (batch, heads, tokens, depth):
        return Workspace()
    depth, group = padded(depth), heads // kv_heads
    step = min(tokens, max(1, _TILE // group))
    is_split, streams = step == tokens, batch * kv_heads
    wave = streams if is_split else min(streams, 2 * threads)
    finals = tokens // a["chunk"] + 2 if a["local"] == "raw" else 0
    pieces = streams * (-(-slots // _CHUNK) + _RANGES) if is_split else 0
    height = step * group
    floats = 2 * wave * (tokens + finals + 1) * depth + pieces * partial_floats(height, depth)
    return Workspace(0, _FLOAT * (floats + threads * own_floats(height, depth, depth)))
