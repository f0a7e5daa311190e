"""`gw.expert_choice` and `gw.expert_mlp` on CPUs: the kernels against the operators' bodies, picks bit for bit, and in programs."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import graphwright as gw
from graphwright.codegen import cpu_packed
from graphwright.codegen.cpu_kernels import KERNELS
from graphwright.codegen.experts.packed import PackedExpertChoice
from graphwright.ir.ops.experts import ACTIVATIONS, RULES
from graphwright.ir.workspace import experts as workspace
from graphwright.runtime.probe import Probe

pytestmark = pytest.mark.usefixtures("one_thread")
needs_onednn = pytest.mark.skipif(not cpu_packed.is_available(), reason="this torch has no oneDNN")
choice, mlp = torch.ops.gw.expert_choice.default, torch.ops.gw.expert_mlp.default
# float32: sums of a few dozen products; bfloat16: a rounding of each layer's result to 8 bits, twice.
CLOSE = {
    torch.float32: {"atol": 5e-6, "rtol": 5e-6},
    torch.float64: {"atol": 1e-12, "rtol": 1e-12},
    torch.bfloat16: {"atol": 0.05, "rtol": 0.03},
}


@st.composite
def routings(draw, dtype):
    """Logits of which many are equal, zeros of both signs among them, and perhaps padding and capacities of rows."""
    batch, length, experts = (draw(st.integers(1, high)) for high in (3, 40, 9))
    chance = torch.Generator().manual_seed(draw(st.integers(0, 10**6)))
    logits = torch.randn(batch, length, experts, generator=chance)
    if draw(st.booleans()):
        logits = logits.round() * torch.tensor(-1.0).pow(torch.randint(0, 2, logits.shape, generator=chance))
    valid = torch.rand(batch, length, generator=chance) < 0.7 if draw(st.booleans()) else None
    rows = torch.randint(0, length + 1, (batch,), generator=chance) if draw(st.booleans()) else None
    return logits.to(dtype), valid, rows, draw(st.integers(0, length))


@given(data=st.data(), dtype=st.sampled_from(list(CLOSE)), rule=st.sampled_from(list(RULES)), key=st.sampled_from([None, "prob", "logit"]))
@settings(max_examples=150)
def test_choices_are_those_of_the_stable_sort_bit_for_bit(data, dtype, rule, key):
    logits, valid, rows, capacity = data.draw(routings(dtype))
    options = {"capacity": capacity, "rule": rule, "key": key}
    for got, expected in zip(KERNELS[choice](logits, valid, rows, **options), choice(logits, valid, rows, **options), strict=True):
        assert torch.equal(got, expected)


def test_what_is_no_number_comes_first_and_infinities_at_the_ends():
    logits = torch.tensor([0.0, float("inf"), -float("nan"), float("nan"), -float("inf"), 1e-45, -1e-45]).reshape(1, 7, 1)
    options = {"capacity": 7, "rule": "post", "key": "logit"}
    index, expected = (kernel(logits, None, None, **options)[0] for kernel in (KERNELS[choice], choice))
    assert index.flatten().tolist() == expected.flatten().tolist() == [2, 3, 1, 5, 0, 6, 4]


@st.composite
def calls(draw, dtype):
    """Operands at random: empty slots, whole experts without tokens, sizes that fit no vector."""
    batch, length, experts, depth, inner = (draw(st.integers(1, high)) for high in (3, 20, 9, 37, 21))
    capacity = draw(st.integers(1, length))
    chance = torch.Generator().manual_seed(draw(st.integers(0, 10**6)))
    index = torch.rand(batch, experts, length, generator=chance).argsort(-1)[..., :capacity]
    if draw(st.booleans()):
        index = index.masked_fill(torch.rand(index.shape, generator=chance) < 0.4, -1)
    x, gate_up, down = (
        torch.randn(*shape, generator=chance) / shape[-1] ** 0.5
        for shape in ((batch, length, depth), (experts, 2 * inner, depth), (experts, depth, inner))
    )
    return (x * depth**0.5).to(dtype), index, torch.rand(index.shape, generator=chance), gate_up.to(dtype), down.to(dtype)


@given(data=st.data(), dtype=st.sampled_from(list(CLOSE)), activation=st.sampled_from(list(ACTIVATIONS)), at_once=st.integers(1, 4))
@settings(max_examples=80)
def test_experts_are_the_body_in_float64_however_many_run_at_once(data, dtype, activation, at_once):
    x, index, gate, gate_up, down = data.draw(calls(dtype))
    with pytest.MonkeyPatch.context() as patch:
        size = index.shape[0] * index.shape[2] * gate_up.size(1) * x.element_size()
        patch.setattr(workspace, "BYTES_AT_ONCE", at_once * size)
        y = KERNELS[mlp](x, index, gate, gate_up, down, activation=activation)
    body = mlp(x.double(), index, gate.double(), gate_up.double(), down.double(), activation=activation)
    assert y.dtype == dtype and y.is_contiguous()
    torch.testing.assert_close(y.double(), body, **CLOSE[dtype])


@needs_onednn
@given(data=st.data(), dtype=st.sampled_from([torch.float32, torch.bfloat16]), activation=st.sampled_from(list(ACTIVATIONS)))
@settings(max_examples=40)
def test_experts_on_packed_weights_are_the_body_in_float64(data, dtype, activation):
    x, index, gate, gate_up, down = data.draw(calls(dtype))
    call = PackedExpertChoice(index, down, activation=activation)
    call.both = tuple(cpu_packed.Pack(each, call.lay_out) for each in (gate_up, down))
    body = mlp(x.double(), index, gate.double(), gate_up.double(), down.double(), activation=activation)
    y = call(x, index, gate, gate_up, down)
    assert y.dtype == dtype
    torch.testing.assert_close(y.double(), body, **CLOSE[dtype])


@needs_onednn
def test_a_tuned_model_packs_experts_that_choose(monkeypatch):
    monkeypatch.setattr(Probe, "fastest", lambda self, kind, question, ways: ([way() for way in ways.values()], list(ways)[-1])[1])
    module, args, _ = gw.models.load("moe_dlm", "tiny")
    tuned, plain = (
        gw.compile(module, "regroup-experts,expert-choice", example_inputs=args, backend=backend, cache=False)
        for backend in ("tuned", "aten")
    )
    # float32 sums in another order, through two layers and a head
    torch.testing.assert_close(tuned(*args), plain(*args), atol=1e-4, rtol=1e-4)
    calls = [node.target for node in tuned._present.executor._lowered.nodes if isinstance(node.target, PackedExpertChoice)]
    assert len(calls) == 2 and all(len(call.packs) == 2 for call in calls)


@needs_onednn
def test_no_slots_give_zeros_on_packed_weights():
    x, gate_up, down = torch.randn(2, 3, 4), torch.randn(5, 12, 4), torch.randn(5, 4, 6)
    index = torch.empty(2, 5, 0, dtype=torch.int64)
    call = PackedExpertChoice(index, down, activation="silu")
    call.both = tuple(cpu_packed.Pack(each, call.lay_out) for each in (gate_up, down))
    assert torch.equal(call(x, index, torch.empty(2, 5, 0), gate_up, down), torch.zeros_like(x))


def test_nothing_of_an_empty_slot_reaches_a_result():
    x = torch.full((1, 3, 4), float("nan"))
    x[0, 1] = 1.0
    weights = torch.ones(2, 6, 4), torch.ones(2, 4, 3)
    index = torch.tensor([[[1, -1], [-1, -1]]])
    y = KERNELS[mlp](
        x, index, torch.full((1, 2, 2), float("inf")).masked_fill(index < 0, float("inf")).clamp(max=1.0), *weights, activation="relu"
    )
    assert y[0, [0, 2]].abs().max() == 0 and y[0, 1].isfinite().all()


def test_a_position_behind_the_sequence_is_an_error():
    with pytest.raises(IndexError, match="an expert takes position 3 of 3"):
        KERNELS[mlp](
            torch.zeros(1, 3, 4), torch.tensor([[[3]]]), torch.ones(1, 1, 1), torch.zeros(1, 6, 4), torch.zeros(1, 4, 3), activation="silu"
        )


def test_two_runs_are_bit_for_bit_the_same_and_a_row_is_what_it_is_alone():
    x, logits = torch.randn(3, 64, 16), torch.randn(3, 64, 8).round()
    weights = torch.randn(8, 24, 16), torch.randn(8, 16, 12)

    def layer(rows):
        index, gate = KERNELS[choice](logits[rows], None, None, capacity=20, rule="post")
        return KERNELS[mlp](x[rows], index, gate, *weights, activation="silu")

    whole = layer(slice(None))
    assert torch.equal(whole, layer(slice(None)))
    torch.testing.assert_close(layer([1])[0], whole[1], rtol=1e-5, atol=1e-4)  # values of tens; other products for fewer rows


def test_programs_run_by_the_kernels():
    module, args, _ = gw.models.load("moe_dlm", "tiny")
    ran = []
    with pytest.MonkeyPatch.context() as patch:
        for target in (choice, mlp):
            kernel = KERNELS[target]
            patch.setitem(KERNELS, target, lambda *a, kernel=kernel, **k: (ran.append(kernel), kernel(*a, **k))[1])
        compiled = gw.compile(module, "regroup-experts,expert-choice", example_inputs=args, backend="aten", cache=False)
        compiled(*args)
    assert ran == [KERNELS[choice], KERNELS[mlp]] * 2
