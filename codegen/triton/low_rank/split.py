"""`gw.lowrank_linear` in a graph that is being lowered, as the operand that it quantizes and the product that it multiplies.

Operations that read one x with one smoothing, branch and format (query, key and value) share the operand.
"""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import fx

from ....ir import Node, SymbolTable
from ....ir.calls import GETITEM
from ....ir.infer import infer
from ....ir.low_bit.formats import FORMATS
from ..pointwise import arguments_of
from .formats import ACTIVATIONS, DTYPES, FEW_ROWS, LONGEST_ROTATION, PART, WEIGHTS, multiplies_codes
from .ops import low_bit_operand, low_bit_product

_OPERAND = ("act_format", "act_scale2", "act_shift", "rotate")


def split(graph: fx.Graph, symbols: SymbolTable) -> tuple[fx.Graph, dict[Node, Node]]:
    """`graph` anew, with two calls for each `gw.lowrank_linear` that kernels compute, and from which of its nodes each call came."""
    if not any(is_covered(node) for node in graph.nodes):
        return graph, {}
    return _Split(symbols).split(graph)


def is_covered(node: Node) -> bool:
    """Whether kernels compute `node`: a low-rank linear layer of formats and types that they know, its weights dense."""
    if node.target is not torch.ops.gw.lowrank_linear.default:
        return False
    a = arguments_of(node)
    x = a["x"].meta["val"]
    if a["weight_format"] not in WEIGHTS or a["act_format"] not in {"none", *ACTIVATIONS} or x.dtype not in DTYPES:
        return False
    if a["rotate"] > LONGEST_ROTATION or not node.meta["val"].is_contiguous():
        return False
    branch = [a[name].meta["val"] for name in ("down", "up") if a[name] is not None]
    if any(each.dtype != x.dtype and x.dtype != torch.float32 or each.dtype not in DTYPES for each in branch):
        return False  # a factor that would be rounded to x's dtype
    dense = [a[name].meta["val"] for name in ("weight_q", "weight_scale", "weight_scale2", "smooth", "down", "up") if a[name] is not None]
    return all(each.is_contiguous() and each.device == x.device for each in dense) and a["weight_q"].meta["val"].numel() > 0


def _is_plain(a: Mapping[str, Any]) -> bool:
    """Whether a product can take x as it is."""
    return a["act_format"] == "none" and a["smooth"] is None and not a["act_shift"] and not a["rotate"]


def _part(x: torch.Tensor, act_format: str) -> int:
    """Neighbours along K that a program of the first kernel takes; 0 for all: few rows are too few programs. A row that shares one scale
    has to be seen as a whole."""
    rows = math.prod(x.shape[:-1])
    is_scaled = act_format != "none" and FORMATS[act_format].group == 0
    return PART if isinstance(rows, int) and rows <= FEW_ROWS and x.size(-1) > PART and not is_scaled else 0


class _Split:
    def __init__(self, symbols: SymbolTable):
        self.symbols = symbols
        self.graph = fx.Graph()
        self.copies: dict[Node, Node] = {}
        self.source: dict[Node, Node] = {}
        self.operands: dict[Any, list[Node]] = {}

    def split(self, graph: fx.Graph) -> tuple[fx.Graph, dict[Node, Node]]:
        for node in graph.nodes:
            self.copies[node] = self._product(node) if is_covered(node) else self.graph.node_copy(node, self.copies.__getitem__)
            self.source[self.copies[node]] = node
        return self.graph, self.source

    def _product(self, node: Node) -> Node:
        a = {name: self.copies[value] if isinstance(value, Node) else value for name, value in arguments_of(node).items()}
        has_branch = a["down"] is not None and a["up"] is not None
        gives = "nothing" if _is_plain(a) else "codes" if multiplies_codes(a["act_format"], a["weight_format"]) else "values"
        parts = iter(self._operand(node, a, gives, a["down"] if has_branch else None))
        left = a["x"] if gives == "nothing" else next(parts)
        scale = next(parts) if gives == "codes" else None
        half, up = (next(parts), a["up"]) if has_branch else (None, None)
        operands = (left, scale, a["weight_q"], a["weight_scale"], a["weight_scale2"], half, up, a["bias"])
        options = {"weight_format": a["weight_format"], "dtype": node.meta["val"].dtype}
        return self._call(node, low_bit_product, operands, options)

    def _operand(self, node: Node, a: Mapping[str, Any], gives: str, down: Node | None) -> list[Node]:
        """The results of the call that prepares what a product takes; none where it takes x alone."""
        if gives == "nothing" and down is None:
            return []
        options = {name: a[name] for name in _OPERAND} | {"gives": gives, "part": _part(a["x"].meta["val"], a["act_format"])}
        key = (a["x"], a["smooth"], down, *options.values())
        if key not in self.operands:
            smooth = None if gives == "nothing" else a["smooth"]
            call = self._call(node, low_bit_operand, (a["x"], smooth, down), options)
            count = len(call.meta["val"])
            self.operands[key] = [self._call(node, GETITEM, (call, number), {}) for number in range(count)]
        return self.operands[key]

    def _call(self, node: Node, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Node:
        """A call with the place of `node` in the user's code."""
        call = self.graph.create_node("call_function", target, args, kwargs)
        call.meta = node.meta | {"val": infer(self.symbols, target, args, kwargs)}
        self.source[call] = node
        return call
