"""Kernels compute what PyTorch computes in float64: every family of operations, on odd shapes, strides, dtypes and broadcasts."""

import re
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).parent))

from triton_kernels import TOLERANCE, assert_close, capture, check, double, kernel_of, run  # noqa: E402

from graphwright import ir  # noqa: E402
from graphwright.codegen.triton import NotFusible, plan  # noqa: E402
from graphwright.codegen.triton.views import base, is_view  # noqa: E402

gwo = torch.ops.gw
HALVES = (torch.bfloat16, torch.float16)
WIDTHS = (1, 63, 123, 1000)

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy, about log(0) and 0/0 in the interpreter


@pytest.fixture(autouse=True)
def seeded(one_thread):
    torch.manual_seed(0)


POINTWISE = {
    "neg": lambda x: -x,
    "abs": torch.abs,
    "exp": torch.exp,
    "exp2": torch.exp2,
    "log": lambda x: torch.log(x.abs() + 0.5),
    "log2": lambda x: torch.log2(x.abs() + 0.5),
    "sqrt": lambda x: torch.sqrt(x.abs()),
    "rsqrt": lambda x: torch.rsqrt(x.abs() + 0.5),
    "reciprocal": lambda x: torch.reciprocal(x.abs() + 0.5),
    "sin": torch.sin,
    "cos": torch.cos,
    "erf": torch.erf,
    "floor": torch.floor,
    "ceil": torch.ceil,
    "relu": torch.relu,
    "tanh": torch.tanh,
    "tanh near 0": lambda x: torch.tanh(x / 16) * 16,
    "sigmoid": torch.sigmoid,
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu tanh": lambda x: F.gelu(x, approximate="tanh"),
    "leaky_relu": lambda x: F.leaky_relu(x, 0.2),
    "square": lambda x: x**2,
    "cube": lambda x: x**3,
    "power 1/2": lambda x: x.abs() ** 0.5,
    "power -1/2": lambda x: (x.abs() + 0.5) ** -0.5,
    "clamp": lambda x: x.clamp(-0.3, 0.7),
    "clamp below": lambda x: x.clamp(min=0.1),
    "number first": lambda x: 1 - x,
    "divided": lambda x: x / 0.7,
    "alpha": lambda x: torch.add(x, x, alpha=3),
    "masked_fill": lambda x: x.masked_fill(x > 0, float("-inf")),
    "where": lambda x: torch.where((x > -0.5) & (x <= 0.5), x, 0.1),
    "not": lambda x: torch.where(torch.logical_not(x > 0), x, 0.1),
    "maximum": lambda x: torch.maximum(x, x.flip(-1)),
    "minimum": lambda x: torch.minimum(x, x.flip(-1)),
    "constant": lambda x: x * 0.1 + torch.full_like(x, 0.3),
}


@pytest.mark.parametrize("name", POINTWISE)
def test_a_pointwise_operation(name):
    for width, dtype in zip(WIDTHS, (torch.float32, torch.float64) * 2, strict=True):
        check(POINTWISE[name], [torch.randn(3, width, dtype=dtype)])
    for dtype in HALVES:
        check(POINTWISE[name], [torch.randn(3, 63).to(dtype)])


def layer_norm(x, w, b):
    return F.layer_norm(x, x.shape[-1:], w, b, 1e-5)


