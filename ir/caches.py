"""What steps of a decoder keep of each row, read off the inputs of a function of one step: their names say whose they are, and the call
that reads them how many slots they have.

    cache_k_3, cache_v_3    keys and values of attention 3: a slot for each position, or, of a recurrence, for each chunk and what is near
    state_k_3, state_v_3    the running state of recurrence 3
"""

import re
from dataclasses import dataclass

import torch

from .ops.rat_parts import ring_of
from .pattern import named_arguments
from .program import Function, Node

RING_BLOCK = 64  # slots, as codegen/attention/native reads them

_NAME = re.compile(r"(cache|state)_([kv])_(\d+)")


@dataclass(frozen=True)
class CacheType:
    """One layer's keys or values: [rows, heads, slots, width], with `fixed` slots and one for each `chunk` of positions, or with a `window`
    (not 0) a ring of as many as a step can see; a state [rows, heads, width] where `chunk` is 0."""

    layer: int
    heads: int
    width: int
    dtype: torch.dtype
    device: torch.device
    window: int = 0
    fixed: int = 0
    chunk: int = 1

    def slots(self, capacity: int, most_tokens: int = 1) -> int:
        """For `capacity` positions and steps of so many tokens at most. Kernels read whole blocks where they go around; a ring that holds
        the capacity does not."""
        if self.window:
            return min(capacity, -(-(self.window + most_tokens - 1) // RING_BLOCK) * RING_BLOCK)
        return self.fixed + -(-capacity // self.chunk) if self.chunk else 1

    def shape(self, rows: int, slots: int) -> tuple[int, ...]:
        """Of the tensor of so many rows."""
        return (rows, self.heads, slots, self.width) if self.chunk else (rows, self.heads, self.width)

    def nbytes(self, rows: int, capacity: int, most_tokens: int = 1) -> int:
        return rows * self.heads * self.slots(capacity, most_tokens) * self.width * self.dtype.itemsize


def cache_types(function: Function) -> dict[str, CacheType]:
    """The caches and states that `function` takes, by name."""
    return {str(node.target): _cache_type(node) for node in function.placeholders if _NAME.fullmatch(str(node.target))}


def _cache_type(node: Node) -> CacheType:
    value, name = node.meta["val"], str(node.target)
    window, fixed, chunk = _ring(node), 0, 1
    reader = next((user for user in node.users if user.target is torch.ops.gw.rat_cached_attention.default), None)
    if reader is not None:
        a = named_arguments(reader)
        fixed, chunk = a["sinks"] + ring_of(a["chunk"], a["window"], a["local"]), a["chunk"]
    if name.startswith("state"):
        fixed, chunk = 0, 0
    return CacheType(
        int(name.rsplit("_", 1)[1]), int(value.shape[1]), int(value.shape[-1]), value.dtype, value.device, window, fixed, chunk
    )


def _ring(cache: Node) -> int:
    """The window of attention that reads a cache as a ring, behind what appends to it; 0 where none does."""
    readers = [
        user for append in cache.users if append.target is torch.ops.gw.kv_append.default for new in append.users for user in new.users
    ]
    rings = (each for each in readers if each.target is torch.ops.gw.cached_attention.default and each.kwargs.get("ring"))
    return next((int(each.kwargs["window"]) for each in rings), 0)  # type: ignore[arg-type]
