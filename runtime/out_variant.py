"""The `out=` form of an operation, where the kernel itself writes there.

Most `.out` overloads are generated: they run the functional form and copy. One that has a kernel of its own for the device
writes its result in place, whatever the strides of `out`.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch


class Into:
    """`overload` with its destination as the last positional operand."""

    def __init__(self, overload: torch._ops.OpOverload):
        self.overload = overload
        self._op = overload._op

    def __call__(self, *arguments: Any, **keywords: Any) -> torch.Tensor:
        return self._op(*arguments[:-1], out=arguments[-1], **keywords)

    def __str__(self) -> str:
        return str(self.overload)


@functools.cache
def out_variant(target: Callable[..., Any], device_type: str) -> Into | None:
    """The in-place form of `target`, or None if it has none that saves a copy."""
    if not isinstance(target, torch._ops.OpOverload) or len(target._schema.returns) != 1:
        return None
    wanted = [(a.name, str(a.type)) for a in target._schema.arguments]
    key = {"cpu": "CPU", "cuda": "CUDA"}.get(device_type)
    if key is None:
        return None
    packet = target.overloadpacket
    for name in packet.overloads():
        overload = getattr(packet, name)
        destinations = [a for a in overload._schema.arguments if a.is_out]
        given = [(a.name, str(a.type)) for a in overload._schema.arguments if not a.is_out]
        if len(destinations) != 1 or destinations[0].name != "out" or given != wanted:
            continue
        if torch._C._dispatch_has_kernel_for_dispatch_key(overload.name(), key):
            return Into(overload)
    return None


def is_pointwise(target: Callable[..., Any]) -> bool:
    """Whether each element of the result is computed from the same elements of the operands, so that `out` may be one of them."""
    return isinstance(target, torch._ops.OpOverload) and torch.Tag.pointwise in target.tags
