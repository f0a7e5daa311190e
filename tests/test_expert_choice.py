"""`expert-choice`: experts choose among the tokens of a sequence, where all of these may know of one another; other graphs are refused."""

import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import graphwright as gw
from graphwright.ir.errors import ContractError, InputError, PassError
from graphwright.ir.run import run
from graphwright.passes.experts.capacity import SHAPES, Capacity, CapacitySchedule
from graphwright.tests import moe_models
from graphwright.tests.expert_oracles import expert_choice, expert_mlp
from graphwright.tests.mixtures import ATTENTIONS, CHOSEN, EXPERTS, KINDS, LENGTH, Deep, Network, captured, chosen, tokens

GW = torch.ops.gw


def calls(program, target, function="main"):
    return [node for node in program.functions[function].calls if node.target is target.default]


def left(result):
    return [each.reason for each in result.reports[-1].left]


def call(program, *inputs, function="main"):
    return run(program, list(inputs), function=function)[0][0]


# --- capacities ------------------------------------------------------------------------------------------------------------


@given(st.integers(1, 300), st.integers(1, 64), st.integers(1, 64), st.integers(0, 9), st.integers(1, 8))
def test_capacities_are_the_rounded_share_within_their_bounds(length, experts, k, least, multiple):
    for rounding, share in {"floor": length * k // experts, "ceil": -(-length * k // experts)}.items():
        capacity = Capacity(experts, rounding, least, multiple).of(length, k)
        assert capacity == length or (capacity % multiple == 0 and max(share, least) <= capacity < max(share, least) + multiple)
        assert capacity <= length


@pytest.mark.parametrize(("length", "k", "capacity"), [(2, 1, 0), (6, 1, 2), (10, 1, 2), (3, 1, 1), (7, 1, 2)])
def test_halves_are_rounded_to_even(length, k, capacity):
    assert Capacity(4, "round", 0).of(length, k) == capacity


@given(st.sampled_from(sorted(SHAPES)), st.integers(1, 8), st.integers(0, 8), st.integers(1, 99), st.data())
def test_schedules_stay_within_their_ends_and_lines_and_cosines_are_monotone(shape, kmin, more, valid, data):
    schedule = CapacitySchedule(kmin, kmin + more, shape)
    ks = [schedule.k(masked, valid) for masked in range(valid + 1)]
    assert all(kmin <= k <= kmin + more for k in ks)
    if shape.startswith(("linear", "cosine")):
        assert ks == sorted(ks, reverse=shape.endswith("reverse"))
        assert {ks[0], ks[-1]} == {kmin, kmin + more}


@pytest.mark.parametrize(
    ("shape", "prompt", "generated", "steps", "mean"),
    [
        ("linear_reverse", 256, 256, 128, 10.98), ("linear", 256, 256, 128, 5.02), ("cosine_reverse", 256, 256, 128, 11.81),
        ("gaussian", 256, 256, 128, 8.05), ("linear_reverse", 512, 128, 64, 12.81), ("linear", 512, 128, 64, 3.19),
    ],
)  # fmt: skip
def test_means_over_a_decode_are_those_of_the_specification(shape, prompt, generated, steps, mean):
    schedule = CapacitySchedule(2, 14, shape)
    ks = [schedule.k(generated - step * (generated // steps), prompt + generated) for step in range(steps)]
    assert sum(ks) / steps == pytest.approx(mean, abs=0.006)


def test_the_bell_costs_more_than_its_middle_also_where_ratios_are_even():
    assert CapacitySchedule(2, 14, "bell").mean() == pytest.approx(10.0, abs=0.05)
    assert CapacitySchedule(2, 14, "linear").mean() == pytest.approx(8.0, abs=0.01)


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ((0, 2), "1 <= kmin <= kmax"),
        ((3, 2), "1 <= kmin <= kmax"),
        ((1, 2, "wave"), "one of linear"),
        ((1, 2, "bell", "all"), "row, gen"),
        (("1", 2), "from '1' to 2"),
        ((1, 2, None), "shape None"),
        ((1, 2, ["bell"]), r"shape .\[?.bell"),
    ],
)
def test_schedules_that_are_none_are_refused(fields, says):
    with pytest.raises(PassError, match=says):
        CapacitySchedule(*fields)
    with pytest.raises(PassError, match=says):
        gw.ExpertChoice(schedule=list(fields))


@pytest.mark.parametrize("counts", [(3, 2), (-1, 2), (0, 0), (0.5, 2), ("1", 2), (None, 2), (1, True)])
def test_counts_that_are_none_are_refused(counts):
    with pytest.raises(InputError, match="0 <= masked <= valid"):
        CapacitySchedule(1, 2).k(*counts)


@pytest.mark.parametrize("steps", [0, -1, 2.0])
def test_a_mean_over_no_steps_is_refused(steps):
    with pytest.raises(InputError, match="steps is an integer from 1 on"):
        CapacitySchedule(1, 2).mean(steps)


# --- what the layer becomes ------------------------------------------------------------------------------------------------


@settings(max_examples=25)
@given(st.sampled_from(["orig", "post", "sigmoid"]), st.sampled_from([None, "prob", "logit"]), st.integers(1, EXPERTS), st.integers(0, 99))
def test_each_expert_takes_its_best_tokens_of_each_row(rule, key, k, seed):
    net, ids = Network(), tokens(seed=seed)
    program = chosen(captured(), rule=rule, key=key, k=k).program
    x = net.embed(ids)
    x = (x + ATTENTIONS["both ways"](net, x, None)).detach()
    index, gate = expert_choice(net.router(x).detach(), None, None, LENGTH * k // EXPERTS, rule, key)
    expected = x + expert_mlp(x, index, gate, net.gate_up.detach(), net.down.detach(), "silu")
    torch.testing.assert_close(call(program, ids).double(), expected, rtol=1e-5, atol=1e-4)  # float32 of values up to some hundreds


@pytest.mark.parametrize(
    ("router", "rule"),
    [
        ("probabilities", "orig"),
        ("renormalized", "post"),
        ("renormalized, kept from 0", "post"),
        ("softmax of chosen", "post"),
        ("of the type of tokens", "post"),
    ],
)
def test_the_rule_follows_from_the_weights_of_the_model_and_the_report_says_so(router, rule):
    result = chosen(captured(router=router), verify="numeric")
    assert calls(result.program, GW.expert_choice)[0].kwargs["rule"] == rule
    assert not calls(result.program, GW.token_choice_moe)
    assert result.reports[-1].verdict.kind == "right"
    line = result.reports[-1].lines[0]
    assert f"gates {rule} (the weights of its experts {'had a sum of 1' if rule == 'post' else 'were probabilities'})" in line


@pytest.mark.parametrize("router", ["probabilities", "renormalized", "softmax of chosen", "sigmoid"])
@pytest.mark.parametrize("rule", ["orig", "post", "sigmoid"])
def test_where_experts_take_all_tokens_it_is_the_mixture_of_all_experts(router, rule):
    assert chosen(captured(router=router), verify="numeric", rule=rule).reports[-1].verdict.kind == "right"


def test_a_layer_that_is_not_its_limit_is_found_out(monkeypatch):
    monkeypatch.setattr("graphwright.passes.experts.limit.Capacity.of", lambda self, length, k: length - 1)
    with pytest.raises(ContractError, match="expert-choice breaks its contract"):
        chosen(captured(), verify="numeric")


def test_with_all_experts_it_is_the_model_whose_tokens_chose_them_all():
    module = gw.models.moe_dlm.MoEDLM(gw.models.moe_dlm.Config(**SMALL, chosen=SMALL["experts"])).eval()
    draw_weights(module)
    ids = tokens(2, 12)
    compiled = gw.compile(module, "regroup-experts,expert-choice", example_inputs=(ids,), backend="aten", cache=False)
    torch.testing.assert_close(compiled(ids), module(ids).detach(), rtol=1e-5, atol=1e-5)


SMALL = {
    "vocabulary": 17, "dim": 16, "depth": 2, "num_heads": 2, "experts": 4, "hidden": 8, "tied": False, "length": 12,
}  # fmt: skip


def draw_weights(module):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        gw.models.random_weights.draw_weights(module)


@pytest.mark.parametrize(
    ("options", "capacity"),
    [
        ({}, 5), ({"k": 1}, 2), ({"k": 1, "capacity_rounding": "ceil"}, 3), ({"k": 1, "min_capacity": 4}, 4),
        ({"k": 1, "capacity_multiple": 4}, 4), ({"k": 4}, 10), ({"k": 1, "capacity_rounding": "round"}, 2),
    ],
)  # fmt: skip
def test_capacity_is_as_the_options_say_and_so_are_the_figures(options, capacity):
    result = chosen(captured(), **options)
    (node,) = calls(result.program, GW.expert_choice)
    assert node.kwargs["capacity"] == capacity
    (figures,) = result.reports[-1].data["expert_choice"]
    k = options.get("k", CHOSEN)
    assert figures["factor"] == pytest.approx(EXPERTS * capacity / (LENGTH * k))
    assert figures["flops"] == 6 * 8 * 6 * EXPERTS * capacity and figures["flops_before"] == 6 * 8 * 6 * LENGTH * CHOSEN
    assert figures["bytes"] == 3 * EXPERTS * 8 * 6 * 4


def test_scores_are_float32_unless_they_are_to_stay():
    program = gw.capture(Network().to(torch.bfloat16).eval(), (tokens(),))
    for option, dtype in (("float32", torch.float32), ("keep", torch.bfloat16)):
        (node,) = calls(chosen(program, router_dtype=option).program, GW.expert_choice)
        assert node.args[0].meta["val"].dtype == dtype


def test_only_the_layers_asked_for_are_rewritten():
    module, args, _ = gw.models.load("moe_dlm", "tiny")
    program = chosen(gw.capture(module, args), layers=[1]).program
    assert len(calls(program, GW.expert_choice)) == len(calls(program, GW.token_choice_moe)) == 1


def test_a_graph_without_experts_stays_as_it_was_and_a_second_run_finds_nothing():
    module, args, kwargs = gw.models.load("vit", "tiny")
    assert not chosen(gw.capture(module, args, kwargs)).reports[-1].records
    once = chosen(captured()).program
    assert not chosen(once).reports[-1].records


def test_batches_of_any_size_are_taken_where_the_graph_takes_them():
    program = chosen(captured(dynamic=(0, torch.export.Dim("batch", max=64))), verify="numeric").program
    ids = tokens(5)
    torch.testing.assert_close(call(program, ids), call(chosen(captured(rows=5)).program, ids))


def test_text_reads_back_to_the_same_program():
    program = chosen(captured(padded=True), schedule=CapacitySchedule(1, 3)).program
    assert gw.parse(str(program)) == program


def test_options_read_back_from_the_text_of_a_pipeline():
    each = gw.ExpertChoice(schedule=CapacitySchedule(2, 3, "bell"), valid="pad", key="prob")
    assert gw.passes.parse_pipeline(each.spelling) == (each,)


# --- padding ---------------------------------------------------------------------------------------------------------------


@settings(max_examples=15)
@given(st.sampled_from([1, 4, 7, LENGTH]), st.sampled_from(["orig", "post"]), st.integers(0, 9))
def test_a_row_does_not_know_how_far_it_is_padded(length, rule, seed):
    program = chosen(captured(padded=True), rule=rule).program
    ids, mask = tokens(seed=seed), torch.ones(2, LENGTH, dtype=torch.int64)
    mask[0, length:] = 0
    got = call(program, ids, mask)
    changed = ids.clone()
    changed[0, length:] = (ids[0, length:] + 1) % 16
    assert torch.equal(call(program, changed, mask)[0, :length], got[0, :length])
    if length > 1:
        alone = call(chosen(captured(rows=1, length=length), rule=rule).program, ids[:1, :length])
        torch.testing.assert_close(got[0, :length], alone[0], rtol=1e-5, atol=1e-4)


def test_padding_is_read_off_the_input_that_is_named():
    program = captured(padded=True)
    assert "padding is read off the input attention_mask" in chosen(program).reports[-1].lines
    with_tokens = chosen(captured(), valid="tokens").reports[-1].lines
    assert "1 attention let all positions meet; no probe was run" in with_tokens, "there is no other input to change"
    assert "all positions are tokens" in chosen(program, valid=None).reports[-1].lines
    with pytest.raises(PassError, match=r"valid='pad' is no input \[batch, length\] of the graph: tokens, attention_mask"):
        chosen(program, valid="pad")


# --- statistics ------------------------------------------------------------------------------------------------------------


@given(st.integers(1, EXPERTS), st.integers(0, 99))
@settings(max_examples=10)
def test_every_expert_has_as_many_tokens_and_the_counts_agree(k, seed):
    (counted,) = gw.routing_statistics(chosen(captured(), k=k).program, [tokens(seed=seed)])
    capacity = LENGTH * k // EXPERTS
    assert counted.load == (2 * capacity,) * EXPERTS and counted.void == 0
    assert sum(counted.experts_per_token) == 2 * LENGTH
    assert sum(n * count for n, count in enumerate(counted.experts_per_token)) == sum(counted.load)
    assert counted.untouched == counted.experts_per_token[0] / (2 * LENGTH)


def test_padding_leaves_slots_empty_and_masked_tokens_are_told_apart():
    program = chosen(captured(padded=True)).program
    mask = torch.ones(2, LENGTH, dtype=torch.int64)
    mask[1, 6:] = 0
    (counted,) = gw.routing_statistics(program, [tokens(), mask], masked=mask == 0)
    assert counted.load == (5 + 3,) * EXPERTS and counted.void == 2 * EXPERTS  # a half of 10 tokens, and of 6
    assert counted.untouched_masked == 1.0
    assert counted.untouched_others == pytest.approx((counted.untouched * 20 - 4) / 16)
    assert "100.0% of masked" in str(counted) and "8 empty slots" in str(counted)
    with pytest.raises(InputError, match="masked has 3 elements for 20 tokens"):
        gw.routing_statistics(program, [tokens(), mask], masked=torch.ones(3, dtype=torch.bool))


def test_tokens_that_choose_have_k_experts_each():
    (counted,) = gw.routing_statistics(captured(), [tokens()])
    assert counted.experts_per_token == (0, 0, 2 * LENGTH, 0, 0) and sum(counted.load) == 2 * LENGTH * CHOSEN
    assert counted.untouched == 0.0 and counted.untouched_masked is None


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"program": gw.CapacitySchedule(1, 2)}, "counts in a program, as compiled.program is one, not in a CapacitySchedule"),
        ({"function": "decode"}, "no function decode: it has main"),
        ({"inputs": tokens()}, "inputs are a list with a value for each leaf, not a Tensor"),
        ({"inputs": []}, "takes 1 inputs, one for each of tokens, not 0"),
        ({"inputs": [tokens(2, 4)]}, "tokens"),
        ({"inputs": [tokens().float()]}, "tokens"),
        ({"masked": torch.ones(2, LENGTH)}, "masked is a tensor bool"),
        ({"masked": [True]}, "masked is a tensor bool"),
    ],
)
def test_statistics_of_what_does_not_fit_are_refused(changed, says):
    with pytest.raises(InputError, match=says):
        gw.routing_statistics(**({"program": captured(), "inputs": [tokens()]} | changed))


