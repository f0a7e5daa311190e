"""A failing trial as one Python file, which was run before it is offered: it holds the program as text, the numbers of weights and inputs,
and the passes, and exits with 1 as long as the trial fails."""

import base64
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save

from ..ir import Program
from ..ir.errors import InputError
from ..passes import Pass, Verdict
from ..runtime.atomic import atomic_write
from .cases import quoted
from .check_pass import construction

_MOST_EMBEDDED = 2**20  # bytes of numbers in the file itself; more lie beside it
_SECONDS = 600

_SCRIPT = '''"""{title}

python {name} runs the trial again and exits with 1 as long as it fails.
"""

import sys
{imports}
from safetensors.torch import load

from graphwright import parse
from graphwright.ir.strides import laid_out
from graphwright.testing import try_passes

PROGRAM = {program}
VALUES = load({values})
WEIGHTS = {{
{weights}}}
INPUTS = [
{inputs}]
PASSES = [{passes}]

result = try_passes(parse(PROGRAM, weights=WEIGHTS), PASSES, [INPUTS])
print(result.verdict)
sys.exit(int(result.verdict.fails))
'''


def write_reproducer(path: Path, program: Program, passes: Sequence[Pass], inputs: Sequence[Any], verdict: Verdict) -> None:
    """Writes `path`, a .py, after a process of its own ran it and saw the same kind of verdict. Inputs are flat, a value for each leaf.

    Passes that calibrate do so on `inputs`. Numbers of more than 1 MiB lie beside the file, as .safetensors.

    Raises:
        InputError: the file does not reproduce the failure, as where a pass depends on what is not in it; nothing is left.
        OSError: it cannot be written.
    """
    values = save(_tensors(program, inputs))
    beside = path.with_suffix(".safetensors")
    is_large = len(values) > _MOST_EMBEDDED
    if is_large:
        with atomic_write(beside) as file:
            file.write(values)
    text = _text(path.name, program, passes, inputs, verdict, None if is_large else values, beside.name)
    with atomic_write(path) as file:
        file.write(text.encode())
    said = _run(path)
    if said.partition(":")[0].strip() != verdict.kind:
        path.unlink()
        if is_large:
            beside.unlink()
        raise InputError(f"a file of the trial alone does not reproduce it: it says {said or 'nothing'!r}, and the trial {verdict.kind}")


def _run(path: Path) -> str:
    """What the file prints last."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(each or os.getcwd() for each in sys.path)}
    command = [sys.executable, path.name]
    done = subprocess.run(command, capture_output=True, text=True, cwd=path.parent or ".", env=environment, timeout=_SECONDS)
    lines = (done.stdout.strip() or done.stderr.strip()).splitlines()
    return next((line for line in lines if line.partition(":")[0] in ("wrong", "unstable", "crashed")), lines[-1] if lines else "")


def _tensors(program: Program, inputs: Sequence[Any]) -> dict[str, torch.Tensor]:
    found = {f"weight {name}": weight.tensor for name, weight in program.weights.items() if weight.tensor is not None}
    found |= {f"input {place}": value for place, value in enumerate(inputs) if isinstance(value, torch.Tensor)}
    return {name: tensor.detach().cpu().clone(memory_format=torch.contiguous_format) for name, tensor in found.items()}


def _text(
    name: str, program: Program, passes: Sequence[Pass], inputs: Sequence[Any], verdict: Verdict, values: bytes | None, beside: str
) -> str:
    modules = sorted({(type(each).__module__, type(each).__name__) for each in passes})
    imports = ["import base64" if values is not None else "from pathlib import Path"]
    weights = [f"    {key!r}: laid_out(VALUES[{f'weight {key}'!r}], {list(weight.stride)}),\n" for key, weight in program.weights.items()]
    stored = f"Path(__file__).with_name({beside!r}).read_bytes()"
    if values is not None:
        stored = f"base64.b85decode({base64.b85encode(values).decode()!r})"
    constructed = ", ".join(map(construction, passes))
    return _SCRIPT.format(
        title=_one_line(str(verdict)),
        name=name,
        imports="\n".join([*imports, *(f"from {module} import {cls}" for module, cls in modules)]),
        program=quoted(str(program)),
        values=stored,
        weights="".join(weights),
        inputs="".join(f"    {_input(inputs, place)},\n" for place in range(len(inputs))),
        passes=constructed.replace("calibration=[]", "calibration=[(tuple(INPUTS), {})]"),
    )


def _input(inputs: Sequence[Any], place: int) -> str:
    value = inputs[place]
    return f"laid_out(VALUES['input {place}'], {list(value.stride())})" if isinstance(value, torch.Tensor) else repr(value)


def _one_line(text: str) -> str:
    """A sentence that cannot end the comment it stands in."""
    plain = "".join(each if " " <= each <= "~" and each not in '"\\' else " " for each in text)
    return " ".join(plain.split())[:300]
