"""slice-groups over sizes known at the call only: one plan is the same function for every size that its symbols allow.

Property 9 of feature_slicing.md, section 6, and what section 3.8 says of counts, bodies and refusals.
"""

import functools
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.export import Dim
from torch.nn import functional as F

import graphwright as gw
from graphwright import ir
from graphwright.ir.errors import VerifyError
from graphwright.ir.links import Refusal, Tag
from graphwright.ir.liveness import profile
from graphwright.ir.run import run
from graphwright.ir.size_nodes import SizeNodes
from graphwright.passes import PassManager, SliceGroups
from graphwright.passes.check import check_exact
from graphwright.passes.inputs import random_inputs
from graphwright.passes.slicing.body import unwritable
from graphwright.passes.slicing.candidate import Stop
from graphwright.passes.slicing.plan import PlannedRegion, Planner
from graphwright.passes.slicing.prepare import prepare
from graphwright.passes.slicing.scene import Scene
from graphwright.runtime.backend import has_cpp_compiler
from graphwright.runtime.executor import Executor
from graphwright.runtime.memory import measure_peak
from graphwright.tests.dynamic_sizes import BUDGETS, CASES, Attention, FeedForward, rows

pytestmark = pytest.mark.usefixtures("one_thread")


@functools.cache
def captured(name: str) -> ir.Program:
    case = CASES[name]
    torch.manual_seed(0)
    program = ir.capture(case.network().eval(), (rows(*case.shape(case.hint)),), dynamic_shapes=case.dynamic)
    return PassManager(gw.CLEANUPS).run(program).program


@functools.cache
def planned(name: str, budget: Any = "25%", **options: Any) -> tuple[ir.Program, Any]:
    result = PassManager([SliceGroups(budget, **options)]).run(captured(name))
    return result.program, result.reports[-1]


@functools.cache
def executor(name: str, budget: Any) -> Executor:
    return Executor(planned(name, budget)[0])


def regions(program: ir.Program) -> list[ir.Node]:
    return [node for node in program.main.calls if node.target is ir.sliced]


def over_symbols(program: ir.Program) -> list[ir.Node]:
    """The regions whose slices are of a length known at the call only."""
    return [
        r for r in regions(program) if any(isinstance(o.meta["val"].size(d), torch.SymInt) for o, d in zip(r.args[4:], r.args[1]) if d >= 0)
    ]


def is_the_same(name: str, budget: Any, n: int) -> None:
    x = rows(*CASES[name].shape(n))
    kept = x.clone()
    (expected,) = run(captured(name), [x])[0]
    for (got,) in (run(planned(name, budget)[0], [x])[0], executor(name, budget)([x])[0]):
        assert got.shape == expected.shape and got.stride() == expected.stride()
        torch.testing.assert_close(got, expected, rtol=2e-5, atol=2e-5)  # float32, sums of up to 512 terms in other kernels
    assert torch.equal(x, kept)


# --- property 9: one plan, every size ---


@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize("name", CASES)
def test_one_plan_is_the_same_function_around_its_counts_and_far_beyond_capture(name: str, budget: str) -> None:
    case, program = CASES[name], planned(name, budget)[0]
    counts = {region.args[3] for region in regions(program) if isinstance(region.args[3], int)}
    sizes = {1, 2, 3, 13, case.hint - 1, case.hint, case.hint + 1, 211, *(n + d for n in counts for d in (-1, 0, 1))}
    for n in sorted(n for n in sizes if n >= case.low):
        is_the_same(name, budget, n)


@given(name=st.sampled_from(sorted(CASES)), budget=st.sampled_from(BUDGETS), n=st.integers(1, 300))
@settings(max_examples=120)
def test_one_plan_is_the_same_function_for_any_size(name: str, budget: str, n: int) -> None:
    is_the_same(name, budget, max(n, CASES[name].low))


@pytest.mark.parametrize("name", CASES)
def test_a_dynamic_axis_is_sliced_and_lowers_the_peak(name: str) -> None:
    program, report = planned(name)
    assert over_symbols(program) and profile(program.main).peak_bytes < profile(captured(name).main).peak_bytes
    assert profile(program.main).peak_bytes <= report.data["planned"]


