"""The memory meter sees every allocation that was made while it watched, and nothing else."""

import pytest
import torch

import graphwright as gw
from graphwright.ir.liveness import format_bytes, profile
from graphwright.passes.manager import PassReport
from graphwright.runtime import prediction
from graphwright.runtime.backend import has_cpp_compiler
from graphwright.runtime.memory import Measurement, measure_peak
from graphwright.runtime.report import Memory, Report, Threads

KIB = 1024


def block(kib):
    return torch.empty(kib * KIB, dtype=torch.uint8)


def test_blocks_that_live_together_add_up():
    def run():
        a, b = block(100), block(50)
        return a, b

    assert measure_peak(run).peak_bytes == 150 * KIB


def test_blocks_that_follow_one_another_do_not():
    def run():
        for kib in (70, 100, 80):
            block(kib)

    assert measure_peak(run).peak_bytes == 100 * KIB


def test_the_peak_may_lie_in_the_middle():
    def run():
        a = block(10)
        b, c = block(200), block(30)
        del b, c
        return a, block(20)

    measured = measure_peak(run)
    assert (measured.peak_bytes, measured.kept_bytes) == (240 * KIB, 30 * KIB)


def test_what_was_there_before_counts_for_nothing_even_when_it_is_freed():
    held = [block(1000)]

    def run():
        held.clear()
        return block(10)

    assert measure_peak(run).peak_bytes == 10 * KIB


def test_what_an_earlier_measurement_kept_counts_for_nothing_when_it_is_freed():
    held = []
    measure_peak(lambda: held.append(block(1000)))

    def run():
        a = block(30)
        held.clear()
        return a, block(20)

    measured = measure_peak(run)
    assert (measured.peak_bytes, measured.kept_bytes) == (50 * KIB, 50 * KIB)


def test_scratch_inside_a_kernel_is_seen():
    x = torch.randn(1, 64, 64)
    # The math form of attention materialises its scores; its output alone is one x.
    mask = torch.zeros(64, 64)
    measured = measure_peak(lambda: torch.ops.aten._scaled_dot_product_attention_math(x, x, x, mask))
    assert measured.peak_bytes >= 3 * 64 * 64 * 4


@pytest.mark.skipif(not has_cpp_compiler(), reason="no C++ compiler: install g++")
def test_allocations_of_compiled_code_are_seen():
    from torch._inductor.compile_fx import compile_fx

    def two_matmuls(x):
        return [(x @ x).relu() @ x]

    x = torch.randn(64, 64)
    with torch.no_grad():
        compiled = compile_fx(torch.fx.symbolic_trace(two_matmuls), [x])
        compiled(x)
        assert measure_peak(lambda: compiled(x)).peak_bytes == 2 * 64 * 64 * 4


def test_time_is_measured_only_on_demand():
    assert measure_peak(lambda: None).seconds is None
    assert measure_peak(lambda: None, timed=True).seconds > 0


class Wide(torch.nn.Module):
    """Two gated feed-forward blocks, and a product over all rows that no slicing of rows passes."""

    def __init__(self):
        super().__init__()
        self.blocks = torch.nn.ModuleList(torch.nn.Linear(16, 128) for _ in range(2))
        self.downs = torch.nn.ModuleList(torch.nn.Linear(64, 16) for _ in range(2))

    def forward(self, x):
        for up, down in zip(self.blocks, self.downs, strict=True):
            gate, value = up(x).chunk(2, -1)
            x = x + down(torch.nn.functional.gelu(gate) * value)
            x = x @ (x.T @ x) / 512
        return x


@pytest.mark.skipif(not has_cpp_compiler(), reason="no C++ compiler: install g++")
@pytest.mark.parametrize("passes", [[], [gw.SliceGroups(memory_budget="30%")]], ids=["whole", "sliced"])
def test_the_peak_of_compiled_code_is_foreseen(passes):
    x = torch.randn(512, 16)
    model = gw.compile(Wide(), passes, example_inputs=(x,), backend="inductor")
    measured = model.measure(x).peak_bytes
    foreseen = model.report().memory.compiled
    assert foreseen is not None
    assert abs(foreseen - measured) <= 0.05 * measured
    assert f"predicted, compiled {format_bytes(foreseen)}" in str(model.report())


@pytest.mark.skipif(not has_cpp_compiler(), reason="no C++ compiler: install g++")
def test_each_compiled_piece_is_metered_once(monkeypatch):
    metered = []
    monkeypatch.setattr(prediction, "measure_peak", lambda run: (metered.append(run), measure_peak(run))[1])
    x = torch.randn(512, 16)
    model = gw.compile(Wide(), [gw.SliceGroups(memory_budget="30%")], example_inputs=(x,), backend="inductor")
    count = len(metered)
    model.measure(x)
    assert len(metered) == count > 0


@pytest.mark.skipif(not has_cpp_compiler(), reason="no C++ compiler: install g++")
def test_a_profiler_that_is_running_is_left_alone():
    x = torch.randn(512, 16)
    with torch.profiler.profile() as trace:
        x.sin()
        model = gw.compile(Wide(), [gw.SliceGroups(memory_budget="30%")], example_inputs=(x,), backend="inductor")
        with pytest.raises(gw.InputError, match="profiler, which is running already"):
            model.measure(x)
        assert model.report().memory.compiled is None
        x.cos()
    assert {"aten::sin", "aten::cos"} <= {event.key for event in trace.key_averages()}


class LookUp(torch.nn.Module):
    """A row that an index of one does not find, and two products that no compiler fuses."""

    def __init__(self):
        super().__init__()
        self.register_buffer("table", torch.randn(1, 16))
        self.up, self.down = torch.nn.Linear(16, 256), torch.nn.Linear(256, 16)

    def forward(self, index):
        return self.down(self.up(self.table[index]))


