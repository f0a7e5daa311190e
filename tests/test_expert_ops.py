"""`gw.token_choice_moe`, `gw.expert_choice` and `gw.expert_mlp` against loops over tokens and experts, and the properties of routing by
experts (expert_choice.md, section 6)."""

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import graphwright as gw
from graphwright.ir import ops  # noqa: F401  (declares the operators)
from graphwright.ir.float64 import to_float64
from graphwright.ir.ops.experts import ACTIVATIONS, RULES
from graphwright.ir.run import run
from graphwright.tests import expert_oracles

pytestmark = pytest.mark.usefixtures("one_thread")
op = torch.ops.gw
NAN = float("nan")
# The sum of a few dozen float32 products of numbers around 1, in another order; section 6, property 3.
CLOSE = {"atol": 5e-6, "rtol": 5e-6}
KEYS = (None, "prob", "logit")


@dataclass
class Layer:
    """Experts and tokens at random; `shift` moves all logits of a token."""

    batch: int = 2
    length: int = 7
    depth: int = 6
    inner: int = 5
    experts: int = 4
    k: int = 2
    seed: int = 0

    def __post_init__(self) -> None:
        self.draw = torch.Generator().manual_seed(self.seed)
        self.x = self.normal(self.batch, self.length, self.depth)
        self.logits = self.normal(self.batch, self.length, self.experts)
        self.gate_up = self.normal(self.experts, 2 * self.inner, self.depth)
        self.down = self.normal(self.experts, self.depth, self.inner)

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.draw)

    @property
    def weights(self) -> tuple[Tensor, Tensor]:
        return self.gate_up, self.down

    def valid(self) -> Tensor:
        """Real tokens on the left, padding behind; at least one row has none."""
        counts = torch.randint(0, self.length + 1, (self.batch, 1), generator=self.draw)
        return torch.arange(self.length) < counts

    def capacity_rows(self, capacity: int) -> Tensor:
        return torch.randint(0, capacity + 1, (self.batch,), generator=self.draw)

    def run(self, capacity: int, rule: str = "orig", key: str | None = None, valid: Tensor | None = None) -> Tensor:
        index, gate = op.expert_choice(self.logits, valid, None, capacity=capacity, rule=rule, key=key)
        return op.expert_mlp(self.x, index, gate, *self.weights, activation="silu")


layers = st.builds(
    Layer,
    batch=st.integers(1, 3), length=st.integers(1, 9), depth=st.integers(1, 7), inner=st.integers(1, 6), experts=st.integers(1, 6),
    seed=st.integers(0, 10**6),
)  # fmt: skip
rules = st.sampled_from(list(RULES))


# --- tokens that choose experts -------------------------------------------------------------------------------------------------


@given(tokens=st.integers(1, 9), k=st.integers(1, 4), layer=layers, activation=st.sampled_from(list(ACTIVATIONS)))
@settings(max_examples=60)
def test_token_choice_is_the_loop_over_tokens_and_choices(tokens: int, k: int, layer: Layer, activation: str) -> None:
    x, weight = layer.normal(tokens, layer.depth), layer.normal(tokens, k)
    index = torch.randint(0, layer.experts, (tokens, k), generator=layer.draw)  # experts without tokens, and chosen twice, are among them
    y = op.token_choice_moe(x, index, weight, *layer.weights, activation=activation, combine_dtype=torch.float32)
    torch.testing.assert_close(y.double(), expert_oracles.token_choice(x, index, weight, *layer.weights, activation), **CLOSE)


@pytest.mark.parametrize("combine", [torch.float32, torch.bfloat16])
def test_token_choice_sums_in_the_dtype_that_it_is_told(combine: torch.dtype) -> None:
    # Weights of which 1/4 of the last bfloat16 place is lost in bfloat16, and is not in float32.
    index, weight = torch.tensor([[0, 1]]), torch.tensor([[1.0, 2.0**-9]])
    identity = torch.ones(2, 1, 1, dtype=torch.bfloat16)
    x = torch.ones(1, 1, dtype=torch.bfloat16)
    both = torch.ones(2, 2, 1, dtype=torch.bfloat16)
    both[1, 1] = 0.5 * 2.0**8
    y = op.token_choice_moe(x, index, weight, both, identity, activation="relu", combine_dtype=combine)
    assert y.dtype == torch.bfloat16
    expected = (torch.tensor([1.0, 128.0]).to(combine) * weight[0].to(combine)).sum().to(torch.bfloat16)
    assert y.item() == expected.item()


