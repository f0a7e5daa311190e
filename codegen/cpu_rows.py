"""Products of one row as weighted sums, which Inductor turns into loops that read the weight once, in its own type, with whatever
surrounds them. Sums are float32.

The row is computed before the loop: left to itself, Inductor repeats the norm or activation that it comes from for every row of the
weight, which halves the rate at which a vocabulary is read.

Such a product takes as long as its weight takes to arrive from memory. Float32, two threads, AMD Zen 4: a decoder of 28 million weights
takes 4.2 ms a token so, 11 ms by oneDNN and 14 ms by MKL; bfloat16, one of 100 million weights 9.9 ms, 22 ms by ATen.
"""

from typing import Any

import torch
from torch import fx

from ..ir import Node
from .cpu_groups import product_of

aten = torch.ops.aten
FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def is_row_product(node: Node) -> bool:
    """Whether a call is a product of one row with a matrix, all of one type of floats."""
    found = product_of(node)
    if found is None:
        return False
    x, weight, bias, _ = found
    values = [operand.meta["val"] for operand in (x, weight, *([] if bias is None else [bias])) if isinstance(operand, Node)]
    return (
        values[0].dtype in FLOATS
        and all(value.dtype == values[0].dtype for value in values)
        and values[1].dim() == 2
        and (bias is None or (len(values) == 3 and values[2].dim() == 1))
        and all(isinstance(n, int) and n == 1 for n in node.meta["val"].shape[:-1])
        and isinstance(node.meta["val"].shape[-1], int)
    )


def with_rows_spelled_out(graph: fx.Graph) -> fx.Graph:
    """`graph` with each product of one row as y_n = sum_k W_nk x_k + b_n."""
    result, copies, columns = fx.Graph(), dict[Node, Node](), dict[tuple[Any, bool], Node]()
    for node in graph.nodes:
        if node.op == "call_function" and is_row_product(node):
            copies[node] = _weighted_sum(result, node, copies, columns)
        else:
            copies[node] = result.node_copy(node, copies.__getitem__)
    return result


def _weighted_sum(graph: fx.Graph, node: Node, copies: dict[Node, Node], columns: dict[tuple[Any, bool], Node]) -> Node:
    found = product_of(node)
    assert found is not None
    x, weight, bias, transposed = found
    if (x, transposed) not in columns:
        columns[x, transposed] = _column(graph, copies[x], x.meta["val"].shape[-1], transposed)
    column = columns[x, transposed]
    terms = graph.call_function(aten.mul.Tensor, (_wide(graph, copies[weight]), column))
    y = graph.call_function(aten.sum.dim_IntList, (terms, [0 if transposed else 1]))
    if bias is not None:
        y = graph.call_function(aten.add.Tensor, (y, _wide(graph, copies[bias])))
    y = graph.call_function(aten.to.dtype, (y, node.meta["val"].dtype))
    result = graph.call_function(aten.reshape.default, (y, list(node.meta["val"].shape)))
    result.meta = dict(node.meta)
    return result


def _column(graph: fx.Graph, x: Node, size: int, transposed: bool) -> Node:
    """x in float32 and in memory, which Inductor gives whatever is read by strides; a copy, since x may have strides of its own."""
    flat = graph.call_function(aten.reshape.default, (_wide(graph, x), [size]))
    dense = graph.call_function(aten.clone.default, (flat,), {"memory_format": torch.contiguous_format})
    shape = ([size, 1], [1, 1]) if transposed else ([1, size], [size, 1])
    return graph.call_function(aten.as_strided.default, (dense, *shape))


def _wide(graph: fx.Graph, value: Node) -> Node:
    return graph.call_function(aten.to.dtype, (value, torch.float32))
