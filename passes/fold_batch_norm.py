"""Folds batch normalisation with fixed statistics into the convolution or linear layer before it.

    batch_norm(conv(x, W, b), g, B, mean, var, eps) -> conv(x, W*s, (b - mean)*s + B)   with s = g / sqrt(var + eps)
    batch_norm(linear(x, W, b), ..) -> linear(x, W*s, (b - mean)*s + B)                 on [N, C]

Exact in real arithmetic. The new weights are computed in float64 and rounded once.
"""

from dataclasses import dataclass
from typing import Any

import torch

from ..ir import Node, Program, Rewriter
from ..ir.calls import GETITEM
from ..ir.float64 import RoundedWeight, exact_value
from ..ir.infer import InferenceError, infer, same_type
from ..ir.pattern import named_arguments
from .base import LeftAlone, Outcome, Pass
from .contract import Contract

_aten = torch.ops.aten
_CONVOLUTIONS = (
    _aten.conv1d.default,
    _aten.conv2d.default,
    _aten.conv3d.default,
    _aten.conv1d.padding,
    _aten.conv2d.padding,
    _aten.conv3d.padding,
)
_NORMS = (_aten.batch_norm.default, _aten._native_batch_norm_legit_no_training.default)


@dataclass(frozen=True)
class FoldBatchNorm(Pass):
    """A batch norm in eval mode disappears into the weights of its producer, if nothing else uses that producer's result."""

    name = "fold-batch-norm"
    rules = ("fold-batch-norm",)
    contract = Contract.EXACT

    def run(self, rewriter: Rewriter) -> Outcome:
        left = []
        for node in rewriter.nodes():
            if node.target not in _NORMS:
                continue
            found = _find(node, rewriter)
            if isinstance(found, str):
                left.append(LeftAlone.at(node, found))
            else:
                found.fold(rewriter)
        return Outcome(tuple(left))


@dataclass(frozen=True)
class _Site:
    """A batch norm and the layer before it. `result` is what stands for the normalised tensor."""

    layer: Node
    norm: Node
    result: Node
    tensors: dict[str, Node | None]
    eps: float

    def fold(self, rewriter: Rewriter) -> None:
        weight, bias = self._new_weight(rewriter.program, "weight"), self._new_weight(rewriter.program, "bias")
        with rewriter.step("fold-batch-norm"):
            arguments = named_arguments(self.layer)
            arguments["weight"], arguments["bias"] = rewriter.weight(weight), rewriter.weight(bias)
            target: Any = self.layer.target
            folded = rewriter.insert(target, list(arguments.values()), before=self.norm, origin=[self.layer, self.norm])
            rewriter.replace(self.result, folded)

    def _new_weight(self, program: Program, which: str) -> RoundedWeight:
        sources = {name: None if node is None else program.weights[str(node.target)] for name, node in self.tensors.items()}
        eps = self.eps

        def exact() -> torch.Tensor:
            values: dict[str, Any] = {name: None if source is None else exact_value(source) for name, source in sources.items()}
            return folded_weights(**values, eps=eps)[which]

        layer = sources["layer_weight"]
        assert layer is not None
        return RoundedWeight.computed(_free_name(program, layer.name, which), exact().to(layer.dtype), exact, layer.kind)


def folded_weights(
    layer_weight: torch.Tensor,
    layer_bias: torch.Tensor | None,
    scale: torch.Tensor | None,
    shift: torch.Tensor | None,
    mean: torch.Tensor,
    variance: torch.Tensor,
    eps: float,
) -> dict[str, torch.Tensor]:
    """W*s and (b - mean)*s + B with s = scale / sqrt(variance + eps); output channels are dim 0 of `layer_weight`."""
    s = torch.rsqrt(variance + eps) * (1 if scale is None else scale)
    bias = (0 if layer_bias is None else layer_bias) - mean
    weight = layer_weight * s.reshape(-1, *[1] * (layer_weight.dim() - 1))
    return {"weight": weight, "bias": bias * s + (0 if shift is None else shift)}


def _find(norm: Node, rewriter: Rewriter) -> "_Site | str":
    """The site that ends in `norm`, or why there is none."""
    arguments = named_arguments(norm)
    if arguments.get("training"):
        return "it uses the statistics of its input: the model is in training mode"
    layer = arguments["input"]
    if layer.target not in (*_CONVOLUTIONS, _aten.linear.default):
        return "what it normalises is no convolution or linear layer"
    if len(layer.users) != 1:
        return f"the result of the layer before it is used {len(layer.users)} times"
    own = named_arguments(layer)
    tensors = {
        "layer_weight": own["weight"],
        "layer_bias": own["bias"],
        "scale": arguments["weight"],
        "shift": arguments["bias"],
        "mean": arguments["running_mean"],
        "variance": arguments["running_var"],
    }
    missing = _reason_against(tensors, layer, rewriter.program)
    if missing:
        return missing
    result = _normalised(norm)
    if result is None:
        return "its statistics are used"
    site = _Site(layer, norm, result, tensors, arguments["eps"])
    return _refusal(site, own, rewriter) or site


def _reason_against(tensors: dict[str, Any], layer: Node, program: Program) -> str | None:
    for name in ("layer_weight", "mean", "variance"):
        if tensors[name] is None:
            return f"it has no {name}"
    for name, tensor in tensors.items():
        if tensor is not None and tensor.op != "get_attr":
            return f"its {name.replace('_', ' ')} is no constant"
        if tensor is not None and program.weights[str(tensor.target)].tensor is None:
            return "the program was read from text and its weights have no values"
    rank = 2 if layer.target is _aten.linear.default else tensors["layer_weight"].meta["val"].dim()
    return None if layer.meta["val"].dim() == rank else "its channels are not the layer's"


def _normalised(norm: Node) -> Node | None:
    """The node of the normalised tensor; None when the other results of the call are used."""
    if norm.target is _aten.batch_norm.default:
        return norm
    users = list(norm.users)
    if len(users) == 1 and users[0].target is GETITEM and users[0].args[1] == 0:
        return users[0]
    return None


def _refusal(site: _Site, arguments: dict[str, Any], rewriter: Rewriter) -> str | None:
    target: Any = site.layer.target
    with_bias = {**arguments, "bias": site.tensors["mean"]}
    try:
        folded = infer(rewriter.symbols, target, list(with_bias.values()), {})
    except InferenceError as error:
        return f"the layer takes no bias: {error}"
    if not same_type(folded, site.result.meta["val"]):
        return "the folded layer would lay out its result in another way"
    return None


def _free_name(program: Program, layer_weight: str, which: str) -> str:
    base = f"{layer_weight.removesuffix('.weight')}.folded.{which}"
    tries = (base if k == 0 else f"{base}_{k}" for k in range(len(program.weights) + 1))
    return next(name for name in tries if name not in program.weights)