def test_of_no_rows_there_are_statistics_of_nothing():
    program = chosen(captured(dynamic=(0, torch.export.Dim("batch", min=0, max=64)))).program
    (counted,) = gw.routing_statistics(program, [tokens(0)], masked=tokens(0) > 1)
    assert (counted.load, counted.untouched, counted.untouched_masked, counted.flops) == ((0,) * EXPERTS, 0.0, 0.0, 0)


def test_the_report_counts_what_was_measured():
    compiled = gw.compile(captured(), ["regroup-experts", gw.ExpertChoice(k=1)], backend="aten", cache=False)
    assert "experts, in the call" not in str(compiled.report())
    compiled.measure(tokens(seed=3))
    (counted,) = compiled.report().routing
    assert (counted,) == tuple(gw.routing_statistics(compiled.program, [tokens(seed=3)]))
    (figures,) = compiled.report().passes[-1].data["expert_choice"]
    assert counted.flops == 2 * figures["flops"]  # those of two rows
    text = str(compiled.report())
    assert f"experts, in the call that was measured: {counted.flops:.3g} FLOPs\n  mixture 0: tokens an expert: 4 to 4" in text
    assert f"no expert: {counted.untouched:.1%} of tokens" in text


def test_the_report_adds_up_rows_of_different_numbers_of_experts():
    compiled = gw.compile(captured(rows=3), ["regroup-experts", gw.ExpertChoice(schedule=[1, 3, "linear"])], backend="aten", cache=False)
    ids = tokens(3)
    compiled.measure(ids, mask_ratio=([0, LENGTH, 0], LENGTH))
    (counted,) = compiled.report().routing
    parts = [gw.routing_statistics(compiled.program, [ids], function=name)[0] for name in ("experts_1", "main")]
    assert counted.load == (2 * 2 + 7,) * EXPERTS and sum(counted.experts_per_token) == 3 * LENGTH
    assert counted.flops == (2 * parts[0].flops + parts[1].flops) / 3


