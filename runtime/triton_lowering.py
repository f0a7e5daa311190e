"""Segments of a program as Triton kernels: a call for each group, and every other operation by its own kernel.

Views that only groups look through are not made. Region bodies stay with library kernels.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import networkx
import torch
from torch import fx

from ..codegen.cpu_kernels import IN_PLACE
from ..codegen.triton.attention import launch as attention
from ..codegen.triton.experts import launch as experts
from ..codegen.triton.rat import launch as rat
from ..ir import Function, Node, SymbolTable
from ..ir.calls import GETITEM
from ..ir.infer import tensors_of
from ..ir.printer import node_lines
from ..ir.tree import LEAF
from .cache import Cache
from .code_cache import CodeCache
from .flat import FlatGraph
from .segments import cut_out
from .sliced import SlicedRun

if TYPE_CHECKING:
    from ..codegen.triton import Kernel
    from ..codegen.triton.emit import AnyPlan
    from ..codegen.triton.groups import Group
    from ..codegen.triton.launch import Launch
    from ..codegen.triton.tune import Tuner

# Kernels written by hand that run in the place of one call.
_KERNELS: dict[Any, Callable[..., Any]] = {
    torch.ops.gw.cached_attention.default: attention.cached_attention,
    torch.ops.gw.expert_mlp.default: experts.expert_mlp,
    torch.ops.gw.grouped_mm.default: experts.grouped_mm,
    torch.ops.gw.rat_attention.default: rat.rat_attention,
    torch.ops.gw.token_choice_moe.default: experts.token_choice_moe,
}


class TritonLowering:
    """Lowers `graph` for a GPU; `interpreted` runs the kernels on CPU tensors in Triton's interpreter, for tests. With `tune`, tiles are
    timed, and what is found is kept in `cache`.

    Raises:
        TargetError: `interpreted`, and triton compiles in this process.
    """

    in_place = IN_PLACE | {
        torch.ops.gw.kv_append.default: attention.append_in_place,
        torch.ops.gw.rat_cached_attention.default: rat.step_in_place,
    }

    def __init__(self, graph: fx.Graph, symbols: SymbolTable, interpreted: bool, tune: bool = False, cache: Cache | None = None):
        from ..codegen.triton.launch import require_interpreter

        if interpreted:
            require_interpreter()
        self.graph = graph
        self.symbols = symbols
        self.pieces: dict[Node, Node] = {}
        self.left: set[Node] = set()
        self.code: CodeCache | None = None
        self.device = "cpu" if interpreted else "cuda"
        self._tunes, self._cache = tune, cache
        self._tuners: dict[torch.device, Tuner] = {}
        self._lines = node_lines(Function("main", graph, LEAF, LEAF), symbols)

    def prepared(self, graph: fx.Graph) -> tuple[fx.Graph, dict[Node, Node]]:
        """`graph` with two calls for each low-rank linear layer, and from which of its nodes each call came."""
        from ..codegen.triton.low_rank import split

        self.graph, source = split(graph, self.symbols)
        self._lines |= {node: self._lines[origin] for node, origin in source.items() if origin in self._lines}
        return self.graph, source

    def region(self, node: Node, donors: Mapping[int, int]) -> SlicedRun:
        return SlicedRun(node, donors)

    def segment(self, nodes: Sequence[Node], lowered: fx.Graph, copies: dict[Node, Node]) -> None:
        """Adds a run of calls to `lowered`."""
        launches = self._launches(nodes)
        if self._tunes:
            beaten = {node for group, launch in launches.values() if self._is_beaten(group, launch) for node in group.plan.products}
            launches = self._launches([node for node in nodes if node not in beaten]) if beaten else launches
        self._add(nodes, launches, lowered, copies)

    def _add(
        self, nodes: Sequence[Node], launches: "Mapping[Node, tuple[Group, Launch]]", lowered: fx.Graph, copies: dict[Node, Node]
    ) -> None:
        """Adds calls to `lowered`, a launch in the place of each group."""
        for node in _schedule(nodes, {node: group for node, (group, _) in launches.items()}):
            if node not in launches:
                copies[node] = lowered.node_copy(node, copies.__getitem__)
                if node.target in _KERNELS and node.meta["val"].device.type == self.device:
                    copies[node].target = _KERNELS[node.target]
                continue
            group, launch = launches[node]
            operands = tuple(map(copies.__getitem__, group.inputs))
            call = lowered.create_node("call_function", launch, operands, name=launch.kernel.name)
            call.meta = {"val": tuple(output.meta["val"] for output in group.outputs), "where": node.meta.get("where")}
            for index, output in enumerate(group.outputs):
                copies[output] = lowered.call_function(GETITEM, (call, index))
                copies[output].meta = output.meta

    def _launches(self, among: Sequence[Node]) -> "dict[Node, tuple[Group, Launch]]":
        """The group that each of these calls is in, and its kernel; calls in no group are left out."""
        from ..codegen.triton import NotFusible
        from ..codegen.triton.groups import find_groups
        from ..codegen.triton.launch import Launch

        launches: dict[Node, tuple[Group, Launch]] = {}
        for group in find_groups(self.graph, among):
            if _device(group.plan).type != self.device:
                continue
            try:
                kernel = self._kernel(group.plan)
            except NotFusible:  # a size that no input of the group tells
                continue
            if kernel is not None:
                launches |= dict.fromkeys(group.nodes, (group, Launch(kernel)))
        return launches

    def _is_beaten(self, group: "Group", launch: "Launch") -> bool:
        """Whether the library's products, and kernels of ours for what surrounds them, are faster than the group's kernel."""
        from ..codegen.triton.reference import in_order

        if group.kind != "matmul":
            return False
        calls = in_order(group.nodes, group.outputs)
        alone = cut_out(calls, group.inputs, group.outputs)
        others = dict(zip(calls, (node for node in alone.nodes if node.op == "call_function"), strict=True))
        lowering = TritonLowering(alone, self.symbols, interpreted=self.device == "cpu", tune=True)
        lowering._tuners = self._tuners
        rest = lowering._launches([others[node] for node in calls if node not in group.plan.products])
        lowered = fx.Graph()
        copies = {node: lowered.node_copy(node) for node in alone.nodes if node.op == "placeholder"}
        lowering._add([node for node in alone.nodes if node.op == "call_function"], rest, lowered, copies)
        lowered.output(tuple(copies[leaf] for leaf in alone.output_node().args[0]))
        run = FlatGraph(lowered)
        device = _device(group.plan)
        return self._tuners[device].is_beaten(launch.kernel, lambda *inputs: run(list(inputs)))

    def _kernel(self, plan: "AnyPlan") -> "Kernel | None":
        from ..codegen.triton import emit
        from ..codegen.triton.targets import target_of
        from ..codegen.triton.tune import Tuner

        device = _device(plan)
        target = target_of(device)
        if not self._tunes:
            return emit(plan, self.symbols, self._lines, target=target)
        if device not in self._tuners:
            self._tuners[device] = Tuner(device, target, self._cache)
        return self._tuners[device].kernel(plan, self.symbols, self._lines)


def _device(plan: "AnyPlan") -> torch.device:
    return tensors_of(plan.outputs[0].meta["val"])[0].device


def _schedule(nodes: Sequence[Node], group_of: "Mapping[Node, Group]") -> Iterable[Node]:
    """The calls of a segment in an order in which each follows its operands; a group counts as one call, named by its first node.
    A call that gives only what groups look through is left out."""
    position = {node: n for n, node in enumerate(nodes)}
    first = {node: group_of[node].nodes[0] if node in group_of else node for node in nodes}
    reads = {node: _reads(node, group_of) for node in nodes}
    needed = _needed(nodes, reads, group_of)
    waiting: dict[Node, set[Node]] = {}
    for node in nodes:
        if node in needed:
            waiting.setdefault(first[node], set()).update(first[o] for o in reads[node] if o in position)
    order = networkx.DiGraph()
    order.add_nodes_from(waiting)
    order.add_edges_from((operand, unit) for unit, operands in waiting.items() for operand in operands - {unit})
    # Groups are convex together, so there is no cycle.
    yield from networkx.lexicographical_topological_sort(order, key=position.__getitem__)


def _reads(node: Node, group_of: "Mapping[Node, Group]") -> Sequence[Node]:
    """What has to exist before a call: the inputs of its group, or its own operands."""
    return group_of[node].inputs if node in group_of else node.all_input_nodes


def _needed(nodes: Sequence[Node], reads: Mapping[Node, Sequence[Node]], group_of: "Mapping[Node, Group]") -> set[Node]:
    """The members of groups, and what is read by a call that is needed or by one outside the segment, or has an effect."""
    inside, needed = set(nodes), set(group_of)
    needed |= {value for group in group_of.values() for value in group.inputs}
    for node in reversed(nodes):
        is_read = any(user not in inside or (user in needed and node in reads[user]) for user in node.users)
        if is_read or node in needed or not node.users:
            needed.add(node)
    return needed
