"""How large caches are: symbols, since the runtime chooses."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ...ir import Symbol
from ...ir.symbols import UNBOUNDED, SymbolTable, hint
from .decoder import Decoder


@dataclass(frozen=True)
class CacheSizes:
    """`rows` of all caches, `capacity` of those that keep each position; by window the slots of those that keep the last ones."""

    rows: Any
    capacity: Any
    rings: Mapping[int, Any]

    def slots(self, window: int) -> Any:
        return self.rings[window] if window else self.capacity


def cache_sizes(symbols: SymbolTable, decoder: Decoder) -> CacheSizes:
    """The symbols of a decoder's caches, declared unless they are there."""
    windows = sorted({seen.window for seen in decoder.visible} - {0})
    capacity = 2 * hint(decoder.length) + 1
    hints = {"cache_rows": hint(decoder.batch) + 1, "capacity": capacity} | {_slots(window): capacity + window for window in windows}
    for name, size in hints.items():
        if name not in symbols:
            symbols.declare(Symbol(name, 1, UNBOUNDED, size))
    rings = {window: symbols.size(_slots(window)) for window in windows}
    return CacheSizes(symbols.size("cache_rows"), symbols.size("capacity"), rings)


def _slots(window: int) -> str:
    return f"slots_{window}"