ROWS = {
    "layer_norm": layer_norm,
    "layer_norm without weight": lambda x, w, b: F.layer_norm(x, x.shape[-1:]) + w,
    "rms_norm": lambda x, w, b: F.rms_norm(x, x.shape[-1:], w, 1e-6),
    "softmax": lambda x, w, b: F.softmax(x * w + b, -1),
    "log_softmax": lambda x, w, b: F.log_softmax(x * w + b, -1),
    "softmax of columns": lambda x, w, b: F.softmax(x * w + b, 0),
    "sum": lambda x, w, b: (x * w + b).sum(-1),
    "sum, kept": lambda x, w, b: x - (x * w + b).sum(-1, keepdim=True),
    "mean": lambda x, w, b: (x * w + b).mean(-1),
    "mean of columns": lambda x, w, b: (x * w + b).mean(0),
    "mean of all": lambda x, w, b: (x * w + b).mean(),
    "amax": lambda x, w, b: (x * w + b).amax(-1),
    "amin": lambda x, w, b: (x * w + b).amin(-1, keepdim=True),
    "var": lambda x, w, b: (x * w + b).var(-1, correction=0),
    "residual": lambda x, w, b: (h := x + w, layer_norm(h, w, b)),
    "modulated": lambda x, w, b: layer_norm(x, None, None) * (1 + w) + b,
    "twice": lambda x, w, b: layer_norm(F.gelu(layer_norm(x, w, b)) + x, w, b),
}


@pytest.mark.parametrize("name", ROWS)
def test_a_row_reduction(name):
    for width in WIDTHS:
        check(ROWS[name], [torch.randn(5, width) + 1, torch.randn(width), torch.randn(width)])
    check(ROWS[name], [torch.randn(5, 123).double(), torch.randn(123).double(), torch.randn(123).double()])
    for dtype in HALVES:
        check(ROWS[name], [torch.randn(5, 123).to(dtype), torch.randn(123).to(dtype), torch.randn(123).to(dtype)])


@pytest.mark.parametrize("name", ["layer_norm", "rms_norm", "softmax", "log_softmax", "amax", "var", "residual", "twice"])
def test_a_row_longer_than_a_block_is_read_in_loops(name):
    width = 20011
    kernel = check(
        ROWS[name], [torch.randn(2, width) + 1, torch.randn(width), torch.randn(width)], tolerance=1e-4 if name == "var" else None
    )
    assert "for start in range(0, n_cols, COLS):" in kernel.source


def test_variance_does_not_cancel():
    # mean 1e4 and variance 1: E[x^2] - E[x]^2 in float32 has a relative error of 23 (see ir.ops.norm), two passes of 6e-5.
    for width in (1000, 10007):
        x = torch.randn(4, width) + 1e4
        check(lambda x: x.var(-1, correction=0) * 1.0, [x], tolerance=1e-3)


@pytest.mark.parametrize("shape", [(2, 6, 5, 7), (1, 4, 63), (3, 8, 2, 3, 5), (2, 4, 65, 64)])
def test_group_norm(shape):
    weight, bias = torch.randn(shape[1]), torch.randn(shape[1])
    for dtype in (torch.float32, torch.bfloat16):
        x = (torch.randn(shape) + 1).to(dtype)
        check(lambda x, w, b: F.silu(F.group_norm(x, 2, w, b, 1e-5)), [x, weight.to(dtype), bias.to(dtype)])


def test_group_norm_in_halves():
    x, w, b = torch.randn(2, 6, 5, 7) + 3, torch.randn(6), torch.randn(6)
    check(lambda x: gwo.norm_stats(x * 2, 2), [x])
    check(lambda x, w, b: F.silu(gwo.norm_apply(x, gwo.norm_stats(x, 2), w, b, 2, 1e-5)), [x, w, b])
    stats = torch.cat([gwo.norm_stats(part, 2) for part in (x[:, :, :2], x[:, :, 2:])])
    check(lambda x, s, w, b: F.silu(gwo.norm_apply(x, s, w, b, 2, 1e-5)), [x, stats, w, b])


def rotated(x, cos, sin):
    first, second = x.chunk(2, -1)
    return x * cos + torch.cat([-second, first], -1) * sin


def interleaved(x, cos, sin):
    even, odd = x[..., ::2], x[..., 1::2]
    return x * cos + torch.stack([-odd, even], -1).flatten(-2) * sin


