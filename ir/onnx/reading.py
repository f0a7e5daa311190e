"""ONNX files: the protobuf, and tensors beside it. Nothing outside of the model's folder is opened, whatever the file says.

Rules: specs/trust.md, section 5 (.onnx).
"""

import mmap
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..errors import ArtifactError, CaptureError
from ..ops.onnx_node import MOST_BYTES as MOST_HELD
from ..plain_file import read_plain
from .dtypes import torch_dtype
from .scope import shown

_KEYS = {"location", "offset", "length", "checksum"}
_MOST_DIMS, _MOST_BYTES = 64, 2**62
_MOST_PROTOBUF = 2**31  # of one message, by protobuf itself
_SMALL_CODES = {21: torch.uint8, 22: torch.int8, 25: torch.uint8, 26: torch.int8}  # 4 and 2 bits, which torch holds in 8
_BITS = {21: 4, 22: 4, 25: 2, 26: 2}


def read_model(path: "str | os.PathLike[str]") -> Any:
    """The ModelProto of a file, without what lies outside of it.

    Raises:
        ArtifactError: the file is missing, or no ONNX model.
    """
    import onnx
    from google.protobuf.message import DecodeError

    try:
        data = read_plain(path, _MOST_PROTOBUF)
    except OSError as error:
        raise ArtifactError(f"{path}: cannot be read: {error.strerror}") from error
    model = onnx.ModelProto()
    try:
        model.ParseFromString(data)
    except (DecodeError, RecursionError, ValueError) as error:
        raise ArtifactError(f"{path}: no ONNX model, or a truncated one: the protobuf does not parse") from error
    if not model.HasField("graph") or not model.opset_import:
        raise ArtifactError(f"{path}: no ONNX model: it has no graph or no opset")
    return model


