"""Time of a call on a CPU, against what a user would pick instead: eager, torch.compile, with freezing too, onnxruntime, OpenVINO.

All in float32: OpenVINO, which would take bfloat16 where the CPU has it, is told so. Contestants take and give the tensors of their
own library. "peak_bytes" is what torch's allocator hands out over a call, and says nothing of other libraries. The rest is measured in
fresh processes, two a contestant: a start is from a made model to its first output, "cold" with empty caches, "warm" with the caches and
the ONNX file that the cold one left; "resident" is what a process has in RAM at the highest of its warm start, and "held" during the
call after that, each over what it had without the model: libraries, weights (those of torch too, where they are needed) and buffers.
"""

import argparse
import functools
import json
import logging
import os
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from harness import Bench, relative_spread
from timm_networks import timm_network, torchvision_stand_in
from torch import nn
from torch.utils import _pytree as pytree
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

import graphwright as gw
from graphwright import models
from graphwright.codegen.cpu_packed import Pack, PackedLinear
from graphwright.ir.float64 import Widening, widened
from graphwright.ir.run import run
from graphwright.runtime.backend import has_cpp_compiler
from graphwright.runtime.memory import measure_peak

PEERS = {
    "eager": "torch",
    "torch.compile": "torch",
    "torch.compile freezing": "torch",
    "onnxruntime": "onnxruntime",
    "openvino": "openvino",
}
COMPILED_BY_INDUCTOR = ("torch.compile", "torch.compile freezing")
FROM_FILE = ("onnxruntime", "openvino")
TIMM = ("resnet50", "vit_base_patch16_224", "efficientnet_b0")
QUICK_BUDGET = 40.0

Network = tuple[nn.Module, tuple[torch.Tensor, ...]]


@dataclass(frozen=True)
class Case:
    """A network and its inputs, all tensors; `package`: what it is made with."""

    name: str
    make: Callable[[], Network]
    package: str | None = None


def main() -> None:
    bench = Bench("cpu", PEERS, add_arguments=_arguments)
    if bench.options.start:
        case, name, folder = bench.options.start
        print(json.dumps(start(case, name, Path(folder), bench.threads, bench.options.backend)))
        return
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    if bench.quick:
        bench.note("torch.compile, which takes minutes, and start times, which take a process each, are left out of --quick")
    begin = time.perf_counter()
    for case in cases(bench.quick):
        if bench.options.only and not any(only in case.name for only in bench.options.only):
            continue
        if case.package is not None and not importable(case.package):
            bench.note(f"{case.name}: left out, {case.package} cannot be imported (make bench-deps installs it)")
            continue
        if bench.quick and time.perf_counter() - begin > QUICK_BUDGET:
            bench.note(f"{case.name}: left out, the time of --quick is spent")
            continue
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's exporter to ONNX has many
            measure(bench, case)
        bench.save()
    summary(bench)
    bench.finish()


def _arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--only", action="append", metavar="NAME", help="only cases whose name contains NAME; may be repeated")
    parser.add_argument("--skip", action="append", default=[], choices=list(PEERS), help="leave this peer out; may be repeated")
    parser.add_argument("--backend", default="auto", help="ours (default %(default)s)")
    parser.add_argument("--no-start", action="store_true", help="no start times and resident bytes, which take two processes each")
    parser.add_argument("--start", nargs=3, metavar=("CASE", "CONTESTANT", "FOLDER"), help=argparse.SUPPRESS)


# --- networks ---