# --- schedules -------------------------------------------------------------------------------------------------------------


def test_there_is_a_function_for_each_number_of_experts_over_the_same_weights():
    program = chosen(captured(), schedule=CapacitySchedule(1, 3)).program
    data = program.schedules["expert-choice"]
    assert dict(zip(data["k"], data["functions"], strict=True)) == {1: "experts_1", 2: "experts_2", 3: "main"}
    for k, function in zip(data["k"], data["functions"], strict=True):
        (node,) = calls(program, GW.expert_choice, function)
        assert node.kwargs["capacity"] == LENGTH * k // EXPERTS
        assert {n.target for n in program.functions[function].graph.nodes if n.op == "get_attr"} == set(program.weights)
        assert torch.equal(call(program, tokens(), function=function), call(chosen(captured(), k=k).program, tokens()))


def test_functions_are_the_one_whose_rows_have_capacities_of_their_own():
    """Where padding takes rows to other capacities, each is that of its own length."""
    program = chosen(captured(padded=True), schedule=CapacitySchedule(1, 3)).program
    mask = torch.ones(2, LENGTH, dtype=torch.int64)
    mask[1, 7:] = 0
    (node,) = calls(program, GW.expert_choice, "experts_2")
    table = program.weights[node.args[2].args[0].target].tensor
    assert table.tolist() == [Capacity(EXPERTS).of(n, 2) for n in range(LENGTH + 1)]


