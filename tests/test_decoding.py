"""Tokens are those of a loop that computes every step anew, in whatever company, order and chunks rows run."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import graphwright as gw
from graphwright.ir.errors import InputError, StateError
from graphwright.runtime.decoding.caches import Caches, CacheType
from graphwright.runtime.decoding.generate import generate
from graphwright.runtime.decoding.sampler import Sampler
from graphwright.tests.decoding_models import (
    VOCABULARY,
    plain_decoder,
    poisoned_caches,  # noqa: F401  (pytest finds it here)
    random_prompts,
    skipping_decoder,
)

lengths = st.lists(st.integers(1, 7), min_size=1, max_size=5)
maybe_small = st.none() | st.integers(1, 5)


@st.composite
def nested_tables(draw, depth=4):
    """(levels, level_of_step): strictly decreasing sets, not all of them prefixes."""
    order = draw(st.permutations(range(depth)))
    sizes = sorted(draw(st.sets(st.integers(1, depth), min_size=1)), reverse=True)
    levels = [tuple(sorted(order[:size])) for size in sizes]
    steps = draw(st.lists(st.integers(0, len(levels) - 1), min_size=1, max_size=6))
    return levels, sorted(steps)


# --- greedy ---


@given(lengths, st.integers(1, 6), maybe_small, maybe_small, st.integers(0, 5))
def test_tokens_are_those_of_the_whole_forward_for_any_prompts_chunks_and_places(prompt_lengths, new, chunk, batch, seed):
    decoder, prompts = plain_decoder(seed=seed), random_prompts(prompt_lengths, seed)
    generated = generate(decoder, prompts, new, chunk=chunk, batch=batch)
    assert generated.tokens == [decoder.naive(prompt, new) for prompt in prompts]
    assert generated.finished == ["length"] * len(prompts)


@given(
    nested_tables(), lengths, st.integers(1, 7), maybe_small, maybe_small, st.sampled_from(["full", "first"]),
    st.sampled_from(["step", "position"]), st.integers(0, 5),
)  # fmt: skip
def test_a_schedule_s_tokens_are_those_of_the_reference_that_skips_without_a_cache(
    table, prompt_lengths, new, chunk, batch, prefill, clock, seed
):
    levels, level_of_step = table
    decoder, prompts = (
        skipping_decoder(levels, level_of_step, prefill=prefill, clock=clock, seed=seed),
        random_prompts(prompt_lengths, seed),
    )
    generated = generate(decoder, prompts, new, chunk=chunk, batch=batch)
    first = None if prefill == "full" else levels[0]
    for prompt, tokens, ran in zip(prompts, generated.tokens, generated.levels, strict=True):
        begin = len(prompt) if clock == "position" else 0
        assert ran == [level_of_step[min(begin + i, len(level_of_step) - 1)] for i in range(new - 1)]
        assert tokens == decoder.naive(prompt, new, level_sets=[levels[level] for level in ran], prefill=first)


@given(nested_tables(), lengths, st.integers(1, 7), st.integers(1, 3), st.integers(0, 5))
def test_merged_rows_are_the_reference_on_the_sets_that_ran_and_say_how_many_ran_fewer_layers(table, prompt_lengths, new, batch, seed):
    levels, level_of_step = table
    decoder, prompts = skipping_decoder(levels, level_of_step, merge="down", seed=seed), random_prompts(prompt_lengths, seed)
    end = {seed}
    generated = generate(decoder, prompts, new, batch=batch, eos=end)
    fewer = 0
    for prompt, tokens, ran in zip(prompts, generated.tokens, generated.levels, strict=True):
        assert tokens == decoder.naive(prompt, new, level_sets=[levels[level] for level in ran], eos=end)
        assert ran == sorted(ran)
        fewer += sum(level > level_of_step[min(i, len(level_of_step) - 1)] for i, level in enumerate(ran))
    assert generated.figures.merged_steps == fewer


def test_rows_of_several_levels_run_apart_or_merged_as_the_schedule_says():
    levels, steps, prompts = [(0, 1, 2, 3), (0, 3)], [0, 1], random_prompts([3, 4])
    apart, merged = (skipping_decoder(levels, steps, merge=merge) for merge in ("never", "down"))
    late = {"chunk": 1}  # the longer prompt comes a step later
    assert generate(apart, prompts, 3, **late).levels == [[0, 1], [0, 1]]
    together = generate(merged, prompts, 3, **late)
    assert together.levels == [[0, 1], [1, 1]] and together.figures.merged_steps == 1
    assert ("decode_1", [0, 1]) in merged.calls and ("decode_1", [0, 1]) not in apart.calls
    assert "1 tokens had fewer layers" in str(together)
    assert ("decode_0", [0]) in apart.calls and ("decode_0", [1]) in apart.calls


def test_by_position_rows_of_different_prompts_are_on_different_levels_and_run_apart():
    levels, steps, prompts = [(0, 1, 2, 3), (0, 3)], [0, 0, 0, 0, 1], random_prompts([2, 4])
    decoder = skipping_decoder(levels, steps, clock="position")
    assert generate(decoder, prompts, 4).levels == [[0, 0, 1], [1, 1, 1]]
    assert decoder.calls[1:] == [("decode_0", [0]), ("decode_1", [1])] * 2 + [("decode_1", [0, 1])]
    merged = generate(skipping_decoder(levels, steps, clock="position", merge="down"), prompts, 4)
    assert merged.levels == [[1, 1, 1]] * 2 and merged.figures.merged_steps == 2


def test_a_merged_row_stays_on_the_smaller_set_when_the_row_that_brought_it_there_has_gone():
    decoder, prompts = skipping_decoder([(0, 1, 2, 3), (0, 3)], [0, 0, 0, 1], merge="down"), random_prompts([1, 3])
    generated = generate(decoder, prompts, 5, chunk=1)  # the second row comes two steps later
    assert generated.levels == [[0, 0, 0, 1], [0, 1, 1, 1]] and generated.figures.merged_steps == 2
    sets = [decoder.schedules["layer-skip"]["levels"][level] for level in generated.levels[1]]
    assert generated.tokens[1] == decoder.naive(prompts[1], 5, level_sets=sets)


def test_layers_hold_the_prompt_and_the_steps_that_ran_them(monkeypatch):
    """len_l = P [l in a decode level] + #{i <= M - 2: l in level i}"""
    made = []
    monkeypatch.setattr(Caches, "clear", lambda self, row: made.append(self))
    levels, level_of_step, new = [(0, 1, 3), (0, 3), (3,)], [0, 0, 1, 2], 8
    generate(skipping_decoder(levels, level_of_step, prefill="first"), random_prompts([5]), new)
    ran = [levels[level_of_step[min(i, 3)]] for i in range(new - 1)]
    held = made[0].lengths[:, 0].tolist()
    assert held == [(5 if layer in levels[0] else 0) + sum(layer in each for each in ran) for layer in range(4)]
    assert len(made[0].tensors) == 6  # layer 2, which no level has, stores nothing


