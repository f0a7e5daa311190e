"""`rat-recurrence`: fires on each family that it claims, is the original at its limit points, says what it costs, and refuses the rest by name;
decoders that it made generate over caches of chunks."""

import functools
import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

import graphwright as gw
from graphwright import models
from graphwright.ir.caches import cache_types
from graphwright.ir.float64 import to_float64
from graphwright.ir.pattern import named_arguments
from graphwright.ir.rewriter import Rewriter
from graphwright.ir.run import run
from graphwright.passes.check import Reference
from graphwright.passes.inputs import random_inputs
from graphwright.passes.kv_cache.stepping import empty_caches, largest_difference
from graphwright.passes.rat import measure
from graphwright.passes.rat.gates import initial
from graphwright.passes.rat.judge import with_chunks_of_one, with_window_over_all
from graphwright.tests import decoders

RAT = torch.ops.gw.rat_attention.default
SMALL = {"chunk": 4, "window": 1, "sinks": 0}
# RoPE of all channels, with norms (of heads, of all channels), learned positions twice, RoPE of some channels (fused products), experts
CLAIMED = ["zoo", "llama", "qwen3", "gemma", "olmo2", "mixtral", "gpt2", "opt", "phi", "gpt_neox"]


def tokens_of(rows: int, length: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, decoders.VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(seed))


@functools.cache
def captured(family: str) -> gw.Program:
    return gw.PassManager(gw.CLEANUPS).run(decoders.captured(family)).program


@functools.cache
def fixed() -> gw.Program:
    """The zoo's decoder at fixed sizes, which takes a tenth of the time to rewrite."""
    tokens = tokens_of(2, 12)
    kwargs = {"input_ids": tokens, "position_ids": torch.arange(12).repeat(2, 1)}
    return gw.PassManager(gw.CLEANUPS).run(gw.capture(models.load("decoder", "tiny")[0], (), kwargs)).program


def rewritten(program: gw.Program, **options: Any) -> gw.Program:
    return gw.PassManager([gw.RatRecurrence(**(SMALL | options))]).run(program).program


def report(program: gw.Program, **options: Any) -> Any:
    return gw.PassManager([gw.RatRecurrence(**(SMALL | options))]).run(program).reports[-1]


def recurrences(program: gw.Program) -> list[dict[str, Any]]:
    return [named_arguments(node) for node in program.main.calls if node.target is RAT]


def logits(program: gw.Program, tokens: torch.Tensor) -> torch.Tensor:
    places = torch.arange(tokens.shape[1]).repeat(tokens.shape[0], 1)
    given = {"input_ids": tokens, "position_ids": places}
    return run(program, [given.get(str(node.target), node.meta["val"]) for node in program.main.placeholders])[0][0]


def off(got: torch.Tensor, expected: torch.Tensor) -> float:
    return largest_difference(got, expected, float(expected.abs().max()))


# --- every family, and the limit points ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", CLAIMED)
def test_each_attention_of_every_family_becomes_a_recurrence_that_is_the_original_at_its_limits(family: str) -> None:
    before, after = captured(family), rewritten(captured(family))
    softmaxes = [node for node in before.main.calls if str(node.target).startswith(("aten.scaled_dot_product_attention", "aten.softmax"))]
    attentions = [node for node in softmaxes if node.meta["val"].dim() == 4]  # those of experts have two
    assert len(recurrences(after)) == len(attentions) >= 2
    assert str(gw.parse(str(after))) == str(after)
    wide, tokens = to_float64(before), tokens_of(2, 9)
    expected = logits(wide, tokens)
    assert off(logits(to_float64(with_chunks_of_one(after)), tokens), expected) <= 1e-10
    assert off(logits(to_float64(with_window_over_all(after, 9)), tokens), expected) <= 1e-10
    assert off(logits(to_float64(after), tokens), expected) > 1e-3, "this window is no limit point"
    for before_far in (1, 4):  # raw keys and values: equal up to the window and a chunk, whatever the gates
        assert off(logits(to_float64(after), tokens[:, :before_far]), expected[:, :before_far]) <= 1e-10


OPTIONS = [
    {},
    {"local": "state", "sinks": 3},
    {"gate": "head", "output_gate": True},
    {"gate": "bias", "init": "chrono", "summary_bias": "log_chunk"},
    {"rope": "chunk"},
    {"layers": "even", "others": 2},
    {"layers": [1], "init": "closed"},
]


@pytest.mark.parametrize("options", OPTIONS)
def test_the_contract_holds_for_every_option(options: dict[str, Any]) -> None:
    program, chosen = fixed(), gw.RatRecurrence(**(SMALL | options))
    verdict = chosen.check(Reference(program, random_inputs(program)), rewritten(program, **options))
    assert verdict.kind == "right", str(verdict)