@pytest.mark.parametrize(
    ("attributes", "says"),
    [
        ({"k": 2, "schedule": [1, 2]}, "k=2 has no effect"),
        ({"schedule": [1]}, "schedule is a CapacitySchedule, or"),
        ({"rule": "mean"}, "auto"),
        ({"key": "score"}, "prob"),
        ({"capacity_rounding": "up"}, "floor"),
        ({"capacity_multiple": 0}, "at least 1"),
    ],
)
def test_options_that_do_not_fit_are_refused_at_once(attributes, says):
    with pytest.raises(PassError, match=says):
        gw.ExpertChoice(**attributes)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"k": 5}, "k=5 experts a token, and mixture 0 has 4"),
        ({"schedule": [1, 5]}, "k=5 experts a token"),
        ({"min_capacity": 11}, "min_capacity=11 tokens, and a sequence has 10"),
        ({"layers": [1]}, "layers names mixture 1, and there are 1"),
    ],
)
def test_options_that_do_not_fit_the_graph_are_refused(options, says):
    with pytest.raises(PassError, match=says):
        chosen(captured(), **options)


def test_an_expert_without_tokens_is_refused():
    with pytest.raises(PassError, match="3 x 1 / 4 tokens an expert are none"):
        chosen(captured(length=3), k=1, min_capacity=0)


