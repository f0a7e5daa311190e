"""Names and what they stand for while a graph is read."""

from collections.abc import Mapping
from typing import Any

from ..errors import ArtifactError
from .builder import Value


class Scope:
    """Values by name; an inner scope sees those of the outer one. `opsets` are the versions of the domains in it, `attributes` those of
    the function that it is the body of."""

    def __init__(self, opsets: Mapping[str, int], outer: "Scope | None" = None, attributes: Mapping[str, Any] | None = None):
        self.values: dict[str, Value] = {}
        self.opsets, self.outer, self.attributes = opsets, outer, attributes or {}

    def __getitem__(self, name: str) -> Value:
        scope: Scope | None = self
        while scope is not None:
            if name in scope.values:
                return scope.values[name]
            scope = scope.outer
        raise ArtifactError(
            f"value {shown(name)} is read before it is made, or by nobody: the graph is out of order, has a cycle or lacks it"
        )

    def __contains__(self, name: str) -> bool:
        return name in self.values or (self.outer is not None and name in self.outer)


def shown(name: str) -> str:
    """A name of the file's in a message."""
    return repr(name[:80])


def domain_of(name: str) -> str:
    """The domain of an operator; the standard's own has two names."""
    return "" if name == "ai.onnx" else name