STRUCTURES = {
    "GEGLU": (lambda x: x.chunk(2, -1)[0] * F.gelu(x.chunk(2, -1)[1]), [(3, 5, 126)]),
    "SwiGLU": (lambda x, y: F.silu(x) * y, [(3, 5, 63), (3, 5, 63)]),
    "rotary": (rotated, [(2, 3, 7, 16), (7, 16), (7, 16)]),
    "rotary of heads": (lambda x, c, s: rotated(x.view(2, 7, 3, 16).transpose(1, 2), c, s), [(2, 7, 48), (7, 16), (7, 16)]),
    "norm, then rotary": (lambda x, c, s, w: rotated(F.rms_norm(x, (16,), w, 1e-6), c, s), [(2, 3, 7, 16), (7, 16), (7, 16), (16,)]),
    "rotary of neighbours": (interleaved, [(2, 3, 7, 16), (7, 16), (7, 16)]),
    "rotary table": (lambda x: (torch.cat([x, x], -1).cos(), torch.cat([x, x], -1).sin()), [(7, 8)]),
    "concatenation": (lambda x, y, z: torch.cat([x, y * 2, z], 1) + 1, [(2, 3, 5), (2, 1, 5), (2, 4, 5)]),
    "transposed": (lambda x, y: x.transpose(1, 2) + y, [(2, 5, 7), (7, 5)]),
    "reshaped": (lambda x, y: x.reshape(6, 35) + y.permute(1, 0, 2).reshape(6, 35), [(2, 3, 5, 7), (3, 2, 35)]),
    "merged heads": (lambda x, y: x.transpose(1, 2).reshape(2, 7, 48) + y, [(2, 3, 7, 16), (2, 7, 48)]),
    "window": (lambda x: x[:, 2:7:2, -3:] * x[:, 1:4, :3], [(2, 9, 6)]),
    "selected": (lambda x: x[:, 1] + x.select(1, -1), [(3, 4, 5)]),
    "unbound": (lambda x: x.unbind(1)[0] * x.unbind(1)[2], [(3, 4, 5)]),
    "split": (lambda x: torch.split(x, [2, 3, 4], 1)[1] + torch.split(x, 3, 1)[2], [(3, 9)]),
    "flipped": (lambda x: x.flip(0, 2) + x, [(3, 4, 5)]),
    "expanded": (lambda x, y: x.unsqueeze(1).expand(-1, 4, -1) * y.unsqueeze(0), [(3, 5), (4, 5)]),
    "per channel": (lambda x, y: (x + y[:, :, None, None]) * 2, [(2, 3, 4, 5), (2, 3)]),
    "broadcast both ways": (lambda x, y: x[:, None] * y[None] + 1, [(63,), (5,)]),
    "scalar tensor": (lambda x, y: x * y + 1, [(3, 5), ()]),
    "positions": (lambda x: x + torch.arange(5, dtype=torch.float32) * 0.5 + torch.arange(2, 12, 2), [(3, 5)]),
    "norm of a view": (lambda x, w: F.layer_norm(x.permute(0, 2, 3, 1).reshape(2, 20, 3), (3,), w), [(2, 3, 4, 5), (3,)]),
    "two dims normalised": (lambda x, w: F.layer_norm(x + 1, (4, 5), w), [(3, 4, 5), (4, 5)]),
    "outer dims summed": (lambda x: (x * x).sum((0, 2)), [(3, 4, 5)]),
}


@pytest.mark.parametrize("name", STRUCTURES)
def test_views_and_broadcasts_are_index_arithmetic(name):
    function, shapes = STRUCTURES[name]
    kernel = check(function, [torch.randn(shape) for shape in shapes])
    assert kernel.source.count("[(triton.cdiv(") == 1
    check(function, [torch.randn(shape, dtype=torch.float64) for shape in shapes], tolerance=1e-6 if name == "positions" else None)


def test_casts_round_where_the_program_casts():
    x = torch.randn(3, 63)
    # float16: the interpreter rounds to bfloat16 towards zero, which GPUs do not.
    program = capture(lambda x: x.to(torch.float16).to(torch.float32) - x, [x])
    assert torch.equal(run(kernel_of(program), program, [x])[0], x.half().float() - x)
    check(lambda x: (x * 3).to(torch.int32) + 1, [x])
    check(lambda x: (x > 0).to(torch.float16) * 2, [x])


