"""The `.gw` file: a program and its weights, nothing that runs when it is read.

    manifest.json        format, how the program is called, what was promised; size and SHA-256 of every other member
    program.txt          the program as text
    weights.safetensors  its weights, tied ones once
    kernels/DIGEST.py    sources of its Triton kernels, where it had some: to be read, for what runs is emitted anew

The archive's form is in `zip_subset`. Everything is checked before anything is used, and two saves of a model are equal bytes.
"""

import hashlib
import json
import math
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from ..ir import Program, Weight
from ..ir.calling import REQUIRED, Parameter
from ..ir.errors import ArtifactError, GraphwrightError, TargetError
from ..ir.plain_file import open_plain
from ..passes import Contract
from . import zip_subset
from .atomic import atomic_write
from .cache import Cache
from .strict_json import strict_json
from .tensor_file import ALIGNMENT, read_tensors, tensor_member
from .type_cache import read_program
from .zip_subset import Member

FORMAT = 1
_MANIFEST, _PROGRAM, _WEIGHTS = "manifest.json", "program.txt", "weights.safetensors"
_KERNEL = re.compile(r"kernels/[0-9a-f]{16}\.py")
_MAX_MANIFEST = 16 * 2**20


@dataclass(frozen=True)
class Saved:
    """What an artifact holds: the program, the parameters of the call, the pipeline's contract, the passes' reports as text, whether it
    was captured in train mode, why the other mode is another model ("" where it is not, None where nobody knows), and the sources of its
    kernels."""

    program: Program
    parameters: tuple[Parameter, ...] = ()
    contract: Contract = Contract.EXACT
    reports: tuple[str, ...] = ()
    training: bool = False
    other_mode: str | None = None
    kernels: tuple[str, ...] = ()


def save(saved: Saved, path: str | Path) -> None:
    """Writes `saved` to `path`, whole or not at all.

    Raises:
        ArtifactError: a weight has no values or a dtype that is not stored, or the file cannot be written; a file that was there
            before is as it was.
    """
    path = _path(path)
    stored, tied = _untied(saved.program.weights)
    program = Member.of(_PROGRAM, str(_hashed_afresh(saved.program)).encode())
    weights = tensor_member(_WEIGHTS, stored)
    kernels = sorted((_kernel_member(source) for source in dict.fromkeys(saved.kernels)), key=lambda member: member.name)
    text = _manifest(saved, tied, [program, weights, *kernels])
    # Spaces after the manifest put the weights at a multiple of 64 bytes, so that they are used where they were read.
    misplaced = zip_subset.begins([*kernels, Member.of(_MANIFEST, text), program, weights])[_WEIGHTS]
    manifest = Member.of(_MANIFEST, text + b" " * (-misplaced % ALIGNMENT))
    try:
        with atomic_write(path) as file:
            zip_subset.write(file, [*kernels, manifest, program, weights])
    except OSError as error:
        raise ArtifactError(f"{path} cannot be written ({error.strerror or error}): what was there before is as it was") from error


def _kernel_member(source: str) -> Member:
    """Named by its content: what a file was called by names in a program leads nowhere."""
    content = source.encode()
    return Member.of(f"kernels/{hashlib.sha256(content).hexdigest()[:16]}.py", content)


def _hashed_afresh(program: Program) -> Program:
    """`program` without the digests that it remembers: weights are shared with the module, which may have changed them since."""
    result = program.copy()
    result.weights = {name: replace(weight, known_digest=None, _memo={}) for name, weight in program.weights.items()}
    return result


def _path(path: Any) -> Path:
    if not isinstance(path, str | os.PathLike):
        raise ArtifactError(f"an artifact is named by a path, such as 'model.gw', not by a {type(path).__name__}")
    return Path(path)


