"""slice-groups: peak activation memory and time against eager, torch.compile and what diffusers offers.

Cases named NETWORK run ours on backend aten, NETWORK+inductor on Inductor. "unsliced" is the same program without the pass.
"""

import argparse
import copy
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from harness import Bench, relative_spread
from torch.utils import _pytree as pytree

import graphwright as gw
from graphwright import models
from graphwright.ir.calling import Call
from graphwright.ir.float64 import Widening, widened
from graphwright.ir.run import run
from graphwright.runtime.backend import has_cpp_compiler
from graphwright.runtime.compiled import CompiledModel
from graphwright.runtime.memory import measure_peak

PEERS = {
    "eager": "torch",
    "unsliced": "torch",
    "torch.compile": "torch",
    "diffusers chunked": "diffusers",
    "diffusers split": "diffusers",
}
QUICK_BUDGET = 40.0
CHUNK_SIZES = (1, 4)
SPLIT_SIZES = ((64, 4), (16, 1))

Inputs = tuple[tuple[Any, ...], dict[str, Any]]
Network = tuple[torch.nn.Module, tuple[Any, ...], dict[str, Any]]


@dataclass(frozen=True)
class Case:
    """A network to measure; `chunks` and `splits`: whether diffusers' forward chunking and split inference apply to it."""

    name: str
    make: Callable[[], Network]
    chunks: bool = False
    splits: bool = False


def main() -> None:
    bench = Bench("slicing", PEERS, add_arguments=_arguments)
    start = time.perf_counter()
    for case in cases(bench.quick):
        if bench.options.only and not any(only in case.name for only in bench.options.only):
            continue
        if case.chunks and "diffusers chunked" in bench.missing:
            bench.note(f"{case.name}: left out, diffusers is not installed")
            continue
        if bench.quick and time.perf_counter() - start > QUICK_BUDGET:
            bench.note(f"{case.name}: left out, the time of --quick is spent")
            continue
        with torch.no_grad():
            measure(bench, case)
        bench.save()
    bench.finish()


def _arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--only", action="append", metavar="NAME", help="only cases whose name contains NAME; may be repeated")
    parser.add_argument(
        "--backend", action="append", choices=["aten", "inductor", "tuned"], help="ours on this backend only; may be repeated"
    )
    parser.add_argument("--skip", action="append", default=[], choices=list(PEERS), help="leave this peer out; may be repeated")
    parser.add_argument("--budget", default="25%", help="memory_budget of slice-groups (default %(default)s)")
    parser.add_argument("--no-time", action="store_true", help="memory and errors only")


# --- networks ---


def cases(quick: bool) -> list[Case]:
    if quick:
        return [
            Case("decoder/tiny", lambda: models.load("decoder", "tiny", length=512)),
            Case("dit/tiny", lambda: models.load("dit", "tiny", length=1024, batch=1)),
            Case("video_unet/tiny", lambda: models.load("video_unet", "tiny", height=16, width=16)),
            Case("video_unet_svd/tiny", lambda: models.load("video_unet_svd", "tiny")),
            Case("diffusers_motion/tiny", lambda: motion((32, 64), frames=4, size=16), chunks=True, splits=True),
        ]
    return [
        Case("video_unet/small", lambda: models.load("video_unet", "small", frames=16)),
        Case("video_unet_svd/small", lambda: models.load("video_unet_svd", "small", frames=14)),
        Case("diffusers_motion", lambda: motion((64, 128, 256, 256), frames=16, size=32), chunks=True, splits=True),
        Case("diffusers_svd", lambda: svd((64, 128, 256, 256), frames=16, size=32), chunks=True),
        Case("dit/small L4096", lambda: models.load("dit", "small", length=4096, batch=1)),
        Case("decoder/small L2048", lambda: models.load("decoder", "small", length=2048)),
        Case("decoder/small L4096", lambda: models.load("decoder", "small", length=4096)),
    ]


def motion(channels: tuple[int, ...], frames: int, size: int) -> Network:
    """AnimateDiff's U-Net in diffusers, with random weights."""
    import diffusers

    torch.manual_seed(0)
    last = len(channels) - 1
    model = diffusers.UNetMotionModel(
        block_out_channels=channels,
        down_block_types=("CrossAttnDownBlockMotion",) * last + ("DownBlockMotion",),
        up_block_types=("UpBlockMotion",) + ("CrossAttnUpBlockMotion",) * last,
        layers_per_block=2 if last > 1 else 1,
        cross_attention_dim=64,
        norm_num_groups=8,
        motion_num_attention_heads=4,
        num_attention_heads=4,
    )
    return model.eval(), (torch.randn(1, 4, frames, size, size), torch.tensor(3), torch.randn(frames, 16, 64)), {}


