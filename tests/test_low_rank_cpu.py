"""`gw.lowrank_linear` on CPUs: the kernel in C++ against the operator's body in float64, and its place in every backend."""

from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import graphwright as gw
from graphwright.codegen.low_rank import linear
from graphwright.codegen.low_rank.library import library
from graphwright.codegen.native import library as native_library
from graphwright.ir.low_bit import dequantize, fake_quantize, format_of, quantize, rotate
from graphwright.runtime.backend import has_cpp_compiler
from graphwright.runtime.cache_key import native_environment
from graphwright.runtime.code_cache import Shelf
from graphwright.runtime.segments import Segment
from graphwright.tests.native_targets import TARGETS, library_for

needs_compiler = pytest.mark.skipif(not has_cpp_compiler(), reason="no C++ compiler: install g++")
op = torch.ops.gw.lowrank_linear.default

WEIGHTS = ["int8-channel", "int4-g16", "int4-g32", "int4-g64", "int4-g128"]
ACTIVATIONS = ["none", "int8-token", "int4-g16", "int4-g64", "int4-g128", "uint4-g64"]
OTHERS = ["mxint8", "mxint4", "mxfp8", "mxfp4", "nvint4", "nvfp4"]
ROWS = [0, 1, 5, 13, 63, 1000]
DTYPES = [torch.float32, torch.bfloat16]


@dataclass
class Layer:
    """A layer [n, k] in a format: `layer(f, x)` is f on its operands."""

    weight_format: str
    dtype: torch.dtype = torch.float32
    n: int = 70
    k: int | None = None
    rank: int = 5
    bias: bool = True
    smooth: bool = False
    options: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self):
        draw = torch.Generator().manual_seed(7)

        def normal(*shape):
            return torch.randn(*shape, generator=draw).to(self.dtype)

        # K is a multiple of every group there is and of no vector's length; or of none.
        act_group = format_of(self.options.get("act_format", "int8-token")).group if self.options.get("act_format") != "none" else 0
        group = max(format_of(self.weight_format).group, act_group)
        self.k = self.k or (3 * group if group else 101)
        self.weight = quantize(normal(self.n, self.k), self.weight_format)
        self.down, self.up = (normal(self.rank, self.k), normal(self.n, self.rank)) if self.rank else (None, None)
        self.b = normal(self.n) if self.bias else None
        self.a = (normal(self.k).abs() + 0.5).to(self.dtype) if self.smooth else None

    def __call__(self, function, x):
        operands = (x, self.weight.codes, self.weight.scale, self.down, self.up, self.b)
        return function(*operands, weight_format=self.weight_format, smooth=self.a, weight_scale2=self.weight.scale2, **self.options)

    def x(self, rows, seed=0):
        return torch.randn(rows, self.k, generator=torch.Generator().manual_seed(seed)).to(self.dtype)

    def exact(self, x):
        """The body in float64, with the activations' codes of the body in the dtype of x, and the bound of an error: the sizes of what
        is summed."""
        xs = x.float() + self.options.get("act_shift", 0.0)
        if self.a is not None:
            xs = xs * self.a.float()
        if self.options.get("rotate"):
            xs = rotate(xs, self.options["rotate"], weight=False)
        xs = fake_quantize(xs, self.options.get("act_format", "none"), self.dtype, self.options.get("act_scale2", 1.0)).double()
        w = dequantize(self.weight.codes, self.weight.scale, self.weight.scale2, self.weight_format, torch.float64)
        y, bound = xs @ w.T, xs.abs() @ w.abs().T
        if self.down is not None:
            raw, down, up = x.double(), self.down.double(), self.up.double()
            y, bound = y + raw @ down.T @ up.T, bound + raw.abs() @ down.abs().T @ up.abs().T
        if self.b is not None:
            y, bound = y + self.b.double(), bound + self.b.double().abs()
        return y, bound


def assert_close(layer, x, y):
    """Within the rounding that specs/low_rank.md, section 5, allows a kernel: 4 eps of the sum of absolute terms."""
    exact, bound = layer.exact(x.reshape(-1, x.size(-1)))
    assert y.dtype == x.dtype and y.shape == (*x.shape[:-1], layer.n)
    assert ((y.double().reshape(exact.shape) - exact).abs() <= 4 * torch.finfo(x.dtype).eps * bound).all()


