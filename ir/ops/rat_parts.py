"""What both operators of a chunked recurrence and each form of them share: which tokens a query sees, rotations, gates, the recurrence.

Source: specs/rat.md, section 2.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

LOCALS = ("state", "raw")
ROPE_STYLES = ("half", "interleaved")
MOST_TOKENS = 2**24  # that a recurrence without resets goes on for where their number is a symbol
SHORT = 256  # zeros in front that cost less than to compare times


def ring_of(chunk: int, window: int, local: str) -> int:
    """The most tokens that are near a query and no sinks, which is how many a cache keeps."""
    return window + (1 if local == "state" else chunk)


@dataclass(frozen=True)
class Layout:
    """Which tokens a query sees. L = chunk, W = window."""

    chunk: int
    window: int
    sinks: int
    local: str

    def __post_init__(self) -> None:
        if self.chunk < 1:
            raise ValueError(f"a chunk has at least one token, not {self.chunk}")
        if self.window < 0 or self.sinks < 0:
            raise ValueError(f"a window and sinks are numbers of tokens, not {self.window} and {self.sinks}")
        if self.local not in LOCALS:
            raise ValueError(f"near tokens are read as one of {', '.join(LOCALS)}, not {self.local}")

    @property
    def ring(self) -> int:
        return ring_of(self.chunk, self.window, self.local)

    def is_summary(self, j: Tensor, t: Tensor) -> Tensor:
        """Whether the state at time j stands for its chunk to a query at time t."""
        return ((j + 1) % self.chunk == 0) & (j < self.first_open(t)) & (j >= self.sinks)

    def is_near(self, j: Tensor, t: Tensor) -> Tensor:
        """Whether the token at time j is visible to a query at time t by itself."""
        low = t - self.window if self.local == "state" else self.first_open(t)
        return (j <= t) & ((j < self.sinks) | (j >= low))

    def first_open(self, t: Tensor) -> Tensor:
        """The first token of the first chunk that is no summary yet: max(0, floor((t - W) / L)) L"""
        return (t - self.window).clamp(min=0) // self.chunk * self.chunk


class Rotation:
    """Turns the first dr channels of x [B, H, T, E] by cos and sin [B|1, T, dr]."""

    def __init__(self, cos: Tensor | None, sin: Tensor | None, style: str, wide: torch.dtype):
        if style not in ROPE_STYLES:
            raise ValueError(f"channels are paired in one of the styles {', '.join(ROPE_STYLES)}, not {style}")
        if (cos is None) != (sin is None):
            raise ValueError("cos and sin come together, or neither does")
        if cos is not None and cos.size(-1) % 2:
            raise ValueError(f"a rotation turns pairs of channels, and {cos.size(-1)} is odd")
        self.style = style
        self.tables = None if cos is None or sin is None else (cos.to(wide).unsqueeze(1), sin.to(wide).unsqueeze(1))

    def __call__(self, x: Tensor) -> Tensor:
        if self.tables is None:
            return x
        cos, sin = self.tables
        turned, rest = x[..., : cos.size(-1)], x[..., cos.size(-1) :]
        if self.style == "half":
            first, second = turned.chunk(2, -1)
            partner = torch.cat([-second, first], -1)
        else:
            partner = torch.stack([-turned[..., 1::2], turned[..., 0::2]], -1).flatten(-2)
        return torch.cat([turned * cos + partner * sin, rest], -1)


def gates_of(logits: Tensor, chunk_bias: Tensor | None, t: Tensor, chunk: int) -> Tensor:
    """sigmoid(logits [B, Hk, T, E] + chunk_bias[t % L]), t [B|1, T]"""
    if chunk_bias is None:
        return logits.sigmoid()
    return (logits + chunk_bias.to(logits.dtype)[t % chunk].transpose(1, 2)).sigmoid()


def goes_on_at(t: Tensor, chunk: int, reset: bool) -> Tensor:
    """[B|1, 1, T, 1]: whether the state of the token before lives on at t."""
    goes_on = (t % chunk != 0) if reset else (t != 0)
    return goes_on.unsqueeze(1).unsqueeze(-1)


def recurrence(x: list[Tensor], g: Tensor, goes_on: Tensor, longest: int | None) -> tuple[list[Tensor], Tensor]:
    """The states s[t] = a[t] s[t-1] + (1 - g[t]) x[t] along dim 2 with s[-1] = 0, a = g where the state `goes_on` and 0 elsewhere, and
    the products a[0] .. a[t]: what is left at t of a state before the first token. No state lives longer than `longest` tokens."""
    return scan([(1 - g) * each for each in x], torch.where(goes_on, g, 0.0), longest)


def scan(terms: list[Tensor], a: Tensor, longest: int | None) -> tuple[list[Tensor], Tensor]:
    """The sums s[t] = a[t] s[t-1] + term[t] along dim 2 with s[-1] = 0, and the products a[0] .. a[t].

    Doubling: after d = 1, 2, 4, .. each element holds what the last 2d tokens add up to. None counts for longer than `longest` tokens, or
    MOST_TOKENS where the number of tokens is a symbol.
    """
    tokens = a.size(2)
    if longest is None:
        longest = tokens if isinstance(tokens, int) else MOST_TOKENS
    d = 1
    while d < longest:
        terms = [term + a * shifted(term, d, tokens, 0.0) for term in terms]
        a = a * shifted(a, d, tokens, 1.0)
        d *= 2
    return terms, a


def shifted(x: Tensor, d: int, tokens: int, fill: float) -> Tensor:
    """x[.., t - d, :], `fill` before the first"""
    if isinstance(tokens, int) or d < SHORT:
        return pad(x, (0, 0, d, 0), value=fill).narrow(2, 0, tokens)
    turned = x.roll(d, 2)  # unlike what is padded by d, no longer than x
    return torch.where((torch.arange(tokens, device=x.device) >= d).unsqueeze(-1), turned, fill)