def _untied(weights: Mapping[str, Weight]) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """The tensors to store by name, and for each that is the same memory as one of these, whose."""
    stored: dict[str, torch.Tensor] = {}
    tied: dict[str, str] = {}
    first: dict[Any, str] = {}
    for name, weight in sorted(weights.items()):
        tensor = weight.tensor
        if tensor is None:
            raise ArtifactError(f"weight {name} has no values: this program was read from text, give parse() a weight table")
        key = (tensor.data_ptr(), tensor.dtype, tuple(tensor.shape), tensor.stride()) if tensor.numel() else name
        if key in first:
            tied[name] = first[key]
        else:
            first[key] = name
            stored[name] = tensor
    return stored, tied


def _manifest(saved: Saved, tied: Mapping[str, str], members: list[Member]) -> bytes:
    data = {
        "format": FORMAT,
        "members": {member.name: {"size": member.size, "sha256": member.sha256()} for member in members},
        "parameters": [_parameter_data(parameter) for parameter in saved.parameters],
        "contract": str(saved.contract),
        "reports": list(saved.reports),
        "training": saved.training,
        "other_mode": saved.other_mode,
        "tied": dict(tied),
    }
    return json.dumps(data, sort_keys=True, indent=1).encode()


def _parameter_data(parameter: Parameter) -> dict[str, Any]:
    """Defaults that JSON cannot say are left out: a loaded model then wants that argument given as it was captured."""
    value = parameter.default
    plain = value is None or type(value) in (bool, int, str) or type(value) is float and math.isfinite(value)
    return {"name": parameter.name, "keyword_only": parameter.keyword_only} | ({"default": value} if plain else {})


def load(path: str | Path, *, sha256: str | None = None, cache: Cache | None = None) -> Saved:
    """What `save` wrote. `sha256` is the digest that the file as a whole must have, known from elsewhere. The types of the program may
    be known from `cache`.

    Raises:
        ArtifactError: the file is missing, truncated, edited, of another version, or not ours.
        TargetError: its weights are for a device that is not here.
    """
    path = _path(path)
    if sha256 is not None and not isinstance(sha256, str):
        raise ArtifactError(f"sha256 is the digest as text of 64 hexadecimal digits, not a {type(sha256).__name__}")
    with _blaming(path):
        content = _content(path)
        if sha256 is not None and _sha256(content) != sha256.lower():
            raise ArtifactError(f"it does not have the SHA-256 {sha256}")
        members = zip_subset.read(content)
        manifest = _checked_manifest(content, members)
        text = bytes(content[slice(*members[_PROGRAM])].numpy()).decode("utf-8")
        weights = _tied(read_tensors(content[slice(*members[_WEIGHTS])]), manifest["tied"])
        program = read_program(text, weights, cache)
        if set(weights) != set(program.weights):
            raise ArtifactError("its weights are not those that its program names")
        program.weights.update({name: _placed(weight) for name, weight in program.weights.items()})
        kernels = tuple(bytes(content[slice(*place)].numpy()).decode("utf-8") for name, place in members.items() if _KERNEL.fullmatch(name))
        known = {name: manifest[name] for name in ("parameters", "contract", "reports", "training", "other_mode")}
        return Saved(program, kernels=kernels, **known)


