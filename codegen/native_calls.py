"""Which calls of a graph run by kernels of ours, in C++ or made of the library's, and the libraries that these need. Inductor's code stops
before them."""

from collections.abc import Iterable, Sequence
from typing import Any

import torch

from ..ir import Node
from .attention.library import library as attention
from .low_rank import sites
from .low_rank.library import library as low_rank
from .native.library import NativeLibrary
from .rat.library import library as rat

_ON_CACHES = (torch.ops.gw.kv_append.default, torch.ops.gw.cached_attention.default)
_OF_EXPERTS = tuple(getattr(torch.ops.gw, name).default for name in ("token_choice_moe", "grouped_mm", "expert_choice", "expert_mlp"))
_RAT = (torch.ops.gw.rat_attention.default, torch.ops.gw.rat_cached_attention.default)


def has_kernel(node: Node) -> bool:
    """Whether a call is one that a kernel of ours runs here."""
    return sites.has_kernel(node) or _is_on_caches(node) or _is_rat(node) or _is_on_cpu(node, _OF_EXPERTS)


def libraries_of(nodes: Iterable[Node]) -> list[NativeLibrary]:
    """The libraries that calls among `nodes` need."""
    nodes = list(nodes)
    wanted = ((low_rank, sites.is_of_native_form), (attention, _is_on_caches), (rat, _is_rat))
    return [library for library, is_its in wanted if any(map(is_its, nodes))]


def _is_on_caches(node: Node) -> bool:
    """Whether a call works on caches of keys and values in this machine's memory: where the kernels have no form, or no compiler, for
    it, ATen does it, and writes in place too."""
    return _is_on_cpu(node, _ON_CACHES)


def _is_rat(node: Node) -> bool:
    """Likewise for the chunked recurrence: where the kernel has no form for it, the operator's body runs call by call."""
    return _is_on_cpu(node, _RAT)


def _is_on_cpu(node: Node, targets: Sequence[Any]) -> bool:
    return node.target in targets and all(each.meta["val"].device.type == "cpu" for each in node.all_input_nodes)
