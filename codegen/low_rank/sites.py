"""Which calls of a graph the kernel runs, and which of them form a site: queries, keys and values of an attention read the same rows
through the same smoothing, branch and formats, and these rows are made ready for all of them at once."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx

from ...ir import Node
from ...ir.calls import GETITEM
from ...ir.infer import storage_key, tensors_of
from ...ir.pattern import named_arguments
from .library import library
from .linear import Columns, Options, Products, is_fit

_TOLD_BY = ("x", "weight_q", "weight_scale", "down", "up", "bias", "weight_format", "smooth", "weight_scale2")
_OF_ROWS = ("x", "smooth", "down")
_COLUMNS = ("weight_q", "weight_scale", "weight_scale2", "up", "bias")  # in the order of `Columns`


def has_kernel(node: Node) -> bool:
    """Whether a call in a graph is one that the kernel in C++ runs here."""
    return is_of_native_form(node) and library() is not None


def is_of_native_form(node: Node) -> bool:
    """Whether a call is `gw.lowrank_linear` on operands that the kernel has a form for."""
    if node.target is not torch.ops.gw.lowrank_linear.default:
        return False
    values = {name: each.meta["val"] if isinstance(each, fx.Node) else each for name, each in named_arguments(node).items()}
    return is_fit(*(values[name] for name in _TOLD_BY))


def find_sites(nodes: Sequence[Node]) -> list[list[Node]]:
    """The calls of the kernel among `nodes`, those of one site together. Between the calls of a site nothing allocates, so that running
    them at once holds nothing for longer than running one after another."""
    sites: list[list[Node]] = []
    is_open = False
    for node in nodes:
        if not has_kernel(node):
            is_open = is_open and _is_view(node)
        elif is_open and _is_like(node, sites[-1]):
            sites[-1].append(node)
        else:
            sites.append([node])
            is_open = True
    return sites


def _is_like(node: Node, site: Sequence[Node]) -> bool:
    """Whether a call reads what those of `site` do, and none of their results."""
    own, others = named_arguments(node), named_arguments(site[0])
    is_same = all(own[name] is others[name] for name in _OF_ROWS) and all(own[name] == others[name] for name in Options._fields)
    has_branch = (own["up"] is None) == (others["up"] is None)
    return is_same and has_branch and all(not isinstance(own[name], fx.Node) or own[name].op != "call_function" for name in _COLUMNS)


def _is_view(node: Node) -> bool:
    known = {storage_key(tensor) for operand in node.all_input_nodes for tensor in tensors_of(operand.meta["val"])}
    return all(storage_key(tensor) in known for tensor in tensors_of(node.meta["val"]))


def _is_lasting(operand: Node) -> bool:
    """Whether an operand is there before a call, and of one size for all calls."""
    return operand.op != "call_function" and all(isinstance(size, int) for size in operand.meta["val"].shape)


class SiteCall:
    """The calls of a site as one: `call(x, smooth, down, *columns of the first, *columns of the second, ..)` gives all results, or the
    result of a site of one.

    What was put together for one call serves the next where all operands but x are of sizes that do not change, and none is computed at
    each call: it would be held from one to the next."""

    def __init__(self, site: Sequence[Node]):
        self.first = site[0]
        self._is_alone = len(site) == 1
        arguments = named_arguments(self.first)
        self._options = Options(*(arguments[name] for name in Options._fields))
        beside_x = [named_arguments(node)[name] for node in site for name in ("smooth", "down", *_COLUMNS)]
        self._is_lasting = all(_is_lasting(operand) for operand in beside_x if operand is not None)
        self._products: Products | None = None

    def __call__(self, x: Tensor, *operands: Any) -> Any:
        known = self._products
        if known is None or not known.lie_as(operands):
            smooth, down, *columns = operands
            layers = [Columns(*columns[n : n + len(_COLUMNS)]) for n in range(0, len(columns), len(_COLUMNS))]
            known = Products(x, smooth, down, layers, self._options)
            if self._is_lasting:
                self._products = known
        results = known(x)
        return results[0] if self._is_alone else results

    def __str__(self) -> str:
        return "a low-rank linear" if self._is_alone else "low-rank linears of one site"


def add_site(site: Sequence[Node], lowered: fx.Graph, copies: dict[Node, Node]) -> None:
    """Adds the calls of `site` to `lowered` as one `SiteCall`."""
    named = [named_arguments(node) for node in site]
    operands = [*(named[0][name] for name in _OF_ROWS), *(arguments[name] for arguments in named for name in _COLUMNS)]
    call = lowered.create_node("call_function", SiteCall(site), fx.map_arg(tuple(operands), copies.__getitem__), name="site")  # type: ignore[arg-type]
    if len(site) == 1:
        call.meta, copies[site[0]] = site[0].meta, call
        return
    call.meta = {"val": tuple(node.meta["val"] for node in site)}
    for index, node in enumerate(site):
        copies[node] = lowered.call_function(GETITEM, (call, index))
        copies[node].meta = node.meta
