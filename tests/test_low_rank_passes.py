"""The passes `smooth`, `split-low-rank`, `quantize`, `append-lora` and `absorb-outliers`: exact parts, contracts, refusals."""

import re
from dataclasses import replace

import pytest
import torch
from torch import nn

import graphwright as gw
from graphwright.ir.float64 import to_float64
from graphwright.ir.pattern import named_arguments
from graphwright.ir.run import run
from graphwright.passes import parse_pipeline
from graphwright.passes.low_rank import absorb_outliers, statistics
from graphwright.passes.low_rank.rewrite import LOWRANK, quantize_product
from graphwright.tests import low_rank_models as nets

aten = torch.ops.aten


def compiled(network, passes, dtype=torch.float32, **options):
    """The compiled network, its input, and its program without these passes."""
    module, example, calibration = nets.made(network, dtype)
    made = [each(calibration) if callable(each) else each for each in passes]
    options = {"backend": "aten", "cache": False, "verify": "numeric", **options}
    return gw.compile(module, made, example_inputs=example, **options), example, module


def smooth(**options):
    return lambda calibration: gw.Smooth(calibration=calibration, min_numel=0, **options)


def absorb(**options):
    return lambda calibration: gw.AbsorbOutliers(**{"calibration": calibration, "min_numel": 0, "weight": "int4-g16", "rank": 2, **options})


@pytest.mark.parametrize(("width", "depth"), [(4, 0), (0, 4)])
@pytest.mark.parametrize("each", [smooth(), gw.SplitLowRank(rank=1, min_numel=0)], ids=["smooth", "split-low-rank"])
def test_a_layer_whose_weight_has_no_numbers_stays(each, width: int, depth: int) -> None:
    x = torch.randn(2, depth)
    passes = [each([(x,)]) if callable(each) else each]
    report = gw.compile(torch.nn.Linear(depth, width), passes, example_inputs=(x,), backend="aten", cache=False).report().passes[-1]
    assert report.records == () and [left.reason for left in report.left] == ["its weight has no numbers"]


def report_of(model):
    return model.report().passes[-1]


def ops(program):
    return [node for node in program.main.calls if node.target is LOWRANK]


def in_float64(program, example):
    return run(to_float64(program), [each.double() for each in example])[0][0]


# --- smooth -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("network", nets.ALL)
@pytest.mark.parametrize("fold", [True, False])
def test_smoothing_is_exact(network, fold):
    model, example, _ = compiled(network, [smooth(fold=fold)])
    before, after = (in_float64(program, example) for program in (model.history[-2], model.program))
    assert (after - before).abs().max() <= 1e-12 * before.abs().max()
    assert report_of(model).records and report_of(model).verdict.kind == "right"


