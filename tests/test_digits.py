"""The digits and the measures of samples: the floor is the data's own, the distance is that of Gaussians, a class is seen."""

import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from graphwright.ir.errors import InputError, TargetError
from graphwright.models import digits
from graphwright.models.digits import frechet_distance, halves, quality

pytest.importorskip("sklearn", reason="the digits come with scikit-learn: pip install 'graphwright[train]'")


def covariance(dim, rank, seed):
    factors = torch.randn(dim, rank, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return factors @ factors.T


def vector(dim, seed):
    return torch.randn(dim, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def test_the_halves_are_all_images_once_with_equal_shares_of_classes():
    from sklearn.datasets import load_digits

    images = torch.cat([half.images for half in halves()]).flatten(1)
    pixels = torch.from_numpy(load_digits().data)
    assert sorted(((images + 1) * 8).tolist()) == sorted(pixels.tolist())
    assert (images.min(), images.max()) == (-1, 1)
    train, held_out = (half.labels.bincount(minlength=digits.NUM_CLASSES) for half in halves())
    assert (train - held_out).abs().max() <= 1


def test_an_image_keeps_its_label():
    from sklearn.datasets import load_digits

    known = {tuple(row): label for row, label in zip(load_digits().data.tolist(), load_digits().target.tolist())}
    for half in halves():
        assert [known[tuple(row)] for row in ((half.images.flatten(1) + 1) * 8).tolist()] == half.labels.tolist()


def test_the_held_out_half_is_at_distance_zero_of_itself():
    held_out = halves()[1]
    assert abs(quality(held_out.images, held_out.labels).frechet_distance) < 1e-9


def test_the_floor_is_what_the_module_says():
    train = halves()[0]
    floor = quality(train.images, train.labels)
    assert (round(floor.frechet_distance, 2), round(floor.accuracy, 2)) == (0.29, 0.99)


def test_what_is_no_digit_is_far_and_not_recognised():
    train = halves()[0]
    noise = torch.randn(train.images.shape, generator=torch.Generator().manual_seed(0)).clamp(-1, 1)
    measured = quality(noise, train.labels)
    assert measured.frechet_distance > 10 and measured.accuracy < 0.3


def test_images_of_the_wrong_class_are_not_recognised():
    train = halves()[0]
    assert quality(train.images, (train.labels + 1) % digits.NUM_CLASSES).accuracy < 0.02


@given(dim=st.integers(1, 12), rank=st.integers(1, 12), seed=st.integers(0, 999))
def test_equal_statistics_are_at_distance_zero(dim, rank, seed):
    mean, spread = vector(dim, seed), covariance(dim, rank, seed)  # singular where rank < dim
    assert abs(frechet_distance(mean, spread, mean, spread)) <= 1e-13 * (1 + spread.trace().item()) * dim


@given(dim=st.integers(1, 12), seed=st.integers(0, 999))
def test_diagonal_gaussians_have_the_closed_form(dim, seed):
    """|m_a - m_b|^2 + sum of (s_a - s_b)^2 over deviations s."""
    mean_a, mean_b = vector(dim, seed), vector(dim, seed + 1)
    deviations_a, deviations_b = vector(dim, seed + 2).abs(), vector(dim, seed + 3).relu()  # some are exactly 0
    expected = (mean_a - mean_b).square().sum() + (deviations_a - deviations_b).square().sum()
    distance = frechet_distance(mean_a, deviations_a.square().diag(), mean_b, deviations_b.square().diag())
    assert distance == pytest.approx(expected.item(), rel=1e-10, abs=1e-10)


@given(dim=st.integers(1, 8), seed=st.integers(0, 999))
def test_the_distance_is_symmetric_and_does_not_see_a_rotation(dim, seed):
    a, b = (vector(dim, seed), covariance(dim, dim, seed)), (vector(dim, seed + 1), covariance(dim, dim, seed + 1))
    turn = torch.linalg.qr(covariance(dim, dim, seed + 2))[0]
    turned = [(turn @ mean, turn @ spread @ turn.T) for mean, spread in (a, b)]
    distance = pytest.approx(frechet_distance(*a, *b), rel=1e-9, abs=1e-9)
    assert frechet_distance(*b, *a) == distance
    assert frechet_distance(*turned[0], *turned[1]) == distance


@pytest.mark.parametrize(
    ("images", "labels", "says"),
    [
        (torch.zeros(3, 64), torch.zeros(3), r"\[N, 1, 8, 8\] images, at least two, .* not \[3, 64\]"),
        (torch.zeros(3, 1, 8, 8), torch.zeros(2), r"\[2\]"),
        (torch.zeros(1, 1, 8, 8), torch.zeros(1), "at least two"),
        (torch.full((2, 1, 8, 8), torch.nan), torch.zeros(2), "NaN or infinite"),
    ],
)
def test_samples_that_cannot_be_measured_are_refused(images, labels, says):
    with pytest.raises(InputError, match=says):
        quality(images, labels)


def test_without_scikit_learn_the_error_says_how_to_get_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(TargetError, match=r"pip install 'graphwright\[train\]'"):
        halves.__wrapped__()
