"""Decoders that users bring generate, in float64, what the whole forward does token by token."""

import functools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import graphwright as gw
from graphwright.ir.errors import InputError
from graphwright.ir.float64 import to_float64
from graphwright.ir.run import run
from graphwright.runtime.decoding import caches as caches_module
from graphwright.tests import decoders

FAMILIES = ["zoo", "llama", "gemma2", "gpt2", "mixtral"]


@pytest.fixture(autouse=True)
def poisoned_caches(monkeypatch):
    """What no step wrote is NaN, which reaches the logits of whoever reads it."""

    def poison(rows, capacity, each):
        return torch.full((rows, each.heads, capacity, each.width), torch.nan, dtype=each.dtype)

    monkeypatch.setattr(caches_module, "unwritten", poison)


@functools.cache
def program_of(family):
    return to_float64(gw.compile_decoder(decoders.FAMILIES[family](), backend="aten", cache=False).program)


@functools.cache
def decoder_of(family):
    return gw.compile(program_of(family), backend="aten", cleanups=False, cache=False)


def random_prompts(lengths, seed):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(0, decoders.VOCABULARY, (length,), generator=generator).tolist() for length in lengths]


def naive(family, prompt, new):
    """The most likely next token of `main` on all tokens so far, again and again."""
    program, tokens = program_of(family), list(prompt)
    constants = [node.meta["val"] for node in program.main.placeholders[2:]]
    for _ in range(new):
        logits = run(program, [torch.tensor([tokens]), torch.arange(len(tokens)).unsqueeze(0), *constants])[0][0]
        tokens.append(int(logits[0, -1].argmax()))
    return tokens[len(prompt) :]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_generates_what_its_whole_forward_does(family):
    prompts = random_prompts([5, 1, 8], seed=0)
    expected = [naive(family, prompt, 7) for prompt in prompts]
    decoder = decoder_of(family)
    assert decoder.generate(prompts, 7).tokens == expected
    assert decoder.generate(prompts, 7, chunk=3, batch=2).tokens == expected


@given(st.lists(st.integers(1, 9), min_size=1, max_size=4), st.integers(1, 6), st.none() | st.integers(1, 4), st.none() | st.integers(1, 3))
@settings(max_examples=15)
def test_drawn_tokens_of_a_row_are_the_same_in_any_company_and_chunks(lengths, new, chunk, batch):
    prompts, decoder = random_prompts(lengths, seed=1), decoder_of("llama")
    options = {"temperature": 1.1, "top_k": 30, "top_p": 0.95, "seed": 5}
    assert decoder.generate(prompts, new, chunk=chunk, batch=batch, **options).tokens == decoder.generate(prompts, new, **options).tokens


def test_greedy_tokens_are_those_of_transformers_generate():
    model = decoders.FAMILIES["llama"]().double()
    prompt = random_prompts([6], seed=2)[0]
    theirs = model.generate(torch.tensor([prompt]), max_new_tokens=12, do_sample=False, eos_token_id=None, pad_token_id=0)
    assert decoder_of("llama").generate([prompt], 12).tokens == [theirs[0, len(prompt) :].tolist()]


def test_a_table_of_positions_is_not_read_past_its_end():
    decoder, prompt = decoder_of("gpt2"), [1] * 60
    assert decoder.generate([prompt], 5).tokens == [naive("gpt2", prompt, 5)]
    with pytest.raises(InputError, match="prompt 0 has 60 tokens and the model 64 positions: max_new_tokens is at most 5 for it"):
        decoder.generate([prompt], 6)
