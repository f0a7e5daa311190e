"""An ONNX operator that has no form in ATen, run by onnxruntime."""

import base64
import functools
import os
import zlib
from typing import Any

import torch
from torch import Tensor

from ..errors import TargetError, first_line
from ..forks import new_lock
from ..op import opaque_op

# By TensorProto.DataType, whose numbers are the format's own: what an opaque operator may take and give.
DTYPES = {
    1: torch.float32, 2: torch.uint8, 3: torch.int8, 4: torch.uint16, 5: torch.int16, 6: torch.int32, 7: torch.int64, 9: torch.bool,
    10: torch.float16, 11: torch.float64, 12: torch.uint32, 13: torch.uint64, 16: torch.bfloat16,
}  # fmt: skip
_DOUBLE = 11


def _types(inputs: list[Tensor], sizes: list[int], *, op: str, model: str, dtypes: list[int], ranks: list[int]) -> list[Tensor]:
    """The outputs' types: the sizes of all, one after another, -1 where only the data tell."""
    device = inputs[0].device if inputs else torch.device("cpu")
    results, start = [], 0
    for dtype, rank in zip(dtypes, ranks, strict=True):
        shape = [_size(size) for size in sizes[start : start + rank]]
        results.append(torch.empty(shape, dtype=DTYPES[dtype], device=device))
        start += rank
    return results


def _size(size: Any) -> Any:
    return torch.library.get_ctx().new_dynamic_size() if isinstance(size, int) and size < 0 else size


def _in_float64(kwargs: dict[str, Any]) -> dict[str, Any]:
    return {**kwargs, "dtypes": [_DOUBLE if DTYPES[each].is_floating_point else each for each in kwargs["dtypes"]]}


@opaque_op("onnx_node", types=_types, in_float64=_in_float64)
def onnx_node(inputs: list[Tensor], sizes: list[int], *, op: str, model: str, dtypes: list[int], ranks: list[int]) -> list[Tensor]:
    """What onnxruntime makes of `inputs` with `model`, a compressed ONNX model of one node; `op` is the node's operator, to read.

    `sizes` are those of all outputs, one after another, -1 where only the data tell; `dtypes` are ONNX element types. Floats of other types
    than the model's, as a float64 program has, are converted on the way in and out.

    Raises:
        TargetError: onnxruntime is missing, refuses the model, or fails.
    """
    runner = session(model)
    feeds = {each.name: to_array(_rounded(tensor, each.type)) for each, tensor in zip(runner.get_inputs(), inputs, strict=True)}
    try:
        results = runner.run(None, feeds)
    except Exception as error:  # onnxruntime has an exception of its own for each status
        raise TargetError(f"onnxruntime fails in {op}: {first_line(error)}") from error
    _check_sizes(op, [list(result.shape) for result in results], sizes, ranks)
    device = inputs[0].device if inputs else torch.device("cpu")
    found = [each.type for each in runner.get_outputs()]
    tensors = [from_array(result, _FLOATS.get(kind, DTYPES[dtype])) for result, kind, dtype in zip(results, found, dtypes, strict=True)]
    return [tensor.to(device, DTYPES[dtype]) for tensor, dtype in zip(tensors, dtypes, strict=True)]


_FLOATS = {
    "tensor(float)": torch.float32, "tensor(double)": torch.float64, "tensor(float16)": torch.float16, "tensor(bfloat16)": torch.bfloat16,
}  # fmt: skip


def _rounded(tensor: Tensor, kind: str) -> Tensor:
    return tensor.to(_FLOATS.get(kind, tensor.dtype)) if tensor.is_floating_point() else tensor


def _check_sizes(op: str, shapes: list[list[int]], sizes: list[int], ranks: list[int]) -> None:
    """Raises TargetError where a result is of other sizes than the file, from which they may come, says."""
    following = iter(sizes)
    for shape, rank in zip(shapes, ranks, strict=True):
        wanted = [next(following) for _ in range(rank)]
        if len(shape) != rank or any(want not in (-1, size) for want, size in zip(wanted, shape)):
            shown = [None if want < 0 else want for want in wanted]
            raise TargetError(f"onnxruntime gives a result of sizes {shape} in {op}, which the model says has {shown}: correct the model")


_LOCK = new_lock()
MOST_BYTES = 2**30  # of a model, which is a few hundred times smaller as text where it is zeros


@functools.lru_cache(maxsize=256)
def _new_session(model: str) -> Any:
    try:
        import onnxruntime
    except ImportError as error:
        raise TargetError("an operator of this program runs in onnxruntime: pip install onnxruntime") from error
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    # A model holds its tensors itself. Of one that names a file, onnxruntime would look for that below the current folder.
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", f"{os.devnull}/none")
    try:
        content = _decompressed(base64.b85decode(model))
        # Folding would compute at once, of what size ever, what a branch that no data choose may never need.
        return onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"], disabled_optimizers=["ConstantFolding"])
    except Exception as error:
        raise TargetError(f"onnxruntime refuses an operator of this program: {first_line(error)}") from error


def _decompressed(data: bytes) -> bytes:
    stream = zlib.decompressobj()
    content = stream.decompress(data, MOST_BYTES)
    if not stream.eof:
        raise ValueError(f"its model is cut off, or has more than {MOST_BYTES} bytes")
    return content


def session(model: str) -> Any:
    """onnxruntime's session of a model, made once.

    Raises:
        TargetError: onnxruntime is missing or refuses it.
    """
    with _LOCK:
        return _new_session(model)


def to_array(tensor: Tensor) -> Any:
    """The tensor as onnxruntime takes it."""
    tensor = tensor.detach().to("cpu").contiguous()
    if tensor.dtype == torch.bfloat16:
        import ml_dtypes

        return tensor.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    return tensor.numpy()


def from_array(array: Any, dtype: torch.dtype) -> Tensor:
    """What onnxruntime gives, as a tensor of its own."""
    import numpy as np

    if dtype == torch.bfloat16:
        return torch.from_numpy(np.ascontiguousarray(array).view(np.int16)).view(torch.bfloat16)
    if dtype == torch.uint64:  # which has two names in NumPy, of which torch knows one
        return torch.from_numpy(array.view(np.int64).copy()).view(dtype)
    return torch.from_numpy(np.array(array))