@pytest.fixture(params=TARGETS)
def kernel(request, monkeypatch):
    """The kernel for this machine, and for older ones that this can play."""
    native = library_for(library, request.param)
    monkeypatch.setattr(linear, "library", lambda: native)
    monkeypatch.setattr(linear, "_body", None)  # is not what is tested
    return linear.lowrank_linear


# --- the numbers -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("act_format", ACTIVATIONS)
@pytest.mark.parametrize("weight_format", WEIGHTS)
def test_a_kernel_is_as_near_to_float64_as_its_dtype_allows(kernel, weight_format, act_format, dtype):
    shift = 2.0 if act_format == "uint4-g64" else 0.0
    layer = Layer(weight_format, dtype, smooth=True, options={"act_format": act_format, "act_shift": shift})
    for rows in ROWS:
        x = layer.x(rows)
        assert_close(layer, x, layer(kernel, x))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("act_format", ["none", "int8-token", "mxfp4", "nvint4"])
@pytest.mark.parametrize("weight_format", OTHERS)
def test_formats_with_scales_of_their_own_are_decoded_in_the_kernel(kernel, weight_format, act_format, dtype):
    layer = Layer(weight_format, dtype, options={"act_format": act_format, "act_scale2": 0.01})
    for rows in ROWS:
        x = layer.x(rows)
        assert_close(layer, x, layer(kernel, x))


@pytest.mark.parametrize("options", [{}, {"act_format": "int8-token"}, {"act_format": "int4-g64"}], ids=str)
@pytest.mark.parametrize("parts", ["", "bias", "branch", "smooth", "shift", "rotate", "bias branch smooth shift rotate"])
def test_each_part_of_the_operator_may_be_there_or_not(kernel, parts, options):
    options = options | {"act_shift": 0.7 * ("shift" in parts), "rotate": 16 * ("rotate" in parts)}
    for weight_format in ("int8-channel", "int4-g64"):
        rank = 16 * ("branch" in parts)
        layer = Layer(weight_format, k=192, rank=rank, bias="bias" in parts, smooth="smooth" in parts, options=options)
        for rows in (3, 40):
            assert_close(layer, layer.x(rows), layer(kernel, layer.x(rows)))


@pytest.mark.parametrize("rows", [2, 60])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_x_may_lie_in_any_order(kernel, dtype, rows):
    layer = Layer("int4-g16", dtype, options={"act_format": "int8-token"})
    x = layer.x(rows)
    expected = layer(kernel, x)
    wider = torch.cat([x, x], 1)[:, : layer.k]
    for same in (x.T.contiguous().T, wider, x[:, None]):
        assert torch.equal(layer(kernel, same).reshape(expected.shape), expected)
    assert torch.equal(layer(kernel, x[0]), expected[0])
    layer = Layer("int4-g16", dtype)
    assert torch.equal(layer(kernel, wider), layer(kernel, x))


def test_scales_may_be_of_another_dtype_than_x(kernel):
    layer = Layer("int4-g64", options={"act_format": "int8-token"})
    weight, x = layer.weight, layer.x(4).bfloat16()
    scale = weight.scale.bfloat16()
    y = kernel(x, weight.codes, scale, None, None, None, weight_format="int4-g64", act_format="int8-token")
    again = kernel(x, weight.codes, scale.float(), None, None, None, weight_format="int4-g64", act_format="int8-token")
    assert torch.equal(y, again)


@pytest.mark.parametrize("joined", [1, 70])
def test_weights_that_were_joined_have_a_second_scale_a_row(kernel, joined):
    layer = Layer("nvfp4")
    layer.weight = type(layer.weight)(layer.weight.codes, layer.weight.scale, torch.rand(joined) + 0.1)
    for rows in (3, 40):
        assert_close(layer, layer.x(rows), layer(kernel, layer.x(rows)))


