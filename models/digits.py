"""scikit-learn's handwritten digits, and how good samples of them are: 1797 images of 8 x 8 pixels (Alpaydin & Kaynak 1998).

They are split once into halves: what is trained is trained on one, and samples are compared with the other. The floor is therefore
`quality` of the first half itself, a distance of 0.29 and an accuracy of 0.99 for its 898 images: a sampler that only repeats what
it has seen gets this.
"""

import functools
import importlib
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..ir.errors import InputError, TargetError

NUM_CLASSES = 10
NO_CLASS = NUM_CLASSES  # the label that stands for no class, as `dit.DiT` has it


@dataclass(frozen=True)
class Half:
    """images: [N, 1, 8, 8], float32 in [-1, 1] (ink is 1); labels: [N], int64 in 0 .. 9."""

    images: Tensor
    labels: Tensor


@dataclass(frozen=True)
class Quality:
    """Of samples: `frechet_distance` to the held-out half, 0 at best, and the share that is recognised as its class."""

    frechet_distance: float
    accuracy: float


@functools.cache
def halves() -> tuple[Half, Half]:
    """(train, held_out): 898 and 899 images, with equal shares of each class.

    Raises: TargetError where scikit-learn is not installed.
    """
    datasets, selection = _sklearn("datasets"), _sklearn("model_selection")
    images, labels = datasets.load_digits(return_X_y=True)  # pixels are 0 .. 16
    images = torch.from_numpy(images).float().view(-1, 1, 8, 8) / 8 - 1
    indices = selection.train_test_split(range(len(labels)), test_size=0.5, stratify=labels, random_state=0)
    train, held_out = (Half(images[half], torch.from_numpy(labels)[half].long()) for half in indices)
    return train, held_out


def quality(images: Tensor, labels: Tensor) -> Quality:
    """Compares samples with the held-out half: means and covariances of pixels, and classes by a classifier fitted on that half.

    Few samples make a poor covariance of 64 x 64 numbers, so the distance is larger for fewer of them (4.3 for 40 images of the
    first half, 1.4 for 100, 0.5 for 450): compare equal numbers.

    Args:
        images: [N, 1, 8, 8] with N >= 2, as `halves` has them.
        labels: [N], the class that each was asked to be.

    Raises: InputError for other shapes and for images that are not finite; TargetError where scikit-learn is not installed.
    """
    if images.dim() != 4 or images.shape[1:] != (1, 8, 8) or labels.shape != images.shape[:1] or len(images) < 2:
        raise InputError(f"quality wants [N, 1, 8, 8] images, at least two, and [N] labels, not {[*images.shape]} and {[*labels.shape]}")
    if not images.isfinite().all():
        raise InputError("quality wants finite images, and some pixels are NaN or infinite")
    pixels = images.flatten(1).double()
    distance = frechet_distance(*_moments(pixels), *_moments(halves()[1].images.flatten(1).double()))
    recognised = _classifier().predict(pixels.numpy())
    return Quality(distance, (torch.from_numpy(recognised) == labels).double().mean().item())


def frechet_distance(mean_a: Tensor, covariance_a: Tensor, mean_b: Tensor, covariance_b: Tensor) -> float:
    """|m_a - m_b|^2 + tr(S_a + S_b - 2 (S_a S_b)^(1/2)) of two Gaussians; means: [D], covariances: [D, D], float64.

    The trace of the root is the sum of the singular values of S_a^(1/2) S_b^(1/2): no root is taken of a difference that rounding
    made negative, as happens where pixels never change and the covariances are singular.

    Source: Heusel et al. 2017, "GANs Trained by a Two Time-Scale Update Rule Converge to a Local Nash Equilibrium", equation 6.
    """
    shared = torch.linalg.svdvals(_root(covariance_a) @ _root(covariance_b)).sum()
    return ((mean_a - mean_b).square().sum() + covariance_a.trace() + covariance_b.trace() - 2 * shared).item()


def _root(covariance: Tensor) -> Tensor:
    """The symmetric square root; eigenvalues that rounding made negative count as 0."""
    values, vectors = torch.linalg.eigh(covariance)
    return (vectors * values.clamp(min=0).sqrt()) @ vectors.T


def _moments(pixels: Tensor) -> tuple[Tensor, Tensor]:
    return pixels.mean(0), pixels.T.cov()


@functools.cache
def _classifier() -> Any:
    """A support vector machine with scikit-learn's default radial kernel."""
    held_out = halves()[1]
    return _sklearn("svm").SVC().fit(held_out.images.flatten(1).double().numpy(), held_out.labels.numpy())


def _sklearn(module: str) -> Any:
    try:
        return importlib.import_module(f"sklearn.{module}")
    except ImportError as error:
        raise TargetError("the digits come with scikit-learn, which is not installed: pip install 'graphwright[train]'") from error
