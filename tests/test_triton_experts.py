"""Mixtures of experts in Triton's interpreter, against the operators' bodies in float64; their place in a program."""

from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import graphwright as gw
from graphwright.codegen.triton.experts import __main__ as alone
from graphwright.codegen.triton.experts import launch
from graphwright.codegen.triton.experts.__main__ import calls, poisoned
from graphwright.codegen.triton.experts.launch import Tile
from graphwright.ir.ops.experts import ACTIVATIONS
from graphwright.ir.run import run
from graphwright.runtime.executor import Executor
from graphwright.tests.moe_models import WRITTEN, tokens_of

pytestmark = [pytest.mark.filterwarnings("ignore::RuntimeWarning"), pytest.mark.usefixtures("one_thread")]
moe, mlp, grouped = (getattr(torch.ops.gw, name).default for name in ("token_choice_moe", "expert_mlp", "grouped_mm"))
CLOSE = {"rtol": 5e-6, "atol": 5e-6}  # float32 sums of a few dozen products of numbers around 1, in another order
TOKENS = {"activation": "silu", "combine_dtype": torch.float32}


def wide(operands):
    return [x.double() if x.is_floating_point() else x for x in operands]


def operands_of(name, *sizes, dtype=torch.float32):
    return calls("cpu", dtype, *sizes)[["moe", "mlp", "grouped"].index(name)][2]


def test_the_kernels_check_themselves_in_every_dtype(capsys):
    alone.check("cpu")
    assert capsys.readouterr().out.count(" of at most ") == 3 * 2 * 3


@pytest.mark.parametrize("wrong", [lambda y: y * 1.1, lambda y: y * float("nan")], ids=["numbers", "NaN"])
def test_a_kernel_that_is_wrong_fails_its_own_check(monkeypatch, wrong):
    monkeypatch.setattr(launch, "token_choice_moe", lambda x, *a, **k: wrong(moe(x, *a, **k)))
    with pytest.raises(AssertionError, match=r"tiny torch.float32 is off by .*, more than 5e-06"):
        alone.check("cpu")


@settings(max_examples=20)
@given(data=st.data(), activation=st.sampled_from(list(ACTIVATIONS)))
def test_results_are_those_of_the_bodies_whatever_the_sizes(data, activation):
    """Experts without tokens, positions that an expert took twice, weights whose rows are strided, few rows and many."""
    batch, length, experts, k, width, inner = (data.draw(st.integers(1, high)) for high in (3, 40, 9, 3, 40, 40))
    chance = torch.Generator().manual_seed(data.draw(st.integers(0, 10**6)))
    chosen = torch.randint(0, data.draw(st.integers(1, experts)), (batch * length, k), generator=chance)
    taken = torch.randint(-1, length, (batch, experts, data.draw(st.integers(1, length))), generator=chance)
    shapes = (batch, length, width), (experts, 2 * inner, width), (experts, width, inner), chosen.shape, taken.shape
    x, gate_up, down, weight, gate = (torch.randn(*shape, generator=chance) / shape[-1] ** 0.5 for shape in shapes)
    x = x * width**0.5
    if data.draw(st.booleans()):
        gate_up, down = (each.transpose(1, 2).contiguous().transpose(1, 2) for each in (gate_up, down))
    tile = data.draw(st.sampled_from([None, Tile(16, 16, 16, 4, 2)]))
    with pytest.MonkeyPatch.context() if tile else nullcontext() as patch:
        if tile:
            patch.setattr(launch, "tile_of", lambda *a: tile)
        y = poisoned(lambda: launch.token_choice_moe(x.flatten(0, 1), chosen, weight, gate_up, down, **TOKENS | {"activation": activation}))
        z = poisoned(lambda: launch.expert_mlp(x, taken, gate, gate_up, down, activation=activation))
    both = TOKENS | {"activation": activation, "combine_dtype": torch.float64}
    torch.testing.assert_close(y.double(), moe(*wide([x.flatten(0, 1), chosen, weight, gate_up, down]), **both), **CLOSE)
    torch.testing.assert_close(z.double(), mlp(*wide([x, taken, gate, gate_up, down]), activation=activation), **CLOSE)


@settings(max_examples=20)
@given(data=st.data(), dtype=st.sampled_from([torch.int32, torch.int64]))
def test_grouped_products_are_the_body_s_whatever_the_ends(data, dtype):
    rows, groups, depth, width = (data.draw(st.integers(1, high)) for high in (40, 5, 40, 40))
    ends = sorted(data.draw(st.lists(st.integers(-2, rows + 2), min_size=groups, max_size=groups)))
    operands = [torch.randn(rows, depth), torch.randn(groups, depth, width) / depth**0.5, torch.tensor(ends, dtype=dtype)]
    torch.testing.assert_close(poisoned(lambda: launch.grouped_mm(*operands)).double(), grouped(*wide(operands)), **CLOSE)


