"""A trial as files, which people read and tests run again: the program as text, its weights and inputs, the pipeline.

folder/program.txt            the program
folder/values.safetensors     its weights by name, and each input as `input 0`, `input 1`, ...
folder/case.json              {"pipeline": .., "verdict": .., "note": ..}
folder/reproduce.py           runs it
"""

import base64
import json
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load, load_file, save, save_file

from ..ir import Program, parse
from ..ir.errors import ArtifactError
from ..ir.strides import laid_out
from ..passes import Pass, parse_pipeline
from .pipelines import as_arguments, calibrated_on, calibrates
from .verdict import TrialResult, try_passes

_SCRIPT = '''"""Runs this trial again: python reproduce.py"""

from pathlib import Path

from graphwright.testing.cases import load_case

case = load_case(Path(__file__).parent)
print(case.program)
print(case.pipeline)
print(case.run().verdict)
'''


@dataclass(frozen=True)
class Case:
    """A program with inputs and a pipeline; `note` says in a sentence what went wrong."""

    program: Program
    pipeline: str
    inputs: tuple[Sequence[Any], ...]
    note: str = ""

    def passes(self) -> tuple[Pass, ...]:
        """The pipeline's passes; those that calibrate do so on the inputs."""
        examples = [as_arguments(self.program, inputs) for inputs in self.inputs]
        return tuple(calibrated_on(each, examples) for each in parse_pipeline(self.pipeline))

    def run(self) -> TrialResult:
        return try_passes(self.program, self.passes(), self.inputs)


def spelled(passes: Sequence[Pass]) -> str:
    """The pipeline as text that parses, the calibration data left out."""
    return ",".join(_spelled(each) for each in passes)


def _spelled(each: Pass) -> str:
    text = each.spelling
    if not calibrates(each) or next(f for f in fields(each) if f.name == "calibration").metadata.get("spelled", True):
        return text
    return f"{text[:-1]},calibration=[]}}" if text.endswith("}") else f"{text}{{calibration=[]}}"


def quoted(text: str) -> str:
    """The text as a literal, over several lines where nothing in it could end one."""
    return repr(text) if '"""' in text or "\\" in text or not text.isascii() else f'"""\\\n{text.rstrip()}\n"""'


def packed(tensor: torch.Tensor) -> str:
    """The numbers, dtype and shape in printable characters, for `unpacked`; not the strides."""
    return base64.b85encode(save({"": tensor.detach().cpu().clone(memory_format=torch.contiguous_format)})).decode()


def unpacked(text: str) -> torch.Tensor:
    """The tensor of which `packed` made `text`."""
    return load(base64.b85decode(text))[""]


def save_case(folder: Path, case: Case, verdict: str = "") -> None:
    """Writes `case` into `folder`, which is made."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "program.txt").write_text(str(case.program))
    save_file(_tensors(case), folder / "values.safetensors")
    about = {"pipeline": case.pipeline, "verdict": verdict, "note": case.note, "inputs": [_described(inputs) for inputs in case.inputs]}
    (folder / "case.json").write_text(json.dumps(about, indent=1) + "\n")
    (folder / "reproduce.py").write_text(_SCRIPT)


def load_case(folder: Path) -> Case:
    """The case that `save_case` wrote.

    Raises:
        ArtifactError: a file is missing or is none of a case.
    """
    try:
        about = json.loads((folder / "case.json").read_text())
        tensors = load_file(folder / "values.safetensors")
        text = (folder / "program.txt").read_text()
        inputs = tuple(_inputs(tensors, number, leaves) for number, leaves in enumerate(about["inputs"]))
        note, pipeline = about["note"], about["pipeline"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ArtifactError(f"{folder} holds no case of graphwright.testing: {error}") from error
    bare = parse(text)
    weights = {name: laid_out(tensors[f"weight {name}"], weight.stride) for name, weight in bare.weights.items()}
    return Case(parse(text, weights=weights), pipeline, inputs, note)


def _tensors(case: Case) -> dict[str, torch.Tensor]:
    found = {f"weight {name}": weight.tensor for name, weight in case.program.weights.items() if weight.tensor is not None}
    for number, inputs in enumerate(case.inputs):
        found |= {f"input {number} {leaf}": value for leaf, value in enumerate(inputs) if isinstance(value, torch.Tensor)}
    return {name: tensor.detach().clone(memory_format=torch.contiguous_format) for name, tensor in found.items()}


def _described(inputs: Sequence[Any]) -> list[Any]:
    """How each input is put together again: a stored tensor with its strides, an earlier input, or a number."""
    described: list[Any] = []
    for leaf, value in enumerate(inputs):
        earlier = next((n for n in range(leaf) if inputs[n] is value), None)
        if not isinstance(value, torch.Tensor):
            described.append({"value": value})
        elif earlier is not None:
            described.append({"same as": earlier})
        else:
            described.append({"stride": list(value.stride())})
    return described


def _inputs(tensors: dict[str, torch.Tensor], number: int, leaves: Sequence[dict[str, Any]]) -> list[Any]:
    values: list[Any] = []
    for leaf, about in enumerate(leaves):
        if "value" in about:
            values.append(about["value"])
        elif "same as" in about:
            values.append(values[about["same as"]])
        else:
            values.append(laid_out(tensors[f"input {number} {leaf}"], about["stride"]))
    return values
