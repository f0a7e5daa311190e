"""What `kv-cache` has to know of a captured decoder: its tokens and positions, its attentions and what these see, its logits."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ...ir import Function, Node, Program
from ...ir.calls import draws, name_of
from ...ir.infer import same_size
from ...ir.layers import data_nodes
from ...ir.pattern import NoMatch
from .attention import SelfAttention, find_attentions
from .mask import Visible, visible
from .recurrence import Recurrence, find_recurrences

_INTEGERS = (torch.int64, torch.int32)


@dataclass(frozen=True)
class Decoder:
    """tokens i[B, T] and positions i[B, T] (None where nothing depends on them) -> logits [B, T, V], both sizes symbolic."""

    tokens: Node
    positions: Node | None
    logits: Node
    attentions: tuple[SelfAttention | Recurrence, ...]  # in order
    visible: tuple[Visible, ...]

    def inputs(self, program: Program, tokens: torch.Tensor) -> list[Any]:
        """What `main` of `program` takes for `tokens` i[B, T] at positions 0, 1, ..: one value a leaf, constants included."""
        places = torch.arange(tokens.shape[1], device=tokens.device).repeat(tokens.shape[0], 1)
        given = {self.tokens: tokens, self.positions: places}
        values = [(node, node.meta["val"]) for node in program.main.placeholders]
        return [given[node].to(value.dtype) if node in given else value for node, value in values]

    @property
    def batch(self) -> torch.SymInt:
        return self.tokens.meta["val"].size(0)

    @property
    def length(self) -> torch.SymInt:
        return self.tokens.meta["val"].size(1)


def find_decoder(program: Program, function: Function) -> Decoder | NoMatch:
    """The decoder that `function` is, or why it is none."""
    inputs = inputs_of(function)
    problem = _unfit_inputs(function, inputs)
    if problem is not None:
        return problem
    tokens = token_input(inputs)
    if tokens is None:
        return NoMatch("no input of integers [batch, length] is looked up in an embedding: this is no decoder of tokens", None)
    positions = next((node for node in inputs if node is not tokens), None)
    logits = _logits(function, tokens)
    if isinstance(logits, NoMatch):
        return logits
    data = data_nodes(function, tokens)
    (attentions, failures), recurrences = find_attentions(data), find_recurrences(data)
    if failures:
        return failures[0]
    if not attentions and not recurrences:
        return _without_attention(function)
    seen: dict[Node | None, Visible] = {}  # by mask, which layers share
    for recurrence in recurrences:
        problem = _unfit_length(recurrence, tokens)
        if problem is not None:
            return problem
    for attention in attentions:
        known = _unfit_length(attention, tokens) or seen.get(attention.mask) or visible(program, attention.mask, tokens, positions)
        if isinstance(known, NoMatch):
            return known
        seen[attention.mask] = known
    masks = {each.root: seen[each.mask] for each in attentions}
    masks |= {each.root: Visible(0) for each in recurrences}
    everything: list[SelfAttention | Recurrence] = [*attentions, *recurrences]
    by_root = {each.root: each for each in everything}
    ordered = [node for node in data if node in by_root]
    return Decoder(tokens, positions, logits, tuple(by_root[node] for node in ordered), tuple(masks[node] for node in ordered))


def _without_attention(function: Function) -> NoMatch:
    softmax = next((node for node in function.calls if node.target in (torch.ops.aten.softmax.int, torch.ops.aten._softmax.default)), None)
    if softmax is None:
        return NoMatch("it has no attention, so there is nothing to keep between steps", None)
    return NoMatch("its softmax stands in no attention of a known form: over scores and masks alone, then times values", softmax)


def _unfit_inputs(function: Function, inputs: Sequence[Node]) -> NoMatch | None:
    states = [node for node in function.placeholders if node.meta.get("role") == "state"]
    if states:
        return NoMatch(
            f"it updates a state of its own, {states[0].target}, which a step of one token would update in another way", states[0]
        )
    drawing = next((node for node in function.calls if draws(node)), None)
    if drawing is not None:
        return NoMatch(f"it draws random numbers ({name_of(drawing.target)}): capture the model after .eval()", drawing)  # type: ignore[arg-type]
    for node in inputs:
        value = node.meta["val"]
        if value.dtype not in _INTEGERS or value.dim() != 2:
            reason = f"input {node.target} is no [batch, length] of tokens or positions"
            advice = "capture the decoder alone, without masks, encoder states or embeddings (gw.compile_decoder does)"
            return NoMatch(f"{reason}: {advice}", node)
        if not all(isinstance(size, torch.SymInt) for size in value.shape):
            return NoMatch(
                f"input {node.target} has sizes that are fixed: capture with dynamic batch and length (gw.compile_decoder does)", node
            )
    if len(inputs) > 2:
        return NoMatch(f"it takes {len(inputs)} tensors, not tokens and positions alone", inputs[2])
    if len(inputs) == 2 and not all(same_size(a, b) for a, b in zip(*(node.meta["val"].shape for node in inputs), strict=True)):
        return NoMatch(f"inputs {inputs[0].target} and {inputs[1].target} differ in size", inputs[1])
    return None


def inputs_of(function: Function) -> list[Node]:
    """Its inputs that are tensors."""
    return [node for node in function.placeholders if isinstance(node.meta["val"], torch.Tensor)]


def token_input(inputs: Sequence[Node]) -> Node | None:
    """The input that an embedding looks up; of two, where positions are looked up as well, the one that is not named for these."""
    found = [node for node in inputs if lookup_of(node) is not None]
    return next((node for node in found if "position" not in str(node.target)), next(iter(found), None))


def lookup_of(node: Node) -> Node | None:
    """The embedding whose rows the elements of `node` pick, as they are or at another shape or integer type."""
    passed_on = ("aten.view.default", "aten.reshape.default", "aten._to_copy.default", "aten.alias.default", "aten.unsqueeze.default")
    for user in node.users:
        if user.target is torch.ops.aten.embedding.default:
            return user
        if user.op == "call_function" and name_of(user.target) in passed_on:  # type: ignore[arg-type]
            found = lookup_of(user)
            if found is not None:
                return found
    return None


def _logits(function: Function, tokens: Node) -> Node | NoMatch:
    outputs = [leaf for leaf in function.outputs if isinstance(leaf, Node) and isinstance(leaf.meta["val"], torch.Tensor)]
    if len(outputs) != 1:
        return NoMatch(f"it gives {len(outputs)} tensors, not logits alone: capture it without caches, hidden states and attentions", None)
    value, length = outputs[0].meta["val"], tokens.meta["val"]
    if value.dim() != 3 or not all(same_size(a, b) for a, b in zip(value.shape, length.shape, strict=False)):
        return NoMatch("what it gives is no logits [batch, length, vocabulary]", outputs[0])
    return outputs[0]


def _unfit_length(attention: SelfAttention | Recurrence, tokens: Node) -> NoMatch | None:
    if same_size(attention.q.meta["val"].size(2), tokens.meta["val"].size(1)):
        return None
    return NoMatch("attention does not have one query for each token", attention.root)