def test_a_rewrite_that_is_not_the_original_at_its_limits_is_wrong() -> None:
    program, after = fixed(), rewritten(fixed())
    rewriter = Rewriter(after)
    node = next(each for each in rewriter.nodes() if each.target is RAT)
    with rewriter.step("spoil"):
        rewriter.set_arguments(node, node.args, {**node.kwargs, "scale": 2 * node.kwargs["scale"]})
    assert gw.RatRecurrence(**SMALL).check(Reference(program, random_inputs(program)), after).kind == "wrong"


def test_chunks_of_one_token_with_closed_or_mean_gates_are_the_original() -> None:
    wide, tokens = to_float64(fixed()), tokens_of(2, 12)
    for init in ("closed", "mean"):
        assert off(logits(to_float64(rewritten(fixed(), chunk=1, init=init)), tokens), logits(wide, tokens)) <= 1e-10


def test_an_output_gate_changes_no_bit_before_training() -> None:
    tokens = tokens_of(2, 12)
    gated, plain = (logits(rewritten(fixed(), output_gate=flag), tokens) for flag in (True, False))
    assert torch.equal(gated, plain)


def test_one_program_serves_all_lengths() -> None:
    program, tokens = rewritten(captured("zoo")), tokens_of(1, 40)
    whole = logits(program, tokens)
    for length in (2, 5, 17):
        # sums over other lengths take another order
        assert off(logits(program, tokens[:, :length]), whole[:, :length]) <= 2e-5


def test_at_fixed_sizes_the_recurrence_may_run_on_and_its_tables_may_be_constants() -> None:
    module, args, kwargs = models.load("decoder", "tiny")
    program = gw.PassManager(gw.CLEANUPS).run(gw.capture(module, args, kwargs)).program
    for options in ({"rope": "chunk"}, {"reset": False, "local": "state"}):
        chosen = gw.RatRecurrence(**(SMALL | options))
        assert chosen.check(Reference(program, random_inputs(program)), rewritten(program, **options)).kind == "right"


@pytest.mark.parametrize("chunk", [1, 3, 8])
def test_mean_gates_without_resets_count_the_state_before_as_one_token_more(chunk: int) -> None:
    gates = initial("mean", 1, chunk, False, 0.0)
    assert gates.chunk_bias is not None
    x = torch.randn(4 * chunk, dtype=torch.float64, generator=torch.Generator().manual_seed(chunk))
    state, before = torch.zeros((), dtype=torch.float64), torch.zeros((), dtype=torch.float64)
    for place, token in enumerate(x):
        within = place % chunk
        before = state if within == 0 else before
        gate = torch.sigmoid(gates.bias[0] + gates.chunk_bias[within, 0, 0]).double()
        state = gate * state + (1 - gate) * token
        expected = (before + x[place - within : place + 1].sum()) / (within + 2)
        torch.testing.assert_close(state, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("init", ["mean", "chrono"])
def test_open_gates_carry_states_into_the_next_chunk_unless_it_starts_from_nothing(init: str) -> None:
    tokens = tokens_of(2, 12)
    with_resets, without = (logits(rewritten(fixed(), init=init, reset=reset), tokens) for reset in (True, False))
    assert off(without[:, :5], with_resets[:, :5]) <= 1e-6  # the first summary is seen from chunk + window on
    assert off(without[:, 10:], with_resets[:, 10:]) >= 1e-4


def test_attributes_and_layers_are_as_asked_for() -> None:
    (only,) = recurrences(rewritten(fixed(), layers="even", window=5, sinks=3, summary_bias="log_chunk"))
    assert (only["chunk"], only["window"], only["sinks"], only["local"], only["reset"]) == (4, 5, 4, "raw", True)
    assert only["summary_bias"] == math.log(4)
    assert recurrences(rewritten(fixed(), local="state", sinks=3))[0]["sinks"] == 3


@pytest.mark.parametrize("options", [{"layers": [1, 0, 1], "rope": "chunk"}, {"layers": [1], "others": 2}])
def test_layers_may_be_named_in_any_order_and_stand_behind_those_that_are_not(options: dict[str, Any]) -> None:
    program = rewritten(captured("zoo"), **options)
    assert len(recurrences(program)) == len(set(options["layers"]))
    tokens = tokens_of(2, 9)
    in_order = rewritten(captured("zoo"), **options | {"layers": sorted(set(options["layers"]))})
    assert torch.equal(logits(program, tokens), logits(in_order, tokens))


@functools.cache
def converted_first() -> gw.Program:
    """Of two attentions the first is a recurrence."""
    return rewritten(fixed(), layers=[0])


def test_places_count_all_attentions_of_the_model_those_that_were_converted_before_too() -> None:
    for layers in ("all", [1]):
        found = report(converted_first(), layers=layers, window=2, calibration=[tokens_of(2, 12)])
        assert found.lines[0].startswith("1 of 2 attentions: chunked recurrence") and len(found.data["layer_errors"]) == 1
    assert [arguments["window"] for arguments in recurrences(rewritten(converted_first(), layers=[1], window=2))] == [1, 2]
    assert any("it is a chunked recurrence already" in str(each) for each in report(converted_first()).left)
    at_once, in_turn = rewritten(fixed(), init="chrono"), rewritten(rewritten(fixed(), init="chrono", layers=[0]), init="chrono")
    assert {name: each.digest for name, each in at_once.weights.items()} == {name: each.digest for name, each in in_turn.weights.items()}


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ([0], "attention 0 is not taken: it is a chunked recurrence already"),
        ([2], "layers name attention 2, and there are 0 to 1"),
        ("even", "no attention is left to replace: it is a chunked recurrence already"),
    ],
)
def test_what_is_a_recurrence_already_is_not_converted_again(layers: Any, message: str) -> None:
    with pytest.raises(gw.PassError, match=message):
        rewritten(converted_first(), layers=layers)
    with pytest.raises(gw.PassError, match="each attention is a chunked recurrence already"):
        rewritten(rewritten(fixed()))


