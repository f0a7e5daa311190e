"""Masked diffusion of tokens: as many are masked as asked for, and the loss is the mean over rows of the mean over what a row hides."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from graphwright.ir.errors import InputError
from graphwright.models.denoising import denoising_loss, held_out_loss, masked

MASK = 9


@given(st.integers(1, 12), st.integers(1, 4), st.data())
def test_a_row_loses_just_so_many_tokens_and_keeps_the_others(length, rows, data):
    counts = torch.tensor(data.draw(st.lists(st.integers(0, length), min_size=rows, max_size=rows)))
    ids = torch.randint(0, MASK, (rows, length), generator=torch.Generator().manual_seed(0))
    noisy = masked(ids, counts, MASK, torch.Generator().manual_seed(data.draw(st.integers(0, 9))))
    assert torch.equal((noisy == MASK).sum(1), counts)
    assert torch.equal(noisy[noisy != MASK], ids[noisy != MASK])


def test_every_place_is_masked_as_often_as_any_other():
    ids = torch.zeros(4000, 5, dtype=torch.int64)
    share = (masked(ids, torch.full((4000,), 2), MASK, torch.Generator().manual_seed(0)) == MASK).double().mean(0)
    assert (share - 0.4).abs().max() < 0.04  # five deviations of 4000 draws


def test_the_loss_is_the_mean_over_rows_of_the_mean_over_masked_places():
    ids = torch.tensor([[1, 2, 3], [4, 5, 6]])
    noisy = torch.tensor([[MASK, 2, MASK], [4, MASK, 6]])
    logits = torch.randn(2, 3, 10, generator=torch.Generator().manual_seed(0))
    nats = -logits.log_softmax(-1)
    expected = ((nats[0, 0, 1] + nats[0, 2, 3]) / 2 + nats[1, 1, 5]) / 2
    torch.testing.assert_close(denoising_loss(logits, ids, noisy, MASK), expected)


def test_what_knows_nothing_loses_the_logarithm_of_the_vocabulary():
    assert held_out_loss(lambda ids: torch.zeros(*ids.shape, 10), list(range(9)) * 5, MASK, length=8) == pytest.approx(math.log(10))


def test_each_window_is_seen_at_shares_of_masks_that_are_spread_evenly():
    seen = []

    def call(ids):
        seen.extend((ids == MASK).sum(1).tolist())
        return torch.zeros(*ids.shape, 10)

    held_out_loss(call, [1] * 32, MASK, length=8, draws=4)
    assert sorted(seen) == [1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6, 7, 7, 8, 8]


@pytest.mark.parametrize("ids", [[1] * 7, [[1] * 8]])
def test_a_text_that_fills_no_window_is_refused(ids):
    with pytest.raises(InputError, match="windows of 8 tokens want at least 8 ids in one dim"):
        held_out_loss(lambda ids: torch.zeros(*ids.shape, 10), ids, MASK, length=8)
