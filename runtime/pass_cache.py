"""What passes made of a program, kept between processes: the program after them, the weights that they computed, and their reports.

    kind passes    program, values of its weights, pipeline, environment

A pass may look at the values of weights, as folding does, so all of them are in the key, hashed anew each time: whoever trains on runs
the passes again. Weights that came through unchanged are those of the program given, never copies. Kept are pipelines of
graphwright's own passes whose options are all plain data: what another pass depends on is not known. What checks find is computed,
so `verify="numeric"` has no part in this.
"""

import json
import zlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, fields
from functools import cached_property
from typing import Any, overload

import torch

from ..ir import Program, RewriteRecord, Weight
from ..ir.errors import ArtifactError, InputError
from ..ir.float64 import RoundedWeight, exact_value
from ..ir.program import content_digest
from ..ir.snapshot import NoSnapshot, rebuild, take
from ..passes import Contract, Pass, PassManager, PassReport
from ..passes.base import LeftAlone
from ..passes.manager import PipelineResult
from ..passes.pipeline import spell
from ..passes.registry import BUILT_IN
from .cache import Cache
from .cache_key import digest, environment
from .tensor_file import read_tensors, tensor_member

KIND = "passes"
_MOST_TEXT = 2**28  # characters of a result without its tensors


class NotKept(Exception):
    """Why what some passes make of a program is not kept, in a sentence."""


def pass_key(program: Program, passes: Sequence[Pass]) -> dict[str, str]:
    """The key of what `passes` make of `program`.

    Raises:
        NotKept: it has none.
    """
    for each in passes:
        if BUILT_IN.get(each.name) is not type(each):
            raise NotKept(f"pass {each.name} is none of graphwright's own, and what it depends on is not known")
        unspelled = [option.name for option in fields(each) if not option.metadata.get("spelled", True)]
        if unspelled:
            what = "an option that is" if len(unspelled) == 1 else "options that are"
            raise NotKept(f"pass {each.name} takes {' and '.join(unspelled)}, {what} no plain data")
    try:
        text = json.dumps([take(program), [(w.name, w.kind) for w in program.weights.values()]])
    except (NoSnapshot, TypeError, ValueError) as reason:
        raise NotKept(f"the program is not kept: {reason}") from reason
    return {"program": digest(text), "weights": _weights_digest(program), "passes": spell(passes), **environment()}


def run_or_find(manager: PassManager, program: Program, cache: Cache | None) -> PipelineResult:
    """What `manager.run(program)` gives: found in `cache`, or made and kept there.

    Raises:
        PassError, ContractError, VerifyError: as `manager.run` does.
    """
    if cache is None or manager.numeric or not manager.passes:
        return manager.run(program)
    try:
        key = pass_key(program, manager.passes)
    except NotKept:
        return manager.run(program)
    replay = _Replay(program, manager.passes, key["weights"])
    found = _found(cache.get(KIND, key), replay)
    if found is not None:
        if manager.progress is not None:
            manager.progress(len(manager.passes), len(manager.passes), "")
        return found
    result = manager.run(program)
    value = _value(result)
    again = _found(value, replay)
    # Only what is found again as it was is kept, and only if no thread wrote to weights meanwhile.
    is_found = value is not None and again is not None and again.reports == result.reports and _value(again) == value
    if value is not None and is_found and _weights_digest(program) == key["weights"]:
        cache.put(KIND, key, value)
    return result


# --- weights ---------------------------------------------------------------------------------------------------------------


def _weights_digest(program: Program) -> str:
    """Digest of the values of all weights as they are now; those that are one tensor are read once.

    Raises:
        NotKept: a weight has no values, or other ones than its memory shows.
    """
    tensors: dict[str, Any] = {name: weight.tensor for name, weight in program.weights.items()}
    for name, tensor in tensors.items():
        if type(tensor) not in (torch.Tensor, torch.nn.Parameter) or tensor.layout != torch.strided or tensor.device.type == "meta":
            raise NotKept(f"weight {name} has no values of its own in memory")
    distinct = {_place(tensor): tensor for tensor in tensors.values()}
    try:
        with ThreadPoolExecutor(torch.get_num_threads()) as pool:  # hashing holds no lock of Python's
            known = dict(zip(distinct, pool.map(content_digest, distinct.values()), strict=True))
    except RuntimeError as error:  # a dtype whose elements are no bytes
        raise NotKept(f"the values of a weight cannot be read: {error}") from error
    return digest(*(text for name, tensor in tensors.items() for text in (name, known[_place(tensor)])))


def _place(tensor: torch.Tensor) -> Any:
    return (tensor.data_ptr(), tensor.dtype, tuple(tensor.shape), tensor.stride(), tensor.device) if tensor.numel() else id(tensor)


