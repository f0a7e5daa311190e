"""A low-rank linear layer as two kernels is what its body is in float64, up to the rounding of operands to the model's dtype, and what it
quantizes has the codes that the reference quantizers give."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).parent))

from triton_kernels import capture  # noqa: E402

from graphwright.codegen.triton import NotFusible, emit, tune  # noqa: E402
from graphwright.codegen.triton.groups import find_groups  # noqa: E402
from graphwright.codegen.triton.launch import Launch, load  # noqa: E402
from graphwright.codegen.triton.low_rank import split  # noqa: E402
from graphwright.codegen.triton.low_rank.ops import low_bit_product  # noqa: E402
from graphwright.codegen.triton.low_rank.plan import product_plan  # noqa: E402
from graphwright.codegen.triton.low_rank.tiles import operand_tiles, product_tiles  # noqa: E402
from graphwright.codegen.triton.targets import DEFAULT  # noqa: E402
from graphwright.ir.low_bit import FORMATS, dequantize, fake_quantize, quantize, rotate  # noqa: E402
from graphwright.ir.low_bit.quantize import row_steps  # noqa: E402
from graphwright.runtime.compiled import Compilation, CompiledModel  # noqa: E402
from graphwright.runtime.flat import FlatGraph  # noqa: E402
from graphwright.runtime.lowering import lower  # noqa: E402
from graphwright.runtime.triton_lowering import TritonLowering  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")
HALVES = ["low_bit_operand_kernel", "low_bit_product_kernel"]
WEIGHTS = [name for name, form in FORMATS.items() if form.weight and form.bits in (4, 8)]
ACTIVATIONS = ["none", *(name for name, form in FORMATS.items() if form.activation and form.bits in (4, 8) and name != "u8-tensor")]


@pytest.fixture(autouse=True)
def seeded(one_thread):
    torch.manual_seed(0)
    yield
    torch.use_deterministic_algorithms(False)


class Layer:
    """A low-rank linear layer with random weights; `y = layer(x)` is the operation."""

    def __init__(self, n, k, weight, act="none", dtype=torch.bfloat16, rank=5, smooth=True, bias=True, shift=0.0, size=0):
        self.weight, self.act, self.shift, self.size = weight, act, shift, size
        self.dtype, self.scale2 = dtype, 0.01 if act.startswith("nv") else 1.0
        q = quantize(torch.randn(n, k, dtype=dtype) / k**0.5, weight)
        self.tensors = {"weight_q": q.codes, "weight_scale": q.scale}
        if rank:
            self.tensors |= {"down": torch.randn(rank, k, dtype=dtype) / k**0.5, "up": torch.randn(n, rank, dtype=dtype)}
        if bias:
            self.tensors["bias"] = torch.randn(n, dtype=dtype)
        if smooth:
            self.tensors["smooth"] = (torch.rand(k) + 0.5).to(dtype)
        if q.scale2 is not None:
            self.tensors["weight_scale2"] = q.scale2

    def call(self, x, tensors):
        operands = [tensors.get(name) for name in ("weight_q", "weight_scale", "down", "up", "bias")]
        options = {"weight_format": self.weight, "act_format": self.act, "act_scale2": self.scale2}
        options |= {"act_shift": self.shift, "rotate": self.size}
        more = {name: tensors.get(name) for name in ("smooth", "weight_scale2")}
        return torch.ops.gw.lowrank_linear(x, *operands, **options, **more)

    def __call__(self, x, *tensors):
        return self.call(x, dict(zip(self.tensors, tensors, strict=True)))

    def exact(self, x):
        """(the result, what an operand's rounding by eps may change) in float64: x is quantized in float32, on scales of its own dtype."""
        get = {
            name: tensor.double() if tensor.dtype in (torch.float32, self.dtype) else tensor for name, tensor in self.tensors.items()
        }.get
        xs = self.moved(x)
        xs = fake_quantize(xs, self.act, x.dtype, self.scale2).double()
        w = dequantize(
            self.tensors["weight_q"], self.tensors["weight_scale"], self.tensors.get("weight_scale2"), self.weight, torch.float64
        )
        y, bound = xs @ w.T, xs.abs() @ w.T.abs()
        if get("down") is not None:
            y = y + (x.double() @ get("down").T) @ get("up").T
            bound = bound + (x.double().abs() @ get("down").T.abs()) @ get("up").T.abs()
        if get("bias") is not None:
            y, bound = y + get("bias"), bound + get("bias").abs()
        return y, bound

    def moved(self, x):
        """x shifted, smoothed and turned, as the operation does it."""
        xs = x.float() + self.shift if self.shift else x.float()
        xs = xs * self.tensors["smooth"].float() if "smooth" in self.tensors else xs
        return rotate(xs, self.size, weight=False) if self.size else xs


def lowered(program):
    lowering = TritonLowering(program.main.graph, program.symbols, interpreted=True)
    graph = lower(program.main.graph, lowering)
    return graph, [node.target.kernel for node in graph.nodes if isinstance(node.target, Launch)]


def computed(layer, x, kernels=HALVES, dynamic_shapes=None, args=None):
    """The layer by kernels, memory NaN before."""
    args = [x, *layer.tensors.values()] if args is None else args
    program = capture(layer, args, dynamic_shapes)
    graph, found = lowered(program)
    assert [kernel.name for kernel in found] == kernels
    torch.use_deterministic_algorithms(True)
    (y,) = FlatGraph(graph)(list(args))
    torch.use_deterministic_algorithms(False)
    return y


def assert_exact(layer, x, kernels=HALVES):
    """|y - oracle| <= 4 eps (|xs| |w|^T + |x| |down|^T |up|^T + |bias|): operands, the branch's half and the result are rounded, the
    first two of a product by eps/2 each; the interpreter's bfloat16 rounds towards zero, by up to eps."""
    y = computed(layer, x, kernels)
    exact, bound = layer.exact(x)
    assert y.shape == exact.shape and y.dtype == x.dtype
    excess = (y.double() - exact).abs() - 4 * torch.finfo(x.dtype).eps * bound
    assert y.isfinite().all() and (y.numel() == 0 or excess.max() <= 0), f"{excess.max():.3g} beyond the bound"


@pytest.mark.parametrize("act", ACTIVATIONS)
@pytest.mark.parametrize("weight", WEIGHTS)
def test_each_pair_of_formats(weight, act):
    assert_exact(Layer(20, 256, weight, act), torch.randn(17, 256, dtype=torch.bfloat16))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(
    ("weight", "act"),
    [
        ("int8-channel", "int8-token"),
        ("int4-g64", "none"),
        ("int4-g64", "int4-g64"),
        ("nvfp4", "none"),
        ("mxfp8", "mxfp8"),
        ("nvfp4", "nvfp4"),
    ],
)
def test_each_dtype(weight, act, dtype):
    assert_exact(Layer(35, 384, weight, act, dtype), torch.randn(19, 384, dtype=dtype))


@pytest.mark.parametrize("m", [1, 5, 63, 1000])
@pytest.mark.parametrize(
    ("weight", "act", "k"),
    [
        ("int8-channel", "int8-token", 70),
        ("int4-g64", "none", 192),
        ("int4-g64", "int8-token", 320),
        ("int4-g64", "int4-g64", 192),
        ("nvfp4", "none", 80),
    ],
)
def test_sizes_that_fit_no_tile(m, weight, act, k):
    assert_exact(Layer(33, k, weight, act), torch.randn(m, k, dtype=torch.bfloat16))


@pytest.mark.parametrize("act", ["none", "int4-g64", "nvfp4", "int8-token"])
@pytest.mark.parametrize("shape", [(1, 576), (2, 8, 576), (576,)])
def test_few_rows_are_summed_in_parts_along_k(shape, act):
    """But for rows that share a scale; 576 is no multiple of a part."""
    layer, x = Layer(35, 576, "int4-g64", act), torch.randn(shape, dtype=torch.bfloat16)
    assert_exact(layer, x)
    first, second = kernels_of(layer, x)[0]
    assert (first.plan.part, second.plan.parts) == ((0, 1) if act == "int8-token" else (256, 3))
    load(first).check("cpu")
    load(second).check("cpu")


@pytest.mark.parametrize(("weight", "act"), [("int8-channel", "int8-token"), ("int4-g64", "none"), ("mxfp4", "mxfp4")])
def test_no_rows(weight, act):
    assert computed(Layer(33, 128, weight, act), torch.randn(0, 128, dtype=torch.bfloat16)).shape == (0, 33)


@pytest.mark.parametrize("act", ["none", "int8-token", "int4-g64", "nvfp4"])
@pytest.mark.parametrize("part", ["branch", "smooth", "bias", "all"])
def test_parts_that_are_not_there(act, part):
    left_out = {"branch": {"rank": 0}, "smooth": {"smooth": False}, "bias": {"bias": False}}
    left_out["all"] = {name: value for each in left_out.values() for name, value in each.items()}
    kernels = HALVES if act != "none" or part in ("bias", "smooth", "branch") else HALVES[1:]
    assert_exact(Layer(20, 128, "int4-g64", act, **left_out[part]), torch.randn(9, 128, dtype=torch.bfloat16), kernels)


@pytest.mark.parametrize("act", ["none", "int8-token", "int4-g64", "mxfp8"])
@pytest.mark.parametrize("size", [2, 16, 32, 64, 128])
def test_rotated_blocks(act, size):
    """In float32, whose sums are in another order than the reference's: no element lies at a tie here."""
    assert_exact(Layer(20, 256, "int4-g64", act, torch.float32, size=size), torch.randn(9, 256))


@pytest.mark.parametrize("act", ["uint4-g64", "none", "int8-token"])
@pytest.mark.parametrize("smooth", [True, False])
def test_shifted_activations(act, smooth):
    """Beyond K there is no shift: 192 is no multiple of the block of 128."""
    x = F.gelu(torch.randn(9, 192)).bfloat16()
    assert_exact(Layer(20, 192, "int4-g64", act, shift=0.171875, smooth=smooth), x)


LAYOUTS = {
    "three dims": lambda: torch.randn(2, 7, 128),
    "one dim": lambda: torch.randn(128),
    "rows apart": lambda: torch.randn(9, 256)[:, :128],
    "transposed rows": lambda: torch.randn(7, 2, 128).transpose(0, 1),
    "columns apart": lambda: torch.randn(9, 256)[:, ::2],
    "transposed": lambda: torch.randn(128, 9).t(),
    "an offset": lambda: torch.randn(10, 128)[1:],
}


@pytest.mark.parametrize("act", ["none", "int8-token"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_x_as_it_lies(layout, act):
    whole = LAYOUTS[layout]()
    x = whole.bfloat16() if whole.is_contiguous() else torch.empty_strided(whole.shape, whole.stride(), dtype=torch.bfloat16).copy_(whole)
    assert_exact(Layer(20, 128, "int4-g64", act), x)


@pytest.mark.parametrize("act", ["none", "int8-token"])
def test_one_row_for_all(act):
    assert_exact(Layer(20, 128, "int4-g64", act), torch.randn(1, 128, dtype=torch.bfloat16).expand(9, 128))


def test_a_view_of_x_that_a_program_makes():
    layer = Layer(20, 128, "int8-channel", "int8-token", smooth=False)
    x = torch.randn(2, 128, 6, dtype=torch.bfloat16)
    names = [*layer.tensors]

    def function(x, *tensors):
        return layer.call(x.transpose(1, 2).reshape(12, 128), dict(zip(names, tensors, strict=True)))

    y = computed(function, x, args=[x, *layer.tensors.values()])
    exact, bound = layer.exact(x.transpose(1, 2).reshape(12, 128))
    assert ((y.double() - exact).abs() <= 4 * 2**-7 * bound).all()


def test_symbolic_rows():
    layer = Layer(20, 128, "int8-channel", "int8-token")
    dims = {0: torch.export.Dim("batch", min=2, max=16), 1: torch.export.Dim("length", min=2, max=512)}
    args = [torch.randn(2, 30, 128, dtype=torch.bfloat16), *layer.tensors.values()]
    program = capture(layer, args, (dims, *(None for _ in layer.tensors)))
    graph, found = lowered(program)
    assert [kernel.name for kernel in found] == HALVES
    for shape in ((2, 30, 128), (3, 7, 128), (5, 2, 128)):
        x = torch.randn(shape, dtype=torch.bfloat16)
        exact, bound = layer.exact(x)
        assert ((FlatGraph(graph)([x, *layer.tensors.values()])[0].double() - exact).abs() <= 4 * 2**-7 * bound).all()


@pytest.mark.parametrize("names", [("M", "K"), ("m", "tiles")])
def test_symbols_that_are_called_as_kernels_call_theirs(names):
    layer = Layer(20, 128, "int8-channel", "int8-token")
    dims = {d: torch.export.Dim(name, min=2, max=512) for d, name in enumerate(names)}
    args = [torch.randn(30, 5, 128, dtype=torch.bfloat16).transpose(0, 1), *layer.tensors.values()]
    graph, found = lowered(capture(layer, args, (dims, *(None for _ in layer.tensors))))
    assert [kernel.name for kernel in found] == HALVES
    for shape in ((30, 5, 128), (7, 4, 128)):
        x = torch.randn(shape, dtype=torch.bfloat16).transpose(0, 1)
        exact, bound = layer.exact(x)
        assert ((FlatGraph(graph)([x, *layer.tensors.values()])[0].double() - exact).abs() <= 4 * 2**-7 * bound).all()


def operand_of(layer, x):
    """What the first kernel gives."""
    args = [x, *layer.tensors.values()]
    program = capture(layer, args)
    graph, _ = split(program.main.graph, program.symbols)
    group = find_groups(graph)[0]
    values = dict(zip([node for node in graph.nodes if node.op == "placeholder"], args, strict=True))
    kernel = emit(group.plan, program.symbols)
    return dict(zip(group.plan.results, Launch(kernel)(*(values[node] for node in group.inputs)), strict=True))


CODED = [
    ("int8-channel", "int8-token"),
    ("int4-g64", "int4-g64"),
    ("int4-g128", "int4-g128"),
    ("int4-g64", "int8-token"),
    ("int4-g64", "uint4-g64"),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("weight", "act"), CODED)
def test_codes_and_scales_are_the_references_bit_by_bit(weight, act, dtype):
    layer = Layer(4, 256, weight, act, dtype)
    x = torch.randn(40, 256).mul(torch.logspace(-6, 2, 40).unsqueeze(1)).to(dtype)
    x[3], x[5, ::2] = 0.0, 0.0
    found = operand_of(layer, x)
    xs = layer.moved(x)
    steps = row_steps(xs, FORMATS[act], dtype)
    assert torch.equal(found["steps"], steps)
    ours = found["codes"].float().unflatten(-1, (steps.size(-1), -1)) * steps.unsqueeze(-1)
    assert torch.equal(ours.flatten(-2), fake_quantize(xs, act, dtype))


@pytest.mark.parametrize("act", [act for act in ACTIVATIONS if act not in ("none", "int8-token")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_numbers_that_stand_for_codes_are_the_references(act, dtype):
    """The interpreter's bfloat16 rounds towards zero, so these are tested in the others. Tiny numbers reach the least scales."""
    layer = Layer(4, 256, "mxfp8", act, dtype)
    x = torch.randn(40, 256).mul(torch.logspace(-7, 2, 40).unsqueeze(1)).to(dtype)
    x[3], x[5, :128] = 0.0, 0.0
    assert torch.equal(operand_of(layer, x)["values"], fake_quantize(layer.moved(x), act, dtype, layer.scale2).to(dtype) + 0.0)


@pytest.mark.parametrize("size", [0, 32])
def test_codes_after_a_shift_or_a_rotation_differ_at_ties_alone_and_by_one_step(size):
    layer = Layer(4, 256, "int8-channel", "int8-token", torch.float32, shift=0.1, size=size)
    x = torch.randn(100, 256)
    found = operand_of(layer, x)
    xs = layer.moved(x)
    y = xs / found["steps"]
    assert ((y - y.round()).abs()[found["codes"] != y.round()] > 0.4999).all()
    assert (found["codes"] - y.round()).abs().max() <= 1


def test_act_none_is_never_quantized():
    """Small differences of large x survive: an 8-bit code of them would be the same."""
    layer = Layer(20, 128, "int4-g64", "none", torch.float32)
    x = torch.full((2, 128), 100.0)
    x[1, 5] += 1e-3
    assert "codes" not in operand_of(layer, x)
    (first, second), (exact, other) = computed(layer, x), layer.exact(x)[0]
    assert first.ne(second).any()
    assert ((second - first) - (other - exact)).abs().max() < 1e-4 * 100


def test_results_repeat_bit_by_bit():
    layer = Layer(70, 256, "int4-g64", "int4-g64")
    x = torch.randn(65, 256, dtype=torch.bfloat16)
    assert torch.equal(computed(layer, x), computed(layer, x))


@pytest.mark.parametrize("act", ["int8-token", "int4-g64", "mxfp4", "nvfp4", "none"])
def test_a_nan_stays_in_its_row(act):
    x = torch.randn(4, 128, dtype=torch.bfloat16)
    x[1, 7] = float("nan")
    y = computed(Layer(20, 128, "int4-g64", act), x)
    assert y[1].isnan().all() and y[[0, 2, 3]].isfinite().all()


def test_rows_of_zeros_give_the_bias():
    layer = Layer(20, 128, "int4-g64", "int4-g64")
    assert torch.equal(computed(layer, torch.zeros(3, 128, dtype=torch.bfloat16)), layer.tensors["bias"].expand(3, -1))


def test_query_key_and_value_share_what_they_read():
    layers = [Layer(n, 128, "int8-channel", "int8-token") for n in (20, 24, 28)]
    shared = {name: layers[0].tensors[name] for name in ("down", "smooth")}
    args = [torch.randn(9, 128, dtype=torch.bfloat16), *shared.values()]
    own = [{name: t for name, t in layer.tensors.items() if name not in shared} for layer in layers]
    args += [tensor for tensors in own for tensor in tensors.values()]

    def function(x, down, smooth, *rest):
        parts = iter(rest)
        named = [{name: next(parts) for name in tensors} | {"down": down, "smooth": smooth} for tensors in own]
        return tuple(layer.call(x, tensors) for layer, tensors in zip(layers, named, strict=True))

    program = capture(function, args)
    graph, found = lowered(program)
    assert [kernel.name for kernel in found] == [HALVES[0], *HALVES[1:] * 3]
    for layer, y in zip(layers, FlatGraph(graph)(list(args)), strict=True):
        layer.tensors |= shared
        exact, bound = layer.exact(args[0])
        assert ((y.double() - exact).abs() <= 4 * 2**-7 * bound).all()


def test_layers_of_other_smoothing_share_nothing():
    layers = [Layer(20, 128, "int8-channel", "int8-token"), Layer(20, 128, "int8-channel", "int8-token")]
    names = [*layers[0].tensors]

    def function(x, *tensors):
        halves = tensors[: len(names)], tensors[len(names) :]
        return tuple(layer.call(x, dict(zip(names, half, strict=True))) for layer, half in zip(layers, halves, strict=True))

    args = [torch.randn(9, 128, dtype=torch.bfloat16), *layers[0].tensors.values(), *layers[1].tensors.values()]
    assert sorted(kernel.name for kernel in lowered(capture(function, args))[1]) == sorted(HALVES * 2)


AFTER = {
    "gelu": lambda y, r: F.gelu(y),
    "gate, residual": lambda y, r: r + r[:1] * y,
    "silu of a view": lambda y, r: F.silu(y.unsqueeze(0)),
}


@pytest.mark.parametrize("name", AFTER)
def test_what_follows_is_computed_with_the_product(name):
    layer = Layer(20, 128, "int4-g64", "int8-token")
    names = [*layer.tensors]
    x, r = torch.randn(9, 128, dtype=torch.bfloat16), torch.randn(9, 20, dtype=torch.bfloat16)

    def function(x, r, *tensors):
        return AFTER[name](layer.call(x, dict(zip(names, tensors, strict=True))), r)

    args = [x, r, *layer.tensors.values()]
    graph, found = lowered(capture(function, args))
    assert len(found) == 2 and found[1].plan.kind == "low_bit" and len(found[1].plan.nodes) > 1
    (y,) = FlatGraph(graph)(list(args))
    exact, bound = layer.exact(x)
    # Each of these changes by at most 1.2 times what its argument does, where r is at most 4.
    assert ((y.double() - AFTER[name](exact, r.double())).abs() <= 4 * 4 * 1.2 * 2**-7 * (bound + r.abs())).all()


LEFT_ALONE = {
    "float64": (lambda: Layer(20, 128, "int8-channel", "int8-token", torch.float32), torch.float64),
    "a float weight": (lambda: None, torch.bfloat16),
    "one scale for the tensor": (lambda: Layer(20, 128, "int8-channel", "u8-tensor"), torch.bfloat16),
    "codes of 6 bits": (lambda: Layer(20, 128, "mxint6", "none"), torch.bfloat16),
    "a rotation of many": (lambda: Layer(20, 256, "int8-channel", "int8-token", size=256), torch.bfloat16),
    "wider factors": (lambda: Layer(20, 128, "int8-channel", "int8-token", torch.float32), torch.bfloat16),
}


@pytest.mark.parametrize("name", LEFT_ALONE)
def test_what_no_kernel_covers_runs_its_body(name):
    make, dtype = LEFT_ALONE[name]
    layer = make()
    x = torch.randn(9, 128 if layer is None else layer.tensors["down"].size(1)).to(dtype)
    if layer is None:
        w, empty = torch.randn(20, 128, dtype=dtype), torch.empty(0)
        function, args = (lambda x, w, s: torch.ops.gw.lowrank_linear(x, w, s, None, None, None, weight_format="none")), [x, w, empty]
    else:
        function, args = layer, [x, *layer.tensors.values()]
    graph, found = lowered(capture(function, args))
    assert not found and [str(n.target) for n in graph.nodes if n.op == "call_function"] == ["gw.lowrank_linear.default"]
    assert torch.equal(FlatGraph(graph)(list(args))[0], function(*args))


@pytest.mark.parametrize(
    ("k", "weight", "act", "is_held"),
    [
        (133_144, "int8-channel", "int8-token", True),
        (133_145, "int8-channel", "int8-token", False),
        (133_145, "int8-channel", "none", True),  # numbers are multiplied, not codes
        (133_184, "int4-g64", "int8-token", True),  # codes are summed block by block
    ],
)
def test_codes_whose_sum_32_bits_may_not_hold_are_multiplied_by_the_body(k, weight, act, is_held):
    layer = Layer(2, k, weight, act, rank=0, smooth=False)
    program = capture(layer, [torch.randn(17, k, dtype=torch.bfloat16), *layer.tensors.values()])
    graph, _ = split(program.main.graph, program.symbols)
    (product,) = [node for node in graph.nodes if node.target is low_bit_product]
    if is_held:
        assert product_plan([product], [product]).k == k
        return
    with pytest.raises(NotFusible, match=f"a sum of the products of {k} codes, which 32 bits may not hold"):
        product_plan([product], [product])
    assert [group.plan.kind for group in find_groups(graph)] == ["operand"]


def kernels_of(layer, x, target=DEFAULT):
    program = capture(layer, [x, *layer.tensors.values()])
    graph, _ = split(program.main.graph, program.symbols)
    return [emit(group.plan, program.symbols, target=target) for group in find_groups(graph)], program.symbols


FILES = [
    ("int8-channel", "int8-token"),
    ("int4-g64", "none"),
    ("int4-g64", "int4-g64"),
    ("nvfp4", "nvfp4"),
    ("mxfp8", "mxfp8"),
    ("mxint4", "none"),
]


@pytest.mark.parametrize("size", [0, 32])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("weight", "act"), FILES)
def test_files_check_themselves(weight, act, dtype, size):
    for kernel in kernels_of(Layer(40, 192, weight, act, dtype, size=size), torch.randn(20, 192, dtype=dtype))[0]:
        load(kernel).check("cpu")


def test_a_file_that_computes_something_else_fails_its_check():
    for kernel in kernels_of(Layer(40, 192, "int8-channel", "int8-token"), torch.randn(20, 192, dtype=torch.bfloat16))[0]:
        module = load(kernel)
        inputs = module.example_inputs("cpu")
        (result, *_), (exact, *_) = module.run(*inputs), module.reference(*inputs)
        assert module.error_of(result, exact) <= module.TOLERANCE
        result[:, 3] = -result[:, 3]
        assert not module.error_of(result, exact) <= module.TOLERANCE


def test_a_file_runs_alone(tmp_path):
    for kernel in kernels_of(Layer(40, 192, "int4-g64", "int4-g64"), torch.randn(20, 192, dtype=torch.bfloat16))[0]:
        file = tmp_path / kernel.file_name
        file.write_text(kernel.source)
        environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
        done = subprocess.run([sys.executable, str(file)], capture_output=True, text=True, env=environment, cwd=tmp_path)
        assert done.returncode == 0, done.stderr[-2000:]
        assert "output 0: error" in done.stdout


def test_equal_layers_give_equal_text():
    texts = [
        [kernel.source for kernel in kernels_of(Layer(40, 192, "int4-g64", "int4-g64"), torch.randn(20, 192, dtype=torch.bfloat16))[0]]
        for _ in range(2)
    ]
    assert texts[0] == texts[1]


@pytest.mark.parametrize(("weight", "act"), [("int8-channel", "int8-token"), ("int4-g64", "int4-g64"), ("int4-g32", "none")])
@pytest.mark.parametrize("m", [7, 40])
def test_every_tile_gives_the_same(m, weight, act):
    layer = Layer(40, 192, weight, act)
    (first, second), symbols = kernels_of(layer, torch.randn(m, 192, dtype=torch.bfloat16))
    for kernel, tiles in ((first, operand_tiles), (second, product_tiles)):
        found = list(tiles(kernel.plan, DEFAULT))
        assert len(found) == len(set(found)) > 2 and found[0] == kernel.tile
        for tile in found:
            load(emit(kernel.plan, symbols, tile=tile)).check("cpu")


def test_a_compiled_model_lists_its_kernels_and_saves_them(tmp_path):
    layer, x = Layer(20, 128, "int4-g64", "int8-token"), torch.randn(9, 128, dtype=torch.bfloat16)
    names, args = [*layer.tensors], [x, *layer.tensors.values()]
    program = capture(lambda x, *tensors: F.relu(layer.call(x, dict(zip(names, tensors, strict=True)))), args)
    model = CompiledModel(Compilation(program, "triton_interpreter"))
    exact, bound = layer.exact(x)
    assert ((model(*args).double() - exact.relu()).abs() <= 4 * 2**-7 * bound).all()
    kernels = model.kernels()
    assert [kernel.name for kernel in kernels] == ["low_bit_operand_kernel", "low_bit_product_relu"]
    assert all("= gw.lowrank_linear.default(" in kernel.ir[0] and kernel.ir[0].partition("  # ")[0] in kernel.source for kernel in kernels)
    assert "kernels: 2 calls of 2" in str(model.report())
    model.save(tmp_path / "model.gw")
    with zipfile.ZipFile(tmp_path / "model.gw") as file:
        saved = [file.read(name).decode() for name in file.namelist() if name.startswith("kernels/")]
    assert sorted(saved) == sorted(kernel.source for kernel in kernels)


def test_where_no_tile_works_the_halves_run_their_bodies(monkeypatch):
    monkeypatch.setattr(tune, "_works", lambda *args: False)
    layer, x = Layer(20, 128, "int4-g64", "int4-g64"), torch.randn(9, 128, dtype=torch.bfloat16)
    args = [x, *layer.tensors.values()]
    program = capture(layer, args)
    graph = lower(program.main.graph, TritonLowering(program.main.graph, program.symbols, interpreted=True, tune=True))
    calls = [str(node.target) for node in graph.nodes if node.op == "call_function"]
    assert "gw_triton.low_bit_operand.default" in calls and "gw_triton.low_bit_product.default" in calls
    exact, bound = layer.exact(x)
    assert ((FlatGraph(graph)(list(args))[0].double() - exact).abs() <= 4 * 2**-7 * bound).all()


def test_tiles_are_tuned(monkeypatch, cache):
    times = iter(range(1000, 0, -1))  # the last that is timed is the fastest
    monkeypatch.setattr(tune, "device_seconds", lambda function, device, runs=1: float(next(times)))
    (first, second), symbols = kernels_of(Layer(40, 128, "int8-channel", "int8-token"), torch.randn(5, 128, dtype=torch.bfloat16))
    for kernel in (first, second):
        tuned = tune.Tuner(torch.device("cpu"), DEFAULT, cache).kernel(kernel.plan, symbols, {})
        assert tuned.tile != kernel.tile
        before = next(times)
        assert tune.Tuner(torch.device("cpu"), DEFAULT, cache).kernel(kernel.plan, symbols, {}).tile == tuned.tile
        assert next(times) == before - 1, "what was found is kept"
