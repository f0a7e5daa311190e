"""Which caches `gw.kv_append` may write where they lie.

A call is functional: it gives new caches. Where the old ones are inputs or states of the function that take these very results for
their new values, and nothing else reads them, nobody can tell, and a step costs what it adds and not what the caches hold.
"""

import torch
from torch import fx

from .calls import GETITEM
from .infer import tensors_of
from .program import Node


def plan_appends(graph: fx.Graph) -> dict[Node, tuple[Node, Node]]:
    """Call of gw.kv_append -> the placeholders of its two caches, which it may write to."""
    new_values = _new_values(graph)
    plan = {}
    for node in graph.nodes:
        if node.target is torch.ops.gw.kv_append.default and all(_is_given_up(node, index, new_values) for index in (0, 1)):
            plan[node] = (node.args[0], node.args[1])
    return plan


def _new_values(graph: fx.Graph) -> dict[str, object]:
    """The name of an input or state that has a new value -> the node of that."""
    output = graph.output_node()
    names = output.meta.get("new_states", ())
    leaves = tuple(output.args[0])  # type: ignore[arg-type]
    return dict(zip(names, leaves[len(leaves) - len(names) :], strict=True))


def _is_given_up(append: Node, index: int, new_values: dict[str, object]) -> bool:
    cache = append.args[index] if index < len(append.args) else None
    if not isinstance(cache, fx.Node) or cache.op != "placeholder":
        return False
    is_state = cache.meta.get("role", "input") == "state"
    new = new_values.get(str(cache.target) if is_state else f"input:{cache.target}")
    if not isinstance(new, fx.Node) or new.target is not GETITEM or new.args != (append, index):
        return False
    return list(append.args).count(cache) == 1 and not any(_reads_elements(user) for user in cache.users if user is not append)


def _reads_elements(user: Node) -> bool:
    """Whether a user of a cache looks at more than its sizes."""
    return user.op == "output" or bool(tensors_of(user.meta.get("val")))
