"""`gw.cached_attention` and `gw.kv_append` on a CPU against what a user would pick: attention of one decoding step, of a few queries that
verify drafts, and of a prompt's chunk; rows are named dtype, rows of the batch, queries, slots that the last query sees.

A Llama of 100M parameters: 12 heads, 4 of keys, 64 wide, caches of 2176 slots. A call is that of `LAYERS` layers, each with caches of its
own, so that keys and values come from where a model has them: the memory of all layers does not fit the cache. Peers: "narrowed": ATen's
attention on views of the live slots, causal; "static mask": on the whole capacity with a mask of booleans, as transformers' static
cache has it; "index_put": ATen's write into caches at the same slots.

Rows "cache" are bytes that the caches of a row take, in bfloat16, prompts being read `PIECE` tokens at a time: layers with a window keep
a ring of its last positions. Peer: "all positions", caches of as many slots as there are positions in every layer.

    python bench/kv_cache.py [--quick] [--json FILE]
"""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from harness import Bench
from torch import Tensor

from graphwright.codegen.attention.cached import append_in_place, cached_attention
from graphwright.codegen.attention.library import library
from graphwright.runtime.decoding.caches import Caches as AllCaches
from graphwright.runtime.decoding.caches import CacheType

PEERS = ("narrowed", "static mask", "index_put")
# (windows of the layers, 0 for all positions; heads of keys; their width)
SHAPES = {
    "Gemma 3 1B": ([512 if layer % 6 != 5 else 0 for layer in range(26)], 1, 256),
    "Gemma 3 27B": ([1024 if layer % 6 != 5 else 0 for layer in range(62)], 16, 128),
    "Mistral 7B v0.1": ([4096] * 32, 8, 128),
}
PIECE = 512
HEADS, KV_HEADS, DIM, CAPACITY, LAYERS = 12, 4, 64, 2176, 12
DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16}
STEPS = [(batch, 1, seen) for batch in (1, 8) for seen in (64, 512, 2048)]  # (rows, queries, slots)
CHUNKS = [(1, 5, 512), (1, 64, 64), (1, 64, 1024), (1, 512, 512)]
Caches = Sequence[tuple[Tensor, Tensor]]


def main() -> None:
    bench = Bench("kv_cache", dict.fromkeys((*PEERS, "all positions"), "torch"))
    for name, (windows, heads, width) in SHAPES.items():
        for positions in (8192, 32768):
            ours, whole = (cache_bytes(each, heads, width, positions) for each in (windows, [0] * len(windows)))
            bench.row(f"cache {name}, {positions}", "bytes", "B", ours, {"all positions": whole})
    if library() is None:
        bench.note("no C++ compiler, so there is no kernel of ours: install g++")
        return bench.finish()
    torch.manual_seed(0)
    with torch.no_grad():
        for dtype in DTYPES:
            for batch, queries, seen in STEPS[1::2] + CHUNKS[:1] if bench.quick else STEPS + CHUNKS:
                measure(bench, dtype, batch, queries, seen)
    bench.finish()


def measure(bench: Bench, dtype: str, batch: int, queries: int, seen: int) -> None:
    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape).to(DTYPES[dtype])

    caches = [(normal(batch, KV_HEADS, CAPACITY, DIM), normal(batch, KV_HEADS, CAPACITY, DIM)) for _ in range(LAYERS)]
    position, rows = torch.full((batch,), seen - queries), torch.arange(batch)
    q = normal(batch, queries, HEADS, DIM).transpose(1, 2)
    name = f"{dtype}, {batch}, {queries}, {seen}"
    attention = {"narrowed": narrowed(q, caches, seen), "static mask": masked(q, caches, seen)}
    bench.time(f"attention {name}", lambda: [cached_attention(q, k, v, position, rows, scale=DIM**-0.5) for k, v in caches], attention)
    if seen != 512:
        return  # an append costs the same wherever it lies
    new = normal(batch, queries, KV_HEADS, DIM).transpose(1, 2)
    append = {"index_put": put(new, caches, position, rows)}
    bench.time(f"append {name}", lambda: [append_in_place(k, v, new, new, position, rows) for k, v in caches], append)


def cache_bytes(windows: Sequence[int], heads: int, width: int, positions: int) -> int:
    """Of one row, as `generate` allocates them."""
    types = [
        CacheType(layer, heads, width, torch.bfloat16, torch.device("meta"), window) for layer, window in enumerate(windows) for _ in "kv"
    ]
    return sum(cache.nbytes for cache in AllCaches(types, 1, positions, PIECE).tensors)


def narrowed(q: Tensor, caches: Caches, seen: int) -> Callable[[], object]:
    queries = q.size(2)
    is_causal = 1 < queries == seen
    mask = torch.arange(seen) <= torch.arange(seen - queries, seen).unsqueeze(1) if 1 < queries < seen else None

    def call() -> list[Tensor]:
        parts = [(k[:, :, :seen], v[:, :, :seen]) for k, v in caches]
        return [F.scaled_dot_product_attention(q, k, v, mask, is_causal=is_causal, enable_gqa=True) for k, v in parts]

    return call


def masked(q: Tensor, caches: Caches, seen: int) -> Callable[[], object]:
    queries = q.size(2)
    mask = (torch.arange(CAPACITY) <= torch.arange(seen - queries, seen).unsqueeze(1)).expand(q.size(0), 1, queries, CAPACITY)
    return lambda: [F.scaled_dot_product_attention(q, k, v, mask, enable_gqa=True) for k, v in caches]


def put(new: Tensor, caches: Caches, position: Tensor, rows: Tensor) -> Callable[[], object]:
    batch, heads, queries, _ = new.shape

    def call() -> None:
        slots = position.unsqueeze(1) + torch.arange(queries)
        at = (rows.reshape(batch, 1, 1), torch.arange(heads).reshape(1, heads, 1), slots.unsqueeze(1))
        for k, v in caches:
            k.index_put_(at, new)
            v.index_put_(at, new)

    return call


if __name__ == "__main__":
    main()
