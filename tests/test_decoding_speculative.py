"""Drafts change how fast tokens come, never which (greedy) nor their distribution (sampled)."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from graphwright.ir.errors import InputError
from graphwright.runtime.decoding.dispatch import Dispatch
from graphwright.runtime.decoding.gain import Gain
from graphwright.runtime.decoding.generate import generate
from graphwright.runtime.decoding.sampler import Sampler
from graphwright.tests.decoding_models import (
    VOCABULARY,
    SmallStep,
    drafting_decoder,
    poisoned_caches,  # noqa: F401  (pytest finds it here)
    random_prompts,
)

prompt_lengths = st.lists(st.integers(1, 6), min_size=1, max_size=4)
drafts = st.sets(st.integers(0, 3), min_size=1).map(lambda layers: tuple(sorted(layers)))
EVERYTHING = (0, 1, 2, 3)


@given(
    drafts, st.none() | st.integers(1, 5), prompt_lengths, st.integers(1, 9), st.none() | st.integers(1, 3), st.integers(0, 9),
    st.integers(0, 9), st.sampled_from([True, None]),
)  # fmt: skip
@settings(max_examples=200)
def test_greedy_tokens_are_the_full_model_s_for_any_draft_end_and_company(draft, gamma, lengths, new, batch, eos, seed, speculative):
    decoder, prompts = drafting_decoder(draft, gamma, seed=seed), random_prompts(lengths, seed)
    generated = generate(decoder, prompts, new, eos=eos, batch=batch, speculative=speculative)
    assert generated.tokens == [decoder.naive(prompt, new, eos={eos}) for prompt in prompts]
    for tokens, finished in zip(generated.tokens, generated.finished, strict=True):
        assert finished == ("eos" if tokens[-1] == eos else "length")


def test_rows_accept_different_numbers_of_drafts():
    decoder, prompts = drafting_decoder((0, 1, 3), 4, seed=1), random_prompts([3, 4, 5], 1)
    generated = generate(decoder, prompts, 30, speculative=True)
    figures = generated.figures
    assert generated.tokens == [decoder.naive(prompt, 30) for prompt in prompts]
    assert 0 < figures.accepted < figures.drafted
    assert any(name == "draft" and len(rows) < 3 for name, rows in decoder.calls)  # one was done before the others


@given(st.integers(1, 5), prompt_lengths, st.integers(1, 12))
def test_a_draft_of_all_layers_is_always_taken(gamma, lengths, new):
    decoder, prompts = drafting_decoder(EVERYTHING, gamma), random_prompts(lengths)
    generated = generate(decoder, prompts, new, speculative=True)
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
    tokens = list(generate(decoder, prompts, 12, eos=eos, stream=True, speculative=True))
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
    generated = generate(decoder, random_prompts([2]), 4, speculative=True)
    assert [name for name, _ in decoder.calls] == ["prefill", "draft", "draft", "verify"]
    assert generated.figures.drafted == generated.figures.accepted == 2


def test_the_capacity_that_a_user_states_is_of_tokens_and_drafts_have_their_own():
    decoder, prompts = drafting_decoder((0,), 5), random_prompts([3, 3], 2)
    assert generate(decoder, prompts, 4, capacity=6, speculative=True).tokens == [decoder.naive(prompt, 4) for prompt in prompts]


def test_drafts_need_positions_behind_a_row_s_last_token():
    decoder, prompts = drafting_decoder((0,), 3), [[1, 2], [3]]
    decoder.max_positions = 9
    assert generate(decoder, prompts, 5).tokens == [decoder.naive(prompt, 5) for prompt in prompts]
    with pytest.raises(
        InputError, match=r"9 positions, 3 of which drafts need \(speculative=False needs none\): max_new_tokens is at most 5"
    ):
        generate(decoder, prompts, 6)
    assert generate(decoder, prompts, 6, speculative=False).tokens == [decoder.naive(prompt, 6) for prompt in prompts]


def test_a_draft_of_nan_is_refused_and_a_judge_that_gives_nan_is_an_error(monkeypatch):
    call, broken = SmallStep.__call__, ["draft"]

    def breaking(step, *operands):
        return tuple(output * np.nan if step.name in broken else output for output in call(step, *operands))

    monkeypatch.setattr(SmallStep, "__call__", breaking)
    decoder, prompts = drafting_decoder((0, 3), 2), random_prompts([3, 4])
    assert generate(decoder, prompts, 6, speculative=True).tokens == [decoder.naive(prompt, 6) for prompt in prompts]
    broken.append("verify")
    with pytest.raises(InputError, match="logits are NaN"):
        generate(decoder, prompts, 6, speculative=True)


def test_results_say_how_many_drafts_were_taken_and_what_they_cost():
    generated = generate(drafting_decoder((0, 1, 3), 2), random_prompts([3]), 30, speculative=True)
    figures = generated.figures
    assert figures.acceptance == figures.accepted / figures.drafted and figures.gamma == 2
    assert figures.draft_cost > 0 and figures.verify_cost > 0 and figures.speedup > 0
    assert f"speculation: {figures.accepted} of {figures.drafted} drafts taken" in str(generated)
    assert "of a full one, judging 2 drafts" in str(generated) and "x as fast as plain decoding" in str(generated)


# --- whether drafts gain ---


def measured(accepted, judged, draft_cost, *, judging=None):
    """A Gain that has seen this, a full step taking a second; `judging`: drafts -> seconds of judging them."""
    gain = Gain()
    gain.count(accepted, judged)
    for seconds, value in ((gain.full, 1.0), (gain.draft, draft_cost), *((gain.judging(g), v) for g, v in (judging or {}).items())):
        seconds.add(99.0)  # the first, which does not count
        seconds.add(value)
    return gain


@given(st.floats(0.0, 0.999), st.integers(1, 7), st.floats(0.01, 2.0))
def test_the_speedup_is_that_of_the_formula(alpha, gamma, cost):
    # (1 - alpha^(g+1)) / ((1 - alpha) (g c + 1))
    expected = (1 - alpha ** (gamma + 1)) / ((1 - alpha) * (gamma * cost + 1))
    assert measured(0, 0, cost).speedup(gamma, alpha) == pytest.approx(expected, rel=1e-9)


def test_speedups_of_the_specification():
    for cost, alpha, gamma, speedup in ((0.5, 0.8, 2, 1.22), (0.5, 0.9, 3, 1.38), (0.25, 0.8, 3, 1.69), (0.75, 0.9, 1, 1.09)):
        gain = measured(int(1000 * alpha), 1000, cost)
        assert gain.best(0) == gamma and gain.speedup(gamma, alpha) == pytest.approx(speedup, abs=0.005)


@given(st.floats(0.05, 0.95), st.floats(0.05, 1.5))
def test_some_number_of_drafts_gains_where_more_are_taken_than_a_draft_costs(alpha, cost):
    judged = 10**6
    gain = measured(round(alpha * judged), judged, cost)
    if abs(alpha - cost) > 1e-3:
        assert bool(gain.pays(range(1, 8))) == (alpha > cost)


def test_judging_that_takes_longer_than_a_step_counts():
    gain = measured(80, 100, 0.25, judging={4: 3.0})
    assert gain.verify_cost(4) == 3.0 and gain.verify_cost(2) == 2.0
    assert not gain.pays([4]) and measured(80, 100, 0.25).pays([4])


def test_few_refused_drafts_leave_it_open_and_many_do_not():
    assert Gain().pays([3]) is None
    assert measured(0, 1, 0.5).pays([3]) is None
    assert measured(0, 30, 0.5).pays([3]) is False
    assert measured(9, 10, 0.5).pays([3]) is True


def test_the_number_of_drafts_stays_while_little_is_known_or_little_is_gained():
    assert measured(5, 10, 0.25).best(3) == 3
    assert measured(90, 100, 0.1).best(3) == 7 and measured(90, 100, 0.1).best(3, most=4) == 4
    near = measured(80, 100, 0.25)
    assert near.best(4) == 4 and near.speedup(3, 0.8) > near.speedup(4, 0.8)


def test_a_judge_that_takes_less_than_a_step_is_not_thought_to_take_nothing_for_more_drafts():
    gain = measured(80, 100, 0.25, judging={2: 0.7})  # as where it begins with the draft's hidden states
    assert gain.verify_cost(7) == 0.7


def test_newer_drafts_count_more():
    gain = measured(513, 513, 0.5)
    gain.count(0, 1)
    assert (gain.accepted, gain.judged) == (256, 257)


class Clock:
    """In the place of the wall's: a call takes `seconds` of its function, by name."""

    def __init__(self, monkeypatch, **seconds):
        self.now, self._seconds = 0.0, seconds
        monkeypatch.setattr(Dispatch, "clock", lambda _: self.now)
        monkeypatch.setattr(SmallStep, "__call__", self._counted(SmallStep.__call__))

    def _counted(self, call):
        def counted(step, *operands):
            self.now += self._seconds.get(step.name, 0.0)
            return call(step, *operands)

        return counted


