"""The kernels of mixtures of experts compile ahead of time for GPUs that are not here, and spill no register to memory.

Compiling needs a process in which triton was imported to compile, so this file is also the program that the test runs.
"""

import json
import sys

import pytest

CASES = {  # operation, dtype, sequences, positions of each, experts, experts a token in the mean, width, width of an expert
    "step": ("token_choice_moe", "bfloat16", 1, 1, 128, 8, 2048, 768),
    "step of 64 rows": ("token_choice_moe", "float16", 64, 1, 128, 8, 2048, 768),
    "prompt of 512": ("token_choice_moe", "bfloat16", 1, 512, 64, 8, 2048, 1024),
    "prompt of 4096": ("token_choice_moe", "bfloat16", 1, 4096, 8, 2, 4096, 14336),
    "prompt of 512, float32": ("token_choice_moe", "float32", 1, 512, 64, 8, 2048, 1024),
    "odd sizes": ("token_choice_moe", "bfloat16", 1, 333, 7, 2, 123, 63),
    "choosing experts": ("expert_mlp", "bfloat16", 4, 1024, 64, 8, 2048, 1024),
    "choosing experts, float32": ("expert_mlp", "float32", 1, 256, 64, 8, 2048, 1024),
    "sizes of one, which are constants": ("token_choice_moe", "float16", 1, 1, 1, 1, 1, 1),
    "an expert that chooses one": ("expert_mlp", "bfloat16", 1, 1, 1, 1, 1, 1),
    "groups": ("grouped_mm", "bfloat16", 8, 512, 64, 1, 2048, 2048),
}
EXPECTED = {
    "token_choice_moe": {"sort", "raise_rows", "multiply", "join_choices"},
    "expert_mlp": {"mark", "raise_rows", "multiply", "join_takers"},
    "grouped_mm": {"multiply"},
}


def launches(case, target):
    """Name -> the kernel and the arguments by name of each launch that a call of `case` makes."""
    import torch

    from graphwright.codegen.triton.experts import kernels, launch
    from graphwright.tests.ahead_of_time import launches_of

    name, dtype, batch, length, experts, k, width, inner = case

    element = getattr(torch, dtype)

    def empty(*shape, dtype=element):
        return torch.empty(shape, dtype=dtype, device="meta")

    def call():
        tokens, weights = batch * length, (empty(experts, 2 * inner, width), empty(experts, width, inner))
        if name == "grouped_mm":
            return launch.grouped_mm(empty(tokens, width), weights[1], empty(experts, dtype=torch.int32))
        if name == "expert_mlp":
            slots = (batch, experts, length * k // experts)
            routed = (empty(*slots, dtype=torch.int64), empty(*slots, dtype=torch.float32))
            return launch.expert_mlp(empty(batch, length, width), *routed, *weights, activation="silu")
        routed = (empty(tokens, k, dtype=torch.int64), empty(tokens, k, dtype=torch.float32))
        return launch.token_choice_moe(empty(tokens, width), *routed, *weights, activation="silu", combine_dtype=torch.float32)

    launch.target_of = lambda device: target
    return launches_of({kernels: ("sort", "raise_rows", "multiply", "join_choices", "mark", "join_takers")}, call)


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
        assert EXPECTED[CASES[case][0]] == set(kernels), target
        for name, (registers, shared, spills, room) in kernels.items():
            assert 0 < registers <= (512 if target == "gfx942" else 255)
            assert spills == 0, f"{name} for {target}"
            assert shared <= room


if __name__ == "__main__":
    main()
