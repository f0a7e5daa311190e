"""Types of dialect operators are inferred by their bodies once, and made anew for operands of equal types."""

import torch

from graphwright.ir import Symbol, SymbolTable
from graphwright.ir.build import add_call, add_placeholder
from graphwright.ir.infer import contiguous_stride, fake_like, same_type, storage_key

GW = torch.ops.gw


def graph_of(symbols, *shapes):
    """Placeholders of floats."""
    graph = torch.fx.Graph()
    values = [fake_like(symbols, torch.float32, shape, contiguous_stride(shape), torch.device("cpu")) for shape in shapes]
    return graph, [add_placeholder(graph, f"x{place}", value) for place, value in enumerate(values)]


def places(graph, symbols, name, count):
    """A placeholder of integers."""
    return add_placeholder(graph, name, fake_like(symbols, torch.int64, (count,), (1,), torch.device("cpu")))


def attention(symbols, length, scale=0.5):
    graph, (q, k, v) = graph_of(symbols, (2, 4, length, 8), (2, 2, length, 8), (2, 2, length, 8))
    rows = places(graph, symbols, "rows", length)
    return add_call(graph, symbols, GW.causal_attention.default, (q, k, v, rows, scale, True)).meta["val"]


def test_equal_operands_give_equal_types_of_other_memory():
    symbols = SymbolTable()
    length = symbols.declare(Symbol("length", 2, 64, 7))
    first, second = (attention(symbols, length) for _ in range(2))
    assert len(symbols.inferred) == 1
    assert same_type(first, second) and storage_key(first) != storage_key(second)
    assert second.shape[2].node.expr == length.node.expr, "a symbol stays one"


def test_operands_and_attributes_that_differ_are_inferred_by_themselves():
    symbols = SymbolTable()
    lengths = [symbols.declare(Symbol(name, 2, 64, 7)) for name in ("a", "b")]
    results = [attention(symbols, lengths[0]), attention(symbols, lengths[1]), attention(symbols, 7), attention(symbols, 7, scale=-0.0)]
    results.append(attention(symbols, 7, scale=0.0))
    assert len(symbols.inferred) == 5
    assert not same_type(results[0], results[1]) and same_type(results[2], results[3])


def test_a_result_that_is_an_operand_is_not_made_anew():
    symbols = SymbolTable()
    graph, (x,) = graph_of(symbols, (2, 3))
    for _ in range(2):
        value = add_call(graph, symbols, torch.ops.aten.view.default, (x, [3, 2])).meta["val"]
        assert storage_key(value) == storage_key(x.meta["val"])
    assert not symbols.inferred, "other operators are never"


def test_several_results_are_several():
    symbols, results = SymbolTable(), []
    for _ in range(2):
        graph, tensors = graph_of(symbols, (2, 3, 16, 8), (2, 3, 16, 8), (2, 3, 4, 8), (2, 3, 4, 8))
        position, rows = places(graph, symbols, "position", 2), places(graph, symbols, "rows", 2)
        results.append(add_call(graph, symbols, GW.kv_append.default, (*tensors, position, rows)).meta["val"])
    first, second = results
    assert len(symbols.inferred) == 1 and isinstance(second, tuple) and same_type(first, second)
    assert len({storage_key(each) for each in (*first, *second)}) == 4
