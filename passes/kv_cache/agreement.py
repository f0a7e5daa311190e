"""Whether a decoder's functions of one step give what `main` gives of the whole: what a prompt's tokens do to one another elsewhere than in
attention (a convolution over the length, a sum over it) shows here.

A prompt goes through `prefill` but for its last tokens, these through `decode`, and all of it through `verify`.
"""

from typing import Any

import torch

from ...ir import Program
from ...ir.errors import PassError
from ...ir.float64 import NoFloat64, to_float64
from ...ir.run import run
from ...ir.symbols import hint
from ..inputs import random_inputs
from ..verdict import PROMISE, Verdict
from .decoder import Decoder, find_decoder

ROWS, LENGTH, STEPS = 2, 6, 2
# Of a sound decoder the two differ by rounding alone; of one whose tokens meet elsewhere by the size of the logits.
COARSE = {torch.float64: 1e-6, torch.float32: 1e-2, torch.float16: 0.2, torch.bfloat16: 0.3}


def check_agreement(program: Program, decoder: Decoder) -> None:
    """Compares a few random tokens in the working dtype; nothing is compared where weights have no values.

    Raises:
        PassError: tokens meet elsewhere than in attentions.
    """
    if any(w.tensor is None or w.tensor.device.type == "meta" for w in program.weights.values()):
        return
    table = random_inputs(program)
    leaves = [node for node in program.main.placeholders if node.meta.get("role", "input") == "input"]
    highest = int(table[leaves.index(decoder.tokens)].max()) + 1
    generator = torch.Generator().manual_seed(0)
    longest = next((s.high for s in program.used_symbols() if program.symbols.text(decoder.length) == s.name), LENGTH)
    if longest <= STEPS:
        return
    tokens = torch.randint(0, highest, (ROWS, min(LENGTH, longest)), generator=generator).to(decoder.tokens.meta["val"].device)
    inputs = _whole(program, decoder, tokens)
    worst = max(_differences(program, decoder, inputs, tokens))
    if not worst <= COARSE.get(decoder.logits.meta["val"].dtype, 0.3):
        raise PassError(
            f"kv-cache: prefill and decode differ from the whole by {worst:.1e} of the logits: tokens meet elsewhere than in attentions, "
            "in a convolution or a sum over the length, and no cache holds what is needed there"
        )


def judge_steps(program: Program, inputs: list[Any]) -> Verdict:
    """The exact contract of the functions of one step on the inputs of `main`: 1e-10 of the logits in float64."""
    try:
        wide = to_float64(program)
    except NoFloat64 as error:
        return Verdict("inconclusive", str(error))
    decoder = find_decoder(wide, wide.main)
    if not isinstance(decoder, Decoder):
        return Verdict("wrong", f"main is no decoder any more: {decoder.reason}")
    leaves = [node for node in program.main.placeholders if node.meta.get("role", "input") == "input"]
    names = [str(node.target) for node in leaves]
    tokens = inputs[names.index(str(decoder.tokens.target))]
    if tokens.shape[1] < STEPS + 1:
        return Verdict("inconclusive", f"the example has {tokens.shape[1]} tokens, too few to be taken in parts")
    worst = max(_differences(wide, decoder, _whole(wide, decoder, tokens), tokens))
    if not worst <= PROMISE:
        return Verdict("wrong", f"prefill and decode differ from the whole by {worst:.1e} of the logits in float64", rewrite_error=worst)
    return Verdict("right", rewrite_error=worst)


def _whole(program: Program, decoder: Decoder, tokens: torch.Tensor) -> list[Any]:
    places = torch.arange(tokens.shape[1], device=tokens.device).repeat(tokens.shape[0], 1)

    def value(node: Any) -> Any:
        if node is decoder.tokens:
            return tokens.to(node.meta["val"].dtype)
        return places.to(node.meta["val"].dtype) if node is decoder.positions else node.meta["val"]

    return [value(node) for node in program.main.placeholders]


def _differences(program: Program, decoder: Decoder, inputs: list[Any], tokens: torch.Tensor) -> list[float]:
    """Largest differences of logits from those of the whole, relative to the largest of these: prefill, each decode, verify."""
    index = [leaf is decoder.logits for leaf in program.main.outputs].index(True)
    whole = run(program, inputs)[0][index]
    batch, length = tokens.shape
    tokens = tokens.to(torch.int64)
    at = torch.zeros(batch, dtype=torch.int64, device=tokens.device)
    rows = torch.arange(batch, device=tokens.device).flip(0)
    scale = float(whole.abs().max())
    results = []

    def take(function: str, part: torch.Tensor, start: int, caches: dict[str, torch.Tensor], expected: torch.Tensor, *more: Any) -> None:
        outputs, new = run(program, [part, at + start, rows, *more, *caches.values()], function=function)
        caches.update({name.removeprefix("input:"): value for name, value in new.items()})
        results.append(float((outputs[0] - expected).abs().max()) / scale if scale else 0.0)

    caches = empty_caches(program, batch, length)
    prompt = length - STEPS
    # A token more than the prompt has, to see that padding does nothing.
    take("prefill", tokens[:, : prompt + 1], 0, caches, whole[:, prompt - 1], at + prompt)
    for step in range(prompt, length):
        take("decode", tokens[:, step : step + 1], step, caches, whole[:, step])
    take("verify", tokens, 0, empty_caches(program, batch, length), whole)
    return results


def empty_caches(program: Program, rows: int, capacity: int) -> dict[str, torch.Tensor]:
    """Slots that hold NaN: what was never written is never read."""
    named = {str(node.target): node.meta["val"] for node in program.functions["decode"].placeholders}
    return {
        name: torch.full((rows, hint(v.size(1)), capacity, hint(v.size(3))), float("nan"), dtype=v.dtype, device=v.device)
        for name, v in named.items()
        if name.startswith("cache_")
    }
