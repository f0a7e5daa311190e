"""What a setting of a site is worked out to: its error is that of the operation itself, and refinement never makes it worse."""

import itertools
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from graphwright.ir.low_bit import FORMATS, dequantize
from graphwright.passes.low_rank.fit import Problem, fit
from graphwright.passes.low_rank.recipe import LOWER_BOUNDS, Recipe, Setting, bits_of, stored_dtype, usable_rank
from graphwright.passes.low_rank.smoothing import factors, tied

gw = torch.ops.gw
K = 64


def problem(seed=0, outliers=20.0, dtype=torch.float32, layers=(24, 16)):
    generator = torch.Generator().manual_seed(seed)
    scale = torch.ones(K)
    scale[torch.tensor([5, 40])] = outliers
    weights = tuple(torch.randn(n, K, generator=generator) / 8 for n in layers)
    rows, selection = (torch.randn(n, K, generator=generator) * scale for n in (200, 40))
    return Problem(weights, (tuple(range(len(layers))),), rows, selection, dtype)


def outputs(each, worked, setting, recipe):
    """The layers by the dialect's operation, as the rewrite makes them."""
    a = None if setting.smooth is None else setting.smooth
    for i, quantized in enumerate(worked.quantized):
        branch = worked.branch_of(each, i)
        values = dequantize(quantized.codes, quantized.scale, quantized.scale2, recipe.weight, torch.float32)
        bias = -setting.act_shift * (values.sum(1) if a is None else values @ a.float()) if setting.act_shift else None
        yield gw.lowrank_linear(
            each.selection, quantized.codes, quantized.scale, None if branch is None else branch[1], None if branch is None else branch[0],
            bias, weight_format=recipe.weight, act_format=setting.act, smooth=a, weight_scale2=quantized.scale2,
            act_scale2=worked.act_scale2, act_shift=setting.act_shift, rotate=setting.rotate,
        )  # fmt: skip


SETTINGS = [
    Setting(rank=rank, rotate=rotate, act=act)
    for rank, rotate, act in itertools.product((0, 4), (0, 16), ("none", "int4-g16", "int8-token", "nvfp4", "mxint4"))
]


@pytest.mark.parametrize("setting", SETTINGS, ids=str)
@pytest.mark.parametrize("smoothed", [False, True])
def test_the_error_is_that_of_the_operation(setting, smoothed):
    each, recipe = problem(), Recipe(weight="int4-g16", rank=4)
    if smoothed:
        a = factors(each.rows.abs().amax(0), each.joined.abs().amax(0), 0.5, 0.5, torch.float32)
        setting = replace(setting, smooth=a)
    worked = fit(each, setting, recipe, refine=2)
    got = torch.cat(list(outputs(each, worked, setting, recipe)), 1)
    expected = each.selection.double() @ torch.cat(each.weights).double().T
    error = float((got.double() - expected).norm() / expected.norm())
    assert worked.error == pytest.approx(error, rel=1e-3)


def test_the_error_with_shifted_activations_is_that_of_the_operation():
    each = problem(outliers=1.0)
    each = replace(each, selection=torch.nn.functional.gelu(each.selection), rows=torch.nn.functional.gelu(each.rows))
    setting, recipe = Setting(act="uint4-g64", act_shift=0.171875, rank=4), Recipe(weight="int4-g16", rank=4)
    worked = fit(each, setting, recipe, refine=0)
    got = torch.cat(list(outputs(each, worked, setting, recipe)), 1)
    expected = each.selection.double() @ torch.cat(each.weights).double().T
    assert worked.error == pytest.approx(float((got.double() - expected).norm() / expected.norm()), rel=1e-3)


@given(st.integers(0, 1000), st.sampled_from(["int4-g16", "int4-g64", "nvfp4", "mxint4"]), st.sampled_from(["none", "int4-g16"]))
@settings(max_examples=20, deadline=None)
def test_more_rounds_never_raise_the_error(seed, weight, act):
    each, recipe, setting = problem(seed), Recipe(weight=weight, rank=4), Setting(rank=4, act=act)
    errors = [fit(each, setting, recipe, refine=rounds).error for rounds in (0, 1, 3, 6)]
    assert errors == sorted(errors, reverse=True)


def test_factors_that_are_folded_and_multiplied_in_give_the_same_codes():
    each, recipe = problem(), Recipe(weight="int4-g16", rank=0)
    a = factors(each.rows.abs().amax(0), each.joined.abs().amax(0), 0.5, 0.5, torch.float32, pow2=True)
    apart, folded = (fit(each, Setting(smooth=a, folded=fold), recipe, refine=0) for fold in (False, True))
    assert all(torch.equal(p.codes, q.codes) for p, q in zip(apart.quantized, folded.quantized, strict=True))
    assert apart.error == pytest.approx(folded.error, rel=1e-5)