@pytest.mark.parametrize("name", CASES)
def test_the_plan_is_exact_at_the_size_of_capture(name: str) -> None:
    verdict = check_exact(captured(name), planned(name)[0], random_inputs(captured(name)))
    assert verdict.kind == "right" or not verdict.fails and verdict.rewrite_error <= 1e-10, str(verdict)


@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize("name", CASES)
def test_no_question_of_the_planner_narrows_a_symbol(name: str, budget: str) -> None:
    symbols = planned(name, budget)[0].symbols
    assert not symbols.env.guards and not symbols.env.replacements


def test_an_axis_without_units_gives_what_the_whole_gives() -> None:
    program = ir.capture(FeedForward(), (rows(8, 16),), dynamic_shapes={"x": {0: Dim("n", min=0, max=64)}})
    after = PassManager([SliceGroups("25%")]).run(program).program
    assert over_symbols(after)
    assert Executor(after)([rows(0, 16)])[0][0].shape == run(after, [rows(0, 16)])[0][0].shape == (0, 16)


@pytest.mark.parametrize("batch", [0, 1, 2, 5])
@pytest.mark.parametrize("n", [1, 2, 24, 47])
def test_other_dims_may_be_dynamic_too(batch: int, n: int) -> None:
    after = two_dims()
    x = rows(batch, n, 16)
    torch.testing.assert_close(Executor(after)([x])[0][0], run(two_dims_captured(), [x])[0][0], rtol=2e-5, atol=2e-5)


@functools.cache
def two_dims_captured() -> ir.Program:
    torch.manual_seed(0)
    split = FeedForward(lambda x: x.view(x.shape[0], x.shape[1], 4, 4).transpose(2, 3).reshape(x.shape[0], x.shape[1], 16))
    return ir.capture(split, (rows(2, 24, 16),), dynamic_shapes={"x": {0: Dim("batch", min=0), 1: Dim("n", min=1, max=64)}})


@functools.cache
def two_dims() -> ir.Program:
    return PassManager([SliceGroups("25%", axes=("rows", "x:1"))]).run(two_dims_captured()).program


# --- counts ---


def test_a_share_keeps_the_number_of_slices() -> None:
    program, report = planned("feed-forward", "25%")
    (region,) = regions(program)
    count = region.args[3]
    assert 1 < count <= 24 and any(f"N=n n=min({count}, N)" in line for line in report.lines)


def test_bytes_keep_the_length_of_a_slice() -> None:
    program, report = planned("feed-forward", "9KiB")
    (region,) = regions(program)
    text = program.symbols.text(region.args[3].meta["val"])
    length = int(text.rpartition("// ")[2])
    assert length > 1 and text == f"(n + {length - 1}) // {length}"
    assert any(f"N=n n=ceil(N/{length})" in line for line in report.lines)


def test_the_report_says_at_which_sizes_it_planned() -> None:
    assert planned("feed-forward")[1].lines[-1] == "planned for the sizes of capture: n=24"


def test_max_slices_bounds_a_fixed_number_of_slices() -> None:
    for most in (2, 3, 5):
        assert [region.args[3] for region in regions(planned("feed-forward", "1B", max_slices=most)[0])] != []
        assert all(region.args[3] <= most for region in regions(planned("feed-forward", "1%", max_slices=most)[0]))


class Score(nn.Module):
    """One number a row: what a region gives weighs nothing beside what is inside it."""

    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(16, 1024), nn.Linear(1024, 1)

    def forward(self, x):
        return self.down(F.gelu(self.up(x)))


