"""Programs whose experts take tokens by how much of a row is masked, and the loop that fills masks."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import graphwright as gw
from graphwright.ir.errors import InputError
from graphwright.models import moe_dlm
from graphwright.models.random_weights import draw_weights
from graphwright.passes.experts.capacity import CapacitySchedule

LENGTH, VOCABULARY = 12, 17
MASK = VOCABULARY - 1
CONFIG = moe_dlm.Config(vocabulary=VOCABULARY, dim=16, depth=2, num_heads=2, experts=4, chosen=2, hidden=8, tied=False, length=LENGTH)


def network():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        module = moe_dlm.MoEDLM(CONFIG).eval()
        draw_weights(module)
    return module


def ids(rows, length=LENGTH, seed=0):
    return torch.randint(0, MASK, (rows, length), generator=torch.Generator().manual_seed(seed))


def compiled(*passes, rows=3, **options):
    return gw.compile(network(), ["regroup-experts", *passes], example_inputs=(ids(rows),), backend="aten", cache=False, **options)


@pytest.fixture(scope="module")
def scheduled():
    return compiled(gw.ExpertChoice(schedule=CapacitySchedule(1, 4, "linear")))


@pytest.fixture(scope="module")
def of_k():
    made = {}

    def of(k):
        if k not in made:
            made[k] = compiled(gw.ExpertChoice(k=k))
        return made[k]

    return of


# --- calls -----------------------------------------------------------------------------------------------------------------


@settings(max_examples=10)
@given(st.lists(st.integers(0, LENGTH), min_size=3, max_size=3))
def test_each_row_is_what_the_program_of_its_own_number_of_experts_gives(scheduled, of_k, masked):
    x = ids(3)
    got = scheduled(x, mask_ratio=(masked, LENGTH))
    for row, count in enumerate(masked):
        k = scheduled.program.schedules["expert-choice"] and CapacitySchedule(1, 4, "linear").k(count, LENGTH)
        torch.testing.assert_close(got[row], of_k(k)(x)[row], rtol=1e-5, atol=1e-5)


def test_rows_of_one_ratio_are_bit_for_bit_the_static_program(scheduled, of_k):
    assert torch.equal(scheduled(ids(3), mask_ratio=(4, LENGTH)), of_k(2)(ids(3)))


def test_a_batch_of_any_size_runs_in_groups():
    shapes = {"input_ids": {0: torch.export.Dim("batch", max=64)}}
    model = compiled(gw.ExpertChoice(schedule=[1, 4, "linear"]), dynamic_shapes=shapes)
    x = ids(5)
    got = model(x, mask_ratio=([0, 12, 0, 6, 12], [LENGTH] * 5))
    for row, count in enumerate([0, 12, 0, 6, 12]):
        torch.testing.assert_close(got[row : row + 1], model(x[row : row + 1], mask_ratio=(count, LENGTH)), rtol=1e-5, atol=1e-5)


def test_a_batch_of_no_rows_gives_no_rows_whoever_says_how_much_they_mask():
    shapes = {"input_ids": {0: torch.export.Dim("batch", min=0, max=64)}}
    model = compiled(gw.ExpertChoice(schedule=[1, 4, "linear"]), dynamic_shapes=shapes)
    for ratio in ((0, LENGTH), ([], []), (torch.zeros(0, dtype=torch.int64), LENGTH)):
        assert model(ids(0), mask_ratio=ratio).shape == (0, LENGTH, VOCABULARY)
    with pytest.raises(InputError, match="is a pair"):
        model(ids(0), mask_ratio=3)
    static = compiled(gw.ExpertChoice(), dynamic_shapes=shapes)
    assert static(ids(0)).shape == (0, LENGTH, VOCABULARY)


def test_functions_share_their_weights_and_an_artifact_keeps_the_schedule(scheduled, tmp_path):
    scheduled.save(tmp_path / "model.gw")
    loaded = gw.load(tmp_path / "model.gw", backend="aten")
    ratio = ([0, 5, 12], LENGTH)
    assert torch.equal(loaded(ids(3), mask_ratio=ratio), scheduled(ids(3), mask_ratio=ratio))


def test_a_trainable_one_has_the_gradients_of_each_row_at_its_own_number_of_experts():
    models = [compiled(gw.ExpertChoice(**options), trainable=True) for options in ({"schedule": [1, 4, "linear"]}, {"k": 1}, {"k": 4})]
    scheduled, few, many = models
    x = ids(3)
    scheduled(x, mask_ratio=([0, 12, 0], LENGTH)).square().sum().backward()
    (few(x)[[0, 2]].square().sum() + many(x)[1].square().sum()).backward()
    parts = zip(*(dict(model.named_parameters()).values() for model in models), strict=True)
    for got, a, b in parts:
        expected = sum(each.grad for each in (a, b) if each.grad is not None)
        torch.testing.assert_close(got.grad, expected, rtol=1e-4, atol=1e-3)  # float32 sums of squares of tens


@pytest.mark.parametrize(
    ("ratio", "says"),
    [
        (None, "depends on how much of a row is masked: call it with mask_ratio=.masked, valid."),
        (0.5, "is a pair"),
        ((1, 2, 3), "is a pair"),
        (([1, 2], 12), "for 3 rows: give an integer for all"),
        ((0.5, 12), "give an integer for all"),
        ((13, 12), "0 <= masked <= valid"),
        ((-1, 12), "0 <= masked <= valid"),
        ((0, 0), "at least one valid"),
        ((0, 13), "13 positions are valid, and a row has 12"),
        (([0, 0, True], 12), "give an integer for all"),
        ((torch.zeros(3), 12), "give an integer for all"),
        ((torch.zeros(3, 1, dtype=torch.int64), 12), "give an integer for all"),
        ("12", "is a pair"),
    ],
)
def test_a_call_says_how_much_is_masked(scheduled, ratio, says):
    with pytest.raises(InputError, match=says):
        scheduled(ids(3), **({} if ratio is None else {"mask_ratio": ratio}))


def test_a_model_without_schedule_takes_no_ratio(of_k):
    with pytest.raises(InputError, match="mask_ratio"):
        of_k(2)(ids(3), mask_ratio=(1, LENGTH))


# --- the loop --------------------------------------------------------------------------------------------------------------


class Watched(nn.Module):
    """A network that keeps what it is called with."""

    def __init__(self, inner):
        super().__init__()
        self.inner, self.seen = inner, []

    def forward(self, x):
        self.seen.append(x.clone())
        return self.inner(x)


LOOP = {"mask_id": MASK}


@settings(max_examples=15)
@given(st.sampled_from([(8, 8, 4), (8, 4, 4), (6, 4, 3), (6, 2, 6), (12, 3, 4)]), st.sampled_from([0.0, 1.0]), st.integers(0, 9))
def test_prompts_and_committed_tokens_stay_and_no_mask_is_left(sizes, temperature, seed):
    length, steps, block = sizes
    prompt = ids(2, 3, seed)
    watched = Watched(network())
    result = gw.masked_diffusion_generate(watched, prompt, length, steps=steps, block=block, temperature=temperature, seed=seed, **LOOP)
    assert len(watched.seen) == steps
    for before, after in zip(watched.seen, [*watched.seen[1:], result.tokens], strict=True):
        assert torch.equal(after[before != MASK], before[before != MASK])
        filled = (before == MASK) & (after != MASK)
        quota = filled.sum(1)
        assert torch.equal(quota, quota[:1].expand_as(quota)) and quota[0] > 0
        open_block = 3 + ((before[0] == MASK).nonzero()[0, 0] - 3) // block * block
        assert filled[:, :open_block].sum() == filled[:, open_block + block :].sum() == 0
    assert torch.equal(result.tokens[:, :3], prompt) and not (result.tokens == MASK).any()


def test_the_surest_places_are_filled_with_the_likeliest_tokens():
    def call(x):
        logits = torch.zeros(1, 4, VOCABULARY)
        logits[0, torch.arange(4), torch.tensor([1, 2, 3, 4])] = torch.tensor([1.0, 4.0, 2.0, 3.0])
        logits[..., MASK] = 9.0  # which no place is filled with
        seen.append(x[0].tolist())
        return logits

    seen = []
    result = gw.masked_diffusion_generate(call, torch.empty(1, 0, dtype=torch.int64), 4, steps=3, block=4, **LOOP)
    assert seen == [[MASK] * 4, [MASK, 2, MASK, 4], [MASK, 2, 3, 4]]
    assert result.tokens.tolist() == [[1, 2, 3, 4]] and result.experts == () and result.mean_experts is None


def test_what_is_drawn_depends_on_the_seed_alone():
    first, again, other = (
        gw.masked_diffusion_generate(network(), ids(2, 2), 8, steps=4, block=8, temperature=1.0, seed=seed, **LOOP).tokens
        for seed in (1, 1, 2)
    )
    assert torch.equal(first, again) and not torch.equal(first, other)


def test_a_model_that_is_captured_by_its_first_call_is_told_how_much_is_masked():
    lazy = gw.compile(network(), ["regroup-experts", gw.ExpertChoice(schedule=CapacitySchedule(1, 4))], backend="aten", cache=False)
    with pytest.raises(InputError, match="captured on its first call: call it once, or compile it with example_inputs"):
        gw.masked_diffusion_generate(lazy, ids(3, 4), 8, steps=4, block=8, **LOOP)
    assert lazy(ids(3), mask_ratio=(2, LENGTH)).shape == (3, LENGTH, VOCABULARY)
    assert gw.masked_diffusion_generate(lazy, ids(3, 4), 8, steps=4, block=8, **LOOP).experts


@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_a_constant_schedule_is_the_loop_of_the_static_program_bit_for_bit(of_k, temperature):
    settings = {"steps": 4, "block": 4, "temperature": temperature, **LOOP}
    constant = compiled(gw.ExpertChoice(schedule=CapacitySchedule(3, 3)))
    got, expected = (gw.masked_diffusion_generate(model, ids(3, 4), 8, **settings) for model in (constant, of_k(3)))
    assert torch.equal(got.tokens, expected.tokens) and got.experts == (3,) * 4 and expected.experts == ()


@pytest.mark.parametrize("ratio", ["row", "generation"])
def test_each_step_runs_the_number_of_experts_of_its_true_counts(ratio):
    schedule = CapacitySchedule(1, 4, "linear_reverse", ratio)
    model = compiled(gw.ExpertChoice(schedule=schedule))
    asked = []
    runner = model._present._by_ratio
    groups = runner.groups
    runner.groups = lambda counts, batch: asked.append(counts) or groups(counts, batch)
    result = gw.masked_diffusion_generate(model, ids(3, 4), 8, steps=4, block=8, **LOOP)
    valid = 12 if ratio == "row" else 8
    assert asked == [(masked, valid) for masked in (8, 6, 4, 2)]
    assert result.experts == tuple(schedule.k(*counts) for counts in asked)
    assert result.mean_experts == sum(result.experts) / 4


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"block": 3}, "blocks of 3 do not fill length=8"),
        ({"steps": 3, "block": 4}, "steps=3 do not divide"),
        ({"steps": 16}, "a step fills one place at least"),
        ({"steps": 0}, "steps is an integer from 1 on"),
        ({"temperature": -1.0}, "temperature is a number from 0"),
        ({"temperature": float("nan")}, "temperature is a number from 0"),
        ({"temperature": float("inf")}, "temperature is a number from 0"),
        ({"temperature": "hot"}, "temperature is a number from 0"),
        ({"temperature": None}, "temperature is a number from 0"),
        ({"seed": 0.5}, "seed is an integer"),
        ({"seed": -1}, "seed is an integer"),
        ({"length": 8.0}, "length is an integer from 1 on, not 8.0"),
        ({"block": True}, "block is an integer from 1 on, not True"),
        ({"mask_id": -1}, "mask_id is the id of the mask, an integer from 0 on, not -1"),
        ({"mask_id": 3.0}, "mask_id is the id of the mask"),
        ({"mask_id": VOCABULARY, "network": lambda x: torch.zeros(*x.shape, VOCABULARY)}, "mask_id=17 is no id of the network"),
        ({"network": None}, "network is what gives logits for ids, a module or a function, not NoneType"),
        ({"prompt": [[1, 2]]}, "prompt is a tensor of ids"),
        ({"network": lambda x: None}, "gives NoneType, not logits"),
        ({"network": lambda x: torch.zeros(1, 3, VOCABULARY)}, "not logits"),
        ({"prompt": torch.full((1, 2), MASK)}, "the prompt holds the mask"),
        ({"prompt": torch.zeros(2)}, "prompt is a tensor of ids"),
        ({"network": lambda x: x}, "not logits"),
    ],
)
def test_what_the_loop_cannot_do_is_refused(changed, says):
    call = {"network": network(), "prompt": ids(1, 2), "length": 8, "steps": 4, "block": 8} | LOOP | changed
    with pytest.raises(InputError, match=says):
        gw.masked_diffusion_generate(**call)
