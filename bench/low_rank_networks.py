"""Whole networks under `absorb-outliers`, as a part of `bench/low_rank.py`: error, bytes and time against what a user would pick instead;
and the trained dit as a sampler of digits before and after.

Random networks have no outliers, so some are planted that leave the function as it was: for 1 channel in 128 the norm's weight is
multiplied by 30, and the columns of the layers that read it divided.
"""

import copy
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from harness import Bench
from torch import Tensor, nn

import graphwright as gw
from graphwright import models

PEERS = {
    "eager bf16": "torch",
    "torch.compile bf16": "torch",
    "round to nearest": "graphwright",
    "smoothing only": "graphwright",
    "torchao int8 dynamic": "torchao",
    "torchao int4 weights": "torchao",
    "onnxruntime DynamicQuantize": "onnxruntime",
    "onnxruntime MatMulNBits": "onnxruntime",
    "openvino int4 weights": "nncf",
}
FACTOR, SHARE = 30.0, 128
_LLAMA = {
    "input_layernorm": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "post_attention_layernorm": ("mlp.gate_proj", "mlp.up_proj"),
}
ROUND_ONLY: dict[str, Any] = {"rank": 0, "smooth": "none", "shift": False, "budget": 1e9, "rotate": 0, "gptq": False}


@dataclass(frozen=True)
class Case:
    """A network in float32, with its inputs by seed. `planted`: norm -> the layers that read it, by suffix of their names."""

    name: str
    make: Callable[[], nn.Module]
    inputs: Callable[[int], tuple[Tensor, ...]]
    planted: dict[str, Sequence[str]]
    options: dict[str, Any]
    quick: bool = False


def networks(bench: Bench) -> None:
    """Rows for every network, or for the quick ones."""
    wanted = bench.options.network or ("",)
    for case in cases():
        if (case.quick or not bench.quick) and any(text in case.name for text in wanted):
            measure(bench, case)


def cases() -> list[Case]:
    llama = _LLAMA
    unet = {"norm1": ("attn1.to_q", "attn1.to_k", "attn1.to_v"), "norm2": ("attn2.to_q",), "norm3": ("ff.net.0.proj",)}
    digits = {"min_numel": 16384, "rank": 16}
    wide = {"max_bits": 4.57, "grid": 8, "refine": 4}  # coarser than the defaults, for the benchmark's own time
    return [
        Case("dit/digits, trained", lambda: models.load("dit", "digits")[0], _digits_inputs, {}, digits, quick=True),
        Case("decoder/small, 512 tokens", lambda: models.load("decoder", "small")[0], _decoder_inputs, llama, wide),
        Case("diffusers U-Net, 32 x 32", _unet, _unet_inputs, unet, wide),
        Case("transformers Llama, 512 tokens", _llama, _llama_inputs, llama, wide),
    ]


def _digits_inputs(seed: int) -> tuple[Tensor, ...]:
    return models.load("dit", "digits", seed=seed, batch=32)[1]


def _decoder_inputs(seed: int) -> tuple[Tensor, ...]:
    return models.load("decoder", "small", seed=seed, length=512)[1]


def _llama() -> nn.Module:
    import transformers

    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=1024, intermediate_size=2816, num_hidden_layers=4, num_attention_heads=16, num_key_value_heads=4, vocab_size=4096
    )
    model = transformers.LlamaForCausalLM(config).eval()
    return _Logits(model)


class _Logits(nn.Module):
    """A language model as a function from tokens to logits."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.model(input_ids=input_ids, use_cache=False).logits


def _llama_inputs(seed: int) -> tuple[Tensor, ...]:
    return (torch.randint(0, 4096, (1, 512), generator=torch.Generator().manual_seed(seed)),)


def _unet() -> nn.Module:
    import diffusers

    torch.manual_seed(0)
    model = diffusers.UNet2DConditionModel(
        block_out_channels=(320, 640), down_block_types=("CrossAttnDownBlock2D",) * 2, up_block_types=("CrossAttnUpBlock2D",) * 2,
        layers_per_block=1, cross_attention_dim=768, attention_head_dim=8, sample_size=32,
    ).eval()  # fmt: skip
    return _Sample(model)


class _Sample(nn.Module):
    """A U-Net as a function that returns a tensor."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, sample: Tensor, timestep: Tensor, text: Tensor) -> Tensor:
        return self.model(sample, timestep, text, return_dict=False)[0]


