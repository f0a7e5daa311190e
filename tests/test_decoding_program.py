"""A program's functions as steps: by name, over one weight table, with caches that stay where they are."""

import pytest
import torch

import graphwright as gw
from graphwright.codegen.cpu_packed import is_available
from graphwright.ir.errors import InputError
from graphwright.ir.program import Function, Program
from graphwright.runtime.decoding import caches as caches_module
from graphwright.runtime.decoding.steps import ProgramDecoder
from graphwright.runtime.executor import Executor
from graphwright.runtime.probe import Probe
from graphwright.tests.decoding_models import captured_decoder, random_prompts, skipping_decoder


@pytest.fixture(autouse=True)
def poisoned_caches(monkeypatch):
    """What no step wrote is NaN, which reaches the logits of whoever reads it."""

    def poison(rows, capacity, each):
        return torch.full((rows, each.heads, capacity, each.width), torch.nan, dtype=each.dtype)

    monkeypatch.setattr(caches_module, "unwritten", poison)


def small_decoder(mode="schedule", gamma=2):
    """Two layers, of which the second runs alone in level 1 and in drafts."""
    decoder = skipping_decoder([(0, 1), (1,)], [0, 1], depth=2)
    decoder.schedules["layer-skip"] |= {"functions": ["decode", "decode_1"], "mode": mode, "gamma": gamma}
    decoder.functions.pop("decode_0")
    decoder.functions |= {"decode": (0, 1), "verify": (0, 1), "draft": (1,)}
    return decoder


def compiled(decoder, backend="aten"):
    return gw.compile(captured_decoder(decoder), backend=backend, cleanups=False)


@pytest.mark.parametrize("backend", ["aten", "tuned"])
def test_a_compiled_decoder_generates_the_tokens_of_the_whole_forward(backend):
    decoder, prompts = small_decoder(), random_prompts([4, 1, 6, 2])
    decoder.schedules.clear()
    generated = compiled(decoder, backend).generate(prompts, 7, chunk=3, batch=2)
    assert generated.tokens == [decoder.naive(prompt, 7) for prompt in prompts]


def test_levels_take_the_caches_of_their_layers():
    decoder, prompts = small_decoder(), random_prompts([4, 2])
    generated = compiled(decoder).generate(prompts, 7)
    assert generated.tokens == [decoder.naive(prompt, 7, level_sets=[(0, 1), *[(1,)] * 5]) for prompt in prompts]


def test_drafts_and_their_judge_are_functions_of_the_program():
    decoder, prompts = small_decoder("speculative"), random_prompts([4, 2])
    model = compiled(decoder)
    generated = model.generate(prompts, 9)
    assert generated.tokens == [decoder.naive(prompt, 9) for prompt in prompts]
    assert generated.figures.drafted > 0
    assert model.generate(prompts, 9, speculative=False).tokens == generated.tokens


def test_a_saved_decoder_generates_the_same(tmp_path):
    model, prompts = compiled(small_decoder("speculative")), random_prompts([4, 2])
    model.save(tmp_path / "decoder.gw")
    loaded = gw.load(tmp_path / "decoder.gw", backend="aten")
    assert loaded.generate(prompts, 5, temperature=1.0).tokens == model.generate(prompts, 5, temperature=1.0).tokens


def test_functions_are_made_ready_when_they_first_run():
    model = compiled(small_decoder("speculative"))
    steps = model._present.decoder._steps
    model.generate([[1, 2]], 1, speculative=False)
    assert set(steps) == {"prefill", "decode"}
    first = steps["decode"]
    model.generate([[1, 2]], 3, speculative=False)
    assert steps["decode"] is first


@pytest.mark.skipif(not is_available(), reason="this torch has no oneDNN: install a wheel that has it")
def test_a_weight_has_one_second_layout_for_all_functions(monkeypatch):
    monkeypatch.setattr(Probe, "fastest", lambda self, kind, question, ways: list(ways)[-1])
    module, args, _ = gw.models.load("decoder", "tiny")
    main = gw.compile(module, example_inputs=args, backend="aten").program
    functions = [Function(name, main.copy().main.graph, main.main.in_tree, main.main.out_tree) for name in ("main", "again")]
    model = gw.compile(Program(functions, main.weights, main.symbols), backend="tuned")
    runner = model._present
    alone = runner.packed()
    assert alone[0] > 0
    again = runner._executor_of("again")
    assert again.packs() == runner.executor.packs()
    assert runner.packed() == alone
    count, nbytes = alone
    assert f"packed weights: {count}, copies of" in str(model.report())


def test_one_pack_serves_calls_of_different_numbers_of_rows(monkeypatch):
    monkeypatch.setattr(Probe, "fastest", lambda self, kind, question, ways: list(ways)[-1])

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
    program = captured_decoder(small_decoder())
    text = str(program).replace("%rows ", "%places ").replace("%rows,", "%places,").replace("%rows)", "%places)")
    model = gw.compile(gw.parse(text, weights=program.weights), backend="aten", cleanups=False)
    with pytest.raises(InputError, match="a step takes tokens, position, rows"):
        model.generate([[1, 2]], 3)


def test_a_function_that_keeps_more_than_caches_is_no_step():
    """Another row of a batch, or another generation, would see what it keeps."""
    program = captured_decoder(small_decoder())
    output = program.functions["decode"].graph.output_node()
    output.meta["new_states"] = (*output.meta["new_states"][:-1], "steps")
    with pytest.raises(InputError, match="function decode updates steps: a step keeps nothing but caches"):
        ProgramDecoder(program, lambda name: Executor(program, name))["decode"]


def test_functions_hold_no_copies_of_weights():
    model = compiled(small_decoder("speculative"))
    model.generate([[1, 2]], 5)
    model.generate([[1, 2]], 5, speculative=False)
    weights = {weight.tensor.untyped_storage().data_ptr() for weight in model.program.weights.values()}
    executors = model._present._executors
    held = [value for each in executors for value in each._flat._template if isinstance(value, torch.Tensor)]
    assert len(executors) == 5 and {value.untyped_storage().data_ptr() for value in held} == weights


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
