"""From a function's graph to the graph that runs: each region becomes a `SlicedRun`, and what a backend compiles one call."""

from collections.abc import Callable, Mapping
from typing import Any

from torch import fx

from ..ir import Node
from ..ir.program import region_of
from ..ir.donation import plan_donations
from .sliced import SlicedRun

Backend = str


def lower(graph: fx.Graph, backend: Backend) -> fx.Graph:
    """The runnable form of `graph` for `backend`, "aten" or "inductor"."""
    donors = plan_donations(graph)
    return _lower_regions(graph, lambda call: SlicedRun(call, donors.get(call, {})))


def _lower_regions(graph: fx.Graph, run: Callable[[Node], SlicedRun]) -> fx.Graph:
    """`graph` with each region call replaced by a call of what `run` gives for it, on `(count, units, *operands)`."""
    lowered, copies = fx.Graph(), {}
    for node in graph.nodes:
        copies[node] = lowered.node_copy(node, copies.__getitem__)
        if region_of(node) is not None:
            _, _, _, count, *operands = copies[node].args
            copies[node].args = (count, copies[node].kwargs.get("units"), *operands)
            copies[node].kwargs = {}
            copies[node].target = run(node)
    return lowered
