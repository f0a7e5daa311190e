"""ONNX models as files: a program's functions, one model each, with large weights in one file beside them, all checked before any appears.

A data file is named after what is in it, so that models and data that belong together are replaced together: until a model is, the one
before it finds its own data.
"""

import hashlib
import os
import re
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..ir import Program
from ..ir.errors import ArtifactError, InputError, TargetError
from ..passes.verdict import Verdict, worst_of
from .atomic import atomic_write, check_writable
from .onnx_check import check_form, check_values

LARGE = 1_500_000_000  # bytes of weights from which on they lie beside the model: a protobuf holds 2 GiB at most
_ALIGNMENT = 4096  # so that onnxruntime maps them instead of reading them
_SMALL = 1024  # bytes of a tensor that stays in the model
_OPSETS = range(21, 25)  # 21 is the first with weights of 4 bits; onnxruntime 1.32 runs up to 24


@dataclass(frozen=True)
class Exported:
    """The files that were written, models first, and how their results compare with the program's; None where onnxruntime cannot run
    them."""

    files: tuple[Path, ...]
    verdict: Verdict | None

    def __str__(self) -> str:
        verdict = "not run: its operators are custom" if self.verdict is None else f"checked in onnxruntime: {self.verdict}"
        return f"wrote {', '.join(map(str, self.files))} ({verdict})"


def export(
    program: Program,
    path: str | Path,
    *,
    dialect: str,
    regions: str,
    opset: int,
    functions: Sequence[str] | None,
    external_data: bool | None,
) -> Exported:
    """As `CompiledModel.export_onnx`."""
    target = _target(path)
    names = _functions(program, functions)
    _check_options(dialect, regions, opset)
    try:
        import onnx_ir
        import onnxscript  # noqa: F401 - torch's exporter needs it
    except ImportError as error:
        raise TargetError(f"ONNX models are made with the package {error.name}: pip install 'graphwright[onnx]'") from error
    from ..ir.onnx.export import to_onnx

    models = {_path_of(target, name): to_onnx(program, name, dialect=dialect, regions_as=regions, opset=opset) for name in names}
    total = sum(tensor.nbytes for tensor in {_memory(t): t for model in models.values() for t in _tensors(model)}.values())
    outside = len(models) > 1 or total > LARGE if external_data is None else external_data
    if not outside and total > LARGE:
        raise InputError(f"a protobuf holds 2 GiB at most, and the weights are {total:,} bytes: leave external_data=False out")
    try:
        with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}.") as folder:
            staging = Path(folder)
            data = _write_data(list(models.values()), staging, target.name) if outside else None
            for place, model in models.items():
                (staging / place.name).write_bytes(onnx_ir.to_proto(model).SerializeToString(deterministic=True))
            verdict = _checked([staging / place.name for place in models], program, names, dialect)
            _put_in_place(staging, list(models), data)
    except OSError as error:
        raise ArtifactError(f"{target} cannot be written ({error.strerror or error}): what was there before is as it was") from error
    return Exported((*models, *([target.parent / data] if data else [])), verdict)


def _target(path: str | Path) -> Path:
    target = Path(os.path.realpath(path))
    if target.suffix != ".onnx":
        raise InputError(f"{path}: ONNX models are called something.onnx")
    if not target.parent.is_dir():
        raise InputError(f"{path}: the folder {target.parent} does not exist")
    try:
        check_writable(target)
    except OSError as error:
        raise ArtifactError(f"{path} cannot be written: {error.strerror or error}") from error
    return target


def _functions(program: Program, functions: Sequence[str] | None) -> list[str]:
    names = list(program.functions) if functions is None else list(functions)
    unknown = [name for name in names if name not in program.functions]
    if unknown or not names:
        raise InputError(f"the program has no function {unknown[0] if unknown else 'of none'}: it has {', '.join(program.functions)}")
    return names


