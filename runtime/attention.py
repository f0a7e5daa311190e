"""Attention by the kernel that has a query a lane, each call where the probe finds that it wins over ATen's."""

from collections.abc import Iterable
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
            call = self._call_of(node)
            if call is not None and self._wins(node, call):
                arguments = named_arguments(node)
                node.target, node.args, node.kwargs = call, tuple(arguments[name] for name in _OPERANDS), {}

    def _call_of(self, node: Node) -> AttentionCall | None:
        """The kernel's call; None where it has no form for the operands or the layout of the result."""
        arguments = named_arguments(node)
        q, k, v, mask = (None if arguments[name] is None else arguments[name].meta["val"] for name in _OPERANDS)
        settings = arguments["is_causal"], arguments["enable_gqa"]
        if arguments["dropout_p"] != 0 or not is_fit(q, k, v, mask, *settings) or any(x.stride(-1) != 1 for x in (q, k, v)):
            return None
        result = node.meta["val"]
        if load_native(library, self._cache) is None:
            return None
        for heads_inside in (False, True):
            laid_out = result.transpose(-2, -3) if heads_inside else result
            if is_dense(laid_out):
                return AttentionCall(arguments["is_causal"], arguments["scale"], arguments["enable_gqa"], heads_inside)
        return None

    def _wins(self, node: Node, call: AttentionCall) -> bool:
        arguments = named_arguments(node)
        types = [None if arguments[name] is None else arguments[name].meta["val"] for name in _OPERANDS]
        shapes = [None if value is None else (value.dtype, *hinted(value)) for value in types]
        question = f"{call.settings} {shapes}"
        verdict = self._probe.known("attention", question)
        if verdict is None:
            values: list[Any] = [None if value is None else random_like(value) for value in types]
            plain = (*values, 0.0, call.is_causal)
            options = {"scale": call.scale, "enable_gqa": call.enable_gqa}
            ways = {"aten": lambda: _ATTENTION(*plain, **options), "lanes": lambda: call(*values)}
            with torch.no_grad(), torch._C._DisableAutocast():
                verdict = self._probe.fastest("attention", question, ways)
        return verdict == "lanes"
