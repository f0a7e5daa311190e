"""ONNX's own test of each operator (onnx.backend.test): a model, inputs and the outputs that the standard says."""

import glob
import os
from collections.abc import Callable
from enum import StrEnum
from functools import cache
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnxruntime
import torch
from onnx import numpy_helper
from onnx.backend.test.loader import load_model_tests

import graphwright as gw
from graphwright.ir import verify
from graphwright.ir.run import run

# One unit of a float16 is up to 2^-10 of it: the suite's 1e-3 leaves no room for sums in another order than its own.
HALF = 2**-9


class Verdict(StrEnum):
    RIGHT = "right"  # on ATen alone
    FIXED = "fixed"  # on ATen, with operands that shapes depend on given as constants
    OPAQUE = "opaque"  # with an operator that onnxruntime runs
    REFUSED = "refused"  # a typed error
    WRONG = "wrong"
    CRASHED = "crashed"


@cache
def cases() -> list[Any]:
    return load_model_tests(kind="node")


def model_of(case: Any) -> Any:
    return onnx.load(os.path.join(case.model_dir, "model.onnx")) if case.model is None else case.model


def operators(case: Any) -> frozenset[str]:
    return frozenset(node.op_type for node in model_of(case).graph.node)


def data_of(case: Any, model: Any) -> list[tuple[list[Any], list[Any]]]:
    """Inputs and outputs, as NumPy arrays, lists of them or None."""
    if case.data_sets:
        return case.data_sets
    folders = sorted(glob.glob(os.path.join(case.model_dir, "test_data_set*")))
    return [(_files(folder, "input", model.graph.input), _files(folder, "output", model.graph.output)) for folder in folders]


def _files(folder: str, kind: str, infos: Any) -> list[Any]:
    return [_read(os.path.join(folder, f"{kind}_{place}.pb"), info.type) for place, info in enumerate(infos)]


def _read(path: str, type_: Any) -> Any:
    protos = {
        "tensor_type": (onnx.TensorProto, numpy_helper.to_array),
        "sequence_type": (onnx.SequenceProto, numpy_helper.to_list),
        "optional_type": (onnx.OptionalProto, numpy_helper.to_optional),
    }
    proto, convert = protos[type_.WhichOneof("value")]
    message = proto()
    with open(path, "rb") as file:
        message.ParseFromString(file.read())
    return convert(message)


def passes_onnxruntime(case: Any) -> bool:
    """Whether onnxruntime's CPU provider gives what the case expects."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level, options.intra_op_num_threads = 4, 1
    model = model_of(case)
    try:
        session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
        for inputs, outputs in data_of(case, model):
            results = session.run(None, dict(zip([each.name for each in session.get_inputs()], inputs)))
            for got, wanted in zip(results, outputs, strict=True):
                _check_any(got, wanted, case)
    except Exception:  # a case that it does not pass, for whatever reason
        return False
    return True


def _check_any(got: Any, wanted: Any, case: Any) -> None:
    if isinstance(wanted, list):
        for each, expected in zip(got, wanted, strict=True):
            _check_any(each, expected, case)
    elif wanted is None or np.asarray(wanted).dtype.kind in "OUS":
        assert np.array_equal(got, wanted) if wanted is not None else got is None
    else:
        np.testing.assert_allclose(_plain(np.asarray(got)), _plain(np.asarray(wanted)), rtol=case.rtol, atol=case.atol)


def _plain(array: np.ndarray) -> np.ndarray:
    return array.astype(np.float32) if array.dtype.kind == "V" or array.dtype == ml_dtypes.bfloat16 else array


def judge(case: Any) -> tuple[Verdict, str]:
    """What becomes of the case here, and why it is not right."""
    model = model_of(case)
    data = data_of(case, model)
    try:
        program, fixed = _imported(model, data)
    except gw.GraphwrightError as error:
        return Verdict.REFUSED, str(error)
    except Exception as error:
        return Verdict.CRASHED, f"{type(error).__name__}: {error}"
    verify(program)
    names = [each.name for each in model.graph.input]
    for inputs, outputs in data:
        tensors = [tensor_of(value) for name, value in zip(names, inputs, strict=True) if name not in fixed]
        results, _ = run(program, tensors)
        for got, wanted in zip(results, outputs, strict=True):
            problem = _difference(got, tensor_of(wanted), case)
            if problem:
                return Verdict.WRONG, problem
    if any("onnx_node" in str(node.target) for node in program.nodes()):
        return Verdict.OPAQUE, ""
    return (Verdict.FIXED if fixed else Verdict.RIGHT), ""


def _difference(got: torch.Tensor, wanted: torch.Tensor, case: Any) -> str:
    if got.dtype != wanted.dtype or got.shape != wanted.shape:
        return f"{got.dtype}{list(got.shape)} instead of {wanted.dtype}{list(wanted.shape)}"
    rtol = max(case.rtol, HALF) if got.dtype == torch.float16 else case.rtol
    narrow = got.is_floating_point() and got.dtype.itemsize <= 2
    a, b = (each.float().numpy() if narrow else each.numpy() for each in (got, wanted))
    try:
        np.testing.assert_allclose(a, b, rtol=rtol, atol=case.atol)
    except AssertionError as error:
        return str(error)
    return ""


def _imported(model: Any, data: list[Any]) -> tuple[Any, set[str]]:
    """The program, and the names of the inputs that had to be constants for it to be one of ATen."""
    attempts: list[Callable[[], dict[str, torch.Tensor]]] = [dict, lambda: _parameters(model, data, 1), lambda: _parameters(model, data, 0)]
    first: Exception | None = None
    best = None
    for attempt in attempts:
        constants = attempt()
        if first is not None and not constants:
            continue
        try:
            program = gw.from_onnx(model, constants=constants)
        except gw.GraphwrightError as error:
            first = first or error
            continue
        if not any("onnx_node" in str(node.target) for node in program.nodes()):
            return program, set(constants)
        best = best or (program, set(constants))
        first = first or Exception()
    if best is None:
        raise first  # type: ignore[misc]
    return best


def _parameters(model: Any, data: list[Any], begin: int) -> dict[str, torch.Tensor]:
    """Inputs from `begin` on of at most one dim, as axes and shapes have."""
    if len(data) != 1:
        return {}
    found = {}
    for info, value in list(zip(model.graph.input, data[0][0], strict=True))[begin:]:
        if isinstance(value, np.ndarray) and value.ndim <= 1 and value.size <= 64 and value.dtype.kind in "fiub":
            found[info.name] = tensor_of(value)
    return found


def tensor_of(value: Any) -> torch.Tensor:
    array = np.asarray(value)
    if array.dtype == ml_dtypes.bfloat16:
        return torch.from_numpy(array.view(np.int16).copy()).view(torch.bfloat16)
    if array.dtype.name.startswith("float8"):
        return torch.from_numpy(array.view(np.uint8).copy()).view(getattr(torch, array.dtype.name))
    return torch.from_numpy(np.array(array))
