"""The low-rank factors: how far they are from the best, and that they are the same whenever they are asked for."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from graphwright.passes.low_rank import factorize
from graphwright.passes.low_rank.factorize import best_factors, residual_norm

pytestmark = pytest.mark.usefixtures("one_thread")


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def with_spectrum(n, k, singular_values, seed=0):
    """[n, k] of the given singular values."""
    r = len(singular_values)
    left, right = (torch.linalg.qr(normal(size, r, seed=seed + i)).Q for i, size in enumerate((n, k)))
    return (left * torch.tensor(singular_values, dtype=torch.float64)) @ right.T


def tail(w, rank):
    """The least |w - up down|_F, by Eckart and Young."""
    return float(torch.linalg.svdvals(w.double())[rank:].norm())


SPECTRA = {
    "flat": [1.0] * 40,
    "slow": [1 / (1 + i) ** 0.5 for i in range(40)],
    "fast": [0.5**i for i in range(40)],
    "outliers": [100.0, 30.0] + [1.0] * 38,
    "step": [1.0] * 12 + [1e-2] * 28,
    "nearly low rank": [1.0] * 12 + [1e-5] * 28,
}


@pytest.mark.parametrize("spectrum", SPECTRA)
@pytest.mark.parametrize("shape", [(60, 40), (40, 60), (40, 40), (300, 40)])
@pytest.mark.parametrize("rank", [1, 12, 39])
def test_the_exact_residual_is_the_tail_of_the_singular_values(spectrum, shape, rank):
    w = with_spectrum(*shape, SPECTRA[spectrum])
    # Factors are float32: each entry is off by up to 2^-25 of itself.
    assert residual_norm(w, *best_factors(w, rank, "exact")) == pytest.approx(tail(w, rank), rel=1e-6, abs=1e-7 * float(w.norm()))


@given(st.integers(1, 20), st.integers(1, 20), st.integers(0, 2**31), st.sampled_from([torch.float32, torch.float64]))
def test_factors_are_those_of_the_singular_value_decomposition(n, k, seed, dtype):
    w = normal(n, k, seed=seed).to(dtype)
    norms = [float(w.norm())]
    for rank in range(1, min(n, k) + 1):
        up, down = best_factors(w, rank, "exact")
        assert up.shape == (n, rank) and down.shape == (rank, k) and up.dtype == down.dtype == torch.float32
        norms.append(residual_norm(w, up, down))
        torch.testing.assert_close(down @ down.T, torch.eye(rank), atol=1e-5, rtol=0)
        torch.testing.assert_close(up.norm(dim=0).double(), torch.linalg.svdvals(w.double())[:rank], atol=1e-5, rtol=1e-5)
        assert (down.gather(1, down.abs().argmax(1, keepdim=True)) > 0).all()
    assert all(b <= a + 1e-6 for a, b in zip(norms, norms[1:], strict=False))  # falls with the rank
    assert norms[-1] <= 1e-5 * norms[0]  # nothing is left at full rank


@settings(max_examples=25)
@given(st.sampled_from(sorted(SPECTRA)), st.integers(1, 20), st.integers(0, 2**31))
def test_the_range_finder_is_within_two_percent(spectrum, rank, seed):
    w = with_spectrum(80, 120, SPECTRA[spectrum], seed=seed % 1000)
    found = residual_norm(w, *best_factors(w, rank, "randomized", seed=seed))
    assert found <= 1.02 * tail(w, rank) + 1e-6 * float(w.norm())


def test_the_range_finder_repeats_by_seed_and_leaves_the_global_generator():
    w = normal(80, 120).float()
    state = torch.random.get_rng_state()
    first, again, other = (best_factors(w, 8, "randomized", seed=seed) for seed in (3, 3, 4))
    assert torch.equal(torch.random.get_rng_state(), state)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True)) and not torch.equal(first[0], other[0])


@pytest.mark.parametrize("method", ["exact", "randomized", "auto"])
def test_a_matrix_of_zeros_or_of_low_rank_leaves_nothing(method):
    for w in (torch.zeros(30, 20), torch.zeros(20, 30), normal(30, 3) @ normal(3, 20)):
        up, down = best_factors(w, 5, method)
        assert up.isfinite().all() and down.isfinite().all()
        assert residual_norm(w, up, down) <= 1e-5 * float(w.norm())


# --- auto ------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def calls(monkeypatch):
    """Which of the two methods ran, on matrices that count as large."""
    made = []
    for name in ("_exact", "_randomized"):
        original = getattr(factorize, name)
        monkeypatch.setattr(factorize, name, lambda *args, name=name, original=original: (made.append(name), original(*args))[1])
    monkeypatch.setattr(factorize, "EXACT_UP_TO", 10)
    return made


def test_auto_is_exact_for_small_matrices(calls):
    w = normal(10, 500)
    assert all(torch.equal(a, b) for a, b in zip(best_factors(w, 4), best_factors(w, 4, "exact"), strict=True))
    assert "_randomized" not in calls


@pytest.mark.parametrize("rank", [1, 2, 4])
def test_auto_takes_the_range_finder_where_it_is_provably_near_the_best(rank, calls):
    w = with_spectrum(300, 200, [10.0, 8.0, 5.0, 4.0] + [1.0] * 190)
    factors = best_factors(w, rank)
    assert calls == ["_randomized"] and residual_norm(w, *factors) <= 1.02 * tail(w, rank)


def test_auto_takes_the_range_finder_where_next_to_nothing_is_left(calls):
    w = (normal(300, 5) @ normal(5, 200)).float()
    assert residual_norm(w, *best_factors(w, 8)) <= 1e-5 * float(w.norm()) and calls == ["_randomized"]


@pytest.mark.parametrize("poor", ["a random basis", "a direction missed"])
def test_auto_is_exact_where_the_range_finder_failed(poor, calls, monkeypatch):
    w = with_spectrum(300, 200, [10.0, 8.0, 5.0, 4.0] + [1.0] * 190)

    def failing(w, rank, generator):
        if poor == "a random basis":
            q = torch.linalg.qr(normal(300, rank)).Q
        else:
            q = torch.linalg.svd(w).U[:, 1 : rank + 1]
        left, lengths, right = torch.linalg.svd(q.T @ w, full_matrices=False)
        return (q @ left) * lengths, right

    monkeypatch.setattr(factorize, "_randomized", failing)
    factors = best_factors(w, 3)
    assert calls == ["_exact"] and residual_norm(w, *factors) == pytest.approx(tail(w, 3))


@settings(max_examples=40)
@given(st.integers(0, 2**31), st.integers(1, 12), st.floats(0, 3), st.integers(0, 5), st.integers(0, 10))
def test_what_the_check_lets_through_is_within_two_percent_of_the_best(seed, rank, decay, power_steps, oversample):
    """Also of range finders worse than ours."""
    w = with_spectrum(120, 90, [(1 + i) ** -decay for i in range(90)], seed=seed % 1000)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(factorize, "POWER_STEPS", power_steps)
        patch.setattr(factorize, "OVERSAMPLE", oversample)
        generator = torch.Generator().manual_seed(seed)
        up, down = factorize._randomized(w, rank, generator)
    if factorize._is_near_best(w, up, down, generator):
        assert float((w - up @ down).norm()) <= max(1.02 * tail(w, rank), 1e-5 * float(w.norm()))


@given(st.integers(1, 40), st.integers(1, 40), st.integers(0, 2**31))
def test_the_bound_on_the_largest_singular_value_holds(n, k, seed):
    e = normal(n, k, seed=seed) ** 3
    largest = float(torch.linalg.svdvals(e)[0])
    found = float(factorize._spectral_bound(e, torch.Generator().manual_seed(seed)))
    assert largest <= found <= 2 * largest  # 17 steps leave little of what is below the largest


def test_auto_is_within_two_percent_on_a_large_matrix():
    w = (normal(1100, 1300) + 3 * normal(1100, 8, seed=1) @ normal(8, 1300, seed=2)).float()
    assert residual_norm(w, *best_factors(w, 32)) <= 1.02 * tail(w, 32)


# --- refusals --------------------------------------------------------------------------------------------------------------


def test_rank_0_gives_empty_factors():
    up, down = best_factors(normal(4, 3), 0)
    assert up.shape == (4, 0) and down.shape == (0, 3) and up.dtype == down.dtype == torch.float32
    assert residual_norm(normal(4, 3), up, down) == pytest.approx(float(normal(4, 3).norm()))


@pytest.mark.parametrize("rank", [-1, 4])
def test_ranks_that_a_matrix_does_not_have_are_refused(rank):
    with pytest.raises(ValueError, match=f"a matrix of 4 x 3 has no best factors of rank {rank}: ranks are from 0 to 3"):
        best_factors(normal(4, 3), rank)


def test_unknown_methods_are_refused():
    with pytest.raises(ValueError, match="there is no method 'svd': it is auto, exact or randomized"):
        best_factors(normal(4, 3), 1, "svd")