def test_sequences_of_any_length_are_refused():
    program = captured(dynamic=(1, torch.export.Dim("length", min=2, max=64)))
    for options in ({}, {"schedule": [1, 2]}):
        with pytest.raises(PassError, match="the length S of a sequence is known at the call only"):
            chosen(program, **options)


class Pooled(Network):
    def forward(self, tokens):
        return super().forward(tokens)[0].mean((0, 1))


def test_a_schedule_needs_a_row_of_outputs_for_each_row_of_inputs():
    with pytest.raises(PassError, match="each row runs at its own k, and output 0 has no row for each sequence"):
        chosen(gw.capture(Pooled().eval(), (tokens(),)), schedule=[1, 2])


# --- more than one run -----------------------------------------------------------------------------------------------------


def test_runs_for_different_mixtures_are_one_run_for_all_where_options_agree_and_numbers_stay():
    program = gw.capture(Deep("both ways", "both ways"), (tokens(),))
    passes = [gw.passes.RegroupExperts(), gw.ExpertChoice(layers=[1], k=1), gw.ExpertChoice(layers=[0], k=1)]
    result = gw.PassManager(passes, verify="numeric").run(program)
    assert len(calls(result.program, GW.expert_choice)) == 2
    assert torch.equal(call(result.program, tokens()), call(chosen(program, k=1).program, tokens()))
    assert left(chosen(result.program, layers=[0])) == ["its experts choose already"]


