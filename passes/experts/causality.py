"""Whether a graph looks both ways: an expert that chooses among all positions tells each of them about all others.

What each attention lets a query see is evaluated, its masks at the example's sizes and with padding that hides nothing; the transitive
closure of their union says which positions may meet. Masks that are none of an attention's scores are not seen there, so the graph is also
run with one token of a few changed at a time: where outputs stay, their positions do not know of it. Experts may choose where neither
finds positions that do not meet. Source: specs/expert_choice.md, section 3.4.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from ...ir import Node, Program
from ...ir.calls import draws
from ...ir.float64 import NoFloat64, to_float64
from ...ir.pattern import NoMatch, named_arguments
from ...ir.run import run
from ...ir.symbols import hint
from ..inputs import random_inputs

aten = torch.ops.aten

STAYS = {True: 1e-12, False: 1e-6}  # of the largest output: what moves less in float64, or in the program's own dtypes, does not depend
_HIDDEN = 1e3  # below the largest score of its query: its softmax is 0 in every dtype
_PROBED = 8  # positions whose token is changed
_DRAWS = 2  # random inputs on which they are: on one of them, a score may be so large that it hides what is no mask's
_SOFTMAX = (aten.softmax.int, aten._softmax.default)
_PRODUCTS = (aten.matmul.default, aten.bmm.default, aten.baddbmm.default, aten.einsum.default)
_PASSED_ON = (
    aten._to_copy.default, aten.clone.default, aten.alias.default, aten.view.default, aten.reshape.default, aten._unsafe_view.default,
    aten.expand.default, aten.mul.Tensor, aten.where.self, aten.masked_fill.Scalar, aten.slice.Tensor, aten.div.Tensor,
)  # fmt: skip
# What they compute is scores or tokens, which hide nothing.
_CONTENT = (
    *_PRODUCTS, aten.mm.default, aten.linear.default, aten.embedding.default, aten.layer_norm.default, aten.conv1d.default,
    aten.scaled_dot_product_attention.default,
)  # fmt: skip


@dataclass(frozen=True)
class Seen:
    """How positions see one another: "both ways", "causal", "partial", "none" or "unknown", and what says so. `change` is by how much the
    last token changes earlier outputs, of the largest, where that was measured."""

    kind: str
    why: str
    change: float | None = None


@dataclass(frozen=True)
class Sight:
    """Whether experts may choose in a graph: `problem` says why not, `evidence` what was found either way. `change` is the probe's."""

    evidence: str
    problem: str
    may_be_overridden: bool
    padding: tuple[Node, ...]
    change: float | None = None


def look(program: Program, batch: Any, length: int, padding: Sequence[Node]) -> Sight:
    """Both checks; `padding` are inputs [B, S] that hide nothing where they are 1."""
    if length <= 1 or {"prefill", "decode"} & set(program.functions):
        what = f"sequences have {'one' if length else 'no'} position" if length <= 1 else "it decodes token by token, over caches"
        return Sight(what, what, False, tuple(padding))
    seen = seen_by_masks(program, length, padding)
    if isinstance(seen, NoMatch):
        return Sight(seen.reason, seen.reason, False, tuple(padding))
    probe = probed(program, batch, length, padding)
    evidence = f"{seen.why}; {probe.why}"
    return Sight(evidence, _problem(seen, probe, evidence), True, tuple(padding), probe.change)


def _problem(seen: Seen, probe: Seen, evidence: str) -> str:
    """What speaks against experts that choose: each check can, and where masks are not seen the probe has to speak for them."""
    words = {"causal": "the graph is causal", "partial": "not all positions meet", "unknown": "what it sees is unknown"}
    for each in (seen, probe):
        if each.kind in ("causal", "partial"):
            return f"{words[each.kind]}: {evidence}"
    is_known = seen.kind == "both ways" or (seen.kind == "none" and probe.kind == "both ways")
    return "" if is_known else f"{words['unknown']}: {evidence}"


# --- attention masks -------------------------------------------------------------------------------------------------------