@pytest.mark.skipif(not has_cpp_compiler(), reason="no C++ compiler: install g++")
def test_the_peak_of_code_that_does_not_run_on_ones_is_that_of_its_operations():
    index = torch.zeros(512, dtype=torch.int64)
    model = gw.compile(LookUp(), example_inputs=(index,), backend="inductor")
    measured = model.measure(index).peak_bytes
    foreseen = model.report().memory.compiled
    assert foreseen is not None
    assert measured <= foreseen <= 1.1 * measured


class Convolutional(torch.nn.Module):
    """Convolutions that Inductor computes in another layout, into copies that library kernels need not make."""

    def __init__(self):
        super().__init__()
        self.first, self.second = torch.nn.Conv2d(16, 48, 3, padding=1), torch.nn.Conv2d(48, 16, 3, padding=1)
        self.noise = False

    def forward(self, x):
        for _ in range(2):
            x = x + self.second(torch.nn.functional.silu(self.first(x)))
        return x * torch.rand(1) if self.noise else x


@pytest.mark.skipif(not has_cpp_compiler(), reason="no C++ compiler: install g++")
def test_compiled_code_keeps_to_the_plan_of_a_sliced_program():
    x = torch.randn(8, 16, 24, 24)
    model = gw.compile(Convolutional().eval(), [gw.SliceGroups(memory_budget="30%")], example_inputs=(x,), backend="inductor")
    measured = model.measure(x).peak_bytes
    planned = model.report().memory.planned
    assert planned is not None
    assert measured <= planned


@pytest.mark.skipif(not has_cpp_compiler(), reason="no C++ compiler: install g++")
def test_compiling_a_sliced_program_draws_no_random_numbers():
    x = torch.randn(8, 16, 24, 24)
    net = Convolutional().eval()
    net.noise = True
    before = torch.get_rng_state()
    gw.compile(net, [gw.SliceGroups(memory_budget="30%")], example_inputs=(x,), backend="inductor")
    assert torch.equal(torch.get_rng_state(), before)


class Attention(torch.nn.Module):
    def forward(self, q):
        return torch.nn.functional.scaled_dot_product_attention(q, q, q)


@pytest.mark.parametrize("threads", [1, 2, 4])
def test_a_report_foresees_the_scratch_of_the_threads_that_it_was_measured_with(threads):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        q = torch.randn(1, 8, 512, 16)
        compiled = gw.compile(Attention(), example_inputs=(q,), backend="aten")
        measured = compiled.measure(q).peak_bytes
    finally:
        torch.set_num_threads(before)
    memory = compiled.report().memory
    foreseen = memory.planned if memory.threads is None else memory.threads.peak_bytes
    assert (memory.threads is None) == (threads == 2)
    assert abs(foreseen - measured) <= 0.05 * measured
    assert memory.planned == profile(compiled.program.main).peak_bytes  # one program, one plan, on any machine


def report(measured, planned, *, budget=None, compiled=None, threads=None):
    passes = (
        [] if budget is None else [PassReport("slice-groups", gw.Contract.EXACT, data={"budget": budget, "planned": planned, "floor": 0})]
    )
    memory = Memory(unsliced=4 * planned, planned=planned, compiled=compiled, threads=threads)
    return str(Report("slice-groups", gw.Contract.EXACT, "aten", passes, memory, Measurement(measured, 0)))


def after_the_peak(text):
    lines = text.splitlines()
    (place,) = [i for i, line in enumerate(lines) if line.startswith("peak memory: ")]
    return lines[place + 1]


def test_a_report_says_where_the_plan_was_not_kept():
    said = "measured is 7.0 x the plan: a kernel's scratch is not in the model"
    assert after_the_peak(report(70 * KIB, 10 * KIB)) == said
    assert after_the_peak(report(70 * KIB, 10 * KIB, budget=12 * KIB)) == f"{said}; the budget of 12.00 KiB is not met"


def test_a_report_says_where_a_budget_was_met_in_the_plan_only():
    assert after_the_peak(report(103 * KIB, 100 * KIB, budget=101 * KIB)) == "the budget of 101.00 KiB is not met"


def test_a_report_tells_the_scratch_of_more_threads_from_what_is_unknown():
    said = "measured is 2.0 x the plan: plans are for 2 threads, and kernels take more scratch on 16 threads"
    text = report(20 * KIB, 10 * KIB, threads=Threads(16, 20 * KIB))
    assert after_the_peak(text) == said
    assert "predicted, planned, on 16 threads 20.00 KiB; measured" in text
    assert "not in the model" in after_the_peak(report(30 * KIB, 10 * KIB, threads=Threads(16, 20 * KIB)))


def test_a_report_tells_compiled_code_from_kernels():
    said = "measured is 1.20 x the plan: compiled code allocates more than its operations"
    assert after_the_peak(report(120 * KIB, 100 * KIB, compiled=120 * KIB)) == said


@pytest.mark.parametrize(("measured", "budget"), [(104 * KIB, None), (100 * KIB, 100 * KIB), (104 * KIB, 90 * KIB)])
def test_a_report_whose_figures_agree_says_nothing_of_it(measured, budget):
    assert after_the_peak(report(measured, 100 * KIB, budget=budget)).startswith("time: ")


def test_the_scratch_of_a_kernel_without_a_rule_is_reported():
    x = torch.randn(8, 128, 64)
    net = torch.nn.LSTM(64, 64, batch_first=True).eval()
    model = gw.compile(net, [gw.SliceGroups(memory_budget="512KiB")], example_inputs=(x,), backend="aten")
    model.measure(x)
    line = after_the_peak(str(model.report()))
    assert line.startswith("measured is ") and line.endswith("; the budget of 512.00 KiB is not met")
