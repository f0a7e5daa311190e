"""Linear layers of a function: products of activations with a constant weight, whatever operation spells them.

    linear(x, W, b)      addmm(b, x, W')      mm(x, W')      matmul(x, W')      with W' = W.T stored [K, N]

A weight that several calls read, or that is no plain matrix of floats, is no layer's own.
"""

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import torch

from ...ir import Node, Program, Rewriter
from ...ir.float64 import RoundedWeight, exact_value
from ...ir.pattern import named_arguments
from ..base import LeftAlone

aten, gw = torch.ops.aten, torch.ops.gw

_PRODUCTS = (aten.linear.default, aten.addmm.default, aten.mm.default, aten.matmul.default)
_CONVOLUTIONS = (aten.conv1d.default, aten.conv2d.default, aten.conv3d.default)
_TURNS = (aten.permute.default, aten.transpose.int, aten.t.default)
_SMOOTHED = re.compile(r"\.smoothed(\.(?:weight|bias))?(_\d+)?$")
_WEIGHT_ENDING = re.compile(r"\.weight(\.T)?$|\.T$|\.(residual|codes)(_\d+)?$")  # T: turned round as an ONNX file was read
_PART = re.compile(r"\.part_\d+$")
_FLOATS = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Layer:
    """One linear layer: y = x @ W.T + bias. `transposed` says that `weight` is stored [K, N]."""

    node: Node
    x: Node
    weight: Node
    bias: Node | None
    transposed: bool
    name: str

    @property
    def out_features(self) -> int:
        return int(self.weight.meta["val"].shape[1 if self.transposed else 0])

    @property
    def in_features(self) -> int:
        return int(self.weight.meta["val"].shape[0 if self.transposed else 1])

    @property
    def numel(self) -> int:
        return self.in_features * self.out_features

    @property
    def dtype(self) -> torch.dtype:
        """That of its activations."""
        return self.x.meta["val"].dtype

    def exact_matrix(self, program: Program) -> torch.Tensor:
        """W [N, K] in float64."""
        value = exact_value(program.weights[str(self.weight.target)])
        return value.T if self.transposed else value

    def matrix(self, program: Program) -> torch.Tensor:
        """W [N, K] in float32 (float64 for float64), detached."""
        tensor = program.weights[str(self.weight.target)].tensor
        assert tensor is not None
        tensor = tensor.detach()
        wide = tensor if tensor.dtype == torch.float64 else tensor.to(torch.float32)
        return wide.T if self.transposed else wide


def find_layers(rewriter: Rewriter) -> tuple[list[Layer], list[LeftAlone]]:
    """The layers of the function in order, and the products with a constant and convolutions that are none, with the reason."""
    layers: dict[str, Layer] = {}
    left = []
    for node in rewriter.nodes():
        if node.target is gw.lowrank_linear.default and named_arguments(node)["weight_format"] != "none":
            left.append(LeftAlone.at(node, f"{layer_name(str(named_arguments(node)['weight_q'].target))}: it is on codes already"))
            continue
        found = layer_of(node, rewriter.program)
        if isinstance(found, Layer) and found.name in layers:  # what is recorded of layers goes by their names
            left.append(LeftAlone.at(node, f"its weight {found.weight.target} would be named {found.name}, as another layer is"))
        elif isinstance(found, Layer):
            layers[found.name] = found
        elif found:
            left.append(LeftAlone.at(node, found))
        elif node.target in _CONVOLUTIONS:
            left.append(LeftAlone.at(node, "it is a convolution, and linear layers alone are taken"))
    return list(layers.values()), left


