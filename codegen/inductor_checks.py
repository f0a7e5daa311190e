"""What Inductor may not compile: operations that look at their data and raise.

Its C++ throws inside OpenMP's threads, or divides integers by zero, and either ends the process. ATen's kernels raise in the thread
of the caller, so these operations stay with them.
"""

import torch
from torch import fx
from torch._inductor.custom_graph_pass import CustomGraphPass, get_hash_for_files

from ..ir import Node

aten = torch.ops.aten

_INDEXING = {
    aten.embedding,
    aten.gather,
    aten.index,
    aten.index_add,
    aten.index_copy,
    aten.index_fill,
    aten.index_put,
    aten.index_reduce,
    aten.index_select,
    aten.put,
    aten.scatter,
    aten.scatter_add,
    aten.scatter_reduce,
    aten.take,
}
_DIVIDING = {aten.div, aten.floor_divide, aten.fmod, aten.remainder}


class KeepChecks(CustomGraphPass):
    """Marks, in the graph that Inductor is about to lower, what is to be called as it is."""

    def __call__(self, graph: fx.Graph) -> None:
        for node in graph.nodes:
            if node.op == "call_function" and checks_its_data(node):
                node.meta["should_fallback"] = True

    def uuid(self) -> object:
        return get_hash_for_files((__file__,))


def checks_its_data(node: Node) -> bool:
    """Whether a call may raise by the values of its tensors: an index out of range, an integer divided by zero."""
    operator = getattr(node.target, "overloadpacket", None)
    return operator in _INDEXING or (operator in _DIVIDING and _divides_integers(node))


def _divides_integers(node: Node) -> bool:
    divisor, value = node.args[1], node.meta.get("val")
    if not isinstance(divisor, fx.Node):
        return bool(divisor == 0)
    return isinstance(value, torch.Tensor) and not value.dtype.is_floating_point
