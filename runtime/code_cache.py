"""What lowering found out and what Inductor made, kept between processes.

    kind code      one compiled graph     graph with the types of its inputs, environment, Inductor's settings, compiler
    kind pieces    one lowered function   its graph, the same; the pieces whose compiled code took more memory than planned

Graphs of equal text share their code, also inside one program: the layers of a stack are compiled once.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import fx

from ..codegen.native.library import NativeLibrary
from ..ir import SymbolTable
from .cache import Cache
from .cache_key import code_environment, digest, graph_text, native_environment


@dataclass(frozen=True)
class Shelf:
    """The place of one entry."""

    cache: Cache
    kind: str
    key: dict[str, str]

    def get(self) -> bytes | None:
        return self.cache.get(self.kind, self.key)

    def put(self, value: bytes) -> None:
        self.cache.put(self.kind, self.key, value)


def load_native(library: NativeLibrary, cache: Cache | None) -> Any:
    """`library` for calls in this process, from `cache` or compiled now; None where no compiler makes it."""
    return library(None if cache is None else Shelf(cache, "native", native_environment(library.source)))


class CodeCache:
    """The places in `cache` for what is made of graphs whose symbols are `symbols`."""

    def __init__(self, cache: Cache, symbols: SymbolTable):
        self.cache, self.symbols = cache, symbols
        self._environment = code_environment()

    def code(self, graph: fx.Graph, inputs: Sequence[Any], form: str = "as it is") -> Shelf | None:
        """Where the code of `graph` for inputs of these types lies, which a compiler sees in this `form`; None where it is not to be
        kept."""
        return self._shelf("code", graph, inputs, form=form)

    def left(self, graph: fx.Graph) -> set[int] | None:
        """The positions of the nodes of `graph` with which those pieces begin that library kernels run; None when that is not known."""
        shelf = self._shelf("pieces", graph)
        kept = shelf.get() if shelf is not None else None
        return None if kept is None else set(json.loads(kept))

    def keep_left(self, graph: fx.Graph, positions: set[int]) -> None:
        """Keeps what `left` gives."""
        shelf = self._shelf("pieces", graph)
        if shelf is not None:
            shelf.put(json.dumps(sorted(positions)).encode())

    def _shelf(self, kind: str, graph: fx.Graph, inputs: Sequence[Any] = (), **parts: str) -> Shelf | None:
        if self._environment is None:
            return None
        return Shelf(self.cache, kind, {"graph": digest(graph_text(graph, inputs, self.symbols)), **parts, **self._environment})