def _check_options(dialect: str, regions: str, opset: int) -> None:
    from ..ir.onnx.export.model import DIALECTS, REGIONS

    for name, value, allowed in (("dialect", dialect, DIALECTS), ("regions", regions, REGIONS)):
        if value not in allowed:
            raise InputError(f"{name} is one of {', '.join(allowed)}, not {value!r}")
    if opset not in _OPSETS:
        raise InputError(f"opset is one of {', '.join(map(str, _OPSETS))}, not {opset!r}")


def _path_of(target: Path, function: str) -> Path:
    return target if function == "main" else target.with_name(f"{target.stem}.{re.sub('[^A-Za-z0-9_]', '_', function)}.onnx")


def _checked(paths: list[Path], program: Program, names: list[str], dialect: str) -> Verdict | None:
    for path in paths:
        check_form(path)
    if dialect == "custom":
        return None
    return worst_of([check_values(path, program, name) for path, name in zip(paths, names, strict=True)])


# --- weights beside the model ------------------------------------------------------------------------------------------------------


def _tensors(model: Any) -> list[Any]:
    return [value.const_value for value in model.graph.initializers.values()]


def _memory(tensor: Any) -> tuple[int, int]:
    """Where a tensor's bytes lie: functions share the weights of a program."""
    raw = tensor.raw
    return (raw.data_ptr() if hasattr(raw, "data_ptr") else raw.__array_interface__["data"][0]), tensor.nbytes


def _write_data(models: list[Any], folder: Path, name: str) -> str:
    """Writes the weights of all models, each once, and has the models refer to them. Returns the file's name."""
    import onnx_ir as ir

    digest, offset = hashlib.sha256(), 0
    placed: dict[int, tuple[int, int]] = {}
    temporary = folder / "data"
    with open(temporary, "xb") as file:
        for tensor in (tensor for model in models for tensor in _tensors(model)):
            if _memory(tensor) in placed or tensor.nbytes < _SMALL:
                continue
            padding = -offset % _ALIGNMENT
            content = tensor.tobytes()
            for part in (b"\0" * padding, content):
                digest.update(part)
                file.write(part)
            placed[_memory(tensor)] = (offset + padding, len(content))
            offset += padding + len(content)
        file.flush()
        os.fsync(file.fileno())
    final = f"{_data_stem(name)}.{digest.hexdigest()[:16]}.data"
    temporary.rename(folder / final)
    for model in models:
        for value in model.graph.initializers.values():
            tensor = value.const_value
            if _memory(tensor) in placed:
                begin, length = placed[_memory(tensor)]
                value.const_value = ir.ExternalTensor(
                    final, begin, length, tensor.dtype, shape=tensor.shape, name=value.name, base_dir=folder
                )
    return final


def _put_in_place(staging: Path, models: list[Path], data: str | None) -> None:
    folder = models[0].parent
    is_new = data is not None and not (folder / data).exists()
    try:
        if is_new and data is not None:
            os.replace(staging / data, folder / data)
        for path in models:
            with atomic_write(path) as file:
                file.write((staging / path.name).read_bytes())
    except BaseException:
        if is_new and data is not None:
            with suppress(OSError):
                (folder / data).unlink()
        raise
    _remove_older_data(folder, models)


def _remove_older_data(folder: Path, models: list[Path]) -> None:
    """Data of models that were replaced, unless one that is still there reads them."""
    stem = models[0].name
    older = re.compile(re.escape(_data_stem(stem)) + r"\.[0-9a-f]{16}\.data")
    found = [entry.name for entry in os.scandir(folder) if older.fullmatch(entry.name)]
    readers = [path.read_bytes() for path in folder.glob("*.onnx")] if found else []
    for name in found:
        if not any(name.encode() in content for content in readers):
            with suppress(OSError):
                (folder / name).unlink()


def _data_stem(name: str) -> str:
    return re.sub("[^A-Za-z0-9_.-]", "_", name)
