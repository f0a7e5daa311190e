"""Networks whose inputs have one dim that is dynamic, which `slice-groups` takes apart."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import nn
from torch.export import Dim
from torch.nn import functional as F


def rows(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(3))


class FeedForward(nn.Module):
    """down(gelu(up(x))) after `before` and before `after`, which see x as it was too."""

    def __init__(self, before: Callable = lambda x: x, after: Callable = lambda h, x: h):
        super().__init__()
        self.up, self.down = nn.Linear(16, 128), nn.Linear(128, 16)
        self.before, self.after = before, after

    def forward(self, x):
        return self.after(self.down(F.gelu(self.up(self.before(x)))), x)


class Attention(nn.Module):
    def __init__(self, causal: bool = False, kv_heads: int = 4):
        super().__init__()
        self.causal, self.kv_heads = causal, kv_heads
        self.q, self.k, self.v = nn.Linear(16, 16), nn.Linear(16, 4 * kv_heads), nn.Linear(16, 4 * kv_heads)
        self.out, self.ff = nn.Linear(16, 128), nn.Linear(128, 16)

    def forward(self, x):
        b, n, _ = x.shape
        q = self.q(x).view(b, n, 4, 4).transpose(1, 2)
        k, v = (p(x).view(b, n, self.kv_heads, 4).transpose(1, 2) for p in (self.k, self.v))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal, enable_gqa=self.kv_heads != 4)
        return x + self.ff(F.gelu(self.out(y.transpose(1, 2).reshape(b, n, -1))))


class Convolutions(nn.Module):
    """1x1 convolutions around `middle`, with a GroupNorm over rows and columns."""

    def __init__(self, middle: Callable, channels: int = 32, norm: bool = True):
        super().__init__()
        self.wide, self.narrow = nn.Conv2d(4, 32, 1), nn.Conv2d(channels, 4, 1)
        self.norm = nn.GroupNorm(4, 32) if norm else nn.Identity()
        self.middle = middle

    def forward(self, x):
        return self.narrow(self.middle(F.silu(self.norm(F.silu(self.wide(x)) * 2))))


@dataclass(frozen=True)
class Case:
    """A network, the shape of its input at size n, the dim that is dynamic, and n at capture."""

    network: Callable[[], nn.Module]
    shape: Callable[[int], Sequence[int]]
    dim: int
    hint: int = 24
    multiple: int = 1
    low: int = 1

    @property
    def dynamic(self) -> dict:
        n = Dim("n", min=self.low, max=5000)
        return {"x": {self.dim: n if self.multiple == 1 else self.multiple * n}}


CASES = {
    "feed-forward": Case(FeedForward, lambda n: (2, n, 16), 1),
    "attention": Case(Attention, lambda n: (2, n, 16), 1),
    "attention, causal": Case(lambda: Attention(causal=True), lambda n: (1, n, 16), 1),
    "attention, causal gqa": Case(lambda: Attention(causal=True, kv_heads=2), lambda n: (1, n, 16), 1),
    "batch": Case(lambda: FeedForward(after=lambda h, x: h + x), lambda n: (n, 3, 16), 0, hint=4),
    "a view that needs a coarser axis": Case(
        lambda: FeedForward(lambda x: x.view(-1, 4, 16), lambda h, x: h.view(-1, 16)), lambda n: (4 * n, 16), 0, multiple=4
    ),
    "a size as a value": Case(lambda: FeedForward(after=lambda h, x: h / x.shape[0] + x.shape[0]), lambda n: (n, 16), 0),
    "positions": Case(lambda: FeedForward(after=lambda h, x: h + torch.arange(x.shape[0])[:, None]), lambda n: (n, 16), 0),
    "a squeeze without dims": Case(lambda: FeedForward(lambda x: x[:, None], lambda h, x: h.squeeze()), lambda n: (n, 16), 0, low=2),
    "an expand": Case(lambda: FeedForward(after=lambda h, x: h * x.mean(1, keepdim=True).expand(x.shape[0], 16)), lambda n: (n, 16), 0),
    "a slice to the end": Case(lambda: FeedForward(lambda x: F.silu(x)[: x.shape[0]]), lambda n: (n, 16), 0),
    "padding": Case(lambda: FeedForward(lambda x: F.pad(x, (0, 0, 1, 1))), lambda n: (n, 16), 0),
    "two copies": Case(lambda: FeedForward(lambda x: torch.cat([x, x])), lambda n: (n, 16), 0),
    "rows of a convolution": Case(lambda: Convolutions(lambda h: h), lambda n: (1, 4, n, 8), 2),
    "an upsampling": Case(lambda: Convolutions(lambda h: F.interpolate(h, scale_factor=2.0)), lambda n: (1, 4, n, 3), 2),
    "a pixel shuffle": Case(lambda: Convolutions(lambda h: F.pixel_shuffle(h, 2), 8), lambda n: (1, 4, n, 8), 2),
    "a pooling": Case(lambda: Convolutions(lambda h: F.max_pool2d(h, 2), norm=False), lambda n: (1, 4, 2 * n, 8), 2, multiple=2),
}
BUDGETS = ("25%", "9KiB")
