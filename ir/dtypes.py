"""Operands that metadata lets pass and kernels refuse, by dtype: told while the user's line is known, not by the first call."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import fx

from .errors import InputError
from .program import Node, Where

_ONE_DTYPE = frozenset(
    ["linear", "matmul", "mm", "bmm", "mv", "addmm", "addmv", "baddbmm", "scaled_dot_product_attention", "cdist", "grid_sampler"]
    + ["conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d", "convolution"]
    + ["index_put", "binary_cross_entropy"]
)
_NORMS = frozenset(["layer_norm", "group_norm", "batch_norm", "instance_norm", "native_layer_norm", "native_group_norm"])
_NORMS |= {"_native_batch_norm_legit_no_training", "_native_batch_norm_legit_functional"}
_FLOATING = frozenset(["softmax", "log_softmax", "gelu", "silu", "hardswish", "mish", "glu", "std", "var"])


def check_dtypes(target: Any, args: Sequence[Any], kwargs: Mapping[str, Any], where: Where, graph: fx.Graph) -> None:
    """Raises InputError if `target` is an operation that has no kernel for operands of these dtypes."""
    family = str(getattr(target, "_schema", None) and target._schema.name).removeprefix("aten::")
    operands = [a for a in args if isinstance(a, Node) and isinstance(a.meta["val"], torch.Tensor)]
    if not operands:
        return
    place, first = f"{family} at {str(where) or 'unknown line'}", operands[0]
    if family in _FLOATING and not any(isinstance(a, torch.dtype) for a in (*args, *kwargs.values())):
        if not (_dtype(first).is_floating_point or _dtype(first).is_complex):
            raise InputError(f"{place} is given {_operand(first, graph)}, and takes floating-point values only: give it .float()")
    if family not in _ONE_DTYPE and family not in _NORMS:
        return
    if family == "scaled_dot_product_attention":
        operands = operands[:3]  # a mask may be of another dtype
    other = next((b for b in operands[1:] if _clash(family, _dtype(first), _dtype(b))), None)
    if other is not None:
        given = f"{_operand(first, graph)} and {_operand(other, graph)}"
        advice = "give example inputs of the weights' dtype, or convert the module"
        raise InputError(f"{place} is given {given}, which it cannot combine: {advice}")


def _dtype(node: Node) -> torch.dtype:
    return node.meta["val"].dtype


def _operand(node: Node, graph: fx.Graph) -> str:
    """The operand by name and dtype; of a computed one also the inputs of that dtype, which it is likely to come from."""
    dtype = _dtype(node)
    kind = {"placeholder": "input", "get_attr": "weight"}.get(node.op)
    if kind is not None:
        return f"{kind} {node.target} of {dtype}"
    inputs = [str(n.target) for n in graph.nodes if n.op == "placeholder" and getattr(n.meta["val"], "dtype", None) == dtype]
    return f"a value of {dtype}" + (f", as is input {', '.join(inputs)}," if inputs else "")


def _clash(family: str, a: torch.dtype, b: torch.dtype) -> bool:
    """Norms of half precision take float32 parameters."""
    return a != b and (family in _ONE_DTYPE or not (a in (torch.float16, torch.bfloat16) and b == torch.float32))
