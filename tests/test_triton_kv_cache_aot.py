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
    """Name -> the arguments by name of each launch that a call of `case` makes."""
    import torch

    from graphwright.codegen.triton.attention import kernels, launch

    dtype, batch, queries, heads, kv_heads, depth, capacity, window, softcap = case

    def empty(*shape):
        return torch.empty(shape, dtype=getattr(torch, dtype), device="meta")

    found = {}

    class Recorded:
        def __init__(self, function):
            self.function = function

        def __getitem__(self, grid):
            names = self.function.arg_names
            return lambda *args, **options: found.setdefault(self.function.__name__, dict(zip(names, args)) | options)

    functions = {name: getattr(kernels, name) for name in ("attend", "join", "append")}
    try:
        for name, function in functions.items():
            setattr(kernels, name, Recorded(function))
        launch.target_of = lambda device: target
        caches = [empty(batch, kv_heads, capacity, depth) for _ in range(2)]
        at = [torch.empty(batch, dtype=torch.int64, device="meta") for _ in range(2)]
        launch.cached_attention(
            empty(batch, queries, heads, depth).transpose(1, 2), *caches, *at, scale=0.1, window=window, softcap=softcap, ring=window > 0
        )
        new = [empty(batch, queries, kv_heads, depth).transpose(1, 2) for _ in range(2)]
        launch.append_in_place(*caches, *new, *at, ring=window > 0)
    finally:
        for name, function in functions.items():
            setattr(kernels, name, function)
    return {name: (functions[name], arguments) for name, arguments in found.items()}


def compiled(function, arguments, target):
    """As triton's launcher specialises it: a size of 1 is a constant, multiples of 16 are known."""
    import torch

    from graphwright.codegen.triton.aot import _POINTERS, binary_of

    signature, constants, attributes = {}, {}, {}
    fixed = {parameter.name for parameter in function.params if parameter.is_constexpr}
    for position, name in enumerate(function.arg_names):
        value = arguments[name]
        if name in fixed or (isinstance(value, int) and value == 1):
            signature[name], constants[name] = "constexpr", value
        elif isinstance(value, float):
            signature[name] = "fp32"
        else:
            is_tensor = isinstance(value, torch.Tensor)
            signature[name] = _POINTERS[value.dtype] if is_tensor else "i32" if value < 2**31 else "i64"
            if is_tensor or value % 16 == 0:
                attributes[(position,)] = [["tt.divisibility", 16]]
    return binary_of(lambda: function, signature, constants, attributes, {"num_warps": arguments["num_warps"]}, target)


def main():
    from graphwright.codegen.triton.targets import TARGETS

    table = {}
    for name, case in CASES.items():
        for target in TARGETS.values():
            for kernel, (function, arguments) in launches(case, target).items():
                b = compiled(function, arguments, target.name)
                table.setdefault(name, {}).setdefault(target.name, {})[kernel] = [
                    b.registers,
                    b.shared_bytes,
                    b.spills,
                    target.shared_bytes,
                ]
    json.dump(table, sys.stdout)


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