def _unet_inputs(seed: int) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(1, 4, 32, 32, generator=generator), torch.tensor([500]), torch.randn(1, 77, 768, generator=generator)


def calibration(bench: Bench) -> None:
    """Seconds that `absorb-outliers` takes with its own options for a Llama of 100 million parameters in linear layers and 32 samples of
    256 tokens, outliers planted; 6 million with `--quick`."""
    import transformers

    torch.manual_seed(0)
    layers, width, length = (2, 512, 64) if bench.quick else (8, 1024, 256)
    config = transformers.LlamaConfig(
        hidden_size=width, intermediate_size=width * 11 // 4, num_hidden_layers=layers, num_attention_heads=width // 64, vocab_size=4096
    )
    module = _Logits(transformers.LlamaForCausalLM(config).eval())
    plant(module, _LLAMA)
    generator = torch.Generator().manual_seed(1)
    samples = [(torch.randint(0, 4096, (1, length), generator=generator),) for _ in range(32)]
    linears = (each for name, each in module.named_modules() if isinstance(each, nn.Linear) and "lm_head" not in name)
    quantized = sum(each.weight.numel() for each in linears)
    for label, formats in {
        "int4 weights": {},
        "int4 x int4": {"act": "int4-g64"},
        "int4 x int4, GPTQ": {"act": "int4-g64", "gptq": True},
    }.items():
        begin = time.perf_counter()
        ours = compiled(module, samples[0], {**formats, "calibration": samples})
        seconds = time.perf_counter() - begin
        left = len(ours.report().passes[-1].left)
        bench.row(f"Llama, {quantized / 1e6:.0f} M parameters, 32 samples, {label}", "calibration", "s", seconds, {})
        bench.note(f"calibration, {label}: compiled in {seconds:.0f} s of at most 600, {left} layers left alone")
        bench.save()


