"""`gw.rat_attention` for training: the same function by blocks of queries, whose results and gradients hold no tokens times tokens.

A block of queries meets the sinks, the summaries behind its window and what is near it, by products of matrices. Nothing but the operands,
the result and the logarithm of each row's sum is kept for the gradient: scores and states are computed again, block by block. A head of
T tokens takes O(T E) numbers and, while a block is worked on, QUERIES (sinks + T / L + W + L).

The gradient of the recurrence is a recurrence that runs backward (specs/rat.md, section 2).
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .rat_parts import Layout, Rotation, gates_of, goes_on_at, recurrence, scan, shifted

QUERIES = 128  # of a block: enough for products of matrices, few beside the keys that each sees


def rat_attention_by_blocks(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gate: Tensor,
    chunk_bias: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    *,
    chunk: int,
    scale: float,
    window: int = 0,
    sinks: int = 0,
    local: str = "state",
    reset: bool = True,
    rope_style: str = "half",
    summary_bias: float = 0.0,
) -> Tensor:
    """`gw.rat_attention`, its operands, errors and result, with gradients for all operands; these have no gradients of their own."""
    layout = Layout(chunk, window, sinks, local)
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    rotate = Rotation(cos, sin, rope_style, wide)
    if q.size(1) % k.size(1):
        raise ValueError(f"{q.size(1)} heads cannot share {k.size(1)} of keys: the second must divide the first")
    times = torch.arange(q.size(2), device=q.device).unsqueeze(0)
    raw_k, raw_v = k.to(wide), v.to(wide)
    g = gates_of(gate.to(wide), chunk_bias, times, chunk).expand_as(raw_k)
    goes_on, longest = goes_on_at(times, chunk, reset), min(chunk, q.size(2)) if reset else q.size(2)
    states_k, states_v = _States.apply(raw_k, raw_v, g, goes_on, longest)
    ends = slice(chunk - 1, None, chunk)  # of chunks
    if local == "state":
        near_k, near_v = rotate(states_k), states_v
        far_k, far_v = near_k[:, :, ends], near_v[:, :, ends]
    else:
        at_ends = Rotation(None if cos is None else cos[:, ends], None if sin is None else sin[:, ends], rope_style, wide)
        near_k, near_v = rotate(raw_k), raw_v
        far_k, far_v = at_ends(states_k[:, :, ends]), states_v[:, :, ends]
    return _Attention.apply(rotate(q.to(wide)), far_k, far_v, near_k, near_v, _Scores(layout, scale, summary_bias)).to(q.dtype)


class _States(torch.autograd.Function):
    """The states s[t] = a[t] s[t-1] + (1 - g[t]) x[t] of x = k and v, a = g where a state `goes_on` and 0 elsewhere."""

    @staticmethod
    def forward(ctx: Any, k: Tensor, v: Tensor, g: Tensor, goes_on: Tensor, longest: int) -> tuple[Tensor, ...]:
        ctx.save_for_backward(k, v, g, goes_on)
        ctx.longest = longest
        return tuple(recurrence([k, v], g, goes_on, longest)[0])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        """What reaches s[t] in all is m[t] = gradient[t] + a[t+1] m[t+1]; it leaves (1 - g[t]) m[t] to x[t], and to g[t]
        m[t] (s[t-1] - x[t]), or -m[t] x[t] where the state before does not go on."""
        k, v, g, goes_on = ctx.saved_tensors
        tokens, x = g.size(2), (k, v)
        after = shifted(torch.where(goes_on, g, 0.0).flip(2), 1, tokens, 0.0)
        reached = [each.flip(2) for each in scan([each.flip(2) for each in gradients], after, ctx.longest)[0]]
        before = [torch.where(goes_on, shifted(each, 1, tokens, 0.0), 0.0) for each in recurrence([k, v], g, goes_on, ctx.longest)[0]]
        to_gate = sum((m * (s - each) for m, s, each in zip(reached, before, x, strict=True)), torch.zeros_like(g))
        return *((1 - g) * m for m in reached), to_gate, None, None


@dataclass(frozen=True)
class _Block:
    """Queries [begin, end), and the keys that some of them see: of near ones [0, sinks) and [low, end), of far ones [first, last)."""

    begin: int
    end: int
    sinks: int
    first: int
    last: int
    low: int

    def joined(self, far: Tensor, near: Tensor) -> Tensor:
        """[B Hk, S, E] of far [B, Hk, C, E] and near [B, Hk, T, E]."""
        parts = (near[:, :, : self.sinks], far[:, :, self.first : self.last], near[:, :, self.low : self.end])
        return torch.cat(parts, 2).flatten(0, 1)

    def add(self, joined: Tensor, far: Tensor, near: Tensor) -> None:
        """Adds what `joined` has of each key to it."""
        sinks, summaries, rest = joined.unflatten(0, near.shape[:2]).split([self.sinks, self.last - self.first, self.end - self.low], 2)
        near[:, :, : self.sinks] += sinks
        far[:, :, self.first : self.last] += summaries
        near[:, :, self.low : self.end] += rest


@dataclass(frozen=True)
class _Scores:
    """q k^T scale + bias of each block of queries. Tensors of queries are [B Hk, H / Hk, T, ..]."""

    layout: Layout
    scale: float
    summary_bias: float

    def blocks(self, tokens: int) -> Iterator[_Block]:
        chunk, window, sinks = self.layout.chunk, self.layout.window, self.layout.sinks
        first = sinks // chunk  # whose last token is no sink
        for begin in range(0, tokens, QUERIES):
            end = min(begin + QUERIES, tokens)
            last = max(first, max(0, end - 1 - window) // chunk)
            low = max(0, begin - window)
            if self.layout.local == "raw":
                low = low // chunk * chunk
            yield _Block(begin, end, min(sinks, end), first, last, min(max(sinks, low), end))

    def of(self, block: _Block, q: Tensor, keys: Tensor) -> Tensor:
        """[B Hk, H / Hk, n, S]"""
        products = torch.bmm(q[:, :, block.begin : block.end].flatten(1, 2), keys.transpose(1, 2))
        return products.unflatten(1, (q.size(1), -1)).mul_(self.scale).add_(self._bias(block, q))

    def _bias(self, block: _Block, like: Tensor) -> Tensor:
        """[n, S]"""
        layout, device = self.layout, like.device
        t = torch.arange(block.begin, block.end, device=device).unsqueeze(1)
        ends = torch.arange(block.first, block.last, device=device) * layout.chunk + (layout.chunk - 1)
        near = torch.cat([torch.arange(block.sinks, device=device), torch.arange(block.low, block.end, device=device)])
        bias = torch.full((block.end - block.begin, block.sinks + len(ends) + block.end - block.low), float("-inf"), device=device)
        is_near, is_summary = layout.is_near(near, t), layout.is_summary(ends, t)
        sees = torch.cat([is_near[:, : block.sinks], is_summary, is_near[:, block.sinks :]], 1)
        bias = bias.to(like.dtype).masked_fill_(sees, 0.0)
        bias[:, block.sinks : block.sinks + len(ends)] += self.summary_bias
        return bias


class _Attention(torch.autograd.Function):
    """softmax(scores) values, with keys and values of two kinds: far [B, Hk, C, E], one a chunk, and near [B, Hk, T, E]. q [B, H, T, E] ->
    [B, H, T, E], laid out as [B, T, H, E]."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, far_k: Tensor, far_v: Tensor, near_k: Tensor, near_v: Tensor, scores: _Scores) -> Tensor:
        batch, heads, tokens, depth = q.shape
        grouped = _grouped(q, near_k.size(1))
        out = q.new_empty(batch, tokens, heads, depth)
        totals = q.new_empty(grouped.shape[:3])
        for block in scores.blocks(tokens):
            score = scores.of(block, grouped, block.joined(far_k, near_k))
            total = score.logsumexp(-1)
            weights = score.sub_(total.unsqueeze(-1)).exp_()
            sums = torch.bmm(weights.flatten(1, 2), block.joined(far_v, near_v)).unflatten(1, (grouped.size(1), -1))
            out[:, block.begin : block.end] = sums.reshape(batch, heads, -1, depth).transpose(1, 2)
            totals[:, :, block.begin : block.end] = total
        out = out.transpose(1, 2)
        ctx.save_for_backward(q, far_k, far_v, near_k, near_v, out, totals)
        ctx.scores = scores
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        """Of weights p and their gradient d = gradient values^T, that of scores is p (d - sum(p d)), and sum(p d) = gradient . out."""
        q, far_k, far_v, near_k, near_v, out, totals = ctx.saved_tensors
        scores: _Scores = ctx.scores
        grouped, given = (_grouped(each, near_k.size(1)) for each in (q, gradient))
        inner = _grouped((gradient * out).sum(-1, keepdim=True), near_k.size(1))
        to_q, to_far_k, to_far_v, to_near_k, to_near_v = (
            torch.zeros_like(x, memory_format=torch.contiguous_format) for x in (grouped, far_k, far_v, near_k, near_v)
        )
        for block in scores.blocks(q.size(2)):
            keys, queries = block.joined(far_k, near_k), slice(block.begin, block.end)
            asked, reached = grouped[:, :, queries].flatten(1, 2), given[:, :, queries].flatten(1, 2)
            weights = scores.of(block, grouped, keys).sub_(totals[:, :, queries].unsqueeze(-1)).exp_()
            block.add(torch.bmm(weights.flatten(1, 2).transpose(1, 2), reached), to_far_v, to_near_v)
            to_weights = torch.bmm(reached, block.joined(far_v, near_v).transpose(1, 2)).unflatten(1, (grouped.size(1), -1))
            to_scores = to_weights.sub_(inner[:, :, queries]).mul_(weights).mul_(scores.scale).flatten(1, 2)
            to_q[:, :, queries] = torch.bmm(to_scores, keys).unflatten(1, (grouped.size(1), -1))
            block.add(torch.bmm(to_scores.transpose(1, 2), asked), to_far_k, to_near_k)
        return to_q.reshape(q.shape), to_far_k, to_far_v, to_near_k, to_near_v, None


def _grouped(x: Tensor, kv_heads: int) -> Tensor:
    """[B Hk, H / Hk, T, ..] of [B, H, T, ..]"""
    return x.unflatten(1, (kv_heads, -1)).flatten(0, 1)
