"""Values that grow between narrow ends, which is where running slice by slice saves memory.

A value is spread along one dim, calls of another family are made with it, and what comes out is summed along its longest dim. There is a
maker for each of that family's, such as `wide.shapes_permute`.
"""

import torch

from ...ir.symbols import hint
from ..builder import Builder, Rejected
from ..values import FLOATS, LIMIT, Value
from . import attention, convolutions, elementwise, indexing, norms, products, reductions, shapes
from .registry import MAKERS, Maker, maker

aten = torch.ops.aten

_INSIDE = (elementwise, shapes, reductions, products, indexing, norms, attention, convolutions)


def _between(inside: Maker, family: str) -> Maker:
    def wide(b: Builder) -> Value:
        x = _spread(b)
        around, b.values = b.values, [x]
        try:
            for _ in range(b.choices.pick((1, 1, 2))):
                inside(b)
                b.values = [*b.values[:-1], _active(b, _last(b))]
            narrow = _summed(b, _last(b))
            if b.choices.chance(30):
                b.returned.append(_summed(b, x))
        finally:
            b.values = [*around, *b.values[1:]]
        return narrow

    wide.__name__ = f"{family}_{inside.__name__}"
    return wide


def _spread(b: Builder) -> Value:
    """An activation of x * w, x of 1 along the dim that w has: [N, M, K], or [N, C, H, W] with many channels or many columns."""
    n, m, length = b.choices.pick((2, 1, 5)), b.choices.pick((8, 5, 3)), b.choices.pick((32, 16, 64))
    shape, dim = b.choices.pick((([n, m, length], 2), ([1, 16, m, 8], 1), ([n, 2, m, 16], 3), ([8, 8, 8], 2)))
    x = b.within(b.leaf([1 if d == dim else size for d, size in enumerate(shape)], b.float_dtype()), 16.0)
    w = b.weight([size if d == dim else 1 for d, size in enumerate(shape)], x.dtype, low=-1.0, high=1.0)
    return _active(b, b.call(aten.mul.Tensor, x, w, low=-16.0, high=16.0))


def _last(b: Builder) -> Value:
    """The last value of floats.

    Raises:
        Rejected: there is none.
    """
    found = next((value for value in reversed(b.values) if value.is_float), None)
    if found is None:
        raise Rejected
    return found


def _active(b: Builder, x: Value) -> Value:
    return b.call(b.choices.pick((aten.tanh.default, aten.sin.default)), b.within(x, 64.0), low=-1.0, high=1.0)


def _summed(b: Builder, x: Value) -> Value:
    if not x.rank:
        return x
    longest = max(range(x.rank), key=lambda dim: hint(x.shape[dim]))
    bound = min(x.bound * max(hint(x.shape[longest]), 1), LIMIT)
    return b.call(aten.sum.dim_IntList, x, [longest], low=-bound, high=bound)


@maker("wide", weight=4)
def temporal(b: Builder) -> Value:
    """Convolutions along time with norms between and a residual, as video networks have them: what is next to each other within an image
    meets in the statistics alone."""
    channels, groups = b.choices.pick((8, 4)), b.choices.pick((2, 1, 4))
    sizes = (1, channels, b.choices.pick((2, 3)), b.choices.pick((8, 5, 7)), 8)
    x = b.call(aten.sin.default, b.within(b.leaf(sizes, b.choices.pick((*FLOATS[:1] * 3, *FLOATS))), 16.0), low=-1.0, high=1.0)
    y = x
    for _ in range(2):
        affine = [b.weight((channels,), x.dtype) if b.choices.chance(70) else None for _ in range(2)]
        norm = b.call(aten.group_norm.default, y, groups, *affine, b.choices.pick((1e-5, 0.1)), low=-300.0, high=300.0)
        weight = b.weight((channels, channels, 3, 1, 1), x.dtype, low=-1.0, high=1.0)
        y = b.call(aten.conv3d.default, b.call(aten.silu.default, norm, low=-0.5, high=300.0), weight, None, [1, 1, 1], [1, 0, 0])
    return b.call(aten.add.Tensor, x, b.within(y, LIMIT / 2))


for _room in _INSIDE:
    _family = _room.__name__.rpartition(".")[2]
    for _inside in dict.fromkeys(MAKERS[_family]):
        maker("wide")(_between(_inside, _family))
