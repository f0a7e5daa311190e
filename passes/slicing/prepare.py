"""A copy of the program in which what can be cut finer is spelled finer, for the planner to look at.

    group_norm(x)                   -> norm_apply(x, norm_stats(x))
    attention(q, k, v, causal)      -> causal_attention(q, k, v, arange(L))

The plan decides which of these the program itself needs; the others stay as they were.
"""

from dataclasses import dataclass

import torch

from ...ir import Node, Program, Rewriter
from ...ir.infer import same_type
from ...ir.pattern import named_arguments
from ...ir.size_nodes import SizeNodes

aten = torch.ops.aten
gw = torch.ops.gw


@dataclass(frozen=True)
class SplitNorm:
    """The two halves of a GroupNorm."""

    stats: Node
    apply: Node


@dataclass(frozen=True)
class CausalRows:
    """A causal attention with its rows as an operand."""

    rows: Node
    attention: Node


@dataclass
class Prepared:
    """The spelled-out copy, and how its nodes correspond to those of the original."""

    program: Program
    rewriter: Rewriter  # of the copy
    sizes: SizeNodes
    original: dict[Node, Node]
    norms: dict[Node, SplitNorm]  # original GroupNorm -> its halves in the copy
    attentions: dict[Node, CausalRows]

    def counterpart(self, node: Node) -> Node:
        """The node of the copy with the value of `node`, one of the original."""
        if node in self.norms:
            return self.norms[node].apply
        if node in self.attentions:
            return self.attentions[node].attention
        return next(twin for twin, original in self.original.items() if original is node)


def prepare(program: Program, function: str) -> Prepared:
    """Spells out every GroupNorm and causal attention of one function in a copy."""
    copy = program.copy()
    pairs = list(zip(program.functions[function].graph.nodes, copy.functions[function].graph.nodes, strict=True))
    rewriter = Rewriter(copy, pass_name="slice-groups", function=function)
    sizes = SizeNodes(copy.functions[function].placeholders)
    prepared = Prepared(copy, rewriter, sizes, {twin: node for node, twin in pairs}, {}, {})
    for node, twin in pairs:
        if is_group_norm(node):
            with rewriter.step("split-group-norm"):
                split = split_norm(rewriter, twin)
            if split is not None:
                prepared.norms[node] = split
        elif is_causal_attention(node):
            with rewriter.step("attention-rows"):
                prepared.attentions[node] = attention_rows(rewriter, sizes, twin)
    return prepared


def is_group_norm(node: Node) -> bool:
    """Whether `node` is a GroupNorm over more than its channels."""
    return node.op == "call_function" and node.target is aten.group_norm.default and node.meta["val"].dim() > 2


def is_causal_attention(node: Node) -> bool:
    """Whether `node` is an attention whose mask is the is_causal flag."""
    if node.op != "call_function" or node.target is not aten.scaled_dot_product_attention.default:
        return False
    arguments = named_arguments(node)
    return bool(arguments["is_causal"]) and arguments["attn_mask"] is None and not arguments["dropout_p"]


def split_norm(rewriter: Rewriter, node: Node) -> SplitNorm | None:
    """group_norm(x, G, w, b, eps) -> norm_apply(x, norm_stats(x, G), w, b, G, eps); None where that would be laid out otherwise."""
    a = named_arguments(node)
    stats = rewriter.insert(gw.norm_stats.default, (a["input"], a["num_groups"]), before=node, origin=node)
    operands = (a["input"], stats, a["weight"], a["bias"], a["num_groups"], a["eps"])
    apply = rewriter.insert(gw.norm_apply.default, operands, before=node, origin=node)
    if not same_type(apply.meta["val"], node.meta["val"]):
        rewriter.erase(apply)
        return None
    rewriter.replace(node, apply)
    return SplitNorm(stats, apply)


def attention_rows(rewriter: Rewriter, sizes: SizeNodes, node: Node) -> CausalRows:
    """attention(q, k, v, is_causal) -> causal_attention(q, k, v, arange(L)): a slice of queries keeps its own positions."""
    a = named_arguments(node)
    query = a["query"]
    value = query.meta["val"]
    length, device = value.size(-2), value.device
    if sizes.knows(length):
        length = sizes.node(rewriter, length, node)
    else:
        length = rewriter.insert(aten.sym_size.int, (query, value.dim() - 2), before=node, origin=node)
    rows = rewriter.insert(aten.arange.default, (length,), {"device": device, "pin_memory": False}, before=node, origin=node)
    operands = (query, a["key"], a["value"], rows, a["scale"], a["enable_gqa"])
    attention = rewriter.insert(gw.causal_attention.default, operands, before=node, origin=node)
    rewriter.replace(node, attention)
    return CausalRows(rows, attention)
