"""What leaving out a layer does to those behind it, and how early the output can be read off what the layers pass on: diagnostics.

    causal[s]   mean over l > s of max over t of |d_l(t) - d'_l(t)| / |d_l(t)|     d_l = h_{l+1} - h_l, d' of the network without layer s
    future[s]   the same for t behind the prompt, s being left out in the prompt alone
    logit lens  head(norm(h_l)), which is what the network gives without the layers from l on, beside its output

Source: "Do Language Models Use Their Depth Efficiently?" (arXiv 2505.13898); specs/layer_skip.md, section 2.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from .reference import SkipReference

TOP = 5  # of the tokens whose overlap is counted


def effects(reference: SkipReference, tokens: Tensor, prompt: int | None = None) -> Tensor:
    """[N, B]: of each layer and row of `tokens` i64[B, T] the causal effect; with `prompt` that on the tokens behind so many. The last
    layer has none behind it, and 0."""
    count, length = len(reference.units), tokens.shape[1]
    everything = list(range(count))
    whole = _contributions(reference, tokens, [everything] * length)
    skipped_at = length if prompt is None else prompt
    found = []
    for left_out in everything:
        without = [[n for n in everything if n != left_out]]
        changed = _contributions(reference, tokens, without * skipped_at + [everything] * (length - skipped_at))
        behind = [_largest_change(whole[n], changed[n], prompt or 0) for n in everything[left_out + 1 :]]
        found.append(torch.stack(behind).mean(0) if behind else torch.zeros(len(tokens), device=tokens.device))
    return torch.stack([each.cpu().double() for each in found])


def _contributions(reference: SkipReference, tokens: Tensor, active: Sequence[Sequence[int]]) -> list[Tensor]:
    """h_{l+1} - h_l of each layer, [B, T, D]."""
    return [after - before for before, after in pairwise(reference.hidden(tokens, active))]


def _largest_change(whole: Tensor, changed: Tensor, start: int) -> Tensor:
    """[B]; nothing has changed where a layer that adds nothing still does not."""
    difference, size = (each[:, start:].norm(dim=-1) for each in (whole - changed, whole))
    return (difference / size).where(difference > 0, 0.0).amax(1)


@dataclass(frozen=True)
class LogitLens:
    """Of h_0, .., h_N, the last being what the output is read off: `kl` from the output, in nats a token, and the share of its five most
    likely tokens that are among theirs."""

    kl: tuple[float, ...]
    overlap: tuple[float, ...]

    @staticmethod
    def of(reference: SkipReference, batches: Sequence[Tensor]) -> "LogitLens":
        count = len(reference.units)
        sums = torch.zeros(2, count + 1, dtype=torch.float64)
        sums[1, count] = tokens_in_all = sum(tokens.numel() for tokens in batches)
        for tokens in batches:
            output = log_probabilities(reference, tokens, range(count))
            best = output.topk(min(TOP, output.size(-1))).indices
            for depth in range(count):
                seen = log_probabilities(reference, tokens, range(depth))
                shared = (seen.topk(best.size(-1)).indices.unsqueeze(-1) == best.unsqueeze(-2)).any(-1)
                sums[0, depth] += float(kl_divergence(output, seen).sum())
                sums[1, depth] += float(shared.double().mean(-1).sum())
        kl, overlap = (sums / tokens_in_all).tolist()
        return LogitLens(tuple(kl), tuple(overlap))

    @property
    def scores(self) -> dict[int, float]:
        """By layer, the nats by which it changes how far the output is: 0 for one that adds nothing."""
        return {index: abs(after - before) for index, (before, after) in enumerate(pairwise(self.kl))}

    def lines(self) -> list[str]:
        """For the report."""
        depth = depth_score(self.scores)
        return [
            f"logit lens before each layer: KL {', '.join(f'{kl:.3g}' for kl in self.kl[:-1])} nats a token",
            f"the same five likeliest tokens: {', '.join(f'{share:.0%}' for share in self.overlap[:-1])}",
            f"depth score {depth:.1f}: the mean layer, weighted by how much each changes that, of 0 to {len(self.scores) - 1}",
        ]


def depth_score(effect: Mapping[int, float]) -> float:
    """sum l e_l / sum e_l, the layer at which effects e lie in the mean; 0 where there are none."""
    total = sum(effect.values())
    return sum(layer * each for layer, each in effect.items()) / total if total else 0.0


def log_probabilities(reference: SkipReference, tokens: Tensor, kept: Sequence[int]) -> Tensor:
    """[B, T, V] of the network with the layers `kept` at all positions; float32 at least."""
    return log_softmax(reference.logits(tokens, [kept] * tokens.shape[1]))


def log_softmax(logits: Tensor) -> Tensor:
    """In float32 at least."""
    return logits.log_softmax(-1, dtype=torch.promote_types(logits.dtype, torch.float32))


def kl_divergence(expected: Tensor, got: Tensor) -> Tensor:
    """KL of each token, [B, T], of log-probabilities [B, T, V]."""
    return (expected.exp() * (expected - got)).sum(-1)
