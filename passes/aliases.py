"""Which values the caller receives, through views or directly: what a pass must not make share memory anew.

A caller may write into an output. If an output came to lie in the memory of an input, a weight or another output, that write
would change those too, so removing a copy or sharing a computation must leave such a value alone.
"""

from ..ir import Node, Rewriter
from ..ir.infer import storage_key, tensors_of


class OutputAliases:
    """The memory in which a function's outputs lie, kept up to date as a pass merges values."""

    def __init__(self, rewriter: Rewriter):
        self._received = {key for leaf in rewriter.function.outputs if isinstance(leaf, Node) for key in _memory(leaf)}
        self._owners = {key: node for node in rewriter.graph.nodes if node.op in ("placeholder", "get_attr") for key in _memory(node)}

    def __contains__(self, node: Node) -> bool:
        return not self._received.isdisjoint(_memory(node))

    def reason_to_keep(self, node: Node, source: Node) -> str | None:
        """Why `source` may not stand for `node`; None when it may."""
        if node not in self or share_memory(node, source):
            return None
        owner = next((self._owners[key] for key in _memory(source) if key in self._owners), None)
        if owner is not None:
            kind = "weight" if owner.op == "get_attr" else "input"
            return f"the caller receives it, and without it would receive {kind} {owner.target} itself"
        return "two outputs would come to share memory" if source in self else None

    def merged(self, node: Node, source: Node) -> None:
        """Notes that `source` is about to stand for `node`."""
        if node in self:
            self._received |= _memory(source)


def share_memory(a: Node, b: Node) -> bool:
    """Whether one is a view of the other, or both of a third."""
    return not _memory(a).isdisjoint(_memory(b))


def _memory(node: Node) -> set[int]:
    return {storage_key(tensor) for tensor in tensors_of(node.meta["val"])}
