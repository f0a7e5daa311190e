"""The quickest Python callable for an operator.

torch's generated bindings parse arguments with code made for one name; an OpOverload's call matches them against a schema at run
time. Measured with torch 2.13 on CPU, tiny tensors: add 2.9 against 3.7 us, relu 1.1 against 1.6, view 1.7 against 2.3. The
functions below take the operator's own positional arguments, and these select the same overload.
"""

from collections.abc import Callable
from typing import Any

import torch

from ..codegen.cpu_kernels import KERNELS

_FUNCTIONS = """
    add.Tensor sub.Tensor mul.Tensor div.Tensor pow.Tensor_Scalar neg.default exp.default log.default sqrt.default rsqrt.default
    abs.default sin.default cos.default tanh.default sigmoid.default relu.default eq.Tensor ne.Tensor lt.Tensor le.Tensor gt.Tensor
    ge.Tensor eq.Scalar ne.Scalar lt.Scalar le.Scalar gt.Scalar ge.Scalar where.self masked_fill.Scalar clamp.default
    logical_and.default logical_or.default logical_not.default bitwise_and.Tensor bitwise_or.Tensor bitwise_not.default
    matmul.default mm.default bmm.default addmm.default baddbmm.default einsum.default cat.default stack.default
    transpose.int t.default permute.default unsqueeze.default squeeze.dim select.int clone.default
    mean.dim sum.dim_IntList amax.default softmax.int layer_norm.default group_norm.default rms_norm.default
    conv1d.default conv2d.default embedding.default index_select.default
""".split()
_NN_FUNCTIONS = "linear.default gelu.default silu.default scaled_dot_product_attention.default".split()
_METHODS = "view.default reshape.default expand.default contiguous.default flatten.using_ints unflatten.int".split()


def _operator(name: str) -> torch._ops.OpOverload:
    packet, overload = name.split(".")
    return getattr(getattr(torch.ops.aten, packet), overload)


BINDINGS: dict[Callable[..., Any], Callable[..., Any]] = {
    _operator(name): function
    for home, names in ((torch._C._VariableFunctions, _FUNCTIONS), (torch._C._nn, _NN_FUNCTIONS), (torch._C.TensorBase, _METHODS))
    for name in names
    if (function := getattr(home, name.partition(".")[0], None)) is not None  # torch's own names may change
}


def binding(target: Callable[..., Any]) -> Callable[..., Any]:
    """A callable that computes what `target` does on the same arguments, with less overhead: a kernel of ours, torch's function."""
    # `_op` is what OpOverload.__call__ calls: one Python frame less.
    return KERNELS.get(target) or BINDINGS.get(target) or (target._op if isinstance(target, torch._ops.OpOverload) else target)