def identity(k, dtype):
    """A layer that gives its activations as they were quantized, times 127: codes times scale."""
    weight = quantize(torch.eye(k, dtype=dtype), "int8-channel")
    return weight.codes, torch.ones_like(weight.scale), None, None, None


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("act_format", ["int8-token", "int4-g64", "uint4-g64"])
@needs_compiler
@given(
    exponent=st.integers(-120, 100),
    seed=st.integers(0, 2**20),
    kind=st.sampled_from(["normal", "halves", "sparse", "positive"]),
    rows=st.sampled_from([3, 20]),
)
def test_codes_of_activations_are_those_of_the_reference(act_format, dtype, exponent, seed, kind, rows):
    kernel = linear.lowrank_linear
    x = torch.randn(rows, 128, generator=torch.Generator().manual_seed(seed))
    x = {"normal": x, "halves": (x * 8).round() / 2, "sparse": x * (x > 1.5), "positive": x.abs()}[kind]
    x = (x * 2.0**exponent).to(dtype)
    y = kernel(x, *identity(128, dtype), weight_format="int8-channel", act_format=act_format)
    expected = fake_quantize(x.float(), act_format, dtype)
    assert torch.equal((y.double() / 127).float().to(dtype), expected.to(dtype)) or torch.allclose(
        y.float() / 127, expected, rtol=torch.finfo(dtype).eps, atol=0
    )


@pytest.mark.parametrize("poison", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("act_format", ["none", "int8-token", "int4-g16"])
def test_a_row_that_is_not_finite_gives_no_finite_result_and_the_others_do(kernel, act_format, poison):
    layer = Layer("int4-g16", options={"act_format": act_format})
    for rows in (4, 40):
        x = layer.x(rows)
        x[1, 5] = poison
        y = layer(kernel, x)
        assert not y[1].isfinite().any()
        assert torch.equal(y[2:], layer(kernel, layer.x(rows))[2:])


# --- what does not change a result -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("weight_format", "act_format"), [("int8-channel", "int8-token"), ("int4-g64", "int8-token"), ("int4-g64", "int4-g64")]
)
def test_a_row_of_codes_does_not_depend_on_the_rows_beside_it(kernel, weight_format, act_format, dtype):
    layer = Layer(weight_format, dtype, rank=9, options={"act_format": act_format})
    first, second = layer.x(1, seed=1), layer.x(130, seed=2)
    joined = layer(kernel, torch.cat([first, second]))
    assert torch.equal(joined, torch.cat([layer(kernel, first), layer(kernel, second)]))


