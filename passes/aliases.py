"""Which values the caller receives, through views or directly: what a pass must not make share memory anew.

A caller may write into an output. If an output came to lie in the memory of an input, a weight or another output, that write
would change those too, so removing a copy or sharing a computation must leave such a value alone.
"""

from collections.abc import Iterator

import torch

from ..ir import Node, Rewriter
from ..ir.infer import InferenceError, infer, storage_key


class OutputAliases:
    """The values that share memory with an output, kept up to date as a pass merges values.

    Aliases are inferred anew on the few nodes before the outputs: stored metadata shows what a node aliased when it was made.
    """

    def __init__(self, rewriter: Rewriter):
        self._symbols = rewriter.symbols
        self._memory: set[Node] = set()
        for leaf in rewriter.function.outputs:
            if isinstance(leaf, Node):
                self._add(leaf)

    def __contains__(self, node: Node) -> bool:
        return node in self._memory

    def reason_to_keep(self, node: Node, source: Node) -> str | None:
        """Why `source`, in other memory, may not stand for `node`; None when it may."""
        if node not in self._memory:
            return None
        for value in self._same_memory(source):
            if value.op != "call_function":
                return f"the caller receives it, and without it would receive {value.op.replace('get_attr', 'weight')} {value.target} itself"
            if value in self._memory:
                return "two outputs would come to share memory"
        return None

    def merged(self, node: Node, source: Node) -> None:
        """Notes that `source` now stands for `node`."""
        if node in self._memory:
            self._add(source)

    def _add(self, node: Node) -> None:
        for value in self._same_memory(node):
            if value in self._memory:
                return  # and so is what it views
            self._memory.add(value)

    def _same_memory(self, node: Node) -> Iterator[Node]:
        """`node` and the values that it is a view of, nearest first."""
        pending = [node]
        while pending:
            value = pending.pop()
            yield value
            if value.op == "call_function":
                pending += self._viewed(value)

    def _viewed(self, node: Node) -> list[Node]:
        try:
            own = _keys(infer(self._symbols, node.target, node.args, node.kwargs))
        except InferenceError:
            return list(node.all_input_nodes)
        return [source for source in node.all_input_nodes if own & _keys(source.meta["val"])]


def _keys(value: object) -> set[int]:
    if isinstance(value, tuple | list):
        return {key for item in value for key in _keys(item)}
    return {storage_key(value)} if isinstance(value, torch.Tensor) else set()
