"""What steps of a decoder keep of each row, read off the inputs of a function of one step: their names say whose they are, and the call
that reads them how many slots they have.

    cache_k_3, cache_v_3    keys and values of attention 3: a slot for each position, or, of a recurrence, for each chunk and what is near
    state_k_3, state_v_3    the running state of recurrence 3
"""

import re
from dataclasses import dataclass

import torch

from .ops.rat import ring_of
from .pattern import named_arguments
from .program import Function, Node

_NAME = re.compile(r"(cache|state)_([kv])_(\d+)")


@dataclass(frozen=True)
class CacheType:
    """One layer's keys or values: [rows, heads, slots, width], with `fixed` slots and one for each `chunk` of positions; a state, which
    has no slots, where `chunk` is 0."""

    layer: int
    heads: int
    width: int
    dtype: torch.dtype
    device: torch.device
    fixed: int = 0
    chunk: int = 1

    def shape(self, rows: int, capacity: int) -> tuple[int, ...]:
        """Of a cache of so many rows with room for `capacity` positions each."""
        slots = [self.fixed + -(-capacity // self.chunk)] if self.chunk else []
        return (rows, self.heads, *slots, self.width)

    def nbytes(self, rows: int, capacity: int) -> int:
        return torch.Size(self.shape(rows, capacity)).numel() * self.dtype.itemsize


def cache_types(function: Function) -> dict[str, CacheType]:
    """The caches and states that `function` takes, by name."""
    return {str(node.target): _cache_type(node) for node in function.placeholders if _NAME.fullmatch(str(node.target))}


def _cache_type(node: Node) -> CacheType:
    value, name = node.meta["val"], str(node.target)
    fixed, chunk = 0, 1
    reader = next((user for user in node.users if user.target is torch.ops.gw.rat_cached_attention.default), None)
    if reader is not None:
        a = named_arguments(reader)
        fixed, chunk = a["sinks"] + ring_of(a["chunk"], a["window"], a["local"]), a["chunk"]
    if name.startswith("state"):
        fixed, chunk = 0, 0
    return CacheType(int(name.rsplit("_", 1)[1]), int(value.shape[1]), int(value.shape[-1]), value.dtype, value.device, fixed, chunk)
