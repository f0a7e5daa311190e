"""Weights as safetensors, written as a stream and read without a copy.

    u64 length of the header, JSON {name: {"dtype", "shape", "data_offsets"}}, elements in row-major order

The header is padded so that elements start 64 bytes, or a multiple, after it does. The reader takes no other key, and tensors that fill the
data without gap or overlap; the sizes are checked against the bytes present before anything is allocated.
"""

import json
import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch

from ..ir.errors import ArtifactError
from .strict_json import strict_json
from .zip_subset import Member

_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8,
    "U64": torch.uint64, "U32": torch.uint32, "U16": torch.uint16, "U8": torch.uint8,
    "BOOL": torch.bool, "C64": torch.complex64,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "F8_E8M0": torch.float8_e8m0fnu,
}  # fmt: skip
_DTYPE_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
ALIGNMENT = 64
_MAX_HEADER = 32 * 2**20  # 300,000 tensors; JSON may take 30 bytes of memory for one of text


def tensor_member(name: str, tensors: Mapping[str, torch.Tensor]) -> Member:
    """The member `name` that holds `tensors`.

    Raises:
        ArtifactError: safetensors has no such dtype.
    """
    for key, tensor in tensors.items():
        if tensor.dtype not in _DTYPE_NAMES:
            raise ArtifactError(f"weight {key} is {tensor.dtype}, which safetensors cannot hold")
    # Wide elements first, so that each tensor starts at a multiple of its item size.
    order = sorted(tensors, key=lambda key: (-tensors[key].dtype.itemsize, key))
    header, at = {}, 0
    for key in order:
        tensor, begin = tensors[key], at
        at += tensor.numel() * tensor.dtype.itemsize
        header[key] = {"dtype": _DTYPE_NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [begin, at]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % ALIGNMENT)

    def chunks() -> Iterator[Any]:
        yield len(text).to_bytes(8, "little") + text
        for key in order:
            yield _bytes_of(tensors[key]).numpy().data

    return Member(name, 8 + len(text) + at, chunks)


def _bytes_of(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().to("cpu").contiguous().flatten().view(torch.uint8)


def read_tensors(content: torch.Tensor) -> dict[str, torch.Tensor]:
    """The tensors in `content` (u8[n]), as views of it.

    Raises:
        ArtifactError: the bytes are no such file.
    """
    length = int.from_bytes(bytes(content[:8].tolist()), "little")
    if len(content) < 8 or length > min(len(content) - 8, _MAX_HEADER):
        raise ArtifactError(f"its header is longer than the file, or than {_MAX_HEADER} bytes")
    header = strict_json(bytes(content[8 : 8 + length].numpy()))
    if not isinstance(header, dict):
        raise ArtifactError("its header is no JSON object")
    data = content[8 + length :]
    spans = sorted((_span(name, entry, len(data)), name) for name, entry in header.items())
    position = 0
    for (begin, end), name in spans:
        if begin != position:
            raise ArtifactError(f"tensor {name!r} leaves a gap or overlaps another")
        position = end
    if position != len(data):
        raise ArtifactError(f"{len(data) - position} bytes at its end belong to no tensor")
    return {name: _view(name, data, span, header[name]) for span, name in spans}


def _span(name: str, entry: Any, available: int) -> tuple[int, int]:
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"} or entry["dtype"] not in _DTYPES:
        raise ArtifactError(f"tensor {name!r} has no dtype, shape and data_offsets that are known")
    shape, offsets = entry["shape"], entry["data_offsets"]
    numbers = [*shape, *offsets] if isinstance(shape, list) and isinstance(offsets, list) else [None]
    if any(type(n) is not int or not 0 <= n < 2**63 for n in numbers) or len(offsets) != 2 or len(shape) > 64:
        raise ArtifactError(f"tensor {name!r} has sizes that are none")
    begin, end = offsets
    if not begin <= end <= available or math.prod(shape) * _DTYPES[entry["dtype"]].itemsize != end - begin:
        raise ArtifactError(f"tensor {name!r} does not have the bytes that its shape needs")
    return begin, end


def _view(name: str, data: torch.Tensor, span: tuple[int, int], entry: Any) -> torch.Tensor:
    dtype, part = _DTYPES[entry["dtype"]], data[span[0] : span[1]]
    if part.numel() == 0:
        return torch.empty(entry["shape"], dtype=dtype)
    if part.storage_offset() % dtype.itemsize:
        part = part.clone()
    return part.view(dtype).view(entry["shape"])
