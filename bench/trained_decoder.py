"""The zoo's trained language model with fewer layers, as a part of `bench/layer_skip.py`: what schedules cost in perplexity beside what
they gain in time, and self-speculation, whose tokens are those of all layers.

The held-out text's first CALIBRATION tokens rank the layers, the rest is measured on.
"""

import functools
import html
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from harness import Bench
from torch import Tensor

import graphwright as gw
from graphwright import models
from graphwright.models import text
from graphwright.passes.kv_cache.decoder import Decoder, find_decoder
from graphwright.passes.layer_skip.ranking import Calibration, Profile
from graphwright.passes.layer_skip.reference import SkipReference
from graphwright.passes.layer_skip.units import find_units
from graphwright.runtime.decoding.gain import MOST_DRAFTS

LAYERS = models.decoder.SIZES["text"].depth
CALIBRATION, PROMPT, WINDOW = 1024, 64, text.CONTEXT
DRAFTS, GAMMAS = (LAYERS // 2, LAYERS // 4), (4, None)  # None: as many as `generate` chooses
LONGEST_PROMPT, NEW = 64, 32
ROWS = 32  # prompts at once where tokens are compared


@dataclass(frozen=True)
class Trained:
    """The network with its layers in order of how much they matter (`ranking`), the first half of each sample being a prompt, and the
    meaning of schedules (`reference`)."""

    compiled: gw.CompiledModel
    reference: SkipReference
    ranking: list[int]
    measured: Tensor  # [N] ids

    @staticmethod
    @functools.cache
    def of(backend: str, effort: str) -> "Trained":
        ids = torch.tensor(text.encode(text.held_out()))
        compiled = gw.compile_decoder(models.load("decoder", "text")[0], backend=backend)
        program = compiled.program
        decoder = find_decoder(program, program.main)
        assert isinstance(decoder, Decoder), "the zoo's decoder is no decoder"
        units = find_units(program, decoder, "layer")
        profile = Profile(program, decoder, units, Calibration((ids[:CALIBRATION].reshape(-1, WINDOW),)))
        return Trained(compiled, SkipReference(program, decoder, units), profile.ranking("output_kl", 1, effort), ids[CALIBRATION:])


# --- quality ---------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Point:
    """A schedule that ends at `n_min` layers, measured."""

    family: str
    n_min: int
    tokens_per_second: float
    perplexity: float


def quality(bench: Bench) -> None:
    """Perplexity behind prompts of PROMPT tokens, the rest of each window being read as if it were generated, and seconds a new token."""
    trained = Trained.of(backend(bench), "one_shot" if bench.quick else "greedy")
    bench.note(f"quality: layers of decoder:text, those that matter most first: {', '.join(map(str, trained.ranking))}")
    options: dict[str, dict[str, Any]] = {
        "linear by output_kl": {"rank": trained.ranking},
        "linear top": {"rank": "top"},
        "constant by output_kl": {"rank": trained.ranking, "decay": "constant"},
    }
    compiled = {
        (family, n_min): gw.compile(trained.compiled, [gw.LayerSkip(n_min=n_min, horizon=WINDOW - PROMPT, **each)], backend=backend(bench))
        for family, each in options.items()
        for n_min in ((6,) if bench.quick else (10, 8, 6, 4))
    }
    prompt = trained.measured[None, :PROMPT]
    contestants: dict[str, Callable[[], object]] = {
        f"{family}, {n_min}": partial(each.generate, prompt, WINDOW - PROMPT) for (family, n_min), each in compiled.items()
    }
    contestants["all layers"] = partial(trained.compiled.generate, prompt, WINDOW - PROMPT)
    seconds = {name: statistics.median(each) / (WINDOW - PROMPT) for name, each in bench.interleaved(contestants).items()}
    whole = Point("all layers", LAYERS, 1 / seconds["all layers"], perplexity(trained, [list(range(LAYERS))] * WINDOW))
    points = [whole]
    for (family, n_min), each in compiled.items():
        case = f"{family}, {LAYERS} to {n_min}" if family.startswith("linear") else f"{family}, {n_min}"
        point = Point(family, n_min, 1 / seconds[f"{family}, {n_min}"], perplexity(trained, active_layers(each)))
        bench.row(case, "perplexity", "1", point.perplexity, {"all layers": whole.perplexity})
        bench.row(case, "time a token", "s", 1 / point.tokens_per_second, {"all layers": 1 / whole.tokens_per_second})
        points.append(point)
    if bench.options.plot:
        bench.options.plot.write_text(picture(points), encoding="utf-8")


def backend(bench: Bench) -> str:
    """Ours, or kernels of ATen alone where compiling takes longer than there is."""
    return "aten" if bench.quick else "auto"


def active_layers(compiled: gw.CompiledModel) -> list[list[int]]:
    """The layers that run at each position of a window: all in the prompt, then those of the schedule."""
    table = compiled.program.schedules["layer-skip"]
    levels, steps = table["levels"], table["level_of_step"]
    return [list(range(LAYERS))] * PROMPT + [levels[steps[min(step, len(steps) - 1)]] for step in range(WINDOW - PROMPT)]


def perplexity(trained: Trained, active: Sequence[Sequence[int]]) -> float:
    """exp of the mean of -log p of the tokens that decoding steps predict: those behind the prompt of each window but its first."""
    windows = trained.measured.unfold(0, WINDOW + 1, WINDOW)  # [W, WINDOW + 1]
    losses = [_losses(trained.reference.logits(part[:, :-1].contiguous(), active), part[:, 1:]) for part in windows.split(8)]
    return float(torch.cat(losses)[:, PROMPT:].mean().exp())


def _losses(logits: Tensor, targets: Tensor) -> Tensor:
    """-log p of each target, [B, T]."""
    return -logits.double().log_softmax(-1).gather(-1, targets.unsqueeze(-1)).squeeze(-1)


# --- the plot --------------------------------------------------------------------------------------------------------------

COLORS = {"linear by output_kl": "#2563eb", "linear top": "#d97706", "constant by output_kl": "#16a34a"}
WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 800, 360, 60, 40, 50, 40


def picture(points: Sequence[Point]) -> str:
    """Perplexity over tokens a second as SVG, a curve for each family from all layers on; numbers are the layers that it ends at."""
    whole, *rest = points
    fastest, worst = max(p.tokens_per_second for p in points), max(p.perplexity for p in points)
    slowest, best = min(p.tokens_per_second for p in points), min(p.perplexity for p in points)

    def at(point: Point) -> tuple[float, float]:
        across = (point.tokens_per_second - slowest) / ((fastest - slowest) or 1)
        up = (point.perplexity - best) / ((worst - best) or 1)
        return LEFT + across * (WIDTH - LEFT - RIGHT), HEIGHT - BOTTOM - up * (HEIGHT - TOP - BOTTOM)

    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans-serif" font-size="13">',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>',
        f'<text x="{LEFT}" y="{HEIGHT - 12}">tokens a second, {slowest:.0f} to {fastest:.0f}</text>',
        f'<text x="6" y="{HEIGHT - BOTTOM}">{best:.1f}</text><text x="6" y="{TOP + 4}">{worst:.1f}</text>',
        '<text x="6" y="18">perplexity</text>',
    ]
    for number, (family, color) in enumerate(COLORS.items()):
        curve = [whole, *[point for point in rest if point.family == family]]
        places = [at(point) for point in curve]
        lines.append(f'<text x="{LEFT + 60 + 200 * number}" y="18" fill="{color}">{html.escape(family)}</text>')
        lines.append(
            f'<polyline points="{" ".join(f"{x:.1f},{y:.1f}" for x, y in places)}" fill="none" stroke="{color}" stroke-width="2"/>'
        )
        for point, (x, y) in zip(curve, places, strict=True):
            lines.append(
                f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{color}"/><text x="{x + 6:.1f}" y="{y - 6:.1f}">{point.n_min}</text>'
            )
    return "\n".join([*lines, "</svg>"]) + "\n"