def test_a_layer_that_was_skipped_does_not_run_again():
    decoder = skipping_decoder([(0, 1, 2, 3), (0, 3)], [1, 0])
    with pytest.raises(StateError, match="layer 1 has keys and values for 3 positions of cache row 0, and the step is at position 4"):
        generate(decoder, random_prompts([3]), 4)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_without_that_check_it_would_read_what_nobody_wrote(monkeypatch, temperature):
    monkeypatch.setattr(Caches, "check", lambda *_: None)
    decoder = skipping_decoder([(0, 1, 2, 3), (0, 3)], [1, 0])
    with pytest.raises(InputError, match="logits are NaN"):
        generate(decoder, random_prompts([3]), 4, temperature=temperature)


def test_a_check_of_caches_names_the_first_layer_and_row_that_lack_positions():
    caches = Caches([CacheType(layer, 1, 1, torch.float32, torch.device("cpu")) for layer in (0, 1)], rows=3, capacity=8)
    rows = np.array([2, 0])
    caches.wrote((0, 1), rows, np.array([5, 4]))
    caches.check((0, 1), rows, np.array([5, 4]))
    caches.wrote((0,), rows, np.array([6, 5]))
    with pytest.raises(StateError, match="layer 1 has keys and values for 5 positions of cache row 2, and the step is at position 6"):
        caches.check((0, 1), rows, np.array([6, 5]))
    caches.rewind(rows, np.array([5, 3]))
    caches.check((0, 1), rows, np.array([5, 3]))


