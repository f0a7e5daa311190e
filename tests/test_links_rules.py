"""The rules of the legality table that have names: view rule, attention, refusals, symbolic sizes (feature_slicing.md, properties 3, 10)."""

import operator
from math import ceil, floor, prod

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import fx
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext

from graphwright.ir.links import ROWS, OperandSlot, Refusal, Tag, backward, declare, forward, halo, kind, localize, tag_through_view
from graphwright.ir.links.probe import call_node

aten = torch.ops.aten


def t(*shape):
    return torch.randn(shape, dtype=torch.float64)


def reason(found):
    assert isinstance(found, Refusal), found
    return found.reason


# ---------------------------------------------------------------- view rule


@st.composite
def reshapes(draw):
    """(source, target) of equal element count, made by cutting one list of factors twice; ones strewn in."""
    factors = draw(st.lists(st.sampled_from([1, 2, 2, 3, 4]), min_size=1, max_size=5))

    def cut():
        shape, group = [], 1
        for factor in factors:
            group *= factor
            if draw(st.booleans()):
                shape.append(group)
                group = 1
        return [*shape, group]

    return cut(), cut()


def fitting_tags(source, target, tag, units):
    """All tags on `target` under which every unit holds the same elements, in the same order, by looking."""
    x = torch.arange(prod(source))
    found = []
    for dim, size in enumerate(target):
        if size % units:
            continue
        unit = size // units
        pairs = ((x.view(source).narrow(tag.dim, u * tag.unit, tag.unit), x.view(target).narrow(dim, u * unit, unit)) for u in range(units))
        if all(torch.equal(a.flatten(), b.flatten()) for a, b in pairs):
            found.append(Tag(dim, unit))
    return found