def test_the_contract_of_a_second_application_is_judged_by_what_it_converts() -> None:
    program, chosen = converted_first(), gw.RatRecurrence(**SMALL)
    after = rewritten(program)
    assert chosen.check(Reference(program, random_inputs(program)), after).kind == "right"
    rewriter = Rewriter(after)
    node = [each for each in rewriter.nodes() if each.target is RAT][1]
    with rewriter.step("spoil"):
        rewriter.set_arguments(node, node.args, {**node.kwargs, "scale": 2 * node.kwargs["scale"]})
    assert chosen.check(Reference(program, random_inputs(program)), after).kind == "wrong"


def test_attentions_of_no_known_form_are_counted_too() -> None:
    class Three(Small):
        def forward(self, ids):
            x = self.table(ids)
            for attend in (causal, CASES["no mask"][0], causal):
                self.attend = attend
                q, k, v = (product(x).unflatten(-1, (2, -1)).transpose(1, 2) for product in (self.q, self.k, self.v))
                x = self.joined(x, q, k, v, None)
            return x

    program = gw.PassManager(gw.CLEANUPS).run(gw.capture(Three().eval(), (torch.zeros(2, 12, dtype=torch.int64),), {})).program
    assert report(program).lines[0].startswith("2 of 3 attentions")
    assert len(recurrences(rewritten(program, layers="even"))) == 2
    with pytest.raises(gw.PassError, match="attention 1 is not taken: attention without a mask"):
        rewritten(program, layers=[1])


def test_errors_of_layers_are_reported_in_their_order() -> None:
    given = {"calibration": [tokens_of(2, 12)], "init": "fit"}
    orders = [report(fixed(), layers=layers, **given).data for layers in ([1, 0], [0, 1])]
    assert orders[0]["layer_errors"] == orders[1]["layer_errors"] and orders[0]["fits"] == orders[1]["fits"]


