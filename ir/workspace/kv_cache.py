"""Scratch of attention over caches: for each thread queries, a block of keys and of values in float32 and the scores, and the partial
results of chunks of slots (codegen/attention/native/call.h)."""

from typing import Any

from ..program import Node
from .operands import WHOLE, Part, Workspace, sizes

_FLOAT = 4
_BLOCK = 64  # slots
_CHUNK = 256
_TILE = 64  # queries times heads that share keys
_PAD = 16  # elements to which rows are filled up


def cached_attention(a: dict[str, Any], node: Node, threads: int, part: Part = WHOLE) -> Workspace:
    """With every slot of the cache in use, or of the window: how many are is known when it runs."""
    batch, heads, queries, depth = part.sizes(a["q"])
    _, kv_heads, capacity, width = sizes(a["cache_v"])
    if 0 in (batch, heads, queries, depth, width):
        return Workspace()
    depth, width = padded(depth), padded(width)
    group = sizes(a["q"])[1] // kv_heads
    kv_heads = heads // group
    step = min(queries, max(1, _TILE // group))
    height, tiles = step * group, -(-queries // step)
    is_split = tiles == 1 or batch * kv_heads * tiles < 4 * threads
    seen = min(capacity, a["window"] + step if a["window"] else capacity)
    chunks = batch * kv_heads * tiles * -(-seen // _CHUNK) if is_split else 0
    return Workspace(chunks * partial_floats(height, width) * _FLOAT, threads * own_floats(height, depth, width) * _FLOAT)


def padded(count: int) -> int:
    return -(-count // _PAD) * _PAD


def partial_floats(height: int, width: int) -> int:
    """Of a partial result: sums and largest scores of `height` queries (codegen/native/softmax.h)."""
    return height * (width + 2)


def own_floats(height: int, depth: int, width: int) -> int:
    """Of a thread: queries, a block of keys and of values, scores, and two partial results."""
    return height * (depth + _BLOCK) + _BLOCK * (depth + max(depth, width)) + 2 * partial_floats(height, width)
