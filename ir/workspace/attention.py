"""Scratch of attention: ATen's flash kernel where it takes the operands, else the plain form with its scores in memory."""

from typing import Any

import torch

from ..program import Node
from .operands import WHOLE, Part, Workspace, nbytes, product, sizes, strides, tensor

_FLOAT = 4


def attention(a: dict[str, Any], node: Node, threads: int, part: Part = WHOLE) -> Workspace:
    """Flash: for each thread a tile of scores, its row maxima and sums, and a tile of the result; the row log-sum-exp for all
    rows. Tiles are 256, 64 or 32 queries by 512 keys; narrow types have their scores once more in float32.

    Plain: the scores twice and which of them are -inf, or before that scaled copies of query and key beside the scores; keys and
    values repeated for the query heads that share them. Both turn a mask of booleans into numbers of the query's type first.
    """
    *batch, length, width = part.sizes(a["query"])
    keys, itemsize = sizes(a["key"])[-2], tensor(a["query"]).dtype.itemsize
    mask = _float_mask(a.get("attn_mask"), a["query"], part)
    if not _is_flash(a):
        scores = product(batch) * length * keys
        mask += length * keys * itemsize if a.get("is_causal") is True else 0
        repeated = (product(batch) // product(sizes(a["key"])[:-2])) if a.get("enable_gqa") is True else 1
        shared = nbytes(a["key"]) + nbytes(a["value"]) if repeated > 1 else 0
        scaled = product(batch) * (length + keys) * width * itemsize
        result = product(batch) * length * sizes(a["value"])[-1] * itemsize  # not there yet while the scores are made
        return Workspace(max(scores * (2 * itemsize + 1), scores * itemsize + scaled - result) + mask + shared * repeated)
    tile = min(length, 256 if length >= 768 else 64 if length >= 192 else 32)
    wide, narrow = max(itemsize, _FLOAT), itemsize if itemsize < _FLOAT else 0
    scores = tile * min(keys, 512)
    rows = product(batch) * length * _FLOAT
    return Workspace(rows + mask, threads * ((scores + 2 * tile + tile * width) * wide + scores * narrow))


def causal_attention(a: dict[str, Any], node: Node, threads: int, part: Part = WHOLE) -> Workspace:
    """As attention, with the mask that the body makes: booleans [L, S] and their float form."""
    mask = part.sizes(a["q"])[-2] * sizes(a["k"])[-2]
    moving, fixed = attention({"query": a["q"], "key": a["k"], "value": a["v"]}, node, threads, part)
    return Workspace(moving + mask * (1 + _FLOAT), fixed)


def _is_flash(a: dict[str, Any]) -> bool:
    """[B, H, L, D] each, of one D, which is dense."""
    operands = [a[name] for name in ("query", "key", "value")]
    heads_are_equal = len({sizes(operand)[-1] for operand in operands}) == 1
    return heads_are_equal and all(tensor(operand).dim() == 4 and strides(operand)[-1] == 1 for operand in operands)


def _float_mask(mask: Any, query: Any, part: Part) -> int:
    """Bytes of a boolean mask's numbers; a slice of queries takes its slice of the mask, where that has the dim."""
    if not isinstance(mask, Node) or tensor(mask).dtype is not torch.bool:
        return 0
    count = product(sizes(mask))
    dim = part.dim - tensor(query).dim() + tensor(mask).dim()
    is_cut = dim >= 0 and sizes(mask)[dim] == sizes(query)[part.dim]
    return (part.of(count) if is_cut else count) * tensor(query).dtype.itemsize