@settings(max_examples=300, deadline=None)
@given(reshapes(), st.data())
def test_view_rule_is_brute_force(shapes, data):
    source, target = shapes
    dim = data.draw(st.integers(0, len(source) - 1))
    units = data.draw(st.sampled_from([n for n in range(1, source[dim] + 1) if source[dim] % n == 0]))
    if units == 1:  # one unit is the whole tensor and fits any dim
        return
    tag = Tag(dim, source[dim] // units)
    found, fitting = tag_through_view(source, target, tag, units), fitting_tags(source, target, tag, units)
    if not isinstance(found, Refusal):
        assert found in fitting
        assert tag_through_view(target, source, found, units) == tag
        return
    assert not fitting
    assert (found.reason == "unit") == (found.retry_units is not None)
    if found.retry_units:
        coarser = Tag(dim, source[dim] // found.retry_units)
        assert tag_through_view(source, target, coarser, found.retry_units) in fitting_tags(source, target, coarser, found.retry_units)


def video_axes(b, f, c, h, w):
    """Nodes [B*F,C,H,W] -> [B,F,C,H,W] -> [B,C,F,H,W] -> [B,H,W,F,C] -> [B*H*W,F,C]."""
    x = t(b * f, c, h, w)
    calls = [
        (aten.view.default, [b, f, c, h, w]), (aten.permute.default, [0, 2, 1, 3, 4]),
        (aten.permute.default, [0, 3, 4, 2, 1]), (aten.reshape.default, [b * h * w, f, c]),
    ]  # fmt: skip
    nodes = []
    for op, argument in calls:
        nodes.append(call_node(op, x, argument)[0])
        x = op(x, argument)
    return nodes


def through(nodes, tag, units):
    """The tag after each node, up to the first refusal; and backwards again to where it came from."""
    tags = []
    for node in nodes:
        ahead = forward(node, node.args[0], tag, units)
        if isinstance(ahead, Refusal):
            return [*tags, ahead]
        assert list(backward(node, ahead, units).values()) == [tag]
        tag = ahead
        tags.append(tag)
    return tags


def test_frame_axis_of_one_video():
    assert through(video_axes(1, 6, 3, 4, 5)[:2], Tag(0), 6) == [Tag(1), Tag(2)]


def test_frame_axis_of_a_batch_of_videos_passes_at_batch_granularity():
    view, permute, *_ = video_axes(2, 6, 3, 4, 5)
    refused = forward(view, view.args[0], Tag(0), 12)
    assert (refused.reason, refused.retry_units) == ("unit", 2)
    assert through([view, permute], Tag(0, 6), 2) == [Tag(0), Tag(0)]


def test_pixel_rows_reach_the_temporal_batch_of_one_video_only():
    assert through(video_axes(1, 6, 3, 4, 5), Tag(2), 4) == [Tag(3), Tag(3), Tag(1), Tag(0, 5)]
    *_, refused = through(video_axes(2, 6, 3, 4, 5), Tag(2), 4)
    assert refused.reason == "inner"


def test_pixel_batch_has_no_tag_on_frames():
    *_, merge = video_axes(2, 6, 3, 4, 5)
    assert reason(backward(merge, Tag(0), 40)) == "unit"  # only the batch of videos is outermost
    assert list(backward(merge, Tag(0, 20), 2).values()) == [Tag(0)]


def test_local_view_works_for_any_slice_length():
    x = t(4, 12, 5)
    node, _ = call_node(aten.view.default, x, [4, 3, -1, 5])
    local = localize(node, Tag(1), 3)
    assert local.args[1] == [4, -1, 4, 5]
    strided = x.transpose(0, 1).contiguous().transpose(0, 1)[:, :8]  # strides of another kernel: `view` would refuse them
    assert local.target(strided, local.args[1]).shape == (4, 2, 4, 5)


def test_squeeze_of_a_slice_of_one_keeps_its_dim():
    node, _ = call_node(aten.squeeze.default, t(3, 1, 4))
    local = localize(node, Tag(0), 3)
    assert local.target(t(1, 1, 4), *local.args[1:]).shape == (1, 4)
    node, _ = call_node(aten.squeeze.dim, t(3, 4), 0)
    local = localize(node, Tag(0), 3)
    assert local.target(t(1, 4), *local.args[1:]).shape == (1, 4)


# ---------------------------------------------------------------- attention


def causal_attention(q, k, v, rows, *, scale=None, enable_gqa=False):
    """gw.causal_attention: key j is visible to row r iff j <= rows[r]."""
    mask = torch.arange(k.size(-2))[None, :] <= rows[:, None]
    return aten.scaled_dot_product_attention(q, k, v, mask, scale=scale, enable_gqa=enable_gqa)


STAND_INS = torch.library.Library("links_rules_test", "DEF")


def dialect_node(schema, reference, *args, **kwargs):
    """A node of the dialect's op under a namespace of our own, so that it stands beside the real op; the row is the real op's."""
    name = schema.partition("(")[0]
    STAND_INS.define(schema)
    STAND_INS.impl(name, reference, "CompositeImplicitAutograd")
    declare(f"links_rules_test::{name}", ROWS[f"gw::{name}"])
    return call_node(getattr(torch.ops.links_rules_test, name).default, *args, **kwargs)


@pytest.mark.parametrize("length", [3, 5, 7])
def test_causal_attention_over_queries_is_the_flag_on_the_whole(length):
    q, k, v = t(2, 6, length, 4), t(2, 3, 5, 4), t(2, 3, 5, 4)
    whole = aten.scaled_dot_product_attention(q, k, v, None, 0.0, True, enable_gqa=True)
    rows = torch.arange(length)
    for start in range(length):
        part = causal_attention(q[:, :, start:], k, v, rows[start:], enable_gqa=True)
        # float64, another summation order
        torch.testing.assert_close(part, whole[:, :, start:], rtol=0, atol=1e-12)


def test_causal_flag_refuses_queries_by_position():
    q = t(1, 2, 4, 3)
    node, _ = call_node(aten.scaled_dot_product_attention.default, q, t(1, 2, 4, 3), t(1, 2, 4, 3), None, 0.0, True)
    refused = backward(node, Tag(2), 4)
    assert refused.reason == "position" and refused.detail.startswith("is_causal")
    assert reason(forward(node, node.args[0], Tag(2), 4)) == "position"
    assert [tag for tag in backward(node, Tag(1), 2).values()] == [Tag(1)] * 3


def test_attention_links():
    q, k, v = t(2, 6, 4, 3), t(2, 2, 5, 3), t(2, 2, 5, 3)
    for mask, over_heads, over_queries in (
        (t(2, 1, 4, 5), None, Tag(2)), (t(1, 6, 1, 5), Tag(1, 3), None), (t(4, 5), None, Tag(0)), (None, None, None),
    ):  # fmt: skip
        node, _ = call_node(aten.scaled_dot_product_attention.default, q, k, v, mask, enable_gqa=True)
        heads, queries = backward(node, Tag(1, 3), 2), backward(node, Tag(2), 4)
        present = [] if mask is None else [None]
        assert list(heads.values()) == [Tag(1, 3), Tag(1), Tag(1)] + [over_heads for _ in present]
        assert list(queries.values()) == [Tag(2), None, None] + [over_queries for _ in present]
        assert kind(node, Tag(2)) == "query" and kind(node, Tag(1)) == "rows"
        refused = backward(node, Tag(1), 6)
        assert (refused.reason, refused.retry_units) == ("unit", 2)
        assert reason(forward(node, node.args[1], Tag(2), 5)) == "barrier"
        assert reason(forward(node, node.args[0], Tag(3), 3)) == "reduced"


def test_causal_attention_op_takes_rows():
    q, k, v = t(2, 6, 4, 3), t(2, 2, 5, 3), t(2, 2, 5, 3)
    schema = "causal_attention(Tensor q, Tensor k, Tensor v, Tensor rows, *, float? scale=None, bool enable_gqa=False) -> Tensor"
    node, _ = dialect_node(schema, causal_attention, q, k, v, torch.arange(4), enable_gqa=True)
    assert list(backward(node, Tag(2), 4).values()) == [Tag(2), None, None, Tag(0)]
    assert list(backward(node, Tag(1, 3), 2).values()) == [Tag(1, 3), Tag(1), Tag(1), None]
    assert kind(node, Tag(2)) == "query"


# ---------------------------------------------------------------- split group norm


def test_norm_stats_makes_a_partial_a_slice():
    def reference(x, *, groups):
        return torch.zeros(1, x.size(0), groups, 3)

    node, _ = dialect_node("norm_stats(Tensor x, *, int groups) -> Tensor", reference, t(2, 4, 6, 6), groups=2)
    assert forward(node, node.args[0], Tag(2), 6) == Tag(0, 0)
    assert forward(node, node.args[0], Tag(0), 2) == Tag(1)
    assert reason(forward(node, node.args[0], Tag(1), 4)) == "reduced"
    assert list(backward(node, Tag(1), 2).values()) == [Tag(0)]
    assert reason(backward(node, Tag(0, 0), 6)) == "mixed"


# ---------------------------------------------------------------- refusals

x = t(4, 6)
REFUSALS = [
    ("mixed", aten.softmax.int, (x, 1), Tag(1), None),
    ("mixed", aten.cat.default, ([x, x], 0), Tag(0), None),
    ("reduced", aten.layer_norm.default, (x, [6]), Tag(1), None),
    ("reduced", aten.group_norm.default, (t(2, 4, 6), 2), Tag(2), None),
    ("inner", aten.view.default, (x, [24]), None, Tag(1)),
    ("unit", aten.view.default, (x, [2, 12]), None, Tag(0)),
    ("halo", aten.conv2d.default, (t(1, 2, 6, 6), t(2, 2, 3, 3), None, [1, 1], [1, 1]), Tag(2), None),
    ("position", aten.slice.Tensor, (x, 0, 1, 3), Tag(0), None),
    ("barrier", aten.scaled_dot_product_attention.default, (t(1, 4, 6), t(1, 5, 6), t(1, 5, 6)), None, (1, Tag(1))),
    ("barrier", aten.unfold.default, (x, 0, 2, 1), Tag(0), None),
    ("mutates", aten.add_.Tensor, (x, x), Tag(0), None),
    ("rng", aten.bernoulli.default, (x,), Tag(0), None),
    ("rng", aten.dropout.default, (x, 0.5, True), Tag(0), None),
    ("rng", aten.scaled_dot_product_attention.default, (t(1, 4, 6), t(1, 5, 6), t(1, 5, 6), None, 0.1), Tag(1), None),
    ("mixed", aten.batch_norm.default, (x, None, None, None, None, True, 0.1, 1e-5, False), Tag(0), None),
    ("no-row", aten.block_diag.default, ([x],), Tag(0), None),
    ("no-row", aten.view.dtype, (x, torch.int64), Tag(0), None),
    ("reduced", aten.linear.default, (x, t(3, 6)), None, Tag(1)),
    ("reduced", aten.matmul.default, (x, t(6, 3)), None, (1, Tag(0))),
    ("barrier", aten.gather.default, (x, 0, torch.zeros(2, 6, dtype=torch.int64)), None, Tag(0)),
    ("position", aten.select.int, (x, 0, 1), None, Tag(0)),
]  # fmt: skip


@pytest.mark.parametrize("why, op, args, out_tag, in_tag", REFUSALS)
def test_refusal_names_its_reason(why, op, args, out_tag, in_tag):
    node, values = call_node(op, *args)
    if out_tag is not None:
        assert reason(backward(node, out_tag, node.meta["val"].size(out_tag.dim))) == why
        return
    which, tag = in_tag if isinstance(in_tag, tuple) else (0, in_tag)
    operand = list(values)[which]
    refused = forward(node, operand, tag, values[operand].size(tag.dim))
    assert reason(refused) == why and refused.operand is operand


def test_a_mask_as_index_is_data_dependent():
    graph, mode = fx.Graph(), FakeTensorMode(shape_env=ShapeEnv())
    a, mask = graph.placeholder("a"), graph.placeholder("mask")
    a.meta["val"], mask.meta["val"] = mode.from_tensor(x), mode.from_tensor(x[:, 0] > 0)
    for op, args in ((aten.index.Tensor, (a, [mask])), (aten.nonzero.default, (mask,)), (aten.where.default, (mask,))):
        node = graph.call_function(op, args)
        node.meta["val"] = mode.from_tensor(x)
        assert reason(backward(node, Tag(0), 4)) == "data-dependent"


def test_halo_prints_the_rows_it_needs():
    node, _ = call_node(aten.conv2d.default, t(1, 2, 8, 8), t(2, 2, 3, 3), None, [2, 1], [1, 1], [1, 2])
    assert halo(node, 2) == "[a*2 - 1, (b-1)*2 + 2)"
    assert halo(node, 3) == "[a - 1, (b-1) + 4)"
    assert halo(node, 2) in backward(node, Tag(2), 4).detail
    node, _ = call_node(aten.constant_pad_nd.default, t(3, 4), [2, 1])
    assert halo(node, 1) == "[a - 2, b - 2)"


@pytest.mark.parametrize("k, s, p, dilation", [(3, 1, 1, 1), (3, 2, 1, 1), (3, 1, 2, 2), (4, 2, 1, 1), (2, 3, 0, 1)])
def test_halo_rows_suffice(k, s, p, dilation):
    signal, w = t(1, 2, 12), t(3, 2, k)
    node, _ = call_node(aten.conv1d.default, signal, w, None, [s], [p], [dilation])
    whole = aten.conv1d(signal, w, None, [s], [p], [dilation])
    for a in range(whole.size(2)):
        for b in range(a + 1, whole.size(2) + 1):
            low, high = (eval(edge, {"a": a, "b": b}) for edge in halo(node, 2).strip("[)").split(", "))
            rows = torch.nn.functional.pad(signal[..., max(low, 0) : min(high, 12)], (max(-low, 0), max(high - 12, 0)))
            torch.testing.assert_close(aten.conv1d(rows, w, None, [s], [0], [dilation]), whole[..., a:b], rtol=0, atol=1e-12)


@pytest.mark.parametrize("k, s, p", [(3, 2, 1), (4, 2, 1), (3, 1, 0), (2, 3, 0)])
def test_transposed_halo_is_every_row_that_reaches(k, s, p):
    signal, w = t(1, 1, 6), torch.ones(1, 1, k, dtype=torch.float64)
    node, _ = call_node(aten.conv_transpose1d.default, signal, w, None, [s], [p])
    whole = aten.conv_transpose1d(signal, w, None, [s], [p])
    for a in range(whole.size(2) - 1):
        low, high = (eval(e, {"a": a, "b": a + 2, "ceil": ceil, "floor": floor}) for e in halo(node, 2)[1:-1].split(", "))
        for i in range(6):
            changed = signal.clone()
            changed[..., i] += 1
            reaches = not torch.equal(aten.conv_transpose1d(changed, w, None, [s], [p])[..., a : a + 2], whole[..., a : a + 2])
            assert low <= i < high or not reaches


def test_kind_is_features_where_a_weight_is_sliced():
    linear, _ = call_node(aten.linear.default, t(2, 3), t(4, 3), t(4))
    conv, _ = call_node(aten.conv2d.default, t(1, 2, 6, 6), t(4, 2, 1, 1))
    table, _ = call_node(aten.embedding.default, t(9, 4), torch.zeros(3, dtype=torch.int64))
    assert [kind(n, Tag(1)) for n in (linear, conv, table)] == ["features"] * 3
    assert [kind(n, Tag(0)) for n in (linear, conv, table)] == ["rows"] * 3
    assert list(backward(linear, Tag(1), 4).values()) == [None, Tag(0), Tag(0)]


# ---------------------------------------------------------------- occurrences and multi-output ops


def test_an_operand_twice_must_agree():
    square = t(3, 4, 4)
    both, _ = call_node(aten.mul.Tensor, square, square)
    assert forward(both, both.args[0], Tag(1), 4) == Tag(1)
    product, _ = call_node(aten.matmul.default, square, square)
    assert forward(product, product.args[0], Tag(0), 3) == Tag(0)
    assert reason(forward(product, product.args[0], Tag(1), 4)) == "barrier"
    assert forward(product, OperandSlot(0, None, product.args[0]), Tag(1), 4) == Tag(1)
    assert reason(forward(product, OperandSlot(1, None, product.args[0]), Tag(1), 4)) == "reduced"


def test_every_output_of_a_split_carries_and_getitem_passes():
    node, _ = call_node(aten.split_with_sizes.default, t(4, 6), [1, 5], 1)
    assert forward(node, node.args[0], Tag(0, 2), 2) == (Tag(0, 2), Tag(0, 2))
    assert reason(forward(node, node.args[0], Tag(1), 6)) == "mixed"
    item = node.graph.call_function(operator.getitem, (node, 1))
    item.meta["val"] = node.meta["val"][1]
    assert backward(item, Tag(0), 4) == {OperandSlot(0, None, node): Tag(0)}
    assert forward(item, node, Tag(0), 4) == Tag(0)


def test_a_tag_that_does_not_fit_is_a_mistake_of_the_caller():
    node, _ = call_node(aten.relu.default, t(4, 6))
    with pytest.raises(AssertionError, match="4 indices"):
        backward(node, Tag(0), 3)


def test_keywords_are_slots():
    node, _ = call_node(aten.linear.default, t(2, 3), t(4, 3), bias=t(4))
    slots = backward(node, Tag(1), 4)
    assert [(s.position, s.index, tag) for s, tag in slots.items()] == [(0, None, None), (1, None, Tag(0)), ("bias", None, Tag(0))]


# ---------------------------------------------------------------- symbolic sizes


@pytest.fixture
def symbolic():
    """make(*sizes): a placeholder; a string is a symbol of that name, an int is static."""
    env = ShapeEnv()
    mode, graph = FakeTensorMode(shape_env=env), fx.Graph()
    symbols = {}

    def make(*sizes):
        node = graph.placeholder("x")
        names = [s for s in sizes if isinstance(s, str) and s not in symbols]
        for i, name in enumerate(names):
            context = StatelessSymbolicContext(dynamic_sizes=[DimDynamic.DYNAMIC])
            hint = 5 + 2 * (len(symbols) + i)
            symbols[name] = mode.from_tensor(torch.empty(hint), symbolic_context=context, source=_source(name)).shape[0]
        with mode:
            node.meta["val"] = torch.empty([symbols.get(s, s) for s in sizes], dtype=torch.float64)
        return node

    def call(op, *args, **kwargs):
        node = graph.call_function(op, args, kwargs)
        values = fx.node.map_arg((args, kwargs), lambda n: n.meta["val"])
        with mode:
            node.meta["val"] = op(*values[0], **values[1])
        return node

    make.call, make.symbols, make.env = call, symbols, env
    return make


def _source(name):
    from torch._dynamo.source import ConstantSource

    return ConstantSource(name)


def test_symbolic_axis_through_a_view(symbolic):
    a = symbolic(4, "s", 8)
    s = symbolic.symbols["s"]
    guards = len(symbolic.env.guards)
    merged = symbolic.call(aten.view.default, a, [-1, 8])
    split = symbolic.call(aten.view.default, merged, [4, -1, 8])
    assert forward(merged, a, Tag(0), 4) == Tag(0, s)
    assert backward(split, Tag(0), 4) == {OperandSlot(0, None, merged): Tag(0, s)}
    refused = forward(split, merged, Tag(0), 4 * s)
    assert (refused.reason, refused.retry_units) == ("unit", 4)
    assert reason(forward(merged, a, Tag(1), s)) == "inner"
    local = localize(split, Tag(0), 4)
    assert local.args[1][0] == -1 and local.args[1][1].node.expr == s.node.expr
    assert len(symbolic.env.guards) == guards


def test_symbolic_sizes_pass_where_proved_and_refuse_where_not(symbolic):
    a, b = symbolic(2, "s", 8), symbolic(2, "s", 8)
    s = symbolic.symbols["s"]
    added = symbolic.call(aten.add.Tensor, a, b)
    guards = len(symbolic.env.guards)
    assert list(backward(added, Tag(1), s).values()) == [Tag(1), Tag(1)]
    other = symbolic(2, "r", 8)
    r = symbolic.call(aten.sym_size.int, other, 1)
    odd = added.graph.call_function(aten.add.Tensor, (a, other))
    odd.meta["val"] = a.meta["val"]
    refused = backward(odd, Tag(1), s)
    assert (refused.reason, refused.operand) == ("sym-unproved", other)
    view = added.graph.call_function(aten.view.default, (a, [2, r, -1]))
    view.meta["val"] = other.meta["val"]
    assert reason(forward(view, a, Tag(1), s)) == "sym-unproved"
    assert len(symbolic.env.guards) == guards


def test_a_symbolic_axis_is_retried_in_the_blocks_that_a_view_makes(symbolic):
    a = symbolic("s", 4, 8)
    s = symbolic.symbols["s"]
    merged = symbolic.call(aten.view.default, a, [-1, 8])
    refused = backward(merged, Tag(0), 4 * s)
    assert refused.reason == "unit" and refused.retry_units.node.expr == s.node.expr
    assert backward(merged, Tag(0, 4), s) == {OperandSlot(0, None, a): Tag(0)}


def test_a_slice_up_to_the_size_of_its_operand_is_an_alias(symbolic):
    a, other = symbolic("s", 8), symbolic("r", 8)
    s = symbolic.symbols["s"]
    own, foreign = symbolic.call(aten.sym_size.int, a, 0), symbolic.call(aten.sym_size.int, other, 0)
    assert forward(symbolic.call(aten.slice.Tensor, a, 0, 0, own), a, Tag(0), s) == Tag(0)
    cut = own.graph.call_function(aten.slice.Tensor, (a, 0, 0, foreign))
    cut.meta["val"] = other.meta["val"]
    assert reason(forward(cut, a, Tag(0), s)) == "position"


def test_symbolic_attention_over_queries(symbolic):
    q, k, v, mask = symbolic(2, 4, "l", 8), symbolic(2, 4, "s", 8), symbolic(2, 4, "s", 8), symbolic(2, 1, "l", "s")
    node = symbolic.call(aten.scaled_dot_product_attention.default, q, k, v, mask)
    guards = len(symbolic.env.guards)
    length = symbolic.symbols["l"]
    assert list(backward(node, Tag(2), length).values()) == [Tag(2), None, None, Tag(2)]
    assert list(backward(node, Tag(0), 2).values()) == [Tag(0)] * 4
    assert reason(forward(node, k, Tag(2), symbolic.symbols["s"])) == "barrier"
    assert len(symbolic.env.guards) == guards