class Tensors:
    """Reads tensors of a model whose external data lie in `folder`; None: it may have none."""

    def __init__(self, folder: Path | None):
        self._folder = folder
        self._maps: dict[str, tuple[mmap.mmap, int]] = {}
        self.bytes = 0  # of all tensors that were read

    def tensor(self, proto: Any) -> torch.Tensor:
        """A TensorProto's elements; those of 4 and 2 bits in 8, bytes of files mapped and not read.

        Raises:
            ArtifactError: dims and data disagree, or external data is not what the format allows.
            CaptureError: torch has no such elements.
        """
        name = proto.name or "a constant"
        dims = list(proto.dims)
        count = _count(name, dims)
        narrow = _SMALL_CODES.get(proto.data_type)
        dtype = narrow or torch_dtype(proto.data_type)
        self.bytes += count * _BITS.get(proto.data_type, 8 * dtype.itemsize) // 8
        if proto.data_location == 1:  # TensorProto.EXTERNAL
            data = self._external(proto, name, -(-count * _BITS.get(proto.data_type, 8 * dtype.itemsize) // 8))
            if narrow is None:
                return torch.from_numpy(data).view(dtype).reshape(dims)
            inside = type(proto)(data_type=proto.data_type, dims=dims, raw_data=data.tobytes())
            return self.tensor(inside)
        return _inside(proto, name, dtype, dims, count)

    def held(self, message: Any) -> Any:
        """A node or function as it is, or where tensors of it or of graphs in it lie outside, a copy that holds them itself: whoever else
        opened their files might look in another folder, and would follow links.

        Raises:
            ArtifactError: as for `tensor`.
            CaptureError: so too, or they are too large to be held.
        """
        if not any(each.data_location == 1 for each in _tensors_in(message)):
            return message
        copy, left = type(message)(), MOST_HELD
        copy.CopyFrom(message)
        for each in _tensors_in(copy):
            if each.data_location == 1:
                name, dtype = each.name or "a constant", _SMALL_CODES.get(each.data_type) or torch_dtype(each.data_type)
                size = -(-_count(name, list(each.dims)) * _BITS.get(each.data_type, 8 * dtype.itemsize) // 8)
                left -= size
                if left < 0:
                    raise CaptureError(f"tensor {name}: what onnxruntime runs holds at most {MOST_HELD} bytes of its own")
                each.raw_data = self._external(each, name, size).tobytes()
                each.ClearField("external_data")
                each.ClearField("data_location")
        return copy

    def _external(self, proto: Any, name: str, size: int) -> np.ndarray:
        entries = [(entry.key, entry.value) for entry in proto.external_data]
        given = dict(entries)
        if len(given) != len(entries) or not set(given) <= _KEYS or "location" not in given:
            raise ArtifactError(f"tensor {name}: external data has a location and perhaps an offset, a length and a checksum, nothing else")
        if self._folder is None:
            raise ArtifactError(
                f"tensor {name} lies in {shown(given['location'])}, and this model was not read from a folder: load it by its path"
            )
        offset, length = (_number(name, given.get(key)) for key in ("offset", "length"))
        content, whole = self._mapped(given["location"], name)
        offset = offset or 0
        if length is not None and length != size:
            raise ArtifactError(f"tensor {name}: its dims need {size} bytes, and its external data has {length}")
        if offset + size > whole:
            raise ArtifactError(f"tensor {name}: bytes {offset} to {offset + size} of {shown(given['location'])}, which has {whole}")
        if size == 0:
            return np.zeros(0, np.uint8)
        data = np.frombuffer(content, np.uint8, size, offset)
        return data if offset % 8 == 0 else data.copy()  # torch reads elements where they may lie

    def _mapped(self, location: str, name: str) -> tuple[mmap.mmap, int]:
        if location not in self._maps:
            descriptor = _opened(self._folder, location, name)
            try:
                size = os.fstat(descriptor).st_size
                # A private mapping may be written to, and the file stays as it is.
                self._maps[location] = (mmap.mmap(descriptor, size, flags=mmap.MAP_PRIVATE) if size else mmap.mmap(-1, 1), size)
            finally:
                os.close(descriptor)
        return self._maps[location]


def _opened(folder: Path | None, location: str, name: str) -> int:
    """A descriptor of a plain file below `folder`, reached part by part without following a link."""
    parts = location.split("/")
    if any(part in ("", ".", "..") for part in parts) or "\0" in location or "\\" in location:
        raise ArtifactError(f"tensor {name}: {shown(location)} is no path below the model's folder")
    where = os.open(str(folder), os.O_RDONLY | os.O_DIRECTORY)
    try:
        for part in parts[:-1]:
            below = os.open(part, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW, dir_fd=where)
            os.close(where)
            where = below
        descriptor = os.open(parts[-1], os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK, dir_fd=where)
    except OSError as error:
        raise ArtifactError(f"tensor {name}: {shown(location)} cannot be opened in the model's folder: {error.strerror}") from error
    finally:
        os.close(where)
    status = os.fstat(descriptor)
    if not stat.S_ISREG(status.st_mode) or status.st_nlink != 1:
        os.close(descriptor)
        raise ArtifactError(f"tensor {name}: {shown(location)} is no plain file of its own: a link or a device may lead out of the folder")
    return descriptor


def _tensors_in(message: Any) -> Iterator[Any]:
    """The TensorProtos of a node, graph or function, those of graphs inside included."""
    yield from getattr(message, "initializer", ())
    sparse = list(getattr(message, "sparse_initializer", ()))
    for node in getattr(message, "node", ()):
        yield from _tensors_in(node)
    for attribute in (*getattr(message, "attribute_proto", ()), *(message.attribute if hasattr(message, "op_type") else ())):
        yield from ([attribute.t] if attribute.HasField("t") else []) + list(attribute.tensors)
        sparse += ([attribute.sparse_tensor] if attribute.HasField("sparse_tensor") else []) + list(attribute.sparse_tensors)
        for graph in ([attribute.g] if attribute.HasField("g") else []) + list(attribute.graphs):
            yield from _tensors_in(graph)
    for pair in sparse:
        yield from (pair.values, pair.indices)


def _number(name: str, text: str | None) -> int | None:
    if text is None:
        return None
    if not text.isascii() or not text.isdigit() or len(text) > 19:
        raise ArtifactError(f"tensor {name}: an offset or length of external data is {text[:40]!r}")
    return int(text)


def _count(name: str, dims: list[int]) -> int:
    if len(dims) > _MOST_DIMS or any(dim < 0 for dim in dims):
        raise ArtifactError(f"tensor {name}: its dims are negative or more than {_MOST_DIMS}")
    count = 1
    for dim in dims:
        count *= dim
    if count > _MOST_BYTES:
        raise ArtifactError(f"tensor {name}: its dims overflow")
    return count


def _inside(proto: Any, name: str, dtype: torch.dtype, dims: list[int], count: int) -> torch.Tensor:
    from onnx import numpy_helper

    plain = {torch.float32, torch.float64, torch.float16, torch.int8, torch.uint8, torch.int16, torch.int32, torch.int64, torch.bool}
    raw = proto.HasField("raw_data")
    needed = -(-count * _BITS.get(proto.data_type, 8 * dtype.itemsize) // 8)
    if raw and len(proto.raw_data) != needed:
        raise ArtifactError(f"tensor {name}: its dims need {needed} bytes, and it has {len(proto.raw_data)}")
    if raw and dtype in plain and proto.data_type not in _SMALL_CODES:
        if count == 0:
            return torch.empty(dims, dtype=dtype)
        return torch.frombuffer(bytearray(proto.raw_data), dtype=dtype).reshape(dims)
    try:
        array = numpy_helper.to_array(proto)
    except Exception as error:  # the package raises what its conversions raise
        raise ArtifactError(
            f"tensor {name}: dims and data disagree: {str(error).splitlines()[0] if str(error) else type(error).__name__}"
        ) from error
    if array.size != count:
        raise ArtifactError(f"tensor {name}: its dims need {count} elements, and it has {array.size}")
    if array.dtype.kind in "OUS":
        raise CaptureError(f"tensor {name} holds strings, which have no place in the IR")
    if proto.data_type in _SMALL_CODES:
        return torch.from_numpy(array.astype(np.int8 if dtype == torch.int8 else np.uint8)).reshape(dims)
    if dtype in plain:
        return torch.from_numpy(np.array(array)).reshape(dims)
    bits = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}[dtype.itemsize]
    words = np.ascontiguousarray(array).reshape(-1).view(bits).copy()
    return torch.from_numpy(words).view(dtype).reshape(dims)
