"""Which calls of a program one call on a packed weight stands for: a product or a convolution with a constant weight, alone or with
what follows it.

    linear(x, W, b), addmm(b, x, W'), mm(x, W'), matmul(x, W')            -> a linear
    conv2d(x, W, b), conv3d(x, W, b)                                      -> a convolution
    gelu | silu | sigmoid | tanh (one of these)                           -> the same with an activation
    linear + residual, linear * gate, convolution + residual              -> the same with one more operand

What follows is taken where nothing else reads the value between. All is on the CPU, convolutions in float32, products in float32 or
bfloat16.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from ..ir import Node
from ..ir.infer import same_strides, same_tensor_type
from ..ir.symbols import hint
from .cpu_packed import PackedCall, PackedConvolution, PackedLinear, is_channels_innermost, is_dense

aten = torch.ops.aten
IsConstant = Callable[[Any], bool]

_ACTIVATIONS = {aten.silu.default: "silu", aten.sigmoid.default: "sigmoid", aten.tanh.default: "tanh"}
_BINARIES = {aten.add.Tensor: "add", aten.mul.Tensor: "mul"}
_FLOATS = {torch.float32, torch.bfloat16}
_CONVOLUTIONS = {aten.conv2d.default: 2, aten.conv3d.default: 3}


@dataclass(frozen=True)
class Group:
    """The calls that `call(x, weight, bias)`, or with `other` as a fourth operand, stands for; the last of `nodes` gives the result."""

    nodes: tuple[Node, ...]
    x: Node
    weight: Node
    bias: Node | None
    other: Node | None
    call: PackedCall

    def without_other(self) -> "Group":
        """The product or convolution alone."""
        return replace(self, nodes=self.nodes[:1], other=None, call=self.call.alone(is_channels_innermost(self.result.meta["val"])))

    @property
    def result(self) -> Node:
        return self.nodes[-1]

    @property
    def reads(self) -> list[Node]:
        """The operands that are there."""
        return [operand for operand in self.operands if operand is not None]

    @property
    def operands(self) -> tuple[Node | None, ...]:
        found = (self.x, self.weight, self.bias, self.other)
        return found if self.other is not None else found[:3]


def find_groups(nodes: Sequence[Node], is_constant: IsConstant, sums: bool = False) -> list[Group]:
    """The groups among `nodes`, disjoint, in order; `is_constant` says which values are the same in every call. With `sums`, what is added
    to a convolution is part of it, whose channels are innermost then."""
    free, groups = set(nodes), []
    for node in nodes:
        if node not in free:
            continue
        group = _linear(node, is_constant) or _convolution(node, is_constant)
        if group is not None:
            group = _with_what_follows(group, free, sums)
            free.difference_update(group.nodes)
            groups.append(group)
    return groups


def _linear(node: Node, is_constant: IsConstant) -> Group | None:
    found = product_of(node)
    if found is None:
        return None
    x, weight, bias, transposed = found
    if not (is_constant(weight) and _is_float(x, weight, node) and weight.meta["val"].dim() == 2 and x.meta["val"].dim() >= 2):
        return None
    if bias is not None and not (_is_float(bias, node) and bias.meta["val"].dim() == 1 and _fits(bias, node)):
        return None
    if not is_dense(node.meta["val"]):
        return None
    rows = math.prod(hint(n) for n in node.meta["val"].shape[:-1])
    return Group((node,), x, weight, bias, None, PackedLinear(rows, transposed))


def product_of(node: Node) -> tuple[Node, Any, Any, bool] | None:
    """x, weight, bias and whether the weight is [K, N], of a call that is x @ weight + bias; numbers beside them are all 1."""
    args: Any = node.args
    if node.kwargs:
        return None
    if node.target is aten.linear.default:
        return args[0], args[1], args[2] if len(args) > 2 else None, False
    if node.target is aten.addmm.default and len(args) == 3:
        return args[1], args[2], args[0], True
    if node.target in (aten.mm.default, aten.matmul.default):
        return args[0], args[1], None, True
    return None


def _convolution(node: Node, is_constant: IsConstant) -> Group | None:
    dims = _CONVOLUTIONS.get(node.target)
    if dims is None or node.kwargs:
        return None
    given: list[Any] = [*node.args, *(None, 1, 0, 1, 1)[len(node.args) - 2 :]]
    x, weight, bias, stride, padding, dilation, groups = given
    value = node.meta["val"]
    innermost = is_channels_innermost(value)
    if not (is_constant(weight) and _is_float32(x, weight, node) and value.dim() == dims + 2 and (is_dense(value) or innermost)):
        return None
    if bias is not None and not _is_float32(bias):
        return None
    image = tuple(hint(n) for n in x.meta["val"].shape)
    call = PackedConvolution(image, _per_dim(stride, dims), _per_dim(padding, dims), _per_dim(dilation, dims), groups)
    return Group((node,), x, weight, bias, None, call.with_channels_last() if innermost else call)


def _per_dim(setting: Any, dims: int) -> tuple[int, ...]:
    if isinstance(setting, list | tuple):
        return tuple(setting) * (dims // len(setting))
    return (setting,) * dims


def _with_what_follows(group: Group, free: set[Node], sums: bool) -> Group:
    node = group.result
    user = next(iter(node.users)) if len(node.users) == 1 else None
    if user is None or user not in free:
        return group
    activation = _activation(user)
    if activation is not None:
        return replace(group, nodes=(node, user), call=group.call.with_activation(activation))
    other = _other(user, node)
    call = None if other is None else group.call.with_operand(_BINARIES[user.target])
    if call is None or (isinstance(group.call, PackedConvolution) and not (sums or group.call.channels_last)):
        return group
    return replace(group, nodes=(node, user), other=other, call=call)


def _activation(node: Node) -> str | None:
    if node.target is aten.gelu.default:
        return {"none": "gelu", "tanh": "gelu_tanh"}.get(node.kwargs.get("approximate", "none"))
    return _ACTIVATIONS.get(node.target)


def _other(node: Node, product: Node) -> Node | None:
    """The second operand of an addition or a multiplication of `product`, where it is a tensor of the same type."""
    if node.target not in _BINARIES or len(node.args) != 2 or node.kwargs:
        return None
    other: Any = node.args[1] if node.args[0] is product else node.args[0]
    if not isinstance(other, Node) or other is product or not isinstance(other.meta.get("val"), torch.Tensor):
        return None
    value = other.meta["val"]
    return other if same_tensor_type(value, product.meta["val"]) and same_strides(value, product.meta["val"]) else None


def _fits(bias: Node, node: Node) -> bool:
    return bool(hint(bias.meta["val"].shape[0]) == hint(node.meta["val"].shape[-1]))


def _is_float32(*nodes: Any) -> bool:
    return _is_float(*nodes) and nodes[0].meta["val"].dtype == torch.float32


def _is_float(*nodes: Any) -> bool:
    """Whether these are tensors in this machine's memory, all float32 or all bfloat16."""
    values = [node.meta.get("val") if isinstance(node, Node) else None for node in nodes]
    if not all(isinstance(value, torch.Tensor) and value.device.type == "cpu" for value in values):
        return False
    return len(dtypes := {value.dtype for value in values}) == 1 and dtypes <= _FLOATS