def test_drafts_that_gain_nothing_are_switched_off_at_a_small_loss(monkeypatch):
    clock = Clock(monkeypatch, decode=1.0, draft=0.9, verify=1.1)
    decoder, prompts, new = drafting_decoder((0,), 3), random_prompts([3, 4]), 200
    expected = [decoder.naive(prompt, 30) for prompt in prompts]
    generated = generate(decoder, prompts, new)
    assert [tokens[:30] for tokens in generated.tokens] == expected
    assert generated.figures.switched_off and generated.figures.draft_cost == pytest.approx(0.9)
    assert clock.now < 1.05 * (new - 1)
    assert "switched off for that; speculative=True drafts nevertheless" in str(generated)
    clock.now, decoder.calls = 0.0, []
    again = generate(decoder, prompts, new)
    assert again.tokens == generated.tokens and again.figures.switched_off
    assert clock.now < 1.05 * (new - 1)
    forced = generate(decoder, prompts, 30, speculative=True)
    assert forced.tokens == expected and forced.figures.bursts and not forced.figures.switched_off
    assert "speculative=False is faster" in str(forced)


def test_what_was_found_to_gain_nothing_is_not_tried_again(monkeypatch):
    clock = Clock(monkeypatch, decode=1.0, draft=0.9, verify=1.1)
    decoder, prompts = drafting_decoder((0,), 3), random_prompts([3])
    decoder.gains[1].count(0, 100)
    generate(decoder, prompts, 60)
    clock.now = 0.0
    assert generate(decoder, prompts, 60).figures.bursts == 0
    assert clock.now == 59.0


