"""Decoding with explicit caches, and with fewer layers the later a token stands, against what a user would pick and what theory allows.

Section "decode": `compile_decoder(model).generate` on a Llama of 100M random parameters, seconds a new token, prompt included: against
transformers and onnxruntime, which runs the same decoder with its caches bound from step to step. Then one decoding step against the
time in which the machine reads the weights.

Section "schedule": `layer-skip` on deeper Llamas, one of them of the sizes of OPT-1.3B. Steps of all levels cost n c + c_h, n the layers
that run; c and c_h are fitted to steps of all layers and of few. Rows compare the mean step of a schedule with that of the full model,
and with what its mean number of layers allows, each round by itself.

Sections "quality" and "speculative": `trained_decoder.py` says what they are. With --quick ours runs kernels of ATen alone.

    python bench/layer_skip.py [--quick] [--only SECTION] [--case TEXT] [--plot FILE] [--json FILE]
"""

import argparse
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import decoder_peers
import torch
import trained_decoder
from decoder_peers import VOCABULARY
from harness import Bench
from torch import Tensor
from trained_decoder import backend

import graphwright as gw

PEERS = {
    "transformers static": "transformers",
    "transformers dynamic": "transformers",
    "onnxruntime": "onnxruntime",
    "weights read": "torch",
    "all layers": "torch",
    "by mean layers": "torch",
    "prompts": "torch",
    "drafts": "torch",
}
PROMPT, NEW = 64, 64
DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16}
QUICK_BUDGET = 40.0  # seconds after which --quick begins no other section
READ_BYTES = 2**30  # far beyond the caches of the processor


@dataclass(frozen=True)
class Sizes:
    """hidden and layers of a Llama, the batches, and what dtypes are measured."""

    hidden: int
    layers: int
    batches: tuple[int, ...] = (1, 8)
    dtypes: tuple[str, ...] = ("f32", "bf16")


@dataclass(frozen=True)
class Decay:
    """A schedule that falls from n_max to n_min layers over all new tokens, the lowest layer and the highest others."""

    n_max: int
    n_min: int

    def __str__(self) -> str:
        return f"constant {self.n_min}" if self.n_max == self.n_min else f"{self.n_max} to {self.n_min}"

    @property
    def passes(self) -> list[gw.LayerSkip]:
        return [gw.LayerSkip(n_max=self.n_max, n_min=self.n_min, horizon=NEW, warmup=1)]


DECODE, QUICK_DECODE = Sizes(768, 12), Sizes(256, 3, (1,), ("f32",))
DEPTH, QUICK_DEPTH = Sizes(512, 24, dtypes=("f32",)), Sizes(256, 6, (1,), ("f32",))
OPT_1_3B = Sizes(2048, 24, (1,), ("bf16",))  # those of the network that SkipDecode (2307.02628) is measured on
FEW = 6  # c and c_h are fitted to steps of all layers and of a FEW-th of them


def main() -> None:
    bench = Bench("layer_skip", PEERS, add_arguments=_arguments)
    torch.manual_seed(0)
    begin = time.perf_counter()
    with torch.no_grad():
        for section in bench.options.only or SECTIONS:
            if bench.quick and time.perf_counter() - begin > QUICK_BUDGET:
                bench.note(f"{section}: left out, the time of --quick is spent")
                continue
            if section in OF_TRANSFORMERS and "transformers static" in bench.missing:
                bench.note(f"{section}: left out, transformers is not installed, whose Llama it runs: make bench-deps")
                continue
            SECTIONS[section](bench)
            bench.save()
    bench.finish()


def _arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--only", action="append", choices=SECTIONS, help="only this section (may be repeated)")
    parser.add_argument("--case", default="", metavar="TEXT", help="only cases of decode and schedule with TEXT in their names")
    trained_decoder.add_arguments(parser)


# --- decode ----------------------------------------------------------------------------------------------------------------


