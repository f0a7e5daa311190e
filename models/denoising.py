"""Masked diffusion of tokens: how a text loses tokens at random, and the loss of a network that finds them again.

With m of L tokens masked, m drawn from 1 .. L, the mean over masked tokens of -log p bounds the text's -log p of a token from above
(Nie et al. 2025, "Large Language Diffusion Models", equations 3 and 4, with the number of masked tokens in place of its expectation).
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from ..ir.errors import InputError

LENGTH = 64  # tokens of a window of the zoo's trained network


def masked(ids: Tensor, counts: Tensor, mask_id: int, draw: torch.Generator | None = None) -> Tensor:
    """`ids` [B, L] with `mask_id` at counts[b] places of row b, drawn at random."""
    place = torch.rand(ids.shape, generator=draw).argsort(1).argsort(1)
    return ids.masked_fill(place < counts.unsqueeze(1), mask_id)


def denoising_loss(logits: Tensor, ids: Tensor, noisy: Tensor, mask_id: int) -> Tensor:
    """The mean over rows of the mean of -log p(ids) over the masked places of a row, in nats: logits [B, L, V], ids and noisy [B, L]."""
    hidden = noisy == mask_id
    nats = F.cross_entropy(logits.flatten(0, 1)[hidden.flatten()], ids[hidden], reduction="none")
    share = 1.0 / hidden.sum(1, keepdim=True).expand(ids.shape)[hidden]
    return (nats * share.to(nats.dtype)).sum() / len(ids)


@torch.no_grad()
def held_out_loss(
    call: Callable[[Tensor], Tensor], ids: Sequence[int] | Tensor, mask_id: int, length: int = LENGTH, batch: int = 16, draws: int = 4
) -> float:
    """Nats a token of a text that is cut into windows, each masked `draws` times; numbers of masked tokens are spread evenly over 1 .. L.

    What is masked is a function of the text's length alone, so that networks are compared on the same.

    Args:
        call: [B, length] ids, int64 -> [B, length, vocabulary] logits.
        ids: [N], the text; the rest that fills no window is left out.

    Raises: InputError where no window is filled.
    """
    ids = torch.as_tensor(ids, dtype=torch.int64)
    if ids.dim() != 1 or len(ids) < length:
        raise InputError(f"windows of {length} tokens want at least {length} ids in one dim, not {[*ids.shape]}")
    draw = torch.Generator().manual_seed(0)
    windows = ids.unfold(0, length, length).repeat(draws, 1)
    counts = 1 + torch.arange(len(windows)) * length // len(windows)
    counts = counts[torch.randperm(len(windows), generator=draw)]
    noisy = masked(windows, counts, mask_id, draw)
    parts = zip(windows.split(batch), noisy.split(batch), strict=True)
    losses = [len(clean) * denoising_loss(call(shown).double(), clean, shown, mask_id).item() for clean, shown in parts]
    return sum(losses) / len(windows)
