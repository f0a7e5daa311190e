"""Which experts tokens had on given inputs: how even the load is, and which tokens nobody took."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...ir import Node, Program
from ...ir.calls import GETITEM
from ...ir.errors import InputError
from ...ir.pattern import named_arguments
from ...ir.run import run

gw = torch.ops.gw


@dataclass(frozen=True)
class RoutingStatistics:
    """Of one mixture. `load[e]` counts the tokens of expert e, `experts_per_token[n]` those with n experts; `untouched` is the share of all
    tokens with none, `untouched_masked` and `untouched_others` that among those that were masked, and among the rest (None: not told).
    `void` counts slots of experts that hold no token."""

    load: tuple[int, ...]
    experts_per_token: tuple[int, ...]
    untouched: float
    untouched_masked: float | None
    untouched_others: float | None
    void: int

    def __str__(self) -> str:
        mean = sum(self.load) / len(self.load)
        uneven = max(self.load) / mean if mean else 0.0
        parts = [f"tokens an expert: {min(self.load)} to {max(self.load)}, largest {uneven:.2f} x the mean"]
        parts.append(f"no expert: {self.untouched:.1%} of tokens")
        if self.untouched_masked is not None and self.untouched_others is not None:
            parts.append(f"{self.untouched_masked:.1%} of masked, {self.untouched_others:.1%} of others")
        return "; ".join(parts + ([f"{self.void} empty slots"] if self.void else []))


def routing_statistics(
    program: Program, inputs: Sequence[Any], masked: Tensor | None = None, function: str = "main"
) -> list[RoutingStatistics]:
    """Of every mixture of `function`, in order, on flat `inputs` (one a leaf), whether its tokens or its experts choose.

    `masked` bool[B, S] says which tokens stand for masks.

    Raises:
        InputError: `masked` does not have an element for each token.
    """
    found: list[RoutingStatistics] = []
    places = {each: node for node in program.functions[function].calls if (each := _choice(node)) is not None}

    def observe(node: Node, value: Any) -> Any:
        if node in places:
            found.append(_counted(places[node], value, masked))
        return value

    run(program, inputs, function=function, observe=observe)
    return found


def _choice(node: Node) -> Any:
    """The node whose value says which tokens and experts meet in the mixture `node`; None for other calls."""
    if node.target not in (gw.expert_mlp.default, gw.token_choice_moe.default):
        return None
    index = named_arguments(node)["index"]
    return index if index.target is GETITEM else None


def _counted(mixture: Node, index: Tensor, masked: Tensor | None) -> RoutingStatistics:
    named = named_arguments(mixture)
    experts = int(named["gate_up"].meta["val"].size(0))
    if mixture.target is gw.expert_mlp.default:
        batch, _, capacity = index.shape
        length = int(named["x"].meta["val"].size(1))
        live = index >= 0
        load = live.sum((0, 2))
        rows = torch.arange(batch, device=index.device).reshape(-1, 1, 1).expand_as(index)
        tokens = torch.bincount((rows * length + index)[live], minlength=batch * length)
        void = int((~live).sum())
    else:
        load = torch.bincount(index.flatten(), minlength=experts)
        tokens, void = torch.full((len(index),), index.size(1)), 0
    untouched = (tokens == 0).cpu()
    if masked is not None and masked.numel() != len(untouched):
        raise InputError(f"masked has {masked.numel()} elements for {len(untouched)} tokens: give a bool for each")
    hidden = None if masked is None else masked.flatten().cpu()
    return RoutingStatistics(
        tuple(load.tolist()),
        tuple(torch.bincount(tokens, minlength=experts + 1).tolist()),
        float(untouched.double().mean()),
        None if hidden is None else _share(untouched[hidden]),
        None if hidden is None else _share(untouched[~hidden]),
        void,
    )


def _share(flags: Tensor) -> float:
    return float(flags.double().mean()) if len(flags) else 0.0
