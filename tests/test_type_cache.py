"""Artifacts are read without inferring types again: the program is the one that reading its text gives, and is held to its weights."""

import pytest
import torch
from torch import nn

import graphwright as gw
from graphwright.ir import capture
from graphwright.ir.snapshot import take
from graphwright.runtime import type_cache
from graphwright.runtime.type_cache import read_program

X = torch.randn(4, 6)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(6, 6)
        self.register_buffer("count", torch.zeros(()))

    def forward(self, x):
        self.count.add_(1)
        return self.layer(x).view(2, 2, 6).transpose(0, 1) * 2 + self.count


@pytest.fixture
def readings(monkeypatch):
    """The texts whose types were inferred."""
    seen = []
    real = type_cache._read

    def counted(text, weights):
        seen.append(text)
        return real(text, weights)

    monkeypatch.setattr(type_cache, "_read", counted)
    return seen


def text_and_weights(net=None, **options):
    program = capture(net or Net(), (X,), **options)
    return str(program), {name: weight.tensor for name, weight in program.weights.items()}


def test_an_artifact_is_loaded_the_second_time_without_inference(cache, readings, tmp_path):
    net = Net()
    gw.compile(net, "slice-groups", example_inputs=(X,), backend="aten").save(tmp_path / "net.gw")
    first, second = (gw.load(tmp_path / "net.gw", backend="aten", cache=cache) for _ in range(2))
    assert len(readings) == 1
    assert str(second.program) == str(first.program) and take(second.program) == take(first.program)
    assert all(torch.equal(first(X), second(X)) for _ in range(3)), "states count on"
    assert second.program.pipeline.endswith("slice-groups")
    third = gw.compile(tmp_path / "net.gw", [gw.FoldConstants()], backend="aten", cache=cache)
    assert len(readings) == 1 and torch.equal(third(X), Net()(X))


def test_weights_of_other_values_than_the_text_says_are_refused_each_time(cache):
    text, weights = text_and_weights()
    read_program(text, weights, cache)
    other = weights | {"layer.weight": weights["layer.weight"] + 1}
    for name, table in (
        ("layer.weight has other contents", other),
        ("has no layer.bias", {k: v for k, v in weights.items() if "bias" not in k}),
    ):
        with pytest.raises(gw.ParseError, match=name) as found:
            read_program(text, table, cache)
        with pytest.raises(gw.ParseError) as read:
            read_program(text, table, None)
        assert str(found.value) == str(read.value)


def test_another_text_is_another_program(cache, readings):
    text, weights = text_and_weights()
    read_program(text, weights, cache)
    other = text.replace(", 2)", ", 3)")
    assert other != text and str(read_program(other, weights, cache)) == other
    assert len(readings) == 2


def test_another_environment_reads_anew(cache, readings, monkeypatch):
    text, weights = text_and_weights()
    read_program(text, weights, cache)
    environment = type_cache.environment() | {"torch": "2.11.0"}
    monkeypatch.setattr(type_cache, "environment", lambda: environment)
    read_program(text, weights, cache)
    assert len(readings) == 2


@pytest.mark.parametrize("value", [b"", b"x\x9cno", "cut"])
def test_an_entry_that_holds_no_snapshot_is_read_anew(cache, readings, value):
    text, weights = text_and_weights()
    read_program(text, weights, cache)
    (entry,) = cache.entries("types")
    cache.put("types", entry.key, cache.get("types", entry.key)[:-5] if value == "cut" else value)
    assert str(read_program(text, weights, cache)) == text and len(readings) == 2
    assert str(read_program(text, weights, cache)) == text and len(readings) == 2, "it was replaced"


def test_text_of_another_form_is_read_each_time(cache, readings):
    text, weights = text_and_weights()
    head, function = text.split("\nfunction ")
    turned = f"graphwright 1\nfunction {function}" + head.removeprefix("graphwright 1")
    with pytest.raises(gw.ParseError):
        read_program(turned, weights, cache)  # weights are declared before they are used
    spaced = text.replace(" = aten", "  =  aten")
    for _ in range(2):
        assert str(read_program(spaced, weights, cache)) == text
    assert cache.entries() == []


def test_programs_of_dynamic_sizes_are_read_each_time(cache, readings):
    text, weights = text_and_weights(nn.Linear(6, 6), dynamic_shapes={"input": {0: torch.export.Dim("n", min=2, max=9)}})
    for _ in range(2):
        assert str(read_program(text, weights, cache)) == text
    assert len(readings) == 2 and cache.entries() == []