def plant(module: nn.Module, planted: dict[str, Sequence[str]]) -> int:
    """Plants outliers behind the named norms; returns how many norms had them."""
    modules, count = dict(module.named_modules()), 0
    generator = torch.Generator().manual_seed(7)
    for name, norm in modules.items():
        parent, _, last = name.rpartition(".")
        if last not in planted or any(f"{parent}.{reader}" not in modules for reader in planted[last]):
            continue
        weight: Tensor = norm.weight  # type: ignore[assignment]
        channels = torch.randperm(weight.numel(), generator=generator)[: weight.numel() // SHARE]
        with torch.no_grad():
            weight[channels] *= FACTOR
            if getattr(norm, "bias", None) is not None:
                norm.bias[channels] *= FACTOR  # type: ignore[index, operator]
            for reader in planted[last]:
                modules[f"{parent}.{reader}"].weight[:, channels] /= FACTOR  # type: ignore[index, operator]
        count += 1
    return count


def measure(bench: Bench, case: Case) -> None:
    """Errors and bytes of three pairs of formats, and the time of a call in bfloat16."""
    module = case.make()
    count = plant(module, case.planted)
    example = case.inputs(0)
    samples = [case.inputs(seed) for seed in range(1, 9)]
    fresh = case.inputs(100)
    with torch.no_grad():
        expected = module(*fresh)
    bench.note(f"{case.name}: outliers planted behind {count} norms")
    for label, formats in {
        "int4 x int4": {"weight": "int4-g64", "act": "int4-g64", "gptq": True},
        "int4 weights": {"weight": "int4-g64", "gptq": True},
        "int8 x int8": {"weight": "int8-channel", "act": "int8-token", "max_bits": None},
    }.items():
        options = {**case.options, **formats, "calibration": samples}
        begin = time.perf_counter()
        ours = compiled(module, example, options)
        seconds = time.perf_counter() - begin
        sites = ours.report().passes[-1].data["sites"]
        peers = {"round to nearest": compiled(module, example, {**options, **ROUND_ONLY})}
        peers["smoothing only"] = compiled(module, example, {**options, "rank": 0, "budget": 1e9, "gptq": False})
        errors = {name: relative(peer(*fresh), expected) for name, peer in peers.items()}
        if label == "int8 x int8":
            errors |= int8_errors(bench, module, example, fresh, expected)
        if label == "int4 weights":
            errors |= int4_errors(bench, module, example, fresh, expected)
        bench.row(f"{case.name}, {label}", "error", "1", relative(ours(*fresh), expected), errors)
        worst = max((site["error"] / site["budget"] for site in sites), default=0.0)
        absorbed = sorted(site["error"] / site["plain_error"] for site in sites if site["plain_error"] > 3 * site["budget"] / 1.5)
        left = len(ours.report().passes[-1].left)
        text = f"{case.name}, {label}: {len(sites)} sites in {seconds:.0f} s, {left} layers left, error at most {worst:.2f} of the budget"
        if absorbed:
            text += f"; at the {len(absorbed)} sites with outliers {absorbed[0]:.3f} to {absorbed[-1]:.3f} of plain rounding's error"
        bench.note(text)
        own, bf16 = sum(site["bytes_after"] for site in sites), sum(site["bytes_before"] for site in sites) // 2
        if bf16:
            bench.row(f"{case.name}, {label}", "weight_bytes", "B", own, {"eager bf16": bf16})
        bench.save()
    if not bench.quick:
        speed(bench, case, module, samples)
    bench.save()


def compiled(module: nn.Module, example: tuple[Tensor, ...], options: dict[str, Any], backend: str = "aten") -> Any:
    return gw.compile(module, [gw.AbsorbOutliers(**options)], example_inputs=example, backend=backend, cache=False)


def relative(y: Tensor, expected: Tensor) -> float:
    return float((y.double() - expected.double()).norm() / expected.double().norm())


def sampler(bench: Bench) -> None:
    """How good samples of the trained dit are, by the float network (as the peer "eager bf16", in bfloat16) and by quantized ones."""
    from graphwright.models.digits import quality
    from graphwright.models.sampling import ddim

    count, steps = (40, 5) if bench.quick else (400, 20)
    module = models.load("dit", "digits")[0]
    labels = torch.arange(count) % 10
    noise = torch.randn(count, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    example = (noise, torch.zeros(count, dtype=torch.int64), labels)
    trajectory: list[tuple[Tensor, ...]] = []

    def watched(*inputs: Tensor) -> Tensor:
        trajectory.append(tuple(each.clone() for each in inputs))
        return module(*inputs)

    with torch.no_grad():
        ddim(watched, noise, labels, steps=steps)
        before = quality(ddim(module, noise, labels, steps=steps), labels)
        half = copy.deepcopy(module).bfloat16()
        in_half = quality(ddim(lambda x, t, c: half(x.bfloat16(), t, c).float(), noise, labels, steps=steps), labels)
    for label, formats in {
        "int4 x int4": {"weight": "int4-g64", "act": "int4-g64"},
        "int4 weights": {"weight": "int4-g64"},
        "int8 x int8": {"weight": "int8-channel", "act": "int8-token"},
    }.items():
        options = {"min_numel": 16384, "rank": 16, **formats, "calibration": trajectory[:: max(1, steps // 5)]}
        ours = quality(ddim(compiled(module, example, options), noise, labels, steps=steps), labels)
        plain = quality(ddim(compiled(module, example, {**options, **ROUND_ONLY}), noise, labels, steps=steps), labels)
        for metric in ("frechet_distance", "accuracy"):
            peers = {"eager bf16": getattr(in_half, metric), "round to nearest": getattr(plain, metric)}
            bench.row(f"digits by dit, {label}", metric, "1", getattr(ours, metric), peers)
    bench.note(f"digits by dit, float32: {before} ({count} samples, {steps} steps of DDIM)")


def language(bench: Bench) -> None:
    """Perplexity of held-out text by the trained decoder, and by quantized ones that were calibrated on its training text."""
    from graphwright.models import text

    count = 4 if bench.quick else 32  # windows of held-out text; and of training text, to calibrate with, 8
    module = models.load("decoder", "text")[0]
    ids = torch.tensor(text.encode(text.held_out()))[: count * text.CONTEXT + 1]
    known = torch.tensor(text.encode(text.training()[: 1 << 17]))
    samples = [(known[n * text.CONTEXT : (n + 1) * text.CONTEXT].view(1, -1),) for n in range(8)]
    half = copy.deepcopy(module).bfloat16()
    before = text.perplexity(_NoGrad(module), ids).per_token
    in_half = text.perplexity(lambda x: _NoGrad(half)(x).float(), ids).per_token
    for label, formats in {
        "int4 x int4": {"weight": "int4-g64", "act": "int4-g64", "gptq": True},
        "int4 weights": {"weight": "int4-g64", "gptq": True},
        "int8 x int8": {"weight": "int8-channel", "act": "int8-token"},
    }.items():
        options = {"min_numel": 16384, "rank": 16, **formats, "calibration": samples}
        ours = compiled(module, samples[0], options)
        plain = compiled(module, samples[0], {**options, **ROUND_ONLY})
        peers = {"eager bf16": in_half, "round to nearest": text.perplexity(plain, ids).per_token}
        bench.row(f"text by decoder, {label}", "perplexity", "1", text.perplexity(ours, ids).per_token, peers)
        report = ours.report().passes[-1]
        own, bf16 = (sum(site[key] for site in report.data["sites"]) for key in ("bytes_after", "bytes_before"))
        counts = f"{len(report.data['sites'])} sites, {len(report.left)} layers left"
        bench.note(f"text by decoder, {label}: {counts}, {own / bf16 * 2:.3f} of bfloat16's bytes")
    bench.note(f"text by decoder, float32: perplexity {before:.4f} of {len(ids) - 1} held-out tokens")


# --- bytes -----------------------------------------------------------------------------------------------------------------


def files(bench: Bench, case: str, half: nn.Module, ours: Any, example: tuple[Tensor, ...]) -> None:
    """The artifact, and the weights that a process holds that loads it, against those of the same network in bfloat16: what is not
    quantized, such as embeddings, is in both."""
    with tempfile.TemporaryDirectory() as folder:
        ours.save(Path(folder) / "ours.gw")
        gw.compile(half, example_inputs=example, backend="aten", cache=False).save(Path(folder) / "bf16.gw")
        sizes = {name: (Path(folder) / f"{name}.gw").stat().st_size for name in ("ours", "bf16")}
        bench.row(case, "artifact_bytes", "B", sizes["ours"], {"eager bf16": sizes["bf16"]})
        resident = {name: resident_bytes(Path(folder) / f"{name}.gw") for name in sizes}
        bench.row(case, "resident_weight_bytes", "B", resident["ours"], {"eager bf16": resident["bf16"]})


_RESIDENT = """
import sys, torch, graphwright as gw
def tensors(values):
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in values}.values())
model = gw.load(sys.argv[1], backend="tuned", cache=False)
model(*torch.load(sys.argv[2]))
count, packed = model.report().packs
print(tensors([w.tensor for w in model.program.weights.values()]) + packed)
"""


def resident_bytes(artifact: Path) -> float:
    """Bytes of weights, packed copies included, that a fresh process holds after one call of the artifact."""
    program = gw.load(artifact, backend="aten", cache=False).program
    values = [node.meta["val"] for node in program.main.placeholders]
    inputs = artifact.with_suffix(".inputs")
    torch.save(tuple(torch.zeros(value.shape, dtype=value.dtype) for value in values), inputs)
    found = subprocess.run([sys.executable, "-c", _RESIDENT, artifact, inputs], capture_output=True, text=True, check=True)
    return float(found.stdout.strip().splitlines()[-1])


# --- peers -----------------------------------------------------------------------------------------------------------------


def int8_errors(bench: Bench, module: nn.Module, example: Any, fresh: Any, expected: Tensor) -> dict[str, float]:
    errors = {}
    if "torchao int8 dynamic" not in bench.missing:
        errors |= attempt(bench, "torchao int8 dynamic", lambda: relative(torchao_int8(module)(*fresh), expected))
    if "onnxruntime DynamicQuantize" not in bench.missing:
        errors |= attempt(bench, "onnxruntime DynamicQuantize", lambda: relative(onnx_run(module, example, "dynamic")(*fresh), expected))
    return errors


def int4_errors(bench: Bench, module: nn.Module, example: Any, fresh: Any, expected: Tensor) -> dict[str, float]:
    errors = {}
    if "torchao int4 weights" not in bench.missing:
        errors |= attempt(bench, "torchao int4 weights", lambda: relative(torchao_int4(module)(*fresh), expected))
    if "onnxruntime MatMulNBits" not in bench.missing:
        errors |= attempt(bench, "onnxruntime MatMulNBits", lambda: relative(onnx_run(module, example, "4 bits")(*fresh), expected))
    if "openvino int4 weights" not in bench.missing:
        errors |= attempt(bench, "openvino int4 weights", lambda: relative(openvino_int4(module, example)(*fresh), expected))
    return errors


def attempt(bench: Bench, peer: str, run: Callable[[], float]) -> dict[str, float]:
    """The peer's error, or a note that it cannot run the network."""
    try:
        return {peer: run()}
    except Exception as error:
        bench.note(f"{peer} fails: {type(error).__name__}: {str(error).splitlines()[0][:150] if str(error) else ''}")
        return {}


def torchao_int8(module: nn.Module) -> nn.Module:
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

    copied = copy.deepcopy(module)
    quantize_(copied, Int8DynamicActivationInt8WeightConfig())
    return _NoGrad(copied)


def torchao_int4(module: nn.Module) -> nn.Module:
    """4-bit integers in groups of 64 with zero points, as torchao emulates them on any device."""
    from torchao.quantization import IntxWeightOnlyConfig, quantize_
    from torchao.quantization.granularity import PerGroup

    copied = copy.deepcopy(module)
    quantize_(copied, IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=PerGroup(64)))
    return _NoGrad(copied)


class _NoGrad(nn.Module):
    def __init__(self, module: nn.Module):
        super().__init__()
        self.module = module

    @torch.no_grad()
    def forward(self, *inputs: Tensor) -> Tensor:
        return self.module(*inputs)


def onnx_run(module: nn.Module, example: tuple[Tensor, ...], how: str) -> Callable[..., Tensor]:
    import onnx
    import onnxruntime

    with tempfile.TemporaryDirectory() as folder:
        path, out = Path(folder) / "model.onnx", Path(folder) / "quantized.onnx"
        torch.onnx.export(module, example, path, dynamo=True, verbose=False, external_data=False)
        if how == "dynamic":
            from onnxruntime.quantization import QuantType, quantize_dynamic

            quantize_dynamic(path, out, weight_type=QuantType.QInt8, per_channel=True)
            quantized = onnx.load(out)
        else:
            from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer

            quantizer = MatMulNBitsQuantizer(onnx.load(path), bits=4, block_size=64, is_symmetric=True)
            quantizer.process()
            quantized = quantizer.model.model
        session = onnxruntime.InferenceSession(quantized.SerializeToString(), providers=["CPUExecutionProvider"])
    names = [each.name for each in session.get_inputs()]

    def run(*inputs: Tensor) -> Tensor:
        return torch.from_numpy(session.run(None, dict(zip(names, (each.numpy() for each in inputs), strict=True)))[0])

    return run


def openvino_int4(module: nn.Module, example: tuple[Tensor, ...]) -> Callable[..., Tensor]:
    import nncf
    import openvino

    converted = openvino.convert_model(module, example_input=example)
    packed = nncf.compress_weights(converted, mode=nncf.CompressWeightsMode.INT4_SYM, group_size=64, ratio=1.0, all_layers=False)
    model = openvino.Core().compile_model(packed, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    return lambda *inputs: torch.from_numpy(model([each.numpy() for each in inputs])[0])


# --- time ------------------------------------------------------------------------------------------------------------------


def speed(bench: Bench, case: Case, module: nn.Module, samples: list[tuple[Tensor, ...]]) -> None:
    """A call in bfloat16: 8-bit weights and activations, and 4-bit weights, against eager and torch.compile."""
    half = copy.deepcopy(module).bfloat16()

    def halved(inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return tuple(each.bfloat16() if each.is_floating_point() else each for each in inputs)

    example, calibration = halved(case.inputs(0)), [halved(sample) for sample in samples]
    compiled_peer = torch.compile(half)
    with torch.no_grad():
        for label, formats in {
            "int8 x int8": {"weight": "int8-channel", "act": "int8-token", "max_bits": None},
            "int4 weights": {"weight": "int4-g64"},
        }.items():
            ours = compiled(half, example, {**case.options, **formats, "calibration": calibration}, backend="tuned")
            peers = {"eager bf16": lambda: half(*example), "torch.compile bf16": lambda: compiled_peer(*example)}
            bench.time(f"{case.name}, {label}, bfloat16", ours=lambda ours=ours: ours(*example), peers=peers)  # type: ignore[misc]
            files(bench, f"{case.name}, {label}, bfloat16", half, ours, example)
