"""`gw.token_choice_moe` and `gw.grouped_mm` on CPUs: the kernels against the operators' bodies in float64, and against plain loops."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import graphwright as gw
from graphwright.codegen import cpu_packed
from graphwright.codegen.cpu_kernels import KERNELS
from graphwright.codegen.experts.packed import EveryExpert, PackedEveryExpert, PackedExperts, PackedTokenChoice, packed_experts
from graphwright.ir.ops.experts import ACTIVATIONS
from graphwright.runtime.probe import Probe
from graphwright.tests import expert_oracles
from graphwright.tests.moe_models import WRITTEN, tokens_of

pytestmark = pytest.mark.usefixtures("one_thread")
moe, grouped = torch.ops.gw.token_choice_moe.default, torch.ops.gw.grouped_mm.default
# float32: sums of a few dozen products; bfloat16: a rounding of each layer's result to 8 bits, twice.
CLOSE = {
    torch.float32: {"atol": 5e-6, "rtol": 5e-6},
    torch.float64: {"atol": 1e-12, "rtol": 1e-12},
    torch.bfloat16: {"atol": 0.05, "rtol": 0.03},
}
dtypes = st.sampled_from(list(CLOSE))


@st.composite
def calls(draw, dtype):
    """Operands of a call at random: experts without tokens, one token, sizes that fit no vector."""
    tokens, k, experts, depth, inner = (draw(st.integers(1, high)) for high in (90, 3, 9, 37, 21))
    chance = torch.Generator().manual_seed(draw(st.integers(0, 10**6)))
    chosen = torch.randint(0, draw(st.integers(1, experts)), (tokens, k), generator=chance)
    x, weight, gate_up, down = (
        torch.randn(*shape, generator=chance)
        for shape in ((tokens, depth), (tokens, k), (experts, 2 * inner, depth), (experts, depth, inner))
    )
    scaled = x, weight, gate_up / depth**0.5, down / inner**0.5
    x, weight, gate_up, down = (each.to(dtype) for each in scaled)
    if draw(st.booleans()):  # experts laid out as transformers' "transposed" ones
        gate_up, down = (each.transpose(1, 2).contiguous().transpose(1, 2) for each in (gate_up, down))
    return x, chosen, weight, gate_up, down


@given(data=st.data(), dtype=dtypes, activation=st.sampled_from(list(ACTIVATIONS)))
@settings(max_examples=80)
def test_token_choice_is_its_body_in_float64_and_the_loop(data, dtype, activation):
    x, index, weight, gate_up, down = data.draw(calls(dtype))
    combine = data.draw(st.sampled_from([dtype, torch.float32 if dtype == torch.bfloat16 else dtype]))
    y = KERNELS[moe](x, index, weight, gate_up, down, activation=activation, combine_dtype=combine)
    wide = [each.double() if each.is_floating_point() else each for each in (x, index, weight, gate_up, down)]
    body = moe(*wide, activation=activation, combine_dtype=torch.float64)
    assert y.dtype == dtype and y.is_contiguous()
    torch.testing.assert_close(body, expert_oracles.token_choice(*wide, activation), **CLOSE[torch.float64])
    torch.testing.assert_close(y.double(), body, **CLOSE[dtype])


@pytest.mark.parametrize("wrong", [-1, 4])
@pytest.mark.parametrize("tokens", [1, 20])
def test_an_expert_that_is_not_there_is_an_error(wrong, tokens):
    x, index = torch.randn(tokens, 8), torch.zeros(tokens, 2, dtype=torch.int64)
    index[-1, -1] = wrong
    with pytest.raises(IndexError, match=f"a token chose expert {wrong} of 4"):
        KERNELS[moe](
            x, index, torch.ones(tokens, 2), torch.randn(4, 12, 8), torch.randn(4, 8, 6), activation="silu", combine_dtype=torch.float32
        )


@pytest.mark.parametrize("wrong", [-1, 4])
def test_the_body_has_no_expert_that_is_not_there(wrong):
    x, index = torch.randn(3, 8), torch.tensor([[0, 1], [2, 3], [0, wrong]])
    with pytest.raises(IndexError, match="out of bounds for dimension 0 with size 4"):
        moe(x, index, torch.ones(3, 2), torch.randn(4, 12, 8), torch.randn(4, 8, 6), activation="silu", combine_dtype=torch.float32)


def test_no_tokens_give_no_rows():
    nothing = torch.empty(0, 2, dtype=torch.int64)
    for call in (moe, KERNELS[moe]):
        y = call(
            torch.empty(0, 8),
            nothing,
            torch.empty(0, 2),
            torch.randn(4, 12, 8),
            torch.randn(4, 8, 6),
            activation="silu",
            combine_dtype=torch.float32,
        )
        assert y.shape == (0, 8)


@given(data=st.data(), dtype=dtypes)
@settings(max_examples=40)
def test_grouped_products_are_their_body_and_the_loop_over_rows(data, dtype):
    rows, groups, depth, width = (data.draw(st.integers(1, high)) for high in (20, 5, 17, 13))
    ends = torch.tensor(sorted(data.draw(st.lists(st.integers(0, rows), min_size=groups, max_size=groups))), dtype=torch.int32)
    x, weight = torch.randn(rows, depth).to(dtype), torch.randn(groups, depth, width).to(dtype)
    expected = torch.zeros(rows, width, dtype=torch.float64)
    start = 0
    for g, end in enumerate(ends.tolist()):
        expected[start:end] = x[start:end].double() @ weight[g].double()
        start = end
    torch.testing.assert_close(grouped(x.double(), weight.double(), ends), expected, **CLOSE[torch.float64])
    for y in (grouped(x, weight, ends), KERNELS[grouped](x, weight, ends)):
        torch.testing.assert_close(y.double(), expected, atol=8 * CLOSE[dtype]["atol"], rtol=CLOSE[dtype]["rtol"])  # sums of 17 products


# --- packed weights ------------------------------------------------------------------------------------------------------------------

needs_onednn = pytest.mark.skipif(not cpu_packed.is_available(), reason="this torch has no oneDNN")


@needs_onednn
@given(data=st.data(), dtype=st.sampled_from([torch.float32, torch.bfloat16]), activation=st.sampled_from(list(ACTIVATIONS)))
@settings(max_examples=40)
def test_experts_on_packed_weights_are_the_body_in_float64(data, dtype, activation):
    x, index, weight, gate_up, down = data.draw(calls(dtype))
    call = PackedTokenChoice(index, down, activation=activation, combine_dtype=torch.float32)
    call.both = tuple(cpu_packed.Pack(each, call.lay_out) for each in (gate_up, down))
    wide = [each.double() if each.is_floating_point() else each for each in (x, index, weight, gate_up, down)]
    body = moe(*wide, activation=activation, combine_dtype=torch.float64)
    torch.testing.assert_close(call(x, index, weight, gate_up, down).double(), body, **CLOSE[dtype])


@pytest.fixture
def onednn_wins(monkeypatch):
    """Every question that is asked has the last way for an answer."""
    monkeypatch.setattr(Probe, "fastest", lambda self, kind, question, ways: list(ways)[-1])


@needs_onednn
def test_a_tuned_model_packs_its_experts_and_follows_writes_to_their_weights(onednn_wins):
    model, tokens = WRITTEN["matmul"](), tokens_of()
    compiled = gw.compile(model, "regroup-experts", example_inputs=(tokens,), backend="tuned", cache=False)

    def agrees():
        # float32 sums in another order, through two layers
        torch.testing.assert_close(compiled(tokens), model(tokens), atol=1e-5, rtol=1e-5)

    agrees()
    calls = [node.target for node in compiled._present.executor._lowered.nodes if isinstance(node.target, PackedExperts)]
    assert len(calls) == 2
    weight = model.blocks[0].down
    assert {pack.nbytes for call in calls for pack in call.packs} == {weight.nbytes, 2 * weight.nbytes}
    with torch.no_grad():
        weight.mul_(2)
    agrees()


@pytest.mark.parametrize("backend", ["inductor", "tuned"])
def test_a_regrouped_model_runs_on_every_backend_as_it_did(backend):
    model = WRITTEN["matmul"]()
    for tokens in (tokens_of(), tokens_of(1, 1)):
        compiled = gw.compile(model, "regroup-experts", example_inputs=(tokens,), backend=backend, cache=False)
        torch.testing.assert_close(compiled(tokens), model(tokens), atol=1e-5, rtol=1e-5)


@needs_onednn
@given(data=st.data(), dtype=st.sampled_from([torch.float32, torch.bfloat16]), activation=st.sampled_from(list(ACTIVATIONS)))
@settings(max_examples=25)
def test_each_expert_on_every_token_is_the_body_in_float64(data, dtype, activation):
    x, index, weight, gate_up, down = data.draw(calls(dtype))
    call = PackedTokenChoice(index, down, activation=activation, combine_dtype=torch.float32)
    call.both = tuple(cpu_packed.Pack(each, call.lay_out) for each in (gate_up, down))
    wide = [each.double() if each.is_floating_point() else each for each in (x, index, weight, gate_up, down)]
    body = moe(*wide, activation=activation, combine_dtype=torch.float64)
    for form in (EveryExpert, PackedEveryExpert):
        torch.testing.assert_close(form.like(call)(x, index, weight, gate_up, down).double(), body, **CLOSE[dtype])


@needs_onednn
@pytest.mark.parametrize(("experts", "k", "names"), [(4, 2, ["dense", "onednn dense"]), (4, 4, ["dense", "onednn dense"]), (5, 2, [])])
def test_every_expert_on_every_token_is_tried_where_tokens_choose_half_of_them(experts, k, names):
    index, down = torch.zeros(3, k, dtype=torch.int64), torch.randn(experts, 8, 6)
    call = PackedTokenChoice(index, down, activation="silu", combine_dtype=torch.float32)
    assert list(call.others()) == names and all(other.others() == {} for other in call.others().values())


@needs_onednn
@pytest.mark.parametrize(("way", "packs"), [("dense", 0), ("onednn dense", 2)])
def test_a_tuned_model_runs_every_expert_where_that_wins(monkeypatch, way, packs):
    def fastest(self, kind, question, ways):
        for call in ways.values():
            call()
        return way if way in ways else next(iter(ways))

    monkeypatch.setattr(Probe, "fastest", fastest)
    monkeypatch.setattr(Probe, "known", lambda self, kind, question: None)
    model, tokens = WRITTEN["matmul"](), tokens_of()
    compiled = gw.compile(model, "regroup-experts", example_inputs=(tokens,), backend="tuned", cache=False)
    torch.testing.assert_close(compiled(tokens), model(tokens), atol=1e-5, rtol=1e-5)  # float32 sums in another order, through two layers
    forms = [node.target for node in compiled._present.executor._lowered.nodes if isinstance(node.target, PackedExperts)]
    assert [str(each) for each in forms] == [str(EveryExpert.like(each) if packs == 0 else PackedEveryExpert.like(each)) for each in forms]
    assert [len(each.packs) for each in forms] == [packs] * 2


@needs_onednn
def test_what_an_expert_makes_of_a_token_that_did_not_choose_it_is_left_out():
    x, index, weight = torch.tensor([[1.0, 2.0], [float("inf"), 1.0]]), torch.tensor([[0], [1]]), torch.ones(2, 1)
    gate_up, down = torch.ones(2, 4, 2), torch.ones(2, 2, 2)
    call = EveryExpert.like(PackedTokenChoice(index, down, activation="relu", combine_dtype=torch.float32))
    assert call(x, index, weight, gate_up, down)[0].isfinite().all()
    with pytest.raises(IndexError, match="a token chose expert -1 of 2"):
        call(x, index - 1, weight, gate_up, down)


@needs_onednn
def test_what_has_no_packed_form_is_left_to_its_kernel():
    program = gw.capture(WRITTEN["matmul"](torch.float64), (tokens_of(),))
    made = gw.PassManager([gw.RegroupExperts()]).run(program).program
    assert [packed_experts(node) for node in made.main.calls if node.target is moe] == [None, None]
