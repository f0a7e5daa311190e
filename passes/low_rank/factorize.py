"""The rank-r factors nearest to a matrix: exact for small matrices, by a range finder whose result is checked for large ones.

W [N, K] = Uv S Vh;  up = Uv[:, :r] * S[:r],  down = Vh[:r];  |W - up down|_F^2 = sum_{i > r} S_i^2      (Eckart and Young)
"""

import math

import torch
from torch import Tensor

from .alone import one_thread

OVERSAMPLE, POWER_STEPS = 10, 4  # of the range finder
EXACT_UP_TO = 1024  # the smaller dim
TOLERANCE = 0.02  # by how much a residual may be larger than the least possible
NEGLIGIBLE = 1e-5  # of |W|: a residual below it is not worth an exact factorization
_PROBES, _PROBE_STEPS, _FAILURE = 16, 8, 1e-6  # 16 columns: MKL takes six times as long over 10
_GRAM_RESIDUAL = 1e-3  # of |W|: the least at which the Gram matrix is accurate enough


def best_factors(w: Tensor, rank: int, method: str = "auto", seed: int = 0) -> tuple[Tensor, Tensor]:
    """(up [N, rank], down [rank, K]) in float32 with the least |w - up down|_F, for w [N, K] in float32 or float64.

    "exact" has the least; "randomized" a residual near it (Halko, Martinsson and Tropp 2011, algorithms 4.4 and 5.1), the same for the
    same `seed`. "auto" is exact where min(N, K) <= 1024 and else randomized, where that is within 2% of the least with probability
    1 - 1e-6, and exact where this cannot be told. The rows of down are orthonormal, the entry of each with the largest magnitude is
    positive.

    Raises:
        ValueError: the rank is negative or above min(N, K), or there is no such method.
    """
    if not 0 <= rank <= min(w.shape):
        raise ValueError(f"a matrix of {w.size(0)} x {w.size(1)} has no best factors of rank {rank}: ranks are from 0 to {min(w.shape)}")
    if method not in ("auto", "exact", "randomized"):
        raise ValueError(f"there is no method {method!r}: it is auto, exact or randomized")
    if rank == 0:
        return w.new_zeros(w.size(0), 0, dtype=torch.float32), w.new_zeros(0, w.size(1), dtype=torch.float32)
    if method == "exact" or method == "auto" and min(w.shape) <= EXACT_UP_TO:
        return _signed(*_exact(w, rank))
    generator = torch.Generator().manual_seed(seed)
    up, down = _randomized(w, rank, generator)
    if method == "auto" and not _is_near_best(w, up, down, generator):
        up, down = _exact(w, rank)
    return _signed(up, down)


def residual_norm(w: Tensor, up: Tensor, down: Tensor) -> float:
    """|w - up down|_F, computed in float64."""
    return float((w.to(torch.float64) - up.to(torch.float64) @ down.to(torch.float64)).norm())


def _exact(w: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The factors in float64, from the smaller Gram matrix where that is accurate.

    Its eigenvectors lose what is below sqrt(eps) S_1, so that the squared residual is off by some r eps S_1^2: less than 1e-7 of it
    where the residual is above 1e-3 |W|. Two to four times as fast as the SVD (768 x 3072, 2 threads: 0.15 s and 0.63 s).
    """
    wide = w.to(torch.float64)
    tall = wide if w.size(0) >= w.size(1) else wide.T
    gram = tall.T @ tall
    with one_thread():
        basis = torch.linalg.eigh(gram)[1].flip(1)[:, :rank]
    image = tall @ basis  # its columns are orthogonal, S_i long
    if (tall - image @ basis.T).norm() <= _GRAM_RESIDUAL * wide.norm():  # of zeros too
        with one_thread():
            left, lengths, right = torch.linalg.svd(wide, full_matrices=False)
        return left[:, :rank] * lengths[:rank], right[:rank]
    if tall is wide:
        return image, basis.T
    lengths = image.norm(dim=0)
    return basis * lengths, (image / lengths).T


def _randomized(w: Tensor, rank: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """The factors of the projection of w on a basis Q of what w makes of random vectors, sharpened by power steps."""
    columns = min(rank + OVERSAMPLE, *w.shape)
    q = _orthonormal(w @ _normal(w, columns, generator))
    for _ in range(POWER_STEPS):
        q = _orthonormal(w.T @ q)
        q = _orthonormal(w @ q)
    projected = q.T @ w
    with one_thread():
        left, lengths, right = torch.linalg.svd(projected, full_matrices=False)
    return (q @ left[:, :rank]) * lengths[:rank], right[:rank]


def _orthonormal(columns: Tensor) -> Tensor:
    with one_thread():
        return torch.linalg.qr(columns).Q


def _is_near_best(w: Tensor, up: Tensor, down: Tensor, generator: torch.Generator) -> bool:
    """Whether |E|_F, E = w - up down, is provably within TOLERANCE of the least for the rank; false alarms are possible.

    With up = Q S and orthonormal Q and down, w w^T is [[S^2, C^T], [C, E E^T]] in the basis of Q and what is orthogonal to it, and C has
    the singular values of E down^T S. By Weyl's and Ky Fan's inequalities the r largest eigenvalues have a sum of at most
    sum_i max(S_i^2, |E|_2^2) + sum_i sigma_i(C), and what is above sum_i S_i^2 is what the best factors take more.
    """
    residual = w - up @ down
    lengths = up.norm(dim=0)
    square = residual.norm() ** 2
    if square <= (NEGLIGIBLE * w.norm()) ** 2:
        return True
    missed = (_spectral_bound(residual, generator) ** 2 - lengths**2).clamp(min=0).sum()
    coupled = torch.linalg.svdvals((residual @ down.T) * lengths).sum()
    return bool(square - missed - coupled >= square / (1 + TOLERANCE) ** 2)


def _spectral_bound(e: Tensor, generator: torch.Generator) -> Tensor:
    """At least |e|_2 with probability 1 - 1e-6: lemma 4.1 of Halko et al. for (e e^T)^q e, whose norm is |e|_2^(2q + 1).

    |A|_2 <= alpha sqrt(2/pi) max_i |A z_i| but with probability alpha^-m, for m normal vectors z_i.
    """
    y = e @ _normal(e, _PROBES, generator)
    logarithm = torch.zeros(_PROBES, dtype=e.dtype, device=e.device)
    for _ in range(_PROBE_STEPS):
        length = y.norm(dim=0)
        logarithm += length.log()
        y = e @ (e.T @ (y / length))
    logarithm += y.norm(dim=0).log()
    alpha = _FAILURE ** (-1 / _PROBES)
    return ((logarithm.max() + math.log(alpha * math.sqrt(2 / math.pi))) / (2 * _PROBE_STEPS + 1)).exp()


def _normal(like: Tensor, columns: int, generator: torch.Generator) -> Tensor:
    """Normal [K, columns] for `like` [N, K], drawn on the CPU, so that every device has the same."""
    return torch.randn(like.size(1), columns, generator=generator, dtype=like.dtype).to(like.device)


def _signed(up: Tensor, down: Tensor) -> tuple[Tensor, Tensor]:
    """Both in float32, with the signs that make the largest entry of each row of down positive."""
    largest = down.gather(1, down.abs().argmax(1, keepdim=True))
    sign = torch.where(largest < 0, -1.0, 1.0).to(down.dtype)
    return (up * sign.T).to(torch.float32), (down * sign).to(torch.float32)
