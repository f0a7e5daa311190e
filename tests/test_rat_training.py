"""Training through a chunked recurrence: `rat_attention_by_blocks` has the values and gradients of `gw.rat_attention`, and neither it nor
a converted model that is trained makes anything of tokens times tokens."""

from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import graphwright as gw
from graphwright import models
from graphwright.ir.ops import rat_blocks
from graphwright.ir.ops.rat_blocks import rat_attention_by_blocks
from graphwright.tests.test_rat import Case, case, cases, off

body = torch.ops.gw.rat_attention


def gradients(function, each: Case, weights: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """The result, and the gradients of its sum under `weights` for all operands."""
    operands = [None if x is None else x.clone().requires_grad_() for x in each.operands]
    out = function(*operands, **each.attributes)
    return out.detach(), list(torch.autograd.grad((out * weights).sum(), [x for x in operands if x is not None]))


def differences(each: Case, weights: torch.Tensor | None = None) -> list[float]:
    """Of the result and each gradient from the body's, over the largest of these where it is above one: sums of up to 200 terms."""
    weights = torch.randn(each.operands[0].shape, dtype=torch.float64) if weights is None else weights
    expected, wanted = gradients(body, each, weights)
    found, got = gradients(rat_attention_by_blocks, each, weights)
    assert found.shape == expected.shape and found.transpose(1, 2).is_contiguous()
    return [off(a, b) / max(1.0, float(b.abs().max())) for a, b in zip([found, *got], [expected, *wanted], strict=True)]


@given(each=cases(longest=150), queries=st.sampled_from([1, 5, 32, 128]))
@settings(max_examples=30, deadline=None)
def test_values_and_gradients_are_those_of_the_body(each: Case, queries: int) -> None:
    with mock.patch.object(rat_blocks, "QUERIES", queries):
        assert max(differences(each)) <= 1e-12


ODD = {
    "no multiple of the chunk": case(7, 3),
    "chunks of one": case(5, 1, window=2),
    "more chunk than tokens": case(4, 9, bias=False),
    "one token": case(1, 4),
    "no resets": case(6, 2, reset=False, window=1, rope=None),
    "sinks that end inside a chunk": case(7, 2, sinks=3, window=1, summary_bias=0.7),
    "raw, with a window and sinks": case(9, 2, sinks=2, window=1, local="raw", rope_style="interleaved"),
    "raw, no resets": case(8, 3, local="raw", reset=False, shared=1),
    "rotations of each row": case(6, 2, rows=2, rope=2),
}


@pytest.mark.parametrize("name", ODD)
def test_gradients_are_the_slopes_of_values(name: str) -> None:
    each = ODD[name]
    operands = [None if x is None else x[:1].clone() if x.dim() == 4 and "each row" not in name else x.clone() for x in each.operands]
    present = [x.requires_grad_() for x in operands if x is not None]

    def function(*given):
        rest = iter(given)
        return rat_attention_by_blocks(*(None if x is None else next(rest) for x in operands), **each.attributes)

    with mock.patch.object(rat_blocks, "QUERIES", 3):
        assert torch.autograd.gradcheck(function, present)


def test_what_pads_rows_of_other_lengths_takes_no_part() -> None:
    each, lengths = case(11, 3, window=2, sinks=3, local="raw"), (4, 11)
    weights = torch.randn(each.operands[0].shape, dtype=torch.float64)
    weights[0, :, lengths[0] :] = 0.0
    assert max(differences(each, weights)) <= 1e-12
    _, got = gradients(rat_attention_by_blocks, each, weights)
    assert all(not x[0, :, lengths[0] :].any() for x in got[:4])
    for x in each.operands[:4]:
        x[0, :, lengths[0] :] = 7.0
    _, with_junk = gradients(rat_attention_by_blocks, each, weights)
    assert all(torch.equal(a[:, :, : lengths[0]], b[:, :, : lengths[0]]) for a, b in zip(got[:4], with_junk[:4]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_in_other_types_it_is_within_their_rounding(dtype: torch.dtype) -> None:
    each = case(50, 4, window=3, sinks=4, local="raw").to(dtype)
    weights = torch.ones(each.operands[0].shape, dtype=torch.float64)
    (expected, wanted), (found, got) = (gradients(function, each, weights) for function in (body, rat_attention_by_blocks))
    for a, b in zip([found, *got], [expected, *wanted], strict=True):
        assert a.dtype == b.dtype == dtype
        # both sum in float32, in other orders, and round once
        assert off(a, b.double()) <= (2 * torch.finfo(dtype).eps + 1e-5) * float(b.abs().max())


@pytest.mark.parametrize(("local", "gate"), [("raw", -torch.inf), ("state", -torch.inf), ("raw", 40.0), ("state", -40.0)])
def test_gates_at_their_ends_have_finite_gradients(local: str, gate: float) -> None:
    each = case(9, 2, local=local, bias=False)
    each.operands[3].fill_(gate)
    assert max(differences(each)) <= 1e-12


def test_what_the_body_refuses_is_refused_in_its_words() -> None:
    for attributes in ({"chunk": 0}, {"window": -1}, {"local": "far"}, {"rope_style": "third"}):
        each = case(5, 2)
        each.attributes |= attributes
        for function in (body, rat_attention_by_blocks):
            with pytest.raises(ValueError) as caught:
                function(*each.operands, **each.attributes)
            attributes.setdefault("said", str(caught.value))
            assert attributes["said"] == str(caught.value)
    each = case(5, 2)
    each.operands[0] = each.operands[0][:, :3]
    with pytest.raises(ValueError, match="3 heads cannot share 2 of keys"):
        rat_attention_by_blocks(*each.operands, **each.attributes)


# --- memory ---------------------------------------------------------------------------------------------------------------------


class Largest(TorchDispatchMode):
    """The most elements that a tensor has which a call gives, in backward passes too."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        storages = [leaf.untyped_storage().nbytes() // leaf.itemsize for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)]
        self.elements = max([self.elements, *storages])
        return result


def test_no_tensor_has_tokens_times_tokens() -> None:
    tokens, chunk, heads = 1500, 16, 2
    each = case(tokens, chunk, batch=1, kv_heads=heads, shared=1, window=16, sinks=16, local="raw").to(torch.float32)
    largest = {}
    for function in (body, rat_attention_by_blocks):
        with Largest() as seen:
            gradients(function, each, torch.ones(each.operands[0].shape))
        largest[function] = seen.elements
    assert largest[body] >= heads * tokens * tokens
    keys = 16 + tokens // chunk + 16 + chunk + rat_blocks.QUERIES
    assert largest[rat_attention_by_blocks] <= heads * rat_blocks.QUERIES * keys


def test_what_is_kept_for_gradients_is_of_the_size_of_the_operands() -> None:
    each, kept = case(600, 8, batch=1, window=8, local="raw").to(torch.float32), {}

    def note(x: torch.Tensor) -> torch.Tensor:
        kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    operands = [x.requires_grad_() for x in each.operands[:4]]
    with torch.autograd.graph.saved_tensors_hooks(note, lambda x: x):
        out = rat_attention_by_blocks(*operands, *(None for _ in range(3)), **each.attributes)
    assert sum(kept.values()) <= 4 * sum(x.nbytes for x in operands)
    out.sum().backward()


def test_a_converted_model_is_trained_without_them() -> None:
    module, _, _ = models.load("decoder", "tiny")
    tokens = torch.randint(0, 256, (1, 400), generator=torch.Generator().manual_seed(0))
    recurrence = gw.RatRecurrence(chunk=8, window=8, sinks=0)
    model = gw.compile(module, [recurrence], example_inputs=(tokens,), backend="aten", cache=False, trainable=True)
    with Largest() as seen:
        model(tokens).square().mean().backward()
    assert seen.elements < 400 * 400
    assert all(parameter.grad is not None for parameter in model.parameters())
