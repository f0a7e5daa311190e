"""Attention by the kernel that has a query a lane, against float64; and which calls of a model it runs."""

import copy

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import graphwright as gw
from graphwright.codegen.sdpa import attention as room
from graphwright.codegen.sdpa.attention import AttentionCall, attention
from graphwright.codegen.sdpa.library import library
from graphwright.runtime.backend import has_cpp_compiler
from graphwright.runtime.probe import Probe
from graphwright.tests.native_targets import TARGETS, library_for

pytestmark = pytest.mark.skipif(not has_cpp_compiler(), reason="no C++ compiler: install g++")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
MASKS = ("none", "causal", "bool", "bool of keys", "added", "float32 added")


def normal(*shape, dtype=torch.float32, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def operands(batch, heads, kv_heads, queries, keys, depth, width, dtype):
    shapes = ((heads, queries, depth), (kv_heads, keys, depth), (kv_heads, keys, width))
    return [normal(batch, *shape, dtype=dtype, seed=seed) for seed, shape in enumerate(shapes)]


def mask_of(kind, batch, heads, queries, keys, dtype):
    generator = torch.Generator().manual_seed(9)
    if kind == "bool":
        return torch.rand(queries, keys, generator=generator) > 0.4
    if kind == "bool of keys":
        return torch.rand(batch, 1, 1, keys, generator=generator) > 0.4
    if kind == "added":
        return normal(batch, heads, queries, keys, dtype=dtype, seed=8)
    return normal(1, heads, 1, keys, seed=8) if kind == "float32 added" else None


def assert_close(y, q, k, v, mask, is_causal, scale=None):
    """Against float64: ATen's own error or 40 units of float32 relative to the values, and one rounding of the result."""
    wide = [x.double() for x in (q, k, v)]
    added = mask if mask is None or mask.dtype == torch.bool else mask.double()
    exact = F.scaled_dot_product_attention(*wide, added, is_causal=is_causal, scale=scale, enable_gqa=True)
    logits = q.double().norm(dim=-1).max() * k.double().norm(dim=-1).max() * (scale or q.size(-1) ** -0.5)
    # exp of a score that is off by some units of float32 of its largest size
    bound = torch.finfo(y.dtype).eps / 2 * exact.abs() + (40 + 4 * logits) * torch.finfo(torch.float32).eps / 2 * v.double().abs().max()
    assert y.shape == exact.shape and y.dtype == q.dtype
    assert bool(((y.double() - exact).abs() <= bound).all())


@pytest.fixture(params=TARGETS)
def target(request, monkeypatch):
    """The kernel is the one for that processor."""
    native = library_for(library, request.param)
    monkeypatch.setattr(room, "library", lambda: native)


SIZES = ((1, 1, 1, 1, 1, 1, 1), (2, 4, 2, 7, 9, 5, 3), (1, 2, 2, 100, 101, 8, 8), (1, 3, 1, 65, 200, 33, 17), (2, 2, 2, 130, 97, 64, 64))


@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("kind", MASKS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_kernel_is_attention(target, dtype, kind, sizes):
    batch, heads, kv_heads, queries, keys, depth, width = sizes
    q, k, v = operands(*sizes, dtype)
    mask = mask_of(kind, batch, heads, queries, keys, dtype)
    for scale in (None, 0.7):
        y = attention(q, k, v, mask, kind == "causal", scale, heads != kv_heads)
        assert y.is_contiguous()
        assert_close(y, q, k, v, mask, kind == "causal", scale)


def test_results_lie_with_heads_inside_where_asked(target):
    q, k, v = operands(2, 3, 3, 5, 7, 8, 4, torch.float32)
    inside = attention(q, k, v, None, False, None, False, heads_inside=True)
    assert inside.transpose(1, 2).is_contiguous() and torch.equal(inside, attention(q, k, v, None, False, None, False))
    alone = attention(q[0], k[0], v[0], None, False, None, False, heads_inside=True)
    assert alone.transpose(0, 1).is_contiguous() and torch.equal(alone, inside[0])


@pytest.mark.parametrize("kind", ["bool", "added"])
def test_a_query_that_sees_no_key_gets_what_atens_gives_it(target, kind):
    q, k, v = operands(1, 2, 2, 20, 150, 8, 8, torch.float32)
    mask = torch.ones(20, 150, dtype=torch.bool)
    mask[3] = False
    mask[4, :120] = False  # sees none of the first block
    added = torch.zeros(20, 150).masked_fill(~mask, -torch.inf) if kind == "added" else mask
    y = attention(q, k, v, added, False, None, False)
    assert not y[:, :, 3].any()
    torch.testing.assert_close(y, F.scaled_dot_product_attention(q, k, v, added))


def test_large_scores_do_not_overflow_and_nans_stay(target):
    q, k, v = operands(1, 1, 1, 3, 40, 16, 16, torch.float32)
    torch.testing.assert_close(attention(q * 1e4, k, v, None, False, None, False), F.scaled_dot_product_attention(q * 1e4, k, v))
    q[0, 0, 1, 2] = torch.nan
    y = attention(q, k, v, None, False, None, False)
    assert bool(y[0, 0, 1].isnan().all()) and not y[0, 0, [0, 2]].isnan().any()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_query_has_the_same_bits_whatever_is_beside_it_and_on_any_number_of_threads(target, dtype):
    q, k, v = operands(2, 3, 3, 150, 210, 40, 24, dtype)
    whole = attention(q, k, v, None, False, None, False)
    for first, end in ((0, 1), (60, 70), (100, 150)):
        assert torch.equal(attention(q[:, :, first:end], k, v, None, False, None, False), whole[:, :, first:end])
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            assert torch.equal(attention(q, k, v, None, False, None, False), whole)
    finally:
        torch.set_num_threads(threads)


def test_operands_may_be_parts_of_others_whose_rest_is_never_read():
    """What lies around the operands is NaN, and so is the memory that results are written to."""
    around = [torch.full((2, 70, 3, 100), torch.nan)[:, 3:63, :, 5:45].transpose(1, 2) for _ in range(3)]
    q, k, v = (part.copy_(x) for part, x in zip(around, operands(2, 3, 3, 60, 60, 40, 40, torch.float32), strict=True))
    mask = torch.full((60, 130), torch.nan)[:, ::2][:, :60].copy_(normal(60, 60, seed=5))
    poisoned = [torch.full((2, 3, 60, 40), torch.nan) for _ in range(8)]
    del poisoned  # the allocator gives this memory to the next results
    assert_close(attention(q, k, v, mask, False, None, False), q, k, v, mask, False)
    across = [x.transpose(2, 3).contiguous().transpose(2, 3) for x in (q, k, v)]
    assert_close(attention(*across, mask, False, None, False), q, k, v, mask, False)


@pytest.mark.parametrize(
    "sizes", [(0, 2, 2, 3, 4, 5, 6), (1, 2, 2, 0, 4, 5, 6), (1, 2, 2, 3, 0, 5, 6), (1, 2, 2, 3, 4, 5, 0), (1, 2, 2, 3, 4, 0, 5)], ids=str
)
def test_of_nothing_comes_what_comes_of_atens(sizes):
    q, k, v = operands(*sizes, torch.float32)
    torch.testing.assert_close(attention(q, k, v, None, False, 1.0, False), F.scaled_dot_product_attention(q, k, v, scale=1.0))


def test_other_operands_are_left_to_aten():
    q, k, v = operands(1, 2, 2, 5, 6, 8, 8, torch.float64)
    assert torch.equal(attention(q, k, v, None, False, None, False), F.scaled_dot_product_attention(q, k, v))
    q, k, v = (x.float()[None] for x in (q, k, v))
    assert torch.equal(attention(q, k, v, None, False, None, False), F.scaled_dot_product_attention(q, k, v))
    with pytest.raises(RuntimeError):
        attention(q[0], k[0, :, :, :, :4], v[0], None, False, None, False)
    for mask in (torch.ones(3, 1, 5, 6), torch.ones(5, 7), torch.ones(6)):
        with pytest.raises((RuntimeError, IndexError)):
            attention(q[0], k[0], v[0], mask, False, None, False)


@given(
    st.integers(1, 2),
    st.sampled_from([(1, 1), (3, 1), (4, 2)]),
    st.integers(1, 140),
    st.integers(1, 220),
    st.integers(1, 40),
    st.sampled_from(MASKS),
)
def test_the_kernel_is_attention_for_any_sizes(batch, heads, queries, keys, depth, kind):
    q, k, v = operands(batch, *heads, queries, keys, depth, depth, torch.float32)
    mask = mask_of(kind, batch, heads[0], queries, keys, torch.float32)
    y = attention(q, k, v, mask, kind == "causal", None, heads[0] != heads[1])
    assert_close(y, q, k, v, mask, kind == "causal")


class SelfAttention(nn.Module):
    def __init__(self, **options):
        super().__init__()
        self.into, self.out, self.options = nn.Linear(24, 72), nn.Linear(24, 24), options

    def forward(self, x):
        q, k, v = (part.unflatten(-1, (3, 8)).transpose(1, 2) for part in self.into(x).chunk(3, -1))
        return self.out(F.scaled_dot_product_attention(q, k, v, **self.options).transpose(1, 2).flatten(2))


def calls_of_kernel(model):
    return [node.target for node in model._present.executor._lowered.nodes if isinstance(node.target, AttentionCall)]


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("any_length", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_attention_of_a_model_runs_by_the_kernel_where_it_wins(ways, dtype, any_length, is_causal):
    net, x = SelfAttention(is_causal=is_causal).to(dtype), normal(2, 17, 24, dtype=dtype)
    shapes = {"x": {1: torch.export.Dim("length", min=2, max=100)}} if any_length else None
    model = gw.compile(net, example_inputs=(x,), backend="tuned", cache=False, dynamic_shapes=shapes)
    assert len(calls_of_kernel(model)) == 1 and ["aten", "lanes"] in [names for kind, names in ways if kind == "attention"]
    exact = copy.deepcopy(net).double()(x.double())
    # Two products and attention in a row, and their results rounded.
    assert torch.linalg.vector_norm(model(x).double() - exact) <= 8 * torch.finfo(dtype).eps * torch.linalg.vector_norm(exact)


def test_the_kernel_is_not_taken_where_it_does_not_win_or_rows_are_dropped(monkeypatch):
    monkeypatch.setattr("graphwright.runtime.probe._verdicts", {})
    monkeypatch.setattr(Probe, "fastest", lambda self, kind, question, ways: next(iter(ways)))
    assert not calls_of_kernel(gw.compile(SelfAttention(), example_inputs=(normal(2, 17, 24),), backend="tuned", cache=False))
    monkeypatch.setattr(Probe, "fastest", lambda self, kind, question, ways: list(ways)[-1])
    net = SelfAttention(dropout_p=0.5)
    assert not calls_of_kernel(gw.compile(net, example_inputs=(normal(2, 17, 24),), backend="tuned", cache=False))


def test_attention_in_a_slice_runs_by_the_kernel(ways):
    net, x = SelfAttention(), normal(6, 40, 24)
    model = gw.compile(net, [gw.SliceGroups(memory_budget="30%")], example_inputs=(x,), backend="tuned", cache=False)
    torch.testing.assert_close(model(x), net(x))
    assert any(kind == "attention" for kind, _ in ways)
