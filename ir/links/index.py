"""R26-R30: look-ups by index, ops without tensor operand, and the ops that are barriers whatever the tag."""

import torch

from .call import Call
from .sizes import differ, same
from .table import Moves, Refusal, aligned, never, row, unproved


@row("aten::embedding")
def embedding(call: Call, output: int, dim: int) -> Moves:
    """o[.., e] = w[i[..], e]:   i d <- i d;   last <- w 1 [features]."""
    if dim < len(call.out_shape()) - 1:
        return Moves({"indices": dim})
    return Moves({"weight": 1}, "features")


@row("aten::index_select")
def index_select(call: Call, output: int, dim: int) -> Moves:
    """d != dim <- x d;   dim <- i 0."""
    return Moves({"index": 0} if dim == call.dim("dim", len(call.out_shape())) else {"self": dim})


@row("aten::gather")
def gather(call: Call, output: int, dim: int) -> Moves | Refusal:
    """o[.., k, ..] = x[.., i[.., k, ..], ..]:   dim <- i dim;   d != dim <- i d and x d, only if these sizes are equal."""
    if dim == call.dim("dim", len(call.out_shape())):
        return Moves({"index": dim})
    size, indexed = call.shape("self")[dim], call.shape("index")[dim]
    if same(size, indexed):
        return Moves({"self": dim, "index": dim})
    if differ(size, indexed):
        return Refusal("mixed", f"gather reads the first {indexed} of {size} along dim {dim}", call.operand("self"))
    return unproved(call, "self", size, indexed)


@row("aten::index.Tensor")
def index(call: Call, output: int, dim: int) -> Moves | Refusal:
    """Dims of the (broadcast) indices <- all indices, aligned; unindexed dims <- x.

    The indices' dims stand where the indexed ones stood, or in front if those are not adjacent.
    """
    indexed = [d for d, i in enumerate(call["indices"]) if i is not None]
    keys = [("indices", d) for d in indexed]
    for key in keys:
        if call.operand(key).meta["val"].dtype in (torch.bool, torch.uint8):
            return Refusal("data-dependent", "the length of a selection by mask depends on data", call.operand(key))
    rank = max(len(call.shape(key)) for key in keys)
    adjacent = indexed[-1] - indexed[0] == len(indexed) - 1
    first = indexed[0] if adjacent else 0
    if first <= dim < first + rank:
        moves = aligned(call, keys, dim - first, call.out_shape()[first : first + rank])
        return moves if isinstance(moves, Refusal) else Moves(moves)
    unindexed = [d for d in range(len(call.shape("self"))) if d not in indexed]
    return Moves({"self": unindexed[dim if dim < first else dim - rank]})


SOURCES = """
    arange linspace logspace zeros ones full empty eye scalar_tensor new_zeros new_ones new_full new_empty meshgrid
""".split()


@row(*(f"aten::{name}" for name in SOURCES))
def source(call: Call, output: int, dim: int) -> Moves:
    """No element depends on a sliced operand: hoisted, and free to re-enter sliced."""
    return Moves({})


never("barrier", "a size used as a value is read from the full tensor outside", "aten::sym_size", "aten::sym_numel", "aten::sym_stride")

never(
    "barrier", "elements are placed by value or over the whole tensor",
    *(f"aten::{name}" for name in """
        index_put scatter scatter_add scatter_reduce index_add index_copy index_fill masked_scatter histc unfold im2col col2im
        fft_fft fft_ifft fft_rfft fft_irfft fft_fft2 fft_ifft2 fft_rfft2 fft_irfft2 fft_fftn fft_ifftn fft_rfftn fft_irfftn
        _fft_c2c _fft_r2c _fft_c2r stft istft
    """.split()),
)  # fmt: skip

never(
    "data-dependent", "its shape or value depends on data",
    *(f"aten::{name}" for name in """
        nonzero nonzero_numpy unique_consecutive unique_dim _unique _unique2 masked_select bincount item _local_scalar_dense where.default
    """.split()),
)  # fmt: skip

never(
    "rng", "it draws random numbers", *(f"aten::{name}" for name in "rand randn randint randperm rand_like randn_like randint_like".split())
)
