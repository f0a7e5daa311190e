"""Functions of self-speculation: a draft of some layers, and a judge that need not repeat those which draft and judge share.

    draft(tokens [B, 1], ..)                 -> logits [B, V]; with reuse, behind them h_f [B, 1, D]
    lift(tokens [B, 1], ..)                  -> h_f [B, 1, D]          of the last drafted token, by layers 0 .. f - 1 alone
    resume(tokens [B, T], .., h_f [B, T, D]) -> logits [B, T, V]       by layers f .. N - 1, f the first that the draft leaves out

Source: specs/layer_skip.md, section 2 (Self-speculation); LayerSkip (arXiv 2404.16710).
"""

from collections.abc import Sequence

import torch

from ...ir import Node, Rewriter
from ...ir.errors import PassError
from ..kv_cache import steps
from ..kv_cache.cache_sizes import cache_sizes
from ..kv_cache.decoder import Decoder
from .units import Unit


def add_draft(rewriter: Rewriter, decoder: Decoder, skipped: steps.Skipped, hidden: Node | None) -> None:
    """`draft`, which leaves out what is `skipped`; with a value `hidden`, [B, T, D], also `lift` and `resume`."""
    program, sizes = rewriter.program, cache_sizes(rewriter.program.symbols, decoder)
    rewriter.add_function(steps.decode(program, decoder, sizes, name="draft", skipped=skipped, hidden=hidden))
    if hidden is not None:
        rewriter.add_function(steps.lift(program, decoder, sizes, hidden))
        rewriter.add_function(steps.resume(program, decoder, sizes, hidden))


def shared_until(decoder: Decoder, units: Sequence[Unit], layers: Sequence[int]) -> Node:
    """h_f, what the first unit reads that a draft of `layers` leaves out.

    Raises:
        PassError: draft and judge share no layers or all, or what passes between layers is not [B, T, D].
    """
    first = next((unit for unit in units if unit.index not in layers), None)
    if first is None:
        raise PassError("layer-skip: reuse_prefix has no effect, since the draft leaves out no layer: leave it out")
    if first.index == 0:
        raise PassError(
            f"layer-skip: the draft leaves out layer 0 ({first.where}), so there are no hidden states for reuse_prefix: draft with it"
        )
    shape = first.source.meta["val"].shape
    is_plain = len(shape) == 3 and isinstance(shape[2], int) and all(isinstance(size, torch.SymInt) for size in shape[:2])
    if not is_plain or shape[0] != decoder.batch or shape[1] != decoder.length:
        raise PassError(
            f"layer-skip: reuse_prefix keeps hidden states [batch, length, width], and layer {first.index} ({first.where}) reads "
            f"{list(shape)}: leave it out"
        )
    return first.source
