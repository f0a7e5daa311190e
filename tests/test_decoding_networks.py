"""Decoders that users bring generate, in float64, what the whole forward does token by token: plainly, by a schedule, and with drafts."""

import functools
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import graphwright as gw
from graphwright.codegen.cpu_packed import is_available
from graphwright.ir.errors import InputError
from graphwright.ir.program import Function, Program
from graphwright.ir.run import run
from graphwright.passes.kv_cache.decoder import find_decoder
from graphwright.passes.layer_skip.reference import SkipReference
from graphwright.passes.layer_skip.units import find_units
from graphwright.runtime.decoding.steps import ProgramDecoder
from graphwright.runtime.executor import Executor
from graphwright.runtime.probe import Probe
from graphwright.tests import decoders
from graphwright.tests.decoding_models import poisoned_caches  # noqa: F401  (pytest finds it here)

FAMILIES = ["zoo", "llama", "gemma2", "gpt2", "mixtral"]


@functools.cache
def program_of(family, passes=""):
    if passes:
        return gw.PassManager(gw.passes.parse_pipeline(passes)).run(program_of(family)).program
    return decoders.compiled(family, torch.float64).program


def decoder_of(family, passes="", backend="aten"):
    return gw.compile(program_of(family, passes), backend=backend, cleanups=False, cache=False)


def random_prompts(lengths, seed=0):
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


@functools.cache
def skip_reference(family):
    program = program_of(family)
    decoder = find_decoder(program, program.main)
    return SkipReference(program, decoder, find_units(program, decoder, "layer"))


def naive_skipping(family, prompt, new, sets):
    """The same where decode step i leaves out the layers that are not in sets[i]."""
    reference, tokens = skip_reference(family), list(prompt)
    for step in range(new):
        active = [range(len(reference.units))] * len(prompt) + sets[:step]
        tokens.append(int(reference.logits(torch.tensor([tokens]), active)[0, -1].argmax()))
    return tokens[len(prompt) :]


# --- families ---


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_generates_what_its_whole_forward_does(family):
    prompts = random_prompts([5, 1, 8])
    expected = [naive(family, prompt, 7) for prompt in prompts]
    decoder = decoder_of(family)
    assert decoder.generate(prompts, 7).tokens == expected
    assert decoder.generate(prompts, 7, chunk=3, batch=2).tokens == expected


@given(st.lists(st.integers(1, 9), min_size=1, max_size=4), st.integers(1, 6), st.none() | st.integers(1, 4), st.none() | st.integers(1, 3))
@settings(max_examples=15)
def test_drawn_tokens_of_a_row_are_the_same_in_any_company_and_chunks(lengths, new, chunk, batch):
    prompts, decoder = random_prompts(lengths, seed=1), decoder_of("zoo")
    options = {"temperature": 1.1, "top_k": 30, "top_p": 0.95, "seed": 5}
    assert decoder.generate(prompts, new, chunk=chunk, batch=batch, **options).tokens == decoder.generate(prompts, new, **options).tokens


def test_greedy_tokens_are_those_of_transformers_generate():
    model = decoders.FAMILIES["llama"]().double()
    prompt = random_prompts([6], seed=2)[0]
    theirs = model.generate(torch.tensor([prompt]), max_new_tokens=12, do_sample=False, eos_token_id=None, pad_token_id=0)
    assert decoder_of("llama").generate([prompt], 12).tokens == [theirs[0, len(prompt) :].tolist()]


def test_a_saved_decoder_of_transformers_generates_where_nobody_imported_transformers(tmp_path):
    decoder_of("llama").save(tmp_path / "llama.gw")
    script = "import sys, graphwright as gw; print(gw.load(sys.argv[1], backend='aten').generate([[1, 2]], 3).tokens)"
    environment = os.environ | {"PYTHONPATH": str(Path(gw.__file__).parent.parent)}
    made = subprocess.run([sys.executable, "-c", script, tmp_path / "llama.gw"], capture_output=True, text=True, env=environment)
    assert made.stdout.strip() == str(decoder_of("llama").generate([[1, 2]], 3).tokens), made.stderr


def test_a_table_of_positions_is_not_read_past_its_end():
    decoder, prompt = decoder_of("gpt2"), [1] * 60
    assert decoder.generate([prompt], 5).tokens == [naive("gpt2", prompt, 5)]
    with pytest.raises(InputError, match="prompt 0 has 60 tokens and the model 64 positions: max_new_tokens is at most 5 for it"):
        decoder.generate([prompt], 6)


class Places(torch.nn.Module):
    """A decoder with a table of 16 places and no config that says so; `read` looks it up."""

    def __init__(self, read):
        super().__init__()
        self.table, self.places, self.read = torch.nn.Embedding(8, 4), torch.nn.Embedding(16, 4), read

    def forward(self, tokens, position_ids):
        x = (self.table(tokens) + self.read(self.places, position_ids)).unsqueeze(1)
        return torch.nn.functional.scaled_dot_product_attention(x, x, x, is_causal=True).squeeze(1)