# --- speculation -----------------------------------------------------------------------------------------------------------


def speculative(bench: Bench) -> None:
    """How many prompts get the tokens of plain greedy decoding, how many drafts are taken, and seconds a token."""
    trained = Trained.of(backend(bench), "one_shot" if bench.quick else "greedy")
    prompts = random_prompts(trained.measured, 30 if bench.quick else 1000)
    drafts = [(DRAFTS[0], GAMMAS[0])] if bench.quick else [(size, gamma) for size in DRAFTS for gamma in GAMMAS]
    wide = gw.compile_decoder(models.load("decoder", "text")[0].double(), backend=backend(bench))
    for name, plain in (("f64", wide), ("f32", trained.compiled)):
        expected = plain.generate(prompts, NEW, batch=ROWS).tokens
        drafting = {draft: gw.compile(plain, [_drafts(trained, *draft)], backend=backend(bench)) for draft in drafts}
        for (size, gamma), each in drafting.items():
            made = each.generate(prompts, NEW, batch=ROWS, speculative=True)
            case = f"speculation, {name}, {_shown(size, gamma)}"
            equal = sum(ours == theirs for ours, theirs in zip(made.tokens, expected, strict=True))
            bench.row(case, "prompts with equal tokens", "1", equal, {"prompts": len(prompts)})
            bench.row(case, "drafts taken", "1", made.figures.accepted, {"drafts": made.figures.drafted})
    for batch in (1,) if bench.quick else (1, 8):
        _speculative_speed(bench, trained.compiled, drafting, trained.measured[: batch * PROMPT].reshape(batch, PROMPT))