def cases(quick: bool) -> list[Case]:
    if quick:
        return [
            Case("decoder/tiny L128", lambda: zoo("decoder", "tiny", length=128)),
            Case("decoder/tiny L1", lambda: zoo("decoder", "tiny", length=1)),
            Case("vit/tiny", lambda: zoo("vit", "tiny")),
            Case("convolutions/tiny", lambda: convolutions(channels=32, size=16, depth=2)),
        ]
    return [
        Case("decoder/small L512", lambda: zoo("decoder", "small", length=512)),
        Case("decoder/small L1", lambda: zoo("decoder", "small", length=1)),
        Case("dit/small", lambda: zoo("dit", "small")),
        Case("vit/small", lambda: zoo("vit", "small")),
        Case("video_unet/small", lambda: zoo("video_unet", "small", frames=8)),
        Case("convolutions", lambda: convolutions(channels=128, size=64, depth=8)),
        Case("bert", bert, "transformers"),
        Case("gpt2", gpt2, "transformers"),
        Case("qwen3", qwen3, "transformers"),
        Case("convnext", convnext, "transformers"),
        Case("unet_2d", unet_2d, "diffusers"),
        Case("sana", transformer_2d, "diffusers"),
        *(Case(f"timm {name}", lambda name=name: timm(name), "timm") for name in TIMM),
    ]


class Plain(nn.Module):
    """A network as a function of tensors to a tensor: `pick` calls it and takes what counts of its result."""

    def __init__(self, network: nn.Module, pick: Callable[..., torch.Tensor]):
        super().__init__()
        self.network = network
        self.pick = pick

    def forward(self, *inputs: torch.Tensor) -> torch.Tensor:
        return self.pick(self.network, *inputs)


def zoo(name: str, size: str, **sizes: int) -> Network:
    model, args, kwargs = models.load(name, size, **sizes)
    return Plain(model, lambda network, *inputs: network(*inputs)).eval(), (*args, *kwargs.values())


def convolutions(channels: int, size: int, depth: int) -> Network:
    """Residual blocks of group norm, SiLU and a 3 x 3 convolution, as diffusion U-Nets and autoencoders are made of."""
    torch.manual_seed(0)

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.conv = nn.GroupNorm(8, channels), nn.Conv2d(channels, channels, 3, padding=1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + self.conv(nn.functional.silu(self.norm(x)))

    return nn.Sequential(*(Block() for _ in range(depth))).eval(), (torch.randn(1, channels, size, size),)


def bert() -> Network:
    import transformers

    torch.manual_seed(0)
    model = transformers.BertModel(transformers.BertConfig(num_hidden_layers=6)).eval()
    tokens, mask = torch.randint(0, 30000, (1, 128)), torch.ones(1, 128, dtype=torch.long)
    return Plain(model, lambda network, tokens, mask: network(tokens, attention_mask=mask).last_hidden_state), (tokens, mask)


def gpt2() -> Network:
    import transformers

    torch.manual_seed(0)
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(n_layer=6, vocab_size=8192, bos_token_id=0, eos_token_id=1)).eval()
    return Plain(model, lambda network, tokens: network(tokens, use_cache=False).logits), (torch.randint(0, 8192, (1, 256)),)


def qwen3() -> Network:
    import transformers

    torch.manual_seed(0)
    config = transformers.Qwen3Config(
        vocab_size=8192, hidden_size=1024, intermediate_size=3072, num_hidden_layers=6, num_attention_heads=16, num_key_value_heads=8,
        head_dim=64, pad_token_id=0,
    )  # fmt: skip
    model = transformers.Qwen3ForCausalLM(config).eval()
    return Plain(model, lambda network, tokens: network(tokens, use_cache=False).logits), (torch.randint(0, 8192, (1, 16)),)


def convnext() -> Network:
    import transformers

    torch.manual_seed(0)
    model = transformers.ConvNextForImageClassification(transformers.ConvNextConfig()).eval()  # ConvNeXt-T
    return Plain(model, lambda network, pixels: network(pixels).logits), (torch.randn(1, 3, 224, 224),)


def unet_2d() -> Network:
    import diffusers

    torch.manual_seed(0)
    model = diffusers.UNet2DConditionModel(
        block_out_channels=(128, 256, 512), down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"), layers_per_block=1, cross_attention_dim=512,
        attention_head_dim=8,
    ).eval()  # fmt: skip
    inputs = (torch.randn(1, 4, 32, 32), torch.tensor([3]), torch.randn(1, 77, 512))
    return Plain(model, lambda network, sample, time, text: network(sample, time, text).sample), inputs


