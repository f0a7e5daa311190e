"""Small networks with a mixture of experts, made of an attention and a router by name, and the programs that they are."""

import functools

import torch
from torch import nn
from torch.nn import functional as F

import graphwright as gw

WIDTH, INNER, EXPERTS, CHOSEN, LENGTH, TOKENS = 8, 6, 4, 2, 10, 16
NEVER = float("-inf")


def _seen(x, mask=None, is_causal=False):
    """Attention of one head on x itself."""
    one = x.unsqueeze(1)
    return F.scaled_dot_product_attention(one, one, one, attn_mask=mask, is_causal=is_causal).squeeze(1)


def _eager(x, mask):
    return (torch.matmul(x.unsqueeze(1), x.unsqueeze(1).transpose(2, 3)) * 0.3 + mask).softmax(-1).matmul(x.unsqueeze(1)).squeeze(1)


def _positions(x):
    return torch.arange(x.shape[1])


def _blocks(x):
    return _positions(x)[:, None] // 5 >= _positions(x)[None, :] // 5


def _lower(x):
    return _positions(x)[:, None] >= _positions(x)[None, :]


def _scored(x, hide):
    """Attention whose scores `hide` changes before the softmax, or by softmax(scores) itself where it is given that, too."""
    one = x.unsqueeze(1)
    scores = torch.matmul(one, one.transpose(2, 3)) * 0.3
    return hide(scores).matmul(one).squeeze(1)


def _renormalised(weights):
    return weights / weights.sum(-1, keepdim=True)


def _linear_attention(x, seen):
    """Attention without a softmax."""
    keys = F.elu(x) + 1
    return _renormalised((keys @ keys.transpose(1, 2)) * seen.to(x.dtype)) @ x


def _convolved(x):
    """Each position with the one before it, without any attention."""
    return x + F.pad(x, (0, 0, 1, 0))[:, :-1]


KINDS = {
    "causal": _lower,
    "block-causal": _blocks,
    "packed": lambda x: _positions(x)[:, None] // 5 == _positions(x)[None, :] // 5,
    "prefix": lambda x: _lower(x) | (_positions(x)[None, :] < 4),
}
_HIDING = {
    "masked_fill": lambda scores, seen: scores.masked_fill(~seen, NEVER).softmax(-1),
    "masked_fill of -1e4": lambda scores, seen: scores.masked_fill(~seen, -1e4).softmax(-1),
    "where": lambda scores, seen: torch.where(seen, scores, torch.finfo(scores.dtype).min).softmax(-1),
    "adding": lambda scores, seen: (scores + -1e9 * (~seen).to(scores.dtype)).softmax(-1),
    "taking off": lambda scores, seen: (scores - (1 - seen.to(scores.dtype)) * 1e9).softmax(-1),
    "multiplying": lambda scores, seen: _renormalised(scores.exp() * seen.to(scores.dtype)),
    "multiplying a softmax": lambda scores, seen: _renormalised(scores.softmax(-1) * seen.to(scores.dtype)),
}

