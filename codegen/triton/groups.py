"""Which operations become one kernel: groups chosen by the bytes that they keep out of memory.

Every operation that a kernel can compute starts as a group of its own. Two groups, one of which reads what the other makes, merge if
that saves bytes, if the result has a plan, and if no other operation would have to run both before and after it; the pair that
saves most goes first. A product of matrices is ours only where what is saved outweighs what the library is faster. Views belong to no
group: a kernel reads through them, and whoever else needs one makes it.
"""

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from ...ir import Node
from .emit import AnyPlan
from .low_rank.ops import low_bit_operand, low_bit_product
from .low_rank.plan import operand_plan
from .matmul_plan import MatmulPlan
from .plan import is_known, plan
from .pointwise import NotFusible
from .roofline import bytes_after, bytes_before, gains
from .views import base, is_split, is_view

# ATen runs these in more than one pass, so that even one alone is worth a kernel.
_WORTH_A_KERNEL = {torch.ops.gw.norm_apply.default, low_bit_product}


@dataclass(frozen=True)
class Group:
    """Operations that one kernel computes: in the order of the graph, `inputs` being read and `outputs` written by it.

    `kind` is "pointwise", "rows", "matmul", or "operand" or "low_bit" for the halves of a low-rank layer. `bytes_before` counts what the
    operations move one by one, `bytes_after` what the kernel moves.
    """

    nodes: tuple[Node, ...]
    inputs: tuple[Node, ...]
    outputs: tuple[Node, ...]
    kind: str
    bytes_before: int
    bytes_after: int
    plan: AnyPlan = field(repr=False, compare=False)


def find_groups(graph: fx.Graph, among: Collection[Node] | None = None) -> list[Group]:
    """The groups of a functional graph (of the calls `among` its own, which follow one another), in the order of their first nodes."""
    grouping = _Grouping(graph, graph.nodes if among is None else among)
    return sorted([*grouping.operands(), *grouping.groups()], key=lambda group: grouping.position[group.nodes[0]])


def outputs_of(nodes: Iterable[Node]) -> list[Node]:
    """Those of `nodes` whose values somebody outside needs, through views or not."""
    inside = set(nodes)
    return [node for node in inside if any(user not in inside for user in _users(node))]


def _users(node: Node) -> list[Node]:
    """Who needs the elements of `node`: its users, and those of the views of it."""
    found = []
    for user in node.users:
        found += _users(user) if is_view(user) or is_split(user) else [user]
    return found


def _operands(node: Node) -> list[Node]:
    """The values that a call reads, behind their views."""
    return [base(operand) for operand in node.all_input_nodes]


class _Cluster:
    """A group that may still grow."""

    def __init__(self, nodes: list[Node], found: AnyPlan | None):
        self.nodes = nodes
        self.plan = found
        self.cost = bytes_after(found) if found is not None else 0


class _Grouping:
    def __init__(self, graph: fx.Graph, among: Iterable[Node]):
        allowed = self.allowed = set(among)
        self.position = {node: n for n, node in enumerate(graph.nodes)}
        self.users = {node: _users(node) for node in graph.nodes}
        self.cluster: dict[Node, _Cluster] = {}
        for node in graph.nodes:
            if not is_view(node) and not is_split(node):
                self.cluster[node] = _Cluster([node], self._plan([node]) if node in allowed and is_known(node) else None)
        self.refused: set[tuple[Node, ...]] = set()

    def operands(self) -> list[Group]:
        """The calls that prepare left operands of low-rank layers, each with its results."""
        return [_operand(node) for node in self.allowed if node.target is low_bit_operand]

    def groups(self) -> list[Group]:
        while self._merge_once():
            pass
        found = {id(c): c for c in self.cluster.values() if c.plan is not None and self._is_worth_it(c)}
        return [_group(cluster) for cluster in sorted(found.values(), key=lambda c: self.position[c.nodes[0]])]

    def _is_worth_it(self, cluster: _Cluster) -> bool:
        return len(cluster.nodes) > 1 or cluster.nodes[0].target in _WORTH_A_KERNEL

    def _plan(self, nodes: Sequence[Node]) -> AnyPlan | None:
        outputs = sorted(outputs_of(nodes), key=self.position.__getitem__)
        try:
            return plan(nodes, outputs) if outputs else None
        except NotFusible:
            return None

    def _merge_once(self) -> bool:
        """One round over all pairs; whether any merged."""
        merged = False
        for _, a, b in sorted(self._pairs(), key=lambda pair: pair[0]):
            first, second = self.cluster[a], self.cluster[b]
            if first is second:
                continue
            nodes = sorted([*first.nodes, *second.nodes], key=self.position.__getitem__)
            key = tuple(nodes)
            if key in self.refused:
                continue
            union = self._union(first, second, nodes)
            if union is None:
                self.refused.add(key)
                continue
            for node in nodes:
                self.cluster[node] = union
            merged = True
        return merged

    def _pairs(self) -> list[tuple[tuple[int, int], Node, Node]]:
        """(order, producer, consumer) of neighbours, those that share most bytes first."""
        pairs: dict[tuple[int, int], tuple[tuple[int, int], Node, Node]] = {}
        for node, cluster in self.cluster.items():
            if cluster.plan is None:
                continue
            for operand in _operands(node):
                other = self.cluster[operand]
                if other is not cluster and other.plan is not None:
                    value = operand.meta["val"]
                    size = value.numel() * value.dtype.itemsize if isinstance(value, torch.Tensor) else 0
                    order = (-_hint(size), self.position[node])
                    pairs.setdefault((id(other), id(cluster)), (order, operand, node))
        return list(pairs.values())

    def _union(self, first: _Cluster, second: _Cluster, nodes: list[Node]) -> _Cluster | None:
        if self._has_detour(first, second):
            return None
        found = self._plan(nodes)
        if found is None or bytes_after(found) >= first.cost + second.cost:
            return None
        if isinstance(found, MatmulPlan) and not gains(found, first.cost + second.cost - bytes_after(found)):
            return None
        return _Cluster(nodes, found)

    def _has_detour(self, first: _Cluster, second: _Cluster) -> bool:
        """Whether a path leads from one of the two groups to the other through a third: their union would wait for itself."""
        last = max(self.position[node] for c in (first, second) for node in c.nodes)
        seen: set[int] = set()
        waiting = [c for c in self._after([first, second]) if c is not first and c is not second]
        while waiting:
            cluster = waiting.pop()
            if id(cluster) in seen:
                continue
            seen.add(id(cluster))
            if len(cluster.nodes) == 1 and self.position[cluster.nodes[0]] > last:
                continue
            for after in self._after([cluster]):
                if after is first or after is second:
                    return True
                waiting.append(after)
        return False

    def _after(self, clusters: Sequence[_Cluster]) -> list[_Cluster]:
        return [self.cluster[user] for cluster in clusters for node in cluster.nodes for user in self.users[node]]


def _group(cluster: _Cluster) -> Group:
    found = cluster.plan
    assert found is not None
    return Group(found.nodes, found.inputs, found.outputs, found.kind, bytes_before(found.nodes), bytes_after(found), found)


def _operand(call: Node) -> Group:
    numbered: dict[Any, Node] = {result.args[1]: result for result in call.users}
    results = [numbered[number] for number in range(len(numbered))]
    found = operand_plan(call, results)
    return Group((call, *results), found.inputs, found.outputs, found.kind, bytes_before([call]), bytes_after(found), found)


def _hint(size: object) -> int:
    return size if isinstance(size, int) else int(size.node.hint or 0)  # type: ignore[attr-defined]