def transformer_2d() -> Network:
    import diffusers

    torch.manual_seed(0)
    model = diffusers.SanaTransformer2DModel(
        num_layers=4, num_attention_heads=32, attention_head_dim=32, cross_attention_dim=1024, num_cross_attention_heads=16,
        cross_attention_head_dim=64, caption_channels=512, in_channels=32, out_channels=32, sample_size=16,
    ).eval()  # fmt: skip
    inputs = (torch.randn(1, 32, 16, 16), torch.randn(1, 64, 512), torch.tensor([3]))
    return Plain(model, lambda network, sample, text, time: network(sample, text, timestep=time).sample), inputs


def timm(name: str) -> Network:
    return timm_network(name), (torch.randn(1, 3, 224, 224),)


def importable(package: str) -> bool:
    try:
        with torchvision_stand_in() if package == "timm" else nullcontext():
            __import__(package)
    except ImportError:
        return False
    return True


# --- contestants ---


def contestant(name: str, network: Network, folder: Path, threads: int, backend: str) -> Callable[[], Any]:
    """A call of the network by `name`, a peer or "ours". Those that read ONNX find it in `folder`, or write it there first."""
    model, inputs = network
    if name == "eager":
        return lambda: model(*inputs)
    if name in COMPILED_BY_INDUCTOR:
        torch.compiler.reset()
        options = {"freezing": True} if name == "torch.compile freezing" else {}
        compiled = torch.compile(model, options=options)
        return lambda: compiled(*inputs)
    if name == "ours":
        return partial(gw.compile(model, backend=backend, example_inputs=inputs), *inputs)
    path = onnx_file(folder)
    if not path.exists():
        torch.onnx.export(model, inputs, path, dynamo=True, verbose=False, external_data=False)
    return onnxruntime_call(path, inputs, threads) if name == "onnxruntime" else openvino_call(path, inputs, threads)


def onnx_file(folder: Path) -> Path:
    return folder / "model.onnx"


def onnxruntime_call(path: Path, inputs: tuple[torch.Tensor, ...], threads: int) -> Callable[[], Any]:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    options.add_session_config_entry("session.force_spinning_stop", "1")  # else its threads take the cores from whoever is next
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    feed = {given.name: value.numpy() for given, value in zip(session.get_inputs(), inputs, strict=True)}
    return lambda: session.run(None, feed)


def openvino_call(path: Path, inputs: tuple[torch.Tensor, ...], threads: int) -> Callable[[], Any]:
    import openvino

    settings = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": threads, "PERFORMANCE_HINT": "LATENCY"}
    request = openvino.Core().compile_model(path, "CPU", settings).create_infer_request()
    arrays = [value.numpy() for value in inputs]
    return lambda: request.infer(arrays, share_inputs=True, share_outputs=True)


# --- one case ---


def measure(bench: Bench, case: Case) -> None:
    with tempfile.TemporaryDirectory() as folder:
        network = case.make()
        calls = contestants(bench, case, network, Path(folder))
        error = errors(network, calls)
        samples = bench.interleaved(calls)
        medians = {name: statistics.median(values) for name, values in samples.items()}
        spread = max(relative_spread(values) for values in samples.values())
        add(bench, case, "time", "s", medians, spread)
        add(bench, case, "error", "1", error)
        bench.note(f"{case.name}: {where_time_goes(network, calls['ours'], medians['ours'], bench.threads)}")
        by_torch = [name for name in calls if name not in FROM_FILE]
        add(bench, case, "peak_bytes", "B", {name: float(measure_peak(calls[name]).peak_bytes) for name in by_torch})
    names = list(calls)
    del network, calls  # a start measures a process, and this one has the memory of all contestants
    if not bench.options.no_start and not bench.quick:
        starts(bench, case, names)


