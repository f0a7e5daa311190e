"""How much each layer matters, measured on calibration tokens. Source: specs/layer_skip.md, section 2 (Ranking metrics).

    output_kl        mean over t >= P of KL(p_t, p'_t), p' with layers left out at t >= P: what is deployed
    relative         mean of |h_{l+1} - h_l| / |h_l|
    cosine           mean of cos(h_{l+1} - h_l, h_l)
    block_influence  1 - mean of cos(h_l, h_{l+1}) (ShortGPT)
    causal, future   how much the layers behind one change what they add when it is left out (`effects`)
    logit_lens       by how many nats a layer changes the distance of head(norm(h)) from the output (`effects`)

`output_kl` alone sees what becomes of the output; the others are diagnostics, which rank late layers too low.
"""

import hashlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Any

import torch
from torch.nn import functional as F

from ...ir import Program
from ...ir.errors import PassError
from ...ir.lookups import lookup_limit
from ..calibration import given
from ..kv_cache.decoder import Decoder
from .effects import LogitLens, effects, kl_divergence, log_softmax
from .reference import SkipReference
from .units import Unit, scaled

METRICS = ("output_kl", "block_influence", "relative", "cosine", "causal", "future", "logit_lens")
Tell = Callable[[int, int], None]  # told the passes over the calibration set that are done, and all