def decode(bench: Bench) -> None:
    """Seconds a new token, and a step beside the time that its weights take to be read."""
    sizes = QUICK_DECODE if bench.quick else DECODE
    for dtype in sizes.dtypes:
        cases = [(f"llama {sizes.layers} layers, {dtype}, batch {batch}", batch) for batch in sizes.batches]
        cases = [(name, batch) for name, batch in cases if bench.options.case in name]
        if not cases:
            continue
        model = decoder_peers.llama(sizes.hidden, sizes.layers, DTYPES[dtype])
        contestants = _contestants(bench, model, dtype)
        for name, batch in cases:
            _decode_case(bench, name, model, contestants, torch.randint(0, VOCABULARY, (batch, PROMPT)))


def _contestants(bench: Bench, model: Any, dtype: str) -> dict[str, decoder_peers.Generate]:
    """The peers by name."""
    made = {f"transformers {cache}": decoder_peers.transformers_generate(model, cache) for cache in ("static", "dynamic")}
    if "onnxruntime" in bench.missing:
        return made
    if dtype != "f32":
        bench.note(f"onnxruntime: its CPU kernels have no {dtype}")
        return made
    return made | {"onnxruntime": decoder_peers.onnxruntime_generate(model, bench.threads)}


def _decode_case(bench: Bench, name: str, model: Any, peers: dict[str, decoder_peers.Generate], prompts: Tensor) -> None:
    ours = Timed(gw.compile_decoder(model, backend=backend(bench)), prompts)
    tokens = ours().tokens
    if model.dtype == torch.float32:
        for peer, generate in peers.items():
            assert generate(prompts, NEW) == tokens, f"{name}: the tokens of {peer} are others"
    memory = torch.ones(READ_BYTES // 4)
    contestants = {peer: partial(generate, prompts, NEW) for peer, generate in peers.items()}
    samples = bench.interleaved({"ours": ours, **contestants, "read": memory.sum})
    reading = READ_BYTES / min(samples.pop("read"))
    times = {each: statistics.median(values) / NEW for each, values in samples.items()}
    bench.row(name, "time a token", "s", times.pop("ours"), times)
    weights = sum(parameter.nbytes for parameter in model.parameters())
    bench.row(name, "decode step", "s", ours.step, {"weights read": weights / reading})
    bench.note(f"{name}: {weights / 2**20:.0f} MiB of weights, read at {reading / 2**30:.1f} GiB/s at best")


class Timed:
    """Generates behind `prompts`, and remembers how long its decoding steps took."""

    def __init__(self, compiled: gw.CompiledModel, prompts: Tensor, **options: Any):
        self._generate = partial(compiled.generate, prompts, NEW, **options)
        self._seconds: list[float] = []

    def __call__(self) -> Any:
        made = self._generate()
        self._seconds.append(made.figures.decode_seconds / made.figures.steps)
        return made

    def forget(self) -> None:
        """What was measured so far, as warm-up."""
        self._seconds.clear()

    @property
    def step(self) -> float:
        """Seconds of a step, the median of generations."""
        return statistics.median(self._seconds)

    def last(self, rounds: int) -> list[float]:
        """Seconds of a step in each of the last generations."""
        return self._seconds[-rounds:]


# --- schedule --------------------------------------------------------------------------------------------------------------


def schedule(bench: Bench) -> None:
    """A schedule's mean step against that of all layers, and against what its mean number of layers allows."""
    for sizes in (QUICK_DEPTH,) if bench.quick else (DEPTH, OPT_1_3B):
        layers = sizes.layers
        if sizes is OPT_1_3B:
            decays = [Decay(2 * layers // 3, layers // 3), Decay(layers // 3, layers // 12)]
        else:
            decays = [Decay(2 * layers // 3, layers // 3), Decay(layers // 2, layers // 6), Decay(layers // 3, layers // 3)]
        _schedules(bench, sizes, decays)


def _schedules(bench: Bench, sizes: Sizes, decays: Sequence[Decay]) -> None:
    few = sizes.layers // FEW
    for dtype in sizes.dtypes:
        names = [f"{sizes.layers} layers of {sizes.hidden}, {dtype}, batch {batch}" for batch in sizes.batches]
        if not any(bench.options.case in name for name in names):
            continue
        full = gw.compile_decoder(decoder_peers.llama(sizes.hidden, sizes.layers, DTYPES[dtype]), backend=backend(bench))
        scheduled = {decay: gw.compile(full, decay.passes, backend=backend(bench)) for decay in (*decays, Decay(few, few))}
        for name, batch in zip(names, sizes.batches, strict=True):
            if bench.options.case in name:
                _schedule_case(bench, name, full, scheduled, torch.randint(0, VOCABULARY, (batch, PROMPT)))
                bench.save()


def _schedule_case(bench: Bench, name: str, full: gw.CompiledModel, scheduled: Mapping[Decay, gw.CompiledModel], prompts: Tensor) -> None:
    whole, timed = Timed(full, prompts), {decay: Timed(compiled, prompts) for decay, compiled in scheduled.items()}
    contestants: dict[str, Callable[[], object]] = {"full": whole} | {str(decay): each for decay, each in timed.items()}
    for each in (whole, *timed.values()):
        each()  # compiles every level
        each.forget()
    samples = bench.interleaved(contestants)
    seconds = {each: statistics.median(values) / NEW for each, values in samples.items()}
    rounds = len(samples["full"])
    *decays, few = scheduled
    layers = int(scheduled[few].program.schedules["layer-skip"]["units"])
    for decay in decays:
        mean = mean_layers(scheduled[decay])
        between = (mean - few.n_min) / (layers - few.n_min)
        allowed = [least + between * (most - least) for most, least in zip(whole.last(rounds), timed[few].last(rounds), strict=True)]
        share = _median_ratio(allowed, timed[decay].last(rounds))
        gain, step = _median_ratio(whole.last(rounds), timed[decay].last(rounds)), timed[decay].step
        case = f"{name}, {decay}"
        bench.row(case, "decode step", "s", step, {"all layers": step * gain, "by mean layers": step * share})
        bench.row(case, "time a token", "s", seconds[str(decay)], {"all layers": seconds["full"]})
        bench.note(
            f"{case}: {mean:.1f} layers in the mean; decoding is {gain:.2f} x as fast, {share:.3f} of the {gain / share:.2f} x that they "
            f"allow with the head ({layers / mean:.2f} x of layers alone)"
        )
    of_layer = (whole.step - timed[few].step) / (layers - few.n_min)
    bench.note(f"{name}: a layer costs {of_layer * 1e3:.3f} ms of a step, all else {(whole.step - layers * of_layer) * 1e3:.3f} ms")


def _median_ratio(ones: Sequence[float], others: Sequence[float]) -> float:
    """Of what was measured in the same round, so that a machine that slows down for a while speaks for neither."""
    return statistics.median(one / other for one, other in zip(ones, others, strict=True))


def mean_layers(compiled: gw.CompiledModel) -> float:
    """Of the decoding steps that give NEW tokens, the first of which is the prefill's."""
    table = compiled.program.schedules["layer-skip"]
    levels = [len(level) for level in table["levels"]]
    steps = table["level_of_step"][: NEW - 1]
    steps += table["level_of_step"][-1:] * (NEW - 1 - len(steps))
    return sum(levels[level] for level in steps) / (NEW - 1)


SECTIONS: dict[str, Callable[[Bench], None]] = {
    "decode": decode,
    "schedule": schedule,
    "quality": trained_decoder.quality,
    "speculative": trained_decoder.speculative,
}
OF_TRANSFORMERS = ("decode", "schedule")

if __name__ == "__main__":
    main()
