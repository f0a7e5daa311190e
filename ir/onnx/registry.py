"""Which function reads which ONNX operator. A reader takes the call and its inputs, None for absent ones, and returns its outputs."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from .builder import Builder, Value

Reader = Callable[..., Any]

READERS: dict[tuple[str, str], Reader] = {}

ML, MICROSOFT = "ai.onnx.ml", "com.microsoft"


@dataclass(frozen=True)
class Call:
    """One ONNX node: its attributes by name, the opset version of its domain, and the names of its outputs, "" for unused ones.

    `subgraphs` reads a graph attribute with given inputs, in the scope where the node stands.
    """

    builder: Builder
    op_type: str
    version: int
    attributes: dict[str, Any]
    outputs: tuple[str, ...]
    subgraph: Callable[..., list[Value]] = field(repr=False, default=lambda graph, inputs: [])
    read: set[str] = field(default_factory=set)

    def get(self, name: str, default: Any = None) -> Any:
        self.read.add(name)
        return self.attributes.get(name, default)

    def unread(self) -> list[str]:
        """Attributes that the node has and its reader did not ask for: a newer version may mean something by them."""
        return sorted(set(self.attributes) - self.read)

    def wants(self, index: int) -> bool:
        """Whether output `index` is read."""
        return index < len(self.outputs) and bool(self.outputs[index])


def reader(*op_types: str, domain: str = "") -> Callable[[Reader], Reader]:
    """Declares how operators are read."""

    def declare(function: Reader) -> Reader:
        for op_type in op_types:
            READERS[domain, op_type] = function
        return function

    return declare
