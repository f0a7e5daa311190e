"""Whether a graph looks both ways: an expert that chooses among all positions tells each of them about all others.

What each attention lets a query see is evaluated, its masks at the example's sizes and with padding that hides nothing; the transitive
closure of their union says which positions may meet. Whatever that says, the graph is also run twice with another last token: where
earlier outputs stay, it is causal. Source: specs/expert_choice.md, section 3.4.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from ...ir import Node, Program
from ...ir.calls import draws
from ...ir.derive import ancestors
from ...ir.float64 import NoFloat64, to_float64
from ...ir.pattern import NoMatch, named_arguments
from ...ir.run import run
from ...ir.symbols import hint
from ..inputs import random_inputs

aten = torch.ops.aten

STAYS = 1e-5  # of the largest output: the probe runs in float64, so that what moves less does not depend on the token
_SOFTMAX = (aten.softmax.int, aten._softmax.default)
_PASSED_ON = (aten._to_copy.default, aten.clone.default, aten.alias.default)


@dataclass(frozen=True)
class Seen:
    """How positions see one another: "both ways", "causal", "partial" or "unknown", and what says so."""

    kind: str
    why: str


@dataclass(frozen=True)
class Sight:
    """Whether experts may choose in a graph: `problem` says why not, `evidence` what was found either way."""

    evidence: str
    problem: str
    may_be_overridden: bool
    padding: tuple[Node, ...]


def look(program: Program, batch: Any, length: int, padding: Sequence[Node]) -> Sight:
    """Both checks; `padding` are inputs [B, S] that hide nothing where they are 1."""
    if length == 1 or {"prefill", "decode"} & set(program.functions):
        what = "sequences have one position" if length == 1 else "it decodes token by token, over caches"
        return Sight(what, what, False, tuple(padding))
    seen = seen_by_masks(program, length, padding)
    if isinstance(seen, NoMatch):
        return Sight(seen.reason, seen.reason, False, tuple(padding))
    change = change_of_earlier_outputs(program, batch, length, padding)
    probed = "no probe was run" if change is None else f"another last token changes earlier outputs by {change:.1e} of the largest"
    evidence = f"{seen.why}; {probed}"
    if change is not None and change <= STAYS:
        return Sight(evidence, f"the graph is causal: {evidence}", True, tuple(padding))
    words = {"both ways": "", "causal": "the graph is causal", "partial": "not all positions meet", "unknown": "what it sees is unknown"}
    problem = f"{words[seen.kind]}: {evidence}" if words[seen.kind] else ""
    return Sight(evidence, problem, True, tuple(padding))


# --- attention masks -------------------------------------------------------------------------------------------------------


def seen_by_masks(program: Program, length: int, padding: Sequence[Node]) -> Seen | NoMatch:
    """What attentions over `length` positions let see; a NoMatch where queries and keys have different lengths, as over a cache."""
    allowed = torch.eye(length, dtype=torch.bool)
    found: dict[Node | None, Tensor | Seen] = {}
    attentions = 0
    for node in program.main.calls:
        masks = _masks(node, length)
        if isinstance(masks, NoMatch):
            return masks
        for mask in masks:
            attentions += 1
            if isinstance(mask, Node) and mask not in found:
                found[mask] = _evaluated(program, mask, length, padding)
            here = found[mask] if isinstance(mask, Node) else mask
            if isinstance(here, Seen):
                return here
            allowed |= here
    reach = _closure(allowed)
    counted = f"{attentions} attentions" if attentions != 1 else "1 attention"
    if reach.all():
        return Seen("both ways", f"{counted} let all positions meet")
    if not reach.triu(1).any():
        return Seen("causal", f"{counted} let no position see a later one")
    return Seen("partial", f"{counted} let some positions meet later ones, and not all (blocks, packed texts, a prefix)")


def _masks(node: Node, length: int) -> list[Any] | NoMatch:
    """Of an attention: what its queries see, as a mask to be evaluated or as bool[S, S]; nothing for other calls."""
    everything = torch.ones(length, length, dtype=torch.bool)
    if node.target is aten.scaled_dot_product_attention.default:
        a = named_arguments(node)
        if hint(a["query"].meta["val"].size(-2)) != hint(a["key"].meta["val"].size(-2)):
            return NoMatch("an attention has more keys than queries, as over a cache", node)
        if hint(a["query"].meta["val"].size(-2)) != length:
            return []
        if a["is_causal"]:
            return [everything.tril()]
        return [everything if a["attn_mask"] is None else a["attn_mask"]]
    if node.target not in _SOFTMAX or node.meta["val"].dim() != 4 or [hint(n) for n in node.meta["val"].shape[2:]] != [length, length]:
        return []
    scores: Any = node.args[0]
    while isinstance(scores, Node) and scores.target in _PASSED_ON:
        scores = scores.args[0]
    if scores.target is aten.add.Tensor and isinstance(scores.args[1], Node):
        return [min(scores.args, key=lambda operand: len(ancestors([operand])))]  # the mask, not the scores
    return [everything]


def _evaluated(program: Program, mask: Node, length: int, padding: Sequence[Node]) -> Tensor | Seen:
    """bool[S, S] of a mask that is computed from sizes and from padding alone."""
    values: dict[Node, Any] = {}
    needed = _computed(mask)
    for node in mask.graph.nodes:
        if node not in needed:
            continue
        if node.op == "placeholder" and node not in padding:
            return Seen("unknown", f"a mask of attention depends on the input {node.target}")
        if node.op == "placeholder":
            values[node] = torch.ones([hint(n) for n in node.meta["val"].shape], dtype=node.meta["val"].dtype)
        elif node.op == "get_attr":
            values[node] = program.weights[str(node.target)].tensor
        elif draws(node):
            return Seen("unknown", "a mask of attention is drawn at random")
        else:
            args, kwargs = fx.map_arg((node.args, node.kwargs), lambda n: values[n] if n in values else hint(n.meta["val"]))
            values[node] = node.target(*args, **kwargs)  # type: ignore[operator]
    value = values[mask]
    seen = value if value.dtype == torch.bool else value > torch.finfo(value.dtype).min / 2
    return seen.expand(*seen.shape[:-2], length, length).reshape(-1, length, length).any(0).cpu()


def _computed(mask: Node) -> set[Node]:
    """`mask` and the tensors that it is computed from; sizes stand at their hints."""
    found, pending = {mask}, [mask]
    while pending:
        for source in pending.pop().all_input_nodes:
            if source not in found and not isinstance(source.meta["val"], int | bool | torch.SymInt | torch.SymBool):
                found.add(source)
                pending.append(source)
    return found


def _closure(allowed: Tensor) -> Tensor:
    """Which positions reach which in any number of steps."""
    reach = allowed.float()
    while True:
        further = (reach @ reach > 0).float()
        if torch.equal(further, reach):
            return reach.bool()
        reach = further


# --- the probe -------------------------------------------------------------------------------------------------------------


def change_of_earlier_outputs(program: Program, batch: Any, length: int, padding: Sequence[Node]) -> float | None:
    """By how much outputs [B, S, ..] before the last position change with the last token, of the largest; None where that cannot be asked.

    Inputs [B, S, ..] are random, but for padding, which hides nothing.
    """
    if any(w.tensor is None or w.tensor.device.type == "meta" for w in program.weights.values()):
        return None
    try:
        wide = to_float64(program)
    except NoFloat64:
        wide = program
    drawn = zip(program.main.placeholders, random_inputs(wide), strict=False)  # states come after inputs
    inputs = [torch.ones_like(value) if node in padding else value for node, value in drawn]
    first, second = (run(wide, each)[0] for each in (inputs, [_with_other_end(value, batch, length) for value in inputs]))
    changes = [_change(a, b) for a, b in zip(first, second, strict=True) if _is_sequence(a, batch, length)]
    return max(changes, default=None)


def _change(first: Tensor, second: Tensor) -> float:
    largest = float(first.abs().max())
    return float((first - second)[:, :-1].abs().max()) / (largest or 1.0) if first[:, :-1].numel() else 0.0


def _with_other_end(value: Any, batch: Any, length: int) -> Any:
    if not _is_sequence(value, batch, length) or value.dtype == torch.bool:
        return value
    other = value.clone()
    if value.dtype.is_floating_point:
        other[:, -1] = 1 - other[:, -1]
    else:
        other[:, -1] = (other[:, -1] + 1) % (value.max() + 1)
    return other


def _is_sequence(value: Any, batch: Any, length: int) -> bool:
    return isinstance(value, torch.Tensor) and value.dim() >= 2 and (value.size(0), value.size(1)) == (hint(batch), length)
