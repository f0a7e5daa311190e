"""`regroup-experts`: every block of every family and form becomes one operation, nothing else does, and what is refused is named."""

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import graphwright as gw
from graphwright.ir.run import run
from graphwright.tests import moe_models
from graphwright.tests.moe_models import CHOSEN, EXPERTS, INNER, LAYERS, TRANSFORMERS, WIDTH, WRITTEN, Dense, Listed, tokens_of

pytestmark = pytest.mark.usefixtures("one_thread")
TOKENS = tokens_of()
MOE = torch.ops.gw.token_choice_moe.default
DTYPES = [torch.float32, torch.bfloat16]
CASES = [(name, form) for name in TRANSFORMERS for form in ("grouped_mm", "batched_mm")] + [(name, None) for name in WRITTEN]


def captured(name: str, form: str | None, dtype: torch.dtype) -> tuple[gw.Program, list[Any]]:
    if name in WRITTEN:
        return gw.capture(WRITTEN[name](dtype), (TOKENS,)), [TOKENS]
    return gw.capture(TRANSFORMERS[name](dtype, form), (TOKENS,), {"use_cache": False}), [TOKENS, False]


def calls_of(program: gw.Program) -> list[Any]:
    return [node for node in program.main.calls if node.target is MOE]


def regrouped(program: gw.Program, inputs: list[Any] | None = None, **options: Any) -> Any:
    """What the pass makes of a program, held to its contract where there are inputs."""
    verify = "structure" if inputs is None else "numeric"
    return gw.PassManager([*gw.CLEANUPS, gw.RegroupExperts(**options)], verify=verify, inputs=inputs).run(program)


# --- it fires --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=["f32", "bf16"])
@pytest.mark.parametrize(("name", "form"), CASES)
def test_every_block_of_every_family_becomes_one_operation_and_keeps_its_function(name: str, form: str | None, dtype: torch.dtype) -> None:
    program, inputs = captured(name, form, dtype)
    result = regrouped(program, inputs)
    report = result.reports[-1]
    calls = calls_of(result.program)
    assert len(calls) == LAYERS and report.left == () and report.verdict.kind == "right", report
    assert [node.args[0].meta["val"].shape for node in calls] == [(18, WIDTH)] * LAYERS
    # Mixtral's router and the dense blocks keep weights in float32, and sum in it.
    combine = torch.bfloat16 if dtype == torch.bfloat16 and name not in ("mixtral", *WRITTEN) else torch.float32
    assert all(node.kwargs == {"activation": "silu", "combine_dtype": combine} for node in calls)
    was = {"grouped_mm": "grouped", "batched_mm": "batched", None: "dense"}[form]
    assert report.lines == (
        f"2 blocks: {EXPERTS} experts [{WIDTH}, {INNER}], {CHOSEN} a token, {6 * WIDTH * INNER * CHOSEN} FLOPs a token; was {was}",
    )
    text = str(result.program)
    assert not any(name in text for name in ("grouped_mm", "aten.bmm", "repeat_interleave", "aten.sort", "scatter", "histc"))
    assert str(gw.parse(text)) == text


def test_a_program_without_experts_is_left_as_it_is_and_a_second_run_changes_nothing() -> None:
    program = gw.capture(nn.Sequential(nn.Linear(3, 4), nn.GELU(), nn.Linear(4, 3)), (torch.randn(2, 3),))
    result = regrouped(program)
    assert (result.reports[-1].records, result.reports[-1].left) == ((), ())
    again = regrouped(regrouped(captured("matmul", None, torch.float32)[0]).program)
    assert (again.reports[-1].records, again.reports[-1].left) == ((), ())
    assert len(calls_of(again.program)) == LAYERS


def test_sizes_may_be_known_at_the_call_only() -> None:
    model = WRITTEN["matmul"]()
    sizes = {0: torch.export.Dim("batch", max=64), 1: torch.export.Dim("length", max=64)}
    program = gw.capture(model, (TOKENS,), dynamic_shapes={"tokens": sizes})
    made = regrouped(program).program
    assert len(calls_of(made)) == LAYERS
    other = tokens_of(3, 5)
    # float32 sums in another order, through two layers
    torch.testing.assert_close(run(made, [other])[0][0], model(other), atol=1e-5, rtol=1e-5)


# --- variants of a block ---------------------------------------------------------------------------------------------------------


