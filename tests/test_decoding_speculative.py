"""Drafts change how fast tokens come, never which (greedy) nor their distribution (sampled)."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from graphwright.ir.errors import InputError
from graphwright.runtime.decoding.generate import generate
from graphwright.runtime.decoding.sampler import Sampler
from graphwright.tests.decoding_models import (
    VOCABULARY,
    drafting_decoder,
    poisoned_caches,  # noqa: F401  (pytest finds it here)
    random_prompts,
)

prompt_lengths = st.lists(st.integers(1, 6), min_size=1, max_size=4)
drafts = st.sets(st.integers(0, 3), min_size=1).map(lambda layers: tuple(sorted(layers)))
EVERYTHING = (0, 1, 2, 3)


@given(drafts, st.integers(1, 5), prompt_lengths, st.integers(1, 9), st.none() | st.integers(1, 3), st.integers(0, 9), st.integers(0, 9))
@settings(max_examples=200)
def test_greedy_tokens_are_the_full_model_s_for_any_draft_end_and_company(draft, gamma, lengths, new, batch, eos, seed):
    decoder, prompts = drafting_decoder(draft, gamma, seed=seed), random_prompts(lengths, seed)
    generated = generate(decoder, prompts, new, eos=eos, batch=batch)
    assert generated.tokens == [decoder.naive(prompt, new, eos={eos}) for prompt in prompts]
    for tokens, finished in zip(generated.tokens, generated.finished, strict=True):
        assert finished == ("eos" if tokens[-1] == eos else "length")


def test_rows_accept_different_numbers_of_drafts():
    decoder, prompts = drafting_decoder((0, 1, 3), 4, seed=1), random_prompts([3, 4, 5], 1)
    generated = generate(decoder, prompts, 30)
    figures = generated.figures
    assert generated.tokens == [decoder.naive(prompt, 30) for prompt in prompts]
    assert 0 < figures.accepted < figures.drafted
    assert any(name == "draft" and len(rows) < 3 for name, rows in decoder.calls)  # one was done before the others


@given(st.integers(1, 5), prompt_lengths, st.integers(1, 12))
def test_a_draft_of_all_layers_is_always_taken(gamma, lengths, new):
    decoder, prompts = drafting_decoder(EVERYTHING, gamma), random_prompts(lengths)
    generated = generate(decoder, prompts, new)
    assert generated.figures.accepted == generated.figures.drafted
    assert generated.tokens == [decoder.naive(prompt, new) for prompt in prompts]


@given(st.integers(1, 4), prompt_lengths, st.integers(1, 9), st.integers(0, 9))
def test_drawn_by_a_draft_of_all_layers_they_are_those_drawn_without(gamma, lengths, new, seed):
    decoder, prompts = drafting_decoder(EVERYTHING, gamma), random_prompts(lengths)
    options = {"temperature": 0.9, "top_k": 8, "seed": seed}
    drafted, plain = (generate(decoder, prompts, new, speculative=choice, **options) for choice in (True, False))
    assert drafted.tokens == plain.tokens
    assert drafted.figures.accepted == drafted.figures.drafted


@given(drafts, st.integers(1, 4), prompt_lengths, st.integers(1, 9), st.integers(1, 3), st.integers(0, 9))
def test_what_a_row_draws_depends_on_no_other_row(draft, gamma, lengths, new, batch, seed):
    decoder, prompts = drafting_decoder(draft, gamma), random_prompts(lengths)
    together, apart = (generate(decoder, prompts, new, temperature=1.2, seed=seed, batch=b) for b in (None, batch))
    assert together.tokens == apart.tokens


@pytest.mark.parametrize("options", [{"temperature": 1.0}, {"temperature": 0.8, "top_k": 5}, {"temperature": 1.5, "top_p": 0.8}])
def test_drawn_tokens_have_the_full_model_s_distribution(options):
    """Tokens 1 and 2 of rows with one prompt, against the full model's probabilities of the pair: a chi-square of k degrees of freedom
    lies above k + 4 sqrt(2 k) in fewer than 1 of 1000 runs; the numbers are the same in each run. The draft's own tokens fail."""
    count, prompt = 4000, [1, 2, 3]
    decoder, sampler = drafting_decoder((0, 3), 2), Sampler(**options)
    rows = generate(decoder, [prompt] * count, 3, **options).tokens
    for first in range(VOCABULARY):
        pairs = [row[1:] for row in rows if row[0] == first]
        if len(pairs) < 500:
            continue
        expected = pair_probabilities(decoder, sampler, [*prompt, first]) * len(pairs)
        seen = np.zeros_like(expected)
        np.add.at(seen, tuple(np.array(pairs).T), 1)
        assert chi_square_excess(seen, expected) < 4
        wrong = pair_probabilities(decoder, sampler, [*prompt, first], layers=(0, 3)) * len(pairs)
        assert chi_square_excess(seen, wrong) > 4