# --- ends ---


@given(lengths, st.integers(1, 9), st.integers(1, 3), st.sets(st.integers(0, VOCABULARY - 1), min_size=1, max_size=3))
def test_a_row_ends_with_an_end_token_and_its_place_goes_to_the_next_prompt(prompt_lengths, new, batch, eos):
    decoder, prompts = plain_decoder(), random_prompts(prompt_lengths)
    generated = generate(decoder, prompts, new, batch=batch, eos=eos)
    assert generated.tokens == [decoder.naive(prompt, new, eos=eos) for prompt in prompts]
    for tokens, finished in zip(generated.tokens, generated.finished, strict=True):
        assert finished == ("eos" if tokens[-1] in eos else "length")
        assert not eos & set(tokens[:-1])
    assert max(row for _, rows in decoder.calls for row in rows) < batch


@pytest.mark.parametrize("convert", [torch.tensor, np.array])
def test_end_tokens_may_be_tensors_and_arrays_of_one_or_of_several(convert):
    decoder, prompts = plain_decoder(), random_prompts([3, 4])
    for eos in (2, [2], [2, 7]):
        assert generate(decoder, prompts, 9, eos=convert(eos)).tokens == generate(decoder, prompts, 9, eos=eos).tokens


def test_the_next_prompt_begins_in_the_turn_after_a_row_has_ended():
    decoder, prompts = plain_decoder(), random_prompts([3, 3, 3])
    first = decoder.naive(prompts[0], 2)
    generate(decoder, prompts, 6, batch=2, eos=first[1])
    calls = decoder.calls
    assert calls[0] == ("prefill", [0, 1])
    assert calls[1] == ("decode", [0, 1])
    assert calls[2] == ("prefill", [0])


@pytest.mark.parametrize("new, called", [(0, []), (1, ["prefill"]), (2, ["prefill", "decode"])])
def test_the_last_token_is_never_fed(new, called):
    decoder, prompts = plain_decoder(), random_prompts([3, 2])
    generated = generate(decoder, prompts, new)
    assert [name for name, _ in decoder.calls] == called
    assert generated.tokens == [decoder.naive(prompt, new) for prompt in prompts]
    assert generated.finished == ["length", "length"]


def test_no_prompts_give_no_rows():
    assert generate(plain_decoder(), [], 5).tokens == []


def test_a_chunk_goes_between_two_steps_of_rows_that_decode():
    decoder = plain_decoder()
    generate(decoder, random_prompts([1, 5]), 4, chunk=2)
    assert decoder.calls[:5] == [("prefill", [0, 1]), ("decode", [0]), ("prefill", [1]), ("decode", [0]), ("prefill", [1])]


# --- streams ---


@given(lengths, st.integers(0, 6), maybe_small, st.integers(0, VOCABULARY - 1))
def test_a_stream_has_the_same_tokens_each_row_s_in_order(prompt_lengths, new, batch, eos):
    decoder, prompts = plain_decoder(), random_prompts(prompt_lengths)
    generated = generate(decoder, prompts, new, batch=batch, eos=eos)
    rows = [[] for _ in prompts]
    for token in generate(decoder, prompts, new, batch=batch, eos=eos, stream=True):
        assert token.step == len(rows[token.row])
        rows[token.row].append(token)
    assert [[token.token for token in row] for row in rows] == generated.tokens
    for row, finished in zip(rows, generated.finished, strict=True):
        assert [token.finished for token in row] == [*[""] * (len(row) - 1), finished][: len(row)]


def test_a_stream_runs_no_further_than_it_is_read():
    decoder = plain_decoder()
    stream = generate(decoder, random_prompts([3]), 5, stream=True)
    assert decoder.calls == []
    next(stream)
    assert [name for name, _ in decoder.calls] == ["prefill"]


# --- sampling ---


@given(lengths, st.integers(1, 5), maybe_small, maybe_small, st.integers(0, 5))
def test_what_a_row_draws_depends_on_neither_company_nor_chunks(prompt_lengths, new, chunk, batch, seed):
    sampler = Sampler(temperature=0.8, top_k=6, top_p=0.9, seed=seed)
    decoder, prompts = plain_decoder(), random_prompts(prompt_lengths, seed)
    generated = generate(decoder, prompts, new, temperature=0.8, top_k=6, top_p=0.9, seed=seed, chunk=chunk, batch=batch)
    assert generated.tokens == [decoder.naive(prompt, new, sampler=sampler, row=row) for row, prompt in enumerate(prompts)]


