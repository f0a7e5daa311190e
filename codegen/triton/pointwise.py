"""What each pointwise operation is in Triton: an expression over blocks, and what an element costs.

Floats are computed in float32, float64 in float64, and a result is rounded where it is stored or where the program casts, not between.
Where ATen keeps NaN (`relu`, `clamp`, `maximum`), so do these. `{0}`, `{1}` stand for the operands.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from ...ir import Node

aten = torch.ops.aten


class NotFusible(Exception):
    """Why a node, or a set of nodes, is no Triton kernel."""


@dataclass(frozen=True)
class Pointwise:
    """`text` over `operands`; `flops` an element; `compares` gives a bool whatever is compared.

    `operands` are nodes and numbers. `helpers` are the functions of the file that `text` calls.
    """

    text: str
    operands: tuple[Any, ...]
    flops: int = 1
    compares: bool = False
    helpers: tuple[str, ...] = ()

    @property
    def is_expensive(self) -> bool:
        """Whether repeating it for every element of a broadcast costs more than reading a stored result."""
        return self.flops >= 8


# name of a function in the generated file -> its source
HELPERS = {
    "tanh": '''@triton.jit
def tanh(x):
    """(1 - e) / (1 + e) with e = exp(-2|x|), which cannot overflow; its series where 1 - e would cancel."""
    e = tl.exp(-2.0 * tl.abs(x))
    square = x * x
    near = x * (1.0 - square * (1.0 / 3.0 - square * (2.0 / 15.0 - square * (17.0 / 315.0))))
    far = (1.0 - e) / (1.0 + e)
    return tl.where(square < 0.0025, near, tl.where(x < 0.0, -far, far))
''',
    "sigmoid": """@triton.jit
def sigmoid(x):
    return 1.0 / (1.0 + tl.exp(-x))
""",
}

_UNARY = {
    "neg": ("-{0}", 1),
    "abs": ("tl.abs({0})", 1),
    "exp": ("tl.exp({0})", 8),
    "exp2": ("tl.exp2({0})", 8),
    "log": ("tl.log({0})", 8),
    "log2": ("tl.log2({0})", 8),
    "sqrt": ("tl.sqrt({0})", 4),
    "rsqrt": ("tl.rsqrt({0})", 4),
    "reciprocal": ("1.0 / {0}", 4),
    "sin": ("tl.sin({0})", 16),
    "cos": ("tl.cos({0})", 16),
    "erf": ("tl.erf({0})", 16),
    "floor": ("tl.floor({0})", 1),
    "ceil": ("tl.ceil({0})", 1),
    "relu": ("tl.where({0} < 0.0, 0.0, {0})", 1),
    "tanh": ("tanh({0})", 12),
    "sigmoid": ("sigmoid({0})", 10),
    "silu": ("{0} * sigmoid({0})", 11),
    "clone": ("{0}", 0),
}
_GELU = {
    "none": Pointwise("0.5 * {0} * (1.0 + tl.erf({0} * 0.7071067811865476))", (), 20),
    "tanh": Pointwise("0.5 * {0} * (1.0 + tanh(0.7978845608028654 * ({0} + 0.044715 * {0} * {0} * {0})))", (), 20, helpers=("tanh",)),
}
_COMPARISONS = {"eq": "==", "ne": "!=", "lt": "<", "le": "<=", "gt": ">", "ge": ">="}
_LOGICAL = {"logical_and": "&", "logical_or": "|", "bitwise_and": "&", "bitwise_or": "|", "__and__": "&", "__or__": "|"}
_POWERS = {-2: "1.0 / ({0} * {0})", -1: "1.0 / {0}", 0.5: "tl.sqrt({0})", -0.5: "tl.rsqrt({0})", 1: "{0}"}

Rule = Callable[[dict[str, Any]], Pointwise]


def arguments_of(node: Node) -> dict[str, Any]:
    """A call's arguments by the names of its schema, defaults filled in."""
    schema: Any = node.target._schema  # type: ignore[union-attr]
    named = {argument.name: argument.default_value for argument in schema.arguments if argument.has_default_value()}
    named |= dict(zip((argument.name for argument in schema.arguments), node.args))
    return named | dict(node.kwargs)


def pointwise(node: Node) -> Pointwise | None:
    """What `node` computes of each element; None for an operation that is not pointwise.

    Raises:
        NotFusible: it is, but not with these attributes.
    """
    if not isinstance(node.target, torch._ops.OpOverload) or node.target not in _RULES:
        return None
    return _RULES[node.target](arguments_of(node))


def _unary(name: str) -> Rule:
    text, flops = _UNARY[name]
    helpers = tuple(helper for helper in HELPERS if f"{helper}(" in text)
    return lambda a: Pointwise(text, (a["self"],), flops, helpers=helpers)


def _gelu(a: dict[str, Any]) -> Pointwise:
    rule = _GELU[a["approximate"]]
    return Pointwise(rule.text, (a["self"],), rule.flops, helpers=rule.helpers)


def _sum(sign: str) -> Rule:
    def rule(a: dict[str, Any]) -> Pointwise:
        alpha = a.get("alpha", 1)
        if alpha == 1:
            return Pointwise(f"{{0}} {sign} {{1}}", (a["self"], a["other"]))
        return Pointwise(f"{{0}} {sign} {{2}} * {{1}}", (a["self"], a["other"], alpha), 2)

    return rule


