"""The functions of one step that are made of a decoder: `prefill`, `decode` and `verify`."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...ir import Function, Node, Program
from ...ir.calls import GETITEM
from ...ir.derive import Derivation, ancestors
from ...ir.layers import data_nodes, find_layers
from .attention import SelfAttention
from .cache_sizes import CacheSizes
from .decoder import Decoder
from .recurrence import Recurrence, slots_of

aten, gw = torch.ops.aten, torch.ops.gw


@dataclass(frozen=True)
class Bypass:
    """What takes the place of a layer that is left out: the value that it reads, times `scale`."""

    source: Node
    scale: float = 1.0


Skipped = Mapping[Node, Bypass]  # by the result of the layer


class Step(Derivation):
    """A function of one step: inputs tokens [B, T], position [B], rows [B], caches of each attention that is not `skipped`."""

    def __init__(self, program: Program, decoder: Decoder, length: Any, sizes: CacheSizes, skipped: Skipped | None = None):
        super().__init__(program)
        self.decoder, self.length, self.skipped = decoder, length, skipped or {}
        self.device = decoder.tokens.meta["val"].device
        self.sizes = sizes
        self.tokens = self._integers("tokens", decoder.batch, length)
        self.position, self.rows = self._integers("position", decoder.batch), self._integers("rows", decoder.batch)
        self.new_states: dict[str, Node] = {}
        self.lengths: Node | None = None
        self._take_inputs()

    def _integers(self, name: str, *shape: Any) -> Node:
        return self.input(name, torch.int64, shape, self.device)

    def _take_inputs(self) -> None:
        decoder = self.decoder
        for node in self.program.main.placeholders:
            if not isinstance(node.meta["val"], Tensor):
                self.values[node] = node.meta["val"]
        tokens: Any = self.tokens
        wanted = decoder.tokens.meta["val"].dtype
        self.values[decoder.tokens] = tokens if wanted == torch.int64 else self.call(aten._to_copy.default, tokens, dtype=wanted)
        if decoder.positions is None:
            return
        places = self.call(aten.unsqueeze.default, self.position, 1)
        if self.length != 1:
            size = self.call(aten.sym_size.int, self.tokens, 1)
            places = self.call(aten.add.Tensor, places, self.call(aten.arange.default, size, device=self.device))
        wanted = decoder.positions.meta["val"].dtype
        self.values[decoder.positions] = places if wanted == torch.int64 else self.call(aten._to_copy.default, places, dtype=wanted)

    def body(self, roots: list[Node]) -> None:
        """Copies all that `roots` need, attentions as reads of their caches."""
        by_root = {attention.root: index for index, attention in enumerate(self.decoder.attentions)}
        needed = self._needed(roots, by_root)
        for node in self.program.main.graph.nodes:
            if node not in needed:
                continue
            if node in self.skipped:
                self.values[node] = self._bypassed(self.skipped[node], node)
            elif node in by_root:
                self.values[node] = self._attend(by_root[node], node)
            else:
                self.copy(node)

    def _needed(self, roots: list[Node], by_root: dict[Node, int]) -> set[Node]:
        """As `ancestors`, but of an attention its queries, keys and values alone, no mask, and of a skipped layer what it reads."""
        found, pending = set(roots), list(roots)
        while pending:
            node = pending.pop()
            sources = [] if node in self.values else node.all_input_nodes
            if node in self.skipped:
                sources = [self.skipped[node].source]
            elif node in by_root:
                sources = self.decoder.attentions[by_root[node]].reads
            fresh = [source for source in dict.fromkeys(sources) if source not in found]
            found.update(fresh)
            pending += fresh
        return found

    def _bypassed(self, bypass: Bypass, like: Node) -> Node:
        value: Node = self.values[bypass.source]
        return value if bypass.scale == 1.0 else self.call(aten.mul.Tensor, value, bypass.scale, like=like)

    def _attend(self, index: int, like: Node) -> Node:
        attention = self.decoder.attentions[index]
        if isinstance(attention, Recurrence):
            return self._recur(index, attention, like)
        q, k, v = (self.values[each] for each in (attention.q, attention.k, attention.v))
        if attention.transposed:
            k = self.call(aten.transpose.int, k, 2, 3, like=like)
        window = self.decoder.visible[index].window
        caches = [self._cache(f"cache_{letter}_{index}", each, window) for letter, each in (("k", k), ("v", v))]
        ring = {"ring": True} if window else {}
        appended = self.call(gw.kv_append.default, *caches, k, v, self.position, self.rows, like=like, **ring)
        keys, values = (self.call(GETITEM, appended, n, like=like) for n in range(2))
        self.new_states |= {f"input:cache_k_{index}": keys, f"input:cache_v_{index}": values}
        options = self._options(attention, index)
        return self.call(gw.cached_attention.default, q, keys, values, self.position, self.rows, like=like, **options)

    def _recur(self, index: int, recurrence: Recurrence, like: Node) -> Node:
        operands = [None if each is None else self.values[each] for each in recurrence.operands]
        key = operands[1].meta["val"]
        wide = torch.float64 if key.dtype == torch.float64 else torch.float32
        slots = slots_of(self.program.symbols, recurrence, self.sizes.capacity)
        shapes = {"cache": (self.sizes.rows, key.size(1), slots, key.size(3)), "state": (self.sizes.rows, key.size(1), key.size(3))}
        names = [f"{kind}_{letter}_{index}" for kind in shapes for letter in "kv"]
        caches = [
            self.input(name, key.dtype if name.startswith("cache") else wide, shapes[name.split("_")[0]], self.device) for name in names
        ]
        rest = (self.position, self.rows, self.lengths)
        stepped = self.call(gw.rat_cached_attention.default, *operands, *caches, *rest, like=like, **recurrence.stated)
        out, *new = (self.call(GETITEM, stepped, n, like=like) for n in range(5))
        self.new_states |= {f"input:{name}": value for name, value in zip(names, new, strict=True)}
        return out

    def _options(self, attention: SelfAttention, index: int) -> dict[str, Any]:
        window = self.decoder.visible[index].window
        return (
            {"scale": attention.scale}
            | ({"window": window, "ring": True} if window else {})
            | ({"softcap": attention.softcap} if attention.softcap else {})
        )

    def _cache(self, name: str, like: Node, window: int) -> Node:
        value, slots = like.meta["val"], self.sizes.slots(window)
        return self.input(name, value.dtype, (self.sizes.rows, value.size(1), slots, value.size(3)), self.device)


def decode(
    program: Program,
    decoder: Decoder,
    sizes: CacheSizes,
    *,
    name: str = "decode",
    skipped: Skipped | None = None,
    hidden: Node | None = None,
) -> Function:
    """(tokens [B, 1], position [B], rows [B], caches) -> logits [B, V], new caches; behind the logits the value `hidden` [B, 1, D]."""
    step = Step(program, decoder, 1, sizes, skipped)
    step.body([decoder.logits])
    logits = step.call(aten.select.int, step.values[decoder.logits], 1, 0)
    return step.finish(name, [logits, *([] if hidden is None else [step.values[hidden]])], step.new_states)


def lift(program: Program, decoder: Decoder, sizes: CacheSizes, hidden: Node) -> Function:
    """(tokens [B, 1], position [B], rows [B], caches) -> the value `hidden` [B, 1, D], new caches of the layers before it."""
    step = Step(program, decoder, 1, sizes)
    step.body([hidden])
    return step.finish("lift", [step.values[hidden]], step.new_states)


def resume(program: Program, decoder: Decoder, sizes: CacheSizes, hidden: Node) -> Function:
    """(tokens [B, T], position [B], rows [B], hidden [B, T, D], caches) -> logits [B, T, V], new caches: `verify` from that value on."""
    step = Step(program, decoder, decoder.length, sizes)
    value = hidden.meta["val"]
    step.values[hidden] = step.input("hidden", value.dtype, value.shape, value.device)
    step.body([decoder.logits])
    return step.finish("resume", [step.values[decoder.logits]], step.new_states)


def verify(program: Program, decoder: Decoder, sizes: CacheSizes) -> Function:
    """(tokens [B, T], position [B], rows [B], caches) -> logits [B, T, V], new caches."""
    step = Step(program, decoder, decoder.length, sizes)
    step.body([decoder.logits])
    return step.finish("verify", [step.values[decoder.logits]], step.new_states)


def prefill(program: Program, decoder: Decoder, sizes: CacheSizes, *, skipped: Skipped | None = None) -> Function:
    """(tokens [B, T], position [B], rows [B], lengths [B], caches) -> logits [B, V] of token lengths - 1 of each row, new caches.

    What comes behind the last attention is computed of that token alone, from the first value on through which everything passes.
    """
    step = Step(program, decoder, decoder.length, sizes, skipped)
    lengths = step.lengths = step._integers("lengths", decoder.batch)
    cut = _last_cut(program, decoder, step.skipped)
    step.body([cut])
    last = step.call(aten.sub.Tensor, lengths, 1)
    index = step.call(aten.unsqueeze.default, step.call(aten.unsqueeze.default, last, 1), 2)
    value = step.values[cut]
    batch = step.call(aten.sym_size.int, step.tokens, 0)
    wide = step.call(aten.expand.default, index, [batch, 1, value.meta["val"].size(2)])
    step.values[cut] = step.call(aten.gather.default, value, 1, wide, like=cut)
    _copy_tail(step, cut)
    logits = step.call(aten.select.int, step.values[decoder.logits], 1, 0)
    return step.finish("prefill", [logits], step.new_states)


def _last_cut(program: Program, decoder: Decoder, skipped: Skipped) -> Node:
    """The first value [B, T, D] behind the last layer that is skipped and the last attention that is not, through which everything passes;
    the logits themselves where there is none."""
    order = {node: place for place, node in enumerate(program.main.graph.nodes)}
    spans = [(order[bypass.source], order[result]) for result, bypass in skipped.items()]
    reads = [order[attention.root] for attention in decoder.attentions]
    behind = max([end for _, end in spans] + [n for n in reads if not any(start < n <= end for start, end in spans)])
    for cut in find_layers(program.main, decoder.tokens).cuts:
        shape = cut.meta["val"].shape
        fits = len(shape) == 3 and isinstance(shape[2], int) and isinstance(shape[0], torch.SymInt) and isinstance(shape[1], torch.SymInt)
        is_whole = fits and shape[0] == decoder.batch and shape[1] == decoder.length
        if order[cut] >= behind and is_whole and not _reads_positions(program, decoder, cut):
            return cut
    return decoder.logits


def _tail(program: Program, decoder: Decoder, cut: Node) -> list[Node]:
    """What the logits need of what is computed behind `cut`, in order."""
    needed = ancestors([decoder.logits])
    data = [node for node in data_nodes(program.main, decoder.tokens) if node in needed]
    return data[data.index(cut) + 1 :]


def _reads_positions(program: Program, decoder: Decoder, cut: Node) -> bool:
    """Whether a tensor that is made of positions, or of how many tokens there are, joins behind `cut`: it has T of them, not one."""
    tail = _tail(program, decoder, cut)
    sides = {operand for node in tail for operand in node.all_input_nodes if operand not in (*tail, cut)}
    made = [side for side in sides if side.op == "call_function" and isinstance(side.meta["val"], Tensor)]
    return any(source.op == "placeholder" for source in ancestors(made))


def _copy_tail(step: Step, cut: Node) -> None:
    """Copies what stands behind `cut`, with one token in the place of T: sizes that are made of T are computed anew."""
    decoder, main = step.decoder, step.program.main
    tail = _tail(step.program, decoder, cut)
    wanted = ancestors(tail)
    data = set(data_nodes(main, decoder.tokens))
    step.values[decoder.tokens] = step.call(aten.narrow.default, step.tokens, 1, 0, 1)
    for node in main.graph.nodes:
        if node.op != "call_function" or node not in wanted:
            continue
        if node in tail or (node not in data and not isinstance(node.meta["val"], Tensor)):
            step.values.pop(node, None)
        if node not in data or node in tail:
            step.copy(node)
