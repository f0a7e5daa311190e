"""Round trips: a network of the zoo through passes, out to ONNX, in again, and the same numbers."""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

import graphwright as gw
from graphwright.ir import verify
from graphwright.ir.run import run
from graphwright.passes.low_rank.formats import WEIGHTS
from graphwright.passes.verdict import Verdict
from graphwright.runtime.onnx_check import trials

SIZES = {"video_unet": {"frames": 2, "height": 8, "width": 8}, "video_unet_svd": {"frames": 2, "height": 8, "width": 8}}


@dataclass(frozen=True)
class Trip:
    """A network, passes by text, and options of `export_onnx`. A decoder is compiled with its functions (`compile_decoder`).

    A part of a trip, which is named as the whole, is of the network's first `depth` layers, and of some `functions`.
    """

    network: str
    passes: str = ""
    options: Mapping[str, str] = field(default_factory=dict)
    is_decoder: bool = False
    depth: int | None = None
    functions: tuple[str, ...] | None = None

    def __str__(self) -> str:
        said = [self.network, "decoder" if self.is_decoder else "", self.passes, *self.options.values()]
        return " ".join(part for part in said if part)

    def compiled(self) -> gw.CompiledModel:
        torch.manual_seed(0)
        module, args, kwargs = gw.models.load(self.network, "tiny", **SIZES.get(self.network, {}))
        if self.depth is not None:
            module.layers = module.layers[: self.depth]
        if self.is_decoder:
            return gw.compile_decoder(module, self.passes, backend="aten", cache=False)
        passes = _with_data(self.passes, module, (args, kwargs))
        return gw.compile(module, passes, example_inputs=args, example_kwargs=kwargs, backend="aten", cache=False)


def _with_data(text: str, module: torch.nn.Module, batch: tuple) -> object:
    """The pipeline, with data for passes that take them: what no text says."""
    if text == "smooth":  # which needs them at once
        return [gw.Smooth(calibration=[batch])]
    if text == _STATIC:
        return [gw.Quantize(weight="int4-g32", act="nvfp4", min_numel=0, budget=1.0, calibration=[batch])]
    passes = []
    for each in gw.passes.parse_pipeline(text):
        if isinstance(each, gw.AppendLoRA):
            name, layer = next((name, layer) for name, layer in module.named_modules() if isinstance(layer, torch.nn.Linear))
            adapter = torch.randn(4, layer.in_features), torch.randn(layer.out_features, 4)
            each = dataclasses.replace(each, adapters={name: adapter})
        elif getattr(each, "calibration", ...) is None and isinstance(each, gw.Quantize | gw.AbsorbOutliers):
            each = dataclasses.replace(each, calibration=[batch])
        passes.append(each)
    return passes


def verdicts(compiled: gw.CompiledModel, folder: Path, functions: Sequence[str] | None = None, **options: str) -> dict[str, Verdict]:
    """Of each function, or of `functions`, what came back, on random inputs, against the function itself."""
    program = compiled.program
    files = compiled.export_onnx(folder / "m.onnx", functions=functions, **options).files
    found = {}
    for name, file in zip(functions or program.functions, files, strict=False):  # behind the models: weights beside them
        again = gw.from_onnx(file)
        verify(again)
        trial = next(trials(program, name))
        found[name] = trial.judge(run(again, trial.inputs)[0])
    return found


SLICED = "slice-groups{memory_budget=50%}"
_ALL_LAYERS = "min_numel=0,budget=1.0"
_RAT = "rat-recurrence{chunk=4,window=4,sinks=2}"
_FORMATS = tuple(name for name in WEIGHTS if name not in ("int4-g64", "int4-g128"))  # tiny networks have blocks of 32 at most
_ACTIVATIONS = ("int8-token", "u8-tensor", "mxint8", "mxfp4", "nvfp4")
_STATIC = f"quantize{{weight=int4-g32,act=nvfp4,{_ALL_LAYERS}}}"  # a scale of the whole tensor is measured
_ROUTED = (
    "regroup-experts",
    "regroup-experts,expert-choice{k=2,rule=sigmoid}",
    "regroup-experts,expert-choice{schedule=[1, 4, linear_reverse, row]}",
)


def trips() -> list[Trip]:
    """Every network with every pass that applies to it."""
    found = []
    for network in gw.models.names():
        found += [Trip(network), Trip(network, SLICED), Trip(network, SLICED, {"regions": "unroll"}), Trip(network, "smooth")]
        found += [Trip(network, f"split-low-rank{{rank=4,{_ALL_LAYERS.split(',')[0]}}}")]
        found += [Trip(network, f"absorb-outliers{{weight={form},rank=4,{_ALL_LAYERS}}}") for form in _FORMATS]
        found += [Trip(network, f"quantize{{weight=int8-channel,{_ALL_LAYERS}}},append-lora")]
    found += [Trip("vit", f"quantize{{weight=int4-g32,act={act},{_ALL_LAYERS}}}") for act in _ACTIVATIONS]
    found += [Trip("moe_dlm", passes) for passes in _ROUTED]
    found += [Trip("decoder", _RAT), Trip("decoder", "rat-recurrence{chunk=4,window=4,sinks=2,reset=false,local=state}")]
    found += [Trip("decoder", passes, is_decoder=True) for passes in ("", _RAT, "layer-skip{n_max=2,n_min=1,horizon=8}")]
    found += [Trip("decoder", "layer-skip{mode=speculative,draft=[0],gamma=3}", is_decoder=True)]
    found += [Trip("rat", is_decoder=True)]
    return found
