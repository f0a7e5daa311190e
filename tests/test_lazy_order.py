"""Runs between anchors: every call once, after what it reads, and no run that nobody needs yet."""

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import fx

from graphwright.runtime.lazy_order import lazy_runs

aten = torch.ops.aten


@st.composite
def programs(draw):
    """A graph of additions, each of two values before it, and which of them are anchors."""
    graph = fx.Graph()
    values = [graph.placeholder("x")]
    for _ in range(draw(st.integers(0, 12))):
        operands = [values[draw(st.integers(0, len(values) - 1))] for _ in range(2)]
        values.append(graph.call_function(aten.add.Tensor, tuple(operands)))
    calls = values[1:]
    return calls, {node for node in calls if draw(st.booleans())}


def runs_of(calls, anchors):
    return list(lazy_runs(calls, lambda node: node.all_input_nodes if node in anchors else None))


@given(programs())
def test_every_call_comes_once_and_after_what_it_reads(program):
    calls, anchors = program
    order = [node for run in runs_of(calls, anchors) for node in (run if isinstance(run, list) else [run])]
    assert sorted(order, key=calls.index) == calls
    for n, node in enumerate(order):
        assert all(operand in order[:n] for operand in node.all_input_nodes if operand in calls)


@given(programs())
def test_anchors_keep_their_order_and_runs_hold_none(program):
    calls, anchors = program
    runs = runs_of(calls, anchors)
    assert [run for run in runs if not isinstance(run, list)] == [node for node in calls if node in anchors]
    assert not anchors & {node for run in runs if isinstance(run, list) for node in run}


@given(programs())
def test_before_the_last_anchor_only_comes_what_some_anchor_reads(program):
    calls, anchors = program
    runs = runs_of(calls, anchors)
    needed = set(anchors)
    for node in reversed(calls):
        if any(user in needed for user in node.users):
            needed.add(node)
    before = runs[: max((n + 1 for n, run in enumerate(runs) if not isinstance(run, list)), default=0)]
    assert all(node in needed for run in before if isinstance(run, list) for node in run)


def test_calls_that_draw_keep_their_order():
    graph = fx.Graph()
    x = graph.placeholder("x")
    drawn = graph.call_function(aten.dropout.default, (x, 0.5, True))
    anchor = graph.call_function(aten.add.Tensor, (x, x))
    assert runs_of([drawn, anchor], {anchor}) == [[drawn], anchor]
