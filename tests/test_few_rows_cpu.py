"""Products of a few rows by the kernel in C++, against the product in float64; and which products of a model it runs."""

import copy

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import graphwright as gw
from graphwright.codegen.few_rows import linear as few_rows
from graphwright.codegen.few_rows.library import library
from graphwright.codegen.few_rows.linear import FewRowsLinear, few_rows_linear
from graphwright.runtime.backend import has_cpp_compiler
from graphwright.runtime.probe import Probe
from graphwright.tests.native_targets import TARGETS, library_for

needs_compiler = pytest.mark.skipif(not has_cpp_compiler(), reason="no C++ compiler: install g++")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
DEPTHS = [1, 16, 63, 123, 1000]


def normal(*shape, dtype, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def assert_close(y, x, weight, bias):
    """One rounding of the result, and of sums of K float32 terms K / 16 + 5 in the lanes and across them, each of the sum of sizes at most."""
    exact = F.linear(x.double(), weight.double(), None if bias is None else bias.double())
    sizes = x.double().abs() @ weight.double().abs().T + (0 if bias is None else bias.double().abs())
    unit = torch.finfo(torch.float32).eps / 2
    bound = torch.finfo(y.dtype).eps / 2 * exact.abs() + (x.size(-1) / 8 + 7) * unit * sizes + torch.finfo(y.dtype).smallest_normal
    assert y.shape == exact.shape and y.dtype == x.dtype
    assert bool(((y.double() - exact).abs() <= bound).all())


@pytest.fixture(params=TARGETS)
def target(request, monkeypatch):
    """The kernel is the one for that processor."""
    native = library_for(library, request.param)
    monkeypatch.setattr(few_rows, "library", lambda: native)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("depth", DEPTHS)
def test_the_kernel_is_the_product_for_any_rows_and_widths(target, dtype, depth):
    for rows in (1, 2, 3, 4, 5, 8, 9):
        for width, bias in ((1, False), (63, True), (123, False)):
            x, weight = normal(rows, depth, dtype=dtype), normal(width, depth, dtype=dtype, seed=1)
            b = normal(width, dtype=dtype, seed=2) if bias else None
            assert_close(few_rows_linear(x, weight, b), x, weight, b)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_row_has_the_same_bits_whatever_is_beside_it_and_on_any_number_of_threads(target, dtype):
    x, weight = normal(9, 333, dtype=dtype), normal(301, 333, dtype=dtype, seed=1)
    whole = few_rows_linear(x, weight)
    for first in range(9):
        for end in range(first + 1, 10):
            assert torch.equal(few_rows_linear(x[first:end], weight), whole[first:end])
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            assert torch.equal(few_rows_linear(x, weight), whole)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_and_weights_may_be_parts_of_others_whose_rest_is_never_read(dtype):
    """What lies around the operands is NaN, and so is the memory that results are written to."""
    wide = torch.full((8, 200), torch.nan, dtype=dtype)
    around = torch.full((90, 300), torch.nan, dtype=dtype)
    x, weight = wide[1:6, 10:133], around[2:65, 5:128]
    x.copy_(normal(5, 123, dtype=dtype)), weight.copy_(normal(63, 123, dtype=dtype, seed=1))
    poisoned = [torch.full((5, 63), torch.nan, dtype=dtype) for _ in range(8)]
    del poisoned  # the allocator gives this memory to the next results
    assert_close(few_rows_linear(x, weight), x, weight, None)
    columns = torch.full((123, 5), torch.nan, dtype=dtype).copy_(x.t()).t()
    assert_close(few_rows_linear(columns, weight), columns, weight, None)
    assert_close(few_rows_linear(x.unflatten(0, (5, 1)), weight), x.unflatten(0, (5, 1)), weight, None)


@pytest.mark.parametrize("value", [torch.inf, -torch.inf, torch.nan], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_infinities_and_nans_reach_the_results_that_they_belong_to(target, dtype, value):
    x, weight = torch.ones(3, 70, dtype=dtype), torch.ones(20, 70, dtype=dtype)
    weight[7, 69] = value
    y = few_rows_linear(x, weight)
    assert torch.equal(y[:, 7], torch.full((3,), value, dtype=dtype)) or bool(y[:, 7].isnan().all() and value != value)
    y[:, 7] = 70
    assert bool((y == 70).all())


@pytest.mark.parametrize("x_shape", [(0, 8), (3, 0), (2, 0, 8)], ids=str)
def test_of_nothing_comes_what_comes_of_atens(x_shape):
    x, weight, bias = torch.randn(x_shape), torch.randn(5, x_shape[-1]), torch.randn(5)
    assert torch.equal(few_rows_linear(x, weight, bias), F.linear(x, weight, bias))
    assert few_rows_linear(torch.randn(2, 8), torch.randn(0, 8)).shape == (2, 0)


def test_other_operands_are_left_to_aten():
    x, weight = torch.randn(3, 8), torch.randn(5, 8)
    for operands in ((x.double(), weight.double()), (x, torch.randn(8, 5).t()), (x, weight, torch.randn(10)[::2])):
        assert torch.equal(few_rows_linear(*operands), F.linear(*operands))
    with pytest.raises(RuntimeError):
        few_rows_linear(x, torch.randn(5, 9))


@given(st.integers(1, 9), st.integers(1, 70), st.integers(1, 300), st.sampled_from(DTYPES), st.booleans())
def test_the_kernel_is_the_product_for_any_sizes(rows, width, depth, dtype, bias):
    x, weight = normal(rows, depth, dtype=dtype), normal(width, depth, dtype=dtype, seed=1)
    b = normal(width, dtype=dtype, seed=2) if bias else None
    assert_close(few_rows_linear(x, weight, b), x, weight, b)


def calls_of_kernel(model):
    return [node for node in model._present.executor._lowered.nodes if isinstance(node.target, FewRowsLinear)]


def compiled(net, x, **options):
    return gw.compile(net, example_inputs=(x,), backend="tuned", cache=False, **options)


class Gated(nn.Module):
    """Products whose results others follow, one of them with a bias."""

    def __init__(self):
        super().__init__()
        self.gate, self.up, self.down = nn.Linear(24, 40, bias=False), nn.Linear(24, 40), nn.Linear(40, 24, bias=False)

    def forward(self, x):
        return x + self.down(F.silu(self.gate(x)) * self.up(x))


@needs_compiler
@pytest.mark.parametrize("dtype, shape", [(torch.float32, (2, 24)), (torch.bfloat16, (8, 1, 24))], ids=str)
def test_products_of_two_to_eight_rows_run_by_the_kernel_where_it_wins(ways, dtype, shape):
    net, x = Gated().to(dtype), normal(*shape, dtype=dtype)
    model = compiled(net, x)
    assert len(calls_of_kernel(model)) == 3
    offered = [names for kind, names in ways if kind == "few rows"]
    assert all(names == (["aten", "onednn", "few rows"] if dtype == torch.float32 else ["aten", "few rows"]) for names in offered)
    for _ in range(2):
        exact = copy.deepcopy(net).double()(x.double())
        # Three products in a row, and their results rounded.
        assert torch.linalg.vector_norm(model(x).double() - exact) <= 8 * torch.finfo(dtype).eps * torch.linalg.vector_norm(exact)
        with torch.no_grad():
            net.up.weight.mul_(2)  # nothing is copied, so nothing can be stale


@needs_compiler
def test_the_kernel_is_not_taken_where_it_does_not_win(monkeypatch):
    monkeypatch.setattr("graphwright.runtime.probe._verdicts", {})
    monkeypatch.setattr(Probe, "fastest", lambda self, kind, question, ways: next(iter(ways)))
    assert not calls_of_kernel(compiled(Gated(), torch.randn(4, 24)))


@needs_compiler
def test_one_row_by_a_large_weight_is_asked_about_against_a_compiled_loop(ways, monkeypatch):
    monkeypatch.setattr("graphwright.runtime.few_rows.LARGE", 40 * 24 * 4)
    net, x = nn.Sequential(nn.Linear(24, 40), nn.ReLU(), nn.Linear(40, 20)), torch.randn(1, 24)
    model = compiled(net, x)
    assert len(calls_of_kernel(model)) == 1 and [names for kind, names in ways if kind == "few rows"] == [["loop", "few rows"]]
    torch.testing.assert_close(model(x), net(x))


@needs_compiler
@pytest.mark.parametrize("rows", [1, 9])
def test_one_row_by_small_weights_and_many_rows_are_not_asked_about(ways, rows):
    assert not calls_of_kernel(compiled(Gated(), torch.randn(rows, 24)))
    assert "few rows" not in [kind for kind, _ in ways]


@needs_compiler
def test_any_number_of_rows_is_not_asked_about(ways):
    shapes = {"x": {0: torch.export.Dim("rows", min=2, max=8)}}
    assert not calls_of_kernel(compiled(Gated(), torch.randn(4, 24), dynamic_shapes=shapes))


@needs_compiler
def test_computed_weights_are_not_asked_about(ways):
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.randn(6, 8))

        def forward(self, x):
            return F.linear(x, self.weight * x.sum())

    assert not calls_of_kernel(compiled(Scaled(), torch.randn(4, 8)))
