"""Buffers that a call changes: running means, caches written at a place, windows that shift."""

import torch

from ..builder import Builder
from ..values import Value
from .registry import maker

aten = torch.ops.aten


@maker("state", weight=2)
def running_mean(b: Builder) -> Value:
    x = b.within(b.operand(low=1, high=2), 100.0)
    last = b.static(x.shape[-1])
    state = b.state((last,), x.dtype)
    row = x if x.rank == 1 else b.call(aten.sum.dim_IntList, b.within(x, 5.0), list(range(x.rank - 1)), low=-1e4, high=1e4)
    old = b.call(aten.mul.Scalar, state, 0.9, low=0.0, high=1.0)
    new = b.call(aten.add.Tensor, old, row, alpha=0.1, low=-1e4, high=1e4)
    b.states[str(state.node.target)] = new
    return new


@maker("state")
def cache(b: Builder) -> Value:
    slots, depth = b.choices.pick((8, 4)), b.choices.pick((4, 2))
    state = b.state((slots, depth))
    row = b.leaf((1, depth), torch.float32)
    place = b.index(b.leaf((1,), torch.int64), slots)
    new = b.call(aten.index_put.default, state, [place], row, low=row.low, high=row.high)
    b.states[str(state.node.target)] = new
    return new


@maker("state")
def shifted_window(b: Builder) -> Value:
    length, depth = b.choices.pick((4, 3)), b.choices.pick((4, 2))
    state = b.state((length, depth))
    rest = b.call(aten.slice.Tensor, state, 0, 1, 2**63 - 1, low=0.0, high=1.0)
    row = b.leaf((1, depth), torch.float32)
    new = b.call(aten.cat.default, [rest, row], 0, low=min(row.low, 0.0), high=max(row.high, 1.0))
    b.states[str(state.node.target)] = new
    return b.call(aten.sum.dim_IntList, new, [0], low=-1000.0, high=1000.0)
