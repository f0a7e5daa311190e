"""What the caller receives: copies, views and equal values that come out side by side, which a pass must not let share memory anew."""

import torch

from ..builder import Builder
from ..values import Value
from .registry import maker

aten = torch.ops.aten
_SIMPLE = (aten.neg.default, aten.abs.default, aten.sin.default)


def _some(b: Builder) -> Value:
    """An input, a weight, or something computed."""
    x = b.operand(low=1)
    target = b.choices.pick(_SIMPLE)
    return b.call(target, x, low=-x.bound, high=x.bound) if b.choices.chance(70) else x


def _again(b: Builder, target: object, x: Value) -> Value:
    return b.call(target, x, low=-x.bound, high=x.bound)


@maker("outputs", weight=2)
def copies(b: Builder) -> None:
    """Two or three copies of one value, all or some of them returned."""
    x = _some(b)
    made = [_again(b, b.choices.pick((aten.clone.default, aten.alias.default)), x) for _ in range(b.choices.pick((2, 3)))]
    b.returned += b.choices.subset(made, 75)


@maker("outputs", weight=2)
def equals(b: Builder) -> None:
    """One expression two or three times, all or some of them returned, or what is made of them."""
    x, target = _some(b), b.choices.pick(_SIMPLE)
    made = [_again(b, target, x) for _ in range(b.choices.pick((2, 3)))]
    b.returned += [each if b.choices.chance(65) else b.call(aten.mul.Scalar, each, 0.5, low=-x.bound, high=x.bound) for each in made]


@maker("outputs")
def base_and_view(b: Builder) -> None:
    """A value beside a view of it, which do share memory, and a copy of the view, which does not."""
    x = _some(b)
    view = _again(b, aten.detach.default, b.call(aten.unsqueeze.default, x, 0, low=x.low, high=x.high))
    b.returned += [x, view] if b.choices.chance(50) else [view, _again(b, aten.clone.default, view)]
