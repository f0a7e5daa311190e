"""Attention by the kernel that has a query a lane, each call where the probe finds that it wins over ATen's."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch

from ..codegen.cpu_packed import hinted, is_dense
from ..codegen.sdpa.attention import AttentionCall, is_fit
from ..codegen.sdpa.library import library
from ..ir import Node
from ..ir.pattern import named_arguments
from .cache import Cache
from .code_cache import load_native
from .probe import Probe
from .tuned_segments import random_like

_ATTENTION = torch.ops.aten.scaled_dot_product_attention.default
_OPERANDS = ("query", "key", "value", "attn_mask")


class Attentions:
    """Asks `probe` for each call; the compiled kernel may come from `cache`."""

    def __init__(self, probe: Probe, cache: Cache | None):
        self._probe, self._cache = probe, cache

    def put(self, nodes: Iterable[Node]) -> None:
        """Makes calls of the kernel of those among `nodes` for which it wins."""
        for node in [node for node in nodes if node.target is _ATTENTION]:
            arguments = named_arguments(node)
            call = self._call_of(arguments, node.meta["val"])
            if call is not None and self._wins(call, _types(arguments)):
                node.target, node.args, node.kwargs = call, tuple(arguments[name] for name in _OPERANDS), {}

    def _call_of(self, arguments: Mapping[str, Any], result: torch.Tensor) -> AttentionCall | None:
        """The kernel's call; None where it has no form for the operands or the layout of the result."""
        q, k, v, mask = _types(arguments)
        is_causal, enable_gqa = arguments["is_causal"], arguments["enable_gqa"]
        if arguments["dropout_p"] != 0 or not is_fit(q, k, v, mask, is_causal, enable_gqa) or any(x.stride(-1) != 1 for x in (q, k, v)):
            return None
        heads_inside = not is_dense(result)
        if heads_inside and not is_dense(result.transpose(-2, -3)):
            return None
        is_there = load_native(library, self._cache) is not None
        return AttentionCall(is_causal, arguments["scale"], enable_gqa, heads_inside) if is_there else None

    def _wins(self, call: AttentionCall, types: Sequence[torch.Tensor | None]) -> bool:
        question = f"{call.settings} {[None if value is None else (value.dtype, *hinted(value)) for value in types]}"
        verdict = self._probe.known("attention", question)
        if verdict is None:
            values: list[Any] = [None if value is None else random_like(value) for value in types]
            options = {"scale": call.scale, "enable_gqa": call.enable_gqa}
            ways = {"aten": lambda: _ATTENTION(*values, 0.0, call.is_causal, **options), "lanes": lambda: call(*values)}
            with torch.no_grad(), torch._C._DisableAutocast():
                verdict = self._probe.fastest("attention", question, ways)
        return verdict == "lanes"


def _types(arguments: Mapping[str, Any]) -> list[Any]:
    """The types of q, k, v and mask, None where there is none."""
    return [None if arguments[name] is None else arguments[name].meta["val"] for name in _OPERANDS]
