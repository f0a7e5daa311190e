"""Operations that jump: where a value stands at the edge of a comparison, an argmax or a rounding, no rewrite can be judged by it.

An exact rewrite may move what such an operation reads by a few roundings, and the other side of its jump is then as right as this one.
Source: specs/trust.md, section 3.1, which asks for a margin of 1,000 times the noise at discontinuous operations.
"""

from typing import TYPE_CHECKING, Any

import torch

from ..ir import Node
from ..ir.calls import name_of
from ..ir.derive import ancestors
from ..ir.float64 import WIDENING
from ..ir.infer import tensors_of
from .outputs import leaves_of
from .verdict import Verdict

if TYPE_CHECKING:
    from .check import Reference

_RUNS = 3
_MARGIN = 1000.0  # of float64's rounding
_OWN_MARGIN = 4.0  # of the working dtype's: the numerics rule lets a candidate be as many times as far off as the original
_STEP = 0.25  # floor and round jump by 1, sign by more; what only follows its operand moves by rounding

_aten = torch.ops.aten
_STEPS = {
    _aten.floor.default,
    _aten.ceil.default,
    _aten.round.default,
    _aten.round.decimals,
    _aten.trunc.default,
    _aten.fix.default,
    _aten.frac.default,
    _aten.sign.default,
    _aten.sgn.default,
    _aten.heaviside.default,
    _aten.floor_divide.default,
    _aten.div.Tensor_mode,
    _aten.remainder.Tensor,
    _aten.remainder.Scalar,
    _aten.fmod.Tensor,
    _aten.fmod.Scalar,
}


def first_jump(reference: "Reference", verdict: Verdict) -> str:
    """Why the failing `verdict` settles nothing: the first call behind its output that jumps when the original's values move by
    roundings; "" when there is none."""
    assert verdict.worst is not None
    leaf = leaves_of(reference.program)[verdict.worst.output]
    behind = ancestors([leaf]) if isinstance(leaf, Node) else set()
    jumping = [n for n, node in enumerate(_calls(reference, wide=False)) if node in behind and _may_jump(node)]
    if not jumping:
        return ""
    clean = _values(reference, jumping, seed=0, scale=0.0, wide=True)
    others = [_values(reference, jumping, seed, _MARGIN, wide=True) for seed in range(_RUNS)]
    if verdict.kind == "unstable":
        others += [_values(reference, jumping, seed, _OWN_MARGIN, wide=False) for seed in range(_RUNS)]
    for other in others:
        for place, (a, b) in enumerate(zip(clean, other, strict=True)):
            if _jumped(a, b):
                node = _calls(reference, wide=False)[jumping[place]]
                return f"{name_of(node.target)} stands so near a jump that rounding takes it across on these inputs"
    return ""


def _calls(reference: "Reference", *, wide: bool) -> list[Node]:
    """The calls of the program, or those of its float64 program in the same places."""
    return [node for node in (reference.wide_program if wide else reference.program).main.calls if WIDENING not in node.meta]


def _values(reference: "Reference", places: list[int], seed: int, scale: float, *, wide: bool) -> list[Any]:
    """What the calls at `places` of the program's list give in one run."""
    calls = _calls(reference, wide=wide)
    wanted = {calls[place]: None for place in places}
    seen: dict[Node, Any] = {}
    reference.observed(seed, scale, lambda node, value: seen.update({node: value}) if node in wanted else None, wide=wide)
    return [seen[node] for node in wanted]


def _may_jump(node: Node) -> bool:
    """Whether the call gives integers of floats, or floats by steps."""
    reads_floats = any(t.dtype.is_floating_point for source in node.all_input_nodes for t in tensors_of(source.meta["val"]))
    gives_others = any(not t.dtype.is_floating_point for t in tensors_of(node.meta["val"]))
    return reads_floats and (gives_others or node.target in _STEPS)


def _jumped(a: Any, b: Any) -> bool:
    if isinstance(a, tuple | list):
        return any(map(_jumped, a, b))
    if not isinstance(a, torch.Tensor) or a.dtype.is_complex:
        return False
    if not a.dtype.is_floating_point:
        return not torch.equal(a, b)
    return bool(((a - b.to(a.dtype)).abs() > _STEP).any())