def test_with_a_budget_in_bytes_the_measured_peak_stays_within_it_for_any_size() -> None:
    budget = 512 * 2**10
    program = ir.capture(Score(), (rows(256, 16),), dynamic_shapes={"x": {0: Dim("n", min=1, max=2**20)}})
    after = Executor(PassManager([SliceGroups(budget)]).run(program).program)
    peaks = [measure_peak(lambda n=n: after([rows(n, 16)])).peak_bytes for n in (256, 1024, 4096, 8192)]
    inputs = [n * 16 * 4 for n in (256, 1024, 4096, 8192)]
    outputs = [n * 4 for n in (256, 1024, 4096, 8192)]
    inside = [peak - i - o for peak, i, o in zip(peaks, inputs, outputs)]
    assert all(n <= budget for n in inside), inside
    unsliced = measure_peak(lambda: Executor(program)([rows(8192, 16)])).peak_bytes
    assert unsliced > 16 * max(peaks)


def test_with_a_share_the_measured_peak_is_that_share_at_any_size() -> None:
    program = ir.capture(Score(), (rows(256, 16),), dynamic_shapes={"x": {0: Dim("n", min=1, max=2**20)}})
    after = Executor(PassManager([SliceGroups("25%")]).run(program).program)
    whole = Executor(program)
    for x in (rows(256, 16), rows(1024, 16), rows(4096, 16)):
        sliced, unsliced = (measure_peak(lambda x=x, f=f: f([x])).peak_bytes for f in (after, whole))
        assert sliced <= 0.26 * unsliced


# --- the text of a region ---

BEFORE = """graphwright 1
symbol n in [1, 5000] hint 24
weight @up : f32[64, 16] parameter "?"
weight @down : f32[16, 64] parameter "?"

function main {
  takes ((*), {})
  gives *
  input %x : f32[n, 16]
  %0 = aten.linear.default(%x, @up) : f32[n, 64]
  %1 = aten.gelu.default(%0) : f32[n, 64]
  %2 = aten.linear.default(%1, @down) : f32[n, 16]
  return %2
}
"""
AFTER_A_SHARE = """  %6 = gw.sliced(%x, @up, @down) in_dims=[0, -1, -1] out_dims=[0] count=8 : (f32[n, 16]) {
    input %0 : f32[(n + 7) // 8, 16]
    input %1 : f32[64, 16]
    input %2 : f32[16, 64]
    %3 = aten.linear.default(%0, %1) : f32[(n + 7) // 8, 64]
    %4 = aten.gelu.default(%3) : f32[(n + 7) // 8, 64]
    %5 = aten.linear.default(%4, %2) : f32[(n + 7) // 8, 16]
    return %5
  }
  %7 = getitem(%6, 0) : f32[n, 16]
  return %7
"""
AFTER_BYTES = """  %0 = aten.sym_size.int(%x, 0) : size(n)
  %1 = sym.add(%0, 4) : size(n + 4)
  %2 = sym.floordiv(%1, 5) : size((n + 4) // 5)
  %9 = gw.sliced(%x, @up, @down) in_dims=[0, -1, -1] out_dims=[0] count=%2 : (f32[n, 16]) {
    input %3 : f32[Min(5, n), 16]
    input %4 : f32[64, 16]
    input %5 : f32[16, 64]
    %6 = aten.linear.default(%3, %4) : f32[Min(5, n), 64]
    %7 = aten.gelu.default(%6) : f32[Min(5, n), 64]
    %8 = aten.linear.default(%7, %5) : f32[Min(5, n), 16]
    return %8
  }
  %10 = getitem(%9, 0) : f32[n, 16]
  return %10
"""


@pytest.mark.parametrize(("budget", "expected"), [("25%", AFTER_A_SHARE), ("4KiB", AFTER_BYTES)])
def test_the_region_is(budget: str, expected: str) -> None:
    after = PassManager([SliceGroups(budget)]).run(ir.parse(BEFORE)).program
    assert expected in str(after)


@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize("name", CASES)
def test_the_sliced_program_survives_its_text(name: str, budget: str) -> None:
    program, _ = planned(name, budget)
    again = ir.parse(str(program), weights=program.weights)
    ir.verify(again)
    assert again == program and str(again) == str(program)