def test_integers_and_bools_keep_their_types():
    check(lambda x, y: x * 3 + y, [torch.randint(-9, 9, (3, 5)), torch.randint(-9, 9, (5,))])
    check(lambda x, y: (x > y) | (x == 2), [torch.randint(-9, 9, (3, 5)), torch.randint(-9, 9, (5,))])
    check(lambda m, x: torch.where(m, x, -x), [torch.rand(3, 5) > 0.5, torch.randn(3, 5)])
    check(lambda x: (x > 0).sum(-1) + 1, [torch.randn(3, 63)])


def test_nan_and_infinity_go_where_pytorch_lets_them():
    x = torch.randn(4, 63)
    x[0, 3], x[1, 5], x[2, :] = float("nan"), float("inf"), float("-inf")
    for function in (
        torch.relu,
        lambda x: x.clamp(-1, 1),
        lambda x: torch.maximum(x, -x),
        lambda x: (x * 1).amax(-1),
        lambda x: F.softmax(x, -1),
    ):
        check(function, [x])


STRIDED = {
    "transposed": lambda: torch.randn(63, 5).t(),
    "every second": lambda: torch.randn(5, 126)[:, ::2],
    "a window": lambda: torch.randn(9, 80)[2:7, 5:68],
    "repeated": lambda: torch.randn(1, 63).expand(5, 63),
}


@pytest.mark.parametrize("name", STRIDED)
@pytest.mark.parametrize("rows", [False, True])
def test_strided_inputs(name, rows):
    w = torch.randn(126)[::2]
    check((lambda x, w: layer_norm(x, w, w)) if rows else (lambda x, w: F.silu(x) * w), [STRIDED[name](), w])


def test_an_input_with_other_strides_than_captured_is_copied():
    program = capture(lambda x: F.silu(x) * 2, [torch.randn(5, 63)])
    x = torch.randn(63, 5).t()
    assert_close(run(kernel_of(program), program, [x])[0], F.silu(x.double()) * 2, TOLERANCE[torch.float32])


@pytest.mark.parametrize("shape", [(0, 63), (3, 0), (0, 0)])
def test_empty_tensors(shape):
    check(lambda x: F.silu(x) * 2, [torch.randn(shape)])
    check(lambda x: (x * 2).sum(-1), [torch.randn(shape)])
    check(lambda x: (x * 2).mean(-1), [torch.randn(shape)])
    check(lambda x: F.softmax(x * 2, -1), [torch.randn(shape)])


def test_symbolic_sizes_are_arguments():
    rows, width = torch.export.Dim("rows", min=1, max=4096), torch.export.Dim("width", min=1, max=2**20)
    functions = {
        "pointwise": lambda x, w: F.gelu(x) * w + x[:, :1],
        "rows": lambda x, w: layer_norm(x, w, w),
        "reshaped": lambda x, w: (x * w).reshape(x.shape[0], x.shape[1], 1).transpose(0, 1) + x.t().unsqueeze(-1),
        "concatenated": lambda x, w: torch.cat([x * w, x], 1) + 1,
    }
    for function in functions.values():
        program = capture(function, [torch.randn(4, 63), torch.randn(63)], ({0: rows, 1: width}, {0: width}))
        kernel = kernel_of(program)
        for shape in ((1, 63), (5, 1), (3, 123), (2, 2500)):
            args = [torch.randn(shape), torch.randn(shape[1])]
            assert_close(run(kernel, program, args)[0], function(*double(args)), TOLERANCE[torch.float32])


def test_a_symbol_without_bound_takes_int64_positions():
    rows = torch.export.Dim("rows", min=1)
    assert "to(tl.int64)" in kernel_of(capture(lambda x: F.silu(x) * 2, [torch.randn(4, 63)], ({0: rows},))).source
    assert "to(tl.int64)" not in kernel_of(capture(lambda x: F.silu(x) * 2, [torch.randn(4, 63)])).source