def test_an_expert_that_a_token_did_not_choose_does_not_reach_it() -> None:
    layer = Layer(batch=1)
    layer.gate_up[3] = float("inf")
    index, weight = torch.zeros(7, 2, dtype=torch.int64), layer.normal(7, 2)
    assert op.token_choice_moe(layer.x[0], index, weight, *layer.weights, activation="silu", combine_dtype=torch.float32).isfinite().all()


# --- experts that choose tokens -------------------------------------------------------------------------------------------------


@given(layer=layers, rule=rules, key=st.sampled_from(KEYS), masks=st.sampled_from(["none", "valid", "rows", "both"]), data=st.data())
@settings(max_examples=60)
def test_expert_choice_is_the_loop_over_rows_and_experts(layer: Layer, rule: str, key: str | None, masks: str, data: Any) -> None:
    capacity = data.draw(st.integers(0, layer.length))
    valid = layer.valid() if masks in ("valid", "both") else None
    rows = layer.capacity_rows(capacity) if masks in ("rows", "both") else None
    index, gate = op.expert_choice(layer.logits, valid, rows, capacity=capacity, rule=rule, key=key)
    expected_index, expected_gate = expert_oracles.expert_choice(layer.logits, valid, rows, capacity, rule, key)
    assert torch.equal(index, expected_index)
    assert gate.dtype == torch.float32
    torch.testing.assert_close(gate.double(), expected_gate, **CLOSE)
    y = op.expert_mlp(layer.x, index, gate, *layer.weights, activation="silu")
    torch.testing.assert_close(y.double(), expert_oracles.expert_mlp(layer.x, index, gate, *layer.weights, "silu"), **CLOSE)


@given(layer=layers, rule=rules, data=st.data())
def test_every_expert_holds_its_capacity_and_a_smaller_one_is_a_prefix(layer: Layer, rule: str, data: Any) -> None:
    capacity = data.draw(st.integers(0, layer.length - 1))
    valid = layer.valid()
    index, more = (op.expert_choice(layer.logits, valid, None, capacity=c, rule=rule)[0] for c in (capacity, capacity + 1))
    assert torch.equal(more[..., :capacity], index)
    for b in range(layer.batch):
        for e in range(layer.experts):
            live = [s for s in index[b, e].tolist() if s >= 0]
            assert len(live) == min(capacity, int(valid[b].sum())) == len(set(live))


@given(layer=layers)
def test_a_capacity_of_all_tokens_is_the_mixture_of_all_experts(layer: Layer) -> None:
    everyone = torch.arange(layer.experts).expand(layer.batch * layer.length, -1)
    sigmoid = layer.logits.sigmoid()
    mixtures = {"orig": layer.logits.softmax(-1), "post": layer.logits.softmax(-1), "sigmoid": sigmoid / sigmoid.sum(-1, keepdim=True)}
    for rule, mixture in mixtures.items():
        x, weight = layer.x.flatten(0, 1), mixture.flatten(0, 1)
        dense = op.token_choice_moe(x, everyone, weight, *layer.weights, activation="silu", combine_dtype=torch.float32)
        torch.testing.assert_close(layer.run(layer.length, rule), dense.reshape(layer.x.shape), **CLOSE)


