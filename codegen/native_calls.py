"""Which calls of a graph run by kernels of ours in C++, and the libraries that these need. Inductor's code stops before them."""

from collections.abc import Iterable

import torch

from ..ir import Node
from .attention.library import library as attention
from .low_rank import sites
from .low_rank.library import library as low_rank
from .native.library import NativeLibrary
from .rat.library import library as rat

_ON_CACHES = (torch.ops.gw.kv_append.default, torch.ops.gw.cached_attention.default)
_RAT = (torch.ops.gw.rat_attention.default, torch.ops.gw.rat_cached_attention.default)


def has_kernel(node: Node) -> bool:
    """Whether a call is one that a kernel of ours runs here."""
    return sites.has_kernel(node) or _is_on_caches(node) or _is_rat(node)


def libraries_of(nodes: Iterable[Node]) -> list[NativeLibrary]:
    """The libraries that calls among `nodes` need."""
    nodes = list(nodes)
    wanted = ((low_rank, sites.is_of_native_form), (attention, _is_on_caches), (rat, _is_rat))
    return [library for library, is_its in wanted if any(map(is_its, nodes))]


def _is_on_caches(node: Node) -> bool:
    """Whether a call works on caches of keys and values in this machine's memory: where the kernels have no form, or no compiler, for
    it, ATen does it, and writes in place too."""
    return node.target in _ON_CACHES and _lies_here(node)


def _is_rat(node: Node) -> bool:
    """Likewise for the chunked recurrence: where the kernel has no form for it, the operator's body runs call by call."""
    return node.target in _RAT and _lies_here(node)


def _lies_here(node: Node) -> bool:
    return all(each.meta["val"].device.type == "cpu" for each in node.all_input_nodes)
