"""Triton kernels on a GPU: each family checked and timed, and networks against eager and torch.compile.

A kernel's time is the device's, from a recorded CUDA graph, so that no launch is waited for; its peers are the same function in eager, as
torch.compile makes it (by default and with max-autotune), the roofline: the bytes that it must move at the measured rate of a copy, or
the products that it must compute at the measured rate of a large one, whichever takes longer; and what it aims at (`gpu_bars.py`): the
library's products alone ("library"), or that copy ("copy"). Networks are called as a user calls them;
torch.compile's mode "reduce-overhead" is its default with CUDA graphs, and "max-autotune" has them too. Low-rank layers are timed
beside the bfloat16 linear layer that they replace ("eager"), attention over caches beside attention on the live slots alone, over
a chunked recurrence beside attention on all tokens, and mixtures of experts beside torch's grouped and batched products.

A peer that fails is a note; a case of ours that fails is one too, and makes the exit status 1. max-autotune takes most of the time, some
minutes a network: --skip max-autotune where a machine is rented for half an hour.

python bench/gpu.py [--quick] [--only kernels|low_rank|caches|rat|experts|networks] [--kernels NAME;..] [--networks NAME,..]
    [--sizes small,base] [--skip max-autotune,..] [--minutes M] [--json FILE]
"""

import argparse
import functools
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).parent))

import gpu_bars  # noqa: E402
import gpu_experts  # noqa: E402
import gpu_kv_cache  # noqa: E402
import gpu_low_rank  # noqa: E402
import gpu_rat  # noqa: E402
from gpu_run import attempt, compiled_call, end, peer_seconds, run_case  # noqa: E402
from harness import Bench, synchronize  # noqa: E402

import graphwright as gw  # noqa: E402
from graphwright import ir, models  # noqa: E402
from graphwright.codegen.triton import emit, plan  # noqa: E402
from graphwright.codegen.triton.launch import load  # noqa: E402
from graphwright.codegen.triton.matmul_plan import MatmulPlan  # noqa: E402
from graphwright.codegen.triton.plan import is_known  # noqa: E402
from graphwright.codegen.triton.roofline import Machine  # noqa: E402
from graphwright.codegen.triton.targets import target_of  # noqa: E402
from graphwright.codegen.triton.tune import Tuner, device_seconds  # noqa: E402
from graphwright.codegen.triton.views import base  # noqa: E402

COMPILED = {"torch.compile": None, "reduce-overhead": "reduce-overhead", "max-autotune": "max-autotune"}
PEERS = dict.fromkeys(("eager", *COMPILED, "roofline", *gpu_bars.BARS), "torch")
DEVICE = torch.device("cuda", 0)
NETWORKS = ("decoder", "dit", "vit", "video_unet")
Function = Callable[..., Any]


