"""Both halves of a low-rank linear layer compile ahead of time for GPUs that are not here, and their default tiles spill no register.

Compiling needs a process in which triton was imported to compile, so this file is also the program that the test runs.
"""

import json
import sys
from pathlib import Path

import pytest

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent.parent / "bench")]


def layers():
    """Those that `bench/gpu.py` times."""
    import gpu_low_rank

    return gpu_low_rank.LAYERS


def main():
    from gpu_low_rank import empty_inputs, kernels_of

    from graphwright.codegen.triton.aot import compile_for
    from graphwright.codegen.triton.targets import TARGETS

    table = {}
    for name, layer in layers().items():
        table[name], inputs = {}, empty_inputs(layer)
        for target in TARGETS.values():
            binaries = [compile_for(kernel, target.name) for kernel in kernels_of(layer, inputs, target)]
            table[name][target.name] = [[b.registers, b.shared_bytes, b.spills, len(b.code), target.shared_bytes] for b in binaries]
    json.dump(table, sys.stdout)


@pytest.fixture(scope="module")
def table():
    from graphwright.tests.ahead_of_time import figures_of

    return figures_of(__file__)


@pytest.mark.parametrize("layer", list(layers()))
def test_both_halves_compile_for_every_target_without_spills(layer, table):
    assert set(table[layer]) == {"sm_80", "sm_90", "sm_100", "gfx942"}
    for target, kernels in table[layer].items():
        assert len(kernels) == (1 if "alone" in layer else 2)
        for registers, shared, spills, size, room in kernels:
            assert size > 0 and 0 < registers <= (512 if target == "gfx942" else 255)
            assert spills == 0, target
            assert shared <= room


if __name__ == "__main__":
    main()
