"""Kernels compiled ahead of time for GPUs that need not be here, and what their binaries say of registers, shared memory and spills.

NVIDIA's figures are those of `ptxas -v`, AMD's those that the compiler writes into its assembly. Neither tells occupancy or time.
"""

import re
import subprocess
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ...ir.errors import TargetError
from .emit import Kernel
from .launch import load
from .targets import named

_POINTERS = {
    torch.float64: "*fp64",
    torch.float32: "*fp32",
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.int64: "*i64",
    torch.int32: "*i32",
    torch.int16: "*i16",
    torch.int8: "*i8",
    torch.uint8: "*u8",
    torch.bool: "*i1",
    torch.float8_e4m3fn: "*fp8e4nv",
    torch.float8_e5m2: "*fp8e5",
}


@dataclass(frozen=True)
class Binary:
    """One kernel for one target. `spills` counts bytes on NVIDIA (stores and loads), registers on AMD; None is not obtainable."""

    target: str
    code: bytes
    registers: int | None
    shared_bytes: int
    spills: int | None


def compile_for(kernel: Kernel, target: str) -> Binary:
    """The binary of `kernel` for one of `targets.TARGETS`, specialised as a launch at the hints of its sizes would be.

    Raises:
        TargetError: the target is unknown, or triton interprets in this process.
    """
    named(target)
    signature, constants, attributes = _specialised(kernel)
    return binary_of(lambda: getattr(load(kernel), kernel.name), signature, constants, attributes, kernel.tile.options, target)


def binary_of(
    function: Callable[[], Any],
    signature: dict[str, str],
    constants: dict[str, Any],
    attributes: dict[tuple[int, ...], Any],
    options: dict[str, int],
    target: str,
) -> Binary:
    """The binary of the kernel that `function` gives, for parameters of these types, constants and alignments, as triton names them.

    Raises:
        TargetError: triton interprets in this process.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    if not isinstance(triton.language.sum, triton.runtime.JITFunction):
        raise TargetError("triton interprets in this process and compiles nothing: start Python without TRITON_INTERPRET")
    is_amd = target.startswith("gfx")
    gpu = GPUTarget("hip", target, 64) if is_amd else GPUTarget("cuda", int(target.removeprefix("sm_")), 32)
    source = ASTSource(fn=function(), signature=signature, constexprs=constants, attrs=attributes)
    compiled: Any = triton.compile(source, target=gpu, options=options)
    registers, spills = _amd_usage(compiled.asm["amdgcn"]) if is_amd else _nvidia_usage(compiled.asm["ptx"], target)
    return Binary(target, compiled.asm["hsaco" if is_amd else "cubin"], registers, compiled.metadata.shared, spills)


def _specialised(kernel: Kernel) -> tuple[dict[str, str], dict[str, Any], dict[tuple[int, ...], Any]]:
    """Types, constants and alignments, as triton's launcher chooses them: a size of 1 is a constant, multiples of 16 are known."""
    signature: dict[str, str] = {}
    constants: dict[str, Any] = {}
    attributes: dict[tuple[int, ...], Any] = {}
    for position, parameter in enumerate(kernel.parameters):
        if parameter.block:
            shape = ", ".join(map(str, parameter.block))
            signature[parameter.name] = f"tensordesc<{_POINTERS[parameter.dtype].removeprefix('*')}[{shape}]>"  # type: ignore[index]
        elif parameter.dtype is not None:
            signature[parameter.name] = _POINTERS[parameter.dtype]
            attributes[(position,)] = [["tt.divisibility", 16]]
        elif parameter.is_constant or parameter.size == 1:
            signature[parameter.name] = "constexpr"
            constants[parameter.name] = parameter.size
        else:
            signature[parameter.name] = "i32" if -(2**31) <= parameter.size < 2**31 else "i64"
            if parameter.size % 16 == 0:
                attributes[(position,)] = [["tt.divisibility", 16]]
    return signature, constants, attributes


def _nvidia_usage(ptx: str, target: str) -> tuple[int | None, int | None]:
    """(registers, bytes spilled), by the assembler that triton brings."""
    from triton import knobs

    tool = knobs.nvidia.ptxas_blackwell if int(target.removeprefix("sm_")) >= 100 else knobs.nvidia.ptxas
    found = re.search(r"\.target\s+(\w+)", ptx)
    assert found is not None, "PTX names its target"
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "kernel.ptx")
        source.write_text(ptx)
        command = [tool.path, "-v", f"--gpu-name={found[1]}", str(source), "-o", str(source.with_suffix(".cubin"))]
        report = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    registers = re.search(r"Used (\d+) registers", report)
    spills = re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", report)
    return (int(registers[1]) if registers else None), (int(spills[1]) + int(spills[2]) if spills else None)


def _amd_usage(assembly: str) -> tuple[int | None, int | None]:
    """(vector registers, vector and scalar registers spilled)."""
    registers = re.search(r"\.vgpr_count:\s+(\d+)", assembly)
    spills = re.findall(r"\.[sv]gpr_spill_count:\s+(\d+)", assembly)
    return (int(registers[1]) if registers else None), (sum(map(int, spills)) if spills else None)
