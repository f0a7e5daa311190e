"""Text from masks: a network that fills all masked places at once is asked again and again, and its surest answers are kept.

Source: Nie et al. 2025, "Large Language Diffusion Models" (LLaDA), low-confidence remasking in blocks from left to right; specs/
expert_choice.md, section 3.6.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ...ir.errors import InputError
from ...passes.experts.capacity import CapacitySchedule, schedule_of
from ..compiled import CompiledModel
from .ratio import ARGUMENT


@dataclass(frozen=True)
class Denoised:
    """`tokens` i64[B, P + G], prompts first. `experts[i]` is k of step i, experts a token in the mean; empty without a schedule."""

    tokens: Tensor
    steps: int
    experts: tuple[int, ...] = field(default=(), repr=False)

    @property
    def mean_experts(self) -> float | None:
        """Over the steps: what experts cost is in proportion to it. None without a schedule."""
        return sum(self.experts) / len(self.experts) if self.experts else None


@torch.no_grad()
def masked_diffusion_generate(
    network: Callable[..., Any],
    prompt: Tensor,
    length: int,
    *,
    steps: int,
    block: int,
    mask_id: int,
    temperature: float = 0.0,
    seed: int = 0,
) -> Denoised:
    """`length` tokens behind each prompt, from blocks that start as masks: each step fills the places that the network is surest of.

    With b = length / block blocks, each is filled in steps / b steps, as many places in each as divide evenly, the first ones one more.
    At a place x0 = argmax(logits + temperature * gumbel), the mask left out; the places with the largest softmax(logits)[x0] are filled,
    of equals the first. If `network` is compiled with a schedule of `expert-choice`, it is told how much of a row is masked.

    Args:
        network: [B, P + length] ids, int64 -> logits [B, P + length, vocabulary], alone or as `.logits`.
        prompt: [B, P], without masks; P may be 0.
        mask_id: the id that stands for a mask, one of the vocabulary.
        temperature: 0 draws nothing. Noise is float64, as Zheng et al. 2024 (arXiv 2409.02908) found float32 to cut it off.

    Raises:
        InputError: an argument is of a wrong type or out of range; length, steps and block do not divide, the prompt holds a mask, or the
            network gives no logits for each place.
    """
    _check(network, prompt, mask_id, temperature, seed)
    _check_plan(length, steps, block)
    schedule = schedule_of(network.program) if isinstance(network, CompiledModel) else None
    batch, before = prompt.shape
    x = torch.cat([prompt, prompt.new_full((batch, length), mask_id)], 1)
    draw = torch.Generator(prompt.device).manual_seed(seed)
    masks, experts = length, []
    for start, quota in _plan(before, length, steps, block):
        told = {} if schedule is None else {ARGUMENT: _counts(schedule, masks, before, length)}
        experts += [schedule.k(*told[ARGUMENT])] if schedule is not None else []
        logits = _logits(network(x, **told), x, mask_id)[:, start : start + block].clone()
        logits[..., mask_id] = -torch.inf
        _fill(x[:, start : start + block], logits, quota, mask_id, temperature, draw)
        masks -= quota
    return Denoised(x, steps, tuple(experts))


def _plan(before: int, length: int, steps: int, block: int) -> Iterator[tuple[int, int]]:
    """Of each step: where its block starts, and how many places it fills."""
    each = steps * block // length  # steps a block
    for start in range(before, before + length, block):
        for step in range(each):
            yield start, block // each + (step < block % each)


def _counts(schedule: CapacitySchedule, masks: int, before: int, length: int) -> tuple[int, int]:
    """(masked, valid) of a row, known without a look at it: each step fills what it was told to."""
    return masks, length if schedule.ratio == "generation" else before + length


def _fill(x: Tensor, logits: Tensor, quota: int, mask_id: int, temperature: float, draw: torch.Generator) -> None:
    """Fills `quota` masks of each row of x [B, block] in place."""
    noisy = logits
    if temperature > 0:
        uniform = torch.rand(logits.shape, dtype=torch.float64, device=logits.device, generator=draw)
        noisy = logits.double() - temperature * (-uniform.clamp(min=torch.finfo(torch.float64).tiny).log()).log()
    found = noisy.argmax(-1)
    sure = logits.float().log_softmax(-1).gather(-1, found.unsqueeze(-1)).squeeze(-1)
    sure = sure.masked_fill(x != mask_id, -torch.inf)
    places = sure.sort(dim=1, descending=True, stable=True).indices[:, :quota]
    x.scatter_(1, places, found.gather(1, places))


def _logits(output: Any, x: Tensor, mask_id: int) -> Tensor:
    logits = getattr(output, "logits", output)
    if not isinstance(logits, Tensor) or logits.shape[:2] != x.shape or logits.dim() != 3:
        given = list(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise InputError(f"the network gives {given}, not logits [{x.shape[0]}, {x.shape[1]}, vocabulary]")
    if mask_id >= logits.size(2):
        raise InputError(
            f"mask_id={mask_id} is no id of the network, which gives logits of {logits.size(2)}: from 0 to {logits.size(2) - 1}"
        )
    return logits


def _check(network: Any, prompt: Any, mask_id: Any, temperature: Any, seed: Any) -> None:
    if not callable(network):
        raise InputError(f"network is what gives logits for ids, a module or a function, not {type(network).__name__}")
    if not isinstance(prompt, Tensor) or prompt.dim() != 2 or prompt.dtype != torch.int64:
        raise InputError("prompt is a tensor of ids i64[B, P]; for none give torch.empty(B, 0, dtype=torch.int64)")
    if type(mask_id) is not int or mask_id < 0:
        raise InputError(f"mask_id is the id of the mask, an integer from 0 on, not {mask_id!r}")
    if bool((prompt == mask_id).any()):
        raise InputError(f"the prompt holds the mask, {mask_id}: only what follows it is filled")
    if isinstance(temperature, bool) or not isinstance(temperature, int | float) or not 0 <= temperature < math.inf:
        raise InputError(f"temperature is a number from 0 (the likeliest) on, not {temperature!r}")
    if type(seed) is not int or not 0 <= seed < 2**63:
        raise InputError(f"seed is an integer from 0 to 2**63 - 1, not {seed!r}")


def _check_plan(length: Any, steps: Any, block: Any) -> None:
    for name, value in (("length", length), ("steps", steps), ("block", block)):
        if type(value) is not int or value < 1:
            raise InputError(f"{name} is an integer from 1 on, not {value!r}")
    if length % block or steps % (length // block):
        raise InputError(f"blocks of {block} do not fill length={length}, or steps={steps} do not divide among them: choose multiples")
    if steps > length:
        raise InputError(f"steps={steps} for length={length} tokens: a step fills one place at least")
