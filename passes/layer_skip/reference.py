"""A decoder with layers left out at some positions, in one pass over all of a sequence and without caches: the meaning of a schedule.

    h_{l+1} = where(on[l, t], h_l + f_l(h_l), s_l h_l)      f_l with causal attention over all positions, s_l = 1 but with compensation

Source: specs/layer_skip.md, section 2 (skip_reference).
"""

from collections.abc import Sequence
from typing import Any

import torch

from ...ir import Node, Program
from ...ir.derive import Derivation
from ...ir.run import run
from ..kv_cache.decoder import Decoder
from .units import Unit

aten = torch.ops.aten


class SkipReference:
    """`logits(tokens, active)`: tokens i64[B, T], active[t] the layers that run at position t -> logits [B, T, V]."""

    def __init__(self, program: Program, decoder: Decoder, units: Sequence[Unit]):
        self.units, self.decoder, self._whole = units, decoder, program
        self._program, self._streams = _masked(program, decoder, units)

    def logits(self, tokens: torch.Tensor, active: Sequence[Sequence[int]]) -> torch.Tensor:
        return run(self._program, self._inputs(tokens, active))[0][0]

    def hidden(self, tokens: torch.Tensor, active: Sequence[Sequence[int]]) -> list[torch.Tensor]:
        """h_0, .., h_N [B, T, D], in float32 at least: what the layers read, and what the last gives."""
        seen: dict[Node, torch.Tensor] = {}

        def keep(node: Node, value: Any) -> Any:
            if node in self._streams:
                seen[node] = value.to(torch.promote_types(value.dtype, torch.float32)).reshape(*tokens.shape, -1)
            return value

        run(self._program, self._inputs(tokens, active), observe=keep)
        return [seen[node] for node in self._streams]

    def _inputs(self, tokens: torch.Tensor, active: Sequence[Sequence[int]]) -> list[torch.Tensor]:
        on = torch.tensor([[unit.index in layers for layers in active] for unit in self.units], device=tokens.device)
        return [*(value for value in self.decoder.inputs(self._whole, tokens) if isinstance(value, torch.Tensor)), on]


def _masked(program: Program, decoder: Decoder, units: Sequence[Unit]) -> tuple[Program, list[Node]]:
    """(inputs of main, on bool[N, T]) -> logits; and the values that it passes from layer to layer."""
    made = Derivation(program)
    for node in program.main.placeholders:
        value = node.meta["val"]
        is_tensor = isinstance(value, torch.Tensor)
        made.values[node] = made.input(str(node.target), value.dtype, value.shape, value.device) if is_tensor else value
    on = made.input("on", torch.bool, (len(units), decoder.length), decoder.tokens.meta["val"].device)
    by_result = {unit.result: unit for unit in units}
    for node in program.main.calls:
        value = made.copy(node)
        if node in by_result:
            unit = by_result[node]
            mask: Any = made.call(aten.unsqueeze.default, made.call(aten.select.int, on, 0, unit.index), 1)
            source = made.values[unit.source]
            instead = source if unit.scale == 1.0 else made.call(aten.mul.Tensor, source, unit.scale, like=node)
            made.values[node] = made.call(aten.where.self, mask, value, instead, like=node)
    main = made.finish("main", [made.values[decoder.logits]], {})
    streams = [made.values[node] for node in (units[0].source, *(unit.result for unit in units))]
    return Program([main], program.weights, program.symbols), streams
