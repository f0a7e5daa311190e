"""ONNX models as programs. The packages onnx and onnxruntime are optional: nothing here is imported before it is needed."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from ..errors import TargetError
from ..program import Program


def from_onnx(
    model: Any,
    *,
    sizes: Mapping[str, int] | None = None,
    constants: Mapping[str, torch.Tensor] | None = None,
    folder: "str | Path | None" = None,
) -> Program:
    """The program of an ONNX model of opset 7 or newer: a path, or an onnx.ModelProto whose external data lie in `folder`.

    Dynamic dims are symbols, but for those that `sizes` gives a value. Inputs in `constants` are no inputs of the program but have these
    values, which shapes may depend on. An operator without a form in ATen becomes `gw.onnx_node`, which onnxruntime runs, and which
    passes step around.

    Raises:
        ArtifactError: the file is no ONNX model, or not a valid one.
        CaptureError: the model has something that no program can hold; the message names the node and says why.
        InputError: `sizes` or `constants` name what the model has not.
        TargetError: the package onnx is missing.
    """
    try:
        import onnx  # noqa: F401
    except ImportError as error:
        raise TargetError("reading ONNX models needs the package onnx: pip install 'graphwright[onnx]'") from error
    from .importer import read

    return read(model, dict(sizes or {}), dict(constants or {}), folder)