def test_without_rows_the_error_is_that_of_the_weights():
    each = replace(problem(), rows=None, selection=None)
    worked = fit(each, Setting(), Recipe(weight="int4-g16"), refine=0)
    values = torch.cat([dequantize(q.codes, q.scale, None, "int4-g16", torch.float32) for q in worked.quantized])
    assert worked.error == pytest.approx(float((values - each.joined).norm() / each.joined.norm()), rel=1e-5)


def test_gptq_is_taken_only_where_it_is_better_on_rows_it_has_not_seen():
    for seed in range(5):
        each, recipe = problem(seed), Recipe(weight="int4-g16", rank=4)
        plain, fitted = (fit(each, Setting(rank=4, gptq=gptq), recipe, refine=1) for gptq in (False, True))
        assert fitted.error <= plain.error


# --- smoothing factors ------------------------------------------------------------------------------------------------------


def test_a_channel_that_is_silent_or_has_no_weight_keeps_its_factor():
    a = factors(torch.tensor([0.0, 2.0, 3.0, float("inf")]), torch.tensor([1.0, 0.0, 3.0, 1.0]), 0.5, 0.5, torch.float32)
    assert a.tolist() == [1, 1, 1, 1]  # the third because the two are equal


def test_powers_of_two_are_powers_of_two():
    a = factors(torch.rand(100) * 50, torch.rand(100), 0.7, 0.3, torch.float32, pow2=True)
    mantissa, _ = torch.frexp(a)
    assert torch.equal(mantissa, torch.full_like(a, 0.5))


def test_tied_channels_share_the_largest():
    assert tied(torch.tensor([1.0, 5.0, 2.0, 3.0]), torch.tensor([0, 0, 1, 1])).tolist() == [5, 5, 3, 3]


# --- bounds and bits --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "function"),
    [
        ("aten::relu", torch.relu),
        ("aten::gelu", torch.nn.functional.gelu),
        ("aten::gelu", lambda x: torch.nn.functional.gelu(x, approximate="tanh")),
        ("aten::silu", torch.nn.functional.silu),
        ("aten::mish", torch.nn.functional.mish),
        ("aten::hardswish", torch.nn.functional.hardswish),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_a_shifted_activation_is_never_negative(name, function, dtype):
    x = torch.linspace(-20, 20, 400_001, dtype=torch.float64).to(dtype)
    assert (function(x).double() + LOWER_BOUNDS[name]).min() >= 0


@pytest.mark.parametrize("smooth", [None, torch.rand(K) + 0.5])
def test_a_shift_of_activations_that_stay_floats_cancels(smooth):
    generator = torch.Generator().manual_seed(0)
    x, weight = (torch.randn(n, K, dtype=torch.float64, generator=generator) for n in (7, 12))
    a = None if smooth is None else smooth.double()
    bias = -0.25 * (weight.sum(1) if a is None else weight @ a)
    options = {"weight_format": "none", "smooth": a}
    shifted = gw.lowrank_linear(x, weight, None, None, None, bias, act_shift=0.25, **options)
    assert torch.allclose(shifted, gw.lowrank_linear(x, weight, None, None, None, None, **options), atol=1e-12)


def test_bits_of_a_weight_are_those_of_what_is_stored():
    for name in ("int4-g64", "int8-channel", "nvfp4", "mxfp8"):
        each = replace(problem(layers=(128,)), branches=((0,),))
        worked = fit(each, Setting(rank=8), Recipe(weight=name, rank=8), refine=0)
        [quantized], [(up, down)] = worked.quantized, worked.branches
        stored = sum(t.nbytes for t in (quantized.codes, quantized.scale, up, down))
        assert 8 * stored / (128 * K) == pytest.approx(bits_of(name, 8, 128, K))


def test_rank_is_lowered_to_what_saves_and_fits():
    assert usable_rank(Recipe(rank=32), 3072, 3072) == (32, "")
    assert usable_rank(Recipe(rank=32), 256, 256)[0] == 24
    assert usable_rank(Recipe(rank=32, max_bits=4.57), 3072, 3072)[0] == 24
    assert usable_rank(Recipe(rank=32), 16, 16) == (0, "a branch of rank 32 is too large for [16, 16], where none is small enough")
    assert usable_rank(Recipe(rank=32), 256, 256)[1] == "a branch of rank 32 is too large for [256, 256], where 24 is the most"


def test_scales_and_branches_have_16_bits():
    assert [stored_dtype(each) for each in (torch.float64, torch.float32, torch.float16)] == [torch.bfloat16] * 2 + [torch.float16]
    assert all(form.bits in (4, 6, 8) for form in FORMATS.values())
