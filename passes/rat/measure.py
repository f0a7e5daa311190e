"""What a recurrence costs on calibration tokens: the error of each layer on the original's inputs, and of the logits end to end."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ...ir import Node, Program
from ...ir.errors import PassError
from ...ir.infer import same_size
from ...ir.ops.rat_blocks import rat_attention_by_blocks
from ...ir.pattern import named_arguments
from ...ir.run import run
from ..calibration import given
from ..kv_cache.decoder import lookup_of
from .emit import Form
from .gates import Gates
from .sites import PRODUCTS, Site, Sites

HELD = 2**30  # bytes of activations of several attentions that are held at once


@dataclass(frozen=True)
class Quality:
    """Of a rewritten model on calibration tokens: KL(original, rewritten) in nats a token, and both perplexities of the next token."""

    kl: float
    before: float
    after: float


@dataclass(frozen=True)
class Seen:
    """One attention on one batch: what it read, q [B, H, T, E] and so on before turning, cos and sin [B|1, T, dr], and what it gave."""

    q: Tensor
    k: Tensor
    v: Tensor
    cos: Tensor | None
    sin: Tensor | None
    gave: Tensor

    def squared_error(self, form: Form, gates: Gates, scale: float) -> Tensor:
        """The sum of squares by which a recurrence with these gates differs from what the attention gave; it can be differentiated."""
        batch, heads, length, width = self.k.shape
        wide = torch.promote_types(self.k.dtype, torch.float32)
        gate = gates.bias.to(self.k.device, wide).reshape(1, heads, 1, -1).expand(batch, heads, length, width)
        bias = None if gates.chunk_bias is None else gates.chunk_bias.to(self.k.device, wide)
        tables = [None if table is None else self._rows(table, form) for table in (self.cos, self.sin)]
        attributes = {"window": form.window, "sinks": form.sinks, "local": form.local, "reset": form.reset}
        out = rat_attention_by_blocks(
            self.q, self.k, self.v, gate, bias, *tables, chunk=form.chunk, scale=scale, summary_bias=gates.summary_bias, **attributes
        )
        return (out - self.gave).to(wide).square().sum()

    def _rows(self, table: Tensor, form: Form) -> Tensor:
        if form.rope == "token":
            return table
        return table[:, torch.arange(table.size(1), device=table.device) // form.chunk]


class Watched:
    """The original program on calibration tokens: its attentions, which are `sites`, and its logits.

    Raises:
        PassError: the items are no tokens that it takes, or which of its outputs has the logits is not known.
    """

    def __init__(self, program: Program, sites: Sites, items: Any):
        self._program, self.sites = program, sites
        self._logits = _logits(program, sites)
        self._batches = _checked_batches(items, sites, _vocabulary(sites))

    @property
    def longest(self) -> int:
        """Tokens of the longest row."""
        return max(tokens.shape[1] for tokens in self._batches)

    def seen(self, chosen: Sequence[Site]) -> Iterator[list[Seen]]:
        """For each batch those of the `chosen` sites."""
        wanted = {node for site in chosen for node in (site.q, site.k, site.v, site.cos, site.sin, site.root) if node is not None}
        for tokens in self._batches:
            values = _values(self._program, self.sites, tokens, wanted)
            tables: dict[Node | None, Tensor | None] = {None: None}
            tables |= {each: _as_rows(values[each]) for site in chosen for each in (site.cos, site.sin) if each is not None}
            yield [
                Seen(values[site.q], values[site.k], values[site.v], tables[site.cos], tables[site.sin], values[site.root])
                for site in chosen
            ]

    def by_layer(self, chosen: Sequence[Site]) -> Iterator[list[Seen]]:
        """For each of the `chosen` sites what it is on each batch. The model runs once a batch for as many attentions as HELD bytes are
        enough for, one at least."""
        for layers in self._held_at_once(chosen):
            batches = list(self.seen(layers))
            yield from ([batch[n] for batch in batches] for n in range(len(layers)))

    def _held_at_once(self, chosen: Sequence[Site]) -> Iterator[list[Site]]:
        tokens = sum(each.numel() for each in self._batches)
        layers, held = list[Site](), 0
        for site in chosen:
            values = [node.meta["val"] for node in (site.q, site.k, site.v, site.root)]
            needed = sum(tokens * value.size(1) * value.size(3) * value.dtype.itemsize for value in values)
            if layers and held + needed > HELD:
                yield layers
                layers, held = [], 0
            layers, held = [*layers, site], held + needed
        if layers:
            yield layers

    def errors(self, chosen: Sequence[Site], form: Form, gates: Sequence[Gates]) -> list[float]:
        """Of each site: mean square of the difference over mean square of what the attention gave."""
        wrong, whole = [0.0] * len(chosen), [0.0] * len(chosen)
        for batch in self.seen(chosen):
            for n, (seen, site, each) in enumerate(zip(batch, chosen, gates, strict=True)):
                with torch.no_grad():
                    wrong[n] += float(seen.squared_error(form, each, site.attention.scale))
                whole[n] += float(seen.gave.float().square().sum())
        return [a / (b or 1.0) for a, b in zip(wrong, whole, strict=True)]

    def quality(self, after: Program) -> Quality:
        """Of `after`, which takes and gives the same."""
        kl, nats, count, predicted = 0.0, [0.0, 0.0], 0, 0
        for tokens in self._batches:
            inputs = inputs_of(self._program, self.sites, tokens)
            logs = [run(program, inputs)[0][self._logits].double().log_softmax(-1) for program in (self._program, after)]
            kl += float((logs[0].exp() * (logs[0] - logs[1])).sum())
            count += tokens.numel()
            targets = tokens[:, 1:].flatten()
            for n, each in enumerate(logs):
                nats[n] += float(F.nll_loss(each[:, :-1].flatten(0, 1), targets, reduction="sum"))
            predicted += targets.numel()
        means = torch.tensor(nats, dtype=torch.float64) / max(predicted, 1)
        return Quality(kl / count, *means.exp().tolist())  # infinite beyond what a float holds, where math.exp raises


def inputs_of(program: Program, sites: Sites, tokens: Tensor) -> list[Any]:
    """One value for each input of `main`: positions 0, 1, .., and of other inputs of that shape (masks) ones.

    Raises:
        PassError: an input has another shape.
    """
    places = torch.arange(tokens.shape[1], device=tokens.device).repeat(tokens.shape[0], 1)
    given = {str(sites.tokens.target): tokens}
    if sites.positions is not None:
        given[str(sites.positions.target)] = places
    inputs = []
    for node in program.main.placeholders:
        value = node.meta["val"]
        if isinstance(value, Tensor):
            if value.dim() != 2:
                raise PassError(
                    f"rat-recurrence: input {node.target} is no mask [batch, length], so its value on calibration tokens is not known: "
                    "capture the model without it, or leave calibration out"
                )
            value = given.get(str(node.target), torch.ones_like(places)).to(value.dtype)
        inputs.append(value)
    return inputs


def _checked_batches(items: Any, sites: Sites, vocabulary: int) -> tuple[Tensor, ...]:
    """The calibration items as tokens i64[B, T].

    Raises:
        PassError: there are none, or one is no tensor of tokens of the sizes that the program takes.
        CalibrationError: `items` raises as it is iterated.
    """
    like = sites.tokens.meta["val"]
    batches = []
    for number, item in enumerate(given(items)):
        value = item[0] if isinstance(item, tuple) and len(item) == 1 else item
        if not isinstance(value, Tensor) or value.dim() != 2 or value.dtype not in (torch.int64, torch.int32) or value.shape[1] < 2:
            raise PassError(f"rat-recurrence: calibration item {number} is no tensor of tokens [B, T] with at least 2 of them in each row")
        if value.numel() and not 0 <= int(value.min()) <= int(value.max()) < vocabulary:
            raise PassError(f"rat-recurrence: calibration item {number} has tokens beyond 0 to {vocabulary - 1}")
        if any(isinstance(size, int) and size != own for size, own in zip(like.shape, value.shape, strict=True)):
            raise PassError(f"rat-recurrence: calibration item {number} is {list(value.shape)}, and the program takes {list(like.shape)}")
        batches.append(value.to(like.device, torch.int64))
    if not batches:
        raise PassError("rat-recurrence: calibration has no items: give at least one tensor of tokens [B, T]")
    return tuple(batches)


def _values(program: Program, sites: Sites, tokens: Tensor, wanted: set[Node]) -> dict[Node, Tensor]:
    values: dict[Node, Tensor] = {}

    def observe(node: Node, value: Any) -> Any:
        if node in wanted:
            values[node] = value
        return value

    run(program, inputs_of(program, sites, tokens), observe=observe)
    for node in wanted - values.keys():  # a folded table
        tensor = program.weights[str(node.target)].tensor
        assert tensor is not None
        values[node] = tensor
    return values


def _as_rows(table: Tensor) -> Tensor:
    """[B|1, T, dr] of what multiplies [B, H, T, dr]."""
    return table.squeeze(1) if table.dim() == 4 else table.reshape(-1, *table.shape[-2:])


def _vocabulary(sites: Sites) -> int:
    """Rows of the embedding that tokens are looked up in."""
    lookup = lookup_of(sites.tokens)
    assert lookup is not None, "that is how tokens are told from other inputs"
    return int(named_arguments(lookup)["weight"].meta["val"].size(0))


def _logits(program: Program, sites: Sites) -> int:
    """Which output has the logits: [B, T, V] that a product gives, V as many as the embedding of tokens has rows.

    Raises:
        PassError: none has, or several do.
    """
    vocabulary, outputs = _vocabulary(sites), program.main.outputs
    tensors = {n: leaf for n, leaf in enumerate(outputs) if isinstance(leaf, Node) and isinstance(leaf.meta["val"], Tensor)}
    found = [n for n, leaf in tensors.items() if _is_of_tokens(leaf, sites, vocabulary) and _is_product(leaf)]
    if len(found) == 1:
        return found[0]
    seen = f"{len(found) or 'none'} of its {len(tensors)} outputs {'are' if found else 'is'} that"
    raise PassError(
        f"rat-recurrence: calibration needs the logits of the model, the product that gives [B, T, {vocabulary}] with a number for "
        f"each row of the embedding of its tokens, and {seen}: capture the model with its head, its logits once, or leave calibration out"
    )


def _is_of_tokens(node: Node, sites: Sites, vocabulary: int) -> bool:
    shape, tokens = node.meta["val"].shape, sites.tokens.meta["val"].shape
    return len(shape) == 3 and same_size(shape[1], tokens[1]) and shape[2] == vocabulary


def _is_product(node: Node) -> bool:
    """Whether `node` is a product with a weight, or made of one value that is: hidden states are a sum of several."""
    while node.op == "call_function" and node.target not in PRODUCTS:
        computed = [each for each in node.all_input_nodes if each.op != "get_attr" and isinstance(each.meta["val"], Tensor)]
        if len(computed) != 1:
            return False
        node = computed[0]
    return node.op == "call_function"