def capture_block(block: Callable[..., Tensor], *weights: Tensor, tokens: int = 10) -> gw.Program:
    """The program of a block that is written as a function of tokens [T, D], experts [T, k] that topk chose, their weights, and `weights`."""

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.router = nn.Linear(WIDTH, EXPERTS)
            self.held = nn.ParameterList(weights)

        def forward(self, x: Tensor) -> Tensor:
            weight, index = self.router(x).softmax(-1).topk(CHOSEN)
            return block(x, index, weight, *self.held)

    return gw.capture(Block(), (torch.randn(tokens, WIDTH),))


def weights_of(inner: int = 2 * INNER) -> tuple[Tensor, Tensor]:
    return torch.randn(EXPERTS, inner, WIDTH) / 6, torch.randn(EXPERTS, WIDTH, INNER) / 5


def batched(
    x: Tensor,
    index: Tensor,
    weight: Tensor,
    gate_up: Tensor,
    down: Tensor,
    gate: Callable[[Tensor, Tensor], Tensor] = lambda g, u: F.silu(g) * u,
    bias: Tensor | None = None,
) -> Tensor:
    chosen = index.reshape(-1)
    both = torch.bmm(gate_up[chosen], x.repeat_interleave(CHOSEN, 0).unsqueeze(-1)).squeeze(-1)
    each = torch.bmm(down[chosen], gate(*both.chunk(2, -1)).unsqueeze(-1)).squeeze(-1)
    if bias is not None:
        each = each + bias[chosen]
    return (each * weight.reshape(-1, 1)).view(-1, CHOSEN, WIDTH).sum(1)


@pytest.mark.parametrize(
    ("gate", "activation"),
    [
        (lambda g, u: F.gelu(g) * u, "gelu"),
        (lambda g, u: u * F.gelu(g, approximate="tanh"), "gelu_tanh"),
        (lambda g, u: F.relu(g) * u, "relu"),
    ],
)
def test_other_activations(gate: Any, activation: str) -> None:
    program = capture_block(functools.partial(batched, gate=gate), *weights_of())
    (call,) = calls_of(regrouped(program, [torch.randn(10, WIDTH)]).program)
    assert call.kwargs["activation"] == activation


