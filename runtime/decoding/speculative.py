"""Bursts of tokens: a draft of few layers proposes some, all layers judge them at once, and what is committed is what all layers say.

Greedily a drafted token is taken where it is the full model's own choice, and the first that is not is replaced by that. Drawn ones are
taken with probability min(1, p/q), p being the full model's distribution and q the draft's, and the first refused one is replaced by a
draw from max(p - q, 0): together a draw from p (Leviathan et al. 2023, "Fast inference from transformers via speculative decoding").
Where all are taken, the judge's last position gives one more.

The draft leaves wrong keys and values above the first layer that it skips; the judge runs all layers at all of the burst's positions, so
it writes over them. The slots of refused tokens are written over by the next burst before any step reads them.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from .dispatch import Dispatch
from .generated import Figures
from .rows import Row
from .sampler import Purpose, Sampler, draw, first_of_largest
from .schedule import Schedule
from .steps import Decoder

# Bursts before which a draft and a full step are timed on the same rows; the first of all is slow for reasons of its own.
_TIMED_BURSTS = range(1, 4)


@dataclass(frozen=True)
class _Draft:
    """What was drafted: tokens [B][g], and the weights float64[B, V] that each of the g steps drew from, none if greedy."""

    tokens: list[list[int]]
    weights: list[Tensor]


class SpeculativeDecoding:
    """Takes rows a burst further: 1 to gamma + 1 tokens each."""

    def __init__(self, decoder: Decoder, schedule: Schedule, dispatch: Dispatch, sampler: Sampler, figures: Figures):
        self._draft, self._verify = decoder[schedule.draft], decoder["verify"]
        self._full = decoder["decode"] if "decode" in decoder else None
        self._gamma = schedule.gamma
        self._dispatch, self._sampler, self._figures = dispatch, sampler, figures

    def advance(self, rows: Sequence[Row]) -> list[tuple[Row, list[int]]]:
        """The next tokens of each row."""
        slots = np.array([row.slot for row in rows])
        start = np.array([row.position for row in rows])
        # As many as a row can still use. All draft as many as the one that can use most; the others' further drafts are not judged.
        counts = [min(self._gamma, row.left - 1) for row in rows]
        if self._full is not None and max(counts) and self._figures.bursts in _TIMED_BURSTS:
            self._time_a_step_of_each(rows, slots, start)
        draft = self._drafted(rows, max(counts))
        self._dispatch.caches.rewind(slots, start)
        tokens = [[row.tokens[-1], *drafted] for row, drafted in zip(rows, draft.tokens, strict=True)]
        logits = self._dispatch.decode(self._verify, slots, start, tokens)
        judge = self._judged_greedily if self._sampler.is_greedy else self._judged_by_chance
        bursts = judge(rows, counts, draft, logits)
        self._figures.steps += max(counts) + 1
        self._figures.bursts += 1
        self._figures.drafted += sum(counts)
        self._figures.accepted += sum(len(burst) - 1 for burst in bursts)
        for row, burst in zip(rows, bursts, strict=True):
            row.position += len(burst)
        self._dispatch.caches.rewind(slots, np.array([row.position for row in rows]))
        return list(zip(rows, bursts, strict=True))

    def _drafted(self, rows: Sequence[Row], count: int) -> _Draft:
        draft = _Draft([[] for _ in rows], [])
        last = [row.tokens[-1] for row in rows]
        ids, slots = [row.id for row in rows], [row.slot for row in rows]
        for i in range(count):
            positions = [row.position + i for row in rows]
            logits = self._dispatch.decode(self._draft, slots, positions, [[token] for token in last])
            if self._sampler.is_greedy:
                last = first_of_largest(logits)
            else:
                draft.weights.append(_normalised(self._sampler.weights(logits)))
                last = draw(draft.weights[-1], self._sampler.uniforms(ids, [len(row.tokens) + i for row in rows]))
            for drafted, token in zip(draft.tokens, last, strict=True):
                drafted.append(token)
        return draft

    def _judged_greedily(self, rows: Sequence[Row], counts: Sequence[int], draft: _Draft, logits: Tensor) -> list[list[int]]:
        """Of each row the drafted tokens that are the full model's, and its next one."""
        bursts = []
        for drafted, full, count in zip(draft.tokens, first_of_largest(logits), counts, strict=True):
            taken = next((i for i in range(count) if drafted[i] != full[i]), count)
            bursts.append(full[: taken + 1])
        return bursts

    def _judged_by_chance(self, rows: Sequence[Row], counts: Sequence[int], draft: _Draft, logits: Tensor) -> list[list[int]]:
        """Of each row the drafted tokens that are taken, and what the full model draws after them."""
        full = _normalised(self._sampler.weights(logits))  # [B, g + 1, V]
        taken = self._taken(rows, counts, draft, full)
        last: list[Tensor] = []
        for b, (n, count) in enumerate(zip(taken, counts, strict=True)):
            last.append(full[b, n] if n == count else _residual(full[b, n], draft.weights[n][b]))
        purposes = [Purpose.TOKEN if n == count else Purpose.RESIDUAL for n, count in zip(taken, counts, strict=True)]
        steps = [len(row.tokens) + n for row, n in zip(rows, taken, strict=True)]
        drawn = draw(torch.stack(last), self._sampler.uniforms([row.id for row in rows], steps, purposes))
        return [[*drafted[:n], token] for drafted, n, token in zip(draft.tokens, taken, drawn, strict=True)]

    def _taken(self, rows: Sequence[Row], counts: Sequence[int], draft: _Draft, full: Tensor) -> list[int]:
        """How many of each row's first drafts are taken: d with u q(d) < p(d), which is always so where p = q."""
        if not draft.weights:
            return [0] * len(rows)
        at = torch.tensor(draft.tokens, device=full.device).unsqueeze(-1)  # [B, g, 1]
        p = full[:, :-1].gather(-1, at).squeeze(-1).tolist()
        q = torch.stack(draft.weights, 1).gather(-1, at).squeeze(-1).tolist()
        taken = []
        for b, (row, count) in enumerate(zip(rows, counts, strict=True)):
            u = self._sampler.uniforms([row.id] * count, [len(row.tokens) + i for i in range(count)], Purpose.ACCEPT)
            taken.append(next((i for i in range(count) if u[i] * q[b][i] >= p[b][i]), count))
        return taken

    def _time_a_step_of_each(self, rows: Sequence[Row], slots: np.ndarray, start: np.ndarray) -> None:
        """Seconds of one full and one draft step on these rows. Their tokens go nowhere, and what they write is written over."""
        last = [row.tokens[-1:] for row in rows]
        for step, seconds in ((self._full, self._figures.full_step_seconds), (self._draft, self._figures.draft_step_seconds)):
            assert step is not None
            begin = self._dispatch.clock()
            self._dispatch.decode(step, slots, start, last).argmax(-1).tolist()  # which waits for the device
            seconds.append(self._dispatch.clock() - begin)
            self._dispatch.caches.rewind(slots, start)


def _normalised(weights: Tensor) -> Tensor:
    return weights / weights.sum(-1, keepdim=True)


def _residual(p: Tensor, q: Tensor) -> Tensor:
    """max(p - q, 0), in proportion to what a refused draft is replaced by; p where rounding leaves nothing of it."""
    rest = (p - q).clamp(min=0)
    return rest if bool(rest.sum() > 0) else p