def seen_by_masks(program: Program, length: int, padding: Sequence[Node]) -> Seen | NoMatch:
    """What attentions over `length` positions let see; "none" where there are none that are known by their softmax. A NoMatch where queries
    and keys have different lengths, as over a cache."""
    allowed = torch.eye(length, dtype=torch.bool)
    found: dict[Node, Tensor | Seen] = {}
    attentions = 0
    for node in program.main.calls:
        scores = _scores(node, length)
        if isinstance(scores, NoMatch):
            return scores
        if scores is None:
            continue
        attentions += 1
        if isinstance(scores, Node) and scores not in found:
            found[scores] = _evaluated(program, scores, length, padding)
        here = found[scores] if isinstance(scores, Node) else scores
        if isinstance(here, Seen):
            return here
        allowed |= here
    if not attentions:
        return Seen("none", "there is no attention whose masks are known")
    reach = _closure(allowed)
    counted = f"{attentions} attentions" if attentions != 1 else "1 attention"
    if reach.all():
        return Seen("both ways", f"{counted} let all positions meet")
    if not reach.triu(1).any():
        return Seen("causal", f"{counted} let no position see a later one")
    return Seen("partial", f"{counted} let some positions meet later ones, and not all (blocks, packed texts, a prefix)")


def _scores(node: Node, length: int) -> Node | Tensor | NoMatch | None:
    """Of an attention: what its queries see, as a mask or scores to be evaluated or as bool[S, S]; None for other calls."""
    if node.target is aten.scaled_dot_product_attention.default:
        a = named_arguments(node)
        queries, keys = (hint(a[name].meta["val"].size(-2)) for name in ("query", "key"))
        if queries != keys:
            return NoMatch("an attention has more keys than queries, as over a cache", node)
        if queries != length:
            return None
        everything = torch.ones(length, length, dtype=torch.bool)
        if a["is_causal"]:
            return everything.tril()
        return everything if a["attn_mask"] is None else a["attn_mask"]
    if node.target not in _SOFTMAX:
        return None
    named, shape = named_arguments(node), [hint(n) for n in node.meta["val"].shape]
    is_square = len(shape) > 2 and shape[-2:] == [length, length] and named["dim"] in (-1, len(shape) - 1)
    return named["self"] if is_square and _is_multiplied(node) else None


def _is_multiplied(weights: Node) -> bool:
    """Whether a product reads them, as it does those of an attention: a router may have as many experts as there are positions."""
    pending = list(weights.users)
    while pending:
        user = pending.pop()
        if user.target in _PRODUCTS:
            return True
        if user.target in _PASSED_ON:
            pending += user.users
    return False


def _evaluated(program: Program, scores: Node, length: int, padding: Sequence[Node]) -> Tensor | Seen:
    """bool[S, S] of scores or of a mask, in which all that is computed of tokens is 1: what is far below the rest of a row is hidden."""
    values: dict[Node, Any] = {}
    needed = _computed(scores)
    for node in scores.graph.nodes:
        if node not in needed:
            continue
        if node.op == "placeholder" and node not in padding:
            advice = f"if it is 0 where rows are padded, say valid={node.target}"
            return Seen("unknown", f"a mask of attention depends on the input {node.target} ({advice})")
        if node.op == "placeholder" or node.target in _CONTENT:
            values[node] = torch.ones([hint(n) for n in node.meta["val"].shape], dtype=node.meta["val"].dtype)
        elif node.op == "get_attr":
            tensor = program.weights[str(node.target)].tensor
            if tensor is None or tensor.device.type == "meta":
                return Seen("unknown", f"a mask of attention depends on the weight {node.target}, whose values are not there")
            values[node] = tensor
        elif draws(node):
            return Seen("unknown", "a mask of attention is drawn at random")
        else:
            args, kwargs = fx.map_arg((node.args, node.kwargs), lambda n: values[n] if n in values else hint(n.meta["val"]))
            values[node] = node.target(*args, **kwargs)  # type: ignore[operator]
    seen = _is_seen(values[scores])
    return seen.expand(*seen.shape[:-2], length, length).reshape(-1, length, length).any(0).cpu()


def _is_seen(scores: Tensor) -> Tensor:
    """Where scores, or masks that are added to them, are not far below the largest of their query."""
    if scores.dtype == torch.bool:
        return scores
    wide = scores.double()
    return (wide > -torch.inf) & (wide >= wide.amax(-1, keepdim=True) - _HIDDEN)


def _computed(scores: Node) -> set[Node]:
    """`scores` and the tensors that they are computed from, back to what is content; sizes stand at their hints."""
    found, pending = {scores}, [scores]
    while pending:
        node = pending.pop()
        if node.target in _CONTENT:
            continue
        for source in node.all_input_nodes:
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