@given(nested_tables(), lengths, maybe_small, maybe_small, st.integers(0, 5))
@settings(max_examples=30)
def test_what_a_row_draws_depends_on_no_bucket_of_levels(table, prompt_lengths, chunk, batch, seed):
    levels, level_of_step = table
    decoder, prompts = skipping_decoder(levels, level_of_step), random_prompts(prompt_lengths)
    sets = [levels[level_of_step[min(i, len(level_of_step) - 1)]] for i in range(5)]
    sampler = Sampler(temperature=1.3, seed=seed)
    generated = generate(decoder, prompts, 6, temperature=1.3, seed=seed, chunk=chunk, batch=batch)
    expected = [decoder.naive(prompt, 6, level_sets=sets, sampler=sampler, row=row) for row, prompt in enumerate(prompts)]
    assert generated.tokens == expected


def test_another_seed_and_another_row_draw_otherwise():
    decoder, prompt = plain_decoder(), random_prompts([4])[0]
    one = generate(decoder, [prompt, prompt], 20, temperature=1.5, seed=1).tokens
    other = generate(decoder, [prompt, prompt], 20, temperature=1.5, seed=2).tokens
    assert len({tuple(row) for row in one + other}) == 4


# --- results ---


def test_results_say_what_was_generated_and_at_what_speed():
    generated = generate(plain_decoder(), random_prompts([3, 5]), 4, batch=1)
    assert generated.figures.prefill_tokens == 8 and generated.figures.decode_tokens == 6 and generated.figures.steps == 6
    text = str(generated)
    assert "2 rows, 8 tokens, 0 rows ended by an end token" in text
    assert "prefill: 8 tokens in" in text and "decode: 6 tokens in" in text and "tokens/s, 6 steps" in text


# --- what is refused ---

PROMPTS = [[1, 2, 3], [4]]


@pytest.mark.parametrize(
    "prompts, message",
    [
        ("text", "prompts is a list of token sequences or a tensor"),
        (7, r"prompts is a list of token sequences or a tensor \[B, T\], not an int"),
        ([1, 2, 3], r"prompt 0 is a sequence of tokens, not an int: write \[\[1, 2, 3\]\] for a single one"),
        (list(torch.tensor([1, 2, 3])), r"prompt 0 is a sequence of tokens, not a tensor of 0 dims: write \[\[1, 2, 3\]\] for a single one"),
        ([[1], np.array(2)], "prompt 1 is a sequence of tokens, not a tensor of 0 dims"),
        (torch.tensor([1, 2, 3]), "not one of 1 dims"),
        (["text"], "prompt 0 is a sequence of tokens, not a str"),
        ([[1], []], "prompt 1 is empty"),
        ([torch.zeros(0, dtype=torch.int64)], "prompt 0 is empty"),
        ([[1.5]], "prompt 0 is a flat sequence of integers"),
        ([torch.tensor([1.0])], "prompt 0 is a flat sequence of integers"),
        ([[True]], "prompt 0 is a flat sequence of integers"),
        ([[[1], [2, 3]]], "prompt 0 is a flat sequence of integers"),
        ([[[1, 2]]], "prompt 0 is a flat sequence of integers"),
        ([[1], [2, VOCABULARY]], f"prompt 1 has the token {VOCABULARY}, and the model knows 0 to {VOCABULARY - 1}"),
        ([[-1]], "prompt 0 has the token -1"),
    ],
)  # fmt: skip
def test_prompts_that_are_none_are_refused(prompts, message):
    with pytest.raises(InputError, match=message):
        generate(plain_decoder(), prompts, 3)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"max_new_tokens": -1}, "max_new_tokens is an integer from 0 on, not -1"),
        ({"max_new_tokens": 2.0}, "max_new_tokens is an integer"),
        ({"max_new_tokens": True}, "max_new_tokens is an integer"),
        ({"temperature": -0.1}, "temperature is a number from 0"),
        ({"temperature": float("nan")}, "temperature is a number from 0"),
        ({"temperature": "hot"}, "temperature is a number from 0"),
        ({"top_k": 0}, "top_k is an integer from 1 on, not 0"),
        ({"top_p": 0.0}, "top_p is a probability above 0 and at most 1"),
        ({"top_p": 1.5}, "top_p is a probability"),
        ({"seed": -1}, "seed is an integer from 0 on"),
        ({"seed": 2**64}, "seed is below"),
        ({"eos": VOCABULARY}, "eos is a token of the vocabulary, 0 to 10, or several"),
        ({"eos": [1, "end"]}, "eos is a token of the vocabulary"),
        ({"eos": torch.tensor([[2]])}, r"eos is a token of the vocabulary, 0 to 10, or several of them, not \[2\]"),
        ({"eos": torch.tensor(2.0)}, "eos is a token of the vocabulary"),
        ({"chunk": 0}, "chunk is an integer from 1 on, not 0"),
        ({"batch": 0}, "batch is an integer from 1 on"),
        ({"capacity": 0}, "capacity is an integer from 1 on"),
        ({"capacity": 10**13}, r"caches of 3 rows x 10000000000000 positions take 10728836.06 GiB, which cpu does not have: lower capacity, "),
        ({"capacity": 2**63}, "caches of 3 rows x 9223372036854775808 positions"),
        ({"max_new_tokens": 10**13}, "lower capacity, max_new_tokens, or batch"),
        ({"stream": 1}, "stream is True or False"),
        ({"speculative": "yes"}, "speculative is True, False, or None"),
        ({"speculative": True}, "this model has no function that drafts"),
        ({"capacity": 5}, r"prompt 0 has 3 tokens and capacity=5 slots: at most max_new_tokens=3 fit; 4 new tokens need capacity=6"),
        ({"capacity": 2}, r"prompt 0 has 3 tokens and capacity=2 slots: it does not fit; 4 new tokens need capacity=6"),
    ],
)  # fmt: skip
def test_options_that_are_none_are_refused(options, message):
    with pytest.raises(InputError, match=message):
        generate(plain_decoder(), PROMPTS, **{"max_new_tokens": 4, **options})


