"""The closed vocabulary of what a node may call: ATen and dialect operators, and a few functions on sizes.

A name resolves through a dictionary built from torch's own operator list, never by attribute access, so text that names
`torch.ops.load_library` or a dunder is unknown like any other misspelling. Operators that touch files or raw storage are
left out: `aten.from_file` reads any path that it is given.
"""

import functools
import math
import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

GETITEM = operator.getitem

# Arithmetic on sizes, as torch.export writes it between SymInts.
SIZE_FUNCTIONS: dict[str, Callable[..., Any]] = {
    "getitem": operator.getitem,
    "sym.add": operator.add,
    "sym.sub": operator.sub,
    "sym.mul": operator.mul,
    "sym.floordiv": operator.floordiv,
    "sym.truediv": operator.truediv,
    "sym.mod": operator.mod,
    "sym.neg": operator.neg,
    "sym.pow": operator.pow,
    "sym.eq": operator.eq,
    "sym.ne": operator.ne,
    "sym.lt": operator.lt,
    "sym.le": operator.le,
    "sym.gt": operator.gt,
    "sym.ge": operator.ge,
    "sym.and": operator.and_,
    "sym.or": operator.or_,
    "sym.abs": operator.abs,
    "sym.max": torch.sym_max,
    "sym.min": torch.sym_min,
    "sym.not": torch.sym_not,
    "sym.float": torch.sym_float,
    "sym.int": torch.sym_int,
    "sym.ite": torch.sym_ite,
    "sym.sqrt": torch.sym_sqrt,
    "sym.ceil": math.ceil,
    "sym.floor": math.floor,
    "sym.trunc": math.trunc,
    "sym.round": round,
}
_SIZE_FUNCTION_NAMES = {function: name for name, function in SIZE_FUNCTIONS.items()}

_NAMESPACES = ("aten", "gw", "prims", "quantized_decomposed")
_FORBIDDEN = {"from_file", "save", "set_", "set", "_from_file", "resize_", "_resize_output_", "data", "_print"}
# Of the type of these torch makes the numbers themselves, gigabytes where a short text asks for them.
_FORBIDDEN |= {"histogramdd", "_histogramdd_bin_edges", "_histogramdd_from_bin_cts", "_histogramdd_from_bin_tensors"}
# C++ that crashes the process on operands that do not fit together, and what belongs to torch.vmap.
_FORBIDDEN |= {"_thnn_differentiable_gru_cell_backward", "_thnn_differentiable_lstm_cell_backward", "_add_batch_dim", "_remove_batch_dim"}
_FORBIDDEN |= {"_foreach_copy", "_nnpack_spatial_convolution", "_stack"}
_FORBIDDEN |= {"fractional_max_pool2d_backward", "fractional_max_pool3d_backward"}
# torch's own types of these are wrong: plain float32 for a tensor of quantised elements.
_FORBIDDEN |= {"quantize_per_tensor", "quantize_per_channel", "quantize_per_tensor_dynamic"}


def _is_forbidden(packet: str) -> bool:
    return packet in _FORBIDDEN or packet.startswith(("sparse_", "_sparse_", "quantized_"))  # of tensors that the IR does not have


@functools.cache
def operator_names() -> frozenset[str]:
    """The operators of torch and of the dialect that a program may call, as texts name them."""
    names = set()
    for qualified in torch._C._dispatch_get_all_op_names():
        namespace, _, rest = qualified.partition("::")
        packet, _, overload = rest.partition(".")
        if namespace in _NAMESPACES and not _is_forbidden(packet):
            names.add(f"{namespace}.{packet}.{overload or 'default'}")
    return frozenset(names)


def name_of(target: Callable[..., Any]) -> str:
    """The name under which `target` is written: `aten.linear.default`, `gw.norm_stats.default`, `sym.mul`.

    Raises:
        KeyError: `target` is outside the vocabulary.
    """
    if isinstance(target, torch._ops.OpOverload):
        namespace, _, packet = target._schema.name.partition("::")
        if namespace not in _NAMESPACES or _is_forbidden(packet):
            raise KeyError(str(target))
        return str(target)
    if isinstance(target, torch._ops.HigherOrderOperator) and target.name() == "sliced":
        return "gw.sliced"
    return _SIZE_FUNCTION_NAMES[target]


