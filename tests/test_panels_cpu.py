"""Products on weights in panels by the kernel in C++, against the product in float64; and which products of a model it runs."""

import copy
import gc

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import graphwright as gw
from graphwright.codegen.cpu_packed import Pack, PackedLinear
from graphwright.codegen.panels import linear as room
from graphwright.codegen.panels.library import library
from graphwright.codegen.panels.linear import PanelLinear, on_panels, panels
from graphwright.runtime.backend import has_cpp_compiler
from graphwright.runtime.probe import Probe
from graphwright.tests.native_targets import TARGETS, library_for

pytestmark = pytest.mark.skipif(not has_cpp_compiler(), reason="no C++ compiler: install g++")
DTYPES = [torch.float32, torch.bfloat16]
FOLLOWS = {
    "none": lambda y, _: y,
    "silu": lambda y, _: F.silu(y),
    "sigmoid": lambda y, _: torch.sigmoid(y),
    "tanh": lambda y, _: torch.tanh(y),
    "gelu": lambda y, _: F.gelu(y),
    "gelu_tanh": lambda y, _: F.gelu(y, approximate="tanh"),
    "add": lambda y, other: y + other,
    "mul": lambda y, other: y * other,
}


def normal(*shape, dtype, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def called(x, weight, bias=None, follows="none", other=None, transposed=False):
    call = PanelLinear(transposed)
    call = call.with_operand(follows) if follows in ("add", "mul") else call.with_activation(follows)
    given_weight = weight.t().contiguous() if transposed else weight
    call.pack = Pack(given_weight, call.lay_out)
    return call(x, given_weight, bias, other)


def assert_close(y, x, weight, bias=None, follows="none", other=None):
    """One rounding of the result; of sums of K float32 terms at most min(K, 256) + K / 128 + 2 roundings, each of the sum of sizes at most;
    and 8 of an activation, whose slope is at most 1.13, or one of what follows."""
    product = F.linear(x.double(), weight.double(), None if bias is None else bias.double())
    sizes = x.double().abs() @ weight.double().abs().T + (0 if bias is None else bias.double().abs())
    exact = FOLLOWS[follows](product, None if other is None else other.double())
    unit, depth = torch.finfo(torch.float32).eps / 2, x.size(-1)
    of_sums = (min(depth, 256) + depth / 128 + 2) * unit * sizes * 1.13
    of_sums = of_sums * other.double().abs() if follows == "mul" else of_sums
    bound = (torch.finfo(y.dtype).eps / 2 + 8 * unit) * (exact.abs() + (product.abs() if follows != "mul" else 0)) + of_sums
    assert y.shape == exact.shape and y.dtype == x.dtype
    assert bool(((y.double() - exact).abs() <= bound + torch.finfo(y.dtype).smallest_normal).all())


@pytest.fixture(params=TARGETS)
def target(request, monkeypatch):
    """The kernel is the one for that processor."""
    native = library_for(library, request.param)
    monkeypatch.setattr(room, "library", lambda: native)


@pytest.fixture(params=[(target, torch.float32) for target in TARGETS] + [("native", torch.bfloat16)], ids=str)
def dtype(request, monkeypatch):
    """A type of elements, for which the kernel is the one for some processor."""
    target, dtype = request.param
    native = library_for(library, target)
    if dtype == torch.bfloat16 and not native.takes_pairs():
        pytest.skip("this processor multiplies no pairs of bfloat16")
    monkeypatch.setattr(room, "library", lambda: native)
    return dtype


@pytest.mark.parametrize("depth", [1, 16, 63, 123, 1000])
def test_the_kernel_is_the_product_for_any_rows_and_widths(dtype, depth):
    for rows in (1, 2, 5, 6, 7, 13, 48, 97):
        for width, bias in ((1, False), (63, True), (123, False), (200, True)):
            x, weight = normal(rows, depth, dtype=dtype), normal(width, depth, dtype=dtype, seed=1)
            b = normal(width, dtype=dtype, seed=2) if bias else None
            assert_close(called(x, weight, b), x, weight, b)


def test_a_deep_panel_meets_rows_part_by_part(dtype):
    for rows, depth in ((3, 4095), (200, 4097), (7, 9001)):
        x, weight = normal(rows, depth, dtype=dtype), normal(70, depth, dtype=dtype, seed=1)
        assert_close(called(x, weight), x, weight)


@pytest.mark.parametrize("follows", FOLLOWS)
def test_what_follows_is_applied_to_the_result(dtype, follows):
    x, weight, bias = normal(13, 37, dtype=dtype), normal(75, 37, dtype=dtype, seed=1), normal(75, dtype=dtype, seed=2)
    other = normal(13, 75, dtype=dtype, seed=3) if follows in ("add", "mul") else None
    assert_close(called(x, weight, bias, follows, other), x, weight, bias, follows, other)


@pytest.mark.parametrize("name", ["silu", "sigmoid", "tanh", "gelu", "gelu_tanh"])
def test_activations_are_near_float64_all_over_and_give_at_the_ends_what_atens_do(target, name):
    """Within 3e-7 of the size of x: half a unit of float32 is 6e-8."""
    x, one = torch.linspace(-20, 20, 100_001)[:, None], torch.ones(1, 1)
    exact = FOLLOWS[name](x.double(), None)
    assert float(((called(x, one, follows=name).double() - exact).abs() / x.double().abs().clamp_min(1)).max()) < 3e-7
    small = torch.logspace(-30, -3, 1000)[:, None]
    for ends in (small, -small):
        assert float((called(ends, one, follows=name).double() / FOLLOWS[name](ends.double(), None) - 1).abs().max()) < 1e-6
    ends = torch.tensor([torch.nan, 0.0, 30.0, -30.0, 100.0, -100.0, 1e30, -1e30])[:, None]
    torch.testing.assert_close(called(ends, one, follows=name), FOLLOWS[name](ends, None), equal_nan=True, atol=1e-20, rtol=1e-6)


def test_a_row_has_the_same_bits_whatever_is_beside_it_and_on_any_number_of_threads(dtype):
    x, weight = normal(101, 600, dtype=dtype), normal(301, 600, dtype=dtype, seed=1)
    whole = called(x, weight, follows="gelu")
    for first, end in ((0, 1), (3, 8), (50, 101), (95, 97)):
        assert torch.equal(called(x[first:end], weight, follows="gelu"), whole[first:end])
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            assert torch.equal(called(x, weight, follows="gelu"), whole)
    finally:
        torch.set_num_threads(threads)


def test_rows_may_be_parts_of_others_whose_rest_is_never_read(dtype):
    """What lies around the operands is NaN, and so is the memory that results are written to."""
    wide = torch.full((9, 200), torch.nan, dtype=dtype)
    weight, bias, other = normal(63, 123, dtype=dtype, seed=1), normal(63, dtype=dtype, seed=2), normal(5, 63, dtype=dtype, seed=3)
    x = wide[1:6, 10:133].copy_(normal(5, 123, dtype=dtype))
    poisoned = [torch.full((5, 63), torch.nan, dtype=dtype) for _ in range(8)]
    del poisoned  # the allocator gives this memory to the next results
    assert_close(called(x, weight, bias, "add", other), x, weight, bias, "add", other)
    columns = torch.full((123, 5), torch.nan, dtype=dtype).copy_(x.t()).t()
    assert_close(called(columns, weight, bias, "mul", other.t().contiguous().t()), columns, weight, bias, "mul", other)
    assert_close(called(x.unflatten(0, (5, 1)), weight, transposed=True), x.unflatten(0, (5, 1)), weight)
    strided = torch.full((126,), torch.nan, dtype=dtype)[::2].copy_(bias)
    assert_close(called(x, weight, strided), x, weight, bias)


@pytest.mark.parametrize("value", [torch.inf, -torch.inf, torch.nan], ids=str)
def test_infinities_and_nans_reach_the_results_that_they_belong_to(dtype, value):
    x, weight = torch.ones(3, 71, dtype=dtype), torch.ones(20, 71, dtype=dtype)
    weight[7, 70] = value
    y = called(x, weight)
    assert torch.equal(y[:, 7], torch.full((3,), value, dtype=dtype)) or bool(y[:, 7].isnan().all() and value != value)
    y[:, 7] = 71
    assert bool((y == 71).all())


def test_of_nothing_comes_what_comes_of_atens():
    weight, bias = torch.randn(5, 8), torch.randn(5)
    for shape in ((0, 8), (2, 0, 8)):
        assert torch.equal(called(torch.randn(shape), weight, bias), F.linear(torch.randn(shape), weight, bias))


@given(st.integers(1, 70), st.integers(1, 5), st.sampled_from(DTYPES), st.sampled_from([32, 64]))
def test_a_panel_has_word_after_word_of_its_rows(count, depth, dtype, width):
    weight, step, per_word = normal(count, depth, dtype=dtype), width // 2, 4 // dtype.itemsize
    laid_out, words = panels(weight, width, step), -(-depth // per_word)
    for n in range(count):
        first = n // width * width
        height = min(width, -(-(count - first) // step) * step)
        of_row = laid_out[first * words * per_word :][: height * words * per_word].view(words, height, per_word)[:, n - first]
        assert torch.equal(of_row.flatten()[:depth], weight[n]) and not of_row.flatten()[depth:].any()


def test_only_types_that_the_kernel_reads_are_taken(monkeypatch):
    assert on_panels(PackedLinear(4, False), torch.float64) is None and on_panels(PackedLinear(4, False), torch.float16) is None
    monkeypatch.setattr(room, "library", lambda: None)
    assert on_panels(PackedLinear(4, False), torch.float32) is None


class Gated(nn.Module):
    """Products whose results others follow, one of them with a bias."""

    def __init__(self):
        super().__init__()
        self.gate, self.up, self.down = nn.Linear(24, 40, bias=False), nn.Linear(24, 40), nn.Linear(40, 24, bias=False)

    def forward(self, x):
        return x + self.down(F.silu(self.gate(x)) * self.up(x))


def calls_of_kernel(model):
    return [node.target for node in model._present.executor._lowered.nodes if isinstance(node.target, PanelLinear)]


@pytest.mark.parametrize("element", DTYPES, ids=str)
@pytest.mark.parametrize("any_rows", [False, True])
def test_products_of_a_model_run_on_panels_where_these_win(ways, element, any_rows):
    if on_panels(PackedLinear(17, False), element) is None:
        pytest.skip("this processor multiplies no pairs of bfloat16")
    net, x = Gated().to(element), normal(17, 24, dtype=element)
    shapes = {"x": {0: torch.export.Dim("rows", min=2, max=100)}} if any_rows else None
    model = gw.compile(net, example_inputs=(x,), backend="tuned", cache=False, dynamic_shapes=shapes)
    assert sorted(map(str, calls_of_kernel(model))) == [
        "linear on panels with add",
        "linear on panels with mul",
        "linear on panels with silu",
    ]
    assert {tuple(names) for kind, names in ways if kind == "linear"} <= {("aten", "onednn", "panels"), ("aten", "panels")}
    for scale in (1, 2):
        exact = copy.deepcopy(net).double()(x.double())
        # Three products in a row, and their results rounded.
        assert torch.linalg.vector_norm(model(x).double() - exact) <= 8 * torch.finfo(element).eps * torch.linalg.vector_norm(exact), scale
        with torch.no_grad():
            net.up.weight.mul_(2)  # the copy follows


def test_copies_for_ways_that_did_not_win_are_gone_before_the_next_product_is_asked_about(monkeypatch):
    """All of them at once would take the weights' bytes once more."""
    held = []

    def fastest(self, kind, question, ways):
        if kind == "linear":
            held.append(sum(isinstance(each, Pack) for each in gc.get_objects()) - (len(ways) - 1))
        return list(ways)[-1]

    monkeypatch.setattr("graphwright.runtime.probe._verdicts", {})
    monkeypatch.setattr(Probe, "fastest", fastest)
    gc.collect()
    before = sum(isinstance(each, Pack) for each in gc.get_objects())
    gw.compile(Gated(), example_inputs=(torch.randn(17, 24),), backend="tuned", cache=False)
    assert [count - before for count in held] == [0, 1, 2]  # the winners so far


def test_panels_are_not_taken_where_they_do_not_win(monkeypatch):
    monkeypatch.setattr("graphwright.runtime.probe._verdicts", {})
    monkeypatch.setattr(Probe, "fastest", lambda self, kind, question, ways: next(iter(ways)))
    assert not calls_of_kernel(gw.compile(Gated(), example_inputs=(torch.randn(17, 24),), backend="tuned", cache=False))
