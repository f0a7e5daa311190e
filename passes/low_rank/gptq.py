"""GPTQ: codes that make up, in the columns still to come, for the error of those that were rounded already.

    H = (2/n) X^T X + damping,  C^T C = H^-1 with C upper triangular
    for j in order:  q_j = element(R_j / s_j);  e = (R_j - q_j s_j) / C_jj;  R[:, later] -= e C[j, later]

Columns go by falling H_jj, and each keeps the scale of its own block. Source: Frantar et al., "GPTQ" (arXiv 2210.17323), section 3.
"""

import torch
from torch import Tensor

from ...ir.low_bit.elements import encode, pack, round_to_values
from ...ir.low_bit.formats import Format, format_of
from ...ir.low_bit.quantize import step_of
from .alone import one_thread

FIRST_DAMPING, MORE_DAMPING, ATTEMPTS = 0.01, 0.001, 250  # of the mean of H's diagonal
_ROWS_AT_ONCE = 1024


def gptq_codes(residual: Tensor, rows: Tensor, format: str, scale: Tensor, scale2: Tensor | None = None) -> Tensor | None:
    """Codes of `residual` [N, K] on its scales [N, K/g], as `encode_on` lays them out, for the inputs `rows` [n, K].

    `rows` are what the quantized weight is multiplied by: shifted, smoothed, rotated and quantized. A column that they leave at zero
    is rounded to nearest, since other inputs may use it. None where H stays singular however it is damped; round to nearest then.
    """
    form = format_of(format)
    hessian = _hessian(rows)
    order = hessian.diagonal().argsort(descending=True, stable=True)
    factor = _inverse_factor(hessian, order)
    if factor is None:
        return None
    block_of_column = order // form.group_of(residual.size(1))
    step = step_of(scale, scale2, format).T[block_of_column]  # [K, N]: a column of the weight is one row here
    elements = torch.empty_like(step)
    _sweep(residual.to(torch.float64).T[order], step, factor, form, elements)
    codes = encode(torch.empty_like(elements).index_copy_(0, order, elements).T, form)
    return pack(codes) if form.is_packed else codes


def _hessian(rows: Tensor) -> Tensor:
    """(2/n) X^T X in float64, from products in float32; the damping is far above what these round."""
    k = rows.size(1)
    total = torch.zeros(k, k, dtype=torch.float64, device=rows.device)
    for part in rows.split(_ROWS_AT_ONCE):
        wide = part if part.dtype == torch.float64 else part.to(torch.float32)
        total += wide.T @ wide
    total *= 2 / max(len(rows), 1)
    diagonal = total.diagonal()
    live = diagonal > 0
    # A column without input has no part in any product: the mean leaves the damping to the others.
    diagonal[~live] = diagonal[live].mean() if live.any() else 1.0
    return total


def _inverse_factor(hessian: Tensor, order: Tensor) -> Tensor | None:
    """C, upper triangular, with C^T C = (H + damping)^-1 for columns in `order`. None where no damping makes H positive.

    Of H backwards a lower factor is, forwards again, an upper one: H = U U^T, and C = U^-1. H itself is never inverted.
    """
    mean = hessian.diagonal().mean()
    last_first = order.flip(0)
    backwards = hessian[last_first.unsqueeze(1), last_first]
    backwards.diagonal().add_(FIRST_DAMPING * mean)
    for _ in range(ATTEMPTS):
        with one_thread():
            lower, failed = torch.linalg.cholesky_ex(backwards)
        if not failed and lower.isfinite().all():
            inverse = torch.eye(len(order), dtype=hessian.dtype, device=hessian.device)
            return torch.linalg.solve_triangular(lower.flip(0, 1), inverse, upper=True, out=inverse)
        backwards.diagonal().add_(MORE_DAMPING * mean)
    return None


def _sweep(columns: Tensor, step: Tensor, factor: Tensor, form: Format, elements: Tensor) -> None:
    """Rounds `columns` float64 [K, N] on `step` to `elements` f32 [K, N] one after the other, and leaves the errors e in their place.

    What one half does to the other is a product, and so on within each half: the sums of column after column, by the matrix.
    """
    if len(columns) == 1:
        # In float32, as `encode_on` divides, so that ties fall alike.
        elements.copy_(round_to_values(columns.to(torch.float32) / step, form))
        columns.sub_(elements.to(torch.float64) * step).div_(factor)
        return
    half = len(columns) // 2
    _sweep(columns[:half], step[:half], factor[:half, :half], form, elements[:half])
    columns[half:].addmm_(factor[:half, half:].T, columns[:half], alpha=-1)
    _sweep(columns[half:], step[half:], factor[half:, half:], form, elements[half:])
