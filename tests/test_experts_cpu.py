"""`gw.token_choice_moe` and `gw.grouped_mm` on CPUs: the kernels against the operators' bodies in float64, and against plain loops."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from graphwright.codegen.cpu_kernels import KERNELS
from graphwright.ir.ops.experts import ACTIVATIONS
from graphwright.tests import expert_oracles

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
    tokens, k, experts, depth, inner = (draw(st.integers(1, high)) for high in (40, 3, 9, 37, 21))
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
