"""The arguments of a `gw.sliced` node by name."""

from dataclasses import dataclass
from typing import Any

import torch

from .program import Node
from .region import Region


@dataclass(frozen=True)
class RegionCall:
    """`body` runs over `count` slices of `operands`; `in_dims` and `out_dims` say along which dims. `outputs` are types.

    `count` and `units` are numbers, or nodes that compute them; `units` None is the common size of the sliced dims.
    """

    body: Region
    in_dims: list[int]
    out_dims: list[int]
    count: Any
    units: Any
    operands: list[Node]
    outputs: list[torch.Tensor]

    @staticmethod
    def of(node: Node) -> "RegionCall":
        arguments: Any = node.args
        body, in_dims, out_dims, count, *operands = arguments
        return RegionCall(body, in_dims, out_dims, count, node.kwargs.get("units"), operands, list(node.meta["val"]))
