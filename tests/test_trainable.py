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


# --- train mode -----------------------------------------------------------------------------------------------------------------


class Moody(nn.Module):
    """A network, and `within` between its layers."""

    def __init__(self, within: nn.Module):
        super().__init__()
        self.first, self.within, self.second = nn.Linear(6, 6), within, nn.Linear(6, 3)

    def forward(self, x):
        return self.second(self.within(self.first(x)))


class Asking(nn.Module):
    """Adds noise and drops with p where it is trained, as its own forward decides."""

    def __init__(self, noise: float = 0.0, p: float = 0.0):
        super().__init__()
        self.noise, self.p = noise, p

    def forward(self, x):
        if self.training and self.noise:
            x = x + self.noise
        return nn.functional.dropout(x, self.p) if self.training else x


class First(nn.Module):
    """What a recurrent layer gives, as [rows, channels]."""

    def forward(self, x):
        return x[0].flatten(1)


UNCHANGED = {
    "no such layer": nn.Tanh(),
    "dropout of nothing": nn.Dropout(0.0),
    "a norm without statistics": nn.BatchNorm1d(6, track_running_stats=False),
    "a forward that asks and does the same": Asking(),
    "a recurrent layer": nn.Sequential(nn.Unflatten(1, (1, 6)), nn.LSTM(6, 6, num_layers=2), First()),
}
CHANGED = {
    "dropout": (nn.Sequential(nn.Tanh(), nn.Dropout(0.1)), "submodule within.1"),
    "running statistics": (nn.BatchNorm1d(6), "submodule within"),
    "a forward that asks": (Asking(noise=1.0), "submodule within"),
    "dropout that asks": (Asking(p=0.5), "submodule within"),
    "layers that drop between them": (
        nn.Sequential(nn.Unflatten(1, (1, 6)), nn.LSTM(6, 6, num_layers=2, dropout=0.5), First()),
        "submodule within.1",
    ),
}


def moody(within: nn.Module, training: bool = False) -> tuple[Moody, gw.CompiledModel, torch.Tensor]:
    module, x = Moody(within).train(training), torch.randn(4, 6)
    return module, gw.compile(module, example_inputs=(x,), backend="aten", cache=False, trainable=True), x


@pytest.mark.parametrize("name", UNCHANGED)
@pytest.mark.parametrize("training", [False, True])
def test_a_training_loop_may_set_modes_that_change_nothing(name: str, training: bool) -> None:
    module, model, x = moody(UNCHANGED[name], training)
    for mode in (True, False, True):
        assert model.train(mode) is model and model.training == mode
        torch.testing.assert_close(model(x), module.train(mode)(x))


@pytest.mark.parametrize("name", CHANGED)
def test_a_mode_that_changes_the_model_is_refused_by_the_submodule_that_it_changes(name: str) -> None:
    within, named = CHANGED[name]
    _, model, _ = moody(within)
    with pytest.raises(
        gw.InputError, match=rf"captured in eval mode, and train mode changes {named}: compile the original after .train\(\)"
    ):
        model.train()
    assert model.eval() is model and not model.training


def test_the_modules_own_flags_are_as_they_were() -> None:
    module = Moody(nn.Sequential(nn.Tanh(), nn.Dropout(0.1))).train()
    module.within[1].eval()
    gw.compile(module, example_inputs=(torch.randn(4, 6),), backend="aten", cache=False, trainable=True)
    assert [each.training for each in module.modules()] == [True, True, True, True, False, True]


def test_without_gradients_or_a_capture_a_model_keeps_its_mode() -> None:
    module, x = Moody(nn.Tanh()).eval(), torch.randn(4, 6)
    plain = gw.compile(module, example_inputs=(x,), backend="aten", cache=False)
    lazy = gw.compile(module, backend="aten", cache=False, trainable=True)
    for model in (plain, lazy):
        with pytest.raises(gw.InputError, match=r"this model was captured in eval mode: compile"):
            model.train()
    lazy(x)
    assert lazy.train().training


def test_what_cannot_be_captured_in_the_other_mode_says_so() -> None:
    class Branching(nn.Module):
        def forward(self, x):
            return x * 2 if self.training and x.sum() > 0 else x

    _, model, _ = moody(Branching())
    with pytest.raises(gw.InputError, match="captured in eval mode, and it cannot be captured in train mode"):
        model.train()


# --- files ----------------------------------------------------------------------------------------------------------------------


def test_a_saved_model_is_trained_further(tmp_path: Path) -> None:
    module, tokens = models.load("decoder", "tiny")[0], torch.randint(0, 256, (2, 24), generator=torch.Generator().manual_seed(0))
    passes = [gw.RatRecurrence(chunk=4, window=2, sinks=0)]
    model = gw.compile(module, passes, example_inputs=(tokens,), backend="aten", cache=False, trainable=True)
    model.save(tmp_path / "first.gw")
    loaded = gw.load(tmp_path / "first.gw", backend="aten", cache=False, trainable=True).train()
    for each in (model, loaded):
        for _ in range(2):
            optimizer = torch.optim.SGD(each.parameters(), 0.1)
            optimizer.zero_grad()
            each(tokens).square().mean().backward()
            optimizer.step()
    kinds = {name: weight.kind for name, weight in loaded.program.weights.items()}
    assert kinds == {name: weight.kind for name, weight in model.program.weights.items()} and "added" in kinds.values()
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), loaded.state_dict().values(), strict=True))
    loaded.save(tmp_path / "second.gw")
    with torch.no_grad():
        assert torch.equal(gw.load(tmp_path / "second.gw", backend="aten", cache=False)(tokens), loaded(tokens))
    again = gw.load(tmp_path / "first.gw", backend="aten", cache=False)
    assert not again(tokens).requires_grad
    torch.testing.assert_close(again(tokens), gw.compile(module, passes, example_inputs=(tokens,), backend="aten", cache=False)(tokens))


def test_a_file_says_what_a_mode_changes(tmp_path: Path) -> None:
    for name, within in (("same", nn.Tanh()), ("other", nn.Dropout(0.1))):
        moody(within)[1].save(tmp_path / f"{name}.gw")
    module, x = Moody(nn.Tanh()).eval(), torch.randn(4, 6)
    gw.compile(module, example_inputs=(x,), backend="aten", cache=False).save(tmp_path / "unknown.gw")
    assert gw.load(tmp_path / "same.gw", backend="aten", trainable=True).train().training
    messages = {"other": "and train mode changes submodule within:", "unknown": "captured in eval mode: compile"}
    for name, message in messages.items():
        with pytest.raises(gw.InputError, match=message):
            gw.load(tmp_path / f"{name}.gw", backend="aten", trainable=True).train()
    with pytest.raises(gw.InputError, match="captured in eval mode: compile"):
        gw.load(tmp_path / "same.gw", backend="aten").train()