def test_a_row_may_fill_its_capacity_to_the_last_slot():
    decoder = plain_decoder()
    assert generate(decoder, PROMPTS, 3, capacity=5, chunk=2).tokens == [decoder.naive(prompt, 3) for prompt in PROMPTS]


def test_a_model_of_few_positions_fills_them_all_and_no_more():
    decoder = plain_decoder()
    decoder.max_positions = 5
    assert generate(decoder, PROMPTS, 3).tokens == [decoder.naive(prompt, 3) for prompt in PROMPTS]
    with pytest.raises(InputError, match="prompt 0 has 3 tokens and the model 5 positions: max_new_tokens is at most 3 for it"):
        generate(decoder, PROMPTS, 4)
    with pytest.raises(InputError, match="prompt 1 has 6 tokens and the model 5 positions: it is too long"):
        generate(decoder, [[1], [1] * 6], 1)


def test_a_chunk_s_padding_stays_within_the_model_s_positions():
    decoder, long = plain_decoder(), random_prompts([60])[0]
    decoder.max_positions = 64
    decoder.network.places = torch.nn.Parameter(decoder.network.places[:64], requires_grad=False)
    prompts = [[1], long, long]  # the third joins at position 0 where the second stands at 40
    generated = generate(decoder, prompts, 1, chunk=40, batch=2, capacity=128)
    assert generated.tokens == [decoder.naive(prompt, 1) for prompt in prompts]


def test_prompts_may_be_a_tensor_tensors_arrays_or_tuples():
    decoder = plain_decoder()
    expected = generate(decoder, [[1, 2], [3, 4]], 3).tokens
    for prompts in (torch.tensor([[1, 2], [3, 4]], dtype=torch.int32), [torch.tensor([1, 2]), (3, 4)], np.array([[1, 2], [3, 4]])):
        assert generate(decoder, prompts, 3).tokens == expected


def test_a_model_without_decode_says_how_to_make_one():
    module, args, _ = gw.models.load("decoder", "tiny")
    compiled = gw.compile(module, example_inputs=args, backend="aten")
    with pytest.raises(InputError, match="no functions that decode: make it with compile_decoder"):
        compiled.generate([[1]], 2)