def test_a_leak_that_one_run_was_told_to_make_is_kept_by_the_next():
    program = captured().copy()
    program.schedules["expert-choice"] = {"leaks_future": True}
    assert chosen(program).program.schedules["expert-choice"] == {"leaks_future": True}
    assert chosen(program, schedule=[1, 2]).program.schedules["expert-choice"]["leaks_future"]


def test_a_program_with_a_schedule_is_not_rewritten_again():
    program = gw.capture(Deep("both ways", "both ways"), (tokens(),))
    once = chosen(program, layers=[0], schedule=[1, 2]).program
    for options in ({"layers": [1]}, {"schedule": [1, 3]}):
        with pytest.raises(PassError, match="has functions for a schedule of expert-choice already.*in the one pass that has the schedule"):
            chosen(once, **options)
    assert not chosen(once, layers=[0]).reports[-1].records, "there is nothing to do"


def test_a_schedule_for_some_mixtures_keeps_what_others_have():
    program = gw.capture(Deep("both ways", "both ways"), (tokens(),))
    passes = [gw.passes.RegroupExperts(), gw.ExpertChoice(layers=[0], k=3), gw.ExpertChoice(layers=[1], schedule=[1, 2])]
    made = gw.PassManager(passes).run(program).program
    capacities = {name: [n.kwargs["capacity"] for n in calls(made, GW.expert_choice, name)] for name in ("main", "experts_1")}
    assert capacities == {"main": [7, 5], "experts_1": [7, 2]}


def test_capacities_of_rows_that_differ_have_names_of_their_own():
    class Padded(Deep):
        def forward(self, tokens, attention_mask):
            return (sum(layer(tokens, attention_mask)[0] for layer in self.layers),)

    mask = torch.ones(2, LENGTH, dtype=torch.int64)
    program = gw.capture(Padded("both ways", "both ways"), (tokens(), mask))
    passes = [gw.passes.RegroupExperts(), gw.ExpertChoice(layers=[0]), gw.ExpertChoice(layers=[1], capacity_multiple=4)]
    made = gw.PassManager(passes, verify="numeric").run(program).program
    tables = {name: weight.tensor.tolist() for name, weight in made.weights.items() if name.startswith("expert_choice")}
    assert tables == {
        "expert_choice.capacity_4_2": [Capacity(EXPERTS).of(n, 2) for n in range(LENGTH + 1)],
        "expert_choice.capacity_4_2_1": [Capacity(EXPERTS, multiple=4).of(n, 2) for n in range(LENGTH + 1)],
    }
    assert gw.parse(str(made)) == made


