"""Tokens from logits: the largest, or drawn by numbers that depend on seed, row and step alone."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from graphwright.ir.errors import InputError
from graphwright.runtime.decoding.sampler import Purpose, Sampler, draw, first_of_largest


def logits_of(probabilities):
    return torch.tensor([probabilities], dtype=torch.float64).log()


def probabilities_of(sampler, logits):
    weights = sampler.weights(logits)
    return weights / weights.sum(-1, keepdim=True)


def test_greedy_is_the_first_of_the_largest():
    assert Sampler().choose(torch.tensor([[0.0, 2.0, 2.0], [3.0, 3.0, 1.0]]), [0, 1], [0, 0]) == [1, 0]


def test_temperature_divides_the_logits():
    logits = torch.tensor([[1.0, 2.0, -3.0]], dtype=torch.float64)
    torch.testing.assert_close(probabilities_of(Sampler(temperature=0.7), logits), (logits / 0.7).softmax(-1))


@pytest.mark.parametrize(
    "options, kept",
    [
        ({}, [0.4, 0.3, 0.2, 0.1]),
        ({"top_k": 2}, [0.4, 0.3, 0, 0]),
        ({"top_k": 9}, [0.4, 0.3, 0.2, 0.1]),
        ({"top_p": 0.6}, [0.4, 0.3, 0, 0]),
        ({"top_p": 0.75}, [0.4, 0.3, 0.2, 0]),
        ({"top_p": 1e-9}, [0.4, 0, 0, 0]),
        ({"top_p": 1.0}, [0.4, 0.3, 0.2, 0.1]),
        ({"top_k": 2, "top_p": 0.5}, [0.4, 0, 0, 0]),  # of what top-k keeps 0.4 is four sevenths
        ({"top_k": 3, "top_p": 0.7}, [0.4, 0.3, 0, 0]),
    ],
)
def test_top_k_then_top_p_keep_the_most_likely(options, kept):
    expected = torch.tensor([kept], dtype=torch.float64)
    logits = logits_of([0.4, 0.3, 0.2, 0.1])
    torch.testing.assert_close(probabilities_of(Sampler(temperature=1.0, **options), logits), expected / expected.sum())


def test_what_equals_the_last_kept_is_kept():
    logits = logits_of([0.25, 0.25, 0.2, 0.25, 0.05])
    for options in ({"top_k": 1}, {"top_p": 0.3}):
        kept = probabilities_of(Sampler(temperature=1.0, **options), logits)
        torch.testing.assert_close(kept, torch.tensor([[1, 1, 0, 1, 0]], dtype=torch.float64) / 3)


@given(st.integers(0, 2**32), st.sampled_from([1, 63, 64, 65, 700, 5000]), st.floats(0.01, 1.0), st.floats(0.1, 50.0))
def test_a_nucleus_is_the_smallest_that_has_its_share_however_many_tokens_it_takes(seed, vocabulary, share, temperature):
    logits = torch.randn(3, vocabulary, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    whole = probabilities_of(Sampler(temperature=temperature), logits)
    kept = Sampler(temperature=temperature, top_p=share).weights(logits) > 0
    for p, keeps in zip(whole, kept, strict=True):
        assert p[keeps].sum() >= share - 1e-12  # sums in two orders
        assert not keeps.all() or share > 1 - p.min() - 1e-12
        assert p[keeps].sum() - p[keeps].min() < share + 1e-12
        assert p[keeps].min() > p[~keeps].max() if not keeps.all() else True


def test_colder_is_greedier_until_it_is_greedy():
    logits = torch.randn(5, 50, generator=torch.Generator().manual_seed(0))
    for temperature in (1e-3, 1e-300, 5e-324):
        assert Sampler(temperature=temperature).choose(logits, range(5), [0] * 5) == Sampler().choose(logits, range(5), [0] * 5)


def test_drawn_tokens_have_the_distribution():
    """A chi-square of 3 degrees of freedom is below 16.3 in 999 of 1000 runs; the numbers are the same in each run."""
    p = [0.5, 0.3, 0.15, 0.05]
    count = 20000
    drawn = Sampler(temperature=1.0, seed=3).choose(logits_of(p).expand(count, -1), range(count), [0] * count)
    expected = np.array(p) * count
    assert ((np.bincount(drawn, minlength=4) - expected) ** 2 / expected).sum() < 16.3


def test_a_token_without_weight_is_never_drawn_at_either_end():
    weights = torch.tensor([[0.0, 1.0, 0.0, 2.0, 0.0]], dtype=torch.float64)
    assert draw(weights, [0.0]) == [1]
    assert draw(weights, [1 - 2.0**-52]) == [3]


def test_numbers_are_of_a_seed_a_row_a_step_and_a_purpose():
    keys = [(seed, row, step, purpose) for seed in (0, 1, 2**64 - 1) for row in range(5) for step in range(5) for purpose in Purpose]
    numbers = [Sampler(seed=seed).uniforms([row], [step], purpose)[0] for seed, row, step, purpose in keys]
    assert len(set(numbers)) == len(keys) and all(0 <= u < 1 for u in numbers)
    together = Sampler(seed=1).uniforms([0, 3], [2, 4], [Purpose.TOKEN, Purpose.ACCEPT])
    assert together == [numbers[keys.index((1, 0, 2, Purpose.TOKEN))], numbers[keys.index((1, 3, 4, Purpose.ACCEPT))]]


def test_numbers_are_spread_evenly_along_rows_and_along_steps():
    """The mean of n uniform numbers is within 4 / sqrt(12 n) of a half in all but 1 of 15000 runs, and so is neighbours' correlation."""
    n = 10000
    for numbers in (Sampler().uniforms(range(n), [0] * n), Sampler().uniforms([0] * n, range(n))):
        u = np.array(numbers)
        assert abs(u.mean() - 0.5) < 4 / math.sqrt(12 * n)
        assert abs(np.corrcoef(u[:-1], u[1:])[0, 1]) < 4 / math.sqrt(n)