def random_prompts(ids: Tensor, count: int) -> list[list[int]]:
    """Of random lengths: the odd ones are cut from the text, the even ones random tokens."""
    generator = torch.Generator().manual_seed(0)

    def below(high: int, *shape: int) -> Tensor:
        return torch.randint(high, shape, generator=generator)

    lengths = (1 + below(LONGEST_PROMPT, count)).tolist()
    starts = below(len(ids) - LONGEST_PROMPT, count).tolist()
    return [
        ids[start : start + length].tolist() if number % 2 else below(len(text.vocabulary().tokens), length).tolist()
        for number, (start, length) in enumerate(zip(starts, lengths, strict=True))
    ]


def _drafts(trained: Trained, size: int, gamma: int | None) -> gw.LayerSkip:
    return gw.LayerSkip(mode="speculative", draft=trained.ranking[:size], gamma=gamma)


def _shown(size: int, gamma: int | None) -> str:
    return f"{size} of {LAYERS} layers draft {'as many as gain' if gamma is None else gamma}"


def _speculative_speed(
    bench: Bench, plain: gw.CompiledModel, drafting: dict[tuple[int, int | None], gw.CompiledModel], prompts: Tensor
) -> None:
    """Seconds a decoded token of a row: with drafts at all events, and as `generate` decides by what it measures; what that was."""
    made: dict[str, Any] = {}
    count = WINDOW - PROMPT - MOST_DRAFTS

    def generate(name: str, compiled: gw.CompiledModel, speculative: bool | None) -> None:
        made[name] = compiled.generate(prompts, count, speculative=speculative)

    calls: dict[str, Callable[[], object]] = {"plain": partial(generate, "plain", plain, None)}
    for (size, gamma), each in drafting.items():
        for choice, speculative in (("", True), (", or none", None)):
            name = f"{_shown(size, gamma)}{choice}"
            calls[name] = partial(generate, name, each, speculative)
    seconds = {name: statistics.median(each) / count for name, each in bench.interleaved(calls).items()}
    for name in (each for each in calls if each != "plain"):
        case = f"speculation, f32, {name}, batch {len(prompts)}"
        bench.row(case, "time a token", "s", seconds[name], {"all layers": seconds["plain"]})
        bench.note(f"{case}: {str(made[name]).splitlines()[-1]}; {seconds['plain'] / seconds[name]:.2f} x as fast as plain decoding")


def add_arguments(parser: Any) -> None:
    parser.add_argument("--plot", type=Path, metavar="FILE", help="also draw perplexity over speed as SVG (section quality)")