def svd(channels: tuple[int, ...], frames: int, size: int) -> Network:
    """Stable Video Diffusion's U-Net in diffusers, with random weights."""
    import diffusers

    torch.manual_seed(0)
    last = len(channels) - 1
    model = diffusers.UNetSpatioTemporalConditionModel(
        block_out_channels=channels,
        down_block_types=("CrossAttnDownBlockSpatioTemporal",) * last + ("DownBlockSpatioTemporal",),
        up_block_types=("UpBlockSpatioTemporal",) + ("CrossAttnUpBlockSpatioTemporal",) * last,
        layers_per_block=2 if last > 1 else 1,
        cross_attention_dim=64,
        num_attention_heads=(4,) * len(channels),
        addition_time_embed_dim=32,
        projection_class_embeddings_input_dim=96,
        num_frames=frames,
    )
    return model.eval(), (torch.randn(1, frames, 8, size, size), torch.tensor(3), torch.randn(1, 1, 64), torch.ones(1, 3)), {}


# --- one case ---


def measure(bench: Bench, case: Case) -> None:
    model, args, kwargs = case.make()
    model, (args, kwargs) = model.to(bench.device), _moved((args, kwargs), bench.device)
    inputs = (args, kwargs)
    backends = bench.options.backend or ["aten", *(["inductor"] if has_cpp_compiler() and not bench.quick else [])]
    ours = {backend: compiled(bench, case, model, inputs, backend) for backend in backends}
    check_text(bench, case, model, inputs, [each.program for each in ours.values()])
    peers = contestants(bench, case, model, inputs)
    calls = {backend: _call(each, inputs) for backend, each in ours.items()} | peers
    for call in calls.values():
        call()
    peaks = {name: measure_peak(call, device=bench.device.type).peak_bytes for name, call in calls.items()}
    outputs = {name: _floats(call()) for name, call in calls.items()}
    first = next(iter(ours.values()))
    exact, sliced_exact = float64_outputs(first, first.history[0], inputs), float64_outputs(first, first.program, inputs)
    error = {name: relative_error(values, exact) for name, values in outputs.items()}
    for backend, each in ours.items():
        name = _row_name(case, backend)
        bench.row(name, "peak_bytes", "B", peaks[backend], {peer: float(peaks[peer]) for peer in peers})
        bench.row(name, "error", "1", error[backend], {peer: error[peer] for peer in peers})
        each.measure(*args, **kwargs)  # sees what each compiled piece allocates, which the report's prediction builds on
        memory = each.report().memory
        assert memory.planned is not None and memory.unsliced is not None
        bench.row(name, "predicted/measured peak", "1", (memory.compiled or memory.planned) / peaks[backend], {})
        bench.row(name, "planned/unsliced peak", "1", memory.planned / memory.unsliced, {})
        if memory.floor is not None:
            bench.row(name, "floor", "B", memory.floor, {})
    bench.row(case.name, "float64 error", "1", relative_error(sliced_exact, exact), {})
    bench.save()
    if not bench.options.no_time:
        times(bench, case, ours, calls, peers)


def check_text(bench: Bench, case: Case, model: torch.nn.Module, inputs: Inputs, programs: list[gw.Program]) -> None:
    """Stops the bench where a program's text does not parse back to itself, or a second compilation gives another program."""
    if len(programs) == 1 and not bench.quick:
        programs = [*programs, compiled(bench, case, model, inputs, "aten").program]
    texts = {str(program) for program in programs} | {str(gw.parse(str(programs[0])))}
    assert len(texts) == 1, f"{case.name}: {len(texts)} different texts"
    bench.note(f"{case.name}: compiled {len(programs)} times and parsed once, always the same {len(texts.pop().splitlines())} lines")


def times(bench: Bench, case: Case, ours: dict[str, CompiledModel], calls: dict[str, Callable[[], Any]], peers: dict[str, Any]) -> None:
    samples = bench.interleaved(calls)
    medians = {name: statistics.median(values) for name, values in samples.items()}
    for backend in ours:
        spread = max(relative_spread(samples[name]) for name in (backend, *peers))
        bench.row(_row_name(case, backend), "time", "s", medians[backend], {peer: medians[peer] for peer in peers}, spread)


def compiled(bench: Bench, case: Case, model: torch.nn.Module, inputs: Inputs, backend: str) -> CompiledModel:
    start = time.perf_counter()
    result = gw.compile(
        model, [gw.SliceGroups(memory_budget=bench.options.budget)], backend=backend, example_inputs=inputs[0], example_kwargs=inputs[1]
    )
    bench.row(_row_name(case, backend), "compile time", "s", time.perf_counter() - start, {})
    nodes = sum(1 for _ in result.history[0].nodes())
    lines = result.report().passes[-1].lines
    seconds = result.report().passes[-1].seconds
    bench.note(f"{_row_name(case, backend)}: {nodes} nodes, slice-groups {seconds:.1f} s, {lines[0]}")
    for line in lines[1:]:
        if line.startswith("the peak"):
            bench.note(f"{_row_name(case, backend)}: {line}")
    return result


