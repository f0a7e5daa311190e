"""Which module of the exporter's model a node is of, as far as the file says it; and names of weights that say nothing.

    torch.onnx.export                metadata  pkg.torch.onnx.name_scopes = "['', 'layers.0', 'layers.0.q_proj', 'linear_1']"
    the same with dynamo=False       node      /layers.0/q_proj/MatMul; of a child of nn.Sequential /mlp/mlp.0/MatMul

Other exporters write paths with slashes too.
"""

import re
from typing import Any

_SCOPES = "pkg.torch.onnx.name_scopes"
_LISTED = re.compile(r"\[('[^'\\]*', )+'[^'\\]*'\]")
_MOST_TEXT = 4096
# Weights that torch's exporters made while they folded constants: they are numbered through.
_MADE_UP = re.compile(r"onnx::\w+|val_\d+|t_\d+|constant_\d+|\d+")


def module_of(node: Any) -> str:
    """`layers.0.q_proj`; "" where the file does not say."""
    for entry in node.metadata_props:
        if entry.key == _SCOPES and len(entry.value) <= _MOST_TEXT and _LISTED.fullmatch(entry.value):
            return _plain(entry.value.split("'")[-4])  # the last is the operation itself
    parts: list[str] = []
    for part in filter(None, _plain(node.name[:_MOST_TEXT]).split("/")[:-1]):
        if parts and part.startswith(f"{parts[-1]}."):  # a child that repeats its parent's name
            parts.pop()
        parts.append(part)
    return ".".join(parts)


def is_made_up(name: str) -> bool:
    """Whether a weight's name is a number that an exporter gave it."""
    return _MADE_UP.fullmatch(name) is not None


def _plain(name: str) -> str:
    return re.sub(r"[^\w./-]", "_", name, flags=re.ASCII)
