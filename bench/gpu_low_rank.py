"""Low-rank linear layers of low-bit weights on a GPU, as a part of `bench/gpu.py`: both kernels together against the bfloat16 linear layer
that they replace, what torch.compile makes of the operation's body, and the roofline of the two kernels."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from gpu_run import compiled_call, peer_seconds, run_case
from harness import Bench

from graphwright import ir
from graphwright.codegen.triton import Kernel, emit
from graphwright.codegen.triton.groups import find_groups
from graphwright.codegen.triton.launch import Launch, load
from graphwright.codegen.triton.low_rank import split
from graphwright.codegen.triton.roofline import Machine
from graphwright.codegen.triton.targets import Target
from graphwright.codegen.triton.tune import device_seconds
from graphwright.ir.low_bit import FORMATS, quantize
from graphwright.runtime.flat import FlatGraph
from graphwright.runtime.lowering import lower
from graphwright.runtime.triton_lowering import TritonLowering


@dataclass(frozen=True)
class Layer:
    """x [rows, k] -> [rows, n] in bfloat16; `rank` 0 for no branch, `rotate` 0 for no rotation, `gelu` for what follows."""

    rows: int
    weight: str
    act: str = "none"
    rank: int = 32
    smooth: bool = True
    rotate: int = 0
    gelu: bool = False
    n: int = 3072
    k: int = 3072

    def __call__(self, x: torch.Tensor, *tensors: torch.Tensor) -> torch.Tensor:
        """The operation, on what `inputs` gives."""
        names = ["weight_q", "weight_scale", "bias"]
        names += ["weight_scale2"] if FORMATS[self.weight].scale == "nv" else []
        names += (["down", "up"] if self.rank else []) + (["smooth"] if self.smooth else [])
        get = dict(zip(names, tensors, strict=True)).get
        y = torch.ops.gw.lowrank_linear(
            x,
            *(get(name) for name in ("weight_q", "weight_scale", "down", "up", "bias")),
            weight_format=self.weight,
            act_format=self.act,
            smooth=get("smooth"),
            weight_scale2=get("weight_scale2"),
            act_scale2=0.01 if self.act.startswith("nv") else 1.0,
            rotate=self.rotate,
        )
        return F.gelu(y) if self.gelu else y

    def eager(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        """What the layer replaces, its weight [n, k] in bfloat16."""
        y = F.linear(x, weight, bias)
        return F.gelu(y) if self.gelu else y


def _layers() -> dict[str, Layer]:
    pairs = {
        4096: [("int8-channel", "int8-token"), ("int4-g64", "none"), ("int4-g64", "int8-token"), ("int4-g64", "int4-g64")],
        16: [("int8-channel", "int8-token"), ("int4-g64", "none"), ("int4-g64", "int4-g64"), ("nvfp4", "none")],
        1: [("int4-g64", "none"), ("nvfp4", "none"), ("int8-channel", "none")],
    }
    pairs[4096] += [("int4-g32", "none"), ("nvfp4", "none"), ("mxfp4", "mxfp4"), ("mxfp8", "mxfp8"), ("mxint8", "mxint8")]
    found = {f"{weight} x {act}, {rows} rows": Layer(rows, weight, act) for rows, each in pairs.items() for weight, act in each}
    found["int4-g64 x int4-g64, rotated, 4096 rows"] = Layer(4096, "int4-g64", "int4-g64", rotate=32)
    found["int8-channel x int8-token, rotated, 16 rows"] = Layer(16, "int8-channel", "int8-token", rotate=64)
    found["int8-channel x int8-token, no branch, 4096 rows"] = Layer(4096, "int8-channel", "int8-token", rank=0)
    found["int8-channel x int8-token, gelu, 4096 rows"] = Layer(4096, "int8-channel", "int8-token", gelu=True)
    found["int4-g64 x none, alone, 1 rows"] = Layer(1, "int4-g64", rank=0, smooth=False)
    return found


LAYERS = _layers()


def inputs(layer: Layer) -> list[torch.Tensor]:
    """Random x and weights."""
    return _inputs(layer, torch.randn)


def empty_inputs(layer: Layer) -> list[torch.Tensor]:
    """Tensors of the types that `inputs` gives, with nothing in them."""
    return _inputs(layer, torch.zeros)


def _inputs(layer: Layer, make: Callable[..., torch.Tensor]) -> list[torch.Tensor]:
    def half(*shape: int) -> torch.Tensor:
        return make(shape, dtype=torch.bfloat16)

    weight = quantize(half(layer.n, layer.k) / layer.k**0.5, layer.weight)
    tensors = [half(layer.rows, layer.k), weight.codes, weight.scale, half(layer.n)]
    tensors += [weight.scale2] if weight.scale2 is not None else []
    tensors += [half(layer.rank, layer.k) / layer.k**0.5, half(layer.n, layer.rank)] if layer.rank else []
    return [*tensors, *([half(layer.k).abs() + 0.5] if layer.smooth else [])]


class _Module(torch.nn.Module):
    def __init__(self, layer: Layer):
        super().__init__()
        self.layer = layer

    def forward(self, *args: Any) -> Any:
        return self.layer(*args)


def kernels_of(layer: Layer, args: Sequence[torch.Tensor], target: Target) -> list[Kernel]:
    """The kernels of a layer with their default tiles."""
    program = ir.capture(_Module(layer), tuple(args), {})
    graph, _ = split(program.main.graph, program.symbols)
    return [emit(group.plan, program.symbols, target=target) for group in find_groups(graph)]


def row(bench: Bench, machine: Machine, name: str, layer: Layer, device: torch.device) -> None:
    """One layer, checked and timed; on a CPU in the interpreter."""
    torch.manual_seed(0)
    args = [tensor.to(device) for tensor in inputs(layer)]
    program = ir.capture(_Module(layer), tuple(args), {})
    lowering = TritonLowering(program.main.graph, program.symbols, interpreted=device.type == "cpu", tune=not bench.quick)
    graph = lower(program.main.graph, lowering)
    kernels = [node.target.kernel for node in graph.nodes if isinstance(node.target, Launch)]
    for kernel in kernels:
        load(kernel).check(device.type)
    torch.use_deterministic_algorithms(False)
    run = FlatGraph(graph)
    x, weight = args[0], torch.randn(layer.n, layer.k).bfloat16().to(device)
    calls = {"eager": lambda: lambda: layer.eager(x, weight, args[3]), "torch.compile": lambda: compiled_call(layer, args)}
    peers = peer_seconds(bench, name, device, calls) | {"roofline": sum(kernel.roofline.seconds(machine) for kernel in kernels)}
    bench.row(name, "time", "s", device_seconds(lambda: run(list(args)), device), peers)
    exact, y = layer(*args).double(), run(list(args))[0].double()
    bench.row(name, "error", "1", ((y - exact).norm() / exact.norm()).item(), {})
    inputs_of = {kernel.name: load(kernel).example_inputs(device) for kernel in kernels}
    each = [(k, device_seconds(lambda k=k: load(k).run(*inputs_of[k.name]), device)) for k in kernels]
    bench.note("; ".join(f"{k.name} {seconds * 1e6:.1f} us, {k.tile}, {k.roofline.line(machine)}" for k, seconds in each))


def low_rank(bench: Bench, machine: Machine, device: torch.device) -> None:
    """All layers, or those that the command line names."""
    torch.set_grad_enabled(False)
    for name, layer in LAYERS.items():
        if not bench.options.kernels or name in bench.options.kernels.split(";"):
            run_case(bench, name, partial(row, bench, machine, name, layer, device))
