"""Computes once, at compile time, what depends on weights and literals alone.

    A(B(weight), arange(9)) -> weight

Covers what transformers compute anew on each call: causal masks, position ids, rotary tables. Nothing random or uninitialised is
folded, nor mere views of weights, which cost nothing. The last views before the use of a constant stay views of it. A folded
weight remembers its float64 value, so that rounding it is not an error of the rewrite.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..ir import Node, Program, Rewriter
from ..ir.calls import GETITEM, is_pure, name_of
from ..ir.errors import first_line
from ..ir.float64 import RoundedWeight, computed_weights
from .aliases import OutputAliases
from .base import LeftAlone, Outcome, Pass
from .contract import Contract
from .options import is_size, option, size_in_bytes


@dataclass(frozen=True)
class FoldConstants(Pass):
    """Constant expressions become weights named after the module and captured node that they come from.

    A result may be larger than the weights that it alone replaces by no more than `limit`; beyond that its operands are folded.
    """

    name = "fold-constants"
    rules = ("fold",)
    contract = Contract.EXACT

    limit: int | str = option("16MiB", "a size such as 16MiB", is_size)

    def run(self, rewriter: Rewriter) -> Outcome:
        constants = _Constants(rewriter)
        chosen, left = constants.choose(size_in_bytes(self.limit))
        if not chosen:
            return Outcome(left)
        if any(weight.tensor is None for weight in rewriter.program.weights.values()):
            return Outcome((*left, LeftAlone("constants", "the program was read from text and its weights have no values")))
        named = _named(chosen, rewriter)
        folded, failed = _computed(rewriter.program, named)
        torn = [node for node, weight in folded.items() if not _is_laid_out_as(node, weight)]
        failed = (*failed, *(LeftAlone.at(node, "torch lays it out in another way than its type says") for node in torn))
        folded = {node: weight for node, weight in folded.items() if node not in torn}
        left, added = (*left, *failed), list(folded.values())
        for node, weight in folded.items():
            with rewriter.step("fold"):
                rewriter.replace(node, rewriter.weight(weight))
        total = sum(weight.nbytes for weight in added)
        return Outcome(left, (f"{len(added)} constant{'' if len(added) == 1 else 's'}, {total} bytes in all",), {"folded_bytes": total})


def _computed(program: Program, named: Mapping[str, Node]) -> tuple[dict[Node, RoundedWeight], tuple[LeftAlone, ...]]:
    """The weights that take the place of nodes, and the nodes that cannot be computed on this machine: a sum of float8, say."""
    try:
        return dict(zip(named.values(), computed_weights(program, named), strict=True)), ()
    except RuntimeError as error:
        if len(named) == 1:
            (node,) = named.values()
            return {}, (LeftAlone.at(node, f"it cannot be computed here: {first_line(error)}"),)
    parts = [_computed(program, {name: node}) for name, node in named.items()]
    return {node: weight for folded, _ in parts for node, weight in folded.items()}, tuple(each for _, failed in parts for each in failed)


def _is_laid_out_as(node: Node, weight: RoundedWeight) -> bool:
    value = node.meta["val"]
    return tuple(weight.stride) == tuple(value.stride()) or value.numel() == 0


class _Constants:
    """The calls of a function that depend on weights and literals alone."""

    def __init__(self, rewriter: Rewriter):
        self.nodes: dict[Node, None] = {}  # in the function's order
        outputs = OutputAliases(rewriter)
        self.received: list[Node] = []
        for node in rewriter.nodes():
            if not self._is_constant(node):
                continue
            if node in outputs:
                self.received.append(node)
            else:
                self.nodes[node] = None

    def _is_constant(self, node: Node) -> bool:
        sources = node.all_input_nodes
        return (
            _may_fold(node) and _is_static(node.meta["val"]) and all(source in self.nodes or source.op == "get_attr" for source in sources)
        )

    def choose(self, limit: int) -> tuple[list[Node], tuple[LeftAlone, ...]]:
        """The calls to turn into weights, in order, and those that stay."""
        left = [LeftAlone.at(node, "the caller receives it, and would receive the weight itself") for node in self.received]
        pending = [node for node in self.nodes if any(user not in self.nodes for user in node.users)]
        chosen: dict[Node, None] = {}
        refused: set[Node] = set()
        while pending:
            base = self._without_views(pending.pop())
            if base is None or base in chosen or base in refused:
                continue
            growth, is_tensor = _nbytes(base), not isinstance(base.meta["val"], tuple)
            if is_tensor and (growth <= limit or growth - self._replaced_bytes(base) <= limit):
                chosen[base] = None
                continue
            refused.add(base)
            pending += [source for source in base.all_input_nodes if source in self.nodes]
            if is_tensor:
                left.append(LeftAlone.at(base, f"its {growth} bytes are more than the limit of {limit} above what they replace"))
        return [node for node in self.nodes if node in chosen], tuple(left)

    def _without_views(self, node: Node) -> Node | None:
        """The computation that `node` shows a view of; None when that is a weight."""
        while _is_view(node):
            node = node.all_input_nodes[0]
            if node not in self.nodes:
                return None
        return node

    def _replaced_bytes(self, root: Node) -> int:
        """The bytes of the weights that are needed for `root` alone."""
        cone, pending = {root}, [root]
        while pending:
            for source in pending.pop().all_input_nodes:
                if source not in cone:
                    cone.add(source)
                    pending.append(source)
        private: set[Node] = {root}
        for node in sorted(cone, reverse=True):  # in program order, the last first
            if node.users and all(user in private for user in node.users):
                private.add(node)
        return sum(_nbytes(node) for node in private if node.op == "get_attr")


def _may_fold(node: Node) -> bool:
    if node.target is GETITEM:
        return True
    return isinstance(node.target, torch._ops.OpOverload) and is_pure(node) and "empty" not in name_of(node.target)


def _is_static(value: Any) -> bool:
    if isinstance(value, tuple | list):
        return all(map(_is_static, value))
    return isinstance(value, torch.Tensor) and all(isinstance(size, int) for size in (*value.shape, *value.stride()))


def _is_view(node: Node) -> bool:
    target: Any = node.target
    if target is GETITEM:
        return _is_view(node.all_input_nodes[0])
    return target is torch.ops.aten._unsafe_view.default or any(result.alias_info is not None for result in target._schema.returns)


def _nbytes(node: Node) -> int:
    value = node.meta["val"]
    return value.numel() * value.dtype.itemsize if isinstance(value, torch.Tensor) else 0


def _named(nodes: Sequence[Node], rewriter: Rewriter) -> dict[str, Node]:
    """A free weight name for each: the module that it stands in, and the captured node that it comes from."""
    named: dict[str, Node] = {}
    for node in nodes:
        module, origin = getattr(node.meta.get("where"), "module", ""), node.meta.get("origin", ())
        base = ".".join(part for part in (module, f"constant_{origin[0]}" if origin else "constant") if part)
        tries = (base if k == 0 else f"{base}_{k}" for k in range(len(nodes) + len(rewriter.program.weights) + 1))
        named[next(name for name in tries if name not in named and name not in rewriter.program.weights)] = node
    return named
