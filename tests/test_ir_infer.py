"""Types of calls are inferred once, and made anew for operands of equal types."""

import torch

from graphwright.ir import Symbol, SymbolTable, infer
from graphwright.ir.build import add_call, add_placeholder
from graphwright.ir.infer import Inferred, contiguous_stride, fake_like, same_type, storage_key, tensors_of
from graphwright.ir.symbols import hint

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


def test_several_results_are_several():
    symbols, results = SymbolTable(), []
    for _ in range(2):
        graph, tensors = graph_of(symbols, (2, 3, 16, 8), (2, 3, 16, 8), (2, 3, 4, 8), (2, 3, 4, 8))
        position, rows = places(graph, symbols, "position", 2), places(graph, symbols, "rows", 2)
        results.append(add_call(graph, symbols, GW.kv_append.default, (*tensors, position, rows)).meta["val"])
    first, second = results
    assert len(symbols.inferred) == 1 and isinstance(second, tuple) and same_type(first, second)
    assert len({storage_key(each) for each in (*first, *second)}) == 4


# --- other operators, and other programs --------------------------------------------------------------------------------------------


ATEN = torch.ops.aten


def made(symbols, length, target, *args):
    graph, (x,) = graph_of(symbols, (2, length, 8))
    return x.meta["val"], add_call(graph, symbols, target, (x, *args)).meta["val"]


def test_views_made_anew_are_of_their_own_operands():
    symbols = SymbolTable()
    length = symbols.declare(Symbol("length", 2, 64, 7))
    calls = [(ATEN.transpose.int, 1, 2), (ATEN.slice.Tensor, 2, 3), (ATEN.select.int, 2, 5), (ATEN.unsqueeze.default, 0)]
    for call in calls:
        (_, first), (x, second) = (made(symbols, length, *call) for _ in range(2))
        assert storage_key(second) == storage_key(x) != storage_key(first)
        assert same_type(first, second) and second.storage_offset() == first.storage_offset()
    assert len(symbols.inferred) == len(calls)


def test_views_of_a_view_are_told_apart_by_where_they_begin():
    symbols, results = SymbolTable(), []
    for start in (1, 3):
        graph, (x,) = graph_of(symbols, (2, 8))
        part = add_call(graph, symbols, ATEN.slice.Tensor, (x, 1, start, start + 2))
        results.append(add_call(graph, symbols, ATEN.slice.Tensor, (part, 1, 1, 2)).meta["val"])
    assert [each.storage_offset() for each in results] == [2, 4]


def test_a_result_that_may_be_a_view_of_either_operand_is_inferred_each_time():
    symbols = SymbolTable()
    graph, (x,) = graph_of(symbols, (4, 4))
    turned = add_call(graph, symbols, ATEN.transpose.int, (x, 0, 1))
    known = len(symbols.inferred)
    value = add_call(graph, symbols, ATEN.expand_as.default, (x, turned)).meta["val"]
    assert storage_key(value) == storage_key(x.meta["val"]) and len(symbols.inferred) == known


def test_the_operand_itself_is_given_as_it_is():
    symbols = SymbolTable()
    for _ in range(2):
        x, value = made(symbols, 3, ATEN.contiguous.default)
        assert value is x


def test_types_of_the_ir_and_those_that_torch_infers_are_one():
    """Each call the second time, in a program whose sizes have the same names and ranges, against torch's own mode."""
    calls = [
        (ATEN.mean.dim, [-1], True), (ATEN.softmax.int, -1), (ATEN.view.default, [2, -1]), (ATEN.transpose.int, 1, 2), (ATEN.mul.Scalar, 2.0),
        (ATEN.split.Tensor, 3, -1), (ATEN.topk.default, 2), (ATEN.to.dtype, torch.float64), (ATEN.unbind.int, 0), (ATEN.sum.default,),
    ]  # fmt: skip
    tables = [SymbolTable() for _ in range(2)]
    lengths = [symbols.declare(Symbol("length", 2, 64, 7)) for symbols in tables]
    for call in calls:
        for symbols, length in zip(tables, lengths, strict=True):
            x, value = made(symbols, length, *call)
            with symbols.inference():
                expected = call[0](x, *call[1:])
            assert same_type(value, tuple(expected) if isinstance(expected, list) else expected)
            ours, theirs = tensors_of(value), tensors_of(expected)
            assert [storage_key(a) == storage_key(x) for a in ours] == [storage_key(b) == storage_key(x) for b in theirs]
            assert [hint(n) for each in ours for n in each.shape] == [hint(n) for each in theirs for n in each.shape]


def test_another_program_knows_what_one_was_told_where_its_sizes_are_declared_alike(monkeypatch):
    told = []
    monkeypatch.setattr(Inferred, "of", lambda value, operands, of=Inferred.of: told.append(value) or of(value, operands))
    for name, low, at in (("other", 2, 7), ("other", 2, 7), ("other", 2, 9), ("other", 3, 7), ("far", 2, 7)):
        symbols, symbol = SymbolTable(), Symbol(name, low, 64, at)
        _, value = made(symbols, symbols.declare(symbol), ATEN.cumsum.default, 1)
        assert symbols.text(value.shape[1]) == symbol.name and hint(value.shape[1]) == symbol.hint
    assert len(told) == 4


def test_the_default_float_is_part_of_what_types_follow_from():
    results = []
    for default in (torch.float32, torch.float64):
        torch.set_default_dtype(default)
        try:
            graph, symbols = torch.fx.Graph(), SymbolTable()
            results.append(add_call(graph, symbols, ATEN.true_divide.Scalar, (places(graph, symbols, "n", 3), 2)).meta["val"].dtype)
        finally:
            torch.set_default_dtype(torch.float32)
    assert results == [torch.float32, torch.float64]


def test_nothing_is_kept_of_sizes_that_depend_on_data():
    symbols = SymbolTable()
    graph, (x,) = graph_of(symbols, (5, 3))
    index = add_call(graph, symbols, ATEN.select.int, (places(graph, symbols, "index", 1), 0, 0))
    place = add_call(graph, symbols, ATEN.item.default, (index,))
    known = len(symbols.inferred)
    row = add_call(graph, symbols, ATEN.select.int, (x, 0, place))
    add_call(graph, symbols, ATEN.view.default, (row, [3, 1]))
    add_call(graph, symbols, ATEN.nonzero.default, (x,))
    assert len(symbols.inferred) == known == 1


def test_what_is_known_of_programs_is_bounded(monkeypatch):
    monkeypatch.setattr(infer, "MOST_KNOWN", 4)
    monkeypatch.setattr(infer, "_KNOWN", {})
    for length in range(2, 12):
        made(SymbolTable(), length, ATEN.neg.default)
        assert 1 <= len(infer._KNOWN) <= 4
