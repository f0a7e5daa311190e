"""Products of matrices with what surrounds them are one kernel, which computes what the operations do one by one."""

import os
import subprocess
import sys
from pathlib import Path

import hypothesis.strategies as st
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings

sys.path.insert(0, str(Path(__file__).parent))

from triton_kernels import TOLERANCE, assert_close, capture, check, double, kernel_of, run  # noqa: E402

from graphwright.codegen.triton import NotFusible, emit  # noqa: E402
from graphwright.codegen.triton.contraction import contraction  # noqa: E402
from graphwright.codegen.triton.launch import load  # noqa: E402
from graphwright.codegen.triton.matmul_plan import matmul_plan  # noqa: E402
from graphwright.codegen.triton.matmul_tiles import candidate_tiles  # noqa: E402
from graphwright.codegen.triton.targets import DEFAULT, TARGETS  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")
HALF = {torch.float16, torch.bfloat16}


@pytest.fixture(autouse=True)
def seeded(one_thread):
    torch.manual_seed(0)


def randn(*shape, dtype=torch.float32):
    return torch.randn(shape, dtype=dtype)


def rotated(shape, *order):
    """A tensor of `shape` whose dims lie in memory in `order`."""
    return torch.randn([shape[d] for d in order]).permute([order.index(d) for d in range(len(shape))])


AFTER = {
    "bias": lambda x, w, b, r: F.linear(x, w, b),
    "bias, gelu": lambda x, w, b, r: F.gelu(F.linear(x, w, b)),
    "bias, silu, residual": lambda x, w, b, r: F.silu(F.linear(x, w, b)) + r,
    "gate, residual": lambda x, w, b, r: r + r[:, :1] * F.linear(x, w),
    "addmm as in GPT-2": lambda x, w, b, r: torch.addmm(b, x.reshape(-1, x.size(-1)), w.t()).view(r.shape) + r,
    "two results": lambda x, w, b, r: ((y := F.linear(x, w, b)), F.relu(y)),
    "scaled sum": lambda x, w, b, r: torch.addmm(b, x.flatten(0, 1), w.t(), beta=0.5, alpha=2.0),
    "bias in every row": lambda x, w, b, r: x @ w.t() + b,
}


@pytest.mark.parametrize("name", AFTER)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_what_comes_after_a_product_is_computed_with_it(name, dtype):
    args = [randn(2, 37, 64, dtype=dtype), randn(96, 64, dtype=dtype), randn(96, dtype=dtype), randn(2, 37, 96, dtype=dtype)]
    kernel = check(AFTER[name], args)
    assert kernel.plan.kind == "matmul" and kernel.plan.left.blocks is not None and kernel.plan.rights[0].blocks is not None


@pytest.mark.parametrize("m", [1, 2, 16, 63, 123])
@pytest.mark.parametrize("n", [1, 63, 64])
@pytest.mark.parametrize("k", [1, 7, 64, 123])
def test_sizes_that_fit_no_tile(m, n, k):
    check(lambda x, w, b: F.relu(F.linear(x, w, b)), [randn(m, k), randn(n, k), randn(n)])