# Not Modulated with folds: a (1 + bias) - 1 rounds, whatever a is. Not SplitTokens: products of strided rows have another kernel.
@pytest.mark.parametrize(
    ("network", "fold"),
    [(n, fold) for n in nets.ALL for fold in (True, False) if not (n is nets.Modulated and fold) and n is not nets.SplitTokens],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_smoothing_by_powers_of_two_changes_no_bit(network, dtype, fold):
    model, example, module = compiled(network, [smooth(pow2=True, fold=fold)], dtype, verify="structure")
    with torch.no_grad():
        assert torch.equal(model(*example), module(*example))


@pytest.mark.parametrize(("network", "producer"), nets.FOLDED.items())
def test_factors_are_folded_into_what_makes_the_input(network, producer):
    model, _, _ = compiled(network, [smooth()])
    assert any(f"folded into {producer}" in line for line in report_of(model).lines)


@pytest.mark.parametrize("network", nets.MULTIPLIED)
def test_factors_are_multiplied_in_where_nothing_takes_them(network):
    model, _, _ = compiled(network, [smooth()])
    assert "multiply-by-smoothing" in [record.rule for record in report_of(model).records]


def test_folding_says_why_not():
    model, _, _ = compiled(nets.ReadTwice, [smooth()])
    assert "fc: multiplied in: something else reads its input" in report_of(model).lines
    model, _, _ = compiled(nets.AfterGELU, [smooth()])
    assert "fc2: multiplied in: the gelu before it takes no factors" in report_of(model).lines


def test_query_heads_that_share_keys_share_factors():
    model, _, _ = compiled(nets.Attention, [smooth()])
    a = model.program.weights["out.folded_smooth"].tensor.reshape(2, 2, 8)
    assert torch.equal(a[:, 0], a[:, 1]) and not torch.equal(a[0], a[1])


def test_a_silent_channel_changes_nothing_but_its_own_factor():
    module, example, calibration = nets.made(nets.AfterLayerNorm)

    def factors():
        passes = [gw.Smooth(calibration=calibration, min_numel=0)]
        model = gw.compile(module, passes, example_inputs=example, backend="aten", cache=False)
        return model.program.weights["q_proj.folded_smooth"].tensor

    before = factors()
    with torch.no_grad():
        module.norm.weight[5] = module.norm.bias[5] = 0
    others = torch.arange(nets.K) != 5
    assert factors()[5] == 1 and torch.equal(factors()[others], before[others])


def test_a_weight_that_is_too_large_once_smoothed_stays():
    module = torch.nn.Linear(64, 64).half()
    torch.nn.init.uniform_(module.weight, 50, 100)
    calibration = [(torch.randn(8, 64).half() * 1000,)]
    passes = [gw.Smooth(calibration=calibration, min_numel=0, alpha=1.0)]
    model = gw.compile(module, passes, example_inputs=calibration[0], backend="aten", cache=False)
    assert [left.reason for left in report_of(model).left] == ["weight: smoothed its weight is too large for float16"]
    assert not report_of(model).records


def test_smoothing_needs_examples():
    with pytest.raises(gw.PassError, match="pass smooth needs example inputs"):
        gw.Smooth()
    with pytest.raises(gw.PassError, match="pass smooth needs example inputs"):
        gw.compile(torch.nn.Linear(4, 4), "smooth")


# --- split-low-rank ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("network", nets.ALL)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("smoothed", [False, True])
def test_a_branch_and_its_residual_are_the_weight(network, dtype, smoothed):
    passes = ([smooth(fold=False)] if smoothed else []) + [gw.SplitLowRank(rank=2, min_numel=0)]
    model, example, _ = compiled(network, passes, dtype)
    before, after = (in_float64(program, example) for program in (model.history[-2], model.program))
    assert ops(model.program)
    assert (after - before).abs().max() <= 1e-12 * before.abs().max()


def test_a_float64_layer_is_as_precise_as_it_was():
    """Its residual is float64: one of float32 would be off by 1e-8."""
    module = torch.nn.Linear(64, 32).double()
    model = gw.compile(module, [gw.SplitLowRank(rank=2, min_numel=0)], example_inputs=(torch.randn(3, 64).double(),), verify="numeric")
    assert len(ops(model.program)) == 1


def test_a_product_by_factors_becomes_part_of_the_layer():
    model, _, _ = compiled(nets.AfterGELU, [smooth(), gw.SplitLowRank(rank=2, min_numel=0)])
    assert all(named_arguments(node)["smooth"] is not None for node in ops(model.program))
    assert not any(node.target is aten.mul.Tensor for node in model.program.main.calls)


def test_rank_0_changes_nothing():
    model, _, _ = compiled(nets.AfterLayerNorm, [gw.SplitLowRank(rank=0, min_numel=0)])
    assert not report_of(model).records


def test_queries_and_keys_share_a_down_projection():
    model, example, _ = compiled(nets.AfterLayerNorm, [gw.SplitLowRank(rank=2, min_numel=0)])
    apart, _, _ = compiled(nets.AfterLayerNorm, [gw.SplitLowRank(rank=2, min_numel=0, share_down=False)])
    assert len({named_arguments(node)["down"] for node in ops(model.program)}) == 1
    assert len({named_arguments(node)["down"] for node in ops(apart.program)}) == 2
    assert torch.allclose(model(*example), apart(*example), atol=1e-5)


@pytest.mark.parametrize(("rank", "reason"), [(40, "rank 40 is more than the 24"), (8, "a branch of rank 8 saves nothing at \\[24, 32\\]")])
def test_a_branch_that_saves_nothing_is_refused(rank, reason):
    model, _, _ = compiled(nets.AfterRMSNorm, [gw.SplitLowRank(rank=rank, min_numel=0)])
    assert not report_of(model).records
    [left] = report_of(model).left
    assert re.search(reason, left.reason)


# --- quantize ---------------------------------------------------------------------------------------------------------------


def test_each_of_the_three_passes_can_stand_alone():
    passes = [smooth(), gw.SplitLowRank(rank=2, min_numel=0), lambda c: gw.Quantize(weight="int4-g16", min_numel=0, calibration=c)]
    model, example, module = compiled(nets.SwiGLU, passes)
    assert [str(each.contract) for each in model.report().passes[-3:]] == ["exact", "exact", "bounded"]
    assert all(named_arguments(node)["weight_format"] == "int4-g16" for node in ops(model.program))
    with torch.no_grad():
        expected = module(*example)
    assert (model(*example) - expected).norm() <= 0.2 * expected.norm()


def test_the_order_of_the_three_is_checked():
    with pytest.raises(gw.PassError, match="split-low-rank"):
        gw.compile(torch.nn.Linear(4, 4), "quantize,split-low-rank")
    with pytest.raises(gw.PassError, match="slice-groups"):
        gw.compile(torch.nn.Linear(4, 4), "slice-groups,absorb-outliers")


def test_a_layer_over_its_budget_stays_as_it_was():
    model, _, _ = compiled(nets.AfterLinear, [gw.Quantize(weight="int4-g16", min_numel=0, budget=0.001)])
    assert not report_of(model).records and not ops(model.program)
    assert all("is over the budget of 0.001" in left.reason for left in report_of(model).left)


def test_quantize_says_when_it_had_no_data():
    model, _, _ = compiled(nets.AfterLinear, [gw.Quantize(weight="int4-g16", min_numel=0)])
    assert "not checked on data: errors are those of the weights" in report_of(model).lines


# --- absorb-outliers --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("network", nets.ALL)
@pytest.mark.parametrize("act", ["none", "int4-g16", "int8-token"])
def test_every_site_is_within_its_budget_and_no_worse_than_rounding(network, act):
    model, _, _ = compiled(network, [absorb(act=act)])
    sites = report_of(model).data["sites"]
    for site in sites:
        assert site["error"] <= site["budget"] and site["error"] <= 1.05 * site["plain_error"] + 1e-12
    assert sites or report_of(model).left


@pytest.mark.parametrize("network", nets.ALL)
def test_the_parts_but_the_codes_are_exact(network):
    """By fuel: the program as it is before the first rewrite that quantizes."""
    model, example, _ = compiled(network, [absorb()])
    rules = [record.rule for record in report_of(model).records]
    module, example, calibration = nets.made(network)
    captured = model.history[0]
    manager = gw.PassManager([absorb()(calibration)], fuel=gw.ir.Fuel(rules.index("quantize")))
    after = manager.run(captured).program
    before, exact = in_float64(captured, example), in_float64(after, example)
    assert (exact - before).abs().max() <= 1e-12 * before.abs().max()


def test_outliers_are_absorbed():
    model, _, _ = compiled(nets.AfterRMSNorm, [absorb(act="int4-g16")])
    [site] = report_of(model).data["sites"]
    assert "smoothing folded" in site["setting"] or "rank" in site["setting"]


class Called(torch.nn.Module):
    """One product with a weight of that name, [N, K] or [K, N]."""

    def __init__(self, name, transposed):
        super().__init__()
        weight = torch.randn(24, nets.K, generator=torch.Generator().manual_seed(0)) / 6
        self.register_parameter(name, torch.nn.Parameter(weight.T.contiguous() if transposed else weight))
        self.name, self.transposed = name, transposed

    def forward(self, x):
        weight = getattr(self, self.name)
        return x @ weight if self.transposed else torch.nn.functional.linear(x, weight)


NAMES = ("weight", "kernel", "in_proj_weight", "weight_1", "codes", "T_2")


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("before", [0, 1])
def test_an_output_is_as_near_as_its_site_says_whatever_its_weight_is_called(name, transposed, before):
    """With factors that are multiplied in, another smoothing before these, and a branch, which reads what is before its own factors."""
    _, example, calibration = nets.made(nets.AfterRMSNorm)
    network = Called(name, transposed)
    options = {"weight": "int8-channel", "smooth": 0.75, "fold": False, "min_gain": 0.0, "budget": 1.0}
    passes = [*[smooth(fold=False, alpha=0.25)(calibration)] * before, absorb(**options)(calibration)]
    model = gw.compile(network, passes, example_inputs=example, backend="aten", cache=False)
    [site] = report_of(model).data["sites"]
    assert site["setting"] == "smoothing, rank 2" and site["layers"] == (name,)
    with torch.no_grad():
        expected = network(*example)
        # The site's error is that of other rows of the same kind.
        assert (model(*example) - expected).norm() <= 2 * site["error"] * expected.norm()
        a, b = torch.randn(3, nets.K).bfloat16(), torch.randn(24, 3).bfloat16()
        adapted = gw.compile(model.program, [gw.AppendLoRA(adapters={name: (a, b)})], backend="aten", cache=False)
        moved = (example[0] @ a.float().T) @ b.float().T
        assert (adapted(*example) - model(*example) - moved).norm() <= 0.01 * moved.norm()


@pytest.mark.parametrize("name", NAMES)
def test_an_adapter_finds_a_smoothed_layer_whatever_its_weight_is_called(name):
    _, example, calibration = nets.made(nets.AfterRMSNorm)
    a, b = torch.randn(3, nets.K).bfloat16(), torch.randn(24, 3).bfloat16()
    passes = [smooth()(calibration), smooth()(calibration), gw.AppendLoRA(adapters={name: (a, b)})]
    network = Called(name, transposed=False)
    model = gw.compile(network, passes, example_inputs=example, backend="aten", cache=False)
    with torch.no_grad():
        moved = (example[0] @ a.float().T) @ b.float().T
        assert (model(*example) - network(*example) - moved).norm() <= 0.01 * moved.norm()


def test_attention_of_torch_is_as_near_as_its_sites_say(monkeypatch):
    monkeypatch.setattr(torch.backends.mha, "get_fastpath_enabled", lambda: False)
    torch.manual_seed(0)
    network = torch.nn.TransformerEncoderLayer(64, 4, 128, batch_first=True).eval()
    calibration = [(torch.randn(4, 16, 64) * torch.where(torch.arange(64) == 3, 30, 1),) for _ in range(6)]
    passes = [absorb(act="int8-token", weight="int8-channel", rank=4, min_gain=0.0)(calibration[1:])]
    model = gw.compile(network, passes, example_inputs=calibration[0], backend="aten", cache=False)
    sites = {site["layers"]: site["setting"] for site in report_of(model).data["sites"]}
    assert sites[("self_attn.in_proj_weight",)] == "smoothing, rank 4"
    with torch.no_grad():
        expected = network(*calibration[0])
        assert (model(*calibration[0]) - expected).norm() <= 0.02 * expected.norm()


@pytest.mark.parametrize("is_calibrated", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("which", [gw.Quantize, gw.AbsorbOutliers])
def test_a_layer_that_gives_more_error_than_was_measured_is_a_mistake_and_no_result(which, dtype, is_calibrated, monkeypatch):
    """Errors are measured on matrices; codes of twice the size have the same error there, and are seen when the call itself runs."""
    from graphwright.passes.low_rank import apply, quantize

    def doubled(rewriter, product, quantized, *rest):
        return quantize_product(rewriter, product, replace(quantized, scale=2 * quantized.scale), *rest)

    network, example, calibration = nets.made(nets.AfterRMSNorm)
    calibration = [(x.to(dtype),) for (x,) in calibration] if is_calibrated else None
    each = which(weight="int8-channel", act="int8-token", min_numel=0, calibration=calibration)
    program = gw.capture(network.to(dtype), (example[0].to(dtype),))
    assert gw.PassManager([each]).run(program).reports[0].records
    for module in (apply, quantize):
        monkeypatch.setattr(module, "quantize_product", doubled)
    with pytest.raises(gw.PassError, match=r"off by [01][.0-9]* where 0.0[0-9]* was measured, which is a mistake of this pass: report it"):
        gw.PassManager([each]).run(program)


class SeenThroughViews(torch.nn.Module):
    """Two layers of one site, each behind other views of its input."""

    def __init__(self):
        super().__init__()
        self.norm = torch.nn.RMSNorm(nets.K)
        self.query, self.key = torch.nn.Linear(nets.K, 24), torch.nn.Linear(nets.K, 24)

    def forward(self, x):
        h = self.norm(x)
        heads = h.reshape(2, -1, 3, nets.K)
        return self.query(heads).flatten(), self.key(h.contiguous().reshape(-1, nets.K)).flatten()


def test_layers_are_held_through_views_of_fixed_sizes(monkeypatch):
    from graphwright.passes.low_rank import apply

    torch.manual_seed(0)
    calibration = [(torch.randn(6, nets.K),) for _ in range(20)]
    program = gw.capture(SeenThroughViews(), calibration[0])
    each = gw.AbsorbOutliers(weight="int8-channel", act="int8-token", min_numel=0, fold=False, calibration=calibration)
    [site] = gw.PassManager([each]).run(program).reports[0].data["sites"]
    assert site["layers"] == ("query", "key")
    monkeypatch.setattr(apply, "quantize_product", lambda rewriter, product, quantized, *rest: quantize_product(
        rewriter, product, replace(quantized, scale=2 * quantized.scale) if product.name == "key" else quantized, *rest
    ))  # fmt: skip
    with pytest.raises(gw.PassError, match="mistake of this pass"):
        gw.PassManager([each]).run(program)


def test_the_plan_is_the_same_twice_and_whatever_the_batches():
    """Of a layer that reads the input itself: kernels before it may round rows of another batch in another way."""
    _, example, calibration = nets.made(nets.AfterLinear)
    module = torch.nn.Linear(nets.K, 24)
    together = [(torch.cat([x for (x,) in calibration]),)]
    dynamic = {"input": {0: torch.export.Dim("b", min=1, max=64)}}
    program = gw.capture(module, example, dynamic_shapes=dynamic)
    results = [gw.PassManager([absorb(act="int8-token")(data)]).run(program) for data in (calibration, list(calibration), together)]
    assert all(result.reports[-1].records for result in results)
    assert len({str(result.program) for result in results}) == 1


def test_a_weight_on_the_grid_needs_no_branch():
    module = torch.nn.Linear(64, 48, bias=False)
    codes = torch.randint(-7, 8, (48, 64), generator=torch.Generator().manual_seed(0))
    codes[:, ::16] = 7
    module.weight.data = codes.float()
    example = (torch.randn(3, 64),)
    model = gw.compile(module, [gw.AbsorbOutliers(weight="int4-g16", rank=2, min_numel=0)], example_inputs=example, backend="aten")
    [site] = report_of(model).data["sites"]
    assert site["error"] == 0 and site["setting"] == "round to nearest"
    with torch.no_grad():
        assert torch.allclose(model(*example), module(*example), atol=1e-5)


def test_a_fold_that_is_not_exact_is_an_error(monkeypatch):
    from graphwright.passes.low_rank import smoothing

    monkeypatch.setattr(smoothing, "_divided", lambda rewriter, layer, a: layer.weight)
    with pytest.raises(gw.PassError, match="smoothing moved the outputs by .* report it, and go on with fold=False"):
        compiled(nets.AfterRMSNorm, [absorb(act="int8-token", weight="int8-channel")])


def test_one_row_of_calibration_is_too_few_to_judge_on():
    module = torch.nn.Linear(64, 64)
    x = torch.randn(1, 64)
    for each in (gw.AbsorbOutliers(min_numel=0, calibration=[(x,)]), gw.Quantize(min_numel=0, calibration=[(x,)])):
        model = gw.compile(module, [each], example_inputs=(x,), backend="aten", cache=False)
        assert not report_of(model).records
        assert "calibration gave 1 row there, too few to choose by and to judge on" in report_of(model).left[0].reason


@pytest.mark.parametrize("which", [gw.AbsorbOutliers, gw.Quantize])
def test_quantized_activations_of_one_row_are_refused(which):
    module, x = torch.nn.Linear(64, 64), torch.randn(1, 64)
    passes = [which(min_numel=0, calibration=[(torch.randn(1, 64),)] * 20, act="int8-token")]
    model = gw.compile(module, passes, example_inputs=(x,), backend="aten", cache=False)
    assert "it has one row in every call" in report_of(model).left[0].reason


def test_a_layer_on_codes_is_not_quantized_again():
    once, _, _ = compiled(nets.AfterRMSNorm, [absorb()])
    twice = gw.compile(once.program, [gw.AbsorbOutliers(min_numel=0, weight="int4-g16")], backend="aten", cache=False)
    assert [left.reason for left in report_of(twice).left] == ["fc: it is on codes already"]


def test_a_branch_that_float16_cannot_hold_is_refused():
    module = torch.nn.Linear(64, 64, bias=False).half()
    module.weight.data.fill_(2e4)
    model = gw.compile(module, [gw.SplitLowRank(rank=2, min_numel=0)], example_inputs=(torch.randn(3, 64).half(),), backend="aten")
    assert "its branch holds numbers too large for float16" in report_of(model).left[0].reason


def test_a_bias_that_is_computed_takes_no_shift():
    class Net(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight, self.bias = torch.nn.Parameter(torch.randn(32, 64)), torch.nn.Parameter(torch.randn(32))

        def forward(self, x):
            return torch.nn.functional.linear(torch.nn.functional.gelu(x), self.weight, self.bias * x.mean())

    calibration = [(torch.randn(40, 64),)]
    passes = [gw.AbsorbOutliers(min_numel=0, act="int4-g64", rank=0, calibration=calibration)]
    model = gw.compile(Net(), passes, example_inputs=calibration[0], backend="aten", cache=False)
    assert [named_arguments(node)["act_shift"] for node in ops(model.program)] == [0.0]


def test_resumed_choices_are_of_a_site_that_folds_alike(tmp_path):
    """The second network returns what the first one's factors are folded into."""
    module, example, calibration = nets.made(nets.AfterRMSNorm)

    class Both(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.fc = module.norm, module.fc

        def forward(self, x):
            y = self.norm(x)
            return self.fc(y.reshape(-1, nets.K)), y

    for network in (module, Both()):
        passes = [absorb(resume=tmp_path / "state", act="int8-token", weight="int8-channel")(calibration)]
        model = gw.compile(network, passes, example_inputs=example, backend="aten", cache=False)
        with torch.no_grad():
            expected, got = (torch.utils._pytree.tree_leaves(each(*example))[0] for each in (module, model))
        assert (got - expected).norm() <= 0.05 * expected.norm()


def test_leaving_every_layer_alone_leaves_the_program_as_it_was():
    for network in nets.ALL:
        model, _, _ = compiled(network, [absorb(budget=1e-6)])
        text, before = (str(program).split("pipeline")[0] for program in (model.program, model.history[-2]))
        assert text == before
        assert any("is over the budget" in left.reason for left in report_of(model).left)


def test_a_concatenated_input_is_two_sites():
    model, example, module = compiled(nets.Joined, [absorb(act="int8-token", weight="int8-channel")])
    assert {"proj.part_0", "proj.part_1"} <= {layer for site in report_of(model).data["sites"] for layer in site["layers"]}
    whole, _, _ = compiled(nets.Joined, [absorb(split_concat=False)])
    assert "proj" in {layer for site in report_of(whole).data["sites"] for layer in site["layers"]}


def test_quantize_says_the_errors_of_layers_and_their_budget():
    model, _, _ = compiled(nets.Attention, [gw.Quantize(weight="int8-channel", min_numel=0)])
    report = report_of(model)
    assert {"q", "v"} <= set(report.data["errors"])
    assert all(0 < error < 0.02 for error in report.data["errors"].values())
    worst = max(report.data["errors"], key=report.data["errors"].__getitem__)
    assert any(line.startswith("errors ") and f"({worst})" in line for line in report.lines)


def test_convolutions_are_left_with_a_reason():
    network = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 1)).eval()
    for each in (gw.Quantize(min_numel=0), gw.Smooth(calibration=[(torch.randn(1, 3, 8, 8),)])):
        model = gw.compile(network, [each], example_inputs=(torch.randn(1, 3, 8, 8),), backend="aten", cache=False)
        assert [left.reason for left in report_of(model).left] == ["it is a convolution, and linear layers alone are taken"] * 2


@pytest.mark.parametrize("make", [gw.AbsorbOutliers, gw.Smooth, gw.Quantize])
@pytest.mark.parametrize(("numel", "skip"), [(0, ("q", "blocks.*", "lm_hed")), (10**6, ("q", "blocks.*", "lm_hed"))])
def test_patterns_that_fit_no_layer_are_said(make, numel, skip):
    module, example, calibration = nets.made(nets.Attention)
    each = make(calibration=calibration, min_numel=numel, skip=skip)
    lines = report_of(gw.compile(module, [each], example_inputs=example, backend="aten", cache=False)).lines
    assert "skip: no layer that it could take has a name like blocks.*, lm_hed" in lines
    each = make(calibration=calibration, min_numel=numel)  # of patterns that nobody gave nothing is said
    lines = report_of(gw.compile(module, [each], example_inputs=example, backend="aten", cache=False)).lines
    assert not any("a name like" in line for line in lines)


class Named(torch.nn.Module):
    """What default patterns skip, by name, around two blocks of attention inputs and an MLP."""

    class Block(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.q_proj, self.k_proj = (torch.nn.Linear(nets.K, nets.K, bias=False) for _ in range(2))
            self.mlp = torch.nn.Sequential(torch.nn.Linear(nets.K, 64), torch.nn.ReLU(), torch.nn.Linear(64, nets.K))

        def forward(self, x):
            return self.mlp(torch.tanh(self.q_proj(x)) * self.k_proj(x))

    def __init__(self):
        super().__init__()
        self.embed_in, self.lm_head = torch.nn.Linear(nets.K, nets.K), torch.nn.Linear(nets.K, 24, bias=False)
        self.layers = torch.nn.ModuleList(Named.Block() for _ in range(2))

    def forward(self, x):
        x = self.embed_in(x)
        for layer in self.layers:
            x = layer(x)
        return self.lm_head(x)


@pytest.mark.filterwarnings("ignore")  # the exporters' own
@pytest.mark.parametrize("dynamo", [True, False])
def test_layers_of_onnx_files_have_the_names_of_the_modules_that_were_exported(tmp_path, dynamo):
    torch.manual_seed(0)
    module, x = Named().eval(), torch.randn(4, 6, nets.K)
    torch.onnx.export(module, (x,), tmp_path / "m.onnx", dynamo=dynamo, opset_version=18, input_names=["x"], verbose=False)
    found = []
    for model, example in ((module, (x,)), (tmp_path / "m.onnx", None)):
        passes = [absorb(skip=(*absorb_outliers.SKIP, "layers.1.mlp.*"))([(x,)])]
        compiled = gw.compile(model, passes, example_inputs=example, backend="aten", cache=False)
        skipped = {left.reason.partition(":")[0] for left in report_of(compiled).left if "among those to skip" in left.reason}
        found.append((skipped, [site["layers"] for site in report_of(compiled).data["sites"]]))
    assert found[0] == found[1]  # blocks and attention too, which names tell
    assert found[0][0] == {"embed_in", "lm_head", "layers.1.mlp.0", "layers.1.mlp.2"}


def test_activations_that_are_never_far_below_zero_take_all_codes():
    model, _, _ = compiled(nets.AfterGELU, [absorb(act="int4-g64", weight="int4-g64", rank=0, skip=("fc1",))])
    [node] = ops(model.program)
    assert named_arguments(node)["act_format"] == "uint4-g64" and named_arguments(node)["act_shift"] == 0.171875


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_quantized_program_is_dumped_parsed_saved_and_loaded(tmp_path, dtype):
    model, example, _ = compiled(nets.Attention, [absorb(act="int8-token")], dtype)
    assert str(gw.parse(str(model.program))) == str(model.program)
    assert "gw.lowrank_linear" in str(gw.diff(model.history[0], model.program))
    model.save(tmp_path / "m.gw")
    loaded = gw.load(tmp_path / "m.gw", backend="aten")
    assert torch.equal(loaded(*example), model(*example))
    assert not any(name in ("q.weight", "out.weight") for name in loaded.program.weights)


def test_resumed_runs_choose_the_same(tmp_path):
    first, _, _ = compiled(nets.SwiGLU, [absorb(resume=tmp_path / "state")])
    again, _, _ = compiled(nets.SwiGLU, [absorb(resume=tmp_path / "state")])
    plain, _, _ = compiled(nets.SwiGLU, [absorb()])
    texts = {str(model.program).split("pipeline")[0] for model in (first, again, plain)}
    assert len(texts) == 1


class Counted:
    """Calibration items that count how often they are iterated."""

    def __init__(self, items):
        self.items, self.runs = items, 0

    def __iter__(self):
        self.runs += 1
        return iter(self.items)


@pytest.mark.parametrize("network", [nets.SharedContext, *(n for n in nets.ALL if n not in nets.ONE_SITE)])
@pytest.mark.parametrize(("dtype", "gptq"), [(torch.float32, True), (torch.bfloat16, False)])
def test_statistics_in_several_waves_give_the_same_program_bit_by_bit(network, dtype, gptq):
    module, example, calibration = nets.made(network, dtype)
    widest = max(layer.in_features for layer in module.modules() if isinstance(layer, torch.nn.Linear))
    found = []
    for size in (2**30, (2 * 64 + 8) * widest):  # of the rows and the largest numbers of the widest site
        examples = Counted(calibration)
        passes = [absorb(max_rows=64, gptq=gptq, max_calib_bytes=size)(examples)]
        model = gw.compile(module, passes, example_inputs=example, backend="aten", cache=False)
        weights = {weight.name: weight.digest for weight in model.program.weights.values()}
        found.append((examples.runs, str(model.program).partition("pipeline")[0], weights, report_of(model).data, report_of(model).lines))
    (once, *first), (often, *second) = found
    assert first == second and once < 4 <= often  # each wave is gathered to choose by, and again to quantize with


@pytest.mark.parametrize("network", [nets.SharedContext, nets.SwiGLU, nets.Attention])
@pytest.mark.parametrize(
    ("make", "options", "row"),
    [
        (gw.Quantize, {"weight": "int4-g16", "act": "nvfp4", "max_rows": 64, "min_numel": 0}, 2 * 64 + 8),
        (gw.Smooth, {"min_numel": 0}, 8),
    ],
    ids=["quantize", "smooth"],
)
def test_parts_that_calibrate_in_several_waves_give_the_same_program_bit_by_bit(network, make, options, row):
    module, example, calibration = nets.made(network)
    widest = max(layer.in_features for layer in module.modules() if isinstance(layer, torch.nn.Linear))
    found = []
    for size in (2**30, row * widest):  # bytes of a channel
        examples = Counted(calibration)
        each = make(calibration=examples, max_calib_bytes=size, **options)
        model = gw.compile(module, [each], example_inputs=example, backend="aten", cache=False)
        weights = {weight.name: weight.digest for weight in model.program.weights.values()}
        found.append((examples.runs, str(model.program).partition("pipeline")[0], weights, report_of(model).left))
    (once, *first), (often, *second) = found
    assert first == second and once == 1 < often
    with pytest.raises(gw.InputError, match=f"more than the {row * 32 - 1} of max_calib_bytes: raise it"):
        each = make(calibration=calibration, max_calib_bytes=row * 32 - 1, **options)
        gw.compile(module, [each], example_inputs=example, backend="aten", cache=False)


def test_quantize_measures_on_as_many_rows_as_it_is_told(monkeypatch):
    module, example, calibration = nets.made(nets.AfterLinear)
    kept = []
    monkeypatch.setattr(statistics.Watch, "statistics", lambda self, made=statistics.Watch.statistics: kept.append(made(self)) or kept[-1])
    for rows in (8, 16):
        each = gw.Quantize(calibration=calibration, min_numel=0, weight="int4-g16", max_rows=rows)
        gw.compile(module, [each], example_inputs=example, backend="aten", cache=False)
        assert {len(seen.rows) + len(seen.selection) for seen in kept} == {rows}
        kept.clear()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"gptq": True}, "gptq needs example inputs"),
        ({"smooth": 0.5}, "a fixed smooth needs example inputs"),
        ({"act": "nvfp4"}, "act nvfp4 needs example inputs"),
        ({"weight": "int3"}, "option weight is 'int3', but must be auto, or one of int4-g16"),
        ({"rotate": 24}, "option rotate is 24, but must be 0, 16, 32 or 64"),
        ({"smooth": 2.0}, "option smooth is 2.0"),
        ({"max_bits": 3.0}, "option max_bits is 3.0"),
        ({"seed": 2**70}, r"option seed is \d+, but must be an integer from 0 to 2\*\*63 - 1"),
    ],
)
def test_options_that_cannot_be_are_refused(options, message):
    with pytest.raises(gw.PassError, match=message):
        gw.AbsorbOutliers(**options)