def pair_probabilities(decoder, sampler, tokens, layers=EVERYTHING):
    """p(a) p(b | a), [V, V]."""

    def next_of(more):
        weights = sampler.weights(decoder.reference([*tokens, *more], [layers] * (len(tokens) + len(more)))[-1])
        return (weights / weights.sum()).numpy()

    return next_of([])[:, None] * np.stack([next_of([token]) for token in range(VOCABULARY)])


def chi_square_excess(seen, expected):
    """How many standard deviations chi-square lies above its mean, cells that expect fewer than 5 put together."""
    rare = expected < 5
    seen, expected = (np.append(each[~rare], each[rare].sum()) for each in (seen, expected))
    seen, expected = seen[expected > 0], expected[expected > 0]
    freedom = len(seen) - 1
    return (((seen - expected) ** 2 / expected).sum() - freedom) / np.sqrt(2 * freedom)


def test_a_stream_commits_bursts_in_order_and_cuts_them_at_an_end_token():
    decoder, prompts = drafting_decoder(EVERYTHING, 5), random_prompts([4])
    expected = decoder.naive(prompts[0], 12)
    eos = expected[3]
    tokens = list(generate(decoder, prompts, 12, eos=eos, stream=True))
    assert [token.token for token in tokens] == expected[: expected.index(eos) + 1]
    assert [token.step for token in tokens] == list(range(len(tokens)))
    assert [token.finished for token in tokens] == [*[""] * (len(tokens) - 1), "eos"]


def test_no_drafts_are_plain_decoding():
    prompts = random_prompts([3, 5])
    without, off = drafting_decoder((0,), 0), drafting_decoder((0,), 3)
    generated = generate(without, prompts, 6), generate(off, prompts, 6, speculative=False)
    assert {name for decoder in (without, off) for name, _ in decoder.calls} == {"prefill", "decode"}
    assert generated[0].tokens == generated[1].tokens == [without.naive(prompt, 6) for prompt in prompts]


def test_a_row_drafts_no_more_than_it_can_use():
    decoder = drafting_decoder(EVERYTHING, 4)
    generated = generate(decoder, random_prompts([2]), 4)
    assert [name for name, _ in decoder.calls] == ["prefill", "draft", "draft", "verify"]
    assert generated.figures.drafted == generated.figures.accepted == 2


def test_the_capacity_that_a_user_states_is_of_tokens_and_drafts_have_their_own():
    decoder, prompts = drafting_decoder((0,), 5), random_prompts([3, 3], 2)
    assert generate(decoder, prompts, 4, capacity=6).tokens == [decoder.naive(prompt, 4) for prompt in prompts]


def test_drafts_need_positions_behind_a_row_s_last_token():
    decoder, prompts = drafting_decoder((0,), 3), [[1, 2], [3]]
    decoder.max_positions = 9
    assert generate(decoder, prompts, 5).tokens == [decoder.naive(prompt, 5) for prompt in prompts]
    with pytest.raises(
        InputError, match=r"9 positions, 3 of which drafts need \(speculative=False needs none\): max_new_tokens is at most 5"
    ):
        generate(decoder, prompts, 6)
    assert generate(decoder, prompts, 6, speculative=False).tokens == [decoder.naive(prompt, 6) for prompt in prompts]


def test_results_say_how_many_drafts_were_taken_and_what_they_cost():
    generated = generate(drafting_decoder((0, 1, 3), 2), random_prompts([3]), 30)
    figures = generated.figures
    assert figures.acceptance == figures.accepted / figures.drafted
    assert len(figures.full_step_seconds) == len(figures.draft_step_seconds) == 3 and figures.draft_cost > 0
    assert f"speculation: {figures.accepted} of {figures.drafted} drafts taken" in str(generated)
    assert "of a full one" in str(generated)


def test_drafts_that_cost_more_than_they_save_are_called_that():
    generated = generate(drafting_decoder((0,), 2), random_prompts([3]), 30)
    generated.figures.draft_step_seconds[:] = [1.0]
    generated.figures.full_step_seconds[:] = [1.0]
    assert "gains nothing: generate with speculative=False" in str(generated)


def test_a_program_that_lacks_a_function_of_its_schedule_is_refused():
    decoder = drafting_decoder((0,), 2)
    del decoder.functions["verify"]
    with pytest.raises(InputError, match="no function verify: make it with compile_decoder"):
        generate(decoder, [[1]], 3)