# --- routers that are left alone -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("router", "reason"),
    [
        ("sigmoid", "chosen by sigmoids, from which no rule of gates follows"),
        ("extra factor", "an extra factor or step, aten.mul.Tensor"),
        ("divided by more", "are divided by more than their sum"),
        ("corrected by a bias", "read off scores at what was chosen by others, which a bias or groups changed"),
        ("by max", "the weights of its experts are not the values of one topk"),
        ("biased", "go through aten.add.Tensor: a bias, groups or a limit"),
        ("grouped", "go through aten.masked_fill"),
        ("noisy", "noise is added to its scores"),
        ("raw scores", "scores that are no probabilities"),
        ("scores read elsewhere", "the scores of its router are read elsewhere"),
        ("choice read elsewhere", "what its router chose is read elsewhere"),
        ("smallest", "not the values of one topk|does not take the largest"),
        ("of other rows", "reads other rows than its experts, or the same in another order"),
        ("no layer", "not chosen by a linear layer|go through aten.slice"),
        ("two choices", "not what the topk chose that gave their weights"),
    ],
)
def test_routers_by_which_experts_cannot_choose_are_left_with_a_reason(router, reason):
    result = chosen(captured(router=router))
    assert calls(result.program, GW.token_choice_moe) and not result.reports[-1].records
    (found,) = left(result)
    assert re.search(reason, found), found


def test_a_router_of_other_experts_is_left_with_a_reason():
    assert left(chosen(captured(experts=6))) == ["its router has 4 scores and there are 6 experts"]


def test_tokens_whose_sequences_are_not_seen_are_left_with_a_reason():
    (reason,) = left(chosen(captured(sequences=False)))
    assert "how its tokens form sequences is not seen" in reason


# --- causality -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("attention", [name for name in ATTENTIONS if "both ways" in name and "convolved" not in name])
def test_graphs_that_look_both_ways_are_taken(attention):
    (evidence,) = [line for line in chosen(captured(attention)).reports[-1].lines if "another last token" in line]
    is_known = not attention.endswith((" mean", " transform"))
    assert evidence.startswith("1 attention let all positions meet" if is_known else "there is no attention whose masks are known")
    assert evidence.endswith("and each of 8 tokens changes all others' outputs")


@pytest.mark.parametrize("attention", [name for name in ATTENTIONS if name.startswith(tuple(KINDS)) and (" by " in name or " in " in name)])
def test_masks_of_any_form_are_seen(attention):
    says = "the graph is causal" if attention.startswith("causal") else "not all positions meet"
    with pytest.raises(PassError, match=f"expert-choice: {says}: .*another last token changes earlier outputs by"):
        chosen(captured(attention))


def test_what_masks_and_probe_cannot_say_is_refused():
    """Without values of weights there is no probe."""
    program = gw.parse(str(captured("both ways by a mean")))
    with pytest.raises(PassError, match="what it sees is unknown: there is no attention whose masks are known; no probe was run"):
        chosen(program)


@pytest.mark.parametrize(
    ("attention", "says"),
    [
        ("causal flag", "the graph is causal: 1 attention let no position see a later one"),
        ("causal mask", "the graph is causal"),
        ("added causal mask", "the graph is causal"),
        ("eager causal mask", "the graph is causal"),
        ("block-causal mask", "not all positions meet"),
        ("two packed texts", "not all positions meet"),
        ("causal convolution", "the graph is causal"),
        (
            "both ways over convolved",
            "the graph is causal: 1 attention let all positions meet; another last token changes earlier .* by 0.0",
        ),
    ],
)
def test_graphs_that_do_not_look_both_ways_are_refused_unless_told(attention, says):
    with pytest.raises(PassError, match=says):
        chosen(captured(attention))
    assert chosen(captured(attention), allow_noncausal=True).program.schedules["expert-choice"] == {"leaks_future": True}