# --- values ----------------------------------------------------------------------------------------------------------------


def _value(result: PipelineResult) -> bytes | None:
    """u64 length, JSON of program, reports and weights by name (compressed), added tensors; None where plain data does not hold it."""
    given, program = result.history[0].weights, result.program
    added = {name: weight for name, weight in program.weights.items() if given.get(name) is not weight}
    if any(type(weight) not in (Weight, RoundedWeight) for weight in added.values()):
        return None
    try:
        tensors = tensor_member("added", {name: weight.tensor for name, weight in added.items() if weight.tensor is not None})
        data = {
            "program": take(program),
            "weights": [[name, name in added and _weight_data(weight)] for name, weight in program.weights.items()],
            "reports": [_report_data(report) for report in result.reports],
        }
        text = zlib.compress(json.dumps(data).encode(), level=1)
    except (NoSnapshot, ArtifactError, TypeError, ValueError):
        return None
    return len(text).to_bytes(8, "little") + text + b"".join(map(bytes, tensors.chunks()))


def _found(value: bytes | None, replay: "_Replay") -> PipelineResult | None:
    """The result that `_value` gave these bytes; None for no bytes and for any that it did not give."""
    if value is None:
        return None
    program = replay.program
    with suppress(Exception):
        end = 8 + int.from_bytes(value[:8], "little")
        data = json.loads(zlib.decompressobj().decompress(value[8:end], _MOST_TEXT))
        tensors = read_tensors(torch.frombuffer(bytearray(value[end:]), dtype=torch.uint8))
        weights = {name: _weight(name, made, tensors, replay) if made else program.weights[name] for name, made in data["weights"]}
        after = rebuild(data["program"], weights, program.symbols)
        reports = tuple(map(_report, data["reports"]))
        return PipelineResult(after, _History(replay, after), reports, Contract.weakest(report.contract for report in reports))
    return None


def _weight_data(weight: Weight) -> dict[str, Any]:
    return {
        "kind": weight.kind,
        "stride": list(weight.stride),
        "device": str(weight.device),
        "rounded": isinstance(weight, RoundedWeight) and weight.exact is not None,
    }


def _weight(name: str, data: dict[str, Any], tensors: dict[str, torch.Tensor], replay: "_Replay") -> Weight:
    values = tensors[name]
    tensor = torch.empty_strided(values.shape, data["stride"], dtype=values.dtype, device=data["device"]).copy_(values)
    if not data["rounded"]:
        return Weight.of(name, tensor, data["kind"])
    return RoundedWeight.computed(name, tensor, lambda: exact_value(replay.result.program.weights[name]), data["kind"])


def _report_data(report: PassReport) -> dict[str, Any]:
    data = asdict(report)
    del data["kept"]
    return {**data, "contract": str(report.contract)}


def _report(data: dict[str, Any]) -> PassReport:
    made = {
        "contract": Contract(data["contract"]),
        "records": tuple(
            RewriteRecord(**each | {"before": tuple(each["before"]), "after": tuple(each["after"])}) for each in data["records"]
        ),
        "left": tuple(LeftAlone(**each) for each in data["left"]),
        "declined": tuple(LeftAlone(**each) for each in data["declined"]),
        "lines": tuple(data["lines"]),
    }
    return PassReport(**data | made, kept=True)


# --- what is asked for later -----------------------------------------------------------------------------------------------


class _Replay:
    """The run of the passes itself, made when somebody asks for more of it than is kept; `weights` is the digest of their values."""

    def __init__(self, program: Program, passes: Sequence[Pass], weights: str):
        self.program, self.passes, self.weights = program, passes, weights

    @cached_property
    def result(self) -> PipelineResult:
        """Raises InputError where the program's weights were written to since."""
        if _weights_digest(self.program) != self.weights:
            raise InputError("what passes made of weights that were changed since is not known: compile the model again")
        return PassManager(self.passes).run(self.program)


class _History(Sequence[Program]):
    """The program given, the one after each pass; those between are made when they are asked for."""

    def __init__(self, replay: _Replay, after: Program):
        self._replay, self._after = replay, after

    def __len__(self) -> int:
        return 1 + len(self._replay.passes)

    @overload
    def __getitem__(self, index: int) -> Program: ...

    @overload
    def __getitem__(self, index: slice) -> tuple[Program, ...]: ...

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return tuple(self[position] for position in range(*index.indices(len(self))))
        position = range(len(self))[index]
        if position == 0:
            return self._replay.program
        return self._after if position == len(self) - 1 else self._replay.result.history[position]
