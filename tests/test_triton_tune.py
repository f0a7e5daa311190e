"""The fastest tile is taken, timed once for each kernel, bucket of sizes and device, and a product that the library computes faster with
kernels around it is the library's.

Times are given by the tests; what is timed runs in the interpreter.
"""

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).parent))

from triton_kernels import TOLERANCE, assert_close, capture, double, kernel_of, run  # noqa: E402

from graphwright.codegen.triton import tune  # noqa: E402
from graphwright.codegen.triton.targets import DEFAULT  # noqa: E402
from graphwright.codegen.triton.tune import Tuner, device_seconds  # noqa: E402
from graphwright.runtime.flat import FlatGraph  # noqa: E402
from graphwright.runtime.lowering import lower  # noqa: E402
from graphwright.runtime.triton_lowering import TritonLowering  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def seeded(one_thread):
    torch.manual_seed(0)


class Clock:
    """Gives the times in turn; the last one for all that follow."""

    def __init__(self, *seconds):
        self.seconds, self.asked = list(seconds), 0

    def __call__(self, function, device, runs=1):
        function()
        self.asked += 1
        return self.seconds[min(self.asked, len(self.seconds)) - 1]


def randn(*shape, dtype=torch.float32):
    return torch.randn(shape, dtype=dtype)


def product(rows=20):
    return capture(lambda x, w: F.relu(x @ w), [randn(rows, 32), randn(32, 48)])


def test_the_fastest_tile_is_taken(monkeypatch):
    monkeypatch.setattr(tune, "device_seconds", Clock(3.0, 1.0, 2.0))
    program = product()
    tuner = Tuner(CPU, DEFAULT, None)
    default = kernel_of(program)
    kernel = tuner.kernel(default.plan, program.symbols, {})
    assert kernel.tile == list(tuner._candidates(default.plan))[1] != default.tile
    assert "(default)" in default.source and "(default)" not in kernel.source
    args = [randn(20, 32), randn(32, 48)]
    assert_close(run(kernel, program, args)[0], F.relu(double(args)[0] @ double(args)[1]), TOLERANCE[torch.float32])


def test_a_kernel_is_timed_once_in_a_process_and_once_in_all(monkeypatch, cache):
    clock = Clock(2.0, 1.0, 3.0)
    monkeypatch.setattr(tune, "device_seconds", clock)
    program = product()
    plan = kernel_of(program).plan
    tuner = Tuner(CPU, DEFAULT, cache)
    first = tuner.kernel(plan, program.symbols, {})
    asked = clock.asked
    assert asked > 1 and tuner.kernel(plan, program.symbols, {}).tile == first.tile
    assert Tuner(CPU, DEFAULT, cache).kernel(plan, program.symbols, {}).tile == first.tile
    assert clock.asked == asked
    assert [entry.kind for entry in cache.entries()] == ["tuning"]


def test_sizes_of_one_power_of_two_share_a_choice_and_others_do_not(monkeypatch, cache):
    clock = Clock(2.0, 1.0, 3.0)
    monkeypatch.setattr(tune, "device_seconds", clock)

    def tuned(rows):
        dim = torch.export.Dim("rows", min=2, max=4096)
        program = capture(lambda x: F.gelu(x) * 2.0, [randn(rows, 33)], dynamic_shapes=({0: dim},))
        Tuner(CPU, DEFAULT, cache).kernel(kernel_of(program).plan, program.symbols, {})
        return clock.asked

    assert tuned(100) == tuned(101) < tuned(1000)


def test_a_damaged_choice_is_made_anew(monkeypatch, cache):
    program = product()
    kernel = kernel_of(program)
    tuner = Tuner(CPU, DEFAULT, cache)
    for damaged in (b"", b"[1]", b'{"m": 1}', b"\xff"):
        monkeypatch.setattr(tune, "device_seconds", Clock(2.0, 1.0, 3.0))
        cache.put("tuning", tuner._key(kernel), damaged)
        assert Tuner(CPU, DEFAULT, cache).kernel(kernel.plan, program.symbols, {}).tile != kernel.tile