def test_weights_that_lie_transposed_are_read_as_they_lie() -> None:
    def block(x: Tensor, index: Tensor, weight: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
        chosen = index.reshape(-1)
        gate, up = torch.bmm(x.repeat_interleave(CHOSEN, 0).unsqueeze(1), gate_up[chosen]).squeeze(1).chunk(2, -1)
        each = torch.bmm((F.silu(gate) * up).unsqueeze(1), down[chosen]).squeeze(1)
        return (each * weight.reshape(-1, 1)).view(-1, CHOSEN, WIDTH).sum(1)

    gate_up, down = (each.transpose(1, 2).contiguous() for each in weights_of())
    made = regrouped(capture_block(block, gate_up, down), [torch.randn(10, WIDTH)])
    (call,) = calls_of(made.program)
    assert [operand.target for operand in call.args[3:]] == [torch.ops.aten.transpose.int] * 2
    assert {w.digest for w in made.program.weights.values()} == {w.digest for w in made.history[0].weights.values()}, "no weight is copied"


def test_one_expert_a_token() -> None:
    class Switch(Dense):
        def forward(self, x: Tensor) -> Tensor:
            tokens = x.reshape(-1, WIDTH)
            weight, index = self.router(tokens).softmax(-1).topk(1, -1)
            gates = tokens.new_zeros(len(tokens), EXPERTS).scatter(-1, index, weight)
            gate, up = torch.matmul(tokens, self.gate_up.transpose(1, 2)).chunk(2, -1)
            each = torch.matmul(F.silu(gate) * up, self.down.transpose(-1, -2))
            return (each * gates.transpose(0, 1)[..., None]).sum(0).reshape(x.shape)

    program = gw.capture(moe_models.Written(Switch, torch.float32), (TOKENS,))
    calls = calls_of(regrouped(program, [TOKENS]).program)
    assert [call.args[1].meta["val"].shape for call in calls] == [(18, 1)] * LAYERS


class OfOne(nn.Module):
    """One expert a token, in the forms of `FORMS`, chosen as `CHOSEN_AS` says; rows are summed over one expert or not at all."""

    def __init__(self, form: str, chosen_as: str, *, is_summed: bool):
        super().__init__()
        self.form, self.choose, self.is_summed = form, CHOSEN_AS[chosen_as], is_summed
        self.router = nn.Linear(WIDTH, EXPERTS, bias=False)
        self.held = nn.ParameterList(weights_of())

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.reshape(-1, WIDTH)
        scores = self.router(tokens)
        weight, index = self.choose(scores)
        gate_up, down = self.held
        if self.form == "dense":
            gates = torch.zeros_like(scores).scatter(1, index.reshape(-1, 1), weight.reshape(-1, 1))
            return dense_of_any(tokens, index, weight, gate_up, down, lambda *_: gates).reshape(x.shape)
        y = (_batched_of_one if self.form == "batched" else _grouped_of_one)(tokens, index.reshape(-1), weight.reshape(-1), gate_up, down)
        return (y.view(-1, 1, WIDTH).sum(1) if self.is_summed else y).reshape(x.shape)


def _batched_of_one(x: Tensor, chosen: Tensor, weight: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    gate, up = torch.bmm(gate_up[chosen], x.unsqueeze(-1)).squeeze(-1).chunk(2, -1)
    return torch.bmm(down[chosen], (F.silu(gate) * up).unsqueeze(-1)).squeeze(-1) * weight.unsqueeze(-1)


def _grouped_of_one(x: Tensor, chosen: Tensor, weight: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    experts, order = chosen.sort()
    ends = torch.histc(experts.float(), EXPERTS, 0, EXPERTS - 1).cumsum(0, dtype=torch.int32)
    gate, up = torch.ops.gw.grouped_mm(x[order], gate_up.transpose(1, 2), ends).chunk(2, -1)
    y = torch.ops.gw.grouped_mm(F.silu(gate) * up, down.transpose(1, 2), ends) * weight[order].unsqueeze(-1)
    return y[torch.empty_like(order).index_put((order,), torch.arange(len(order)))]


CHOSEN_AS: dict[str, Callable[[Tensor], tuple[Tensor, Tensor]]] = {
    "topk": lambda scores: tuple(scores.softmax(-1).topk(1, -1)),
    "topk, squeezed": lambda scores: tuple(each.squeeze(-1) for each in scores.softmax(-1).topk(1, -1)),
    "max": lambda scores: tuple(scores.softmax(-1).max(-1)),
    "argmax": lambda scores: (scores.softmax(-1).gather(1, scores.argmax(-1, keepdim=True)).squeeze(1), scores.argmax(-1)),
    "sigmoid of topk": lambda scores: (lambda chosen: (chosen[0].sigmoid(), chosen[1]))(scores.topk(1, -1)),
}


@pytest.mark.parametrize(
    ("form", "chosen_as", "is_summed"),
    [(form, "topk", False) for form in ("batched", "grouped")]
    + [("dense", name, True) for name in CHOSEN_AS if name != "topk"]
    + [("batched", name, False) for name in CHOSEN_AS if name != "topk"]
    + [("grouped", "max", True), ("grouped", "argmax", False), ("grouped", "topk, squeezed", False)],
)
def test_one_expert_a_token_in_every_form(form: str, chosen_as: str, is_summed: bool) -> None:
    program = gw.capture(OfOne(form, chosen_as, is_summed=is_summed), (torch.randn(2, 9, WIDTH),))
    result = regrouped(program, [torch.randn(2, 9, WIDTH)])
    (call,) = calls_of(result.program)
    assert [operand.meta["val"].shape for operand in call.args[:3]] == [(18, WIDTH), (18, 1), (18, 1)]
    assert result.reports[-1].left == () and result.reports[-1].verdict.kind == "right"


# --- refusals ----------------------------------------------------------------------------------------------------------------------


def second_half_gates(g: Tensor, u: Tensor) -> Tensor:
    return g * F.silu(u)


def with_bias(x: Tensor, index: Tensor, weight: Tensor, gate_up: Tensor, down: Tensor, bias: Tensor) -> Tensor:
    return batched(x, index, weight, gate_up, down, bias=bias)


def without_gate(x: Tensor, index: Tensor, weight: Tensor, up: Tensor, down: Tensor) -> Tensor:
    chosen = index.reshape(-1)
    inner = F.relu(torch.bmm(up[chosen], x.repeat_interleave(CHOSEN, 0).unsqueeze(-1)).squeeze(-1))
    each = torch.bmm(down[chosen], inner.unsqueeze(-1)).squeeze(-1)
    return (each * weight.reshape(-1, 1)).view(-1, CHOSEN, WIDTH).sum(1)


def with_norms(x: Tensor, index: Tensor, weight: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    chosen = index.reshape(-1)
    gate, up = torch.bmm(gate_up[chosen], x.repeat_interleave(CHOSEN, 0).unsqueeze(-1)).squeeze(-1).chunk(2, -1)
    each = F.layer_norm(torch.bmm(down[chosen], (F.silu(gate) * up).unsqueeze(-1)).squeeze(-1), [WIDTH])
    return (each * weight.reshape(-1, 1)).view(-1, CHOSEN, WIDTH).sum(1)


def with_sentinels(x: Tensor, index: Tensor, weight: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    return batched(x, index.clamp(max=EXPERTS - 2), weight.masked_fill(index == EXPERTS - 1, 0.0), gate_up, down)


def read_elsewhere(x: Tensor, index: Tensor, weight: Tensor, gate_up: Tensor, down: Tensor) -> Any:
    chosen = index.reshape(-1)
    gate, up = torch.bmm(gate_up[chosen], x.repeat_interleave(CHOSEN, 0).unsqueeze(-1)).squeeze(-1).chunk(2, -1)
    inner = F.silu(gate) * up
    each = torch.bmm(down[chosen], inner.unsqueeze(-1)).squeeze(-1)
    return (each * weight.reshape(-1, 1)).view(-1, CHOSEN, WIDTH).sum(1), inner


def dense_of_any(x: Tensor, index: Tensor, weight: Tensor, gate_up: Tensor, down: Tensor, choose: Any = None) -> Tensor:
    """A dense block whose weights are `choose(index, weight)` [T, E]."""
    gate, up = torch.matmul(x.unsqueeze(0), gate_up.transpose(1, 2)).chunk(2, -1)
    each = torch.matmul(F.silu(gate) * up, down.transpose(1, 2))
    return (each * choose(index, weight).t().unsqueeze(-1)).sum(0)


def with_bias_between(x: Tensor, index: Tensor, weight: Tensor, gate_up: Tensor, down: Tensor, bias: Tensor) -> Tensor:
    chosen = index.reshape(-1)
    both = torch.bmm(gate_up[chosen], x.repeat_interleave(CHOSEN, 0).unsqueeze(-1)).squeeze(-1) + bias[chosen]
    gate, up = both.chunk(2, -1)
    each = torch.bmm(down[chosen], (F.silu(gate) * up).unsqueeze(-1)).squeeze(-1)
    return (each * weight.reshape(-1, 1)).view(-1, CHOSEN, WIDTH).sum(1)


def of_three_products(x: Tensor, index: Tensor, weight: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
    first, second = (torch.matmul(x.unsqueeze(0), each.transpose(1, 2)) for each in (gate, up))
    each = torch.matmul(F.silu(first) * second, down.transpose(1, 2))
    gates = torch.zeros(len(x), EXPERTS).scatter(1, index, weight)
    return (each * gates.t().unsqueeze(-1)).sum(0)


def results(x: Tensor, index: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    """Of each pair of token and expert, [T k, D]."""
    chosen = index.reshape(-1)
    gate, up = torch.bmm(gate_up[chosen], x.repeat_interleave(CHOSEN, 0).unsqueeze(-1)).squeeze(-1).chunk(2, -1)
    return torch.bmm(down[chosen], (F.silu(gate) * up).unsqueeze(-1)).squeeze(-1)


def returned_before(x: Tensor, index: Tensor, weight: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    return results(x, index, gate_up, down)


def added_before(x: Tensor, index: Tensor, weight: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    return (results(x, index, gate_up, down) * weight.reshape(-1, 1)).cumsum(0)


def summed_alone(x: Tensor, index: Tensor, weight: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    return results(x, index, gate_up, down).view(-1, CHOSEN, WIDTH).sum(1)


def weighted_as_one(x: Tensor, index: Tensor, weight: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    return (results(x, index, gate_up, down).view(-1, CHOSEN, WIDTH) * weight.mean().reshape(1, 1, 1)).sum(1)


def of_no_rows(x: Tensor, index: Tensor, weight: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    chosen = index.reshape(-1)
    columns = torch.stack([x.repeat_interleave(CHOSEN, 0)] * 2, -1)
    gate, up = torch.bmm(gate_up[chosen], columns).sum(-1).chunk(2, -1)
    return (F.silu(gate) * up).view(-1, CHOSEN, INNER).sum(1)


def of_computed_weights(x: Tensor, index: Tensor, weight: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    return batched(x, index, weight, gate_up * x.mean(), down)


def dispatched(
    x: Tensor, index: Tensor, weight: Tensor, gate_up: Tensor, down: Tensor, room: int = 10, kept: int = 10, shift: int = 0
) -> Tensor:
    """Tokens sent to `room` slots of their experts, of which the first `kept` are taken, as GShard writes it."""
    hits = F.one_hot(index, EXPERTS)  # [T, k, E]
    place = (hits.reshape(-1, EXPERTS).cumsum(0) - 1).reshape(-1, CHOSEN, EXPERTS)
    hits = hits * (place < min(room, kept))
    slots = F.one_hot(place.clamp(0, room - 1) + shift * (place == room - 1), room)
    dispatch = (slots * hits.unsqueeze(-1)).sum(1).to(x.dtype)  # [T, E, C]
    combine = dispatch * torch.zeros(len(x), EXPERTS).scatter(1, index, weight).unsqueeze(-1)
    gate, up = torch.einsum("ecd,ehd->ech", torch.einsum("tec,td->ecd", dispatch, x), gate_up).chunk(2, -1)
    return torch.einsum("tec,ecd->td", combine, torch.einsum("ech,edh->ecd", F.silu(gate) * up, down))


def spread(index: Tensor, weight: Tensor) -> Tensor:
    """Weights of all experts, [T, E]."""
    return (F.one_hot(index, EXPERTS).to(weight.dtype) * weight.unsqueeze(-1)).sum(1)


def einsum_over_experts(x: Tensor, index: Tensor, weight: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    gate, up = torch.einsum("td,ehd->eth", x, gate_up).chunk(2, -1)
    return torch.einsum("etd,te->td", torch.einsum("eth,edh->etd", F.silu(gate) * up, down), spread(index, weight))


def einsum_over_tokens(x: Tensor, index: Tensor, weight: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    gate, up = torch.einsum("ehd,td->teh", gate_up, x).chunk(2, -1)
    each = torch.einsum("teh,edh->ted", F.silu(gate) * up, down)
    return (each * spread(index, weight / weight.sum(-1, keepdim=True)).unsqueeze(-1)).sum(1)


def einsum_of_masked(x: Tensor, index: Tensor, weight: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    rows = torch.einsum("te,td->etd", F.one_hot(index, EXPERTS).sum(1).to(x.dtype), x)
    gate, up = torch.einsum("etd,ehd->eth", rows, gate_up).chunk(2, -1)
    return torch.einsum("te,etd->td", spread(index, weight), torch.einsum("eth,edh->etd", F.silu(gate) * up, down))


def einsum_of_copies(x: Tensor, index: Tensor, weight: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    gate, up = torch.einsum("td,tkhd->tkh", x, gate_up[index]).chunk(2, -1)
    return torch.einsum("tkd,tk->td", torch.einsum("tkh,tkdh->tkd", F.silu(gate) * up, down[index]), weight)


def dense_of_spread(x: Tensor, index: Tensor, weight: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    return dense_of_any(x, index, weight, gate_up, down, choose=spread)


@pytest.mark.parametrize(
    "block", [einsum_over_experts, einsum_over_tokens, einsum_of_masked, einsum_of_copies, dense_of_spread, dispatched]
)
def test_blocks_of_one_hot_weights_and_einsum(block: Any) -> None:
    result = regrouped(capture_block(block, *weights_of()), [torch.randn(10, WIDTH)])
    (call,) = calls_of(result.program)
    assert result.reports[-1].left == () and result.reports[-1].verdict.kind == "right"
    assert call.args[1].meta["val"].shape == (10, CHOSEN)
    assert "einsum" not in str(result.program) and "one_hot" not in str(result.program)


def twice(index: Tensor, weight: Tensor) -> Tensor:
    return torch.ones(len(weight), EXPERTS).cumsum(1) * F.one_hot(index, EXPERTS).sum(1)


def all_experts(index: Tensor, weight: Tensor) -> Tensor:
    return F.pad(weight, (0, EXPERTS - CHOSEN))


def chosen_by_arithmetic(index: Tensor, weight: Tensor) -> Tensor:
    return weight.new_zeros(len(weight), EXPERTS).scatter(1, index // 2, weight)


def of_other_tokens(x: Tensor, index: Tensor, weight: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    """Rows of one token meet the experts of another."""
    chosen = index.reshape(-1)
    rows = torch.arange(len(chosen)).flip(0) // CHOSEN
    gate, up = torch.bmm(gate_up[chosen], x[rows].unsqueeze(-1)).squeeze(-1).chunk(2, -1)
    each = torch.bmm(down[chosen], (F.silu(gate) * up).unsqueeze(-1)).squeeze(-1)
    return (each * weight.reshape(-1, 1)).view(-1, CHOSEN, WIDTH).sum(1)


REFUSALS: dict[str, tuple[Any, tuple[Tensor, ...], str]] = {
    "bias": (with_bias, (*weights_of(), torch.randn(EXPERTS, WIDTH)), "its experts have a bias"),
    "no gate": (without_gate, weights_of(INNER), "between the products of its experts stand aten.relu.default, and not an activation of one half of the first times"),
    "gate in the second half": (functools.partial(batched, gate=second_half_gates), weights_of(), "the gate of its experts stands in the second half"),
    "activation": (functools.partial(batched, gate=lambda g, u: F.tanh(g) * u), weights_of(), "the activation of its experts, aten.tanh.default, is unknown"),
    "bias of the first product": (with_bias_between, (*weights_of(), torch.randn(EXPERTS, 2 * INNER)), "stand aten.add.Tensor, aten.split.Tensor, aten.silu.default, aten.mul.Tensor, a bias among them"),
    "limited gate": (functools.partial(batched, gate=lambda g, u: F.silu(g.clamp(max=7.0)) * u), weights_of(), "stand aten.split.Tensor, aten.clamp.default, aten.silu.default, aten.mul.Tensor, and not an activation"),
    "two first products": (of_three_products, (torch.randn(EXPERTS, INNER, WIDTH), torch.randn(EXPERTS, INNER, WIDTH), torch.randn(EXPERTS, WIDTH, INNER)), "gate and value of its experts are products of their own, with a weight each: stack both"),
    "returned": (returned_before, weights_of(), "the results of its experts are returned before they are weighted and summed"),
    "added to others": (added_before, weights_of(), "go through aten.cumsum.default after they are weighted and before they are summed"),
    "no weights": (summed_alone, weights_of(), "the results of its experts are summed without weights"),
    "one weight for all": (weighted_as_one, weights_of(), "there is not one weight for each expert of each token"),
    "rows of their own": (of_no_rows, weights_of(), "is not rows [tokens * k, width] that got a dim of 1"),
    "probabilities times a mask": (functools.partial(dense_of_any, choose=twice), weights_of(), "not scattered, nor spread by one_hot, from those"),
    "capacity": (functools.partial(dispatched, room=5), weights_of(), "each of its experts has room for 5 of 10 tokens, and drops what is more"),
    "capacity that is no size": (functools.partial(dispatched, kept=8), weights_of(), "it is no mixture of chosen experts after all: its results differ by"),
    "slots that are not there": (functools.partial(dispatched, room=10, shift=1), weights_of(), "it fails on a choice that a router may make"),
    "norm of each expert": (with_norms, weights_of(), "the results of its experts go through aten.layer_norm.default before they are weighted"),
    "read elsewhere": (read_elsewhere, weights_of(), "a value inside of it is read elsewhere"),
    "all experts": (functools.partial(dense_of_any, choose=all_experts), weights_of(), "not scattered, nor spread by one_hot, from those that a token chose"),
    "repeated experts": (functools.partial(dense_of_any, choose=chosen_by_arithmetic), weights_of(), "not chosen by topk"),
    "weights that do not fit": (batched, (torch.randn(EXPERTS, 2 * INNER, WIDTH), torch.randn(EXPERTS + 1, WIDTH, INNER)), "do not fit one another"),
    "rows of other tokens": (of_other_tokens, weights_of(), "it is no mixture of chosen experts after all: its results differ by"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSALS)
def test_what_is_refused_is_named_and_stays_as_it_was(name: str) -> None:
    block, weights, reason = REFUSALS[name]
    result = regrouped(capture_block(block, *weights))
    assert calls_of(result.program) == []
    (left,) = result.reports[-1].left
    assert reason in left.reason, left
    assert "test_regroup_experts.py" in left.where


def test_weights_that_are_computed_are_none_of_experts() -> None:
    result = regrouped(capture_block(of_computed_weights, *weights_of()))
    reasons = [each.reason for each in result.reports[-1].left]
    assert calls_of(result.program) == []
    assert reasons == [
        "the matrices that it copies are no weight [experts, .., ..]",
        "what it reads is no result of a product with weights [experts, .., ..]",
    ]


def test_sentinels_of_experts_on_other_machines_are_part_of_the_choice_which_is_the_routers() -> None:
    program = capture_block(with_sentinels, *weights_of())
    assert len(calls_of(regrouped(program, [torch.randn(10, WIDTH)]).program)) == 1


def test_experts_in_a_list_are_named_with_what_to_do() -> None:
    result = regrouped(gw.capture(moe_models.Written(Listed, torch.float32), (TOKENS,)))
    assert calls_of(result.program) == []
    assert len(result.reports[-1].left) == LAYERS
    for left in result.reports[-1].left:
        assert left.reason.startswith(f"its {EXPERTS} experts are layers of their own that a loop runs one by one: stack their weights")
        assert "moe_models.py" in left.where


def test_a_sum_that_is_not_converted_back_is_refused() -> None:
    def block(x: Tensor, index: Tensor, weight: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
        return batched(x.bfloat16(), index, weight, gate_up, down)

    result = regrouped(capture_block(block, *(each.bfloat16() for each in weights_of())))
    (left,) = result.reports[-1].left
    assert left.reason == "the sum over experts is not converted to the dtype of tokens, torch.bfloat16"


def test_without_the_check_of_itself_a_block_that_only_looks_like_one_is_taken() -> None:
    program = capture_block(of_other_tokens, *weights_of())
    assert len(calls_of(regrouped(program, verify=False).program)) == 1
    with pytest.raises(gw.ContractError, match="regroup-experts"):
        regrouped(program, [torch.randn(10, WIDTH)], verify=False)


# --- beside other passes -----------------------------------------------------------------------------------------------------------


def test_a_decoder_decodes_with_its_blocks_regrouped() -> None:
    model = TRANSFORMERS["mixtral"](torch.float32, "eager")
    compiled = gw.compile_decoder(model, "regroup-experts", backend="aten", cache=False)
    for function in ("main", "prefill", "decode", "verify"):
        targets = [node.target for node in compiled.program.functions[function].calls]
        assert targets.count(MOE) == LAYERS and "grouped" not in str(targets)
    prompts = [[1, 15, 2], [7, 4, 8, 9, 30]]
    expected = []
    for prompt in prompts:
        tokens = torch.tensor([prompt])
        for _ in range(4):
            tokens = torch.cat([tokens, model(tokens, use_cache=False).logits[:, -1:].argmax(-1)], 1)
        expected.append(tokens[0, len(prompt) :].tolist())
    assert compiled.generate(prompts, 4).tokens == expected
    with pytest.raises(gw.PassError, match="regroup-experts"):
        gw.compile_decoder(model, "kv-cache,regroup-experts", backend="aten", cache=False)


def test_a_regrouped_program_is_sliced_saved_loaded_and_compared(tmp_path: Any) -> None:
    model = WRITTEN["matmul"]()
    tokens = tokens_of(4, 16)
    passes = ["regroup-experts", gw.SliceGroups(memory_budget="60%")]
    compiled = gw.compile(model, passes, example_inputs=(tokens,), backend="aten", cache=False, verify="numeric")
    assert "gw.sliced" in str(compiled.program) and "gw.token_choice_moe" in str(compiled.program)
    expected = model(tokens)
    # float32 sums in another order, through two layers
    torch.testing.assert_close(compiled(tokens), expected, atol=1e-5, rtol=1e-5)
    path = tmp_path / "moe.gw"
    compiled.save(path)
    torch.testing.assert_close(gw.load(path, backend="aten")(tokens), expected, atol=1e-5, rtol=1e-5)
    assert "gw.token_choice_moe" in str(gw.diff(compiled.history[0], compiled.program))