@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize("name", CASES)
def test_two_plans_are_one_text(name: str, budget: str) -> None:
    assert str(PassManager([SliceGroups(budget)]).run(captured(name)).program) == str(planned(name, budget)[0])


@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize("name", CASES)
def test_no_size_of_a_body_is_a_bare_symbol(name: str, budget: str) -> None:
    """Sizes reach a body as operands, and none of those depends on the slice."""
    for region in regions(planned(name, budget)[0]):
        for node in ir.program.walk(ir.program.region_of(region).graph):
            flat, _ = torch.utils._pytree.tree_flatten((node.args, node.kwargs))
            assert not any(isinstance(value, torch.SymInt) for value in flat)


# --- the verifier ---

LITERAL = """graphwright 1
symbol n in [1, 5000] hint 24

function main {
  takes ((*), {})
  gives *
  input %x : f32[n, 16]
  %r = gw.sliced(%x) in_dims=[0] out_dims=[0] count=4 {
    input %a : f32[(n + 3) // 4, 16]
    %b = aten.view.default(%a, [SIZE, 16])
    return %b
  }
  %o = getitem(%r, 0)
  return %o
}
"""


def test_a_body_that_states_the_length_of_its_slice_is_refused_by_the_verifier() -> None:
    ir.verify(ir.parse(LITERAL.replace("SIZE", "-1")))
    with pytest.raises(VerifyError, match="the body of gw.sliced fails on a slice of 1 units"):
        ir.verify(ir.parse(LITERAL.replace("SIZE", "6")))


# --- statistics, one partial a slice ---

PARTIALS = """graphwright 1
symbol n in [1, 5000] hint 7

function main {
  takes ((*), {})
  gives *
  input %x : f32[2, 4, n, 5]
  %0 = gw.sliced(%x) in_dims=[2] out_dims=[0] count=3 : (f32[Min(3, n), 2, 2, 3]) {
    input %1 : f32[2, 4, (n + 2) // 3, 5] strides [20*n, 5*n, 5, 1]
    %2 = gw.norm_stats.default(%1, 2)
    return %2
  }
  %3 = getitem(%0, 0)
  %4 = gw.norm_apply.default(%x, %3, none, none, 2, 1e-05) : f32[2, 4, n, 5]
  return %4
}
"""


@pytest.mark.parametrize("n", [1, 2, 3, 4, 7, 31])
def test_there_are_as_many_partials_as_slices(n: int) -> None:
    program = ir.parse(PARTIALS)
    ir.verify(program)
    assert ir.parse(str(program)) == program and not program.symbols.env.guards
    x = rows(2, 4, n, 5)
    for got in (run(program, [x])[0][0], Executor(program)([x])[0][0]):
        # Merged statistics, and a kernel that multiplies once where the body divides first: a few roundings of float32.
        torch.testing.assert_close(got, F.group_norm(x, 2), rtol=1e-5, atol=1e-5)


# --- what is refused ---


def reasons(program: ir.Program, budget: str = "10%") -> tuple[ir.Program, str]:
    result = PassManager([SliceGroups(budget)]).run(program)
    return result.program, " ".join(left.reason for left in result.reports[-1].left)


def test_a_division_that_is_not_proved_ends_the_region_with_its_reason() -> None:
    torch.manual_seed(0)
    model = FeedForward(lambda x: F.silu(x), lambda h, x: h.view(-1, 4, 16).relu())
    shapes = {"x": {0: Dim("batch", min=1), 1: 4 * Dim("n", min=1, max=64)}}
    program = ir.capture(model, (rows(3, 32, 16),), dynamic_shapes=shapes)
    after, said = reasons(program)
    assert "sym-unproved: view [batch, 4*n, 16] -> [n*batch, 4, 16], dim 1 in 4*n units: equal factors are not proved" in said
    for batch, n in ((1, 4), (3, 32), (5, 36)):
        x = rows(batch, n, 16)
        torch.testing.assert_close(Executor(after)([x])[0][0], run(program, [x])[0][0], rtol=2e-5, atol=2e-5)


