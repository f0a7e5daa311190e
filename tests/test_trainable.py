"""`compile(.., trainable=True)`: calls keep gradients for parameters of its own, those that passes added included, and what an optimizer
writes is what every later call, `generate` and `save` use."""

import runpy
from pathlib import Path

import pytest
import torch
from torch import nn

import graphwright as gw
from graphwright import models

FINETUNE = Path(__file__).parent.parent / "examples" / "finetune_rat.py"


class Network(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.norm, self.second = nn.Linear(6, 8), nn.LayerNorm(8), nn.Linear(8, 3)

    def forward(self, x):
        return self.second(self.norm(torch.tanh(self.first(x))))


def compiled(backend: str = "aten") -> tuple[Network, gw.CompiledModel, torch.Tensor]:
    torch.manual_seed(0)
    module, x = Network(), torch.randn(4, 6)
    return module, gw.compile(module, example_inputs=(x,), backend=backend, trainable=True), x


def test_gradients_are_those_of_the_module() -> None:
    module, model, x = compiled()
    for each in (module, model):
        each(x).square().sum().backward()
    expected = {name: parameter.grad for name, parameter in module.named_parameters()}
    assert expected.keys() == dict(model.named_parameters()).keys()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name])


def test_training_leaves_the_module_as_it_was_and_reaches_every_call_and_file(tmp_path: Path) -> None:
    module, model, x = compiled()
    before = {name: parameter.detach().clone() for name, parameter in module.named_parameters()}
    first, optimizer = model(x).square().sum(), torch.optim.SGD(model.parameters(), 0.05)
    for _ in range(5):
        optimizer.zero_grad()
        loss = model(x).square().sum()
        loss.backward()
        optimizer.step()
    assert loss < first
    assert all(torch.equal(parameter, before[name]) for name, parameter in module.named_parameters())
    with torch.no_grad():
        trained = model(x)
    assert not trained.requires_grad and not torch.equal(trained, module(x))
    module.load_state_dict(model.state_dict())
    torch.testing.assert_close(trained, module(x))
    model.save(tmp_path / "trained.gw")
    assert torch.equal(gw.load(tmp_path / "trained.gw", backend="aten")(x), trained)


def test_without_it_no_call_keeps_gradients() -> None:
    model = gw.compile(Network(), example_inputs=(torch.ones(1, 6),), backend="aten")
    assert not model(torch.ones(1, 6)).requires_grad


def test_what_compiled_code_reads_follows_the_optimizer() -> None:
    module, model, x = compiled("tuned")
    with torch.no_grad():
        model(x)
        for parameter in model.parameters():
            parameter.add_(0.1)
        for parameter in module.parameters():
            parameter.add_(0.1)
        torch.testing.assert_close(model(x), module(x))


def test_the_example_trains_a_converted_decoder_back_and_generates_with_it() -> None:
    finetune = runpy.run_path(str(FINETUNE))["finetune"]
    module, _, _ = models.load("decoder", "tiny")
    generator = torch.Generator().manual_seed(0)
    pattern = torch.randint(0, 256, (8,), generator=generator).repeat(40).tolist()  # which a few steps learn
    recurrence = gw.RatRecurrence(chunk=4, window=2, sinks=0)
    found = finetune(module, recurrence, pattern, pattern[:100], steps=12, length=24, batch=4, rate=3e-3)
    assert found.tuned < found.converted and found.losses[-1] < found.losses[0]
    assert found.original != pytest.approx(found.converted, rel=1e-3)


def test_of_a_converted_decoder_the_added_weights_can_be_trained_alone() -> None:
    finetune = runpy.run_path(str(FINETUNE))["finetune"]
    module, _, _ = models.load("decoder", "tiny")
    ids = torch.randint(0, 256, (200,), generator=torch.Generator().manual_seed(0)).tolist()
    found = finetune(module, gw.RatRecurrence(chunk=4, window=2, sinks=0), ids, ids[:60], steps=2, length=24, new_only=True)
    own = module.state_dict()
    changed = {name for name, parameter in found.model.named_parameters() if name not in own or not torch.equal(parameter, own[name])}
    weights = found.model.program.weights
    assert changed == {name for name, weight in weights.items() if weight.kind == "added"} and len(changed) == 6


def test_a_decoder_generates_with_what_it_was_trained_to() -> None:
    passes = [gw.RatRecurrence(chunk=4, window=2, sinks=0)]
    model = gw.compile_decoder(models.load("decoder", "tiny")[0], passes, backend="aten", cache=False, trainable=True)
    tokens, places = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6]]), torch.arange(8).unsqueeze(0)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    for _ in range(30):
        optimizer.zero_grad()
        logits = model(input_ids=tokens[:, :-1], position_ids=places[:, :-1])
        nn.functional.cross_entropy(logits[0], tokens[0, 1:]).backward()
        optimizer.step()
    assert model.generate([[3, 1, 4]], 5).tokens == [[1, 5, 9, 2, 6]]
