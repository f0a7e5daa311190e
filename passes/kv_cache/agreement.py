"""Whether a decoder's functions of one step give what `main` gives of the whole: what a prompt's tokens do to one another elsewhere than in
attention (a convolution over the length, a sum over it) shows here.

A prompt goes through `prefill` but for its last tokens, these through `decode`, and all of it through `verify` where there is one.
"""

from collections.abc import Callable
from typing import Any

import torch

from ...ir import Program
from ...ir.errors import PassError
from ...ir.float64 import NoFloat64, to_float64
from ...ir.run import run
from ..inputs import random_inputs
from ..verdict import PROMISE, Verdict
from .decoder import Decoder, find_decoder
from .stepping import Stepping, largest_difference

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
    length = min(LENGTH, program.symbols.highest(decoder.length))
    if length <= STEPS:
        return
    highest = int(random_inputs(program)[program.main.placeholders.index(decoder.tokens)].max()) + 1
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, highest, (ROWS, length), generator=generator).to(decoder.tokens.meta["val"].device)
    worst = max(_differences(program, decoder, tokens))
    if not worst <= COARSE.get(decoder.logits.meta["val"].dtype, 0.3):
        raise PassError(
            f"kv-cache: prefill and decode differ from the whole by {worst:.1e} of the logits: tokens meet elsewhere than in attentions, "
            "in a convolution or a sum over the length, and no cache holds what is needed there"
        )


def judge_steps(program: Program, inputs: list[Any], widen: Callable[[Program], Program] = to_float64) -> Verdict:
    """The exact contract of the functions of one step on the inputs of `main`: 1e-10 of the logits in float64, into which `widen` brings
    the program."""
    found = in_float64(program, inputs, widen)
    if isinstance(found, Verdict):
        return found
    wide, decoder, tokens = found
    if tokens.shape[1] < STEPS + 1:
        return Verdict("inconclusive", f"the example has {tokens.shape[1]} tokens, too few to be taken in parts")
    worst = max(_differences(wide, decoder, tokens))
    if not worst <= PROMISE:
        return Verdict("wrong", f"prefill and decode differ from the whole by {worst:.1e} of the logits in float64", rewrite_error=worst)
    return Verdict("right", rewrite_error=worst)


def in_float64(
    program: Program, inputs: list[Any], widen: Callable[[Program], Program] = to_float64
) -> tuple[Program, Decoder, torch.Tensor] | Verdict:
    """The float64 program, the decoder that its `main` is, and the tokens among the `inputs` of that; a verdict where there is none."""
    try:
        wide = widen(program)
    except NoFloat64 as error:
        return Verdict("inconclusive", str(error))
    decoder = find_decoder(wide, wide.main)
    if not isinstance(decoder, Decoder):
        return Verdict("wrong", f"main is no decoder any more: {decoder.reason}")
    return wide, decoder, inputs[wide.main.placeholders.index(decoder.tokens)].to(torch.int64)


def _differences(program: Program, decoder: Decoder, tokens: torch.Tensor) -> list[float]:
    """Largest differences of logits from those of the whole, relative to the largest of these: prefill, each decode, verify."""
    index = [leaf is decoder.logits for leaf in program.main.outputs].index(True)
    whole = run(program, decoder.inputs(program, tokens))[0][index]
    batch, length = tokens.shape
    rows, scale, prompt = torch.arange(batch, device=tokens.device).flip(0), float(whole.abs().max()), length - STEPS
    step = Stepping(program, rows, length)
    # A token more than the prompt has, to see that padding does nothing.
    got = [step("prefill", tokens[:, : prompt + 1], 0, torch.full_like(rows, prompt))]
    got += [step("decode", tokens[:, place : place + 1], place) for place in range(prompt, length)]
    differences = [largest_difference(logits, whole[:, place], scale) for place, logits in enumerate(got, prompt - 1)]
    if "verify" not in program.functions:
        return differences
    verified = Stepping(program, rows, length)("verify", tokens, 0)
    return [*differences, largest_difference(verified, whole, scale)]