@pytest.mark.parametrize("broken", [math.nan, math.inf])
def test_logits_that_are_no_numbers_are_refused(broken):
    with pytest.raises(InputError, match="logits are NaN or infinite"):
        Sampler(temperature=1.0).choose(torch.tensor([[0.0, broken]]), [0], [0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("options", [{"top_k": 1}, {"top_k": 50}, {"top_k": 7, "top_p": 0.6}, {"top_k": 700}], ids=str)
@pytest.mark.parametrize("size", [1000, 6400, 32000])
def test_top_k_draws_from_a_few_logits_what_it_draws_from_all(monkeypatch, dtype, options, size):
    sampler, rows = Sampler(temperature=0.9, seed=3, **options), list(range(5))
    for step, spread in enumerate((0.01, 1.0, 5.0)):  # narrow logits are often equal in bfloat16
        logits = (torch.randn(5, size, generator=torch.Generator().manual_seed(step)) * spread).to(dtype)
        of_all = draw(sampler.weights(logits), sampler.uniforms(rows, [step] * 5))
        assert sampler.choose(logits, rows, [step] * 5) == of_all


def test_a_few_logits_are_looked_at_where_these_have_all_that_top_k_keeps(monkeypatch):
    looked_at = []
    weights = Sampler.weights
    monkeypatch.setattr(Sampler, "weights", lambda self, logits: looked_at.append(logits.size(-1)) or weights(self, logits))
    spread = torch.arange(32000.0).flip(0).repeat(2, 1)
    for logits in (spread, spread * 0, torch.randn(2, 32001)):  # then all are equal, and in no whole blocks
        Sampler(temperature=1.0, top_k=50).choose(logits, [0, 1], [0, 0])
    assert looked_at[0] < 200 and looked_at[1:] == [32000, 32001]


@pytest.mark.parametrize("shape", [(3, 500), (2, 3, 500)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_the_first_of_the_largest_is_torchs_argmax(dtype, shape):
    logits = torch.randint(-9, 9, shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    assert first_of_largest(logits) == logits.argmax(-1).tolist()


def test_logits_that_are_nan_are_refused_where_few_are_looked_at():
    logits = torch.randn(2, 32000)
    logits[1, 777] = math.nan
    with pytest.raises(InputError, match="NaN"):
        Sampler(temperature=1.0, top_k=50).choose(logits, [0, 1], [0, 0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logits_that_are_nan_are_refused_greedily_too(dtype):
    logits = torch.tensor([[0.0, 1.0, 2.0], [3.0, math.nan, 9.0]], dtype=dtype)
    with pytest.raises(InputError, match="logits are NaN"):
        Sampler().choose(logits, [0, 1], [0, 0])
    assert Sampler().choose(torch.tensor([[0.0, -math.inf, math.inf]], dtype=dtype), [0], [0]) == [2]