@pytest.mark.parametrize(
    ("read", "positions"),
    [
        (lambda places, at: places(at), 16),
        (lambda places, at: places(at + 2), 14),
        (lambda places, at: places.weight[at.to(torch.int32)], 16),
        (lambda places, at: places.weight[at % 16], None),
    ],
)
def test_a_table_that_no_config_speaks_of_is_not_read_past_its_end(read, positions):
    decoder = gw.compile_decoder(Places(read).eval(), backend="aten", cache=False)
    assert decoder._present.decoder.max_positions == positions
    assert len(decoder.generate([[1] * 10], (positions or 30) - 9).tokens[0]) == (positions or 30) - 9
    if positions is not None:
        with pytest.raises(InputError, match=f"the model {positions} positions: max_new_tokens is at most {positions - 9} for it"):
            decoder.generate([[1] * 10], positions - 8)


@functools.cache
def tuned(passes=""):
    return decoder_of("zoo", passes, backend="tuned")


@pytest.mark.parametrize("rows", [1, 2, 3, 5, 9])
def test_the_tuned_backend_generates_the_same(rows):
    """3 rows are padded to 4 and 5 to 8; 9 run as any number does."""
    prompts = random_prompts([3 + n % 4 for n in range(rows)], seed=rows)
    decode = tuned()._present.decoder["decode"]
    assert tuned().generate(prompts, 4, chunk=4).tokens == [naive("zoo", prompt, 4) for prompt in prompts]
    assert decode.padded(rows) == {3: 4, 5: 8}.get(rows, rows)
    assert ((decode.padded(rows), 1) in decode._executors) == (rows < 9)


def test_rows_that_end_one_by_one_leave_the_others_as_they_were():
    """Padding writes to the spare row alone, whichever rows of the caches are in use."""
    prompts = random_prompts([2, 5, 3, 4, 6], seed=7)
    alone = [naive("zoo", prompt, 6) for prompt in prompts]
    eos = [alone[0][2], alone[1][1]]
    together = tuned().generate(prompts, 6, batch=3, eos=eos).tokens
    for got, whole in zip(together, alone, strict=True):
        end = next((n + 1 for n, token in enumerate(whole) if token in eos), len(whole))
        assert got == whole[:end]


def test_bursts_of_few_rows_are_made_ready_for_their_length():
    drafts = tuned("layer-skip{mode=speculative,draft=[0],gamma=1,reuse_prefix=true}")
    prompts = random_prompts([4], seed=5) * 3  # which take equal steps: each other number of rows would be made ready too
    assert drafts.generate(prompts, 7, speculative=True).tokens == [naive("zoo", prompts[0], 7)] * 3
    assert (4, 2) in drafts._present.decoder["resume"]._executors


# --- schedules and drafts ---

SCHEDULE = "layer-skip{levels=[[0,1,2],[0,2],[2]],level_of_step=[0,1,1,2]%s}"
DRAFTS = "layer-skip{mode=speculative,draft=[0,2],gamma=3}"


def test_a_scheduled_decoder_generates_what_its_schedule_means():
    prompts = random_prompts([4, 2])
    sets = [[0, 1, 2], [0, 2], [0, 2], [2], [2], [2]]
    generated = decoder_of("llama", SCHEDULE % "").generate(prompts, 7)
    assert generated.tokens == [naive_skipping("llama", prompt, 7, sets) for prompt in prompts]
    assert generated.levels == [[0, 1, 1, 2, 2, 2]] * 2


def test_rows_of_several_levels_merge_where_the_schedule_lets_them():
    passes, prompts = SCHEDULE % ",merge=down", random_prompts([1, 3])
    generated = decoder_of("llama", passes).generate(prompts, 5, chunk=1)
    assert generated.levels[1] != [0, 1, 1, 2] and generated.figures.merged_steps > 0
    levels = program_of("llama", passes).schedules["layer-skip"]["levels"]
    for prompt, tokens, ran in zip(prompts, generated.tokens, generated.levels, strict=True):
        assert tokens == naive_skipping("llama", prompt, 5, [levels[level] for level in ran])


@functools.cache
def drafting(passes=DRAFTS):
    return decoder_of("llama", passes)


@given(st.lists(st.integers(1, 9), min_size=1, max_size=4), st.integers(1, 12), st.integers(0, 99), st.none() | st.integers(1, 3))
@settings(max_examples=20)
def test_drafts_leave_greedy_tokens_as_they_were(lengths, new, seed, batch):
    """At all events, as measurements decide, and where the judge begins with the draft's hidden states."""
    prompts, reusing = random_prompts(lengths, seed), drafting(DRAFTS.replace("}", ",reuse_prefix=true}"))
    expected = drafting().generate(prompts, new, speculative=False)
    eos = expected.tokens[0][-1]
    expected = drafting().generate(prompts, new, speculative=False, eos=eos, batch=batch).tokens
    for decoder, speculative in ((drafting(), True), (drafting(), None), (reusing, True)):
        assert decoder.generate(prompts, new, speculative=speculative, eos=eos, batch=batch).tokens == expected