@given(layer=layers, rule=rules, data=st.data())
def test_a_permutation_of_the_tokens_of_a_row_permutes_the_result_bit_for_bit(layer: Layer, rule: str, data: Any) -> None:
    capacity = data.draw(st.integers(0, layer.length))
    order = torch.tensor(data.draw(st.permutations(range(layer.length))), dtype=torch.int64)
    options = {"capacity": capacity, "rule": rule, "key": "logit"}  # random logits have no ties, probabilities of one expert have
    index, gate = op.expert_choice(layer.logits, None, None, **options)
    moved, moved_gate = op.expert_choice(layer.logits[:, order], None, None, **options)
    assert torch.equal(order[moved], index)
    # ATen rounds a sigmoid behind the last whole vector of a tensor in another way.
    torch.testing.assert_close(moved_gate, gate, atol=0, rtol=2.0**-21)
    y = op.expert_mlp(layer.x, index, gate, *layer.weights, activation="silu")
    assert torch.equal(op.expert_mlp(layer.x[:, order], moved, gate, *layer.weights, activation="silu"), y[:, order])


@given(layer=layers, rule=rules, data=st.data())
def test_the_order_of_experts_does_not_matter(layer: Layer, rule: str, data: Any) -> None:
    capacity = data.draw(st.integers(0, layer.length))
    order = torch.tensor(data.draw(st.permutations(range(layer.experts))), dtype=torch.int64)
    before = layer.run(capacity, rule, "logit")
    layer.logits, layer.gate_up, layer.down = layer.logits[..., order], layer.gate_up[order], layer.down[order]
    # Sums over experts are in another order.
    torch.testing.assert_close(layer.run(capacity, rule, "logit"), before, **CLOSE)


@pytest.mark.parametrize("rule", RULES)
def test_a_row_does_not_depend_on_the_rows_beside_it(rule: str) -> None:
    layer = Layer(batch=3)

    def differs(one_pool: bool) -> bool:
        """Whether row 0 changes with row 1."""
        shape = (1, 3 * layer.length, -1) if one_pool else (3, layer.length, -1)
        results = []
        for scale in (1.0, 5.0):
            x, logits = layer.x.clone(), layer.logits.clone()
            x[1], logits[1] = x[1] * scale, logits[1] * scale
            index, gate = op.expert_choice(logits.reshape(shape), None, None, capacity=3 * (3 if one_pool else 1), rule=rule, key="logit")
            y = op.expert_mlp(x.reshape(shape), index, gate, *layer.weights, activation="silu")
            results.append(y.reshape(3, layer.length, -1)[0])
        return not torch.equal(*results)

    assert not differs(one_pool=False)
    assert differs(one_pool=True), "a pool over all rows is the control: there the check must fail"


@given(layer=layers, rule=rules, key=st.sampled_from(KEYS), data=st.data())
def test_gates_of_a_token_sum_to_one_and_untouched_tokens_get_zero(layer: Layer, rule: str, key: str | None, data: Any) -> None:
    capacity = data.draw(st.integers(0, layer.length))
    index, gate = op.expert_choice(layer.logits, None, None, capacity=capacity, rule=rule, key=key)
    sums, taken = torch.zeros(layer.batch, layer.length), torch.zeros(layer.batch, layer.length, dtype=torch.bool)
    for b in range(layer.batch):
        for s in range(layer.length):
            sums[b, s], taken[b, s] = gate[b][index[b] == s].sum(), (index[b] == s).any()
    rounding = 1e-6  # of a sum of six float32 numbers below 1
    assert (sums[taken] <= 1 + rounding).all()
    if rule != "orig":
        assert ((sums[taken] - 1).abs() <= rounding).all()
    y = op.expert_mlp(layer.x, index, gate, *layer.weights, activation="silu")
    assert (y[~taken] == 0).all()
    assert torch.equal((layer.x + y)[~taken], layer.x[~taken])


@given(layer=layers, rule=rules, data=st.data())
def test_ties_go_to_the_lowest_position_and_runs_are_bit_equal(layer: Layer, rule: str, data: Any) -> None:
    capacity = data.draw(st.integers(0, layer.length))
    layer.logits = torch.randint(-1, 2, layer.logits.shape, generator=layer.draw).float()
    first, second = (op.expert_choice(layer.logits, None, None, capacity=capacity, rule=rule, key="logit") for _ in range(2))
    assert torch.equal(first[0], expert_oracles.expert_choice(layer.logits, None, None, capacity, rule, "logit")[0])
    assert all(map(torch.equal, first, second))
    assert torch.equal(layer.run(capacity, rule), layer.run(capacity, rule))