def test_drafts_that_gain_go_on_and_their_number_becomes_the_best(monkeypatch):
    clock = Clock(monkeypatch, decode=1.0, draft=0.1, verify=1.0)
    decoder, prompts = drafting_decoder(EVERYTHING, None), random_prompts([3])
    first = generate(decoder, prompts, 60)
    assert not first.figures.switched_off and first.figures.gamma == 7 and clock.now < 30
    assert decoder.calls[5:9] == [("draft", [0])] * 3 + [("verify", [0])]  # behind a prefill and 4 full steps
    decoder.calls = []
    then = generate(decoder, prompts, 60)
    assert then.tokens == first.tokens and decoder.calls[3:11] == [("draft", [0])] * 7 + [("verify", [0])]
    decoder.max_positions = 66  # room for 4 drafts behind the last token
    assert generate(decoder, prompts, 60).figures.gamma == 4
    decoder.max_positions = 62
    assert generate(decoder, prompts, 60).figures.bursts == 0


def test_a_seed_draws_the_same_whatever_was_measured_in_between(monkeypatch):
    Clock(monkeypatch, decode=1.0, draft=0.9, verify=1.1)
    decoder, prompts = drafting_decoder((0,), None), random_prompts([3])
    first = generate(decoder, prompts, 20, temperature=1.0)
    generate(decoder, prompts, 90)
    assert generate(decoder, prompts, 20, temperature=1.0).tokens == first.tokens


def test_a_call_that_draws_has_as_many_drafts_whatever_the_longest_prompt_leaves_room_for():
    decoder = drafting_decoder((0,), None)
    decoder.max_positions = 10
    assert generate(decoder, [[1]], 7, temperature=1.0).tokens == generate(decoder, [[1], [2]], 7, temperature=1.0).tokens[:1]
    with pytest.raises(InputError, match="prompt 1 has 2 tokens and the model 10 positions, 3 of which drafts need"):
        generate(decoder, [[1], [2, 3]], 7, temperature=1.0)


def test_a_program_that_lacks_a_function_of_its_schedule_is_refused():
    decoder = drafting_decoder((0,), 2)
    del decoder.functions["verify"]
    with pytest.raises(InputError, match="no function verify: make it with compile_decoder"):
        generate(decoder, [[1]], 3)