def test_more_pairs_than_are_sorted_at_a_time_are_sorted():
    x, index, weight, gate_up, down = operands_of("moe", 1, 700, 6, 3, 4, 4)
    assert index.numel() > launch._SORTED
    y = launch.token_choice_moe(x, index, weight, gate_up, down, **TOKENS)
    torch.testing.assert_close(y.double(), moe(*wide([x, index, weight, gate_up, down]), **TOKENS), **CLOSE)


def test_two_calls_are_bit_for_bit_the_same():
    operands = operands_of("mlp", 2, 9, 4, 2, 24, 20)
    assert torch.equal(*(launch.expert_mlp(*operands, activation="silu") for _ in range(2)))


@pytest.mark.parametrize("wrong", [-1, 5, 2**40])
def test_a_token_that_chose_an_expert_that_is_not_there_is_nan_and_no_other(wrong):
    x, index, *rest = operands_of("moe", 1, 20, 5, 2, 24, 20)
    expected = launch.token_choice_moe(x, index, *rest, **TOKENS)
    index = index.clone()
    index[3, 1] = wrong
    y = poisoned(lambda: launch.token_choice_moe(x, index, *rest, **TOKENS))
    others = [t for t in range(20) if t != 3]
    assert y[3].isnan().all() and torch.equal(y[others], expected[others])


def test_nothing_of_an_empty_slot_or_of_one_outside_of_the_sequence_reaches_a_result():
    x, index, gate, *weights = operands_of("mlp", 1, 9, 3, 2, 8, 8)
    index = torch.tensor([[[1, -1, 9], [4, 2**40, 1], [-1, -7, -1]]])
    x[:, [0, 2, 3]] = float("nan")
    gate = torch.tensor([[[0.5, float("inf"), float("nan")], [2.0, float("inf"), 1.0], [float("inf")] * 3]])
    y = poisoned(lambda: launch.expert_mlp(x, index, gate, *weights, activation="silu"))
    seen = index.masked_fill((index < 0) | (index >= 9), -1)
    expected = mlp(x.nan_to_num(), seen, gate.masked_fill(seen < 0, 0.0), *weights, activation="silu")
    torch.testing.assert_close(y, expected, **CLOSE)


def test_infinities_of_a_choice_s_expert_stay_with_its_token():
    x, index, *rest = operands_of("moe", 1, 9, 3, 1, 8, 8)
    x[4] = float("inf")
    y = launch.token_choice_moe(x, index, *rest, **TOKENS)
    assert not y[4].isfinite().any() and y[[t for t in range(9) if t != 4]].isfinite().all()


UNFIT = {
    "rows of another width": lambda o: [o[0][:, :-1], *o[1:]],
    "weights of other experts": lambda o: [*o[:4], o[4][:-1]],
    "fewer choices": lambda o: [o[0], o[1][:-1], *o[2:]],
    "weights of another dtype": lambda o: [*o[:3], o[3].double(), o[4]],
}


@pytest.mark.parametrize("change", UNFIT.values(), ids=UNFIT)
def test_operands_that_do_not_fit_are_the_body_s_error_and_no_other_memory_s_numbers(change):
    with pytest.raises((RuntimeError, IndexError)):
        launch.token_choice_moe(*change(operands_of("moe", 1, 6, 3, 2, 8, 8)), **TOKENS)


def test_what_the_kernels_have_no_form_for_is_left_to_the_bodies():
    for kernel, body, operands in calls("cpu", torch.float64, 1, 6, 3, 2, 8, 8):
        y, expected = kernel(*operands), body(*operands)
        assert y.dtype == torch.float64 and torch.allclose(y, expected, rtol=0, atol=1e-6)  # combined in float32
    x, index, *rest = operands_of("mlp", 1, 6, 3, 2, 8, 8)
    assert torch.equal(launch.expert_mlp(x, index[..., :0], rest[0][..., :0], *rest[1:], activation="relu"), torch.zeros_like(x))


def test_few_rows_have_a_place_each_and_many_no_more_places_than_tiles_need():
    tile = launch.tile_of(1, 2, 2, True, launch.target_of(torch.device("cpu")))
    step = launch._Rows(experts=512, total=8, ends=torch.empty(0), is_even=False)
    assert step.places(tile, fills=False) == 8
    assert replace(step, total=64 * 512).places(replace(tile, m=64), fills=False) == 2 * 512
    assert replace(step, total=64 * 512, is_even=True).places(replace(tile, m=64), fills=False) == 512


@pytest.mark.parametrize("pipeline", ["regroup-experts", "regroup-experts,expert-choice"])
def test_a_program_runs_its_experts_by_the_kernels(pipeline):
    if "choice" in pipeline:
        module, args, _ = gw.models.load("moe_dlm", "tiny")
    else:
        module, args = WRITTEN["matmul"](), (tokens_of(),)
    program = gw.compile(module, pipeline, example_inputs=args, backend="aten", cache=False).program
    executor = Executor(program, backend="triton_interpreter")
    kernel = launch.expert_mlp if "choice" in pipeline else launch.token_choice_moe
    assert [node.target for node in executor._lowered.nodes].count(kernel) == 2
    # float32 sums in another order, through two layers and a head
    torch.testing.assert_close(executor(list(args))[0], run(program, list(args))[0], rtol=1e-4, atol=1e-4)