@given(seed=st.integers(0, 10**6), capacity=st.integers(1, 8))
def test_a_shift_of_all_logits_of_a_token_changes_no_probability_and_no_post_gate(seed: int, capacity: int) -> None:
    layer = Layer(length=8, seed=seed)
    logits = layer.logits.double()  # so that no two keys are near ties
    shifted = logits + layer.normal(layer.batch, layer.length, 1).double() * 3
    for rule in ("orig", "post"):
        (index, gate), (moved, moved_gate) = (
            op.expert_choice(each, None, None, capacity=capacity, rule=rule, key="prob") for each in (logits, shifted)
        )
        assert torch.equal(index, moved)
        torch.testing.assert_close(gate, moved_gate, atol=1e-12, rtol=1e-12)  # float64


def test_a_shift_of_logits_changes_what_the_logit_key_picks() -> None:
    layer = Layer(length=8)
    shifted = layer.logits + 10 * torch.arange(8.0).reshape(1, 8, 1)
    index, moved = (op.expert_choice(each, None, None, capacity=2, rule="post")[0] for each in (layer.logits, shifted))
    assert not torch.equal(index, moved)
    assert (moved == torch.tensor([7, 6])).all()


# --- padding --------------------------------------------------------------------------------------------------------------------


@given(layer=layers, rule=rules, padding=st.integers(1, 5), data=st.data())
def test_a_padded_row_is_the_row_whatever_the_padding_holds(layer: Layer, rule: str, padding: int, data: Any) -> None:
    capacity = data.draw(st.integers(0, layer.length))
    key = data.draw(st.sampled_from(KEYS))
    alone = layer.run(capacity, rule, key)
    poison = data.draw(st.sampled_from([NAN, float("inf"), 1e30]))
    layer.x, layer.logits = (torch.nn.functional.pad(each, (0, 0, 0, padding), value=poison) for each in (layer.x, layer.logits))
    valid = (torch.arange(layer.length + padding) < layer.length).expand(layer.batch, -1)
    at_most = torch.full((layer.batch,), capacity)
    index, gate = op.expert_choice(layer.logits, valid, at_most, capacity=min(capacity + padding, layer.length), rule=rule, key=key)
    assert (index < layer.length).all()
    y = op.expert_mlp(layer.x, index, gate, *layer.weights, activation="silu")
    # Other numbers of rows in a product may sum in another order.
    torch.testing.assert_close(y[:, : layer.length], alone, **CLOSE)
    assert (y[:, layer.length :] == 0).all()


@pytest.mark.parametrize("rule", RULES)
def test_a_row_of_padding_alone_is_zero_and_has_zero_gradients(rule: str) -> None:
    layer = Layer(batch=2)
    layer.x[1], layer.logits[1] = NAN, NAN
    leaves = [each.requires_grad_() for each in (layer.x, layer.logits, layer.gate_up, layer.down)]
    valid = torch.tensor([[True], [False]]).expand(2, layer.length)
    y = layer.run(3, rule, valid=valid)
    assert (y[1] == 0).all() and y.isfinite().all()
    for gradient in torch.autograd.grad(y.square().sum(), leaves):
        assert gradient.isfinite().all()