def contestants(bench: Bench, case: Case, network: Network, folder: Path) -> dict[str, Callable[[], Any]]:
    """The calls that are made ready and called once; a peer that cannot is a note."""
    skipped = {*bench.options.skip, *bench.missing}
    if bench.quick:
        skipped |= set(COMPILED_BY_INDUCTOR)
    elif not has_cpp_compiler():
        skipped |= set(COMPILED_BY_INDUCTOR)
        bench.note(f"{case.name}: torch.compile is missing, it needs a C++ compiler")
    calls: dict[str, Callable[[], Any]] = {}
    for name in ("ours", *PEERS):
        if name in skipped:
            continue
        begin = time.perf_counter()
        try:
            calls[name] = contestant(name, network, folder, bench.threads, bench.options.backend)
            calls[name]()
        except Exception as error:
            if name == "ours":
                raise
            calls.pop(name, None)
            bench.note(f"{case.name}: {name} cannot run it ({type(error).__name__})")
            continue
        print(f"  {case.name}: {name} ready in {time.perf_counter() - begin:.1f} s", file=sys.stderr, flush=True)
    return calls


_KINDS = {"linear": "products", "product": "products", "convolution": "convolutions", "attention": "attention", "region": "regions"}


def where_time_goes(network: Network, ours: Any, seconds: float, threads: int) -> str:
    """The share of each kind of kernel in a call of ours, and the rate of all products against that of a large one by oneDNN."""
    model, inputs = network
    # What torch counts of attention on a GPU only.
    of_attention = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: lambda q, k, v, *_, **__: sdpa_flop_count(q, k, v)}
    with FlopCounterMode(display=False, custom_mapping=of_attention) as counter:
        model(*inputs)
    flops, most = counter.get_total_flops(), large_product_rate(threads)
    spent: Counter[str] = Counter()
    for kernel in ours.func.profile(*inputs).kernels:
        kind = next((kind for word, kind in _KINDS.items() if word in kernel.name), "other library kernels")
        spent["compiled loops" if kernel.kind == "compiled" else kind] += kernel.seconds or 0.0
    shares = ", ".join(f"{each / spent.total():.0%} {kind}" for kind, each in spent.most_common() if each >= 0.005 * spent.total())
    rate = f"{flops / 1e9:.2f} Gflop at {flops / seconds / 1e9:.0f} Gflop/s, {flops / seconds / most:.0%} of the rate of one large product"
    return f"{shares}; {rate}"


@functools.cache
def large_product_rate(threads: int) -> float:
    """Flop/s of oneDNN on a packed weight, matrices of 2048 x 2048: what the machine's arithmetic gives away from all else."""
    x, weight = torch.randn(2048, 2048), torch.randn(2048, 2048)
    call = PackedLinear(2048, transposed=False)
    call.pack = Pack(weight, call.lay_out)
    samples = []
    for _ in range(9):
        begin = time.perf_counter()
        call(x, weight)
        samples.append(time.perf_counter() - begin)
    return 2 * 2048**3 / min(samples)


def add(bench: Bench, case: Case, metric: str, unit: str, values: dict[str, float], spread: float | None = None) -> None:
    bench.row(case.name, metric, unit, values["ours"], {name: value for name, value in values.items() if name != "ours"}, spread)


def errors(network: Network, calls: dict[str, Callable[[], Any]]) -> dict[str, float]:
    """|y - exact| / |exact| of each contestant, the program in float64 being exact."""
    model, inputs = network
    program = gw.compile(model, backend="aten", example_inputs=inputs).history[0]
    wide = [value.to(widened(value.dtype)) for value in inputs]
    exact = next(leaf for leaf in pytree.tree_leaves(run(Widening().program(program), wide)[0]) if isinstance(leaf, torch.Tensor))
    return {name: float((first_output(call()) - exact).norm() / exact.norm()) for name, call in calls.items()}


