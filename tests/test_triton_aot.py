"""Every kernel family compiles ahead of time for GPUs that are not here, and its default tile spills no register.

Compiling needs a process in which triton was imported to compile, so this file is also the program that the test runs.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))


def families():
    """Name -> (function, arguments), at the sizes of networks that people run."""
    import torch
    import torch.nn.functional as F

    def half(*shape):
        return torch.empty(shape, dtype=torch.bfloat16)

    def rotated(x, cos, sin):
        first, second = x.chunk(2, -1)
        return x * cos + torch.cat([-second, first], -1) * sin

    return {
        "residual, layer_norm, modulation": (
            lambda x, h, a, b: ((y := x + h), F.layer_norm(y, (1152,)) * (1 + a[:, None]) + b[:, None]),
            [half(2, 256, 1152), half(2, 256, 1152), half(2, 1152), half(2, 1152)],
        ),
        "residual, rms_norm": (
            lambda x, h, w: ((y := x + h), F.rms_norm(y, (8192,), w, 1e-5)),
            [half(64, 8192), half(64, 8192), half(8192)],
        ),
        "layer_norm of a long row": (lambda x, w, b: F.gelu(F.layer_norm(x, (16384,), w, b)), [half(64, 16384), half(16384), half(16384)]),
        "softmax": (
            lambda x, m: F.softmax((x * 0.125).masked_fill(m, float("-inf")), -1),
            [half(8, 512, 4096), torch.empty(512, 4096, dtype=torch.bool)],
        ),
        "log_softmax of a vocabulary": (lambda x: F.log_softmax(x.float(), -1), [half(32, 50257)]),
        "group_norm, silu": (lambda x, w, b: F.silu(F.group_norm(x, 32, w, b)), [half(2, 320, 64, 64), half(320), half(320)]),
        "group_norm in halves": (
            lambda x, s, w, b: F.silu(torch.ops.gw.norm_apply(x, s, w, b, 32, 1e-5)),
            [half(2, 320, 64, 64), torch.empty(2, 2, 32, 3), half(320), half(320)],
        ),
        "GEGLU": (lambda x: x.chunk(2, -1)[0] * F.gelu(x.chunk(2, -1)[1]), [half(2, 4096, 2560)]),
        "SwiGLU": (lambda x, y: F.silu(x) * y, [half(4096, 11008), half(4096, 11008)]),
        "rotary": (lambda x, c, s: rotated(x.transpose(1, 2), c, s), [half(2, 1024, 32, 128), half(1024, 128), half(1024, 128)]),
        "norm, rotary": (
            lambda x, w, c, s: rotated(F.rms_norm(x, (128,), w, 1e-6), c, s),
            [half(2, 32, 1024, 128), half(128), half(1024, 128), half(1024, 128)],
        ),
        "reductions": (lambda x: ((x * x).sum(-1), x.amax(-1), x.float().var(-1)), [half(4096, 1024)]),
        "linear, gelu": (lambda x, w, b: F.gelu(F.linear(x, w, b)), [half(4096, 1152), half(4608, 1152), half(4608)]),
        "linear, gate, residual": (
            lambda x, w, b, g, r: r + g[:, None] * F.linear(x, w, b),
            [half(2, 256, 1152), half(1152, 1152), half(1152), half(2, 1152), half(2, 256, 1152)],
        ),
        "SwiGLU of two products": (
            lambda x, g, u: F.silu(F.linear(x, g)) * F.linear(x, u),
            [half(2048, 2048), half(8192, 2048), half(8192, 2048)],
        ),
        "rms_norm, linear of one token": (
            lambda x, s, w: F.linear(F.rms_norm(x, (2048,), s, 1e-5), w),
            [half(1, 2048), half(2048), half(8192, 2048)],
        ),
        "scale, linear": (lambda x, s, w: F.relu(F.linear(x * s, w)), [half(2048, 1024), half(1024), half(1024, 1024)]),
        "batched product": (lambda a, b: torch.bmm(a, b) * 0.125, [half(32, 256, 64), half(32, 64, 256)]),
        "float16 product": (lambda a, b: F.relu(a @ b), [half(512, 512).half(), half(512, 512).half()]),
        "float32 product": (lambda a, b: F.relu(a @ b), [half(512, 512).float(), half(512, 512).float()]),
        "int8 product, scale": (
            lambda a, b, s: torch._int_mm(a, b).float() * s,
            [torch.empty(512, 1024, dtype=torch.int8), torch.empty(1024, 512, dtype=torch.int8), torch.empty(512, 1)],
        ),
        "8-bit weights": (
            lambda x, w, s: F.linear(x, w.bfloat16() * s),
            [half(64, 1024), torch.empty(1024, 1024, dtype=torch.int8), half(1024, 1)],
        ),
        "float64": (lambda x, w: F.layer_norm(torch.tanh(x), (1000,), w), [torch.empty(64, 1000).double(), torch.empty(1000).double()]),
    }


def main():
    from triton_kernels import capture, kernel_of

    from graphwright.codegen.triton.aot import compile_for
    from graphwright.codegen.triton.targets import TARGETS

    table = {}
    for name, (function, args) in families().items():
        program = capture(function, args)
        table[name] = {}
        for target in TARGETS.values():
            binary = compile_for(kernel_of(program, target), target.name)
            figures = {"registers": binary.registers, "shared": binary.shared_bytes, "spills": binary.spills, "bytes": len(binary.code)}
            table[name][target.name] = figures | {"room": target.shared_bytes}
    json.dump(table, sys.stdout)


@pytest.fixture(scope="module")
def table():
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, __file__], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


@pytest.mark.parametrize("family", list(families()))
def test_a_family_compiles_for_every_target_without_spills(family, table):
    assert set(table[family]) == {"sm_80", "sm_90", "sm_100", "gfx942"}
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