@dataclass(frozen=True)
class Calibration:
    """Batches of tokens i64[B, T]; the first half of each row is the prompt, and layers are left out behind it."""

    batches: tuple[torch.Tensor, ...]

    @staticmethod
    def of(items: Iterable[Any], program: Program, decoder: Decoder) -> "Calibration":
        """`items` are tensors i[B, T], or tuples of one.

        Raises:
            PassError: one is none, or has tokens or positions that the model does not know; or there are none.
            CalibrationError: `items` raises as it is iterated.
        """
        tabled = None if decoder.positions is None else lookup_limit(program.main, decoder.positions)
        longest = min(n for n in (program.symbols.highest(decoder.length), tabled) if n is not None)
        batches = tuple(_tokens(number, item, decoder, longest) for number, item in enumerate(given(items)))
        if not batches:
            raise PassError("layer-skip: calibration has no items: give at least one tensor of tokens [B, T]")
        return Calibration(batches)

    @staticmethod
    def prompt(tokens: torch.Tensor) -> int:
        return max(tokens.shape[1] // 2, 1)

    @property
    def digest(self) -> str:
        """The first 16 digits of the SHA-256 of sizes and tokens, by which a calibration set is known again."""
        found = hashlib.sha256()
        for tokens in self.batches:
            found.update(repr(tuple(tokens.shape)).encode() + tokens.cpu().numpy().tobytes())
        return found.hexdigest()[:16]


def _tokens(number: int, item: Any, decoder: Decoder, longest: int) -> torch.Tensor:
    value = item[0] if isinstance(item, tuple) and len(item) == 1 else item
    is_tokens = isinstance(value, torch.Tensor) and value.dim() == 2 and value.dtype in (torch.int64, torch.int32)
    if not is_tokens or value.shape[0] < 1 or value.shape[1] < 2:
        raise PassError(f"layer-skip: calibration item {number} is no tensor of tokens [B, T] of a row or more, with at least 2 in each")
    vocabulary = int(decoder.logits.meta["val"].size(2))
    if not 0 <= int(value.min()) <= int(value.max()) < vocabulary:
        raise PassError(f"layer-skip: calibration item {number} has tokens beyond 0 to {vocabulary - 1}")
    if value.shape[1] > longest:
        raise PassError(f"layer-skip: calibration item {number} has rows of {value.shape[1]} tokens, and the model takes {longest}")
    return value.to(decoder.tokens.meta["val"].device, torch.int64)


class Profile:
    """Measures layers of one decoder on one calibration set; the outputs of the whole network are computed once.

    With `compensates`, `units` have scales, mean |h_{l+1}| / |h_l|, by which what they read is multiplied where they are left out
    (AdaSkip): the KL is that of the network so made, the other metrics are of the network as it is.
    """

    def __init__(
        self,
        program: Program,
        decoder: Decoder,
        units: Sequence[Unit],
        calibration: Calibration,
        tell: Tell | None = None,
        *,
        compensates: bool = False,
    ):
        self.units, self.calibration = units, calibration
        self._reference = self._unscaled = SkipReference(program, decoder, units)
        self._tell = tell
        everything = [unit.index for unit in units]
        self._expected = [self._log_probabilities(tokens, everything, everything) for tokens in calibration.batches]
        self._known: dict[tuple[frozenset[int], frozenset[int]], float] = {}
        self._scores: dict[str, dict[int, float]] = {}
        if compensates:
            self.units = scaled(units, [float(f"{scale:.6g}") for scale in self.scores("growth").values()])
            self._reference = SkipReference(program, decoder, self.units)

    def kl(self, kept: Sequence[int], prefill: Sequence[int] | None = None) -> float:
        """Mean KL(p, p') in nats over the tokens behind the prompts, p' of the network with `kept` layers there, and in the prompts with
        `prefill` (None: all)."""
        before = [unit.index for unit in self.units] if prefill is None else prefill
        key = frozenset(kept), frozenset(before)
        if key not in self._known:
            pairs = zip(self.calibration.batches, self._expected, strict=True)
            sums = [kl_divergence(expected, self._log_probabilities(tokens, kept, before)) for tokens, expected in pairs]
            self._known[key] = sum(float(each.sum()) for each in sums) / sum(each.numel() for each in sums)
        return self._known[key]

    def _log_probabilities(self, tokens: torch.Tensor, kept: Sequence[int], before: Sequence[int]) -> torch.Tensor:
        prompt = Calibration.prompt(tokens)
        active = [list(before)] * prompt + [list(kept)] * (tokens.shape[1] - prompt)
        return log_softmax(self._reference.logits(tokens, active)[:, prompt:])

    def ranking(self, metric: str, n_min: int, effort: str) -> list[int]:
        """All layers, those that matter most first; of equals the last, since some metrics see nothing of what the last layers do."""
        everything = [unit.index for unit in self.units]
        if metric != "output_kl":
            scores = self.scores(metric)
            return sorted(everything, key=lambda index: (-scores[index], -index))
        if effort == "one_shot":
            return sorted(everything, key=lambda index: (-self.kl([n for n in everything if n != index]), -index))
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
        if metric == "logit_lens":
            return self.lens.scores
        if metric not in self._scores:
            sums, rows = torch.zeros(len(self.units), dtype=torch.float64), 0
            for done, tokens in enumerate(self.calibration.batches, 1):
                sums += self._scored(metric, tokens).sum(1)
                rows += len(tokens)
                if self._tell is not None:
                    self._tell(done, len(self.calibration.batches))
            self._scores[metric] = {unit.index: float(each) / rows for unit, each in zip(self.units, sums, strict=True)}
        return self._scores[metric]

    @cached_property
    def lens(self) -> LogitLens:
        return LogitLens.of(self._unscaled, self.calibration.batches)

    def _scored(self, metric: str, tokens: torch.Tensor) -> torch.Tensor:
        """Of each layer and row, [N, B]."""
        if metric in ("causal", "future"):
            return effects(self._unscaled, tokens, Calibration.prompt(tokens) if metric == "future" else None)
        hidden = self._unscaled.hidden(tokens, [range(len(self.units))] * tokens.shape[1])
        return torch.stack([_score(metric, before, after).mean(1).cpu().double() for before, after in pairwise(hidden)])

    def lines(self, metric: str) -> list[str]:
        """For the report: what layers were ranked by."""
        if metric == "output_kl":
            return []
        scores = ", ".join(f"{index}: {each:.3g}" for index, each in self.scores(metric).items())
        return [f"{metric} by layer: {scores}", *(self.lens.lines() if metric == "logit_lens" else ())]


def _score(metric: str, before: torch.Tensor, after: torch.Tensor) -> torch.Tensor:
    """[B, T]"""
    if metric == "block_influence":
        return 1 - F.cosine_similarity(before, after, dim=-1)
    if metric == "growth":
        return _times(after, before, 1.0)
    if metric == "relative":
        return _times(after - before, before, 0.0)
    return F.cosine_similarity(after - before, before, dim=-1)


def _times(what: torch.Tensor, of: torch.Tensor, otherwise: float) -> torch.Tensor:
    """|what| / |of|, or `otherwise` where nothing is read: the embedding of padding may be zero."""
    size = of.norm(dim=-1)
    return torch.where(size > 0, what.norm(dim=-1) / size, otherwise)