def _reversed_difference(a: dict[str, Any]) -> Pointwise:
    if a["alpha"] != 1:
        raise NotFusible("rsub with alpha")
    return Pointwise("{1} - {0}", (a["self"], a["other"]))


def _quotient(a: dict[str, Any]) -> Pointwise:
    if a.get("rounding_mode") is not None:
        raise NotFusible("division that rounds")
    return Pointwise("{0} / {1}", (a["self"], a["other"]), 4)


def _power(a: dict[str, Any]) -> Pointwise:
    exponent = a["exponent"]
    if exponent in _POWERS:
        return Pointwise(_POWERS[exponent], (a["self"],), 4)
    if not isinstance(exponent, int | float) or exponent not in (2, 3, 4):
        raise NotFusible(f"the power {exponent}")
    return Pointwise(" * ".join(["{0}"] * int(exponent)), (a["self"],), int(exponent) - 1)


def _clamp(a: dict[str, Any]) -> Pointwise:
    text, operands = "{0}", [a["self"]]
    if a.get("min") is not None:
        operands.append(a["min"])
        text = f"tl.where({text} < {{{len(operands) - 1}}}, {{{len(operands) - 1}}}, {text})"
    if a.get("max") is not None:
        operands.append(a["max"])
        text = f"tl.where({text} > {{{len(operands) - 1}}}, {{{len(operands) - 1}}}, {text})"
    return Pointwise(text, tuple(operands), 2)


def _extreme(comparison: str) -> Rule:
    # x == x holds for all but NaN, which ATen's maximum and minimum return.
    text = f"tl.where({{0}} {comparison} {{1}}, {{0}}, tl.where({{0}} == {{0}}, {{1}}, {{0}}))"
    return lambda a: Pointwise(text, (a["self"], a["other"]), 2)


def _comparison(name: str) -> Rule:
    return lambda a: Pointwise(f"{{0}} {_COMPARISONS[name]} {{1}}", (a["self"], a["other"]), compares=True)


def _logical(name: str) -> Rule:
    return lambda a: Pointwise(f"{{0}} {_LOGICAL[name]} {{1}}", (a["self"], a["other"]))


def _where(a: dict[str, Any]) -> Pointwise:
    return Pointwise("tl.where({0}, {1}, {2})", (a["condition"], a["self"], a["other"]))


def _masked_fill(a: dict[str, Any]) -> Pointwise:
    return Pointwise("tl.where({0}, {1}, {2})", (a["mask"], a["value"], a["self"]))


def _addcmul(a: dict[str, Any]) -> Pointwise:
    if a["value"] != 1:
        raise NotFusible("addcmul with a value")
    return Pointwise("{0} + {1} * {2}", (a["self"], a["tensor1"], a["tensor2"]), 2)


def _leaky_relu(a: dict[str, Any]) -> Pointwise:
    return Pointwise("tl.where({0} < 0.0, {0} * {1}, {0})", (a["self"], a["negative_slope"]), 2)


def _cast(a: dict[str, Any]) -> Pointwise:
    return Pointwise("{0}", (a["self"],), 0)


_RULES: dict[Callable[..., Any], Rule] = {
    **{getattr(aten, name).default: _unary(name) for name in _UNARY},
    **{getattr(getattr(aten, name), kind): _comparison(name) for name in _COMPARISONS for kind in ("Tensor", "Scalar")},
    aten.gelu.default: _gelu,
    aten.add.Tensor: _sum("+"),
    aten.sub.Tensor: _sum("-"),
    aten.add.Scalar: _sum("+"),
    aten.sub.Scalar: _sum("-"),
    aten.rsub.Scalar: _reversed_difference,
    aten.mul.Tensor: lambda a: Pointwise("{0} * {1}", (a["self"], a["other"])),
    aten.mul.Scalar: lambda a: Pointwise("{0} * {1}", (a["self"], a["other"])),
    aten.div.Tensor: _quotient,
    aten.div.Scalar: _quotient,
    aten.pow.Tensor_Scalar: _power,
    aten.square.default: lambda a: Pointwise("{0} * {0}", (a["self"],)),
    aten.clamp.default: _clamp,
    aten.clamp_min.default: _clamp,
    aten.clamp_max.default: _clamp,
    aten.maximum.default: _extreme(">"),
    aten.minimum.default: _extreme("<"),
    aten.logical_and.default: _logical("logical_and"),
    aten.logical_or.default: _logical("logical_or"),
    **{getattr(aten, name).Tensor: _logical(name) for name in ("bitwise_and", "bitwise_or", "__and__", "__or__")},
    aten.logical_not.default: lambda a: Pointwise("{0} == 0", (a["self"],), compares=True),
    aten.isnan.default: lambda a: Pointwise("{0} != {0}", (a["self"],), compares=True),
    **{getattr(aten.where, kind): _where for kind in ("self", "ScalarSelf", "ScalarOther", "Scalar")},
    aten.masked_fill.Scalar: _masked_fill,
    aten.masked_fill.Tensor: _masked_fill,
    aten.addcmul.default: _addcmul,
    aten.leaky_relu.default: _leaky_relu,
    aten._to_copy.default: _cast,
}
