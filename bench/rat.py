"""`gw.rat_cached_attention` and `gw.rat_attention` on a CPU against what a user would pick: attention of one decoding step behind 4,096
tokens, of a whole prompt, and the bytes of a cache; projections are in none of them. Llama's heads: 32 of queries, 8 or 32 of keys, 128
wide, rotated in both; chunks of 16 tokens. Rows are named dtype, rows of the batch, key heads, tokens, window, and raw where near tokens
are keys and values beside 16 sinks, as `rat-recurrence` has them by default; elsewhere they are states, without sinks, as in RAT.

A call of a step is that of several layers, each with caches of its own, so that slots come from memory as they do in a model. Peers:
"SDPA": ATen's attention over all tokens, causal; "flex_attention": torch's, compiled, over states that are there already, with the mask of
what a query sees; flash-linear-attention, where it was installed by `pip`, has such recurrences (hgrn) in kernels for GPUs alone. Of cache
bytes, "SDPA" has those of all keys and values, and "formula" is 2 Hk E (sinks + ceil(T / L) + ring) elements and 2 Hk E numbers of float32
a sequence.

    python bench/rat.py [--quick] [--case TEXT] [--json FILE]
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from harness import Bench
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from graphwright.codegen.rat.kernels import rat_attention, step_in_place
from graphwright.codegen.rat.library import library
from graphwright.ir.ops.rat_parts import ring_of

PEERS = {"SDPA": "torch", "flex_attention": "torch", "flash-linear-attention": "flash-linear-attention", "formula": "torch"}
HEADS, DIM, CHUNK, SEEN = 32, 128, 16, 4096
DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16}
LAYERS = 16  # of one row with 8 key heads; fewer where a layer has more


@dataclass(frozen=True)
class Case:
    dtype: str
    batch: int
    kv_heads: int
    tokens: int
    window: int
    local: str = "state"

    @property
    def name(self) -> str:
        return f"{self.dtype}, {self.batch}, {self.kv_heads}, {self.tokens}, {self.window}" + (", raw" if self.local == "raw" else "")

    @property
    def sinks(self) -> int:
        return CHUNK if self.local == "raw" else 0

    @property
    def slots(self) -> int:
        return self.sinks + -(-self.tokens // CHUNK) + ring_of(CHUNK, self.window, self.local)

    @property
    def options(self) -> dict[str, object]:
        return {"chunk": CHUNK, "scale": DIM**-0.5, "window": self.window, "sinks": self.sinks, "local": self.local}

    def normal(self, heads: int, tokens: int) -> Tensor:
        """Laid out as a projection leaves it."""
        return torch.randn(self.batch, tokens, heads, DIM).to(DTYPES[self.dtype]).transpose(1, 2)

    def operands(self, tokens: int) -> list[Tensor]:
        """q, k, v, gate, chunk_bias, cos and sin of so many tokens."""
        angles = torch.randn(1, tokens, DIM)
        heads = [self.normal(HEADS, tokens), *(self.normal(self.kv_heads, tokens) for _ in range(3))]
        return [*heads, torch.randn(CHUNK, 1, 1), angles.cos(), angles.sin()]

    def caches(self) -> list[Tensor]:
        """Slots and states of a row that has seen so many tokens."""
        shape = (self.batch, self.kv_heads, self.slots, DIM)
        return [*(torch.randn(shape).to(DTYPES[self.dtype]) for _ in range(2)), *(torch.randn(*shape[:2], DIM) for _ in range(2))]


DECODE = [Case(dtype, batch, heads, SEEN, window) for dtype in DTYPES for batch in (1, 8) for heads in (8, 32) for window in (0, 256)]
DECODE += [Case(dtype, 1, 8, SEEN, 256, "raw") for dtype in DTYPES]
PREFILL = [Case(dtype, 1, 8, tokens, window) for dtype in DTYPES for tokens in (1024, 2048, 4096) for window in (0, 256)]
PREFILL += [Case(dtype, 1, 8, 2048, 256, "raw") for dtype in DTYPES]


def main() -> None:
    bench = Bench(
        "rat", PEERS, add_arguments=lambda parser: parser.add_argument("--case", default="", help="only cases with it in their names")
    )
    if library() is None:
        bench.note("no C++ compiler, so there is no kernel of ours: install g++")
        return bench.finish()
    if "flash-linear-attention" not in bench.missing:
        bench.note("flash-linear-attention's recurrences are kernels for GPUs, and are not measured here")
    torch.manual_seed(0)
    with torch.no_grad():
        cases = [
            *(("decode", decode, case) for case in (DECODE[:2] if bench.quick else DECODE)),
            *(("cache", cache_bytes, case) for case in (*DECODE[:4:3], DECODE[-2])),
            *(("prefill", prefill, case) for case in (PREFILL[2:4] if bench.quick else PREFILL)),
        ]
        for section, measure, case in cases:
            if bench.options.case in f"{section} {case.name}":
                measure(bench, case)
    bench.finish()


def decode(bench: Bench, case: Case) -> None:
    """The last token of `case.tokens`."""
    layers = max(1, LAYERS * 8 // (case.batch * case.kv_heads))
    operands, held = case.operands(1), [case.caches() for _ in range(layers)]
    q, full = operands[0], [(case.normal(case.kv_heads, case.tokens), case.normal(case.kv_heads, case.tokens)) for _ in range(layers)]
    full = [(k.contiguous(), v.contiguous()) for k, v in full]
    position, rows = torch.full((case.batch,), case.tokens - 1), torch.arange(case.batch)
    bench.time(
        f"decode {case.name}",
        lambda: [step_in_place(*operands, *caches, position, rows, None, **case.options) for caches in held],
        {"SDPA": lambda: [F.scaled_dot_product_attention(q, k, v, enable_gqa=True) for k, v in full]},
    )
    bench.save()


def prefill(bench: Bench, case: Case) -> None:
    operands = case.operands(case.tokens)
    q, k, v = operands[:3]
    peers: dict[str, Callable[[], object]] = {"SDPA": lambda: F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)}
    if not bench.quick:  # it takes a minute to compile
        try:
            peers["flex_attention"] = flexible(case, q, k, v)
        except Exception as error:  # whatever its compiler meets
            bench.note(f"flex_attention does not run {case.name}: {str(error).splitlines()[0]}")
    bench.time(f"prefill {case.name}", lambda: rat_attention(*operands, **case.options), peers)
    bench.save()


def flexible(case: Case, q: Tensor, k: Tensor, v: Tensor) -> Callable[[], object]:
    window, sinks, raw = case.window, case.sinks, case.local == "raw"

    def visible(b: Tensor, h: Tensor, t: Tensor, j: Tensor) -> Tensor:
        begin = (t - window).clamp(min=0) // CHUNK * CHUNK  # of what is near, where it is raw
        is_summary = ((j + 1) % CHUNK == 0) & (j < begin)
        return is_summary | (j <= t) & ((j < sinks) | (j >= (begin if raw else t - window)))

    mask = create_block_mask(visible, None, None, case.tokens, case.tokens, device="cpu")
    compiled = torch.compile(flex_attention)

    def call() -> object:
        return compiled(q, k, v, block_mask=mask, enable_gqa=True)

    call()
    return call


def cache_bytes(bench: Bench, case: Case) -> None:
    caches = case.caches()
    formula = 2 * case.kv_heads * DIM * (case.slots * caches[0].itemsize + 4)
    full = 2 * case.kv_heads * case.tokens * DIM * caches[0].itemsize
    held = sum(each.nbytes for each in caches) // case.batch
    bench.row(f"cache {case.name}", "bytes", "B", held, {"SDPA": full, "formula": formula})


if __name__ == "__main__":
    main()
