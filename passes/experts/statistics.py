"""Which experts tokens had on given inputs: how even the load is, which tokens nobody took, and what that cost."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...ir import Node, Program
from ...ir.calling import Call
from ...ir.errors import InputError
from ...ir.pattern import named_arguments
from ...ir.run import run
from .limit import mixtures

gw = torch.ops.gw


@dataclass(frozen=True)
class RoutingStatistics:
    """Of one mixture. `load[e]` counts the tokens of expert e, `experts_per_token[n]` those with n experts; `untouched` is the share of all
    tokens with none, `untouched_masked` and `untouched_others` that among those that were masked, and among the rest (None: not told).
    `void` counts slots of experts that hold no token, `flops` are those of the products of tokens and slots with experts."""

    load: tuple[int, ...]
    experts_per_token: tuple[int, ...]
    untouched: float
    untouched_masked: float | None
    untouched_others: float | None
    void: int
    flops: int = 0

    def __str__(self) -> str:
        mean = sum(self.load) / len(self.load)
        uneven = max(self.load) / mean if mean else 0.0
        parts = [f"tokens an expert: {min(self.load)} to {max(self.load)}, largest {uneven:.2f} x the mean"]
        parts.append(f"no expert: {self.untouched:.1%} of tokens")
        if self.untouched_masked is not None and self.untouched_others is not None:
            parts.append(f"{self.untouched_masked:.1%} of masked, {self.untouched_others:.1%} of others")
        parts += [f"{self.void} empty slots"] if self.void else []
        return "; ".join([*parts, f"{self.flops:.3g} FLOPs"])


def routing_statistics(
    program: Program, inputs: Sequence[Any], masked: Tensor | None = None, function: str = "main"
) -> list[RoutingStatistics]:
    """Of every mixture of `function`, in order, on flat `inputs` (one a leaf), whether its tokens or its experts choose. Mixtures inside of
    slices are left out.

    `masked` bool[B, S] says which tokens stand for masks.

    Raises:
        InputError: `program` is none or has no such function; inputs do not fit it; `masked` is no bool for each token.
    """
    if not isinstance(program, Program):
        raise InputError(f"routing_statistics counts in a program, as compiled.program is one, not in a {type(program).__name__}")
    if function not in program.functions:
        raise InputError(f"the program has no function {function}: it has {', '.join(program.functions)}")
    if not isinstance(inputs, Sequence) or isinstance(inputs, str):
        raise InputError(f"inputs are a list with a value for each leaf, not a {type(inputs).__name__}")
    if masked is not None and not (isinstance(masked, Tensor) and masked.dtype == torch.bool):
        raise InputError("masked is a tensor bool[B, S] that is true where a token stands for a mask, as tokens == mask_id")
    bound = Call(program, program.functions[function]).bind_flat(inputs)
    return [counts.statistics() for counts in count_routing(program, bound, function, masked)]


@dataclass(frozen=True)
class Counts:
    """What `RoutingStatistics` are made of: `hidden` is (untouched masked, masked) tokens where these were told apart."""

    load: Tensor
    experts_per_token: Tensor
    hidden: tuple[int, int] | None
    void: int
    flops: int

    def __add__(self, other: "Counts") -> "Counts":
        """Of the rows of both."""
        both = None if self.hidden is None or other.hidden is None else (self.hidden[0] + other.hidden[0], self.hidden[1] + other.hidden[1])
        tokens = self.experts_per_token + other.experts_per_token
        return Counts(self.load + other.load, tokens, both, self.void + other.void, self.flops + other.flops)

    def statistics(self) -> RoutingStatistics:
        tokens, untouched = int(self.experts_per_token.sum()), int(self.experts_per_token[0])
        masked, others = None, None
        if self.hidden is not None:
            masked, others = _share(*self.hidden), _share(untouched - self.hidden[0], tokens - self.hidden[1])
        load, counts = tuple(self.load.tolist()), tuple(self.experts_per_token.tolist())
        return RoutingStatistics(load, counts, _share(untouched, tokens), masked, others, self.void, self.flops)


def count_routing(
    program: Program,
    inputs: Sequence[Any],
    function: str,
    masked: Tensor | None = None,
    *,
    rows: int | None = None,
    states: Mapping[str, Tensor] | None = None,
    instead: Mapping[Any, Callable[..., Any]] | None = None,
) -> list[Counts]:
    """Of every mixture of `function`, on inputs that fit it; of a batch of which the first `rows` count. `instead` are kernels that are
    called in the place of operators."""
    nodes = mixtures(program.functions[function])
    chosen = {node: named_arguments(node)["index"] for node in nodes}
    kept: dict[Node, Tensor] = {}

    def observe(node: Node, value: Any) -> Any:
        if node in chosen.values():
            kept[node] = value
        return value

    leaves = [node for node in program.functions[function].placeholders if node.meta.get("role", "input") == "input"]
    kept |= {node: value for node, value in zip(leaves, inputs, strict=True) if node in chosen.values()}
    run(program, inputs, function=function, states=states, observe=observe, instead=instead)
    return [_counted(node, kept[index], masked, rows) for node, index in chosen.items() if index in kept]


def _counted(mixture: Node, index: Tensor, masked: Tensor | None, rows: int | None) -> Counts:
    named = named_arguments(mixture)
    (experts, inner, depth), index = named["gate_up"].meta["val"].shape, index.detach().cpu()
    if mixture.target is gw.expert_mlp.default:
        index = index if rows is None else index[:rows]
        batch, length = len(index), int(named["x"].meta["val"].size(1))
        live = index >= 0
        load = live.sum((0, 2))
        starts = torch.arange(batch).reshape(-1, 1, 1).expand_as(index) * length
        tokens = torch.bincount((starts + index)[live], minlength=batch * length)
    else:
        live = torch.ones_like(index, dtype=torch.bool)
        load = torch.bincount(index.flatten(), minlength=experts)
        tokens = torch.full((len(index),), index.size(1))
    if masked is not None and masked.numel() != len(tokens):
        raise InputError(f"masked has {masked.numel()} elements for {len(tokens)} tokens: give a bool for each")
    hidden = None if masked is None else masked.flatten().cpu()
    return Counts(
        load,
        torch.bincount(tokens, minlength=experts + 1),
        None if hidden is None else (int((tokens == 0)[hidden].sum()), int(hidden.sum())),
        int((~live).sum()),
        3 * int(depth) * int(inner) * index.numel(),  # 6 D I, inner being 2 I
    )


def _share(some: int, of: int) -> float:
    return some / of if of else 0.0
