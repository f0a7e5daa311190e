"""Whether the functions of a schedule, over caches, give what the schedule means: the pass over all positions without caches."""

from collections.abc import Mapping
from typing import Any

import torch

from ...ir import Program
from ..kv_cache.agreement import in_float64
from ..kv_cache.stepping import Stepping, largest_difference
from ..verdict import PROMISE, Verdict
from .reference import SkipReference
from .units import find_units, scaled


def judge_levels(program: Program, inputs: list[Any], schedule: Mapping[str, Any], unit: str) -> Verdict:
    """In float64, on the tokens of `inputs`: prefill of a prompt, then a step on each level in turn, the draft of speculation the last."""
    found = in_float64(program, inputs)
    if isinstance(found, Verdict):
        return found
    wide, decoder, tokens = found
    levels, functions = list(schedule["levels"]), list(schedule["functions"])
    if schedule["mode"] == "speculative":
        levels, functions = [*levels, schedule["draft_layers"]], [*functions, schedule["draft"]]
    prompt = tokens.shape[1] - len(levels)
    if prompt < 1:
        tokens = tokens.repeat(1, len(levels) // tokens.shape[1] + 2)[:, : len(levels) + 2]
        prompt = 2
    units = find_units(wide, decoder, unit)
    if "scales" in schedule:
        units = scaled(units, schedule["scales"])
    everything = [each.index for each in units]
    start = levels[0] if schedule["prefill"] == "first" else everything
    active = [start] * prompt + levels
    reference = SkipReference(wide, decoder, units)
    expected = reference.logits(tokens[:, : len(active)], active)
    worst = _largest_difference(wide, functions, tokens, prompt, expected)
    if schedule["mode"] == "speculative" and schedule["reuse_prefix"]:
        whole = reference.logits(tokens, [everything] * tokens.shape[1])
        worst = max(worst, _largest_of_a_burst(wide, schedule["draft"], tokens, whole))
    if not worst <= PROMISE:
        return Verdict("wrong", f"the functions of the levels differ from the schedule's meaning by {worst:.1e}", rewrite_error=worst)
    return Verdict("right", rewrite_error=worst)


def _largest_difference(program: Program, functions: list[str], tokens: torch.Tensor, prompt: int, expected: torch.Tensor) -> float:
    """Of logits, relative to the largest."""
    rows = torch.arange(tokens.shape[0], device=tokens.device)
    step = Stepping(program, rows, tokens.shape[1])
    got = [step("prefill", tokens[:, :prompt], 0, torch.full_like(rows, prompt))]
    got += [step(function, tokens[:, place : place + 1], place) for place, function in enumerate(functions, prompt)]
    scale = float(expected.abs().max())
    return max(largest_difference(logits, expected[:, place], scale) for place, logits in enumerate(got, prompt - 1))


def _largest_of_a_burst(program: Program, draft: str, tokens: torch.Tensor, expected: torch.Tensor) -> float:
    """Of logits, relative to the largest: the first token by `prefill`, the last by `lift`, those between by the draft, all judged."""
    rows, last = torch.arange(tokens.shape[0], device=tokens.device), tokens.shape[1] - 1
    step = Stepping(program, rows, tokens.shape[1])
    step("prefill", tokens[:, :1], 0, torch.ones_like(rows))
    hidden = [step.outputs(draft, tokens[:, place : place + 1], place)[1] for place in range(1, last)]
    hidden.append(step("lift", tokens[:, last:], last))
    got = step("resume", tokens[:, 1:], 1, torch.cat(hidden, 1))
    return largest_difference(got, expected[:, 1:], float(expected.abs().max()))
