"""Every kernel family compiles ahead of time for GPUs that are not here, and its default tile spills no register.

Compiling needs a process in which triton was imported to compile, so this file is also the program that the test runs.
"""

import json
import sys
from pathlib import Path

import pytest

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent.parent / "bench")]


def families():
    """Name -> (function, arguments), at the sizes of networks that people run: those that `bench/gpu.py` times."""
    import gpu
    import torch

    return gpu.families(lambda *shape: torch.empty(shape, dtype=torch.bfloat16))


def main():
    import torch
    from triton_kernels import capture, kernel_of

    from graphwright.codegen.triton.aot import compile_for
    from graphwright.codegen.triton.targets import TARGETS

    table = {}
    for name, (function, args) in families().items():
        program = capture(function, args)
        table[name] = {}
        for target in TARGETS.values():
            if not target.copies_blocks and any(x.dtype == torch.float8_e4m3fn for x in args):  # these GPUs multiply no such numbers
                continue
            binary = compile_for(kernel_of(program, target), target.name)
            figures = {"registers": binary.registers, "shared": binary.shared_bytes, "spills": binary.spills, "bytes": len(binary.code)}
            table[name][target.name] = figures | {"room": target.shared_bytes}
    json.dump(table, sys.stdout)


@pytest.fixture(scope="module")
def table():
    from graphwright.tests.ahead_of_time import figures_of

    return figures_of(__file__)


@pytest.mark.parametrize("family", list(families()))
def test_a_family_compiles_for_every_target_without_spills(family, table):
    assert set(table[family]) == {"sm_90", "sm_100", *(() if "float8" in family else ("sm_80", "gfx942"))}
    for target, usage in table[family].items():
        assert usage["bytes"] > 0 and 0 < usage["registers"] <= (512 if target == "gfx942" else 255)
        assert usage["spills"] == 0, target
        assert usage["shared"] <= usage["room"]


def test_a_process_that_interprets_compiles_nothing():
    import torch
    from triton_kernels import capture, kernel_of

    from graphwright.codegen.triton.aot import compile_for
    from graphwright.ir.errors import TargetError

    kernel = kernel_of(capture(lambda x: x * 2 + 1, [torch.randn(3)]))
    with pytest.raises(TargetError, match="without TRITON_INTERPRET"):
        compile_for(kernel, "sm_90")
    with pytest.raises(TargetError, match="unknown target 'sm_1'"):
        compile_for(kernel, "sm_1")


if __name__ == "__main__":
    main()