def first_output(result: Any) -> torch.Tensor:
    value = result if isinstance(result, torch.Tensor) else result[0]
    return torch.as_tensor(value).double()


def summary(bench: Bench) -> None:
    """Our time over that of the fastest peer, and the geometric mean over torch.compile's, which a ratio below 1 beats."""
    times = [row for row in bench.rows if row.metric == "time" and row.peers]
    for row in times:
        best = min(row.peers, key=row.peers.__getitem__)
        bench.note(f"{row.case}: {row.ratio[best]:.3f} of the time of the fastest peer, {best}")
    against = [row.ratio["torch.compile"] for row in times if "torch.compile" in row.ratio]
    if against:
        bench.note(f"geometric mean over torch.compile: {statistics.geometric_mean(against):.3f} of its time")


# --- start ---


def starts(bench: Bench, case: Case, names: list[str]) -> None:
    """Rows of what two processes of each contestant measure, the second with what the first left. A peer that fails is a note."""
    figures: dict[str, dict[str, float]] = {"cold start": {}, "warm start": {}, "resident": {}, "held": {}}
    for name in names:
        try:
            with tempfile.TemporaryDirectory() as folder:
                cold, warm = (started(bench, case, name, folder) for _ in range(2))
        except subprocess.CalledProcessError as error:
            if name == "ours":
                raise RuntimeError(f"{case.name} does not start:\n{error.stderr}") from error
            bench.note(f"{case.name}: {name} does not start ({error.stderr.splitlines()[-1]})")
            continue
        print(f"  {case.name}: {name} starts in {cold['seconds']:.1f} s, again in {warm['seconds']:.1f} s", file=sys.stderr, flush=True)
        figures["cold start"][name], figures["warm start"][name] = cold["seconds"], warm["seconds"]
        figures["resident"][name], figures["held"][name] = warm["resident"], warm["held"]
    for metric, values in figures.items():
        add(bench, case, metric, "s" if metric.endswith("start") else "B", values)


def started(bench: Bench, case: Case, name: str, folder: str) -> dict[str, float]:
    """What `start` says in a process of its own, with caches in `folder`."""
    command = [sys.executable, __file__, "--threads", str(bench.threads), "--backend", bench.options.backend]
    command += ["--start", case.name, name, folder]
    caches = {"TORCHINDUCTOR_CACHE_DIR": f"{folder}/inductor", "GRAPHWRIGHT_CACHE_DIR": f"{folder}/graphwright"}
    done = subprocess.run(command, env=os.environ | caches, check=True, capture_output=True, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def start(case_name: str, name: str, folder: Path, threads: int, backend: str) -> dict[str, float]:
    """Seconds from the model to its first output, and the bytes that this process then has more than without the model: at the highest so
    far ("resident"), and during another call ("held")."""
    model, inputs = next(case for case in cases(quick=False) if case.name == case_name).make()
    before = resident("VmRSS") - sum(weight.nbytes for weight in (*model.parameters(), *model.buffers()))
    if name in FROM_FILE and onnx_file(folder).exists():
        model = nn.Identity()  # the file is all that they need
    highest_starts_now()
    begin = time.perf_counter()
    with torch.no_grad():
        call = contestant(name, (model, inputs), folder, threads, backend)
        call()
        figures = {"seconds": time.perf_counter() - begin, "resident": resident("VmHWM") - before}
        highest_starts_now()
        call()
    return figures | {"held": resident("VmHWM") - before}


def highest_starts_now() -> None:
    """Linux forgets how much memory this process had at the highest."""
    Path("/proc/self/clear_refs").write_text("5")


def resident(field: str) -> int:
    """Bytes of this process's memory that are in RAM now ("VmRSS") or were at the highest ("VmHWM")."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field + ":"))
    return int(line.split()[1]) * 1024


if __name__ == "__main__":
    main()
