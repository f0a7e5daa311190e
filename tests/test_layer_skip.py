"""`layer-skip`: schedules are nested data, each level is the model with layers removed, cached decoding is what the schedule means, and what
cannot be skipped is refused by name."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

import graphwright as gw
from graphwright.ir.run import run
from graphwright.passes.kv_cache.decoder import Decoder, find_decoder
from graphwright.passes.kv_cache.stepping import Stepping, empty_caches
from graphwright.passes.layer_skip.draft import shared_until
from graphwright.passes.layer_skip.effects import LogitLens, depth_score, effects
from graphwright.passes.layer_skip.ranking import Calibration, Profile
from graphwright.passes.layer_skip.reference import SkipReference
from graphwright.passes.layer_skip.schedule import Schedule, counts, of_counts, ranked_sets, top_sets
from graphwright.passes.layer_skip.units import find_units
from graphwright.tests import decoders

LAYERS = decoders.LAYERS


def cached(family: str = "llama", dtype: torch.dtype = torch.float32) -> gw.Program:
    return decoders.compiled(family, dtype).program


def skipped(family: str = "llama", dtype: torch.dtype = torch.float32, **options: Any) -> gw.Program:
    return gw.PassManager([gw.LayerSkip(**options)]).run(cached(family, dtype)).program


def decoder_of(program: gw.Program) -> Decoder:
    found = find_decoder(program, program.main)
    assert isinstance(found, Decoder)
    return found


def tokens_of(rows: int, length: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, decoders.VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(seed))


# --- schedules -----------------------------------------------------------------------------------------------------------------


@given(data=st.data())
@settings(max_examples=200, deadline=None)
def test_generated_schedules_are_nested_and_fall_from_n_max_to_n_min(data: Any) -> None:
    total = data.draw(st.integers(1, 12))
    n_min = data.draw(st.integers(1, total))
    n_max = data.draw(st.integers(n_min, total))
    horizon = data.draw(st.integers(2, 40))
    warmup = data.draw(st.integers(0, n_min))
    decay = data.draw(st.sampled_from(["linear", "power", "constant"]))
    ranking = data.draw(st.permutations(range(total)))
    numbers = counts(decay, n_max, n_min, horizon, 0.9)
    assert all(a >= b for a, b in zip(numbers, numbers[1:], strict=False))
    assert numbers[-1] >= n_min and numbers[0] == (n_min if decay == "constant" else n_max)
    if decay == "linear":
        assert numbers[-1] == n_min and len(numbers) == horizon
    for sets in (top_sets(total, warmup), ranked_sets(ranking)):
        schedule = of_counts(numbers, sets)
        assert [len(schedule.layers_at(step)) for step in range(len(numbers))] == numbers
        assert schedule.layers_at(10_000) == schedule.levels[-1], "the last level holds for all steps that follow"
    assert all(set(range(warmup)) <= set(level) for level in of_counts(numbers, top_sets(total, warmup)).levels)


def test_the_papers_setting_runs_half_of_the_layers_in_the_mean() -> None:
    # SkipDecode: 24 layers, 16 falling to 8, one warm-up layer.
    schedule = of_counts(counts("linear", 16, 8, 256, 1.0), top_sets(24, 1))
    assert schedule.mean_layers(256) == pytest.approx(12.0, abs=0.05)
    assert schedule.levels[0] == (0, *range(9, 24)) and schedule.levels[-1] == (0, *range(17, 24))


@pytest.mark.parametrize(
    ("levels", "steps", "message"),
    [
        ([[0, 1], [0, 2]], [0, 1], r"level \[0, 2\] follows \[0, 1\], which leaves out layer 2: the keys and values"),
        ([[0], [0, 1, 2]], [0, 1], r"leaves out layers 1, 2"),
        ([[0, 1, 2], [0]], [0, 1, 0], r"step 2 runs layers 1, 2 again, which step 1 left out"),
        ([[0, 1], [0, 1]], [0, 1], "is given twice"),
        ([[0, 1], []], [0, 1], "a level has no layers"),
        ([[0, 1], [0]], [0, 0], "level_of_step names each of the 2 levels once or more, 0 to 1, and no other"),
    ],
)
def test_tables_that_are_not_nested_are_refused(levels: Any, steps: Any, message: str) -> None:
    with pytest.raises(gw.PassError, match=message):
        skipped(levels=levels, level_of_step=steps)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n_min": 0}, "n_min is 0, but must be a number of layers, at least 1"),
        ({"n_min": 3, "n_max": 2}, "n_min=3 is above n_max=2"),
        ({"n_min": 1, "warmup": 2}, "warmup=2 layers run at every step, which n_min=1 does not hold"),
        ({"rank": "output_kl", "n_min": 1}, "rank=output_kl is measured on tokens: give calibration="),
        ({"max_kl": 0.1}, "max_kl is measured on tokens"),
        ({"compensation": "scale"}, "compensation=scale is measured on tokens"),
        ({"level_of_step": [0]}, "level_of_step needs levels"),
        ({"mode": "both"}, 'mode is .both., but must be "schedule" or "speculative"'),
        ({"clock": "day"}, 'clock is .day., but must be "step" or "position"'),
        ({"levels": []}, r"levels is \(\), but must be a list of lists of layers"),
        ({"levels": [[0]], "level_of_step": []}, r"level_of_step is \(\), but must be a list of levels, one for each step"),
        ({"rank": "best"}, 'rank is .best., but must be "top", one of output_kl'),
    ],
)
def test_options_that_do_not_fit_are_refused_at_once(options: Any, message: str) -> None:
    with pytest.raises(gw.PassError, match=message):
        gw.LayerSkip(**options)


FALL = {"decay": "power", "n_max": 2, "n_min": 1, "horizon": 4, "alpha": 0.5}
CHOICE = {"rank": [0, 1, 2], "warmup": 0, "effort": "one_shot"}
DRAFT = {"gamma": 3, "draft": [0], "reuse_prefix": True}
SCHEDULED = FALL | {"levels": [[0]], "clock": "position", "prefill": "first", "merge": "down"}


@pytest.mark.parametrize(
    ("options", "idle", "reason"),
    [
        ({"mode": "speculative"}, SCHEDULED, "a draft has the layers draft= throughout"),
        ({"mode": "speculative", "calibration": [torch.zeros(1, 4)]}, {"max_kl": 0.1}, "a draft has the layers draft="),
        ({}, DRAFT, "only mode=speculative drafts"),
        ({}, {"alpha": 0.5}, "only decay=power falls by a factor"),
        ({"levels": [[0]]}, FALL | CHOICE, "levels are a table of their own"),
        ({"mode": "speculative", "draft": [0]}, CHOICE, "draft names the layers"),
    ],
)
def test_options_that_the_others_leave_without_effect_are_refused(options: Any, idle: Any, reason: str) -> None:
    for name, value in idle.items():
        with pytest.raises(gw.PassError, match=f"{name} has no effect, since {reason}"):
            gw.LayerSkip(**options, **{name: value})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n_max": 9}, "n_max=9 do not fit 3 layers"),
        ({"n_max": 1, "warmup": 2}, "warmup=2 layers run at every step, which the 1 of the last do not hold"),
        ({"warmup": 4}, "warmup=4 layers run at every step, which the 3 of the last do not hold"),
        ({"n_min": 2}, "say over how many tokens layers fall from 3 to 2: horizon=256"),
        ({"levels": [[0, 7]]}, "levels name layer 7, and there are 0 to 2"),
        ({"rank": [0, 1], "n_min": 1, "horizon": 2}, "rank must name each of the 3 layers once"),
        ({"mode": "speculative", "draft": [5]}, r"draft=\[5\] must name some of the layers 0 to 2"),
        ({"mode": "speculative", "warmup": 2}, "warmup=2 layers are more than the 1 of a draft"),
        ({"mode": "speculative", "draft": [1, 2], "reuse_prefix": True}, r"leaves out layer 0 \(.*\), so there are no hidden states"),
        (
            {"mode": "speculative", "draft": [0, 1, 2], "reuse_prefix": True},
            "reuse_prefix has no effect, since the draft leaves out no layer",
        ),
        ({"levels": [[0, 1], [1]], "level_of_step": [5, 0]}, "level_of_step names each of the 2 levels once or more"),
        ({"calibration": []}, "calibration has no items"),
        ({"calibration": [torch.full((1, 4), 64)]}, "calibration item 0 has tokens beyond 0 to 63"),
        ({"calibration": [torch.zeros(1, 4000, dtype=torch.int64)]}, "has rows of 4000 tokens, and the model takes 2048"),
        ({"calibration": [torch.zeros(3)]}, r"calibration item 0 is no tensor of tokens \[B, T\]"),
        ({"calibration": [torch.zeros(0, 4, dtype=torch.int64)]}, r"calibration item 0 is no tensor of tokens \[B, T\] of a row or more"),
    ],
)
def test_options_that_do_not_fit_the_model_are_refused(options: Any, message: str) -> None:
    with pytest.raises(gw.PassError, match=message):
        skipped(**options)


def test_a_second_schedule_is_refused() -> None:
    with pytest.raises(gw.PassError, match="has a schedule of layers already"):
        gw.PassManager([gw.LayerSkip(), gw.LayerSkip()]).run(cached())


def test_fewer_layers_throughout_need_one_number() -> None:
    assert skipped(n_max=2).schedules["layer-skip"]["levels"] == [[0, 2]]


def test_the_pass_needs_caches() -> None:
    with pytest.raises(gw.PassError, match="explicit-caches"):
        gw.compile(nn.Linear(2, 2), [gw.LayerSkip()], example_inputs=(torch.zeros(1, 2),), backend="aten", cache=False)


# --- levels --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "gpt2", "phi"])
def test_a_level_is_the_eager_model_with_its_other_layers_removed(family: str) -> None:
    model = decoders.FAMILIES[family]()
    program = skipped(family, levels=[[0, 2]], prefill="first")
    tokens = tokens_of(2, 6)
    held = empty_caches(program, 2, 6)
    at, rows = torch.tensor([0, 0]), torch.tensor([0, 1])
    inputs = [caches for name, caches in held.items() if name in _inputs(program, "prefill")]
    (got,), _ = run(program, [tokens, at, rows, torch.tensor([6, 6]), *inputs], function="prefill")
    blocks = {"llama": "model.layers", "gpt2": "transformer.h", "phi": "model.layers"}[family]
    holder, _, name = blocks.rpartition(".")
    parent = model.get_submodule(holder)
    kept = nn.ModuleList([getattr(parent, name)[0], getattr(parent, name)[2]])
    setattr(parent, name, kept)
    model.config.num_hidden_layers = 2
    with torch.no_grad():
        expected = model(tokens, use_cache=False).logits[:, -1]
    # float32 in another order of sums
    assert float((got - expected).abs().max() / expected.abs().max()) < 2e-5


def _inputs(program: gw.Program, function: str) -> list[str]:
    return [str(node.target) for node in program.functions[function].placeholders]


def test_a_schedule_of_all_layers_adds_nothing() -> None:
    program = skipped()
    assert program.schedules["layer-skip"]["functions"] == ["decode"]
    assert program.functions.keys() == cached().functions.keys()
    for name, function in program.functions.items():
        assert [n.target for n in function.calls] == [n.target for n in cached().functions[name].calls]


def test_levels_take_the_caches_of_their_layers_and_read_one_weight_table() -> None:
    program = skipped(n_min=1, horizon=3)
    assert program.schedules["layer-skip"]["levels"] == [[0, 1, 2], [0, 2], [0]]
    assert _inputs(program, "decode_1")[3:] == ["cache_k_0", "cache_v_0", "cache_k_2", "cache_v_2"]
    assert _inputs(program, "decode_2")[3:] == ["cache_k_0", "cache_v_0"]
    assert program.weights.keys() == cached().weights.keys()
    assert str(gw.parse(str(program))) == str(program)


@given(data=st.data())
@settings(max_examples=8, deadline=None)
def test_cached_decoding_is_what_a_nested_table_means(data: Any) -> None:
    # Neither casts to float32 in between, as Gemma's softmax does.
    family, unit, total = data.draw(st.sampled_from([("mistral", "layer", LAYERS), ("zoo", "sublayer", 4)]))
    ranking = data.draw(st.permutations(range(total)))
    sizes = sorted(data.draw(st.sets(st.integers(1, total), min_size=1, max_size=3)), reverse=True)
    levels = [ranking[:n] for n in sizes]
    steps = sorted(data.draw(st.lists(st.integers(0, len(levels) - 1), max_size=4)) + list(range(len(levels))))
    prefill = data.draw(st.sampled_from(["full", "first"]))
    program = skipped(family, torch.float64, levels=levels, level_of_step=steps, prefill=prefill, unit=unit)
    decoder = decoder_of(program)
    prompt, tokens = 3, tokens_of(2, 3 + len(steps), seed=len(steps))
    start = levels[0] if prefill == "first" else list(range(total))
    expected = SkipReference(program, decoder, find_units(program, decoder, unit)).logits(
        tokens, [start] * prompt + [levels[n] for n in steps]
    )
    held = empty_caches(program, 2, tokens.shape[1])
    got = [_step(program, "prefill", held, tokens[:, :prompt], 0, torch.tensor([prompt, prompt]))]
    functions = program.schedules["layer-skip"]["functions"]
    got += [_step(program, functions[level], held, tokens[:, prompt + n : prompt + n + 1], prompt + n) for n, level in enumerate(steps)]
    for place, logits in enumerate(got, prompt - 1):
        assert float((logits - expected[:, place]).abs().max() / expected.abs().max()) < 1e-10


def _step(
    program: gw.Program, function: str, held: dict[str, torch.Tensor], tokens: torch.Tensor, at: int, *more: torch.Tensor
) -> torch.Tensor:
    batch = tokens.shape[0]
    caches = [held[name] for name in _inputs(program, function) if name in held]
    outputs, new = run(program, [tokens, torch.full((batch,), at), torch.arange(batch), *more, *caches], function=function)
    held.update({name.removeprefix("input:"): value for name, value in new.items()})
    return outputs[0]


def test_a_table_that_is_not_nested_would_read_what_was_never_written() -> None:
    # What the refusal is for: with the check gone around, NaN from a slot of layer 1 comes out.
    program = skipped(levels=[[0, 2]])
    held = empty_caches(program, 1, 6)
    tokens = tokens_of(1, 6)
    _step(program, "prefill", held, tokens[:, :3], 0, torch.tensor([3]))
    assert _step(program, "decode_0", held, tokens[:, 3:4], 3).isfinite().all()
    assert not _step(program, "decode", held, tokens[:, 4:5], 4).isfinite().all()


@pytest.mark.parametrize("unit", ["layer", "sublayer"])
def test_compensation_multiplies_what_is_left_out_by_how_much_it_lets_the_residual_grow(unit: str) -> None:
    model, tokens = decoders.FAMILIES["mistral"]().double(), tokens_of(2, 6)
    kept = [0, 2] if unit == "layer" else [0, 1, 3, 4, 5]  # of layer 1, all or its attention
    options = {"levels": [kept], "prefill": "first", "unit": unit, "compensation": "scale", "calibration": [tokens]}
    inputs = [tokens, torch.arange(6).repeat(2, 1), False]
    result = gw.PassManager([gw.LayerSkip(**options)], verify="numeric", inputs=inputs).run(cached("mistral", torch.float64))
    assert "right" in str(result.reports[0].verdict)
    scales = result.program.schedules["layer-skip"]["scales"]
    assert "is left out reads is multiplied by 0: " in str(result)
    layer = model.model.layers[1]
    seen: dict[str, torch.Tensor] = {}
    hooks = [
        layer.register_forward_pre_hook(lambda _, args: seen.update(before=args[0])),
        layer.post_attention_layernorm.register_forward_pre_hook(lambda _, args: seen.update(between=args[0])),
        layer.register_forward_hook(lambda _, args, output: seen.update(after=output)),
    ]
    with torch.no_grad():
        model(tokens, use_cache=False)
        after = seen["after" if unit == "layer" else "between"]
        size = seen["before"].norm(dim=-1)  # zero before the first layer for the token of padding
        growth = float((after.norm(dim=-1) / size).where(size > 0, 1.0).mean())
        assert scales[1 if unit == "layer" else 2] == pytest.approx(growth, rel=1e-5)  # it has six digits
        for hook in hooks:
            hook.remove()
        if unit == "layer":
            layer.register_forward_hook(lambda _, args, output: args[0] * scales[1])
        else:
            layer.self_attn.register_forward_hook(lambda _, args, output: (seen["before"] * (scales[2] - 1), None))
            layer.register_forward_pre_hook(lambda _, args: seen.update(before=args[0]))
        expected = model(tokens, use_cache=False).logits[:, -1]
    got = Stepping(result.program, torch.arange(2), 6)("prefill", tokens, 0, torch.tensor([6, 6]))
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-10)
    assert result.reports[0].data["kl_of_level"][0] > 0


# --- drafts --------------------------------------------------------------------------------------------------------------------


def test_below_the_first_layer_it_leaves_out_a_draft_has_the_judge_s_keys_and_values_and_none_above() -> None:
    program, tokens, rows = (
        skipped("mistral", torch.float64, mode="speculative", draft=[0, 2], reuse_prefix=True),
        tokens_of(2, 4),
        torch.arange(2),
    )
    drafted, judged = (Stepping(program, rows, 4) for _ in range(2))
    for place in range(4):
        _, hidden = drafted.outputs("draft", tokens[:, place : place + 1], place)
        assert hidden.shape == (2, 1, 32)
    judged("verify", tokens, 0)
    for name in ("cache_k_0", "cache_v_0"):
        # The same sums for one token and for four.
        torch.testing.assert_close(drafted.caches[name], judged.caches[name], rtol=1e-12, atol=1e-12)
    assert not torch.allclose(drafted.caches["cache_k_2"], judged.caches["cache_k_2"], rtol=1e-2)
    assert drafted.caches["cache_k_1"].isnan().all()
    assert _inputs(program, "lift")[3:] == ["cache_k_0", "cache_v_0"]
    assert _inputs(program, "resume")[3:] == ["hidden", "cache_k_1", "cache_v_1", "cache_k_2", "cache_v_2"]


def test_hidden_states_that_are_no_batch_of_sequences_are_not_reused() -> None:
    decoder = decoder_of(cached("mistral", torch.float64))
    flat = replace(find_units(cached("mistral", torch.float64), decoder, "layer")[1], source=decoder.tokens)
    with pytest.raises(gw.PassError, match=r"reuse_prefix keeps hidden states \[batch, length, width\], and layer 1 .* reads"):
        shared_until(decoder, [replace(flat, index=0), flat], [0])


# --- ranking -------------------------------------------------------------------------------------------------------------------


def _profile(model: nn.Module) -> Profile:
    program = gw.compile_decoder(model, backend="aten", cache=False, cleanups=False).program
    decoder = decoder_of(program)
    return Profile(program, decoder, find_units(program, decoder, "layer"), Calibration((tokens_of(2, 10),)))


def test_every_metric_ranks_a_layer_that_does_nothing_last() -> None:
    model = decoders.FAMILIES["llama"]()
    with torch.no_grad():
        for part in (model.model.layers[1].self_attn.o_proj, model.model.layers[1].mlp.down_proj):
            part.weight.zero_()
    profile = _profile(model)
    assert profile.kl([0, 1, 2]) == 0.0, "nothing left out costs nothing"
    assert profile.kl([0, 2]) == pytest.approx(0.0, abs=1e-9)
    for metric in ("output_kl", "block_influence", "relative", "causal", "future", "logit_lens"):
        assert profile.ranking(metric, 1, "greedy")[-1] == 1, metric
    assert profile.ranking("output_kl", 1, "one_shot")[-1] == 1
    assert profile.kl([0]) > 0 and sorted(profile.ranking("output_kl", 1, "greedy")) == [0, 1, 2]


def _eager_hidden(model: nn.Module, tokens: torch.Tensor, left_out: int | None = None, until: int | None = None) -> list[torch.Tensor]:
    """h_0, .., h_N of a Llama-like module, whose layer `left_out` does nothing at the positions before `until`, and its logits."""
    hidden: list[torch.Tensor] = []

    def keep(index: int, args: Any, output: torch.Tensor) -> torch.Tensor:
        skips = (torch.arange(tokens.shape[1]) < (until or tokens.shape[1])).reshape(1, -1, 1) & (index == left_out)
        hidden.extend(() if hidden else (args[0],))
        hidden.append(torch.where(skips, args[0], output))
        return hidden[-1]

    hooks = [layer.register_forward_hook(lambda _, args, out, n=n: keep(n, args, out)) for n, layer in enumerate(model.model.layers)]
    with torch.no_grad():
        logits = model(tokens, use_cache=False).logits
    for hook in hooks:
        hook.remove()
    return [*hidden, logits]


def test_diagnostics_are_those_of_the_eager_model() -> None:
    model, program, tokens = decoders.FAMILIES["mistral"]().double(), cached("mistral", torch.float64), tokens_of(2, 9)
    decoder = decoder_of(program)
    reference = SkipReference(program, decoder, find_units(program, decoder, "layer"))
    *whole, logits = _eager_hidden(model, tokens)
    for prompt in (None, 4):
        got = effects(reference, tokens, prompt)
        assert got.shape == (LAYERS, 2) and not got[-1].any()
        for left_out in range(LAYERS - 1):
            changed = _eager_hidden(model, tokens, left_out, prompt)
            ratios = []
            for n in range(left_out + 1, LAYERS):
                before, after = (h[n + 1] - h[n] for h in (whole, changed))
                ratios.append(((before - after).norm(dim=-1) / before.norm(dim=-1))[:, prompt or 0 :].amax(1))
            torch.testing.assert_close(got[left_out], torch.stack(ratios).mean(0), rtol=1e-10, atol=0.0)
    lens = LogitLens.of(reference, [tokens[:1], tokens[1:]])
    assert lens.kl[-1] == 0.0 and lens.overlap[-1] == 1.0
    with torch.no_grad():
        for depth, hidden in enumerate(whole[:-1]):
            seen, output = (each.log_softmax(-1) for each in (model.lm_head(model.model.norm(hidden)), logits))
            assert lens.kl[depth] == pytest.approx(
                float(F.kl_div(seen, output, log_target=True, reduction="none").sum(-1).mean()), rel=1e-10
            )
            pairs = zip(*(each.topk(5).indices.flatten(0, 1).tolist() for each in (seen, output)), strict=True)
            assert lens.overlap[depth] == pytest.approx(sum(len(set(a) & set(b)) for a, b in pairs) / (5 * tokens.numel()))


def test_the_depth_score_is_the_mean_layer_weighted_by_effect() -> None:
    assert depth_score({0: 1.0, 1: 1.0, 2: 2.0}) == 1.25
    assert depth_score({0: 0.0, 1: 0.0}) == 0.0
    assert LogitLens((3.0, 2.5, 0.0), (0.1, 0.2, 1.0)).scores == {0: 0.5, 1: 2.5}


def test_the_report_says_what_layers_were_ranked_by() -> None:
    text = str(gw.PassManager([gw.LayerSkip(n_max=2, rank="logit_lens", calibration=[tokens_of(2, 8)])]).run(cached()))
    assert "logit_lens by layer: 0: " in text and "logit lens before each layer: KL " in text
    assert "the same five likeliest tokens: " in text and "depth score " in text


def test_a_schedule_says_what_its_layers_were_chosen_by() -> None:
    def origin(**options: Any) -> dict[str, Any]:
        return dict(skipped(**options).schedules["layer-skip"]["origin"])

    assert origin(n_max=2) == {"rank": "top", "decay": "linear", "kl": []}
    assert origin(levels=[[0]])["rank"] == origin(mode="speculative", draft=[0])["rank"] == "table"
    ranked, again, other = (origin(n_max=2, rank="relative", calibration=[tokens_of(2, 8, seed)]) for seed in (0, 0, 1))
    assert ranked["rank"] == "relative" and len(ranked["kl"]) == 1
    assert ranked["calibration"] == again["calibration"] != other["calibration"]


def test_a_loader_that_raises_is_said_to_be_at_fault() -> None:
    def loader() -> Any:
        yield tokens_of(2, 8)
        raise EOFError("the shard ends early")

    with pytest.raises(gw.CalibrationError, match="the calibration inputs raised EOFError at sample 1: the shard ends early"):
        gw.PassManager([gw.LayerSkip(n_max=2, rank="relative", calibration=loader())]).run(cached())


def test_levels_beyond_the_budget_are_left_out() -> None:
    calibration = [tokens_of(2, 10)]
    free = gw.PassManager([gw.LayerSkip(n_min=1, horizon=3, calibration=calibration)]).run(cached())
    kls = free.reports[0].data["kl_of_level"]
    assert kls[0] == 0.0 and kls[1] > 0
    kept = gw.PassManager([gw.LayerSkip(n_min=1, horizon=3, calibration=calibration, max_kl=(kls[1] + kls[2]) / 2)]).run(cached())
    assert kept.program.schedules["layer-skip"]["levels"] == [[0, 1, 2], [0, 2]]
    with pytest.raises(gw.PassError, match="the first level already costs"):
        skipped(levels=[[0]], calibration=calibration, max_kl=0.0)


def test_the_kl_of_a_level_is_of_the_layers_that_read_the_prompt_too() -> None:
    tokens, levels = tokens_of(2, 10), [[0, 2], [0]]
    decoder = decoder_of(cached())
    reference = SkipReference(cached(), decoder, find_units(cached(), decoder, "layer"))

    def log_probabilities(prompt: list[int], behind: list[int]) -> torch.Tensor:
        return reference.logits(tokens, [prompt] * 5 + [behind] * 5)[:, 5:].double().log_softmax(-1)

    whole = log_probabilities([0, 1, 2], [0, 1, 2])
    for prefill, prompt in (("full", [0, 1, 2]), ("first", levels[0])):
        result = gw.PassManager([gw.LayerSkip(levels=levels, prefill=prefill, calibration=[tokens])]).run(cached())
        seen = [log_probabilities(prompt, level) for level in levels]
        expected = [float(F.kl_div(each, whole, log_target=True, reduction="none").sum(-1).mean()) for each in seen]
        assert result.reports[0].data["kl_of_level"] == pytest.approx(expected, rel=1e-3)  # log-probabilities of float32


# --- contract ------------------------------------------------------------------------------------------------------------------


def test_contracts_and_the_numeric_check() -> None:
    assert gw.LayerSkip().contract is gw.Contract.SUBSTITUTION
    assert gw.LayerSkip(mode="speculative").contract is gw.Contract.POLICY
    drafts = {"mode": "speculative", "draft": [0, 2], "reuse_prefix": True}
    for options in ({"n_min": 1, "horizon": 3, "prefill": "first"}, drafts):
        result = gw.PassManager(
            [gw.LayerSkip(**options)], verify="numeric", inputs=[tokens_of(2, 7), torch.arange(7).repeat(2, 1), False]
        ).run(cached())
        assert "right" in str(result.reports[0].verdict)


def test_the_report_says_what_a_schedule_does() -> None:
    text = str(gw.PassManager([gw.LayerSkip(n_min=1, horizon=3)]).run(cached()))
    assert "from step 1: 2 of 3 (decode_1): 0, 2" in text and "2.0 of 3 in the mean of 3 steps: at most" in text
    assert "published schedules were fine-tuned" in text and "its quality is unmeasured" in text


def test_a_schedule_by_position_says_so() -> None:
    result = gw.PassManager([gw.LayerSkip(n_min=1, horizon=3, clock="position")]).run(cached())
    assert result.program.schedules["layer-skip"]["clock"] == "position"
    assert "from position 1: 2 of 3" in str(result) and "rows of prompts of different lengths are on different levels" in str(result)


def test_the_pass_as_text() -> None:
    spelled = gw.LayerSkip(levels=[[0, 1], [0]], level_of_step=[0, 1]).spelling
    assert spelled == "layer-skip{levels=[[0, 1], [0]],level_of_step=[0, 1]}"
    assert gw.PassManager(spelled).passes[0] == gw.LayerSkip(levels=[[0, 1], [0]], level_of_step=[0, 1])


# --- refusals of models ----------------------------------------------------------------------------------------------------------


class Stack(nn.Module):
    """A decoder of four layers and 12 places, `post_norm`: without an identity bypass; `shared`: keys of layer 0 for all."""

    def __init__(self, *, post_norm: bool = False, shared: bool = False):
        super().__init__()
        self.post_norm, self.shared = post_norm, shared
        self.table, self.places = nn.Embedding(16, 8), nn.Embedding(12, 8)
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(4))
        self.norms = nn.ModuleList(nn.LayerNorm(8) for _ in range(4))

    def forward(self, input_ids: torch.Tensor, position_ids: torch.Tensor) -> torch.Tensor:
        x = self.table(input_ids) + self.places(position_ids)
        first = None
        for layer, norm in zip(self.layers, self.norms, strict=True):
            q = layer(x if self.post_norm else norm(x)).unsqueeze(1)
            first = q if first is None or not self.shared else first
            y = F.scaled_dot_product_attention(q, first, first, is_causal=True).squeeze(1)
            x = norm(x + y) if self.post_norm else x + y
        return x


def test_layers_without_a_bypass_are_refused_by_name() -> None:
    with pytest.raises(gw.PassError, match=r"layer 0 \(.*test_layer_skip\.py:\d+.*\) has no identity bypass"):
        gw.compile_decoder(Stack(post_norm=True).eval(), "layer-skip", backend="aten", cache=False)


def test_keys_shared_across_layers_are_refused() -> None:
    place = r"\S*test_layer_skip\.py:\d+"
    with pytest.raises(gw.PassError, match=f"the attention at {place} reads keys and values of the one at {place}: a layer whose keys"):
        gw.compile_decoder(Stack(shared=True).eval(), "layer-skip", backend="aten", cache=False)


def test_layers_that_are_not_alike_are_refused() -> None:
    class Uneven(Stack):
        def forward(self, input_ids: torch.Tensor, position_ids: torch.Tensor) -> torch.Tensor:
            x = self.table(input_ids).unsqueeze(1)
            return F.scaled_dot_product_attention(x, x, x, is_causal=True).squeeze(1).relu()

    with pytest.raises(gw.PassError, match="no layers repeat: there is no value through which all passes between them"):
        gw.compile_decoder(Uneven().eval(), "layer-skip", backend="aten", cache=False)


def test_calibration_beyond_a_table_of_places_is_refused() -> None:
    passes = [gw.LayerSkip(calibration=[torch.zeros(1, 13, dtype=torch.int64)])]
    with pytest.raises(gw.PassError, match="calibration item 0 has rows of 13 tokens, and the model takes 12"):
        gw.compile_decoder(Stack().eval(), passes, backend="aten", cache=False)


def test_schedules_are_data() -> None:
    with pytest.raises(gw.PassError):
        Schedule(((0, 1), (2,)), (0, 1))