def test_addresses_beyond_2_to_31_elements():
    # Fresh memory is only mapped, not held, so the few elements that are looked at are all that it takes.
    memory = torch.empty(2**31 + 4096, dtype=torch.int8)
    x = memory.as_strided((3, 64), (2**30 + 1000, 1))
    x.copy_(torch.randint(-9, 9, (3, 64)))
    kernel = check(lambda x: x * 2 + 1, [x])
    assert "to(tl.int64)" in kernel.source
    for dim in (0, 1):
        kernel = check(lambda x, dim=dim: (x.float() * 2).sum(dim), [x])
        assert kernel.source.count("to(tl.int64)") == 2


class Names(torch.nn.Module):
    """Arguments and sizes named as generated code names other things."""

    def forward(self, n, row, x, x_row, mask):
        return F.layer_norm(n * x_row + row, (n.shape[-1],)) + x, torch.where(mask, n, row).mean(-1)


def test_names_of_users_do_not_clash_with_those_of_the_file():
    n, total = torch.export.Dim("n", min=1, max=64), torch.export.Dim("total", min=1, max=512)
    both, one = {0: n, 1: total}, {0: total}
    args = (torch.randn(4, 63), torch.randn(63), torch.randn(63), torch.randn(4, 63), torch.rand(4, 63) > 0.5)
    program = ir.capture(Names(), args, {}, dynamic_shapes={"n": both, "row": one, "x": one, "x_row": both, "mask": both})
    kernel = kernel_of(program)
    for y, exact in zip(run(kernel, program, args), Names()(*double(args)), strict=True):
        assert_close(y, exact, TOLERANCE[torch.float32])
    static = ir.capture(Names(), args, {})
    for y, exact in zip(run(kernel_of(static), static, args), Names()(*double(args)), strict=True):
        assert_close(y, exact, TOLERANCE[torch.float32])


def test_equal_programs_give_equal_text():
    args = [torch.randn(5, 63), torch.randn(63), torch.randn(63)]
    first, second = (kernel_of(capture(ROWS["residual"], args)) for _ in range(2))
    assert first.source == second.source and re.fullmatch(r"[0-9a-f]{16}", first.digest)
    program = capture(lambda x, w, b: layer_norm(*ROWS["residual"](layer_norm(x, w, b), w, b)[:1], w, b), args)
    assert kernel_of(program).digest != first.digest


def test_the_header_says_where_the_kernel_comes_from():
    kernel = check(ROWS["layer_norm"], [torch.randn(5, 63), torch.randn(63), torch.randn(63)])
    header = kernel.source.split('"""')[1]
    assert "aten.layer_norm.default(" in header and "triton_kernels.py:" in header
    assert kernel.digest in header and "ROWS=8 COLS=64" in header and "bound by memory" in header
    assert kernel.ir and all(line.startswith("%") for line in kernel.ir)


REFUSED = {
    "different columns": lambda x: x.sum(-1) + (x * x).sum(0).sum(),
    "the power 0.3": lambda x: x.abs() ** 0.3,
    "few rows": lambda x: (x.repeat(1, 1200) * 2).mean(),
}


@pytest.mark.parametrize("reason", REFUSED)
def test_what_has_no_kernel_says_why(reason):
    program = capture(REFUSED[reason], [torch.randn(5, 63)])
    nodes = [node for node in program.main.calls if not is_view(node)]
    with pytest.raises(NotFusible, match=reason):
        plan(nodes, [base(output) for output in program.main.outputs])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("function", [torch.maximum, torch.minimum])
def test_the_larger_of_one_element_and_many_is_nan_where_either_is(function, dtype):
    many = torch.tensor([[-1.0, 2.0, float("nan"), float("inf")]], dtype=dtype)
    for one in (0.5, float("nan")):
        check(lambda x, y: function(x, y) * 1.0, [torch.tensor([[one]], dtype=dtype), many])
        check(lambda x, y: function(y, x) * 1.0, [torch.tensor([[one]], dtype=dtype), many])
