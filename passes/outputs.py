"""What a program returns, beside the values: types, layout, which outputs share memory with what, and the calls that compute them."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from ..ir import Node, Program
from ..ir.calls import name_of


def type_difference(own: Any, other: Any) -> str:
    """In what `other` is not of the type of `own`, in words; "" where it is. Strides of dims of size 1 address nothing."""
    if type(own) is not type(other):
        return f"is a {type(other).__name__}, not a {type(own).__name__}"
    if not isinstance(own, torch.Tensor):
        return ""
    for name in ("dtype", "shape", "device"):
        if getattr(own, name) != getattr(other, name):
            return f"has {name} {_plain(getattr(other, name))}, not {_plain(getattr(own, name))}"
    strides = [(a, b) for size, a, b in zip(own.shape, own.stride(), other.stride(), strict=True) if size > 1]
    if own.numel() > 0 and any(a != b for a, b in strides):
        return f"has strides {list(other.stride())}, not {list(own.stride())}"
    return ""


def _plain(value: Any) -> str:
    return str(list(value)) if isinstance(value, torch.Size) else str(value)


def aliases_of(
    program: Program, labelled: dict[str, Any], inputs: Sequence[Any], states: Mapping[str, torch.Tensor]
) -> dict[str, frozenset[str]]:
    """Output label -> the inputs, weights and other outputs that lie in the same memory."""
    owners: dict[int, set[str]] = {}

    def own(name: str, value: Any) -> None:
        if _has_memory(value):
            owners.setdefault(_memory(value), set()).add(name)

    for index, value in enumerate(inputs):
        own(f"input {index}", value)
    for name, weight in program.weights.items():
        own("a weight", states.get(name, weight.tensor))
    for label, value in labelled.items():
        own(label, value)
    return {label: frozenset(owners[_memory(value)] - {label}) if _has_memory(value) else frozenset() for label, value in labelled.items()}


def _has_memory(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.numel() > 0


def _memory(value: torch.Tensor) -> int:
    return value.untyped_storage().data_ptr()


def listed(names: frozenset[str]) -> str:
    """The names in a sentence."""
    return ", ".join(sorted(names)) or "nothing"


def leaves_of(program: Program) -> dict[str, Any]:
    """Output label -> the node, or the constant, that main returns there."""
    signature = program.main.signature()
    labels = [f"output {index}" for index in range(len(signature.outputs))] + [f"state {name}" for name in signature.new_states]
    return dict(zip(labels, program.main.outputs, strict=True))


def where_of(leaf: Any) -> str:
    """The user's line of the node that computes an output."""
    return str(leaf.meta.get("where") or "") if isinstance(leaf, Node) else ""


def computed_by(leaf: Any) -> str:
    """The operation that computes an output; "" for an input or a constant."""
    return name_of(leaf.target) if isinstance(leaf, Node) and leaf.op == "call_function" else ""
