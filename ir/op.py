"""`@op`: one declaration of a dialect operator, whose plain PyTorch body is its meaning.

The body is registered in torch's `gw` namespace as CompositeImplicitAutograd. From that follow the schema, shape inference
(the body runs on fake tensors), gradients, the lowering when no kernel fits, and the oracle that kernels are tested against.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

_LIBRARY = torch.library.Library("gw", "DEF")
REGISTRY: dict[str, "OpDeclaration"] = {}


@dataclass(frozen=True)
class OpDeclaration:
    """A dialect operator: its name, body and torch operator."""

    name: str
    body: Callable[..., Any]
    overload: Any
    is_opaque: bool = False  # computed by something other than torch
    in_float64: Callable[[dict[str, Any]], dict[str, Any]] | None = None  # of an opaque one: see `opaque_op`

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.overload(*args, **kwargs)


def op(name: str) -> Callable[[Callable[..., Any]], OpDeclaration]:
    """Declares `gw.<name>` with the decorated function as its meaning; the schema is read off its annotations.

    Tensors and plain attributes only (ints, floats, bools, strings, flat lists). What changes the result is an attribute;
    what does not, such as a tile size, is never one.

    Raises:
        ValueError: the name is taken, or an annotation has no schema type.
    """

    def declare(body: Callable[..., Any]) -> OpDeclaration:
        if name in REGISTRY:
            raise ValueError(f"gw.{name} is declared twice")
        schema = torch.library.infer_schema(body, mutates_args=(), op_name=name)
        _LIBRARY.define(schema)
        _LIBRARY.impl(name, body, "CompositeImplicitAutograd")
        REGISTRY[name] = OpDeclaration(name, body, getattr(torch.ops.gw, name).default)
        return REGISTRY[name]

    return declare


def opaque_op(
    name: str, *, types: Callable[..., Any], in_float64: Callable[[dict[str, Any]], dict[str, Any]]
) -> Callable[[Callable[..., Any]], OpDeclaration]:
    """Declares an operator that no fake tensor can run through, since something other than torch computes it: `types` gives the types of
    its results, `in_float64` its keyword arguments where floats, operands and results, are float64, whatever it rounds them to inside. It
    has no gradient.

    Raises:
        ValueError: the name is taken, or an annotation has no schema type.
    """

    def declare(body: Callable[..., Any]) -> OpDeclaration:
        if name in REGISTRY:
            raise ValueError(f"gw.{name} is declared twice")
        _LIBRARY.define(torch.library.infer_schema(body, mutates_args=(), op_name=name))
        _LIBRARY.impl(name, body, "CompositeExplicitAutograd")
        torch.library.register_fake(f"gw::{name}", types, lib=_LIBRARY)
        REGISTRY[name] = OpDeclaration(name, body, getattr(torch.ops.gw, name).default, is_opaque=True, in_float64=in_float64)
        return REGISTRY[name]

    return declare


def declaration(target: Any) -> OpDeclaration | None:
    """The dialect operator that a call's target is; None of any other."""
    return REGISTRY.get(target.name().partition("::")[2]) if getattr(target, "namespace", "") == "gw" else None
