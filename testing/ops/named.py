"""A maker for any one operation by its schema: tensors are drawn so that they broadcast, numbers are small, defaults stay."""

from collections.abc import Callable
from typing import Any

from ..builder import Builder, Rejected
from ..values import Value

_NUMBERS: dict[str, tuple[Any, ...]] = {
    "int": (1, 0, 2, -1),
    "float": (1.0, 0.5, 0.0),
    "number": (2, 1, 0.5, 0, -1.0),
    "bool": (False, True),
}
_FACTORS = (2, 1, 0.5, -1.0, 7.0)


def maker_of(target: Any) -> Callable[[Builder], object]:
    """Makes calls of `target`, an overload such as torch.ops.aten.relu.default.

    What its operands must fit beyond broadcasting, or which numbers it takes, is not known: calls that do not type-check are dropped.
    """

    def call_it(b: Builder) -> Value | list[Value]:
        arguments: list[Any] = []
        for argument in target._schema.arguments:
            if not argument.has_default_value():
                arguments.append(_drawn(b, argument, [value for value in arguments if isinstance(value, Value)]))
        several = len(target._schema.returns) > 1
        return b.calls_of(target, *arguments) if several else b.call(target, *arguments)

    call_it.__name__ = str(target)
    return call_it


def _drawn(b: Builder, argument: Any, others: list[Value]) -> Any:
    kind = str(argument.real_type if hasattr(argument, "real_type") else argument.type)
    if kind == "Tensor" and others and argument.name == "other" and b.choices.chance(30):
        return b.choices.pick(_FACTORS)  # torch.export writes x / 7.0 so
    if kind == "Tensor":
        return b.partner(others[0]) if others else b.operand()
    if kind == "List[Tensor]":
        first = b.operand(low=1)
        return [first, b.like(first)]
    if kind.startswith("Optional"):
        return None
    if kind == "List[int]":
        return [b.choices.pick((0, -1))]
    if kind not in _NUMBERS:
        raise Rejected(f"no {kind} is known to draw")
    return b.choices.pick(_NUMBERS[kind])
