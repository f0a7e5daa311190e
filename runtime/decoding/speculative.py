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
from .plain import next_tokens
from .rows import Row
from .sampler import Purpose, Sampler, draw, first_of_largest, most_likely
from .schedule import Schedule
from .steps import Decoder

_FULL_STEPS = 2
# What drafts may lose before it is known whether they gain, as a share of what the call takes without.
_ALLOWED_LOSS = 0.03


@dataclass(frozen=True)
class _Draft:
    """What was drafted: tokens [B][g], the weights float64[B, V] that each of the g steps drew from, none if greedy, and the hidden states
    [B, 1, D] that it gives."""

    tokens: list[list[int]]
    weights: list[Tensor]
    hidden: list[Tensor]


class SpeculativeDecoding:
    """Takes rows a burst further, 1 to gamma + 1 tokens each; or, where the schedule may switch and drafts do not gain, a token.

    Greedy tokens are the same either way. Drawn ones are not, though as likely: a call that draws stays with drafts, so that a seed gives
    the same tokens each time.
    """

    def __init__(self, decoder: Decoder, schedule: Schedule, dispatch: Dispatch, sampler: Sampler, figures: Figures):
        self._draft, self._full = decoder[schedule.draft], decoder["decode"]
        self._lift = decoder["lift"] if schedule.reuses_prefix else None
        self._verify = decoder["resume" if schedule.reuses_prefix else "verify"]
        self._gamma, self._most_drafts, self._chooses = schedule.gamma, schedule.most_drafts, schedule.chooses_gamma
        self._gains = decoder.gains
        self._dispatch, self._sampler, self._figures = dispatch, sampler, figures
        self._may_switch = schedule.may_switch and sampler.is_greedy
        self._is_off = False
        self._most_rows = 0  # at once; what is told is of so many
        self._lost = 0.0  # full steps that bursts took beyond those of plain decoding

    def advance(self, rows: Sequence[Row]) -> list[tuple[Row, list[int]]]:
        """The next tokens of each row."""
        self._most_rows = max(self._most_rows, len(rows))
        if all(row.left == 1 for row in rows) or (self._may_switch and not self._tries(rows)):
            return self._plain(rows)
        if not self._may_switch and self._figures.bursts and not self._gains[len(rows)].full.is_known:
            self._time_a_full_step(rows)
        # As many as a row can still use. All draft as many as the one that can use most; the others' further drafts are not judged.
        return self._burst(rows, [min(self._gamma, row.left - 1) for row in rows])

    def _tries(self, rows: Sequence[Row]) -> bool:
        """Whether to draft, not where drafts do not gain. A call begins with some full steps, which are timed: machines change."""
        gain = self._gains[len(rows)]
        if self._is_off or self._figures.steps < _FULL_STEPS or not gain.full.is_known:
            return False
        allowed = _ALLOWED_LOSS * max(row.max_new_tokens for row in rows)
        pays = gain.pays(range(1, self._most_drafts + 1) if self._chooses else [self._gamma])
        self._gamma = gain.best(self._gamma, self._most_drafts) if self._chooses else self._gamma
        self._is_off = pays is False or (pays is None and self._lost > allowed)
        self._figures.tell(self._gains[self._most_rows], self._gamma, switched_off=self._is_off)
        return not self._is_off

    def _plain(self, rows: Sequence[Row]) -> list[tuple[Row, list[int]]]:
        begin = self._dispatch.clock()
        chosen = next_tokens(self._full, rows, self._dispatch, self._sampler)
        self._gains[len(rows)].full.add(self._dispatch.clock() - begin)
        self._figures.steps += 1
        return chosen

    def _burst(self, rows: Sequence[Row], counts: Sequence[int]) -> list[tuple[Row, list[int]]]:
        slots = np.array([row.slot for row in rows])
        start = np.array([row.position for row in rows])
        gain, drafts = self._gains[len(rows)], max(counts)
        draft = self._drafted(rows, drafts)
        tokens = [[row.tokens[-1], *drafted] for row, drafted in zip(rows, draft.tokens, strict=True)]
        begin = self._dispatch.clock()
        logits = self._verified(slots, start, tokens, draft)
        judge = self._judged_greedily if self._sampler.is_greedy else self._judged_by_chance
        bursts = judge(rows, counts, draft, logits)
        gain.judging(drafts).add(self._dispatch.clock() - begin)
        taken = [len(burst) - 1 for burst in bursts]
        if self._sampler.is_greedy:
            gain.count(sum(taken), sum(min(n + 1, count) for n, count in zip(taken, counts, strict=True)))
        self._lost += gain.cost(drafts) - sum(map(len, bursts)) / len(bursts)
        self._figures.count_burst(drafts + 1, sum(counts), sum(taken))
        self._figures.tell(self._gains[self._most_rows], self._gamma)
        for row, burst in zip(rows, bursts, strict=True):
            row.position += len(burst)
        self._dispatch.caches.rewind(slots, np.array([row.position for row in rows]))
        return list(zip(rows, bursts, strict=True))

    def _verified(self, slots: np.ndarray, start: np.ndarray, tokens: list[list[int]], draft: _Draft) -> Tensor:
        """Logits [B, g + 1, V] of all layers. Those below the first that the draft skips need not run anew: only the last drafted token
        has not passed them yet, which `lift` has it do."""
        caches, hidden = self._dispatch.caches, None
        if self._lift is not None:
            end = start + len(draft.hidden)
            (last,) = self._dispatch.outputs(self._lift, slots, end, [each[-1:] for each in tokens])
            hidden = torch.cat([*draft.hidden, last], 1)
        caches.rewind(slots, start, self._verify.layers)
        return self._dispatch.outputs(self._verify, slots, start, tokens, hidden)[0]

    def _drafted(self, rows: Sequence[Row], count: int) -> _Draft:
        draft = _Draft([[] for _ in rows], [], [])
        last = [row.tokens[-1] for row in rows]
        ids, slots = [row.id for row in rows], [row.slot for row in rows]
        for i in range(count):
            positions = [row.position + i for row in rows]
            begin = self._dispatch.clock()
            logits, *hidden = self._dispatch.outputs(self._draft, slots, positions, [[token] for token in last])
            draft.hidden.extend(hidden)
            if self._sampler.is_greedy:
                last = first_of_largest(logits)
            else:
                draft.weights.append(_normalised(self._sampler.weights(logits)))
                last = draw(draft.weights[-1], self._sampler.uniforms(ids, [len(row.tokens) + i for row in rows]))
            self._gains[len(rows)].draft.add(self._dispatch.clock() - begin)
            for drafted, token in zip(draft.tokens, last, strict=True):
                drafted.append(token)
        return draft

    def _judged_greedily(self, rows: Sequence[Row], counts: Sequence[int], draft: _Draft, logits: Tensor) -> list[list[int]]:
        """Of each row the drafted tokens that are the full model's, and its next one."""
        bursts = []
        for drafted, full, count in zip(draft.tokens, most_likely(logits), counts, strict=True):
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

    def _time_a_full_step(self, rows: Sequence[Row]) -> None:
        """Of these rows. Its tokens go nowhere, and what it writes is written over."""
        slots, start = np.array([row.slot for row in rows]), np.array([row.position for row in rows])
        begin = self._dispatch.clock()
        self._dispatch.decode(self._full, slots, start, [row.tokens[-1:] for row in rows]).argmax(-1).tolist()  # which waits for the device
        self._gains[len(rows)].full.add(self._dispatch.clock() - begin)
        self._dispatch.caches.rewind(slots, start)


def _normalised(weights: Tensor) -> Tensor:
    return weights / weights.sum(-1, keepdim=True)


def _residual(p: Tensor, q: Tensor) -> Tensor:
    """max(p - q, 0), in proportion to what a refused draft is replaced by; p where rounding leaves nothing of it."""
    rest = (p - q).clamp(min=0)
    return rest if bool(rest.sum() > 0) else p