def target_of(name: str) -> Callable[..., Any]:
    """The callable that `name` stands for.

    Raises:
        KeyError: the name is outside the vocabulary.
    """
    if name in SIZE_FUNCTIONS:
        return SIZE_FUNCTIONS[name]
    if name == "gw.sliced":
        from .region import sliced

        return sliced
    if name not in operator_names():
        operator_names.cache_clear()  # an operator may have been declared since; listing all takes 2 ms
        if name not in operator_names():
            raise KeyError(name)
    namespace, packet, overload = name.split(".")
    return getattr(getattr(getattr(torch.ops, namespace), packet), overload)


def is_random(target: Callable[..., Any]) -> bool:
    """Whether two calls with the same operands may differ because `target` draws from a generator."""
    return isinstance(target, torch._ops.OpOverload) and torch.Tag.nondeterministic_seeded in target.tags


def draws(node: Any) -> bool:
    """Whether a call draws random numbers: attention and recurrent layers without dropout, and what is not in training, do not."""
    if not is_random(node.target):
        return False
    named = dict(zip((a.name for a in node.target._schema.arguments), node.args, strict=False)) | dict(node.kwargs)
    name = node.target._schema.name
    if name == "aten::scaled_dot_product_attention":
        return named.get("dropout_p", 0.0) != 0.0
    if name in ("aten::lstm", "aten::gru", "aten::rnn_tanh", "aten::rnn_relu"):
        return named.get("train") is not False and named.get("dropout") != 0.0
    if name in ("aten::dropout", "aten::feature_dropout", "aten::alpha_dropout", "aten::feature_alpha_dropout", "aten::native_dropout"):
        return named.get("train") is not False and named.get("p", 0.5) != 0.0
    return True


def is_size_function(target: Callable[..., Any]) -> bool:
    """Whether `target` is arithmetic on sizes and numbers (`sym.*`)."""
    return target is not GETITEM and target in _SIZE_FUNCTION_NAMES


def is_mutating(target: Callable[..., Any]) -> bool:
    """Whether `target` writes to an operand."""
    return isinstance(target, torch._ops.OpOverload) and target._schema.is_mutable


_IF_TRAINING = {
    "aten::instance_norm": "use_input_stats",
    **dict.fromkeys(["aten::batch_norm", "aten::native_batch_norm", "aten::_batch_norm_impl_index"], "training"),
    **dict.fromkeys(["aten::cudnn_batch_norm", "aten::miopen_batch_norm"], "training"),
    **dict.fromkeys(["aten::batch_norm_update_stats", "aten::batch_norm_gather_stats", "aten::batch_norm_gather_stats_with_counts"]),
}


def written_statistics(target: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The running statistics that `target(*args, **kwargs)` writes, by parameter name: in training it does, though its schema says no."""
    schema = getattr(target, "_schema", None)
    if schema is None or schema.name not in _IF_TRAINING:
        return {}
    named = dict(zip((a.name for a in schema.arguments), args, strict=False)) | dict(kwargs)
    if named.get(_IF_TRAINING[schema.name] or "", True) is False:
        return {}
    return {name: named[name] for name in ("running_mean", "running_var") if named.get(name) is not None}


_ASSERTIONS = {"_assert_tensor_metadata", "_assert_scalar", "_assert_async", "sym_constrain_range", "sym_constrain_range_for_size"}


def is_assertion(target: Callable[..., Any]) -> bool:
    """Whether `target` computes nothing and only checks its operands."""
    return isinstance(target, torch._ops.OpOverload) and target._schema.name.partition("::")[2] in _ASSERTIONS


def is_pure(node: Any) -> bool:
    """Whether a call may be dropped when unused, and shared when repeated."""
    return not (draws(node) or is_mutating(node.target) or is_assertion(node.target))
