"""The causal attentions of a captured decoder that can become a recurrence, with what they are made of, and why others cannot."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import chain, count
from typing import Any

import torch

from ...ir import Function, Node, Program
from ...ir.calls import GETITEM, name_of
from ...ir.infer import same_size
from ...ir.pattern import NoMatch, named_arguments
from ..kv_cache.attention import SelfAttention, find_attentions
from ..kv_cache.decoder import inputs_of, token_input
from ..kv_cache.mask import unknown, visible
from .rotary import Turned, unturned

aten, gw = torch.ops.aten, torch.ops.gw

RAT = gw.rat_attention.default
PRODUCTS = (aten.linear.default, aten.addmm.default, aten.mm.default, aten.matmul.default, gw.lowrank_linear.default)
# What may stand between a product and attention: nothing of it lets tokens meet, as the limit points of the pass show.
_BETWEEN = (
    aten.view.default, aten.reshape.default, aten._unsafe_view.default, aten.transpose.int, aten.permute.default, aten.clone.default,
    aten.alias.default, aten._to_copy.default, aten.unsqueeze.default, aten.squeeze.dim, aten.slice.Tensor, aten.split.Tensor,
    aten.split_with_sizes.default, aten.chunk.default, GETITEM, aten.rms_norm.default, aten.layer_norm.default, aten.mul.Tensor,
    aten.pow.Tensor_Scalar, aten.mean.dim, aten.rsqrt.default, aten.add.Tensor, aten.div.Tensor, aten.type_as.default,
)  # fmt: skip


@dataclass(frozen=True)
class Site:
    """One attention: `h` [.., D] is what its products read; q [B, H, T, E], k and v [B, Hk, T, E] stand before cos and sin turn them.
    `window` is that of its mask, 0 where it sees all before. `name` is its module's, for weights, with a number where others are of that
    module too."""

    index: int
    attention: SelfAttention
    h: Node
    q: Node
    k: Node
    v: Node
    cos: Node | None
    sin: Node | None
    window: int
    name: str

    @property
    def root(self) -> Node:
        return self.attention.root


@dataclass(frozen=True)
class Sites:
    """What was found in one function. Attentions are counted as `attentions_of` has them; those that are not `found` are `refused`."""

    tokens: Node
    positions: Node | None
    found: tuple[Site, ...]
    refused: tuple[tuple[int, NoMatch], ...]


def attentions_of(function: Function) -> list[SelfAttention | NoMatch]:
    """Every attention of the model in its order, by whose places users name them: of those that are a recurrence already, or have no known
    form, the reason why they stay."""
    attentions, failures = find_attentions(function.calls)
    known: dict[Node | None, SelfAttention | NoMatch] = {failure.node: failure for failure in failures}
    known |= {each.root: each for each in attentions}
    known |= {node: NoMatch("it is a chunked recurrence already", node) for node in function.calls if node.target is RAT}
    return [known[node] for node in function.calls if node in known]


def recurrences_of(function: Function) -> dict[int, Node]:
    """By their places among all attentions."""
    places = enumerate(attentions_of(function))
    return {n: each.node for n, each in places if isinstance(each, NoMatch) and each.node is not None and each.node.target is RAT}


def find_sites(program: Program, function: Function, assume_causal: bool) -> Sites | NoMatch:
    """The attentions of a decoder; a reason where it is none. With `assume_causal` the user says what masks show that an input gives."""
    inputs = inputs_of(function)
    tokens = token_input(inputs)
    if tokens is None:
        return NoMatch("no input of integers [batch, length] is looked up in an embedding: this is no decoder of tokens", None)
    attentions = attentions_of(function)
    if not attentions:
        return NoMatch("it has no attention of a known form: scores of queries and keys, softmax, values", None)
    positions = next((node for node in inputs if node is not tokens and "pos" in str(node.target)), None)
    keys = Counter(node for each in attentions if isinstance(each, SelfAttention) for node in {each.k, each.v})
    found: list[Site] = []
    refused: list[tuple[int, NoMatch]] = []
    for index, each in enumerate(attentions):
        site = _site(program, index, each, tokens, positions, keys, assume_causal) if isinstance(each, SelfAttention) else each
        if isinstance(site, Site):
            found.append(replace(site, name=_own_name(site.name, found, program)))
        else:
            refused.append((index, site))
    return Sites(tokens, positions, tuple(found), tuple(refused))


def _site(
    program: Program, index: int, attention: SelfAttention, tokens: Node, positions: Node | None, keys: Any, assume_causal: bool
) -> Site | NoMatch:
    problem = _unfit(attention, tokens, keys)
    if problem is not None:
        return problem
    window = _window(program, attention, tokens, positions, assume_causal)
    if isinstance(window, NoMatch):
        return window
    q, k = unturned(attention.q), unturned(attention.k)
    for turned in (q, k):
        if isinstance(turned, NoMatch):
            return turned
    assert isinstance(q, Turned) and isinstance(k, Turned)
    if (q.cos, q.sin) != (k.cos, k.sin):
        return NoMatch("queries and keys are turned by different rotary tables", attention.root)
    sources = [_product(each) for each in (q.x, k.x, attention.v)]
    for source in sources:
        if isinstance(source, NoMatch):
            return source
    read = {_input(source) for source in sources}  # type: ignore[arg-type]
    if len(read) != 1:
        return NoMatch("queries, keys and values are products of different inputs", attention.root)
    name = _name(sources[1])  # type: ignore[arg-type]
    return Site(index, attention, read.pop(), q.x, k.x, attention.v, k.cos, k.sin, window, name)


def _window(program: Program, attention: SelfAttention, tokens: Node, positions: Node | None, assume_causal: bool) -> int | NoMatch:
    """That of its mask. What the user says counts where nothing is known: a mask that can be computed is what it is."""
    problem = unknown(attention.mask, tokens, positions)
    if problem is None:
        seen = visible(program, attention.mask, tokens, positions)
        return seen if isinstance(seen, NoMatch) else seen.window
    if assume_causal:
        return 0
    advice = "or say assume_causal=True where you know that it is causal and no row is padded on the left"
    return NoMatch(f"{problem.reason} ({advice})", problem.node)


def _unfit(attention: SelfAttention, tokens: Node, keys: Any) -> NoMatch | None:
    q, v = (each.meta["val"] for each in (attention.q, attention.v))
    if attention.softcap:
        return NoMatch("its scores are capped, which is not possible over summaries", attention.root)
    if _gives_weights(attention.root):
        return NoMatch("its weights are read by something else: capture the model without attentions among its outputs", attention.root)
    if attention.transposed:
        return NoMatch("its keys are there as [batch, heads, width, length] alone", attention.root)
    if not same_size(q.size(2), tokens.meta["val"].size(1)):
        return NoMatch("attention does not have one query for each token", attention.root)
    if q.size(3) != v.size(3):
        return NoMatch(f"keys are {q.size(3)} wide and values {v.size(3)}: they share one gate, so they need one width", attention.root)
    if keys[attention.k] > 1 or keys[attention.v] > 1:
        return NoMatch("another attention reads its keys or values too", attention.root)
    return None


def _gives_weights(root: Node) -> bool:
    """Whether the softmax of a written-out attention has another reader than the product with values."""
    if root.target is aten.scaled_dot_product_attention.default:
        return False
    node = root.args[0]
    while node.target not in (aten.softmax.int, aten._softmax.default):
        if len(node.users) > 1:
            return True
        node = node.args[0]
    return len(node.users) > 1


def _product(node: Node) -> Node | NoMatch:
    """The one product with a weight that `node` is computed of, norms and views apart."""
    found, pending, seen = set(), [node], set()
    while pending:
        each = pending.pop()
        if each in seen or each.op == "get_attr" or not isinstance(each.meta["val"], torch.Tensor | tuple):
            continue
        seen.add(each)
        if each.target in PRODUCTS:
            found.add(each)
        elif each.target in _BETWEEN:
            pending += each.all_input_nodes
        else:
            what = name_of(each.target) if each.op == "call_function" else str(each.target)
            return NoMatch(f"something else than norms, views and rotary positions stands between a product and attention: {what}", each)
    if len(found) != 1:
        return NoMatch(f"queries, keys or values are computed of {len(found)} products", node)
    return found.pop()


def _input(product: Node) -> Node:
    a = named_arguments(product)
    return next(a[name] for name in ("input", "mat1", "x", "self") if name in a and isinstance(a[name], Node) and a[name].op != "get_attr")


def _name(product: Node) -> str:
    """The module of the attention: `layers.0.self_attn` of `layers.0.self_attn.k_proj.weight`."""
    weight = next(str(each.target) for each in product.all_input_nodes if each.op == "get_attr" and each.meta["val"].dim() == 2)
    return ".".join(weight.split(".")[:-2]) or "attention"


def _own_name(name: str, found: Sequence[Site], program: Program) -> str:
    """`name`, or that with a number where gates of another attention go by it."""
    taken = {site.name for site in found} | {each.rsplit(".rat.")[0] for each, weight in program.weights.items() if weight.kind == "added"}
    return next(each for each in chain([name], (f"{name}.{n}" for n in count(1))) if each not in taken)