def probed(program: Program, batch: Any, length: int, padding: Sequence[Node]) -> Seen:
    """Which positions' outputs [B, S, ..] change with the token of a few positions, on random inputs with padding that hides nothing.

    "both ways" where each of these tokens changes all outputs, "causal" where none changes an earlier one, "partial" between, "unknown"
    where there is nothing to ask.
    """
    probe = _Probe.of(program, batch, length, padding)
    places = sorted({round(i * (length - 1) / (_PROBED - 1)) for i in range(_PROBED)})
    changes = None if probe is None else probe.changes(places)
    if probe is None or changes is None:
        return Seen("unknown", "no probe was run")
    meets = (changes > STAYS[probe.is_wide]) | (torch.arange(length) == torch.tensor(places).unsqueeze(1))  # [places, S]
    change = float(changes[-1, :-1].max())
    last = f"another last token changes earlier outputs by {change:.1e} of the largest"
    if meets.all():
        return Seen("both ways", f"{last}, and each of {len(places)} tokens changes all others' outputs", change)
    if not any(meets[row, :place].any() for row, place in enumerate(places)):
        return Seen("causal", f"{last}, and no token that was changed an earlier one", change)
    row, output = next(zip(*torch.where(~meets), strict=True))
    return Seen("partial", f"{last}, but another token {places[row]} does not change output {int(output)}", change)


def change_of_earlier_outputs(program: Program, batch: Any, length: int, padding: Sequence[Node]) -> float | None:
    """By how much outputs [B, S, ..] before the last position change with the last token, of the largest; None where there are none."""
    probe = _Probe.of(program, batch, length, padding)
    changes = None if probe is None else probe.changes([length - 1])
    return None if changes is None else float(changes[0, :-1].max())


@dataclass(frozen=True)
class _Probe:
    """A program to be run on random inputs, in float64 where it `is_wide`."""

    program: Program
    is_wide: bool
    batch: int
    length: int
    padding: tuple[str, ...]

    @staticmethod
    def of(program: Program, batch: Any, length: int, padding: Sequence[Node]) -> "_Probe | None":
        """None where weights have no values."""
        if any(w.tensor is None or w.tensor.device.type == "meta" for w in program.weights.values()):
            return None
        names = tuple(str(node.target) for node in padding)
        try:
            return _Probe(to_float64(program), True, hint(batch), length, names)
        except NoFloat64:
            return _Probe(program, False, hint(batch), length, names)

    def changes(self, places: Sequence[int]) -> Tensor | None:
        """[places, S]: by how much another token in each place changes the outputs of each position, of the largest."""
        largest = torch.zeros(len(places), self.length, dtype=torch.float64)
        for seed in range(_DRAWS):
            inputs = self._inputs(seed)
            first, told = self._outputs(inputs), [i for i in range(len(inputs)) if self._is_told(i, inputs[i])]
            if not first or not told:
                return None
            changed = ([_with_other(value, place) if i in told else value for i, value in enumerate(inputs)] for place in places)
            others = map(self._outputs, changed)
            largest = torch.maximum(largest, torch.stack([_moved(first, other) for other in others]))
            if (largest > STAYS[self.is_wide]).all():
                break
        return largest

    def _inputs(self, seed: int) -> list[Any]:
        return [
            torch.ones_like(value) if node.target in self.padding else value
            for node, value in zip(
                self.program.main.placeholders, random_inputs(self.program, seed), strict=False
            )  # states come after inputs
        ]

    def _outputs(self, inputs: list[Any]) -> list[Tensor]:
        return [value for value in run(self.program, inputs)[0] if self._is_sequence(value)]

    def _is_told(self, number: int, value: Any) -> bool:
        """Whether an input is tokens, of which one can be another."""
        is_padding = self.program.main.placeholders[number].target in self.padding
        return self._is_sequence(value) and value.dtype != torch.bool and not is_padding

    def _is_sequence(self, value: Any) -> bool:
        return isinstance(value, Tensor) and value.dim() >= 2 and (value.size(0), value.size(1)) == (self.batch, self.length)


def _with_other(value: Tensor, place: int) -> Tensor:
    """Tokens with another one in a place of each row."""
    other = value.clone()
    if value.dtype.is_floating_point:
        other[:, place] = 1 - 2 * other[:, place]
    else:
        other[:, place] = (other[:, place] + 1) % max(int(value.max()) + 1, 2)
    return other


def _moved(first: Sequence[Tensor], second: Sequence[Tensor]) -> Tensor:
    """[S]: the largest change of a position's outputs, of the largest of each output."""
    changes = [
        (a.double() - b.double()).abs().transpose(0, 1).flatten(1).amax(1) / (float(a.abs().max()) or 1.0)
        for a, b in zip(first, second, strict=True)
    ]
    return torch.stack(changes).amax(0).cpu()