def test_a_tile_with_wrong_results_is_not_taken_and_named(monkeypatch, caplog):
    program = product()
    default = kernel_of(program)
    wrong = list(Tuner(CPU, DEFAULT, None)._candidates(default.plan))[1]
    sound = tune.load

    def load(kernel):
        module = sound(kernel)
        if kernel.tile != wrong:
            return module
        return SimpleNamespace(**{**vars(module), "run": lambda *inputs: tuple(y + 1.0 for y in module.run(*inputs))})

    monkeypatch.setattr(tune, "load", load)
    monkeypatch.setattr(tune, "device_seconds", Clock(2.0, 3.0))
    assert Tuner(CPU, DEFAULT, None).kernel(default.plan, program.symbols, {}).tile == default.tile
    assert f"tile {wrong} of kernel matmul_relu gives wrong results" in caplog.text


def test_where_no_tile_works_there_is_no_kernel_and_that_is_known(monkeypatch, cache, caplog):
    caplog.set_level("INFO")
    sound = tune.load
    monkeypatch.setattr(tune, "load", lambda kernel: SimpleNamespace(**{**vars(sound(kernel)), "error_of": lambda y, exact: 1.0}))
    program = product()
    plan = kernel_of(program).plan
    assert Tuner(CPU, DEFAULT, cache).kernel(plan, program.symbols, {}) is None
    assert "gives wrong results" in caplog.text
    monkeypatch.setattr(tune, "_works", lambda *args: pytest.fail("timed again"))
    assert Tuner(CPU, DEFAULT, cache).kernel(plan, program.symbols, {}) is None
    calls, run_graph = lowered(program, cache)
    assert calls == ["aten.matmul.default", "aten.relu.default"]


def test_a_tile_that_does_not_compile_is_passed_over(monkeypatch, caplog):
    caplog.set_level("INFO")
    program = product()
    default = kernel_of(program)
    sound = tune.load

    def load(kernel):
        def run(*inputs):
            raise RuntimeError("PassManager::run failed")

        module = sound(kernel)
        return module if kernel.tile == default.tile else SimpleNamespace(**{**vars(module), "run": run})

    monkeypatch.setattr(tune, "load", load)
    assert Tuner(CPU, DEFAULT, None).kernel(default.plan, program.symbols, {}).tile == default.tile
    assert "is not used: PassManager::run failed" in caplog.text


def test_rows_and_pointwise_kernels_have_tiles_to_choose_from():
    for function, args in (
        (lambda x: F.softmax(x, -1), [randn(7, 100)]),
        (lambda x: F.gelu(x), [randn(300)]),
    ):
        program = capture(function, args)
        plan = kernel_of(program).plan
        tuner = Tuner(CPU, DEFAULT, None)
        tiles = list(tuner._candidates(plan))
        assert len(set(tiles)) == len(tiles) > 2
        kernel = tuner.kernel(plan, program.symbols, {})
        assert_close(run(kernel, program, args)[0], function(*double(args)), TOLERANCE[torch.float32])


def lowered(program, cache=None):
    lowering = TritonLowering(program.main.graph, program.symbols, interpreted=True, tune=True, cache=cache)
    graph = lower(program.main.graph, lowering)
    return [str(node.target) for node in graph.nodes if node.op == "call_function"], FlatGraph(graph)


@pytest.mark.parametrize("library", [True, False])
def test_a_product_is_the_librarys_where_that_is_faster_with_kernels_around_it(monkeypatch, cache, library):
    def function(x, w, b, r):
        return r + F.gelu(F.linear(x, w, b)) * 2.0

    args = [randn(2, 16, 32, dtype=torch.bfloat16), *(randn(*s, dtype=torch.bfloat16) for s in ((48, 32), (48,), (2, 16, 48)))]
    program = capture(function, args)
    asked = []

    def clock(run_it, device, runs=1):
        run_it()
        asked.append(run_it)
        return 0.5 if library and "other" in run_it.__code__.co_freevars else 1.0

    monkeypatch.setattr(tune, "device_seconds", clock)
    calls, run_graph = lowered(program, cache)
    assert any("linear" in call and "aten" in call for call in calls) == library
    assert sum(call.startswith("kernel") for call in calls) == 1
    assert_close(run_graph(list(args))[0], function(*double(args)), 4 * TOLERANCE[torch.bfloat16])
    before = len(asked)
    assert lowered(program, cache)[0] == calls and len(asked) == before, "the verdict is kept"


def test_the_clock_of_a_cpu_counts_seconds():
    assert 0 < device_seconds(lambda: torch.ones(10).sum(), CPU) < 1
