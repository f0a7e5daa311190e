"""Scratch of norms, pools, sorts, products and other single kernels: copies into the layout they take, and results that the caller
does not see."""

from collections.abc import Callable
from typing import Any

from ..program import Node
from .operands import (
    WHOLE,
    Part,
    Workspace,
    copied,
    copied_image,
    is_channels_last,
    is_one_dim,
    nbytes,
    numel,
    product,
    sizes,
    strides,
    tensor,
)

_FLOAT = 4
_INDEX = 8  # bytes of an index
_SMALL_IMAGE = 128  # rows and columns, `_use_vectorized_kernel_cond_2d`


def _layer_norm(a: dict[str, Any], node: Node, threads: int) -> Workspace:
    """Contiguous input; mean and reciprocal deviation of each row."""
    rows = numel(a["input"]) // max(1, product(a["normalized_shape"]))
    return Workspace(copied(a["input"]) + 2 * rows * _FLOAT)


def _rms_norm(a: dict[str, Any], node: Node, threads: int) -> Workspace:
    """The squares, later the rows scaled, before they meet the weight."""
    rows = numel(a["input"]) // max(1, product(a["normalized_shape"]))
    return Workspace(nbytes(a["input"]) + rows * _FLOAT)


def _contiguous_input(a: dict[str, Any], node: Node, threads: int) -> Workspace:
    return Workspace(copied(_input(a)))


def _image_without_gaps(a: dict[str, Any], node: Node, threads: int) -> Workspace:
    return Workspace(copied_image(_input(a)))


def _contiguous_pair(a: dict[str, Any], node: Node, threads: int) -> Workspace:
    """Both operands of `cdist`; by distance 2 of many rows it is a product of matrices [R, M + 2], with norms and ones beside x."""
    operands = [a["x1"], a["x2"]]
    rows = [sizes(x)[-2] for x in operands]
    by_product = a["p"] == 2 and (a["compute_mode"] == 1 or (a["compute_mode"] in (None, 0) and max(rows) > 25))
    wider = sum(nbytes(x) // sizes(x)[-1] * (sizes(x)[-1] + 2) for x in operands) if by_product else 0
    return Workspace(sum(map(copied, operands)) + wider)


def _pad(a: dict[str, Any], node: Node, threads: int) -> Workspace:
    """An input without gaps, to read from its far ends."""
    return Workspace(copied_image(a["self"]) if a["mode"] in ("reflect", "replicate") else 0)


def _max_pool(a: dict[str, Any], node: Node, threads: int) -> Workspace:
    """An input without gaps; the places of the maxima."""
    return Workspace(copied_image(a["self"]) + numel(node) * _INDEX)


def _roll(a: dict[str, Any], node: Node, threads: int) -> Workspace:
    """Dims are rolled one after another: two results are there at a time."""
    return Workspace(nbytes(node) if len(a["shifts"]) > 1 else 0)


def upsample_nearest(a: dict[str, Any], node: Node, threads: int, part: Part = WHOLE) -> Workspace:
    """A result of at most 128 rows and columns together comes from a kernel that takes channels innermost: input and result once
    more in that layout."""
    if sum(part.sizes(node)[-2:]) > _SMALL_IMAGE or is_channels_last(_input(a)):
        return Workspace()
    return Workspace(part.of(nbytes(_input(a)) + nbytes(node)))


def _smooth_upsample(a: dict[str, Any], node: Node, threads: int) -> Workspace:
    """The image between the two passes: its new width, its old height."""
    *_, height, _ = sizes(_input(a))
    return Workspace(nbytes(node) // sizes(node)[-2] * height)


def _matmul(a: dict[str, Any], node: Node, threads: int) -> Workspace:
    """Operands of more than one batch dim are viewed as [B, M, K], or copied: those that are repeated over batches, and those
    whose batch dims are not one dim in memory."""
    operands = [a["self"], a["other"]]
    if any(tensor(x).dim() < 3 for x in operands):
        return Workspace()
    batch = product(sizes(node)[:-2])
    return Workspace(sum(_as_batch(x, batch) for x in operands))


def _as_batch(x: Any, batch: int) -> int:
    counts, steps = sizes(x), strides(x)
    is_repeated = product(counts[:-2]) not in (batch, 1) or (product(counts[:-2]) == 1 < batch and len(counts) > 3)
    if not is_repeated and is_one_dim(counts[:-2], steps[:-2]):
        return 0
    return batch * product(counts[-2:]) * tensor(x).dtype.itemsize


def _argsort(a: dict[str, Any], node: Node, threads: int) -> Workspace:
    """The sorted values."""
    return Workspace(nbytes(a["self"]))


def _sorted_copy(a: dict[str, Any], node: Node, threads: int) -> Workspace:
    """Values in their new order and where each was."""
    return Workspace(nbytes(a["self"]) + numel(a["self"]) * _INDEX)


def _exponentials(a: dict[str, Any], node: Node, threads: int) -> Workspace:
    return Workspace(nbytes(a["self"]) + 2 * nbytes(node))


def _log_sigmoid(a: dict[str, Any], node: Node, threads: int) -> Workspace:
    """exp(-|x|), kept for a backward pass that never comes."""
    return Workspace(nbytes(a["self"]) + copied(a["self"]))


def _inverse_fft(a: dict[str, Any], node: Node, threads: int) -> Workspace:
    """The transform overwrites its complex input, so it has a copy."""
    return Workspace(numel(a["self"]) * 2 * tensor(node).dtype.itemsize)


def _cosine_similarity(a: dict[str, Any], node: Node, threads: int) -> Workspace:
    """Both operands over their norms, and the products."""
    return Workspace(3 * max(nbytes(a["x1"]), nbytes(a["x2"])))


def _norm_stats(a: dict[str, Any], node: Node, threads: int) -> Workspace:
    return Workspace(nbytes(a["x"]) // max(1, a["groups"]))


def _input(a: dict[str, Any]) -> Any:
    return next(a[name] for name in ("input", "self") if name in a)


RULES: dict[str, Callable[[dict[str, Any], Node, int], Workspace]] = {
    "aten::layer_norm": _layer_norm,
    "aten::rms_norm": _rms_norm,
    "aten::_upsample_bilinear2d_aa": _smooth_upsample,
    "aten::_upsample_bicubic2d_aa": _smooth_upsample,
    "aten::pad": _pad,
    "aten::max_pool2d": _max_pool,
    "aten::max_pool3d": _max_pool,
    "aten::roll": _roll,
    "aten::matmul": _matmul,
    "aten::argsort": _argsort,
    "aten::kthvalue": _sorted_copy,
    "aten::quantile": _sorted_copy,
    "aten::logsumexp": _exponentials,
    "aten::log_sigmoid": _log_sigmoid,
    "aten::fft_irfft": _inverse_fft,
    "aten::cdist": _contiguous_pair,
    "aten::cosine_similarity": _cosine_similarity,
    "gw::norm_stats": _norm_stats,
    **dict.fromkeys(
        [
            "aten::instance_norm",
            "aten::softmax",
            "aten::log_softmax",
            "aten::median",
            "aten::bucketize",
            "aten::searchsorted",
            "aten::max_pool1d",
        ],
        _contiguous_input,
    ),
    **dict.fromkeys(
        ["aten::group_norm", "aten::avg_pool2d", "aten::avg_pool3d", "aten::adaptive_avg_pool2d", "aten::adaptive_max_pool2d"],
        _image_without_gaps,
    ),
}
