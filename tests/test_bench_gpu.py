"""`bench/gpu.py` where there is no GPU: kernels run in Triton's interpreter beside their peers, whose times mean nothing here; what fails is a
note, and the summary counts what reaches its bar."""

import json
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent.parent / "bench")]

import gpu  # noqa: E402
import gpu_bars  # noqa: E402
import gpu_run  # noqa: E402
from harness import Bench, Row  # noqa: E402

from graphwright.codegen.triton.roofline import Machine  # noqa: E402

CPU = torch.device("cpu")
MACHINE = Machine("a machine", 1e9, 1e9, {"float32": 1e9})
SCALED = (lambda x, s: F.relu(x * s), [torch.randn(8, 16), torch.randn(16)])
PRODUCT = (lambda x, w, b: F.relu(F.linear(x, w, b)), [torch.randn(8, 16), torch.randn(12, 16), torch.randn(12)])


@pytest.fixture(autouse=True)
def on_a_cpu(one_thread, monkeypatch):
    monkeypatch.setattr(gpu, "DEVICE", CPU)
    yield
    torch.use_deterministic_algorithms(False)


def bench_of(*argv: str) -> Bench:
    argv = ["--quick", "--device", "cpu", "--skip", "torch.compile,reduce-overhead,max-autotune", *argv]
    return Bench("gpu", gpu.PEERS, argv=argv, add_arguments=gpu.add_arguments)


def measure(bench: Bench, **families) -> None:
    for name, (function, args) in families.items():
        gpu_run.run_case(bench, name, partial(gpu.kernel_row, bench, MACHINE, name, function, args))


def test_a_kernel_is_held_against_a_copy_and_a_product_against_the_librarys():
    bench = bench_of()
    measure(bench, scaled=SCALED, product=PRODUCT)
    scaled, product = bench.rows
    assert bench.failed == []
    assert {*scaled.peers} == {"eager", "roofline", "copy"} and {*product.peers} == {"eager", "roofline", "library"}
    assert scaled.peers["copy"] == pytest.approx((2 * 8 * 16 + 16) * 4 / MACHINE.bandwidth)
    assert not torch.are_deterministic_algorithms_enabled(), "peers do not fill the memory that they take"


A, B = torch.randn(8, 16), torch.randn(16, 12)
PRODUCTS = {
    "a bias, a residual and an activation": (lambda: 2 * F.gelu(F.linear(A, B.T.contiguous(), torch.ones(12))), [A @ B]),
    "gate and up": (lambda: F.silu(A @ B) * (A @ (B + 1)), [A @ B, A @ (B + 1)]),
    "factors": (lambda: torch.addmm(torch.ones(12), A, B, beta=2.0, alpha=3.0), [A @ B]),
    "batches": (lambda: torch.baddbmm(torch.ones(1), A[None], B[None]), [(A @ B)[None]]),
    "integers": (lambda: torch._int_mm(A.char(), B.char()) * 0.5, [torch._int_mm(A.char(), B.char())]),
    "none": (lambda: A + 1, []),
}


@pytest.mark.parametrize("name", PRODUCTS)
def test_products_are_taken_without_what_surrounds_them(name):
    function, expected = PRODUCTS[name]
    calls = gpu_bars.products_of(function, [])
    assert len(calls) == len(expected)
    for call, exact in zip(calls, expected, strict=True):
        torch.testing.assert_close(call(), exact)


def test_a_peer_that_fails_is_a_note_and_the_others_are_measured():
    def fails():
        raise RuntimeError("no such kernel\nand more")

    bench = bench_of()
    assert {*gpu_run.peer_seconds(bench, "case", CPU, {"eager": lambda: fails, "library": fails, "roofline": lambda: lambda: 1})} == {
        "roofline"
    }
    assert bench.notes == [
        "case: eager cannot run it, RuntimeError: no such kernel",
        "case: library cannot run it, RuntimeError: no such kernel",
    ]


def test_a_peer_that_is_left_out_is_not_made():
    assert gpu_run.peer_seconds(bench_of(), "case", CPU, {"max-autotune": lambda: pytest.fail("was made")}) == {}


def test_a_case_of_ours_that_fails_is_not_the_end_but_an_error_at_the_end(monkeypatch, tmp_path):
    def differs(kernel):
        raise AssertionError("output 0 differs")

    bench = bench_of("--json", str(tmp_path / "rows.json"))
    with monkeypatch.context() as patched:
        patched.setattr(gpu, "load", differs)
        measure(bench, wrong=SCALED)
    measure(bench, right=SCALED)
    assert [row.case for row in bench.rows] == ["right"] and "wrong: FAILED, AssertionError: output 0 differs" in bench.notes
    saved = json.loads((tmp_path / "rows.json").read_text())
    assert [row["case"] for row in saved["rows"]] == ["right"]
    with pytest.raises(SystemExit, match="1 failed: wrong"):
        gpu_run.end(bench)


def test_when_the_time_is_spent_the_rest_is_named():
    bench = bench_of("--minutes", "0")
    measure(bench, late=SCALED)
    assert bench.rows == [] and bench.failed == [] and bench.notes == ["late: left out, the 0 minutes are spent"]


def test_the_summary_counts_what_reaches_its_bar():
    bench = bench_of()
    bench.rows += [
        Row("a", "time", "s", 1.0, {"copy": 0.95, "eager": 2.0}),
        Row("b", "time", "s", 1.0, {"copy": 0.5}),
        Row("c", "time", "s", 2.0, {"library": 1.8}),
        Row("c", "error", "1", 1.0, {"library": 1.0}),
        Row("d", "time", "s", 1.0, {"eager": 1.0}),
    ]
    gpu_bars.summary(bench)
    assert bench.notes == [
        "b: 0.50 of the rate of a copy",
        "a: 0.95 of the rate of a copy",
        "1 of 2 kernels reach 0.9 of the rate of a copy",
        "c: 0.90 of the rate of the library's products alone",
        "1 of 1 kernels reach 0.9 of the rate of the library's products alone",
    ]


def test_networks_are_held_against_eager_and_every_mode_of_torch_compile():
    bench = bench_of()
    bench.options.skip = ""
    made: list[str] = []
    gpu_run.run_case(bench, "vit", partial(network_with, made, bench))
    assert made == ["torch.compile", "reduce-overhead", "max-autotune"] and [*bench.rows[0].peers] == ["eager", *made]
    assert bench.failed == []
    assert bench.rows[1].metric == "error" and bench.rows[1].ours < 0.05


def network_with(made: list[str], bench: Bench) -> None:
    """A row of the smallest network, ours by library kernels and torch.compile without a compiler."""
    real, compile_ = gpu.gw.compile, torch.compile

    def compiled(module, mode=None):
        made.append(next(peer for peer, each in gpu.COMPILED.items() if each == mode))
        return compile_(module, backend="eager")

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(gpu.gw, "compile", lambda *args, backend, **kwargs: real(*args, backend="aten", **kwargs))
        patched.setattr(torch, "compile", compiled)
        gpu.network_row(bench, "vit", "tiny", torch.bfloat16)
