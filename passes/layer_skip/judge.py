"""Whether the functions of a schedule, over caches, give what the schedule means: the pass over all positions without caches."""

from collections.abc import Mapping
from typing import Any

import torch

from ...ir import Program
from ...ir.float64 import NoFloat64, to_float64
from ...ir.run import run
from ..kv_cache.agreement import empty_caches
from ..kv_cache.decoder import Decoder, find_decoder
from ..verdict import PROMISE, Verdict
from .reference import SkipReference
from .units import find_units


def judge_levels(program: Program, inputs: list[Any], schedule: Mapping[str, Any], unit: str) -> Verdict:
    """In float64, on the tokens of `inputs`: prefill of a prompt, then a step on each level in turn, the draft of speculation the last."""
    try:
        wide = to_float64(program)
    except NoFloat64 as error:
        return Verdict("inconclusive", str(error))
    decoder = find_decoder(wide, wide.main)
    if not isinstance(decoder, Decoder):
        return Verdict("wrong", f"main is no decoder any more: {decoder.reason}")
    names = [str(node.target) for node in program.main.placeholders if node.meta.get("role", "input") == "input"]
    tokens = inputs[names.index(str(decoder.tokens.target))].to(torch.int64)
    levels, functions = list(schedule["levels"]), list(schedule["functions"])
    if schedule["mode"] == "speculative":
        levels, functions = [*levels, schedule["draft_layers"]], [*functions, schedule["draft"]]
    prompt = tokens.shape[1] - len(levels)
    if prompt < 1:
        tokens = tokens.repeat(1, len(levels) // tokens.shape[1] + 2)[:, : len(levels) + 2]
        prompt = 2
    units = find_units(wide, decoder, unit)
    everything = [each.index for each in units]
    start = levels[0] if schedule["prefill"] == "first" else everything
    active = [start] * prompt + levels
    reference = SkipReference(wide, decoder, units)
    expected = reference.logits(tokens[:, : len(active)], active)
    worst = _largest_difference(wide, functions, tokens, prompt, expected)
    if not worst <= PROMISE:
        return Verdict("wrong", f"the functions of the levels differ from the schedule's meaning by {worst:.1e}", rewrite_error=worst)
    return Verdict("right", rewrite_error=worst)


def _largest_difference(program: Program, functions: list[str], tokens: torch.Tensor, prompt: int, expected: torch.Tensor) -> float:
    """Of logits, relative to the largest; caches hold NaN where nothing was written."""
    batch = tokens.shape[0]
    caches = empty_caches(program, batch, tokens.shape[1])
    at, rows = torch.zeros(batch, dtype=torch.int64, device=tokens.device), torch.arange(batch, device=tokens.device)
    scale, worst = float(expected.abs().max()) or 1.0, 0.0

    def take(function: str, part: torch.Tensor, start: int, place: int, *more: torch.Tensor) -> float:
        named = [str(node.target) for node in program.functions[function].placeholders]
        held = [caches[name] for name in named if name in caches]
        outputs, new = run(program, [part, at + start, rows, *more, *held], function=function)
        caches.update({name.removeprefix("input:"): value for name, value in new.items()})
        difference = float((outputs[0] - expected[:, place]).abs().max()) / scale
        return difference if difference == difference else float("inf")

    worst = take("prefill", tokens[:, :prompt], 0, prompt - 1, at + prompt)
    for step, function in enumerate(functions):
        worst = max(worst, take(function, tokens[:, prompt + step : prompt + step + 1], prompt + step, prompt + step))
    return worst
