"""Calls on float64 values taken apart: the exporter writes a float attribute as a float32, such as a norm's eps, a slope or a scale, and
some operators of the standard compute in float32 whatever they read. What is left are calls whose scalars `scalars.py` makes constants."""

import functools
from typing import Any

import numpy as np
import torch
from torch import fx
from torch.fx.experimental.proxy_tensor import make_fx

from ...calls import is_assertion, name_of
from ...errors import CaptureError, first_line
from ...infer import operands_of, tensors_of
from ...program import Node
from ...symbols import SymbolTable
from .scalars import exact
from .translate import Piece

aten, prims = torch.ops.aten, torch.ops.prims

# Operators that are taken apart whatever their attributes: of the standard's some compute in float32 (LayerNormalization,
# GroupNormalization) or are made of float32 numbers (Selu, Celu, HardSigmoid, and Gelu by tanh).
_NEVER_EXACT = {
    aten.layer_norm.default,
    aten.native_layer_norm.default,
    aten.group_norm.default,
    aten.native_group_norm.default,
    aten.selu.default,
    aten.celu.default,
    aten.hardsigmoid.default,
    aten.hardswish.default,
    aten.gelu.default,
    aten.linalg_vector_norm.default,
}
_WITH_BODIES = (
    "native_layer_norm native_group_norm native_batch_norm _native_batch_norm_legit _native_batch_norm_legit_no_training _fused_rms_norm "
    "elu celu leaky_relu softplus hardsigmoid hardswish gelu threshold softshrink hardshrink logit linalg_vector_norm "
    "add sub rsub addcmul addcdiv addmm baddbmm lerp _scaled_dot_product_flash_attention_for_cpu _safe_softmax"
).split()
_OF_PRIMS = {
    prims.add.default: aten.add.Tensor,
    prims.sub.default: aten.sub.Tensor,
    prims.mul.default: aten.mul.Tensor,
    prims.div.default: aten.div.Tensor,
    prims.pow.default: aten.pow.Tensor_Tensor,
}


def has_float64(value: Any, args: Any) -> bool:
    """Whether a call of type `value` reads or gives float64 numbers."""
    types = [value, *(each.meta["val"] for each in operands_of(args))]
    return any(each.dtype == torch.float64 for type_ in types for each in tensors_of(type_))


def loses(target: Any, args: Any, kwargs: Any) -> bool:
    """Whether the exporter would write a call on float64 values as another one."""
    schema = getattr(target, "_schema", None)
    defaults = [each.default_value for each in schema.arguments if each.name not in kwargs][len(args) :] if schema else []
    numbers = [each for each in _leaves((args, kwargs, defaults)) if type(each) is float]
    return target in _NEVER_EXACT or any(float(np.float32(each)) != each for each in numbers)


def _leaves(value: Any) -> list[Any]:
    if isinstance(value, dict):
        return _leaves(list(value.values()))
    return [leaf for each in value for leaf in _leaves(each)] if isinstance(value, list | tuple) else [value]


def taken_apart(piece: Piece, symbols: SymbolTable, target: Any, args: Any, kwargs: Any, origin: Node | None) -> Any:
    """The result of a call, or the list of its results, as calls of its body.

    Raises:
        CaptureError: its body depends on data.
    """
    operands = list(dict.fromkeys(operands_of((args, kwargs))))

    def body(*values: Any) -> Any:
        given = dict(zip(operands, values, strict=True))
        own_args, own_kwargs = fx.map_arg((args, kwargs), given.__getitem__)
        return target(*own_args, **own_kwargs)

    try:
        with symbols.inference():
            # make_fx is not documented; it is how torch traces to ATen, in 2.11 to 2.13. "symbolic" keeps symbols, of which none is made
            # here: the operands' own types go in. Bodies of composites write in place, of which only what was traced can be rid.
            types = [each.meta["val"] for each in operands]
            with_writes = make_fx(body, None, "symbolic")(*types)
            traced = make_fx(torch.func.functionalize(with_writes), _bodies(), "symbolic")(*types)
    except Exception as error:
        where = "" if origin is None else f" at {origin.meta.get('where')}"
        raise CaptureError(f"{name_of(target)}{where} is of float64 and cannot be taken apart: {first_line(error)}") from error
    traced.graph.eliminate_dead_code()
    return _copied(piece, symbols, traced, operands, origin)


def _copied(piece: Piece, symbols: SymbolTable, traced: fx.GraphModule, operands: list[Node], origin: Node | None) -> Any:
    given, copies = iter(operands), dict[Node, Any]()
    for node in traced.graph.nodes:
        if node.op == "placeholder":
            copies[node] = next(given)
        elif node.op == "get_attr":
            copies[node] = piece.constant("constant", getattr(traced, str(node.target)), node.meta["val"])
        elif node.op == "call_function" and not is_assertion(node.target):
            args, kwargs = fx.map_arg((node.args, node.kwargs), copies.__getitem__)
            call = (_OF_PRIMS.get(node.target, node.target), args, kwargs)
            if has_float64(node.meta["val"], (args, kwargs)):
                call = exact(piece, symbols, *call)
            copies[node] = piece.call(*call, node.meta["val"], origin)
    result = fx.map_arg(traced.graph.output_node().args[0], copies.__getitem__)
    return list(result) if isinstance(result, tuple | list) else result


@functools.cache
def _bodies() -> dict[Any, Any]:
    from torch._decomp import get_decompositions  # torch's bodies of its operators, not documented, in 2.11 to 2.13

    return get_decompositions([getattr(aten, name) for name in _WITH_BODIES if hasattr(aten, name)])