def test_a_judge_that_begins_with_the_draft_s_hidden_states_runs_no_layer_below_again():
    reusing = drafting(DRAFTS.replace("}", ",reuse_prefix=true}"))
    reusing.generate(random_prompts([3]), 6, speculative=True)
    steps = reusing._present.decoder._steps
    assert "verify" not in steps and steps["lift"].layers == (0,) and steps["resume"].layers == (1, 2)


def test_a_schedule_of_all_layers_is_no_schedule_bit_for_bit():
    prompts, options = random_prompts([4, 2]), {"temperature": 1.3}
    scheduled = decoder_of("llama", "layer-skip{n_min=3}").generate(prompts, 9, **options)
    assert scheduled.tokens == decoder_of("llama").generate(prompts, 9, **options).tokens


def test_a_saved_decoder_generates_the_same(tmp_path):
    model, prompts = decoder_of("llama", DRAFTS), random_prompts([4, 2])
    model.save(tmp_path / "decoder.gw")
    loaded = gw.load(tmp_path / "decoder.gw", backend="aten")
    assert loaded.generate(prompts, 5, temperature=1.0).tokens == model.generate(prompts, 5, temperature=1.0).tokens


# --- functions ---


def test_functions_are_made_ready_when_they_first_run():
    model = decoder_of("llama", DRAFTS)
    steps = model._present.decoder._steps
    model.generate([[1, 2]], 1, speculative=False)
    assert set(steps) == {"prefill", "decode"}
    first = steps["decode"]
    model.generate([[1, 2]], 3, speculative=False)
    assert steps["decode"] is first


def test_functions_hold_no_copies_of_weights():
    model = decoder_of("llama", DRAFTS)
    model.generate([[1, 2]], 5, speculative=True)
    model.generate([[1, 2]], 5, speculative=False)
    weights = {weight.tensor.untyped_storage().data_ptr() for weight in model.program.weights.values()}
    executors = model._present._executors
    held = [value for each in executors for value in each._flat._template if isinstance(value, torch.Tensor)]
    assert len(executors) == 5 and {value.untyped_storage().data_ptr() for value in held} <= weights


@pytest.fixture
def onednn_wins(monkeypatch):
    """Every question of a product is answered with oneDNN, however fast it is here."""
    if not is_available():
        pytest.skip("this torch has no oneDNN: install a wheel that has it")
    monkeypatch.setattr(Probe, "fastest", lambda self, kind, question, ways: "onednn" if kind in ("few rows", "linear") else list(ways)[-1])


def test_a_weight_has_one_second_layout_for_all_functions(onednn_wins):
    module, args, _ = gw.models.load("decoder", "tiny")
    main = gw.compile(module, example_inputs=args, backend="aten").program
    functions = [Function(name, main.copy().main.graph, main.main.in_tree, main.main.out_tree) for name in ("main", "again")]
    model = gw.compile(Program(functions, main.weights, main.symbols), backend="tuned")
    runner = model._present
    alone = runner.packed()
    assert alone[0] > 0
    assert runner._executor_of("again", {}).packs() == runner.executor.packs()
    assert runner.packed() == alone
    assert f"packed weights: {alone[0]}, copies of" in str(model.report())


def test_one_pack_serves_calls_of_different_numbers_of_rows(onednn_wins):
    class TwoSizes(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = torch.nn.Linear(24, 24)

        def forward(self, few, many):
            return self.linear(few), self.linear(many)

    net, inputs = TwoSizes(), (torch.randn(2, 24), torch.randn(64, 24))
    model = gw.compile(net, example_inputs=inputs, backend="tuned")
    assert model.report().packs == (1, 24 * 24 * 4)
    for got, expected in zip(model(*inputs), net(*inputs), strict=True):
        torch.testing.assert_close(got, expected)


def test_a_function_with_other_operands_is_no_step():
    program = program_of("zoo").copy()
    program.functions["decode"] = program.functions["main"]
    with pytest.raises(InputError, match=r"function decode takes input_ids, position_ids: a step takes tokens, position, rows"):
        ProgramDecoder(program, lambda name, sizes: Executor(program, name), fixed=False)["decode"]


def test_a_function_that_keeps_more_than_caches_is_no_step():
    """Another row of a batch, or another generation, would see what it keeps."""
    program = program_of("zoo").copy()
    output = program.functions["decode"].graph.output_node()
    output.meta["new_states"] = (*output.meta["new_states"][:-1], "steps")
    with pytest.raises(InputError, match="function decode updates steps: a step keeps nothing but caches"):
        ProgramDecoder(program, lambda name, sizes: Executor(program, name), fixed=False)["decode"]


def test_weights_that_passes_folded_must_stay_as_they_were():
    class Folded(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.ones(3))

        def forward(self, x):
            return x * (self.weight * 2)

    net = Folded()
    model = gw.compile(net, "fold-constants", example_inputs=(torch.ones(3),), backend="aten")
    with torch.no_grad():
        net.weight.add_(1)
    with pytest.raises(InputError, match="weight weight was changed after compiling"):
        model.generate([[1]], 2)
