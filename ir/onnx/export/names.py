"""Names of a model's values: inputs and outputs keep theirs."""

import re
from typing import Any

import torch.utils._pytree as pytree

from ...errors import ArtifactError
from ...program import Function, Node


def unique(name: str, taken: set[str]) -> str:
    """`name`, or that with a number behind it where it is taken; it is taken from now on."""
    found, number = name, 1
    while found in taken or not found:
        number += 1
        found = f"{name}.{number}"
    taken.add(found)
    return found


def output_names(function: Function) -> list[str]:
    """Outputs by their place in what the function returns (`logits`, `hidden.0`, `output` for a single one), new states as `new_` and the
    state's name. Constants are no outputs of a model."""
    news = function.signature().new_states
    leaves = function.outputs
    count = len(leaves) - len(news)
    names = [*_places(function, count), *(f"new_{name.removeprefix('input:')}" for name in news)]
    return [name for name, leaf in zip(names, leaves, strict=True) if isinstance(leaf, Node)]


def _places(function: Function, count: int) -> list[str]:
    try:
        spec = function.out_tree.to_spec()
    except ArtifactError:  # of a class that is not imported here
        return [f"output_{place}" for place in range(count)]
    nested = pytree.tree_unflatten(list(range(count)), spec)
    paths = [_path(keys) for keys, _ in pytree.tree_flatten_with_path(nested)[0]]
    return [path if path and not path[0].isdigit() else f"output_{path}" if path else "output" for path in paths]


def _path(keys: Any) -> str:
    return re.sub(r"[^A-Za-z0-9_]+", ".", pytree.keystr(keys)).strip(".")