def test_each_shape_of_sequences_is_looked_at():
    program = gw.capture(Deep("both ways", "causal flag", lengths=[LENGTH, 7]), (tokens(),))
    with pytest.raises(PassError, match="the graph is causal"):
        chosen(program)
    assert len(calls(chosen(program, layers=[0]).program, GW.expert_choice)) == 1


@pytest.mark.parametrize(
    ("leak", "says"),
    [
        (None, "whether positions know of later ones was not measured"),
        (0.0, "the last token changes earlier outputs by 0 of the largest, where it was 0 before, on the inputs that were tried"),
        (0.5, "the last token changes earlier outputs by 0.5 of the largest, where it was 0 before: each position knows of later ones"),
    ],
)
def test_of_the_leak_is_said_what_was_measured(monkeypatch, leak, says):
    monkeypatch.setattr("graphwright.passes.experts.expert_choice.change_of_earlier_outputs", lambda *args: leak)
    report = chosen(captured("causal flag"), allow_noncausal=True).reports[-1]
    assert report.data["leak"] == leak and any(line.startswith(says) for line in report.lines)


class Segmented(Network):
    def forward(self, tokens, segments):
        return super().forward(tokens, segments)


def test_a_mask_that_an_input_decides_is_unknown_unless_it_is_padding():
    program = gw.capture(Segmented("mask of the user").eval(), (tokens(), torch.ones(2, LENGTH, dtype=torch.int64)))
    with pytest.raises(PassError, match="what it sees is unknown: a mask of attention depends on the input segments"):
        chosen(program)
    assert "padding is read off the input segments" in chosen(program, valid="segments").reports[-1].lines


@pytest.mark.parametrize("program", [lambda: captured(length=1), lambda: captured("over a cache")])
@pytest.mark.parametrize("allowed", [False, True])
def test_decoding_over_a_cache_is_refused_also_when_told(program, allowed):
    with pytest.raises(PassError, match="sequences have one position|more keys than queries"):
        chosen(program(), allow_noncausal=allowed)


@pytest.mark.parametrize("family", moe_models.TRANSFORMERS)
def test_decoders_of_transformers_are_causal_and_rewritten_when_told(family):
    pytest.importorskip("transformers", reason="captures mixtures of transformers: pip install transformers")
    program = gw.capture(moe_models.TRANSFORMERS[family](), (moe_models.tokens_of(),), {"use_cache": False})
    with pytest.raises(PassError, match="the graph is causal: 2 attentions let no position see a later one"):
        chosen(program)
    result = chosen(program, verify="numeric", allow_noncausal=True)
    assert len(calls(result.program, GW.expert_choice)) == moe_models.LAYERS and not left(result)
    assert result.reports[-1].verdict.kind == "right"
    rules = {node.kwargs["rule"] for node in calls(result.program, GW.expert_choice)}
    assert rules == {"post" if family in ("mixtral", "qwen3") else "orig"}


def test_the_leak_is_there_and_reported_and_such_a_program_does_not_generate():
    before, result = captured("causal flag"), chosen(captured("causal flag"), allow_noncausal=True)
    ids = tokens()
    other = ids.clone()
    other[:, -1] = (other[:, -1] + 1) % 16
    change = [(call(p, ids) - call(p, other))[:, :-1].abs().max().item() for p in (before, result.program)]
    assert change[0] == 0.0 and change[1] > 0.1
    assert result.reports[-1].data["leak"] > 0.01
    assert any("each position knows of later ones" in line for line in result.reports[-1].lines)
    with pytest.raises(InputError, match="choose among all positions"):
        gw.compile(result.program, backend="aten").generate([[1, 2]], 2)
    with pytest.raises(PassError, match="choose among all positions"):
        gw.PassManager("kv-cache").run(result.program)