UNTOLD = """graphwright 1
symbol n in [1, 5000] hint 24

function main {
  takes ((*), {})
  gives *
  input %x : f32[n, 64, 16]
  %0 = aten.select.int(%x, 1, 0)
  %1 = aten.nonzero.default(%0)
  %2 = aten.select.int(%1, 1, 0)
  %3 = aten.index.Tensor(%x, [%2])
  %4 = aten.view.default(%3, [-1, 64, 4, 4])
  return %4
}
"""


def test_a_size_that_no_input_tells_never_reaches_a_body() -> None:
    program = ir.parse(UNTOLD)
    scene = Scene.of(program.main)
    view = program.main.calls[-1]
    refusal = scene.unknown_size(view, (Tag(1, 1),), 64)
    assert refusal is not None and refusal.reason == "sym-unproved" and "which no input tells" in refusal.detail
    assert scene.unknown_size(view, (Tag(0, 1),), view.meta["val"].size(0)) is None  # a slice's own length need not be stated


def test_a_body_that_does_not_type_check_is_refused_not_raised() -> None:
    """A weight that does not fit stands for whatever the table and torch might disagree on."""
    program = captured("feed-forward")
    prepared = prepare(program, "main")
    members = tuple(prepared.program.main.calls)
    region = PlannedRegion(members[0].meta["val"].size(1), 4, members, {m: (Tag(1, 1),) for m in members})
    assert unwritable(prepared, region) is None
    linear = members[0]
    linear.args = (linear.args[0], members[-1].args[1])
    stop = unwritable(prepared, region)
    assert stop is not None and stop.node is linear and stop.refusal.reason == "sym-unproved" and "on a slice: " in stop.refusal.detail


class BeforeACumsum(nn.Module):
    """What the cumsum reads and writes is more than a feed-forward in a few slices needs, so its region ends in fewer than it began."""

    def __init__(self):
        super().__init__()
        self.ff, self.wide = FeedForward(), nn.Linear(16, 64)

    def forward(self, x):
        return self.wide(self.ff(x)).flatten(1).cumsum(1)


def test_a_region_that_its_final_count_makes_unwritable_is_dropped() -> None:
    program = ir.capture(BeforeACumsum().eval(), (rows(1, 48, 16),), dynamic_shapes={"x": {1: Dim("n", min=1, max=99)}})
    asked: list[tuple[PlannedRegion, int]] = []

    def refused(region: PlannedRegion) -> Stop | None:
        known = any(region is other for other, _ in asked)
        asked.append((region, region.count))
        return Stop(region.members[0], Refusal("sym-unproved", "asked again")) if known else None

    plan = Planner(Scene.of(program.main), 1, 64, frozenset({"rows"}), refused=refused).plan()
    again = [region for region, count in asked if any(region is other and count != first for other, first in asked)]
    assert again and not any(region is dropped for region in plan.regions for dropped in again)


SIZES = """graphwright 1
symbol b in [1, 99] hint 3
symbol n in [1, 5000] hint 24

function main {
  takes ((*), {})
  gives *
  input %x : f32[b, 2*n]
  %0 = aten.relu.default(%x)
  %1 = aten.relu.default(%0)
  return %1
}
"""
EXPRESSIONS = {
    "b": lambda b, n: b,
    "n": lambda b, n: n,
    "2*n": lambda b, n: 2 * n,
    "3*n": lambda b, n: 3 * n,
    "n + 2": lambda b, n: n + 2,
    "b*n": lambda b, n: b * n,
    "n // 2": lambda b, n: n // 2,
    "n % 5": lambda b, n: n % 5,
    "b*b": lambda b, n: b * b,
    "Min(4, n)": lambda b, n: torch.sym_min(n, 4),
    "(b*n + 7) // 8": lambda b, n: (b * n + 7) // 8,
}