def contestants(bench: Bench, case: Case, model: torch.nn.Module, inputs: Inputs) -> dict[str, Callable[[], Any]]:
    args, kwargs = inputs
    skipped = set(bench.options.skip)
    found: dict[str, Callable[[], Any]] = {}
    if "eager" not in skipped:
        found["eager"] = _call(model, inputs)
    if "unsliced" not in skipped:
        found["unsliced"] = _call(gw.compile(model, backend="aten", example_inputs=args, example_kwargs=kwargs), inputs)
    if bench.quick:
        skipped.add("torch.compile")
        bench.note(f"{case.name}: torch.compile is left out of --quick, it takes minutes")
    if "torch.compile" not in skipped:
        if has_cpp_compiler():
            torch.compiler.reset()
            found["torch.compile"] = _call(torch.compile(copy.deepcopy(model)), inputs)
        else:
            bench.note(f"{case.name}: torch.compile is missing, it needs a C++ compiler")
    if case.chunks and "diffusers chunked" not in skipped:
        variants = {f"chunk_size={size}": (lambda size=size: _chunked(model, size)) for size in CHUNK_SIZES}
        found["diffusers chunked"] = best(bench, case, "enable_forward_chunking", variants, inputs)
    if case.splits and "diffusers split" not in skipped:
        variants = {
            f"spatial={spatial}, temporal={temporal}": (lambda s=spatial, t=temporal: _split(model, s, t))
            for spatial, temporal in SPLIT_SIZES
        }
        found["diffusers split"] = best(bench, case, "enable_free_noise_split_inference", variants, inputs)
    elif case.chunks:
        bench.note(f"{case.name}: no split inference, which diffusers has for AnimateDiff alone (temporal layers would be cut here)")
    return found


def best(bench: Bench, case: Case, method: str, variants: dict[str, Callable[[], torch.nn.Module]], inputs: Inputs) -> Callable[[], Any]:
    """The variant with the lowest peak."""
    peaks: dict[str, int] = {}
    modules = {name: make() for name, make in variants.items()}
    for name, module in modules.items():
        peaks[name] = measure_peak(_call(module, inputs), device=bench.device.type).peak_bytes
    winner = min(peaks, key=peaks.__getitem__)
    tried = ", ".join(f"{name}: {peak / 2**20:.1f} MiB" for name, peak in peaks.items())
    bench.note(f"{case.name}: {method} tried with {tried}; {winner} counts")
    return _call(modules[winner], inputs)


def _chunked(model: torch.nn.Module, size: int) -> torch.nn.Module:
    result = copy.deepcopy(model)
    result.enable_forward_chunking(size, dim=0)  # type: ignore[operator]
    return result


def _split(model: torch.nn.Module, spatial: int, temporal: int) -> torch.nn.Module:
    """The network as `pipeline.enable_free_noise_split_inference` leaves it; the method looks at nothing but the pipeline's U-Net."""
    from diffusers.pipelines.free_noise_utils import AnimateDiffFreeNoiseMixin

    pipeline = AnimateDiffFreeNoiseMixin()
    pipeline.unet = copy.deepcopy(model)
    pipeline.enable_free_noise_split_inference(spatial, temporal)
    return pipeline.unet


# --- errors ---


def float64_outputs(source: CompiledModel, program: Any, inputs: Inputs) -> list[torch.Tensor]:
    flat = Call(program, program.main, source.compilation.parameters).bind(*inputs)[0]
    wide = [value.to(widened(value.dtype)) if isinstance(value, torch.Tensor) else value for value in flat]
    return _floats(run(Widening().program(program), wide)[0])


def relative_error(values: list[torch.Tensor], exact: list[torch.Tensor]) -> float:
    """|values - exact| / |exact|, the largest over the outputs."""
    return max(float((v.double() - e).norm() / e.norm()) for v, e in zip(values, exact, strict=True))


def _floats(outputs: Any) -> list[torch.Tensor]:
    return [leaf for leaf in pytree.tree_leaves(outputs) if isinstance(leaf, torch.Tensor) and leaf.is_floating_point()]


def _call(function: Callable[..., Any], inputs: Inputs) -> Callable[[], Any]:
    args, kwargs = inputs
    return lambda: function(*args, **kwargs)


def _row_name(case: Case, backend: str) -> str:
    return case.name if backend == "aten" else f"{case.name}+{backend}"


def _moved(tree: Any, device: torch.device) -> Any:
    return pytree.tree_map_only(torch.Tensor, lambda tensor: tensor.to(device), tree)


if __name__ == "__main__":
    main()