LAYOUTS = {
    "both transposed": lambda: [rotated((40, 48), 1, 0), rotated((48, 64), 1, 0)],
    "left transposed": lambda: [rotated((40, 48), 1, 0), randn(48, 64)],
    "rows apart": lambda: [randn(40, 96)[:, :48], randn(48, 128)[:, ::2]],
    "an odd step": lambda: [randn(40, 49)[:, :48], randn(48, 63)],
    "one row for all": lambda: [randn(1, 48).expand(40, 48), randn(48, 64)],
    "an offset": lambda: [randn(41, 48)[1:], randn(50, 64)[2:]],
    "an odd offset": lambda: [randn(41 * 48 + 1)[1:].view(41, 48), randn(48 * 64 + 3)[3:].view(48, 64)],
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_operands_as_they_lie(layout):
    check(lambda a, b: torch.mm(a, b) * 2.0, LAYOUTS[layout]())


BATCHES = {
    "bmm": (lambda a, b: torch.bmm(a, b) * 0.125, [(3, 20, 33), (3, 33, 40)]),
    "attention scores": (lambda q, k: torch.matmul(q, k.transpose(-1, -2)) * 0.125, [(2, 3, 20, 32), (2, 3, 36, 32)]),
    "heads apart in memory": (
        lambda q, k: q.view(2, 20, 3, 32).transpose(1, 2) @ k.view(2, 36, 3, 32).permute(0, 2, 3, 1) * 0.125,
        [(2, 20, 96), (2, 36, 96)],
    ),
    "baddbmm": (lambda c, a, b: torch.baddbmm(c, a, b, beta=0.5, alpha=0.25).tanh(), [(3, 1, 40), (3, 20, 33), (3, 33, 40)]),
    "a mask for all": (lambda a, b, m: torch.bmm(a, b) + m, [(3, 20, 32), (3, 32, 40), (20, 40)]),
}


@pytest.mark.parametrize("name", BATCHES)
def test_batches_of_products(name):
    function, shapes = BATCHES[name]
    check(function, [randn(*shape) for shape in shapes])


BEFORE = {
    "a scale of columns": (lambda x, s, w: F.linear(x * s, w), [(5, 70), (70,), (48, 70)]),
    "a scale of rows": (lambda x, s, w: F.linear(x * s, w), [(100, 70), (100, 1), (48, 70)]),
    "an activation": (lambda x, w: F.linear(F.silu(x), w), [(5, 70), (48, 70)]),
    "a shift, which is no zero beyond the row": (lambda x, w: F.linear(x + 3.0, w), [(100, 70), (48, 70)]),
    "rms_norm": (lambda x, g, w: F.linear(F.rms_norm(x, (70,), g, 1e-6), w), [(5, 70), (70,), (48, 70)]),
    "layer_norm": (lambda x, g, b, w: F.gelu(F.linear(F.layer_norm(x, (70,), g, b), w)), [(1, 70), (70,), (70,), (48, 70)]),
    "a scale of weights": (lambda x, w, s: F.linear(x, w * s), [(40, 70), (48, 70), (48, 1)]),
    "gate of the operand": (lambda x, g, w: F.linear(x * F.sigmoid(g), w) + x[:, :48], [(9, 70), (9, 70), (48, 70)]),
}


@pytest.mark.parametrize("name", BEFORE)
def test_what_comes_before_a_product_is_computed_with_it(name):
    function, shapes = BEFORE[name]
    kernel = check(function, [randn(*shape) for shape in shapes])
    assert kernel.plan.kind == "matmul"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gate_and_up_of_swiglu_are_two_products_of_one_operand(dtype):
    args = [randn(33, 64, dtype=dtype), randn(80, 64, dtype=dtype), randn(80, 64, dtype=dtype)]
    kernel = check(lambda x, gate, up: F.silu(F.linear(x, gate)) * F.linear(x, up), args)
    assert len(kernel.plan.rights) == 2
    assert kernel.source.count("tl.dot(") == 2 and kernel.source.count("args_0_blocks.load") == 1


ONE_TENSOR = {
    "halves of one weight": (lambda x, w: F.silu(F.linear(x, w[:48])) * F.linear(x, w[48:]), [(33, 64), (96, 64)]),
    "chunks of one weight": (lambda x, w: F.silu(F.linear(x, w.chunk(2)[0])) * F.linear(x, w.chunk(2)[1]), [(33, 64), (96, 64)]),
    "q and k of one product": (lambda x: x[..., :32] @ x[..., 32:64].transpose(1, 2) * 0.125, [(2, 80, 96)]),
    "itself, transposed": (lambda x: F.relu(x @ x.t()), [(80, 64)]),
    "itself": (lambda x: F.relu(x @ x), [(64, 64)]),
    "one weight in both ways": (lambda x, w: F.silu(F.linear(x, w)) * (x @ w), [(40, 64), (64, 64)]),
}


@pytest.mark.parametrize("name", ONE_TENSOR)
@pytest.mark.parametrize("target", ["sm_90", "sm_80"])
def test_operands_may_lie_in_one_tensor(name, target):
    function, shapes = ONE_TENSOR[name]
    args = [randn(*shape) for shape in shapes]
    program = capture(function, args)
    (y,) = run(kernel_of(program, TARGETS[target]), program, args)
    assert_close(y, function(*double(args)), TOLERANCE[torch.float32])


PIECES = {
    "rows": (lambda x, w, r: F.relu(torch.cat([F.linear(x, w), r], 0)), [(5, 32), (16, 32), (7, 16)]),
    "tokens of one sequence": (lambda x, w, r: F.relu(torch.cat([F.linear(x, w), r], 1)), [(1, 5, 32), (16, 32), (1, 7, 16)]),
    "columns": (lambda x, w, r: F.relu(torch.cat([F.linear(x, w), r], 1)), [(5, 32), (16, 32), (5, 8)]),
    "matrices": (lambda a, b, r: F.relu(torch.cat([torch.bmm(a, b), r], 0)), [(2, 8, 16), (2, 16, 8), (3, 8, 8)]),
}


@pytest.mark.parametrize("name", PIECES)
def test_a_product_that_is_a_piece_of_what_is_stored_is_no_kernel(name):
    function, shapes = PIECES[name]
    with pytest.raises(NotFusible):
        kernel_of(capture(function, [randn(*shape) for shape in shapes]))


@pytest.mark.parametrize("factors", [{"alpha": 0.0}, {"beta": 0.0}], ids=str)
def test_what_a_factor_of_zero_hides_is_not_computed(factors):
    (node, *_) = capture(lambda c, a, b: torch.addmm(c, a, b, **factors), [randn(4, 8), randn(4, 16), randn(16, 8)]).main.calls
    with pytest.raises(NotFusible, match="not looked at"):
        contraction(node)


def test_an_expanded_operand_off_its_address_is_copied_as_it_lies():
    store = randn(8 * 16 + 1)
    a = store[1:].view(1, 8, 16).expand(3, 8, 16)
    check(lambda a, b: torch.bmm(a, b) * 2.0, [a, randn(3, 16, 8)])


def test_integers_are_summed_exactly():
    a, b = (torch.randint(-128, 128, shape, dtype=torch.int8) for shape in ((33, 64), (64, 48)))
    program = capture(lambda a, b: torch._int_mm(a, b), [a, b])
    (y,) = run(kernel_of(program), program, [a, b])
    assert torch.equal(y, (a.long() @ b.long()).int())


@pytest.mark.parametrize(("k", "is_held"), [(131_071, True), (131_072, False)])
def test_integers_whose_sum_32_bits_may_not_hold_are_no_kernel(k, is_held):
    a, b = torch.empty(33, k, dtype=torch.int8), torch.empty(k, 48, dtype=torch.int8)
    assert (k * 128**2 < 2**31) == is_held
    (node,) = capture(lambda a, b: torch._int_mm(a, b), [a, b]).main.calls
    if is_held:
        assert matmul_plan([node], [node]).accumulator == torch.int32
        return
    with pytest.raises(NotFusible, match="sums that 32 bits may not hold"):
        matmul_plan([node], [node])


def test_low_bit_products_are_scaled_after_the_sum():
    a, b = (torch.randint(-128, 128, shape, dtype=torch.int8) for shape in ((33, 64), (64, 48)))
    scale = torch.rand(33, 1)
    program = capture(lambda a, b, s: torch._int_mm(a, b).float() * s, [a, b, scale])
    (y,) = run(kernel_of(program), program, [a, b, scale])
    assert_close(y, (a.long() @ b.long()).double() * scale.double(), TOLERANCE[torch.float32])


def test_weights_of_8_bits_are_widened_on_the_way():
    x, q, scale = randn(33, 64), torch.randint(-128, 128, (48, 64), dtype=torch.int8), torch.rand(48, 1)
    program = capture(lambda x, q, s: F.linear(x, q.float() * s), [x, q, scale])
    (y,) = run(kernel_of(program), program, [x, q, scale])
    assert_close(y, x.double() @ (q.double() * scale.double()).t(), TOLERANCE[torch.float32])


SCALES = {"as a whole": ((), ()), "by row and column": ((33, 1), (1, 48)), "as matrices of one element": ((1, 1), (1, 1))}


@pytest.mark.parametrize("scales", SCALES)
@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_8_bit_floats_are_multiplied_and_scaled(scales, dtype):
    a, b = randn(33, 64).to(dtype), randn(48, 64).to(dtype).t()
    scale_a, scale_b = (torch.rand(shape) for shape in SCALES[scales])
    bias = randn(48, dtype=torch.bfloat16)

    def function(a, b, scale_a, scale_b, bias):
        return F.relu(torch._scaled_mm(a, b, scale_a, scale_b, bias=bias, out_dtype=torch.bfloat16))

    args = [a, b, scale_a, scale_b, bias]
    program = capture(function, args)
    kernel = kernel_of(program)
    (y,) = run(kernel, program, args)
    exact = F.relu(a.double() @ b.double() * scale_a.double() * scale_b.double() + bias.double())
    assert_close(y, exact, TOLERANCE[torch.bfloat16])
    assert "max_num_imprecise_acc=32" in kernel.source


def test_8_bit_floats_sum_as_the_hardware_does_where_that_was_asked_for():
    a, b, one = randn(33, 64).to(torch.float8_e4m3fn), randn(48, 64).to(torch.float8_e4m3fn).t(), torch.ones(())
    program = capture(lambda a, b, s: torch._scaled_mm(a, b, s, s, out_dtype=torch.bfloat16, use_fast_accum=True).relu(), [a, b, one])
    assert "max_num_imprecise_acc" not in kernel_of(program).source


def test_weights_of_8_bit_floats_are_widened_on_the_way():
    x, w, scale = randn(33, 64), randn(48, 64).to(torch.float8_e4m3fn), torch.rand(48, 1)
    program = capture(lambda x, w, s: F.linear(x, w.float() * s), [x, w, scale])
    (y,) = run(kernel_of(program), program, [x, w, scale])
    assert_close(y, x.double() @ (w.double() * scale.double()).t(), TOLERANCE[torch.float32])


@pytest.mark.parametrize("target", ["sm_80", "gfx942"])
def test_8_bit_floats_want_a_gpu_that_multiplies_them(target):
    a, b, one = randn(33, 64).to(torch.float8_e4m3fn), randn(48, 64).to(torch.float8_e4m3fn).t(), torch.ones(())
    program = capture(lambda a, b, s: torch._scaled_mm(a, b, s, s, out_dtype=torch.bfloat16).relu(), [a, b, one])
    with pytest.raises(NotFusible, match=f"{target} multiplies no 8-bit floats"):
        kernel_of(program, TARGETS[target])


def test_casts_to_8_bits_stay_with_the_library():
    with pytest.raises(NotFusible):
        kernel_of(capture(lambda x: (x * 2.0).to(torch.float8_e4m3fn), [randn(4, 4)]))


ENDS = {
    "equal": [10, 20, 30],
    "one empty": [0, 17, 30],
    "two empty": [30, 30, 30],
    "larger than a tile": [1, 29, 30],
    "one row each": [28, 29, 30],
}


def half(*shape):
    return randn(*shape, dtype=torch.bfloat16)


@pytest.mark.parametrize("ends", ENDS)
@pytest.mark.parametrize("rows", [30, 300])
def test_groups_of_rows_meet_a_matrix_each(ends, rows):
    x, w = half(rows, 32), half(3, 32, 48)
    stops = [end * rows // 30 for end in ENDS[ends]]
    program = capture(lambda x, w, ends: F.silu(torch._grouped_mm(x, w, offs=ends)) * 2.0, [x, w, torch.tensor(stops, dtype=torch.int32)])
    kernel = kernel_of(program)
    (y,) = run(kernel, program, [x, w, torch.tensor(stops, dtype=torch.int32)])
    parts = [x.double()[begin:end] @ w.double()[g] for g, (begin, end) in enumerate(zip([0, *stops], stops, strict=False))]
    assert_close(y, F.silu(torch.cat(parts)) * 2.0, TOLERANCE[torch.bfloat16])


def test_gate_and_up_of_experts_are_one_kernel():
    x, gate, up, ends = half(40, 32), half(3, 32, 48), half(3, 32, 48), torch.tensor([7, 7, 40], dtype=torch.int32)
    function = lambda x, g, u, e: F.silu(torch._grouped_mm(x, g, offs=e)) * torch._grouped_mm(x, u, offs=e)  # noqa: E731
    program = capture(function, [x, gate, up, ends])
    kernel = kernel_of(program)
    (y,) = run(kernel, program, [x, gate, up, ends])
    parts = [(x.double()[b:e], gate.double()[g], up.double()[g]) for g, (b, e) in enumerate(((0, 7), (7, 7), (7, 40)))]
    assert_close(y, torch.cat([F.silu(r @ g) * (r @ u) for r, g, u in parts]), TOLERANCE[torch.bfloat16])
    assert len(kernel.plan.rights) == 2


def test_rows_beyond_the_last_group_are_left_alone_by_the_rest():
    x, w, ends = half(30, 32), half(2, 32, 48), torch.tensor([4, 11], dtype=torch.int32)
    program = capture(lambda x, w, e: torch._grouped_mm(x, w, offs=e) + 1.0, [x, w, ends])
    (y,) = run(kernel_of(program), program, [x, w, ends])
    assert_close(y[:11], torch.cat([x.double()[:4] @ w.double()[0], x.double()[4:11] @ w.double()[1]]) + 1.0, TOLERANCE[torch.bfloat16])


def test_a_grouped_kernel_checks_itself():
    program = capture(
        lambda x, w, e: torch._grouped_mm(x, w, offs=e).relu(),
        [half(30, 32), half(3, 32, 48), torch.tensor([4, 11, 30], dtype=torch.int32)],
    )
    try:
        load(kernel_of(program)).check("cpu")
    finally:
        torch.use_deterministic_algorithms(False)


@given(
    m=st.sampled_from([1, 2, 15, 17, 64, 65]),
    n=st.sampled_from([1, 3, 16, 31, 130]),
    k=st.sampled_from([1, 5, 32, 33, 100]),
    left=st.booleans(),
    right=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
)
@settings(max_examples=25)
def test_any_product(m, n, k, left, right, dtype):
    a = randn(k, m, dtype=dtype).t() if left else randn(m, k, dtype=dtype)
    b = randn(n, k, dtype=dtype).t() if right else randn(k, n, dtype=dtype)
    check(lambda a, b: F.gelu(a @ b), [a, b])


def test_symbolic_rows_are_an_argument():
    length = torch.export.Dim("length", min=2, max=512)
    function = lambda x, w, b: F.gelu(F.linear(x, w, b))  # noqa: E731
    program = capture(function, [randn(2, 30, 64), randn(48, 64), randn(48)], dynamic_shapes=({1: length}, None, None))
    kernel = kernel_of(program)
    for rows in (2, 7, 65):
        args = [randn(2, rows, 64), randn(48, 64), randn(48)]
        (y,) = run(kernel, program, args)
        assert_close(y, function(*double(args)), TOLERANCE[torch.float32])


def test_no_rows_launch_nothing():
    (y,) = run(kernel_of(program := capture(lambda x, w: F.relu(x @ w), args := [randn(0, 16), randn(16, 8)])), program, args)
    assert y.shape == (0, 8)


def test_small_integers_are_exact():
    """Sums of small integers are exact in any order, so a term dropped or taken twice shows."""
    a, b = torch.randint(-4, 5, (70, 100)).float(), torch.randint(-4, 5, (100, 50)).float()
    program = capture(lambda a, b: torch.mm(a, b) + 1.0, [a, b])
    (y,) = run(kernel_of(program), program, [a, b])
    assert torch.equal(y, a @ b + 1.0)


REFUSED = {
    "another tile's element": (lambda x, w: (y := F.linear(x, w)) + y.flip(-1), [(8, 16), (16, 16)], "another tile has"),
    "a reduction after": (lambda x, w: F.softmax(F.linear(x, w), -1), [(8, 16), (16, 16)], "no pointwise|reduction"),
    "a chain of products": (lambda x, w: F.linear(F.linear(x, w), w), [(8, 16), (16, 16)], "a product of a product"),
    "no terms": (lambda x, w: F.relu(x @ w), [(8, 0), (0, 16)], "may be empty"),
    "a costly function of many rows": (lambda x, w: F.linear(F.gelu(x), w), [(100, 16), (16, 16)], "computed again"),
    "a norm of many rows": (lambda x, w: F.linear(F.rms_norm(x, (16,), None, 1e-6), w), [(100, 16), (16, 16)], "computed again"),
    "three products": (lambda x, w: F.linear(x, w) * F.linear(x, w + 1.0) * F.linear(x, w + 2.0), [(8, 16), (16, 16)], "more than 2"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_no_kernel_says_why(name):
    function, shapes, reason = REFUSED[name]
    with pytest.raises(NotFusible, match=reason):
        kernel_of(capture(function, [randn(*shape) for shape in shapes]))


def test_matrices_that_are_broadcast_stay_with_the_library():
    (node, *_) = capture(lambda a, b: torch.matmul(a, b), [randn(2, 8, 16), randn(3, 1, 16, 4)]).main.calls
    with pytest.raises(NotFusible, match="broadcasts"):
        contraction(node)


def test_float64_stays_with_the_library():
    with pytest.raises(NotFusible, match="no kernel multiplies"):
        kernel_of(capture(lambda a, b: torch.mm(a, b) + 1.0, [randn(4, 4).double(), randn(4, 4).double()]))


def test_tf32_is_taken_only_where_it_was_asked_for():
    program = capture(lambda a, b: F.relu(a @ b), [randn(16, 16), randn(16, 16)])
    assert 'input_precision="ieee"' in kernel_of(program).source
    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    try:
        for setting in ("tf32", "ieee"):
            matmul.fp32_precision = setting
            assert f'input_precision="{setting}"' in kernel_of(program).source
    finally:
        matmul.fp32_precision = before


def test_addresses_beyond_2_to_the_31_are_wide():
    with torch.device("meta"):
        args = [torch.empty(2**16, 2**15 + 8), torch.empty(64, 2**15 + 8)]
    nodes = capture(lambda x, w: F.relu(F.linear(x[:, 1:], w[:, 1:])), args)
    text = kernel_of(nodes).source
    assert "m = (m_start + tl.arange(0, BLOCK_M)).to(tl.int64)[:, None]" in text


def test_a_file_runs_alone_and_checks_itself(tmp_path):
    kernel = kernel_of(
        capture(
            AFTER["bias, gelu"], [randn(3, 20, 32, dtype=torch.bfloat16), *(randn(*s).bfloat16() for s in ((48, 32), (48,), (3, 20, 48)))]
        )
    )
    file = tmp_path / kernel.file_name
    file.write_text(kernel.source)
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, str(file)], capture_output=True, text=True, env=environment, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "output 0: error" in done.stdout


def test_equal_plans_give_equal_text():
    texts = {kernel_of(capture(AFTER["gate, residual"], [randn(2, 3, 8), randn(8, 8), randn(8), randn(2, 3, 8)])).source for _ in range(2)}
    assert len(texts) == 1


def test_a_plan_can_be_emitted_with_any_tile():
    args = [randn(40, 64), randn(48, 64), randn(48)]
    program = capture(lambda x, w, b: F.gelu(F.linear(x, w, b)), args)
    plan = kernel_of(program).plan
    tiles = list(candidate_tiles(plan, DEFAULT))
    assert len(tiles) == len(set(tiles)) > 1
    for tile in tiles:
        (y,) = run(emit(plan, program.symbols, tile=tile), program, args)
        assert_close(y, F.gelu(F.linear(*double(args))), TOLERANCE[torch.float32])


def test_a_matmul_plan_names_its_products():
    program = capture(lambda x, w: F.relu(x @ w), [randn(4, 8), randn(8, 8)])
    nodes = list(program.main.calls)
    plan = matmul_plan(nodes, [nodes[-1]])
    assert plan.products == (nodes[0],) and plan.outputs == (nodes[-1],)


@pytest.mark.parametrize("target", TARGETS)
def test_hardware_that_copies_no_blocks_gets_addresses(target):
    args = [randn(40, 64), randn(48, 64), randn(48)]
    program = capture(lambda x, w, b: F.gelu(F.linear(x, w, b)), args)
    kernel = kernel_of(program, TARGETS[target])
    assert ("_blocks.load" in kernel.source) == TARGETS[target].copies_blocks
    (y,) = run(kernel, program, args)
    assert_close(y, F.gelu(F.linear(*double(args))), TOLERANCE[torch.float32])
