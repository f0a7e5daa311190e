"""Which caches a call may write where they lie.

`gw.kv_append` and `gw.rat_cached_attention` are functional: they give new caches. Where the old ones are inputs or states of the function
that take these very results for their new values, and nothing else reads them, nobody can tell, and a step costs what it adds and not
what the caches hold.
"""

import torch
from torch import fx

from . import ops  # noqa: F401  (registers the operators)
from .calls import GETITEM
from .infer import tensors_of
from .program import Node

# Operator -> {result: the operand, a cache, that it is the new value of}
CACHES = {
    torch.ops.gw.kv_append.default: {0: 0, 1: 1},
    torch.ops.gw.rat_cached_attention.default: {1: 7, 2: 8, 3: 9, 4: 10},
}


def caches_of(call: Node) -> dict[int, Node]:
    """Result of a call that gives new caches -> the old one; nothing for other calls, and where an old one is no value of the graph."""
    places: dict[int, int] = CACHES.get(call.target, {})  # type: ignore[call-overload]
    found = {result: call.args[operand] for result, operand in places.items() if operand < len(call.args)}
    caches = {result: cache for result, cache in found.items() if isinstance(cache, fx.Node)}
    return caches if len(caches) == len(places) else {}


def plan_appends(graph: fx.Graph) -> dict[Node, dict[int, Node]]:
    """Call that gives new caches -> for each of these results the placeholder of the old one, which it may write to."""
    new_values = _new_values(graph)
    found = {node: caches_of(node) for node in graph.nodes if node.target in CACHES}
    return {call: caches for call, caches in found.items() if caches and _are_given_up(call, caches, new_values)}


def _new_values(graph: fx.Graph) -> dict[str, object]:
    """The name of an input or state that has a new value -> the node of that."""
    output = graph.output_node()
    names = output.meta.get("new_states", ())
    leaves = tuple(output.args[0])  # type: ignore[arg-type]
    return dict(zip(names, leaves[len(leaves) - len(names) :], strict=True))


def _are_given_up(call: Node, caches: dict[int, Node], new_values: dict[str, object]) -> bool:
    return all(_is_given_up(call, result, cache, new_values) for result, cache in caches.items())


def _is_given_up(call: Node, result: int, cache: Node, new_values: dict[str, object]) -> bool:
    if cache.op != "placeholder":
        return False
    is_state = cache.meta.get("role", "input") == "state"
    new = new_values.get(str(cache.target) if is_state else f"input:{cache.target}")
    if not isinstance(new, fx.Node) or new.target is not GETITEM or new.args != (call, result):
        return False
    return list(call.args).count(cache) == 1 and not any(_reads_elements(user) for user in cache.users if user is not call)


def _reads_elements(user: Node) -> bool:
    """Whether a user of a cache looks at more than its sizes."""
    return user.op == "output" or bool(tensors_of(user.meta.get("val")))