@pytest.mark.parametrize("shape", [(64, 128), (128, 64)])
@pytest.mark.parametrize(
    "each", [absorb(act="int8-token"), gw.SplitLowRank(rank=2, min_numel=0)], ids=["absorb-outliers", "split-low-rank"]
)
def test_a_layer_of_zeros_goes_on_giving_its_bias(each, shape):
    """As modulations begin in diffusion transformers."""
    n, k = shape
    layer, x = torch.nn.Linear(k, n), torch.randn(16, k)
    torch.nn.init.zeros_(layer.weight)
    passes = [each([(x,), (x,)]) if callable(each) else each]
    model = gw.compile(layer, passes, example_inputs=(x,), backend="aten", cache=False)
    assert ops(model.program) and torch.equal(model(x), layer.bias.detach().expand(16, n))


def test_no_samples_and_nan_samples_are_refused_or_left_alone():
    module, example, calibration = nets.made(nets.AfterLinear)
    with pytest.raises(gw.InputError):
        gw.compile(module, [absorb()([])], example_inputs=example)
    bad = [(torch.full_like(calibration[0][0], float("nan")),)]
    model = gw.compile(module, [absorb()(bad)], example_inputs=example, backend="aten", cache=False)
    assert not report_of(model).records and all("NaN" in left.reason for left in report_of(model).left)