@pytest.mark.parametrize("sizes", [(1, 2), (30, 300)], ids=["few", "many"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nor_does_a_row_of_floats_among_few_rows_or_among_many(kernel, dtype, sizes):
    layer = Layer("int4-g64", dtype, rank=9)
    parts = [layer.x(rows, seed=rows) for rows in sizes]
    assert torch.equal(layer(kernel, torch.cat(parts)), torch.cat([layer(kernel, part) for part in parts]))


@pytest.mark.parametrize("rows", [1, 200])
@pytest.mark.parametrize(("weight_format", "act_format"), [("int8-channel", "int8-token"), ("int4-g64", "none"), ("int4-g64", "int4-g64")])
def test_bits_repeat_on_any_number_of_threads(kernel, weight_format, act_format, rows):
    layer = Layer(weight_format, n=300, options={"act_format": act_format})
    before, x = torch.get_num_threads(), layer.x(rows)
    try:
        results = []
        for threads in (1, 1, 2, 3, 5):
            torch.set_num_threads(threads)
            results.append(layer(kernel, x))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(results[0], each) for each in results[1:])


# --- its place in a program ------------------------------------------------------------------------------------------------


class Net(nn.Module):
    """A low-rank linear among operations that Inductor fuses."""

    def __init__(self, layer, after=F.gelu):
        super().__init__()
        self.layer, self.after = layer, after
        self.register_buffer("codes", layer.weight.codes)
        self.register_buffer("scale", layer.weight.scale)
        for name in ("down", "up", "b", "a"):
            self.register_buffer(name, getattr(layer, name))

    def forward(self, x):
        x = torch.sin(x) * 2
        y = op(
            x, self.codes, self.scale, self.down, self.up, self.b,
            weight_format=self.layer.weight_format, smooth=self.a, **self.layer.options,
        )  # fmt: skip
        return self.after(y) + 1


@pytest.fixture
def calls(monkeypatch):
    """The rows of each call of the kernel."""
    seen = []

    call = linear.Products.__call__

    def counted(self, x):
        seen.append(x.numel() // x.size(-1))
        return call(self, x)

    monkeypatch.setattr(linear.Products, "__call__", counted)
    monkeypatch.setattr(linear, "_body", None)
    return seen


BACKENDS = ["aten", *(["inductor"] if has_cpp_compiler() else []), "tuned"]


def compiled(net, x, backend, **options):
    return gw.compile(net.eval(), example_inputs=(x,), backend=backend, **options)


def assert_same(layer, net, model, x):
    """As near as the kernel, after GELU, whose slope is at most 1.13."""
    with torch.no_grad():
        inside = torch.sin(x) * 2
        exact, bound = layer.exact(inside)
        expected = net.after(exact) + 1
        slack = 1.2 * 4 * torch.finfo(x.dtype).eps * (bound + expected.abs() + 1)
        assert ((model(x).double() - expected).abs() <= slack).all()


@needs_compiler
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_backend_calls_the_kernel(calls, backend, dtype):
    layer = Layer("int4-g64", dtype, smooth=True, options={"act_format": "int8-token"})
    net, x = Net(layer), layer.x(20)
    model = compiled(net, x, backend)
    assert_same(layer, net, model, x)
    assert calls == [20]
    if backend == "inductor":
        segments = [n for n in model._present.executor._lowered.nodes if isinstance(n.target, Segment)]
        assert len(segments) == 2  # what comes before and what comes after


@needs_compiler
@pytest.mark.parametrize("backend", BACKENDS)
def test_the_number_of_rows_may_be_known_at_the_call_only(calls, backend):
    layer = Layer("int4-g64")
    net = Net(layer)
    model = compiled(net, layer.x(20), backend, dynamic_shapes={"x": {0: torch.export.Dim("rows", min=1, max=512)}})
    for rows in (1, 7, 300):
        assert_same(layer, net, model, layer.x(rows))
    assert calls == [1, 7, 300]


@needs_compiler
@pytest.mark.parametrize("backend", BACKENDS)
def test_regions_call_the_kernel_for_their_slices(calls, backend):
    layer = Layer("int8-channel", k=64, n=256, options={"act_format": "int8-token"})
    net, x = Net(layer), layer.x(512)
    model = compiled(net, x, backend, passes=[gw.SliceGroups(memory_budget="40%")])
    assert_same(layer, net, model, x)
    assert len(calls) > 1 and sum(calls) == 512


@needs_compiler
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_weight_that_is_written_to_is_seen(backend):
    layer = Layer("int4-g64")
    net, x = Net(layer), layer.x(3)
    model = compiled(net, x, backend)
    for name in ("scale", "up", "b"):
        getattr(net, name).mul_(2)
    net.codes.bitwise_xor_(1)
    assert_same(layer, net, model, x)


@needs_compiler
@pytest.mark.parametrize("backend", BACKENDS)
def test_no_weight_is_held_twice(backend):
    layer = Layer("int4-g64")
    model = compiled(Net(layer), layer.x(3), backend)
    assert "packed" not in str(model.report())
    assert dict(model.named_buffers())["codes"].data_ptr() == layer.weight.codes.data_ptr()


class Attention(nn.Module):
    """Queries, keys and values of one site, with views between, and what reads them."""

    def __init__(self, layers, between=lambda y: y.unflatten(-1, (2, -1))):
        super().__init__()
        self.layers, self.between = layers, between

    def forward(self, x):
        shared = {"down": self.layers[0].down, "smooth": self.layers[0].a}
        parts = []
        for layer in self.layers:
            y = op(
                x, layer.weight.codes, layer.weight.scale, shared["down"], layer.up, layer.b,
                weight_format=layer.weight_format, smooth=shared["smooth"], **layer.options,
            )  # fmt: skip
            parts.append(self.between(y))
        return tuple(parts)


@pytest.fixture
def sites(monkeypatch):
    """How many layers the kernel ran in each call."""
    seen, call = [], linear.Products.__call__

    def counted(self, x):
        results = call(self, x)
        seen.append(len(results))
        return results

    monkeypatch.setattr(linear.Products, "__call__", counted)
    return seen


@needs_compiler
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_call_follows_weights_that_are_replaced_or_written_to(backend):
    """What the kernel is told of a layer is put together once; `.data` of a parameter may become another tensor."""
    layer = Layer("int8-channel", options={"act_format": "int8-token"})
    net, x = Net(layer), layer.x(3)
    model = compiled(net, x, backend)
    assert_same(layer, net, model, x)
    layer.b.data = layer.b + 1
    assert_same(layer, net, model, x)
    layer.b.mul_(2)
    assert_same(layer, net, model, x)


@needs_compiler
@pytest.mark.parametrize("name", ["codes", "scale", "down", "up", "b", "a"])
def test_a_call_follows_weights_that_lie_otherwise_than_the_kernel_reads(name):
    """The kernel reads a copy of these."""
    layer = Layer("int8-channel", smooth=True)
    net, x = Net(layer), layer.x(3)
    value = getattr(net, name)
    apart = torch.stack([value, value], -1)[..., 0]  # every other number of a larger tensor
    if name in ("codes", "scale"):
        layer.weight = replace(layer.weight, **{name: apart})
    else:
        setattr(layer, name, apart)
    setattr(net, name, apart)
    model = compiled(net, x, "aten")
    assert_same(layer, net, model, x)
    apart.copy_(apart.flip(0) if name == "codes" else apart * 2)
    assert_same(layer, net, model, x)


class Adapted(nn.Module):
    """A low-rank linear whose branch is computed at each call, and lies across."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x, up):
        layer = self.layer
        codes, scale = layer.weight.codes, layer.weight.scale
        return op(x, codes, scale, layer.down, (up * 2).t(), layer.b, weight_format=layer.weight_format)


@needs_compiler
@pytest.mark.parametrize("backend", ["aten", "tuned"])
def test_a_branch_may_be_computed_at_each_call(backend):
    """The allocator gives it the memory that it had in the call before."""
    layer = Layer("int8-channel")
    net, x = Adapted(layer), layer.x(3)
    ups = torch.randn(8, *reversed(layer.up.shape), generator=torch.Generator().manual_seed(0))
    model = gw.compile(net.eval(), example_inputs=(x, ups[0]), backend=backend)
    for up in ups:
        torch.testing.assert_close(model(x, up), net(x, up), rtol=1e-4, atol=1e-3)  # sums of 128 and more terms of some units each


@needs_compiler
@pytest.mark.parametrize("backend", BACKENDS)
def test_layers_of_a_site_make_their_rows_ready_once(sites, backend):
    options = {"act_format": "int8-token"}
    layers = [Layer("int4-g64", n=n, smooth=True, bias=n != 70, options=options) for n in (70, 64, 130)]
    net, x = Attention(layers), layers[0].x(30)
    model = compiled(net, x, backend)
    assert all(torch.equal(a, b) for a, b in zip(model(x), [n(linear.lowrank_linear) for n in _alone(net, x)], strict=True))
    assert sites[0] == 3 and len(sites) == 4


def _alone(net, x):
    """The layers of a site, each by itself."""
    first = net.layers[0]

    def of(layer):
        def run(function):
            layer.down, layer.a = first.down, first.a
            return net.between(layer(function, x))

        return run

    return [of(layer) for layer in net.layers]


@needs_compiler
@pytest.mark.parametrize(
    ("layers", "between", "why"),
    [
        ([Layer("int4-g64"), Layer("int4-g64")], torch.exp, "what lies between allocates"),
        ([Layer("int4-g64", k=384), Layer("int4-g128", k=384)], lambda y: y, "formats differ"),
        ([Layer("int4-g64"), Layer("int4-g64", options={"act_format": "int8-token"})], lambda y: y, "activations differ"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_others_stay_apart(sites, layers, between, why):
    net, x = Attention(layers, between), layers[0].x(9)
    compiled(net, x, "aten")(x)
    assert sites == [1, 1], why


@needs_compiler
@pytest.mark.parametrize("rows", [1, 600])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("weight_format", "act_format"), [("int8-channel", "int8-token"), ("int4-g64", "none"), ("int4-g64", "int4-g64")])
def test_the_plan_knows_the_scratch_of_the_kernel(weight_format, act_format, dtype, rows):
    layer = Layer(weight_format, dtype, k=1024, n=512, smooth=True, options={"act_format": act_format})
    net, x = Net(layer, after=torch.relu), layer.x(rows)
    before = torch.get_num_threads()
    torch.set_num_threads(2)  # what plans are made for
    try:
        model = compiled(net, x, "aten")
        measured = model.measure(x).peak_bytes
    finally:
        torch.set_num_threads(before)
    # Few rows of codes take no panel, of floats up to 12 do not in bfloat16: a plan does not tell these apart.
    assert model.report().memory.planned == pytest.approx(measured, rel=0.05, abs=2**17)


@needs_compiler
def test_a_saved_model_gives_the_same_bits(tmp_path):
    layer = Layer("int4-g64", torch.bfloat16, smooth=True)
    x = layer.x(9)
    model = compiled(Net(layer), x, "tuned")
    model.save(tmp_path / "model.gw")
    assert torch.equal(gw.load(tmp_path / "model.gw")(x), model(x))


@pytest.mark.parametrize("backend", ["aten", "tuned"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float64], ids=str)
def test_other_dtypes_run_the_body(backend, dtype):
    layer = Layer("int4-g64", dtype)
    net, x = Net(layer), layer.x(3)
    rounding = 8 * torch.finfo(dtype).eps  # Inductor rounds the result of a chain once, eager each
    torch.testing.assert_close(compiled(net, x, backend)(x), net(x), rtol=rounding, atol=rounding)


def test_what_only_broadcasts_to_the_shapes_of_the_kernel_runs_the_body():
    layer = Layer("int4-g64")
    x, codes, scale = layer.x(3), layer.weight.codes, layer.weight.scale[:1]
    y = linear.lowrank_linear(x, codes, scale, None, None, None, weight_format="int4-g64")
    assert torch.equal(y, op(x, codes, scale, None, None, None, weight_format="int4-g64"))


@pytest.mark.parametrize("rows", [1, 20])
def test_sums_that_pass_32_bits_are_the_body_s(rows):
    k = 140_032
    quantized = quantize(torch.ones(3, k), "int8-channel")
    y = linear.lowrank_linear(
        torch.ones(rows, k), quantized.codes, quantized.scale, None, None, None, weight_format="int8-channel", act_format="int8-token"
    )
    assert torch.allclose(y, torch.full((rows, 3), float(k)), rtol=1e-5)


@pytest.fixture
def no_compiler(monkeypatch):
    monkeypatch.setattr(native_library, "compiler", lambda: None)
    monkeypatch.setattr(library, "_loaded", {})


@pytest.mark.parametrize("weight_format", ["int4-g64", "int8-channel"])
@pytest.mark.parametrize("backend", ["aten", "tuned"])
def test_programs_run_without_a_compiler_and_a_warning_says_what_is_missing(no_compiler, caplog, backend, weight_format):
    layer = Layer(weight_format, options={"act_format": "int8-token"})
    net, x = Net(layer), layer.x(5)
    assert_same(layer, net, compiled(net, x, backend), x)
    assert "install g++" in caplog.text


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("parts", ["", "bias", "branch", "smooth", "shift", "rotate", "bias branch smooth shift rotate"])
def test_without_a_compiler_int8_is_multiplied_as_codes(no_compiler, monkeypatch, parts, dtype):
    monkeypatch.setattr(linear, "_body", None)
    options = {"act_format": "int8-token", "act_shift": 0.7 * ("shift" in parts), "rotate": 16 * ("rotate" in parts)}
    rank = 16 * ("branch" in parts)
    layer = Layer("int8-channel", dtype, k=192, rank=rank, bias="bias" in parts, smooth="smooth" in parts, options=options)
    for rows in ROWS:
        assert_close(layer, layer.x(rows), layer(linear.lowrank_linear, layer.x(rows)))


# --- the library -----------------------------------------------------------------------------------------------------------


@needs_compiler
def test_the_library_is_compiled_once_and_kept(monkeypatch, cache):
    shelf = Shelf(cache, "native", native_environment(library.source))
    monkeypatch.setattr(library, "_loaded", {})
    assert library(shelf) is not None
    monkeypatch.setattr(library, "_loaded", {})
    monkeypatch.setattr(library, "_compiled", None)
    assert library(shelf) is not None


@needs_compiler
def test_what_lies_in_its_place_and_does_not_load_is_compiled_anew(monkeypatch, cache):
    shelf = Shelf(cache, "native", native_environment(library.source))
    shelf.put(b"no library")
    monkeypatch.setattr(library, "_loaded", {})
    assert library(shelf) is not None
    assert shelf.get() != b"no library"


def test_a_compiler_that_fails_leaves_the_body(monkeypatch, tmp_path, caplog):
    broken = tmp_path / "broken"
    broken.write_text("#!/bin/sh\necho no luck >&2\nexit 1\n")
    broken.chmod(0o755)
    monkeypatch.setenv("CXX", str(broken))
    monkeypatch.setattr(library, "_loaded", {})
    layer = Layer("int4-g64")
    assert torch.equal(layer(linear.lowrank_linear, layer.x(3)), layer(op, layer.x(3)))
    assert "no luck" in caplog.text


def test_a_change_of_the_source_is_another_library():
    assert native_environment(library.source) != native_environment(library.source + "//")