@pytest.mark.parametrize("text", EXPRESSIONS)
def test_a_size_is_computed_from_those_of_the_inputs(text: str) -> None:
    program = ir.parse(SIZES)
    wanted = EXPRESSIONS[text](program.symbols.size("b"), program.symbols.size("n"))
    first, last = program.main.calls
    rewriter = ir.Rewriter(program, pass_name="by-hand")
    sizes = SizeNodes(program.main.placeholders)
    with rewriter.step("size"):
        node = sizes.node(rewriter, wanted, first)
        assert sizes.node(rewriter, wanted, last) is node  # what stands there already serves
    assert program.symbols.text(node.meta["val"]) == text
    seen = {}
    run(program, [rows(5, 22)], observe=lambda node, value: seen.setdefault(node, value))
    assert seen[node] == EXPRESSIONS[text](5, 11)


# --- networks ---


def tokens(length: int) -> tuple:
    return (torch.randint(0, 50, (1, length), generator=torch.Generator().manual_seed(length)),)


def latents(batch: int) -> tuple:
    generator = torch.Generator().manual_seed(batch)
    return torch.randn(batch, 4, 8, 8, generator=generator), torch.arange(batch) * 100, torch.arange(batch) % 3


def clips(batch: int) -> tuple:
    generator = torch.Generator().manual_seed(batch)
    return torch.randn(batch, 4, 4, 8, 8, generator=generator), torch.tensor(500), torch.randn(batch, 5, 24, generator=generator)


NETWORKS = {
    "decoder": (tokens, 16, [{1: Dim("length", min=1, max=64)}], (1, 2, 5, 16, 17, 64)),
    "dit": (latents, 2, [{0: Dim("batch", min=1)}] * 3, (1, 2, 3, 7)),
    "video_unet": (clips, 2, [{0: Dim("batch", min=1)}, None, {0: Dim("batch", min=1)}], (1, 2, 5)),
}


@pytest.mark.parametrize(("name", "budget"), [("decoder", "40%"), ("decoder", "24KiB"), ("dit", "40%"), ("video_unet", "400KiB")])
def test_a_network_with_a_dynamic_input_is_sliced_for_every_size(name: str, budget: str) -> None:
    make, hint, shapes, sizes = NETWORKS[name]
    torch.manual_seed(0)
    model, _, _ = gw.models.load(name, "tiny")
    program = PassManager(gw.CLEANUPS).run(ir.capture(model.eval(), make(hint), dynamic_shapes=tuple(shapes))).program
    after = PassManager([SliceGroups(budget)]).run(program).program
    assert over_symbols(after) and profile(after.main).peak_bytes < profile(program.main).peak_bytes
    assert ir.parse(str(after), weights=after.weights) == after
    ours = Executor(after)
    for size in sizes:
        inputs = list(make(size))
        for got, want in zip(ours(inputs)[0], run(program, inputs)[0], strict=True):
            assert got.stride() == want.stride()
            torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)  # float32, some ten layers deep


# --- the whole way ---


@pytest.mark.parametrize(
    "backend", ["aten", pytest.param("inductor", marks=pytest.mark.skipif(not has_cpp_compiler(), reason="install g++"))]
)
@pytest.mark.parametrize("budget", BUDGETS)
def test_a_compiled_model_takes_any_size_and_so_does_its_artifact(tmp_path, budget: str, backend: str) -> None:
    torch.manual_seed(0)
    model = Attention(causal=True).eval()
    dynamic = {"x": {1: Dim("n", min=1, max=5000)}}
    options: Any = dict(example_inputs=(rows(2, 24, 16),), dynamic_shapes=dynamic, backend=backend, verify="numeric")
    compiled = gw.compile(model, [SliceGroups(budget)], **options)
    compiled.save(tmp_path / "model.gw")
    loaded = gw.load(tmp_path / "model.gw")
    assert over_symbols(compiled.program) and str(loaded.program) == str(compiled.program)
    assert "gw.sliced" in str(gw.diff(compiled.history[0], compiled.program))
    for n in (1, 2, 23, 24, 25, 97):
        x = rows(2, n, 16)
        for ours in (compiled, loaded):
            torch.testing.assert_close(ours(x), model(x), rtol=2e-5, atol=2e-5)  # float32, other kernels