# --- gradients ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("rule", RULES)
def test_gradients_of_expert_choice_and_experts(rule: str, masked: bool) -> None:
    layer = Layer(length=5, experts=3)
    x, logits, gate_up, down = (each.double().requires_grad_() for each in (layer.x, layer.logits, layer.gate_up, layer.down))
    valid = torch.tensor([[True] * 5, [True] * 2 + [False] * 3]) if masked else None

    def block(x: Tensor, logits: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
        index, gate = op.expert_choice(logits, valid, None, capacity=3, rule=rule)
        return op.expert_mlp(x, index, gate, gate_up, down, activation="silu")

    assert torch.autograd.gradcheck(block, (x, logits, gate_up, down))


def test_gradients_of_token_choice() -> None:
    layer = Layer(batch=1, experts=3)
    index = layer.logits[0].topk(2).indices
    leaves = [each.double().requires_grad_() for each in (layer.x[0], layer.normal(7, 2), layer.gate_up, layer.down)]

    def block(x: Tensor, weight: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
        return op.token_choice_moe(x, index, weight, gate_up, down, activation="gelu_tanh", combine_dtype=torch.float64)

    assert torch.autograd.gradcheck(block, leaves)


def test_a_token_of_one_expert_gives_its_router_no_gradient_but_by_the_original_rule() -> None:
    layer = Layer(batch=1, length=3, experts=3)
    layer.logits = (torch.eye(3) * 4 + 0.1 * layer.normal(3, 3)).unsqueeze(0)  # each expert takes a token of its own
    for rule in RULES:
        logits = layer.logits.clone().requires_grad_()
        index, gate = op.expert_choice(logits, None, None, capacity=1, rule=rule)
        assert sorted(index.flatten().tolist()) == [0, 1, 2]
        y = op.expert_mlp(layer.x, index, gate, *layer.weights, activation="silu")
        (gradient,) = torch.autograd.grad(y.square().sum(), logits)
        # Of the rule "sigmoid" two equal float32 terms are subtracted, each with a rounding of its own.
        assert (gradient.abs() > 1e-2).any() if rule == "orig" else (gradient.abs() <= 1e-5).all()


# --- errors and programs --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rule": "softmax", "capacity": 2}, "rule 'softmax' of expert choice is unknown: it is one of orig, post, sigmoid"),
        ({"rule": "post", "key": "score", "capacity": 2}, "key 'score' of expert choice is unknown: it is one of prob, logit"),
        ({"rule": "post", "capacity": 8}, "an expert takes from 0 to 7 positions of a sequence, not 8"),
        ({"rule": "post", "capacity": -1}, "an expert takes from 0 to 7 positions of a sequence, not -1"),
    ],
)
def test_routing_that_there_is_none_of_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        op.expert_choice(Layer().logits, None, None, **options)


def test_an_unknown_activation_is_refused() -> None:
    layer = Layer(batch=1)
    index, gate = op.expert_choice(layer.logits, None, None, capacity=2, rule="post")
    with pytest.raises(ValueError, match="activation 'mish' of an expert is unknown: it is one of silu, gelu, gelu_tanh, relu"):
        op.expert_mlp(layer.x, index, gate, *layer.weights, activation="mish")


class _Both(torch.nn.Module):
    """Expert choice, and token choice on its result."""

    def __init__(self, layer: Layer):
        super().__init__()
        self.gate_up, self.down = (torch.nn.Parameter(each) for each in layer.weights)

    def forward(self, x: Tensor, logits: Tensor) -> Tensor:
        index, gate = op.expert_choice(logits, None, None, capacity=3, rule="post")
        y = op.expert_mlp(x, index, gate, self.gate_up, self.down, activation="silu")
        weight, chosen = logits.flatten(0, 1).softmax(-1).topk(2)
        options = {"activation": "silu", "combine_dtype": torch.float32}
        return op.token_choice_moe(y.flatten(0, 1), chosen, weight, self.gate_up, self.down, **options).reshape(x.shape)


def test_the_operators_stay_whole_with_a_symbolic_batch_and_have_a_float64_form() -> None:
    layer = Layer()
    module, rows = _Both(layer), {0: torch.export.Dim("b", max=64)}
    program = gw.capture(module, (layer.x, layer.logits), dynamic_shapes={"x": rows, "logits": rows})
    for name in ("expert_choice", "expert_mlp", "token_choice_moe"):
        assert f"gw.{name}.default" in str(program)
    assert str(gw.parse(str(program))) == str(program)
    other = Layer(batch=3, seed=1)
    inputs = [other.x, other.logits]
    assert torch.equal(run(program, inputs)[0][0], module(*inputs))
    wide = to_float64(program)
    assert "combine_dtype=f64" in str(wide)
    exact = run(wide, [each.double() for each in inputs])[0][0]
    torch.testing.assert_close(exact, module(*inputs).double(), atol=2e-5, rtol=2e-5)  # two layers of float32
