"""Figures of kernels compiled ahead of time. That needs a process in which triton was imported to compile, so a test file is also the program
that makes its figures."""

import json
import os
import subprocess
import sys


def figures_of(file):
    """What `file`, run as a program without Triton's interpreter, prints as JSON."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, file], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


def launches_of(modules, call):
    """Name -> (kernel, arguments by name) of each launch that `call` makes of the kernels named in `modules`, {module: names}, which are
    not run."""
    found = {}

    class Recorded:
        def __init__(self, function):
            self.function = function

        def __getitem__(self, grid):
            names, name = self.function.arg_names, self.function.__name__
            return lambda *args, **options: found.setdefault(name, (self.function, dict(zip(names, args)) | options))

    functions = [(module, name, getattr(module, name)) for module, names in modules.items() for name in names]
    try:
        for module, name, function in functions:
            setattr(module, name, Recorded(function))
        call()
    finally:
        for module, name, function in functions:
            setattr(module, name, function)
    return found


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
    options = {name: arguments[name] for name in ("num_warps", "num_stages") if name in arguments}
    return binary_of(lambda: function, signature, constants, attributes, options, target)


def figures(cases, launches):
    """case -> target -> kernel -> [registers, shared bytes, spills, shared bytes that there are], `launches(case, target)` being what a
    case launches."""
    from graphwright.codegen.triton.targets import TARGETS

    table = {}
    for name, case in cases.items():
        for target in TARGETS.values():
            for kernel, (function, arguments) in launches(case, target).items():
                b = compiled(function, arguments, target.name)
                of_target = table.setdefault(name, {}).setdefault(target.name, {})
                of_target[kernel] = [b.registers, b.shared_bytes, b.spills, target.shared_bytes]
    return table
