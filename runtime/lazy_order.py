"""The order of a segment in which what lies between anchors comes in as few runs as can be.

An anchor, a call that is not compiled, stays where it is; before it come only those calls that it needs and that are not there yet,
and all others wait. So the rotary embedding of queries, keys and values is one run, although each follows a product of its own.
"""

from collections.abc import Callable, Iterator, Sequence

from ..ir import Node
from ..ir.calls import GETITEM, is_pure


def lazy_runs(nodes: Sequence[Node], anchored: Callable[[Node], Sequence[Node] | None]) -> Iterator[Node | list[Node]]:
    """Runs of calls, and between them the anchors one by one. `anchored` gives what an anchor reads, None for any other call."""
    nodes = _with_parts(nodes)
    waiting: dict[Node, None] = {}
    keeps_order = not all(is_pure(node) for node in nodes)
    for node in nodes:
        reads = anchored(node)
        if reads is None:
            waiting[node] = None
            continue
        needed = set(waiting) if keeps_order else _among(waiting, reads)
        if needed:
            yield [waited for waited in waiting if waited in needed]
        for done in needed:
            del waiting[done]
        yield node
    if waiting:
        yield list(waiting)


def _among(waiting: dict[Node, None], reads: Sequence[Node]) -> set[Node]:
    """Those of `waiting` that `reads` are, or are computed from; of a call with several results all of these."""
    found: set[Node] = set()
    stack = [node for node in reads if node in waiting]
    while stack:
        node = stack.pop()
        if node not in found:
            found.add(node)
            stack += [operand for operand in node.all_input_nodes if operand in waiting]
            stack += [part for part in node.users if part.target is GETITEM and part in waiting]
    return found


def _with_parts(nodes: Sequence[Node]) -> list[Node]:
    """The calls with the results of one that has several right behind it: a compiled run takes and gives tensors alone."""
    ordered: list[Node] = []
    for node in nodes:
        if node.target is not GETITEM:
            ordered += [node, *(user for user in node.users if user.target is GETITEM)]
    return ordered