def test_rows_of_chunk_rotation_are_those_of_the_chunks_numbers() -> None:
    values = {}
    program = rewritten(fixed(), rope="chunk")
    wanted = recurrences(program)[0]["cos"]
    tokens = tokens_of(2, 12)
    places = torch.arange(12).repeat(2, 1)
    run(program, [tokens, places], observe=lambda node, value: values.setdefault(node, value))
    by_token = {}
    plain = rewritten(fixed())
    run(plain, [tokens, places], observe=lambda node, value: by_token.setdefault(node, value))
    assert torch.equal(values[wanted], by_token[recurrences(plain)[0]["cos"]][:, torch.arange(12) // 4])


# --- weights --------------------------------------------------------------------------------------------------------------------


def test_new_weights_are_marked_and_the_others_are_the_models_own() -> None:
    before, after = fixed(), rewritten(fixed(), output_gate=True)
    new = {name: weight.kind for name, weight in after.weights.items() if name not in before.weights}
    stem = "layers.0.self_attn.rat"
    assert {f"{stem}.gate.weight", f"{stem}.gate.bias", f"{stem}.chunk_bias", f"{stem}.output_gate.weight"} <= new.keys()
    assert set(new.values()) == {"added"} and len(new) == 8
    assert all(after.weights[name].tensor is weight.tensor for name, weight in before.weights.items() if name in after.weights)


@pytest.mark.parametrize(("init", "expected"), [("closed", [0, 0, 0, 0]), ("mean", [0, 1 / 2, 2 / 3, 3 / 4])])
def test_gates_start_as_named(init: str, expected: list[float]) -> None:
    program = rewritten(fixed(), init=init)
    bias = program.weights["layers.0.self_attn.rat.gate.bias"].tensor
    places = program.weights.get("layers.0.self_attn.rat.chunk_bias")
    logits = bias[0] + (torch.zeros(4) if places is None else places.tensor.flatten())
    torch.testing.assert_close(logits.sigmoid(), torch.tensor(expected, dtype=torch.float32), rtol=1e-6, atol=1e-6)


def test_chrono_gates_have_memories_of_all_lengths_of_a_chunk() -> None:
    g = rewritten(fixed(), init="chrono").weights["layers.0.self_attn.rat.gate.bias"].tensor.sigmoid()
    memory = g / (1 - g)
    assert memory.min() >= 1 and memory.max() <= 3 and memory.std() > 0.2


# --- the report -----------------------------------------------------------------------------------------------------------------


def test_the_report_measures_on_calibration_tokens() -> None:
    tokens = tokens_of(2, 12)
    found = report(fixed(), calibration=[tokens])
    after = rewritten(fixed())
    before, changed = (logits(program, tokens).double().log_softmax(-1) for program in (fixed(), after))
    kl = float((before.exp() * (before - changed)).sum(-1).mean())
    assert found.data["kl"] == pytest.approx(kl, rel=1e-6)
    perplexities = [math.exp(F.nll_loss(each[:, :-1].flatten(0, 1), tokens[:, 1:].flatten()).item()) for each in (before, changed)]
    assert found.data["perplexity"] == pytest.approx(perplexities, rel=1e-6)
    assert len(found.data["layer_errors"]) == 2 and all(0 < error < 2 for error in found.data["layer_errors"])
    assert any(line.startswith("logits: KL") for line in found.lines)
    assert any("needs training" in line for line in found.lines)


def test_a_loader_that_raises_is_said_to_be_at_fault() -> None:
    def loader() -> Any:
        yield tokens_of(2, 12)
        raise EOFError("the shard ends early")

    with pytest.raises(gw.CalibrationError, match="the calibration inputs raised EOFError at sample 1: the shard ends early"):
        report(fixed(), calibration=loader())


def test_a_window_over_the_sequence_costs_nothing() -> None:
    found = report(fixed(), window=20, calibration=[tokens_of(2, 12)])
    assert found.data["kl"] <= 1e-9 and max(found.data["layer_errors"]) <= 1e-10


@pytest.mark.parametrize("rope", ["token", "chunk"])
def test_fitted_gates_are_no_worse_than_closed_and_mean_ones(rope: str) -> None:
    found = report(fixed(), init="fit", calibration=[tokens_of(2, 12)], rope=rope)
    for error, fits in zip(found.data["layer_errors"], found.data["fits"]):
        assert error == pytest.approx(min(fits.values()), rel=1e-3)
        assert set(fits) == {"closed", "mean", "fitted"}
        assert fits["fitted"] < fits["mean"]


@pytest.mark.parametrize(("held", "runs"), [(2**30, 2), (1, 4)])
def test_a_fit_runs_the_model_once_a_batch_for_as_many_layers_as_are_held(held: int, runs: int, monkeypatch: pytest.MonkeyPatch) -> None:
    count = 0

    def counted(program: gw.Program, *args: Any, **kwargs: Any) -> Any:
        nonlocal count
        count += 1
        return run(program, *args, **kwargs)

    given = {"init": "fit", "calibration": [tokens_of(2, 12), tokens_of(2, 12, seed=1)]}
    expected = report(fixed(), **given)
    monkeypatch.setattr(measure, "run", counted)
    monkeypatch.setattr(measure, "HELD", held)
    assert report(fixed(), **given).data == expected.data
    assert count == runs + 4, "both models run on each batch for their quality"


def test_layers_that_keep_closed_gates_are_not_called_a_recurrence_either() -> None:
    # states in a window over the sequence: closed gates are the original, and no others
    found = report(fixed(), init="fit", local="state", window=20, calibration=[tokens_of(2, 12)])
    assert max(found.data["layer_errors"]) <= 1e-10
    assert "2 of 2 attentions: dilated sparse attention" in found.lines[0]


def test_figures_of_rows_that_nothing_is_summarised_for_are_said_to_be_none() -> None:
    empty, told = "these figures say nothing: rows of up to {} tokens are the original's", [tokens_of(2, 12)]
    assert any(empty.format(12) in line for line in report(fixed(), window=8, calibration=told).lines)
    assert not any("say nothing" in line for line in report(fixed(), window=7, calibration=told).lines)
    assert "needs training on rows of more than 12 tokens" in report(fixed(), window=8).lines[-1]
    with pytest.raises(gw.PassError, match=r"init=fit needs calibration rows of more than 12 tokens \(window, chunk and sinks\)"):
        rewritten(fixed(), window=8, init="fit", calibration=told)


def scaled(name: str, factor: float) -> gw.Program:
    program = fixed().copy()
    weight = program.weights[name]
    program.weights[name] = replace(weight, tensor=weight.tensor * factor, known_digest=None, _memo={})
    return program


@pytest.mark.parametrize(("factor", "perplexity"), [(1e6, math.inf), (math.nan, math.nan)])
def test_logits_that_no_perplexity_can_hold_are_measured(factor: float, perplexity: float) -> None:
    found = report(scaled("lm_head.weight", factor), calibration=[tokens_of(2, 12)])
    assert found.data["perplexity"] == pytest.approx([perplexity] * 2, nan_ok=True)


def test_no_gates_are_fitted_to_what_is_not_finite() -> None:
    with pytest.raises(gw.PassError, match="attention 1 is not finite on calibration tokens"):
        rewritten(scaled("layers.1.self_attn.v_proj.weight", math.nan), init="fit", calibration=[tokens_of(2, 12)])


def test_the_report_names_rotary_positions_where_there_are_some() -> None:
    assert report(captured("gpt2")).lines[0].endswith("no rotary positions")
    assert report(fixed(), rope="chunk").lines[0].endswith("rotary by chunk")


def test_closed_gates_over_chunks_are_not_called_a_recurrence() -> None:
    assert "dilated sparse attention" in report(fixed(), init="closed").lines[0]
    assert "recurrence" not in report(fixed(), init="closed").lines[0]
    assert "chunked recurrence with mean gates" in report(fixed()).lines[0]
    assert any("unmeasured" in line for line in report(fixed()).lines)


# --- refusals -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"chunk": 0}, "option chunk is 0, but must be a number of tokens, at least 1"),
        ({"chunk": 2.5}, "option chunk is 2.5"),
        ({"init": "fit"}, "init=fit is fitted to tokens: give calibration="),
        ({"init": "chrono", "chunk": 1}, "init=chrono spreads memories over a chunk, and chunk=1 has none"),
        ({"layers": "odd"}, "option layers is 'odd'"),
        ({"others": "drop"}, "option others is 'drop'"),
        ({"layers": iter([0])}, "but must be .* a list of layers"),
        ({"summary_bias": math.nan}, 'option summary_bias is nan, but must be a finite number, or "log_chunk"'),
    ],
)
def test_options_that_say_nothing_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(gw.PassError, match=message):
        gw.RatRecurrence(**options)


