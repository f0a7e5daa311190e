"""Operands of `gw.rat_attention` and `gw.rat_cached_attention` for tests of kernels, and what these may be off by."""

from dataclasses import dataclass, field

import torch
from hypothesis import strategies as st

import graphwright.ir.ops  # noqa: F401  (registers the operators)

attention, cached = torch.ops.gw.rat_attention.default, torch.ops.gw.rat_cached_attention.default
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
NAN = float("nan")


def double(x):
    return x.double() if torch.is_tensor(x) and x.is_floating_point() else x


@dataclass
class Case:
    """Rows of tokens, laid out [B, T, H, E]. `gate` says along which dims the logits are one number: none, "channels" of a head."""

    dtype: torch.dtype = torch.float32
    batch: int = 2
    kv_heads: int = 2
    group: int = 3
    tokens: int = 63
    depth: int = 64
    turned: int = 32  # channels, 0 without rotations
    chunk: int = 16
    window: int = 0
    sinks: int = 0
    local: str = "state"
    reset: bool = True
    rope_style: str = "half"
    summary_bias: float = 0.0
    gate: str = "none"
    bias: tuple[bool, bool] | None = (True, False)  # whether it has heads and channels of its own
    per_row: bool = False  # whether rotations are a row's own
    seed: int = 0
    options: dict = field(init=False)

    def __post_init__(self):
        draw = torch.Generator().manual_seed(self.seed)

        def normal(*shape):
            return torch.randn(*shape, generator=draw)

        def of_heads(heads):
            return normal(self.batch, self.tokens, heads, self.depth).to(self.dtype).transpose(1, 2)

        self.q, self.k, self.v, logits = of_heads(self.kv_heads * self.group), *(of_heads(self.kv_heads) for _ in range(3))
        self.logits = logits[..., :1].expand(-1, -1, -1, self.depth) if self.gate == "channels" else logits
        heads, channels = self.bias or (False, False)
        shape = (self.chunk, self.kv_heads if heads else 1, self.depth if channels else 1)
        self.chunk_bias = None if self.bias is None else normal(*shape)
        angles = normal(self.batch if self.per_row else 1, self.tokens, self.turned)
        self.cos, self.sin = (angles.cos(), angles.sin()) if self.turned else (None, None)
        names = ("chunk", "window", "sinks", "local", "reset", "rope_style", "summary_bias")
        self.options = {name: getattr(self, name) for name in names} | {"scale": self.depth**-0.5}

    @property
    def operands(self):
        return [self.q, self.k, self.v, self.logits, self.chunk_bias, self.cos, self.sin]

    @property
    def ring(self):
        return self.window + (1 if self.local == "state" else self.chunk)

    def exact(self):
        """The body in float64, and with the sizes of what it sums."""
        operands = list(map(double, self.operands))
        return attention(*operands, **self.options), attention(*operands[:2], operands[2].abs(), *operands[3:], **self.options)

    def caches(self, rows=4, capacity=None):
        """Caches of which nothing was written."""
        chunks = -(-(self.tokens if capacity is None else capacity) // self.chunk)
        slots = (rows, self.kv_heads, self.sinks + chunks + self.ring, self.depth)
        states = (rows, self.kv_heads, self.depth)
        return [torch.full(slots, NAN, dtype=self.dtype) for _ in range(2)] + [torch.full(states, NAN) for _ in range(2)]

    def taken(self, first, counts, tokens=None, junk=7.0):
        """The operands of a step of `counts[b]` tokens of row b from first[b] on, in rows of `tokens`, the rest junk."""
        tokens = max(counts) if tokens is None else tokens

        def part(x):
            y = torch.full((self.batch, tokens, *x.shape[2:]), junk, dtype=x.dtype)
            for b, (begin, count) in enumerate(zip(first, counts, strict=True)):
                y[b, :count] = x[b, begin : begin + count]
            return y

        heads = [part(x.transpose(1, 2)).transpose(1, 2) for x in (self.q, self.k, self.v, self.logits)]
        tables = [None if x is None else part(x.expand(self.batch, -1, -1)) for x in (self.cos, self.sin)]
        return [*heads, self.chunk_bias, *tables]


def assert_close(y, exact, bound, dtype):
    """Within the rounding of the result, and in float32 24 eps more of the absolute terms: a score of normal vectors is at most about 6,
    and a weight moves by its absolute error, some eps of 6; a state adds a few products of gates."""
    assert y.dtype == dtype and y.shape == exact.shape
    slack = torch.finfo(dtype).eps * exact.abs() + 24 * torch.finfo(torch.float32).eps * (bound + exact.abs())
    tiny = 2.0**-24 if dtype == torch.float16 else 0.0  # the distance of subnormal float16
    off = (y.double() - exact).abs() - slack - tiny
    assert (off <= 0).all(), f"{off.max():.2e} too far"


@st.composite
def cases(draw, most=90, dtypes=DTYPES):
    depth = draw(st.integers(1, 40))
    return Case(
        dtype=draw(st.sampled_from(dtypes)),
        batch=draw(st.integers(1, 3)),
        kv_heads=draw(st.integers(1, 3)),
        group=draw(st.sampled_from([1, 2, 5])),
        tokens=draw(st.integers(1, most)),
        depth=depth,
        turned=2 * draw(st.integers(0, depth // 2)),
        chunk=draw(st.sampled_from([1, 2, 4, 7, 16, 17, 64, 100])),
        window=draw(st.sampled_from([0, 0, 1, 5, 30])),
        sinks=draw(st.sampled_from([0, 0, 1, 4, 20])),
        local=draw(st.sampled_from(["state", "raw"])),
        reset=draw(st.booleans()),
        rope_style=draw(st.sampled_from(["half", "interleaved"])),
        summary_bias=draw(st.sampled_from([0.0, 1.5])),
        gate=draw(st.sampled_from(["none", "channels"])),
        bias=draw(st.sampled_from([None, (False, False), (True, True), (False, True)])),
        per_row=draw(st.booleans()),
        seed=draw(st.integers(0, 2**20)),
    )


ODD = {  # what a kernel may get wrong by itself
    "one token": Case(tokens=1),
    "five tokens": Case(tokens=5, chunk=4, local="raw", gate="channels"),
    "a chunk of one": Case(tokens=63, chunk=1, window=3),
    "odd channels": Case(tokens=123, chunk=17, depth=33, turned=6, local="raw", rope_style="interleaved", bias=(True, True)),
    "more chunk than tokens": Case(tokens=63, chunk=100, sinks=3),
    "no resets": Case(tokens=123, chunk=64, reset=False, window=9, per_row=True),
    "long": Case(tokens=1000, chunk=16, window=100, sinks=16, local="raw", depth=128, turned=128, batch=1, kv_heads=1, summary_bias=1.5),
    "long, of states": Case(tokens=1000, chunk=4, depth=128, turned=0, batch=1, kv_heads=1, group=2, sinks=5, bias=None),
    "many heads of one": Case(tokens=5, kv_heads=1, group=80, chunk=4),
}
