"""How much each layer matters, measured on calibration tokens. Source: specs/layer_skip.md, section 2 (Ranking metrics).

    output_kl        mean over t >= P of KL(p_t, p'_t), p' with layers left out at t >= P: what is deployed
    relative         mean of |h_{l+1} - h_l| / |h_l|
    cosine           mean of cos(h_{l+1} - h_l, h_l)
    block_influence  1 - mean of cos(h_l, h_{l+1}) (ShortGPT)

`output_kl` alone sees what becomes of the output; the others are diagnostics, which rank late layers too low.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch.nn import functional as F

from ...ir import Node, Program
from ...ir.run import run
from ..kv_cache.decoder import Decoder
from .reference import SkipReference
from .units import Unit

METRICS = ("output_kl", "block_influence", "relative", "cosine")
Tell = Callable[[int, int], None]  # told the passes over the calibration set that are done, and all


@dataclass(frozen=True)
class Calibration:
    """Batches of tokens i64[B, T]; the first half of each row is the prompt, and layers are left out behind it."""

    batches: tuple[torch.Tensor, ...]

    @staticmethod
    def prompt(tokens: torch.Tensor) -> int:
        return max(tokens.shape[1] // 2, 1)


class Profile:
    """Measures layers of one decoder on one calibration set; the outputs of the whole network are computed once."""

    def __init__(self, program: Program, decoder: Decoder, units: Sequence[Unit], calibration: Calibration, tell: Tell | None = None):
        self.program, self.decoder, self.units, self.calibration = program, decoder, units, calibration
        self._reference = SkipReference(program, decoder, units)
        self._tell = tell
        everything = [unit.index for unit in units]
        self._expected = [self._log_probabilities(tokens, everything) for tokens in calibration.batches]
        self._known: dict[frozenset[int], float] = {}

    def kl(self, kept: Sequence[int]) -> float:
        """Mean KL(p, p') in nats over the tokens behind the prompts, p' of the network with `kept` layers there."""
        key = frozenset(kept)
        if key not in self._known:
            pairs = zip(self.calibration.batches, self._expected, strict=True)
            sums = [_kl(expected, self._log_probabilities(tokens, kept)) for tokens, expected in pairs]
            self._known[key] = sum(float(each.sum()) for each in sums) / sum(each.numel() for each in sums)
        return self._known[key]

    def _log_probabilities(self, tokens: torch.Tensor, kept: Sequence[int]) -> torch.Tensor:
        prompt, everything = Calibration.prompt(tokens), [unit.index for unit in self.units]
        active = [everything] * prompt + [list(kept)] * (tokens.shape[1] - prompt)
        return self._reference.logits(tokens, active)[:, prompt:].to(torch.float32).log_softmax(-1)

    def ranking(self, metric: str, n_min: int, effort: str) -> list[int]:
        """All layers, those that matter most first."""
        if metric != "output_kl":
            scores = self.scores(metric)
            return sorted(scores, key=lambda index: -scores[index])
        everything = [unit.index for unit in self.units]
        if effort == "one_shot":
            return sorted(everything, key=lambda index: -self.kl([n for n in everything if n != index]))
        return self._eliminated(everything, n_min)

    def _eliminated(self, kept: list[int], n_min: int) -> list[int]:
        """Greedy backward elimination: each time the layer goes whose removal costs least, down to n_min."""
        removed: list[int] = []
        total, done = sum(range(max(n_min, 1) + 1, len(kept) + 1)), 0
        while len(kept) > max(n_min, 1):
            costs = {}
            for index in kept:
                costs[index] = self.kl([n for n in kept if n != index])
                done += 1
                if self._tell is not None:
                    self._tell(done, total)
            cheapest = min(costs, key=lambda index: (costs[index], index))
            kept = [n for n in kept if n != cheapest]
            removed.append(cheapest)
        return [*kept, *reversed(removed)]

    def scores(self, metric: str) -> dict[int, float]:
        """By layer, the larger the more it matters."""
        sums = {unit.index: 0.0 for unit in self.units}
        count = 0
        for tokens in self.calibration.batches:
            seen = self._hidden(tokens)
            count += tokens.numel()
            for unit in self.units:
                before, after = seen[unit.source].to(torch.float32), seen[unit.result].to(torch.float32)
                sums[unit.index] += float(_score(metric, before, after).sum())
        return {index: total / count for index, total in sums.items()}

    def _hidden(self, tokens: torch.Tensor) -> dict[Node, torch.Tensor]:
        wanted = {node for unit in self.units for node in (unit.source, unit.result)}
        seen: dict[Node, torch.Tensor] = {}

        def keep(node: Node, value: object) -> object:
            if node in wanted and isinstance(value, torch.Tensor):
                seen[node] = value
            return value

        run(self.program, self.decoder.inputs(self.program, tokens), observe=keep)
        return seen


def _kl(expected: torch.Tensor, got: torch.Tensor) -> torch.Tensor:
    """KL of each token, [B, T]."""
    return (expected.exp() * (expected - got)).sum(-1)


def _score(metric: str, before: torch.Tensor, after: torch.Tensor) -> torch.Tensor:
    if metric == "block_influence":
        return 1 - F.cosine_similarity(before, after, dim=-1)
    if metric == "relative":
        return (after - before).norm(dim=-1) / before.norm(dim=-1)
    return F.cosine_similarity(after - before, before, dim=-1)
