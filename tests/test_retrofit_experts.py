"""examples/retrofit_experts.py: routers alone are trained, and the loss of each stage is that of its model."""

import importlib.util
from pathlib import Path

import pytest
import torch

import graphwright as gw
from graphwright.models import moe_dlm
from graphwright.models.denoising import held_out_loss
from graphwright.models.random_weights import draw_weights

PATH = Path(__file__).resolve().parent.parent / "examples" / "retrofit_experts.py"
LENGTH = 8
CONFIG = moe_dlm.Config(vocabulary=12, dim=16, depth=2, num_heads=2, experts=4, chosen=2, hidden=8, tied=False, length=LENGTH)


@pytest.fixture(scope="module")
def example():
    specification = importlib.util.spec_from_file_location("retrofit_experts", PATH)
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


def network():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        module = moe_dlm.MoEDLM(CONFIG).eval()
        draw_weights(module)
    return module


def test_routers_alone_are_trained_and_the_losses_are_those_of_the_models(example):
    module = network()
    before = {name: each.detach().clone() for name, each in module.named_parameters()}
    ids = [(7 * n) % 11 for n in range(200)]
    told = []
    tell = lambda step, loss: told.append((step, loss))  # noqa: E731
    result = example.retrofit(module, gw.ExpertChoice(), ids, ids[:64], steps=3, length=LENGTH, batch=4, rate=0.05, tell=tell)
    assert result.token_choice == pytest.approx(held_out_loss(module, ids[:64], module.mask_id, LENGTH))
    assert result.trained == pytest.approx(held_out_loss(result.model, ids[:64], module.mask_id, LENGTH))
    assert len({round(each, 6) for each in (result.token_choice, result.swapped, result.trained)}) == 3
    assert told == list(enumerate(result.losses, 1)) and len(told) == 3
    for name, each in result.model.named_parameters():
        assert torch.equal(each, before[name]) != example.is_router(name), name
    for name, each in module.named_parameters():
        assert torch.equal(each, before[name]), "the module itself stays"