@pytest.mark.parametrize(
    ("family", "options", "message"),
    [
        ("zoo", {"layers": [2]}, "layers name attention 2, and there are 0 to 1"),
        ("zoo", {"layers": []}, "layers names none"),
        ("zoo", {"calibration": []}, "calibration has no items"),
        ("zoo", {"calibration": [torch.zeros(3)]}, r"calibration item 0 is no tensor of tokens \[B, T\]"),
        ("zoo", {"calibration": [torch.full((1, 4), 999)]}, "calibration item 0 has tokens beyond 0 to 255"),
        ("gemma2", {}, "its scores are capped"),
        ("mistral", {}, r"it sees 4 tokens alone, and a recurrence sees all before: name it in layers=\[0\], with a window of at least 3"),
        ("gptj", {}, r"its rotary positions turn pairs of neighbouring channels \(interleaved\)"),
    ],
)
def test_what_is_no_plain_causal_attention_is_refused_by_name(family: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(gw.PassError, match=message):
        rewritten(captured(family), **options)


@pytest.mark.parametrize("family", ["mistral", "gemma3"])
def test_attention_to_a_window_is_taken_where_it_is_named_and_the_window_covers_it(family: str) -> None:
    with pytest.raises(gw.PassError, match=r"it sees 4 tokens alone"):
        rewritten(captured(family))
    after, tokens = rewritten(captured(family), layers=[0, 2], window=3), tokens_of(2, 4)
    assert len(recurrences(after)) == 2
    assert off(logits(to_float64(after), tokens), logits(to_float64(captured(family)), tokens)) <= 1e-10


class Small(nn.Module):
    """One attention, as `attend(q, k, v, ids)` has it, of 2 heads on an embedding of 8 channels."""

    def __init__(self, attend: Any = None, keys: int = 8):
        super().__init__()
        self.table, self.attend = nn.Embedding(decoders.VOCABULARY, 8), attend
        self.q, self.k, self.v = nn.Linear(8, 8), nn.Linear(8, keys), nn.Linear(8, 8)

    def forward(self, ids, mask=None):
        x = self.table(ids)
        q, k, v = (product(x).unflatten(-1, (2, -1)).transpose(1, 2) for product in (self.q, self.k, self.v))
        return self.joined(x, q, k, v, mask)

    def joined(self, x, q, k, v, mask):
        return x + self.attend(q, k, v, mask).transpose(1, 2).flatten(2)


def causal(q, k, v, mask):
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


def both(q, k, v, mask):
    return causal(q, k, v, mask) + F.scaled_dot_product_attention(q * 2, k, v, is_causal=True)


def biased(q, k, v, mask):
    place = torch.arange(q.size(2))
    bias = (place - place.unsqueeze(1)).to(q.dtype).masked_fill(place > place.unsqueeze(1), -torch.inf)
    return F.scaled_dot_product_attention(q, k, v, bias)


def unmasked(q, k, v, mask):
    return F.scaled_dot_product_attention(q, k, v, torch.ones(q.size(2), q.size(2)).bool())


def mixed(q, k, v, mask):
    return causal(q, k.cumsum(2), v, mask)


def added(q, k, v, mask):
    return causal(q + q.flip(-1), k + k.flip(-1), v, mask)


CASES = {
    "a mask that an input gives": (lambda q, k, v, mask: F.scaled_dot_product_attention(q, k, v, mask[:, None]), "its mask depends on input mask: .*or say assume_causal=True"),
    "no mask": (lambda q, k, v, mask: F.scaled_dot_product_attention(q, k, v), "attention without a mask sees positions that are yet to come"),
    "a bias of positions": (biased, "positions have a bias"),
    "keys that two attentions read": (both, "another attention reads its keys or values too"),
    "tokens that meet before attention": (mixed, "something else than norms, views and rotary positions stands between a product and attention"),
    "sums of another form": (added, "rotary positions of another form than"),
    "dropout": (lambda q, k, v, mask: F.scaled_dot_product_attention(q, k, v, is_causal=True, dropout_p=0.1), "attention drops weights at random"),
}  # fmt: skip


@pytest.mark.parametrize("attend", [biased, CASES["no mask"][0], unmasked])
def test_what_the_user_says_of_a_mask_does_not_count_where_it_is_known(attend: Any) -> None:
    program = gw.capture(Small(attend).eval(), (torch.zeros(2, 6, dtype=torch.int64),), {})
    with pytest.raises(gw.PassError, match="positions have a bias|sees positions that are yet to come|its mask is not causal") as caught:
        rewritten(program, assume_causal=True)
    assert "assume_causal" not in str(caught.value)


@pytest.mark.parametrize("name", CASES)
def test_attention_of_another_kind_is_refused(name: str) -> None:
    attend, message = CASES[name]
    ids, mask = torch.zeros(2, 6, dtype=torch.int64), torch.ones(6, 6).tril().bool().repeat(2, 1, 1)
    program = gw.capture(Small(attend).eval(), (ids, mask) if "input" in name else (ids,), {})
    with pytest.raises(gw.PassError, match=message):
        rewritten(program)


def test_a_mask_of_an_input_is_taken_for_causal_where_the_user_says_so() -> None:
    ids, mask = torch.zeros(2, 6, dtype=torch.int64), torch.ones(6, 6).tril().bool().repeat(2, 1, 1)

    class Masked(Small):
        def forward(self, ids, mask):
            return F.linear(super().forward(ids, mask), self.table.weight)

    module = Masked(CASES["a mask that an input gives"][0])
    program = gw.capture(module, (ids, mask), {})
    assert recurrences(rewritten(program, assume_causal=True))
    with pytest.raises(gw.PassError, match="input mask is no mask .* its value on calibration tokens is not known"):
        rewritten(program, assume_causal=True, calibration=[ids])


class Headed(Small):
    """Gives its hidden states as `give(self, hidden)` says; as many channels as tokens, so that their width says nothing."""

    def __init__(self, give: Any):
        super().__init__(causal)
        self.table, self.head, self.give = nn.Embedding(8, 8), nn.Linear(8, 8, bias=False), give

    def forward(self, ids):
        return self.give(self, super().forward(ids))


def headed(give: Any) -> gw.Program:
    return gw.PassManager(gw.CLEANUPS).run(gw.capture(Headed(give).eval(), (torch.zeros(2, 12, dtype=torch.int64),), {})).program


def test_quality_is_measured_on_the_logits_wherever_they_stand() -> None:
    given = {"calibration": [tokens_of(2, 12) % 8]}
    torch.manual_seed(0)
    alone = report(headed(lambda self, hidden: self.head(hidden)), **given)
    torch.manual_seed(0)
    behind = report(headed(lambda self, hidden: (hidden, F.layer_norm(hidden, (8,)), self.head(hidden).float() * 1)), **given)
    assert behind.data["kl"] == pytest.approx(alone.data["kl"], rel=1e-6) and alone.data["kl"] > 0


@pytest.mark.parametrize(
    ("give", "outputs"),
    [
        (lambda self, hidden: hidden, "none of its 1 outputs is that"),
        (lambda self, hidden: F.layer_norm(hidden, (8,)), "none of its 1 outputs is that"),
        (lambda self, hidden: self.head(hidden)[..., :5], "none of its 1 outputs is that"),
        (lambda self, hidden: (self.head(hidden), self.head(hidden * 2)), "2 of its 2 outputs are that"),
    ],
)
def test_a_model_without_logits_is_not_calibrated(give: Any, outputs: str) -> None:
    program = headed(give)
    message = (
        rf"calibration needs the logits of the model, the product that gives \[B, T, 8\] .*, and {outputs}: capture the model with its head"
    )
    with pytest.raises(gw.PassError, match=message):
        rewritten(program, calibration=[tokens_of(2, 12) % 8])
    assert recurrences(rewritten(program))


@pytest.mark.parametrize("shared", [False, True])
def test_attentions_of_one_module_have_gates_of_their_own(shared: bool) -> None:
    class Twice(Small):
        def __init__(self):
            super().__init__(causal)
            self.later = nn.ModuleList() if shared else nn.ModuleList(nn.Linear(8, 8) for _ in range(3))

        def forward(self, ids):
            x = super().forward(ids)
            q, k, v = (product(x).unflatten(-1, (2, -1)).transpose(1, 2) for product in (self.later or (self.q, self.k, self.v)))
            return F.linear(self.joined(x, q, k, v, None), self.table.weight)

    program = gw.PassManager(gw.CLEANUPS).run(gw.capture(Twice().eval(), (tokens_of(2, 12),), {})).program
    gates = [arguments["chunk_bias"] for arguments in recurrences(rewritten(program, init="fit", calibration=[tokens_of(2, 12)]))]
    assert len(gates) == len(set(gates)) == 2


def test_what_gives_its_attention_weights_is_refused() -> None:
    class Telling(Small):
        def joined(self, x, q, k, v, mask):
            hidden = torch.ones(6, 6).triu(1).bool()
            weights = (q @ k.transpose(2, 3) + torch.zeros(6, 6).masked_fill(hidden, -torch.inf)).softmax(-1)
            return x + (weights @ v).transpose(1, 2).flatten(2), weights

    with pytest.raises(gw.PassError, match="its weights are read by something else"):
        rewritten(gw.capture(Telling(), (torch.zeros(2, 6, dtype=torch.int64),), {}))


def test_keys_of_another_width_than_values_are_refused() -> None:
    class Wide(Small):
        def joined(self, x, q, k, v, mask):
            return x + causal(torch.cat([q], -1)[..., :2], k, v, mask).transpose(1, 2).flatten(2)

    with pytest.raises(gw.PassError, match="keys are 2 wide and values 4"):
        rewritten(gw.capture(Wide(keys=4), (torch.zeros(2, 6, dtype=torch.int64),), {}))


def test_what_looks_up_no_tokens_is_no_decoder() -> None:
    class OfFloats(nn.Module):
        def forward(self, x):
            return F.scaled_dot_product_attention(x, x, x, is_causal=True)

    with pytest.raises(gw.PassError, match="no input of integers .* is looked up in an embedding"):
        rewritten(gw.capture(OfFloats(), (torch.ones(1, 2, 5, 4),), {}))


# --- generation ---------------------------------------------------------------------------------------------------------------


@functools.cache
def compiled(family: str, **options: Any) -> gw.CompiledModel:
    if family in ("tiny", "plus"):
        return gw.compile_decoder(models.load("rat", family)[0], backend="aten", cache=False)
    passes = [gw.RatRecurrence(**(SMALL | options)), gw.KVCache()]
    return gw.compile(decoders.captured(family), passes, backend="aten", cache=False)


@functools.cache
def wide(family: str, **options: Any) -> gw.Program:
    return to_float64(compiled(family, **options).program)


def step(program: gw.Program, function: str, held: dict[str, torch.Tensor], *inputs: torch.Tensor) -> torch.Tensor:
    outputs, new = run(program, [*inputs, *(held[each] for each in cache_types(program.functions[function]))], function=function)
    held.update({name.removeprefix("input:"): value for name, value in new.items()})
    return outputs[0]


@pytest.mark.parametrize(
    ("family", "options"),
    [("zoo", {}), ("zoo", {"rope": "chunk", "gate": "head", "output_gate": True}), ("zoo", {"layers": "even", "others": 2}),
     ("zoo", {"local": "state", "sinks": 2}), ("llama", {}), ("qwen3", {"layers": "even"}), ("gpt2", {}), ("tiny", {}), ("plus", {}),
     ("zoo", {"reset": False, "local": "state"})],
)  # fmt: skip
def test_every_split_of_a_sequence_is_the_whole_forward(family: str, options: dict[str, Any]) -> None:
    tokens = tokens_of(2, 10)
    # the exact contract's figure; float32 against itself in another order of sums
    for program, tolerance, splits in ((wide(family, **options), 1e-10, range(1, 10)), (compiled(family, **options).program, 2e-5, [4])):
        assert list(program.functions) == ["main", "prefill", "decode"]
        expected = logits(program, tokens)
        for prompt in splits:
            held, rows = empty_caches(program, 3, 11), torch.tensor([2, 0])
            got = [step(program, "prefill", held, tokens[:, : prompt + 1], 0 * rows, rows, torch.full_like(rows, prompt))]
            got += [step(program, "decode", held, tokens[:, n : n + 1], torch.full_like(rows, n), rows) for n in range(prompt, 10)]
            assert max(off(each, expected[:, place]) for place, each in enumerate(got, prompt - 1)) <= tolerance, prompt


@given(data=st.data())
@settings(max_examples=10, deadline=None)
def test_ragged_prompts_in_chunks_in_a_few_rows_generate_what_the_whole_forward_does(data: Any) -> None:
    model = compiled("zoo", layers="even", others=2)
    lengths = data.draw(st.lists(st.integers(1, 11), min_size=1, max_size=4))
    prompts = [tokens_of(1, length, seed=number)[0].tolist() for number, length in enumerate(lengths)]
    chunk, batch = data.draw(st.sampled_from([None, 1, 3, 5])), data.draw(st.sampled_from([None, 1, 2]))
    found = model.generate(prompts, 5, chunk=chunk, batch=batch)
    for prompt, tokens in zip(prompts, found.tokens):
        sequence = torch.tensor([prompt + tokens])
        # Greedy: of logits in another order of sums the most likely token may differ by rounding, which these do not.
        assert logits(model.program, sequence)[0, len(prompt) - 1 : -1].argmax(-1).tolist() == tokens


def test_cache_bytes_are_those_of_the_formula() -> None:
    program = compiled("llama", chunk=4, window=5, sinks=8).program
    types = cache_types(program.functions["decode"]).values()
    heads, width, slots = 2, 8, 8 + math.ceil(1001 / 4) + 5 + 4
    per_layer = 2 * heads * width * slots * 4 + 2 * heads * width * 4
    assert sum(each.nbytes(1, 1001) for each in types) == decoders.LAYERS * per_layer
    held = decoders.LAYERS * (2 * heads * width * (8 + 2048 // 4 + 9) * 4 + 2 * heads * width * 4)
    assert f"{held} bytes a row at 2048 positions" in str(compiled("llama", chunk=4, window=5, sinks=8).report())


def test_caches_are_told_at_no_more_positions_than_the_model_has() -> None:
    slots = math.ceil(64 / 4) + 1 + 4
    held = 2 * 2 * 4 * 8 * 4 * (slots + 1)  # layers, keys and values, heads of 8 channels, bytes
    assert f"{held} bytes a row at 64 positions" in str(compiled("opt").report())


def test_drafts_are_refused_since_they_could_not_be_taken_back() -> None:
    passes = [gw.RatRecurrence(**SMALL), gw.KVCache(), gw.LayerSkip(mode="speculative")]
    with pytest.raises(gw.PassError, match="a chunked recurrence cannot take drafted tokens back"):
        gw.compile_decoder(decoders.FAMILIES["zoo"](), passes, backend="aten", cache=False)
    assert "nothing is drafted here" in str(compiled("zoo").report())


def test_the_recurrence_comes_before_the_caches() -> None:
    with pytest.raises(gw.PassError):
        gw.PassManager("kv-cache,rat-recurrence")
    with pytest.raises(gw.PassError, match="the program has functions of one step already"):
        gw.PassManager([gw.RatRecurrence(**SMALL)]).run(compiled("zoo").program)