@pytest.mark.parametrize("turn", [lambda w: w.T, lambda w: w.transpose(0, 1), lambda w: w.t()], ids=["T", "transpose", "t"])
def test_a_weight_that_is_turned_round_at_each_call_is_said(turn):
    class Turned(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.randn(300, 300))

        def forward(self, x):
            return (x @ turn(self.weight)) @ turn(x)  # the second is a product of activations

    x = torch.randn(64, 300)
    model = gw.compile(Turned().eval(), [absorb()([(x,)])], example_inputs=(x,), backend="aten", cache=False)
    [left] = report_of(model).left
    assert left.reason == "its weight weight is turned round at each call: write torch.nn.functional.linear(x, weight)"


@pytest.mark.parametrize(
    "make", [absorb(), smooth(), lambda _: gw.SplitLowRank(rank=1, min_numel=0), lambda _: gw.Quantize(weight="int4-g16", min_numel=0)]
)
def test_the_second_of_two_layers_of_one_name_is_left_with_the_reason(make):
    class Two(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight, self.residual = (torch.nn.Parameter(torch.randn(nets.K, nets.K)) for _ in range(2))

        def forward(self, x):
            return torch.nn.functional.linear(torch.relu(torch.nn.functional.linear(x, self.weight)), self.residual)

    class Outer(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.both = Two()

        def forward(self, x):
            return self.both(x)

    x = torch.randn(64, nets.K)
    model = gw.compile(Outer().eval(), [make([(x,)])], example_inputs=(x,), backend="aten", cache=False)
    assert [left.reason for left in report_of(model).left] == ["its weight both.residual would be named both, as another layer is"]
    assert report_of(model).records


def test_layers_that_cannot_be_quantized_are_left_with_the_reason():
    class Odd(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.tied = torch.nn.Linear(32, 32, bias=False)
            self.short = torch.nn.Linear(24, 32)
            self.broken = torch.nn.Linear(32, 32)
            self.lm_head = torch.nn.Linear(32, 32)
            self.small = torch.nn.Linear(16, 2)
            self.broken.weight.data[0, 0] = float("inf")

        def forward(self, x):
            y = self.tied(self.tied(x))
            return y + self.short(x[..., :24]) + self.broken(x) + self.lm_head(x) + self.small(x[..., :16]).sum(-1, keepdim=True)

    passes = [gw.AbsorbOutliers(weight="int4-g16", rank=2, min_numel=64)]
    model = gw.compile(Odd(), passes, example_inputs=(torch.randn(3, 32),), backend="aten", cache=False)
    reasons = " / ".join(left.reason for left in report_of(model).left)
    for expected in (
        "its weight tied.weight is used 2 times",
        "short: K = 24 is no multiple of 16, the blocks of int4-g16",
        "broken: its weight holds NaN or infinity",
        "lm_head: its name is among those to skip",
        "small: its weight has 32 elements, fewer than min_numel 64",
    ):
        assert expected in reasons
    assert not ops(model.program)


def test_layers_named_for_it_take_weights_alone():
    model, _, _ = compiled(nets.SwiGLU, [absorb(act="int8-token", weight="int8-channel", weight_only=("gate",), min_gain=0.0)])
    formats = {site["layers"]: (site["weight"], site["act"]) for site in report_of(model).data["sites"]}
    assert formats == {("up",): ("int8-channel", "int8-token"), ("down",): ("int8-channel", "int8-token")}
    assert any("gate: K = 32 is no multiple of 64" in left.reason for left in report_of(model).left)


def test_max_bits_lowers_the_rank():
    module = torch.nn.Linear(256, 256)
    options = {"rank": 32, "min_numel": 0, "min_gain": 0.0}
    example = (torch.randn(2, 256),)
    models = [
        gw.compile(module, [gw.AbsorbOutliers(**options, max_bits=bits)], example_inputs=example, backend="aten") for bits in (None, 5.5)
    ]
    bits = [report_of(model).data["sites"][0]["bits"] for model in models]
    assert bits[1] <= 5.5 < bits[0]


# --- append-lora ------------------------------------------------------------------------------------------------------------


ADAPTED = [
    (nets.AfterLayerNorm, "q_proj"),
    (nets.AfterGELU, "fc2"),
    (nets.SwiGLU, "down"),
    (nets.SwiGLU, "up"),
    (nets.FusedSwiGLU, "both"),
    (nets.Attention, "v"),
    (nets.Modulated, "modulation"),
    (nets.AfterLinear, "first"),
    (nets.AfterSpelledNorm, "fc"),
    (nets.Joined, "proj"),  # which absorb-outliers makes two of
]


def merged(network, layer, scale):
    """The network with an adapter in the layer's weight, and the adapter."""
    module, example, _ = nets.made(network)
    weight = module.get_submodule(layer).weight
    generator = torch.Generator().manual_seed(3)
    a, b = (torch.randn(*shape, generator=generator).bfloat16() for shape in ((3, weight.size(1)), (weight.size(0), 3)))
    with torch.no_grad():
        weight += scale * b.float() @ a.float()
        return module(*example), (a, b)


@pytest.mark.parametrize(("network", "layer"), ADAPTED)
@pytest.mark.parametrize("fold", [True, False])
@pytest.mark.parametrize("smoothings", [1, 2])
def test_an_adapter_adds_what_it_says_whatever_was_smoothed(network, layer, fold, smoothings):
    """Only the storage of the adapter, divided by factors, in bfloat16 stands between the two."""
    passes = [smooth(fold=fold)] * smoothings
    model, example, module = compiled(network, passes, verify="structure")
    expected, adapter = merged(network, layer, 0.5)
    adapted = gw.compile(model.program, [gw.AppendLoRA(adapters={layer: adapter}, scale=0.5)], backend="aten", cache=False)
    with torch.no_grad():
        moved = expected - module(*example)
    assert (adapted(*example) - expected).norm() <= 0.01 * moved.norm()


@pytest.mark.parametrize(("network", "layer"), ADAPTED)
@pytest.mark.parametrize("fold", [True, False])
def test_an_adapter_joins_a_quantized_layer(network, layer, fold):
    options = {"weight": "int8-channel", "fold": fold, "min_gain": 0.0, "budget": 1.0}
    model, _, _ = compiled(network, [absorb(**options)], verify="structure")
    expected, adapter = merged(network, layer, 0.5)
    adapted = gw.compile(model.program, [gw.AppendLoRA(adapters={layer: adapter}, scale=0.5)], backend="aten", cache=False)
    _, example, _ = nets.made(network)
    assert (adapted(*example) - expected).norm() <= 0.03 * expected.norm()
    downs = [
        named_arguments(node)["down"].meta["val"].shape[0] for node in ops(adapted.program) if named_arguments(node)["down"] is not None
    ]
    assert any(rank % 16 == 0 for rank in downs)


def test_adapters_come_one_after_the_other():
    model, example, _ = compiled(nets.AfterLinear, [smooth()], verify="structure")
    for _ in range(2):
        adapter = gw.AppendLoRA(adapters={"second": (torch.randn(2, nets.K), torch.randn(24, 2))})
        model = gw.compile(model.program, [adapter], backend="aten", cache=False)
    assert torch.isfinite(model(*example)).all()


def test_an_adapter_of_zeros_changes_no_bit_and_others_keep_theirs():
    model, example, _ = compiled(nets.AfterLayerNorm, [absorb(min_gain=0.0)])
    k = nets.K
    zero = gw.AppendLoRA(adapters={"q_proj": (torch.randn(4, k), torch.zeros(24, 4))})
    adapted = gw.compile(model.program, [zero], backend="aten", cache=False)
    assert torch.allclose(adapted(*example), model(*example), atol=1e-6)
    other = gw.compile(model.program, [gw.AppendLoRA(adapters={"q_proj": (torch.randn(4, k), torch.randn(24, 4))})], backend="aten")
    assert torch.allclose(other(*example)[..., 24:], model(*example)[..., 24:], atol=1e-5)
    assert not torch.allclose(other(*example)[..., :24], model(*example)[..., :24], atol=1e-2)


def test_an_adapter_fits_a_layer_whose_weight_is_stored_the_other_way_round():
    module, example, _ = nets.made(nets.Conv1D)
    a, b = torch.randn(3, nets.K).bfloat16(), torch.randn(24, 3).bfloat16()
    model = gw.compile(module, [gw.AppendLoRA(adapters={"weight": (a, b)})], example_inputs=example, backend="aten", cache=False)
    with torch.no_grad():
        expected = module(*example) + (example[0] @ a.float().T) @ b.float().T
    assert torch.allclose(model(*example), expected, rtol=1e-3, atol=1e-2)


def test_an_adapter_that_the_stored_dtype_cannot_hold_is_refused():
    module, example, _ = nets.made(nets.AfterRMSNorm, torch.float16)
    adapter = gw.AppendLoRA(adapters={"fc": (torch.ones(2, nets.K), torch.full((24, 2), 1e5))})
    with pytest.raises(gw.PassError, match="the branch of fc holds numbers too large for torch.float16"):
        gw.compile(module, [adapter], example_inputs=example, backend="aten", cache=False)


def test_an_adapter_needs_weights_with_values():
    module, example, _ = nets.made(nets.AfterRMSNorm)
    program = gw.parse(str(gw.capture(module, example)))
    with pytest.raises(gw.PassError, match="read from text"):
        gw.PassManager([gw.AppendLoRA(adapters={"fc": (torch.ones(2, nets.K), torch.ones(24, 2))})]).run(program)


def test_an_adapter_fits_a_layer_that_was_left_alone():
    module, example, _ = nets.made(nets.AfterRMSNorm)
    a, b = torch.randn(3, nets.K).bfloat16(), torch.randn(24, 3).bfloat16()
    model = gw.compile(module, [gw.AppendLoRA(adapters={"fc": (a, b)})], example_inputs=example, backend="aten", cache=False)
    with torch.no_grad():
        x = module.norm(*example).reshape(-1, nets.K)
        expected = module(*example) + (x @ a.float().T) @ b.float().T
    assert torch.allclose(model(*example), expected, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize(
    ("adapters", "message"),
    [
        ({"nowhere": (torch.ones(2, 32), torch.ones(24, 2))}, "no layer is called nowhere; there are fc"),
        ({"fc": (torch.ones(2, 31), torch.ones(24, 2))}, r"fc takes A \[r, 32\] and B \[24, r\], not A \[2, 31\]"),
        ({"fc": torch.ones(2, 32)}, r"the adapter of fc is no pair of tensors"),
        ({"fc": (torch.full((2, 32), float("nan")), torch.ones(24, 2))}, "the adapter of fc holds NaN"),
        ({"fc": (torch.ones(2, 32) * 1j, torch.ones(24, 2))}, "the adapter of fc holds complex numbers"),
    ],
)
def test_adapters_that_do_not_fit_are_refused(adapters, message):
    module, example, _ = nets.made(nets.AfterRMSNorm)
    with pytest.raises(gw.PassError, match=message):
        gw.compile(module, [gw.AppendLoRA(adapters=adapters)], example_inputs=example, backend="aten", cache=False)


@pytest.mark.parametrize("scale", [float("nan"), float("inf")])
def test_the_scale_of_an_adapter_is_a_finite_number(scale):
    with pytest.raises(gw.PassError, match="option scale is (nan|inf), but must be a finite number"):
        gw.AppendLoRA(scale=scale)


def test_auto_takes_the_format_of_least_noise():
    module = torch.nn.Linear(128, 96)
    x = torch.randn(40, 128, generator=torch.Generator().manual_seed(0))
    passes = [gw.AbsorbOutliers(weight="auto", act="auto", rank=0, smooth="none", min_numel=0, budget=1.0, calibration=[(x,)])]
    model = gw.compile(module, passes, example_inputs=(x,), backend="aten", cache=False)
    [site] = report_of(model).data["sites"]
    assert (site["weight"], site["act"]) == ("nvint4", "nvint4")  # of normal numbers integers in blocks of 16 are the closest


def test_none_is_written_alike_in_text_and_in_python():
    for text, each in (("absorb-outliers{act=none,smooth=none}", gw.AbsorbOutliers(smooth="none")), ("quantize{act=none}", gw.Quantize())):
        assert parse_pipeline(text) == (each,) and parse_pipeline(each.spelling) == (each,)


@pytest.mark.parametrize("gptq", [False, True])
def test_codes_do_not_depend_on_how_many_threads_there_are(gptq):
    """LAPACK's results do, in their last bits; a layer of these sizes had other codes with two threads than with one."""
    module, args, kwargs = gw.models.load("decoder", "tiny", seed=0)
    program = gw.capture(module, args, kwargs)
    calibration = [(args, kwargs)] if gptq else None
    each = gw.AbsorbOutliers(weight="int8-channel", act="int8-token", min_numel=256, rank=4, gptq=gptq, calibration=calibration)
    threads, texts = torch.get_num_threads(), set()
    for count in (1, 2):
        torch.set_num_threads(count)
        try:
            texts.add(str(gw.PassManager([each]).run(program).program))
        finally:
            torch.set_num_threads(threads)
    assert len(texts) == 1
