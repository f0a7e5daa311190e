"""The kernels of caches compile ahead of time for GPUs that are not here, and spill no register.

Compiling needs a process in which triton was imported to compile, so this file is also the program that the test runs.
"""

import json
import sys

import pytest

CASES = {  # dtype, rows, queries, heads, key heads, depth, capacity, window, softcap
    "decode": ("bfloat16", 1, 1, 32, 8, 128, 32768, 0, 0.0),
    "decode of many rows": ("float16", 64, 1, 32, 8, 128, 8192, 0, 0.0),
    "verify": ("bfloat16", 2, 5, 12, 4, 64, 4096, 0, 0.0),
    "prefill": ("bfloat16", 4, 2048, 32, 8, 128, 4096, 0, 0.0),
    "prefill, window and softcap": ("bfloat16", 4, 1024, 8, 4, 256, 8192, 4096, 50.0),
    "prefill, float32": ("float32", 4, 1024, 12, 12, 64, 2048, 0, 0.0),
    "prefill, float32, wide": ("float32", 4, 1024, 32, 8, 128, 2048, 0, 0.0),
    "decode, float32": ("float32", 64, 1, 32, 8, 128, 4096, 0, 0.0),
}


def launches(case, target):
    """Name -> the kernel and the arguments by name of each launch that a call of `case` makes."""
    import torch

    from graphwright.codegen.triton.attention import kernels, launch
    from graphwright.tests.ahead_of_time import launches_of

    dtype, batch, queries, heads, kv_heads, depth, capacity, window, softcap = case

    def empty(*shape):
        return torch.empty(shape, dtype=getattr(torch, dtype), device="meta")

    def call():
        caches = [empty(batch, kv_heads, capacity, depth) for _ in range(2)]
        at = [torch.empty(batch, dtype=torch.int64, device="meta") for _ in range(2)]
        launch.cached_attention(
            empty(batch, queries, heads, depth).transpose(1, 2), *caches, *at, scale=0.1, window=window, softcap=softcap, ring=window > 0
        )
        new = [empty(batch, queries, kv_heads, depth).transpose(1, 2) for _ in range(2)]
        launch.append_in_place(*caches, *new, *at, ring=window > 0)

    launch.target_of = lambda device: target
    return launches_of({kernels: ("attend", "join", "append")}, call)


def main():
    from graphwright.tests.ahead_of_time import figures

    json.dump(figures(CASES, launches), sys.stdout)


@pytest.fixture(scope="module")
def table():
    from graphwright.tests.ahead_of_time import figures_of

    return figures_of(__file__)


@pytest.mark.parametrize("case", CASES)
def test_kernels_compile_for_every_target_without_spills(case, table):
    assert set(table[case]) == {"sm_80", "sm_90", "sm_100", "gfx942"}
    for target, kernels in table[case].items():
        assert {"attend", "append"} <= set(kernels) and ("join" in kernels) == (case in ("decode", "verify")), target
        for registers, shared, spills, room in kernels.values():
            assert 0 < registers <= (512 if target == "gfx942" else 255)
            assert spills == 0, target
            assert shared <= room


if __name__ == "__main__":
    main()