def rotated(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    first, second = x.chunk(2, -1)
    return x * cos + torch.cat([-second, first], -1) * sin


def families(half: Callable[..., torch.Tensor]) -> dict[str, tuple[Function, list[torch.Tensor]]]:
    """Every kernel family, as (function, arguments) at sizes of networks that people run. `half(*shape)` makes a bfloat16 tensor."""
    return {
        "residual, layer_norm, modulation": (
            lambda x, h, a, b: ((y := x + h), F.layer_norm(y, (1152,)) * (1 + a[:, None]) + b[:, None]),
            [half(64, 1024, 1152), half(64, 1024, 1152), half(64, 1152), half(64, 1152)],
        ),
        "residual, rms_norm": (
            lambda x, h, w: ((y := x + h), F.rms_norm(y, (8192,), w, 1e-5)),
            [half(8192, 8192), half(8192, 8192), half(8192)],
        ),
        "layer_norm of a long row": (
            lambda x, w, b: F.gelu(F.layer_norm(x, (16384,), w, b)),
            [half(8192, 16384), half(16384), half(16384)],
        ),
        "softmax": (
            lambda x, m: F.softmax((x * 0.125).masked_fill(m, float("-inf")), -1),
            [half(32, 1024, 4096), half(1024, 4096) > 0],
        ),
        "log_softmax of a vocabulary": (lambda x: F.log_softmax(x.float(), -1), [half(2048, 50257)]),
        "group_norm, silu": (lambda x, w, b: F.silu(F.group_norm(x, 32, w, b)), [half(32, 320, 64, 64), half(320), half(320)]),
        "group_norm in halves": (
            lambda x, s, w, b: F.silu(torch.ops.gw.norm_apply(x, s, w, b, 32, 1e-5)),
            [half(32, 320, 64, 64), half(2, 32, 32, 3).float().abs() + 1, half(320), half(320)],
        ),
        "GEGLU": (lambda x: x.chunk(2, -1)[0] * F.gelu(x.chunk(2, -1)[1]), [half(8, 4096, 2560)]),
        "SwiGLU": (lambda x, y: F.silu(x) * y, [half(8192, 11008), half(8192, 11008)]),
        "rotary": (lambda x, c, s: rotated(x.transpose(1, 2), c, s), [half(8, 2048, 32, 128), half(2048, 128), half(2048, 128)]),
        "norm, rotary": (
            lambda x, w, c, s: rotated(F.rms_norm(x, (128,), w, 1e-6), c, s),
            [half(8, 32, 2048, 128), half(128), half(2048, 128), half(2048, 128)],
        ),
        "reductions": (lambda x: ((x * x).sum(-1), x.amax(-1), x.float().var(-1)), [half(65536, 1024)]),
        "float64": (lambda x, w: F.layer_norm(torch.tanh(x), (1000,), w), [half(16384, 1000).double(), half(1000).double()]),
        "linear, gelu": (lambda x, w, b: F.gelu(F.linear(x, w, b)), [half(8192, 1152), half(4608, 1152), half(4608)]),
        "linear, gate, residual": (
            lambda x, w, b, g, r: r + g[:, None] * F.linear(x, w, b),
            [half(8, 1024, 4608), half(1152, 4608), half(1152), half(8, 1152), half(8, 1024, 1152)],
        ),
        "linear, large": (lambda x, w: F.relu(F.linear(x, w)), [half(8192, 8192), half(8192, 8192)]),
        "SwiGLU of two products": (
            lambda x, g, u: F.silu(F.linear(x, g)) * F.linear(x, u),
            [half(4096, 2048), half(8192, 2048), half(8192, 2048)],
        ),
        "rms_norm, linear of one token": (
            lambda x, s, w: F.linear(F.rms_norm(x, (4096,), s, 1e-5), w),
            [half(1, 4096), half(4096), half(14336, 4096)],
        ),
        "linear of 16 tokens": (lambda x, w, r: r + F.linear(x, w), [half(16, 14336), half(4096, 14336), half(16, 4096)]),
        "scale, linear": (lambda x, s, w: F.relu(F.linear(x * s, w)), [half(4096, 4096), half(4096), half(4096, 4096)]),
        "batched product": (lambda a, b: torch.bmm(a, b) * 0.125, [half(128, 1024, 64), half(128, 64, 1024)]),
        "float16 product": (lambda a, b: F.relu(a @ b), [half(4096, 4096).half(), half(4096, 4096).half()]),
        "float32 product": (lambda a, b: F.relu(a @ b), [half(2048, 2048).float(), half(2048, 2048).float()]),
        "int8 product, scale": (
            lambda a, b, s: torch._int_mm(a, b).float() * s,
            [(half(4096, 4096) * 20).to(torch.int8), (half(4096, 4096) * 20).to(torch.int8).t(), half(4096, 1).float()],
        ),
        "experts: silu of grouped products": (
            lambda x, w, ends: F.silu(torch._grouped_mm(x, w, offs=ends)),
            [half(8192, 2048), half(16, 2048, 1408), ((half(16) * 0 + 512).cumsum(0)).int()],
        ),
        "float8 product, scales": (
            lambda a, b, s, t: torch._scaled_mm(a, b, s, t, out_dtype=torch.bfloat16) * 2.0,
            [
                half(4096, 4096).to(torch.float8_e4m3fn),
                half(4096, 4096).to(torch.float8_e4m3fn).t(),
                half(4096, 1).float().abs(),
                half(1, 4096).float().abs(),
            ],
        ),
        "8-bit weights": (
            lambda x, w, s: F.linear(x, w.bfloat16() * s),
            [half(64, 4096), (half(4096, 4096) * 20).to(torch.int8), half(4096, 1)],
        ),
    }


class Plain(torch.nn.Module):
    """A function of tensors as a module."""

    def __init__(self, function: Function):
        super().__init__()
        self.function = function

    def forward(self, *args: Any) -> Any:
        return self.function(*args)


def whole_plan(program: ir.Program) -> Any:
    """All of a program as one kernel's plan."""
    nodes = [node for node in program.main.calls if is_known(node)]
    return plan(nodes, list(dict.fromkeys(base(output) for output in program.main.outputs)))


@functools.cache
def measured_machine() -> Machine:
    """What this GPU does on the two things that limit kernels: a copy of 2 GiB, and products of 8192 x 8192 matrices by the library, for
    those types that it multiplies."""
    bandwidth = copy_rate(2**31)
    rates = {}
    for dtype in (torch.bfloat16, torch.float16, torch.int8, torch.float8_e4m3fn, torch.float32):
        size = 4096 if dtype == torch.float32 else 8192
        a, b = ((torch.randn(size, size, device=DEVICE) * 8).to(dtype) for _ in range(2))
        one = torch.ones((), device=DEVICE)
        multiply = {
            torch.int8: lambda a=a, b=b: torch._int_mm(a, b.t()),
            torch.float8_e4m3fn: lambda a=a, b=b, one=one: torch._scaled_mm(a, b.t(), one, one, out_dtype=torch.bfloat16),
        }.get(dtype, lambda a=a, b=b: a @ b.t())
        try:
            rates[str(dtype).removeprefix("torch.")] = 2 * size**3 / device_seconds(multiply, DEVICE, 3)
        except (RuntimeError, ValueError):  # GPUs before Hopper and Ada have no 8-bit floats
            continue
    return Machine(torch.cuda.get_device_name(DEVICE), bandwidth, 67e12, rates)


def copy_rate(nbytes: int) -> float:
    """Bytes a second, read and written, of a copy of `nbytes`."""
    x = torch.randn(nbytes // 4, device=DEVICE)
    y = torch.empty_like(x)
    return 2 * nbytes / device_seconds(lambda: y.copy_(x), DEVICE)


def kernels(bench: Bench) -> None:
    machine = measured_machine()
    rates = ", ".join(f"{name} {rate / 1e12:.0f} Tflop/s" for name, rate in machine.products.items())
    bench.note(f"measured: copy {machine.bandwidth / 1e12:.2f} TB/s (read and written), products {rates}")
    torch.manual_seed(0)
    torch.set_grad_enabled(False)
    makes = families(lambda *shape: torch.randn(shape, device=DEVICE, dtype=torch.bfloat16))
    for name, (function, args) in makes.items():
        if not bench.options.kernels or name in bench.options.kernels.split(";"):
            run_case(bench, name, functools.partial(kernel_row, bench, machine, name, function, args))
    gpu_bars.summary(bench)


def kernel_row(bench: Bench, machine: Machine, name: str, function: Function, args: Sequence[torch.Tensor]) -> None:
    program = ir.capture(Plain(function), tuple(args), {})
    target = target_of(DEVICE)
    default = emit(whole_plan(program), program.symbols, target=target)
    started = time.perf_counter()
    tuner = Tuner(DEVICE, target, None)
    kernel = default if bench.quick else tuner.kernel(whole_plan(program), program.symbols, {})
    spent = time.perf_counter() - started
    if kernel is None:
        bench.note(f"{name}: no tile works on this GPU")
        return
    for each in dict.fromkeys((default, kernel)):
        load(each).check(DEVICE.type)
    torch.use_deterministic_algorithms(False)  # with which a check fills memory, and peers would too
    values = dict(zip(program.main.placeholders, args, strict=True))
    inputs = [values[node] for node in kernel.plan.inputs]
    calls: dict[str, Callable[[], Callable[[], Any]]] = {
        "eager": lambda: lambda: function(*args),
        "torch.compile": lambda: compiled_call(function, args),
        "max-autotune": lambda: compiled_call(function, args, "max-autotune-no-cudagraphs"),
    }
    is_product = isinstance(kernel.plan, MatmulPlan)
    if is_product:
        calls["library"] = lambda: library_call(function, args)
    peers = peer_seconds(bench, name, DEVICE, calls) | {"roofline": kernel.roofline.seconds(machine)}
    if not is_product:
        peers["copy"] = kernel.roofline.bytes_moved / machine.bandwidth
    ours = device_seconds(lambda: load(kernel).run(*inputs), DEVICE)
    plain = device_seconds(lambda: load(default).run(*inputs), DEVICE)
    bench.row(name, "time", "s", ours, peers)
    how = f"{kernel.plan.kind}, {kernel.tile}; the default tile takes {plain / ours:.2f} x the time; tuned in {spent:.1f} s"
    bench.note(f"{name}: {how}; {kernel.roofline.line(machine)}")


def library_call(function: Function, args: Sequence[torch.Tensor]) -> Callable[[], Any]:
    """The library's products of a function one after the other, and nothing else."""
    products = gpu_bars.products_of(function, args)
    assert products, "a kernel that multiplies matrices has products"
    return lambda: [each() for each in products]


def low_rank(bench: Bench) -> None:
    gpu_low_rank.low_rank(bench, measured_machine(), DEVICE)


def caches(bench: Bench) -> None:
    gpu_kv_cache.caches(bench, measured_machine(), DEVICE)


def rat(bench: Bench) -> None:
    gpu_rat.recurrences(bench, measured_machine(), DEVICE)


def experts(bench: Bench) -> None:
    gpu_experts.experts(bench, measured_machine(), DEVICE)


def networks(bench: Bench) -> None:
    for name in bench.options.networks.split(","):
        for size in bench.options.sizes.split(","):
            run_case(bench, f"{name}/{size}", functools.partial(network_row, bench, name, size, torch.bfloat16))


def network_row(bench: Bench, name: str, size: str, dtype: torch.dtype) -> None:
    """One network as a user calls it, its outputs checked against the network itself in float64."""
    module, args, kwargs = models.load(name, size)

    def moved(value: Any, to: torch.dtype = dtype) -> Any:
        if not isinstance(value, torch.Tensor):
            return value
        return value.to(DEVICE, to if value.is_floating_point() else value.dtype)

    module = module.to(DEVICE, dtype)
    args, kwargs = tuple(map(moved, args)), {key: moved(value) for key, value in kwargs.items()}
    case = f"{name}/{size} {str(dtype).removeprefix('torch.')}"
    ours, seconds = ready(
        lambda: gw.compile(module, example_inputs=args, example_kwargs=kwargs, backend="triton" if bench.quick else "tuned"), args, kwargs
    )
    spent, peers = {"ours": seconds}, {}
    torch._dynamo.reset()  # once: what was compiled in one mode stays for its turns
    torch._dynamo.config.recompile_limit = 64
    for peer in ("eager", *COMPILED):
        make = functools.partial(torch.compile, module, mode=COMPILED[peer]) if peer in COMPILED else lambda: module
        found = attempt(bench, case, peer, functools.partial(ready, make, args, kwargs))
        if found is not None:
            peers[peer], spent[peer] = (lambda call=found[0]: call(*args, **kwargs)), found[1]
    with torch.no_grad():
        bench.time(case, lambda: ours(*args, **kwargs), peers)
        bench.save()  # what follows needs more memory
        result, eager = first(ours(*args, **kwargs)), first(module(*args, **kwargs))
        wide = first(module.double()(*(moved(v, torch.float64) for v in args), **{k: moved(v, torch.float64) for k, v in kwargs.items()}))
    bench.row(case, "error", "1", error(result, wide), {"eager": error(eager, wide)})
    times = ", ".join(f"{who} {each:.0f} s" for who, each in spent.items())
    calls = len(list(ours.program.main.calls))
    bench.note(f"{case}: {len(ours.kernels())} kernels of ours, {calls} calls in the program; made ready and called three times: {times}")


def ready(make: Callable[[], Function], args: Any, kwargs: Any) -> tuple[Function, float]:
    """What `make` gives once it was called three times, and the seconds that this took."""
    started = time.perf_counter()
    function = make()
    with torch.no_grad():
        for _ in range(3):
            function(*args, **kwargs)
    synchronize(DEVICE)
    return function, time.perf_counter() - started


def first(outputs: Any) -> torch.Tensor:
    return (
        outputs if isinstance(outputs, torch.Tensor) else first(next(iter(outputs.values())) if isinstance(outputs, dict) else outputs[0])
    )


def error(actual: torch.Tensor, exact: torch.Tensor) -> float:
    """||actual - exact|| / ||exact||; the network's own rounding of its weights is in both."""
    return ((actual.double() - exact.double()).norm() / exact.double().norm()).item()


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--only", choices=("kernels", "low_rank", "caches", "rat", "experts", "networks"), help="one part")
    parser.add_argument("--kernels", default="", metavar="NAME;..", help="families to run; all by default")
    parser.add_argument("--networks", default=",".join(NETWORKS), metavar="NAME,..", help="default %(default)s")
    parser.add_argument("--sizes", default="small,base", metavar="SIZE,..", help="default %(default)s; with --quick small")
    parser.add_argument("--skip", default="", metavar="PEER,..", help="torch.compile, reduce-overhead, max-autotune; with --quick all")
    parser.add_argument("--minutes", type=float, default=float("inf"), metavar="M", help="begin no case after so many minutes")


def main() -> None:
    if not torch.cuda.is_available():
        print("bench/gpu.py times kernels on a GPU, and torch finds none here: `make test` checks them in Triton's interpreter")
        return
    bench = Bench("gpu", PEERS, add_arguments=add_arguments)
    if bench.quick:
        bench.options.skip, bench.options.sizes = "torch.compile,reduce-overhead,max-autotune", "small"
    for part in (kernels, low_rank, caches, rat, experts, networks):
        if bench.options.only in (None, part.__name__):
            part(bench)
            bench.save()
    end(bench)


if __name__ == "__main__":
    main()