ATTENTIONS = {
    "both ways": lambda net, x, mask: _seen(x, None if mask is None else mask.bool()[:, None, None, :]),
    "eager both ways": lambda net, x, mask: _eager(x, torch.zeros(x.shape[1], x.shape[1])),
    "causal flag": lambda net, x, mask: _seen(x, is_causal=True),
    "causal mask": lambda net, x, mask: _seen(x, _lower(x)),
    "added causal mask": lambda net, x, mask: _seen(x, torch.zeros(x.shape[1], x.shape[1]).masked_fill(~_lower(x), NEVER)),
    "eager causal mask": lambda net, x, mask: _eager(x, torch.zeros(x.shape[1], x.shape[1]).masked_fill(~_lower(x), -1e38)),
    "block-causal mask": lambda net, x, mask: _seen(x, _blocks(x)),
    "two packed texts": lambda net, x, mask: _seen(x, _positions(x)[:, None] // 5 == _positions(x)[None, :] // 5),
    "mask of the user": lambda net, x, mask: _seen(x, mask[:, None, :, None].bool() & mask[:, None, None, :].bool()),
    **{
        f"{kind} by {form}": lambda net, x, mask, seen=seen, hide=hide: _scored(x, lambda scores: hide(scores, seen(x)))
        for kind, seen in KINDS.items()
        for form, hide in _HIDING.items()
        if "causal" in kind or form in ("adding", "multiplying a softmax")
    },
    **{f"{kind} in a linear attention": lambda net, x, mask, seen=seen: _linear_attention(x, seen(x)) for kind, seen in KINDS.items()},
    "both ways in a bmm": lambda net, x, mask: torch.bmm(torch.bmm(x, x.transpose(1, 2)).softmax(-1), x),
    "both ways by a mean": lambda net, x, mask: x.mean(1, keepdim=True).expand_as(x),
    "both ways by a Fourier transform": lambda net, x, mask: torch.fft.fft(x, dim=1).real,
    "both ways, falling off": lambda net, x, mask: _eager(x, -2.5 * (_positions(x)[:, None] - _positions(x)[None, :]).abs()),
    "both ways, sure of itself": lambda net, x, mask: _eager(x * 2, torch.zeros(x.shape[1], x.shape[1])),
    "causal convolution": lambda net, x, mask: _convolved(x),
    "both ways over convolved": lambda net, x, mask: _convolved(x) + 0 * _seen(x),
    "over a cache": lambda net, x, mask: F.scaled_dot_product_attention(x[:, None], *[x.repeat(1, 2, 1)[:, None]] * 2).squeeze(1),
}


def _topk(scores):
    weight, index = scores.topk(CHOSEN, -1)
    return index, weight


def _renormalized(scores):
    index, weight = _topk(scores)
    return index, weight / weight.sum(-1, keepdim=True)


def _elsewhere(net, x):
    logits = net.router(x)
    net.extra = logits.sum() * 0
    return _topk(logits.softmax(-1))


def _corrected(net, x):
    scores = net.router(x).sigmoid()
    index = (scores + net.factor).topk(CHOSEN, -1)[1]
    return index, scores.gather(1, index)


def _chosen_elsewhere(net, x):
    index, weight = _topk(net.router(x).softmax(-1))
    net.extra = weight.sum() * 0
    return index, weight


ROUTERS = {
    "probabilities": lambda net, x: _topk(net.router(x).softmax(-1)),
    "renormalized": lambda net, x: _renormalized(net.router(x).softmax(-1)),
    "softmax of chosen": lambda net, x: (lambda index, weight: (index, weight.softmax(-1)))(*_topk(net.router(x))),
    "sigmoid": lambda net, x: _renormalized(net.router(x).sigmoid()),
    "extra factor": lambda net, x: (lambda index, weight: (index, weight * net.factor[index]))(*_topk(net.router(x).softmax(-1))),
    "biased": lambda net, x: _topk(net.router(x).softmax(-1) + net.factor),
    "grouped": lambda net, x: _topk(net.router(x).softmax(-1).masked_fill(torch.arange(EXPERTS) < 2, 0.0)),
    "noisy": lambda net, x: _topk((net.router(x) + torch.randn(len(x), EXPERTS)).softmax(-1)),
    "renormalized, kept from 0": lambda net, x: (lambda index, weight: (index, weight / (weight.sum(-1, keepdim=True) + 1e-20)))(
        *_topk(net.router(x).softmax(-1))
    ),
    "divided by more": lambda net, x: (lambda index, weight: (index, weight / (weight.sum(-1, keepdim=True) + 0.5)))(
        *_topk(net.router(x).softmax(-1))
    ),
    "corrected by a bias": _corrected,
    "of the type of tokens": lambda net, x: (lambda index, weight: (index, weight.softmax(-1).type_as(x)))(*_topk(net.router(x))),
    "by max": lambda net, x: tuple(each.unsqueeze(-1) for each in net.router(x).softmax(-1).max(-1)[::-1]),
    "raw scores": lambda net, x: _topk(net.router(x)),
    "scores read elsewhere": _elsewhere,
    "choice read elsewhere": _chosen_elsewhere,
    "smallest": lambda net, x: net.router(x).softmax(-1).topk(CHOSEN, -1, largest=False)[::-1],
    "of other rows": lambda net, x: _topk(net.router(x.flip(0)).softmax(-1)),
    "no layer": lambda net, x: _topk(x[:, :EXPERTS].softmax(-1)),
    "two choices": lambda net, x: (_topk(net.router(x).softmax(-1))[0], _topk(net.router(x * 2).softmax(-1))[1]),
}


class Network(nn.Module):
    """Tokens i[B, S], and where there is padding a mask [B, S] -> [B, S, WIDTH]."""

    def __init__(self, attention="both ways", router="probabilities", experts=EXPERTS, sequences=True):
        super().__init__()
        self.attend, self.route, self.sequences = ATTENTIONS[attention], ROUTERS[router], sequences
        self.embed, self.router = nn.Embedding(TOKENS, WIDTH), nn.Linear(WIDTH, EXPERTS, bias=False)
        self.gate_up = nn.Parameter(torch.empty(experts, 2 * INNER, WIDTH))
        self.down = nn.Parameter(torch.empty(experts, WIDTH, INNER))
        self.factor = nn.Parameter(torch.empty(EXPERTS))
        draw = torch.Generator().manual_seed(0)
        for parameter in self.parameters():
            parameter.data = torch.randn(parameter.shape, generator=draw)

    def forward(self, tokens, attention_mask=None):
        self.extra = 0.0
        x = self.embed(tokens)
        x = x + self.attend(self, x, attention_mask)
        flat = x.reshape(-1, WIDTH) if self.sequences else x.transpose(0, 1).reshape(-1, WIDTH)
        index, weight = self.route(self, flat)
        attributes = {"activation": "silu", "combine_dtype": torch.float32}
        y = torch.ops.gw.token_choice_moe(flat, index, weight, self.gate_up, self.down, **attributes)
        return (x + y.reshape(x.shape) + self.extra,)


class Deep(nn.Module):
    """Networks one after another, over tokens of their own each."""

    def __init__(self, *attentions, lengths=None):
        super().__init__()
        self.layers = nn.ModuleList(Network(attention) for attention in attentions)
        self.lengths = lengths or [LENGTH] * len(attentions)

    def forward(self, tokens):
        parts = [layer(tokens[:, :length])[0] for layer, length in zip(self.layers, self.lengths, strict=True)]
        if len(set(self.lengths)) > 1:
            return tuple(parts)
        return (sum(parts),)


def tokens(rows=2, length=LENGTH, seed=0):
    return torch.randint(0, TOKENS, (rows, length), generator=torch.Generator().manual_seed(seed))


@functools.cache  # a capture takes a second
def captured(
    attention="both ways", router="probabilities", *, padded=False, rows=2, length=LENGTH, experts=EXPERTS, sequences=True, dynamic=None
):
    kwargs = {"attention_mask": torch.ones(rows, length, dtype=torch.int64)} if padded else {}
    shapes = None if dynamic is None else {"tokens": dict([dynamic])} | {name: None for name in kwargs}
    return gw.capture(Network(attention, router, experts, sequences).eval(), (tokens(rows, length),), kwargs, dynamic_shapes=shapes)


def chosen(program, verify="structure", **options):
    """What `expert-choice` makes of a program: the result of the pipeline."""
    return gw.PassManager([gw.passes.RegroupExperts(), gw.ExpertChoice(**options)], verify=verify).run(program)
