"""Bytes that a CPU kernel allocates beside its operands and results, as measured with torch 2.13.

Where a kernel wants an operand in another layout, it makes a copy: oneDNN's convolutions take input and weight in blocks, norms
take contiguous input. Attention keeps a tile of scores for each thread. Plans must not depend on the thread count of the machine
that makes them, so a nominal one stands in unless the caller knows better.
"""

from collections.abc import Callable, Collection
from typing import Any

from ..pattern import named_arguments
from ..program import Node
from .attention import attention, causal_attention
from .convolution import convolution, transposed_convolution
from .experts import expert_choice, expert_mlp, grouped_mm, token_choice_moe
from .kernels import RULES as KERNEL_RULES
from .kernels import upsample_nearest
from .kv_cache import cached_attention
from .low_rank import lowrank_linear
from .operands import Part, Workspace
from .rat import rat_attention, rat_cached_attention

__all__ = ["NOMINAL_THREADS", "Workspace", "slice_workspace", "workspace"]

NOMINAL_THREADS = 2

# Rules by which the scratch of a slice is not its share of the whole's: another kernel or tile serves small sizes.
_RULES_OF_SLICES: dict[str, Callable[[dict[str, Any], Node, int, Part], Workspace]] = {
    "aten::conv1d": convolution,
    "aten::conv2d": convolution,
    "aten::conv3d": convolution,
    "aten::conv_transpose1d": transposed_convolution,
    "aten::conv_transpose2d": transposed_convolution,
    "aten::conv_transpose3d": transposed_convolution,
    "aten::scaled_dot_product_attention": attention,
    "aten::upsample_nearest2d": upsample_nearest,
    "aten::_upsample_nearest_exact2d": upsample_nearest,
    "gw::causal_attention": causal_attention,
    "gw::cached_attention": cached_attention,
}

_RULES: dict[str, Callable[..., Workspace]] = {
    **KERNEL_RULES,
    **_RULES_OF_SLICES,
    "gw::lowrank_linear": lowrank_linear,
    "gw::token_choice_moe": token_choice_moe,
    "gw::expert_choice": expert_choice,
    "gw::expert_mlp": expert_mlp,
    "gw::grouped_mm": grouped_mm,
    "gw::rat_attention": rat_attention,
    "gw::rat_cached_attention": rat_cached_attention,
}


def workspace(node: Node, threads: int = NOMINAL_THREADS) -> Workspace:
    """The scratch of one call, symbols at their hints; none for an operation that is not known to need any."""
    name = getattr(getattr(node.target, "_schema", None), "name", "")
    rule = _RULES.get(name)
    return rule(named_arguments(node), node, threads) if rule is not None else Workspace()


def slice_workspace(node: Node, dim: int, length: int, units: int, threads: int = NOMINAL_THREADS, views: Collection[Node] = ()) -> int:
    """Scratch bytes of a call on `length` of the `units` units that lie along `dim` of its result; of the operands in `views` it
    takes views, not slices with memory of their own."""
    name = getattr(getattr(node.target, "_schema", None), "name", "")
    if name in _RULES_OF_SLICES:
        return _RULES_OF_SLICES[name](named_arguments(node), node, threads, Part(dim, length, units, views)).total
    moving, fixed = workspace(node, threads)
    return moving * length // units + fixed
