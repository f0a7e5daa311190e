"""The kernels of the chunked recurrence compile ahead of time for GPUs that are not here, and spill no register to memory.

Compiling needs a process in which triton was imported to compile, so this file is also the program that the test runs.
"""

import json
import sys

import pytest

CASES = {  # dtype, rows, tokens, key heads, depth, chunk, window, sinks, local, capacity (0 without caches)
    "step": ("bfloat16", 1, 1, 8, 128, 16, 0, 0, "state", 131072),
    "step of many rows": ("float16", 64, 1, 32, 128, 16, 256, 16, "raw", 8192),
    "step, float32": ("float32", 64, 1, 8, 128, 16, 256, 0, "state", 8192),
    "prompt": ("bfloat16", 2, 4096, 8, 128, 16, 0, 0, "state", 0),
    "prompt, raw": ("bfloat16", 2, 4096, 32, 64, 16, 256, 16, "raw", 0),
    "chunk of a prompt": ("bfloat16", 4, 512, 8, 128, 16, 256, 16, "raw", 8192),
    "chunk of a prompt, float32": ("float32", 4, 512, 8, 128, 16, 256, 0, "state", 8192),
}
HEADS = 32


def launches(case, target):
    """Name -> the kernel and the arguments by name of each launch that a call of `case` makes."""
    import torch

    from graphwright.codegen.triton.attention import kernels as joining
    from graphwright.codegen.triton.rat import kernels, launch
    from graphwright.tests.ahead_of_time import launches_of

    dtype, batch, tokens, kv_heads, depth, chunk, window, sinks, local, capacity = case

    element = getattr(torch, dtype)

    def empty(*shape, dtype=element):
        return torch.empty(shape, dtype=dtype, device="meta")

    def call():
        heads = [empty(batch, tokens, n, depth).transpose(1, 2) for n in (HEADS, kv_heads, kv_heads, kv_heads)]
        tables = [empty(1, tokens, depth, dtype=torch.float32) for _ in range(2)]
        operands = [*heads, empty(chunk, 1, 1, dtype=torch.float32), *tables]
        options = {"chunk": chunk, "scale": 0.1, "window": window, "sinks": sinks, "local": local}
        if not capacity:
            return launch.rat_attention(*operands, **options)
        slots = sinks + capacity // chunk + window + (1 if local == "state" else chunk)
        caches = [empty(batch, kv_heads, slots, depth) for _ in range(2)]
        states = [empty(batch, kv_heads, depth, dtype=torch.float32) for _ in range(2)]
        places = [empty(batch, dtype=torch.int64) for _ in range(3)]
        return launch.step_in_place(*operands, *caches, *states, *places, **options)

    launch.target_of = lambda device: target
    return launches_of({kernels: ("scan", "flash", "keep", "decode"), joining: ("join",)}, call)


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
    is_step = case.startswith("step")
    expected = {"decode"} if is_step else {"scan", "flash"} | ({"keep"} if case.startswith("chunk") else set())
    for target, kernels in table[case].items():
        assert expected | ({"join"} if case == "step" else set()) == set(kernels), target
        for name, (registers, shared, spills, room) in kernels.items():
            assert 0 < registers <= (512 if target == "gfx942" else 255)
            # Of gfx942's 102 scalar registers addresses and strides take most: some go to lanes of vector registers, none to memory.
            assert spills <= (64 if target == "gfx942" else 0), f"{name} for {target}"
            assert shared <= room


if __name__ == "__main__":
    main()