def layer_of(node: Node, program: Program) -> "Layer | str":
    """The layer that `node` is, why it is none, or "" where nobody would expect one."""
    if node.target not in _PRODUCTS:
        return ""
    arguments = named_arguments(node)
    if node.target is aten.linear.default:
        x, weight, bias, transposed = arguments["input"], arguments["weight"], arguments["bias"], False
    elif node.target is aten.addmm.default:
        x, weight, bias, transposed = arguments["mat1"], arguments["mat2"], arguments["self"], True
        if arguments["beta"] != 1 or arguments["alpha"] != 1:
            return "its sum is scaled"
    else:
        x, weight = (arguments[name] for name in (("self", "mat2") if node.target is aten.mm.default else ("self", "other")))
        bias, transposed = None, True
    if not isinstance(weight, Node) or weight.op != "get_attr":
        turned = _turned(weight)
        if turned is not None:
            return f"its weight {turned} is turned round at each call: write torch.nn.functional.linear(x, weight)"
        return "its weight is no constant" if node.target is aten.linear.default else ""
    value = weight.meta["val"]
    if value.dim() != 2 or value.dtype not in _FLOATS or x.meta["val"].dim() < 2:
        return "its weight is no matrix of floats, or its input has one dim only"
    if 0 in value.shape:
        return "its weight has no numbers"
    if bias is not None and bias.meta["val"].dim() != 1:
        return "what is added is no vector"
    uses = count_uses(program, str(weight.target))
    if uses > 1:
        return f"its weight {weight.target} is used {uses} times"
    tensor = program.weights[str(weight.target)].tensor
    if tensor is None:
        return "the program was read from text and its weights have no values"
    if x.meta["val"].dtype != value.dtype:
        return "its activations have another dtype than its weight"
    return Layer(node, x, weight, bias, transposed, layer_name(str(weight.target)))


def _turned(weight: Any) -> str | None:
    """The name of the matrix whose rows are the columns of `weight`, None where it is none of a constant."""
    if not isinstance(weight, Node) or weight.target not in _TURNS or weight.meta["val"].dim() != 2:
        return None
    (matrix, *_) = weight.all_input_nodes
    return str(matrix.target) if matrix.op == "get_attr" else None


def count_uses(program: Program, weight: str) -> int:
    """How many operands of calls the weight is, over all functions and regions."""
    return sum(len(node.users) for node in program.nodes() if node.op == "get_attr" and str(node.target) == weight)


def layer_name(weight: str) -> str:
    """`blocks.0.attn.qkv.weight`, with `.T` too, -> `blocks.0.attn.qkv`; the same for what passes make of a weight."""
    return _WEIGHT_ENDING.sub("", _SMOOTHED.sub(r"\1", weight))


def smoothed_name(name: str) -> str:
    """`a.weight` and `a.smoothed.weight_1` -> `a.smoothed.weight`; `in_proj` -> `in_proj.smoothed`. The layer's name stays."""
    plain = _SMOOTHED.sub(r"\1", name)
    stem, _, last = plain.rpartition(".")
    return f"{stem}.smoothed.{last}" if stem and last in ("weight", "bias") else f"{plain}.smoothed"


def matches(name: str, patterns: tuple[str, ...]) -> bool:
    """Whether a layer's name fits one of the patterns (`*embed*`, `lm_head`); a part of a layer has that of the whole."""
    whole = _PART.sub("", name)
    return any(fnmatchcase(whole, pattern) for pattern in patterns)


def idle_lines(names: Iterable[str], **patterns: Sequence[str]) -> list[str]:
    """For the report: the patterns, by the option that has them, that fit none of the layers' names, as misspelled ones do."""
    known = list(names)
    idle = {option: [each for each in given if not any(matches(name, (each,)) for name in known)] for option, given in patterns.items()}
    return [f"{option}: no layer that it could take has a name like {', '.join(each)}" for option, each in idle.items() if each]


def part_name(name: str, index: int) -> str:
    """The name of one part of a layer that reads a concatenation."""
    return f"{name}.part_{index}"


def computed(rewriter: Rewriter, name: str, value: torch.Tensor, exact: Any = None) -> Node:
    """A use of a new weight of that name (made free by a number), which remembers its float64 value where `exact` gives one."""
    free = next(n for n in _numbered(name) if n not in rewriter.program.weights)
    stored = value.detach().contiguous()
    return rewriter.weight(RoundedWeight.computed(free, stored, exact if exact is not None else lambda: _wide(stored)))


def _wide(value: torch.Tensor) -> torch.Tensor:
    return value.to(torch.float64) if value.is_floating_point() else value


def _numbered(name: str) -> Iterator[str]:
    yield name
    k = 1
    while True:
        yield f"{name}_{k}"
        k += 1