@contextmanager
def _blaming(path: Path) -> Iterator[None]:
    """Every failure names the file. What it holds is hostile until proven otherwise, so no exception of another kind gets out."""
    try:
        yield
    except TargetError:
        raise
    except GraphwrightError as error:
        raise ArtifactError(f"{path} cannot be loaded: {error}") from error
    except OSError as error:
        raise ArtifactError(f"{path} cannot be read: {error.strerror or error}") from error
    except Exception as error:
        raise ArtifactError(
            f"{path} cannot be loaded: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        ) from error


def _content(path: Path) -> torch.Tensor:
    """The whole file, read once: what is checked is what is used."""
    with open_plain(path) as file:
        if file.read(len(zip_subset.MAGIC)) != zip_subset.MAGIC:  # before it is given memory
            raise ArtifactError("it is no .gw file, or was cut off")
        file.seek(0)
        content = torch.empty(os.fstat(file.fileno()).st_size, dtype=torch.uint8)
        count = file.readinto(content.numpy().data) if len(content) else 0
    if count != len(content):
        raise ArtifactError("it was cut off while it was read")
    return content


def _sha256(content: torch.Tensor) -> str:
    return hashlib.sha256(content.numpy().data).hexdigest()


def _checked_manifest(content: torch.Tensor, members: Mapping[str, tuple[int, int]]) -> dict[str, Any]:
    """The manifest, once every other member has the size and the SHA-256 that it gives."""
    if {name for name in members if not _KERNEL.fullmatch(name)} != {_MANIFEST, _PROGRAM, _WEIGHTS}:
        raise ArtifactError(f"it holds {', '.join(members)}, not {_MANIFEST}, {_PROGRAM}, {_WEIGHTS}")
    begin, end = members[_MANIFEST]
    if end - begin > _MAX_MANIFEST:
        raise ArtifactError(f"its manifest is larger than {_MAX_MANIFEST} bytes")
    manifest = strict_json(bytes(content[begin:end].numpy()))
    version = manifest.get("format") if isinstance(manifest, dict) else None
    if type(version) is not int or version != FORMAT:
        raise ArtifactError(f"it has format {version!r}, and this graphwright reads format {FORMAT}")
    manifest = {"training": False, "other_mode": None} | manifest  # the first ones did not say
    if set(manifest) != {"format", "members", "parameters", "contract", "reports", "training", "other_mode", "tied"}:
        raise ArtifactError("its manifest has other keys than format 1 has")
    if not isinstance(manifest["training"], bool):
        raise ArtifactError("its manifest says neither that the model was captured in train mode nor that it was not")
    if not isinstance(manifest["other_mode"], str | None):
        raise ArtifactError("its manifest gives what the other mode changes as something else than text")
    expected = {
        name: {"size": end - begin, "sha256": _sha256(content[begin:end])} for name, (begin, end) in members.items() if name != _MANIFEST
    }
    if manifest["members"] != expected:
        raise ArtifactError("its members do not have the sizes and digests that its manifest gives")
    return manifest | {
        "parameters": tuple(map(_parameter, _list_of(manifest["parameters"], dict))),
        "contract": _contract(manifest["contract"]),
        "reports": tuple(_list_of(manifest["reports"], str)),
    }


def _list_of(value: Any, kind: type) -> list[Any]:
    if not isinstance(value, list) or not all(isinstance(item, kind) for item in value):
        raise ArtifactError(f"its manifest should have a list of {kind.__name__} where it has something else")
    return value


def _parameter(data: dict[str, Any]) -> Parameter:
    known = {"name", "keyword_only"} <= set(data) <= {"name", "keyword_only", "default"}
    if not known or not isinstance(data["name"], str) or not isinstance(data["keyword_only"], bool):
        raise ArtifactError("its manifest describes a parameter that is none")
    if isinstance(data.get("default"), list | dict):
        raise ArtifactError(f"its manifest gives parameter {data['name']!r} a default that is no plain value")
    return Parameter(data["name"], data.get("default", REQUIRED), data["keyword_only"])


def _contract(name: Any) -> Contract:
    if name not in [str(contract) for contract in Contract]:
        raise ArtifactError("its manifest promises an unknown contract")
    return Contract(name)


def _tied(stored: dict[str, torch.Tensor], tied: Any) -> dict[str, torch.Tensor]:
    if not isinstance(tied, dict) or set(tied) & set(stored) or not all(isinstance(v, str) and v in stored for v in tied.values()):
        raise ArtifactError("its manifest ties weights to none that are stored")
    return stored | {name: stored[other] for name, other in tied.items()}


def _placed(weight: Weight) -> Weight:
    assert weight.tensor is not None, "parse fills every weight that the text names"
    if weight.tensor.device == weight.device:
        return weight
    if weight.device.type == "cuda" and not torch.cuda.is_available():
        raise TargetError(f"weight {weight.name} is for {weight.device}, and there is no such device here: compile the model for this one")
    return replace(weight, tensor=weight.tensor.to(weight.device))
