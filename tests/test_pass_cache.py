"""What passes made is kept: found again it is what they would make, and where anything differs they run."""

import errno
import json
import os
import subprocess
import sys
import textwrap

import pytest
import torch
from torch import nn

import graphwright as gw
from graphwright.ir import capture
from graphwright.ir.float64 import exact_value
from graphwright.passes import Outcome
from graphwright.runtime import cache as cache_module
from graphwright.runtime import cache_key, pass_cache
from graphwright.runtime.pass_cache import NotKept, pass_key

X = torch.linspace(-2, 2, 2 * 3 * 8 * 8).view(2, 3, 8, 8)
PASSES = "slice-groups{memory_budget=50%}"


class Net(nn.Module):
    """A convolution whose batch norm is folded into it, a table that is folded, a linear layer, and a buffer that is neither."""

    def __init__(self, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.conv, self.norm, self.linear = nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.Linear(8, 8)
        self.norm.running_mean.normal_()
        self.register_buffer("table", torch.randn(8))
        self.register_buffer("offset", torch.randn(8))
        self.eval()

    def forward(self, x):
        y = self.norm(self.conv(x))
        return self.linear(y) * self.table.sin().cos() + self.offset


@pytest.fixture
def runs(monkeypatch):
    """The programs that passes ran on, in order."""
    seen = []
    real = gw.PassManager.run

    def counted(self, program):
        seen.append(program)
        return real(self, program)

    monkeypatch.setattr(gw.PassManager, "run", counted)
    return seen


def compiled(cache, model=None, passes=PASSES, x=X, **options):
    model = model if model is not None else Net()
    examples = {} if isinstance(model, gw.Program) else {"example_inputs": (x,)}
    return gw.compile(model, passes, cache=cache, **{"backend": "aten"} | examples | options)


def text(program):
    return str(program)


# --- a hit -----------------------------------------------------------------------------------------------------------------


def test_what_is_found_is_what_the_passes_made(cache, runs):
    first, second = compiled(cache), compiled(cache)
    assert len(runs) == 1
    assert text(second.program) == text(first.program)
    assert torch.equal(second(X), first(X))
    assert second.compilation.contract == first.compilation.contract
    assert second.compilation.reports == first.compilation.reports
    assert second.compilation.reports[0].kept and not first.compilation.reports[0].kept
    assert str(second.report()).replace("  (in an earlier run)", "") == str(first.report())
    assert second.report().memory == first.report().memory


def test_weights_that_came_through_are_those_of_the_module(cache):
    compiled(cache)
    module = Net()
    found = compiled(cache, module)
    assert found.program.weights["linear.weight"].tensor.data_ptr() == module.linear.weight.data_ptr()
    assert "conv.weight" not in found.program.weights, "it was folded"


def test_a_weight_that_is_written_to_after_a_hit_is_noticed_as_after_a_run(cache):
    compiled(cache)
    module = Net()
    found = compiled(cache, module)
    with torch.no_grad():
        module.conv.weight.mul_(2)
    with pytest.raises(gw.InputError, match="was changed after compiling, and passes have folded it"):
        found(X)


def test_states_are_the_models_own_after_a_hit(cache):
    class Counting(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("count", torch.zeros(()))

        def forward(self, x):
            self.count.add_(1)
            return x + self.count

    for _ in range(2):
        model = compiled(cache, Counting())
        assert [model(X)[0, 0, 0, 0].item() - X[0, 0, 0, 0].item() for _ in range(3)] == [1, 2, 3]


def test_progress_ends_on_a_hit(cache):
    told = []
    compiled(cache)
    compiled(cache, progress=lambda *state: told.append(state))
    assert told[-1][0] == told[-1][1] > 1


def test_a_second_process_finds_what_the_first_made_and_computes_the_same_bits(cache):
    source = """
    import json, sys, torch, graphwright as gw
    module, args, kwargs = gw.models.load("dit", "tiny")
    model = gw.compile(module, "slice-groups{memory_budget=40%}", example_inputs=args, example_kwargs=kwargs, backend="aten", cache=sys.argv[1])
    print(json.dumps({"kept": model.compilation.reports[0].kept, "sum": model(*args, **kwargs).double().sum().item(), "text": str(model.program)}))
    """
    command = [sys.executable, "-c", textwrap.dedent(source), str(cache.folder)]
    first, second = (json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout) for _ in range(2))
    assert (first.pop("kept"), second.pop("kept")) == (False, True)
    assert first == second


def test_two_processes_that_compile_at_once_are_both_right(cache):
    source = """
    import sys, torch, graphwright as gw
    module, args, kwargs = gw.models.load("decoder", "tiny")
    model = gw.compile(module, example_inputs=args, example_kwargs=kwargs, backend="aten", cache=sys.argv[1])
    leaves = torch.utils._pytree.tree_leaves(module(*args, **kwargs)), torch.utils._pytree.tree_leaves(model(*args, **kwargs))
    assert all(torch.allclose(a, b, atol=1e-4) for a, b in zip(*leaves))
    """
    command = [sys.executable, "-c", textwrap.dedent(source), str(cache.folder)]
    both = [subprocess.Popen(command) for _ in range(2)]
    assert [process.wait() for process in both] == [0, 0]
    assert len(cache.entries("passes")) == 1


# --- a miss ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["conv.weight", "norm.running_var", "table", "linear.weight", "offset"])
def test_a_weight_with_another_value_is_never_given_the_result_of_the_first(cache, runs, name):
    compiled(cache)
    module = Net()
    with torch.no_grad():
        dict([*module.named_parameters(), *module.named_buffers()])[name].add_(1)
    assert torch.allclose(compiled(cache, module)(X), module(X), atol=1e-5)
    assert len(runs) == 2


def test_a_program_whose_weights_were_written_to_in_place_is_hashed_anew(cache):
    module = Net()
    program = capture(module, (X,))
    compiled(cache, program)
    with torch.no_grad():
        module.conv.weight.mul_(2)
        module.table.data.mul_(3)  # torch counts no such write
    assert torch.allclose(compiled(cache, program)(X), module(X), atol=1e-5)


def test_another_network_of_the_same_shapes_is_not_given_the_result_of_the_first(cache, runs):
    compiled(cache)
    other = Net(seed=1)
    assert torch.allclose(compiled(cache, other)(X), other(X), atol=1e-5)
    assert len(runs) == 2


def test_weights_that_trade_their_names_are_a_miss(cache, runs):
    module = Net()
    compiled(cache, module)
    module.table, module.offset = module.offset, module.table
    assert torch.allclose(compiled(cache, module)(X), module(X), atol=1e-5)
    assert len(runs) == 2


@pytest.mark.parametrize(
    "options",
    [
        {"passes": "slice-groups{memory_budget=40%}"},
        {"passes": ""},
        {"cleanups": False},
        {"passes": f"remove-no-ops,{PASSES}"},
        {"x": X[:1]},
    ],
    ids=["an option", "a pass", "clean-ups", "one pass more", "the inputs' types"],
)
def test_other_passes_and_other_inputs_are_a_miss(cache, runs, options):
    compiled(cache)
    module, x = Net(), options.get("x", X)
    assert torch.allclose(compiled(cache, module, **options)(x), module(x), atol=1e-5)
    assert len(runs) == 2


def test_another_mode_of_the_module_is_a_miss(cache, runs):
    compiled(cache)
    compiled(cache, Net().train())
    assert len(runs) == 2


def test_another_line_of_the_users_is_a_miss(cache, runs):
    class Here(nn.Module):
        def forward(self, x):
            return x.sin()

    class There(nn.Module):
        def forward(self, x):
            return x.sin()

    here, there = compiled(cache, Here()), compiled(cache, There())
    assert len(runs) == 2 and text(here.program) != text(there.program)


@pytest.mark.parametrize("part", ["graphwright", "torch", "python", "libraries", "cpu", "threads", "settings"])
def test_another_environment_is_a_miss(cache, runs, monkeypatch, part):
    compiled(cache)
    other = cache_key.environment() | {part: "another"}
    monkeypatch.setattr(pass_cache, "environment", lambda: other)
    compiled(cache)
    assert len(runs) == 2


def test_what_a_check_asks_for_is_computed(cache, runs):
    compiled(cache)
    assert compiled(cache, verify="numeric").compilation.reports[-1].verdict.kind == "right"
    assert len(runs) == 2


def test_a_pass_that_fails_fails_again(cache):
    impossible = gw.SliceGroups("1B", insist=True)
    for _ in range(2):
        with pytest.raises(gw.BudgetError):
            compiled(cache, passes=[impossible])
    assert cache.entries("passes") == []


# --- what is not kept ------------------------------------------------------------------------------------------------------


class Own(gw.Pass):
    """A pass of a user's."""

    name, contract = "own", gw.Contract.EXACT

    def run(self, rewriter):
        return Outcome()


class Posing(gw.FoldConstants):
    """A user's pass under the name of one of ours."""


@pytest.mark.parametrize("each", [Own(), Posing()], ids=["another name", "a name of ours"])
def test_passes_of_others_run_each_time(cache, runs, each):
    for _ in range(2):
        compiled(cache, passes=[each])
    assert len(runs) == 2 and cache.entries() == []
    with pytest.raises(NotKept, match=f"pass {each.name} is none of graphwright's own, and what it depends on is not known"):
        pass_key(capture(Net(), (X,)), [each])


def test_programs_of_dynamic_sizes_are_not_kept(cache, runs):
    for _ in range(2):
        compiled(cache, dynamic_shapes={"x": {0: torch.export.Dim("n", min=1, max=4)}})
    assert len(runs) == 2 and cache.entries("passes") == []
    with pytest.raises(NotKept, match="the program is not kept: it has symbols"):
        pass_key(capture(nn.ReLU(), (X,), dynamic_shapes={"input": {0: torch.export.Dim("n")}}), [])


def test_programs_without_values_are_not_kept(cache):
    program = gw.parse(text(capture(Net(), (X,))))
    with pytest.raises(NotKept, match="weight conv.weight has no values of its own in memory"):
        pass_key(program, [])


def test_a_broken_program_is_an_error_as_without_a_cache(cache):
    program = capture(Net(), (X,))
    call = program.main.calls[0]
    call.target = print
    for kept in (cache, False):
        with pytest.raises(gw.VerifyError, match="is not an operation of the IR"):
            compiled(kept, program)
    program = capture(Net(), (X,))
    program.schedules["row"] = object()
    with pytest.raises(gw.VerifyError, match="schedule row is no plain data"):
        compiled(cache, program)


def test_weights_whose_values_cannot_be_read_are_no_error(cache, monkeypatch):
    def unreadable(tensor):
        raise RuntimeError("no bytes")

    monkeypatch.setattr(pass_cache, "content_digest", unreadable)
    module = Net()
    assert torch.allclose(compiled(cache, module)(X), module(X), atol=1e-5)
    assert cache.entries("passes") == []


def test_without_a_cache_passes_run_each_time(runs):
    compiled(False)
    compiled(False)
    assert len(runs) == 2


def test_a_result_that_is_not_found_again_as_it_was_is_not_kept(cache, runs, monkeypatch):
    real = pass_cache.rebuild

    def wrong(data, weights, symbols):
        program = real(data, weights, symbols)
        program.schedules["row"] = 3
        return program

    monkeypatch.setattr(pass_cache, "rebuild", wrong)
    compiled(cache)
    assert cache.entries("passes") == []


def test_a_result_during_which_a_weight_was_written_to_is_not_kept(cache, monkeypatch):
    module = Net()
    real = gw.PassManager.run

    def written_to(self, program):
        result = real(self, program)
        with torch.no_grad():
            module.linear.weight.mul_(2)
        return result

    monkeypatch.setattr(gw.PassManager, "run", written_to)
    compiled(cache, module)
    assert cache.entries("passes") == []


# --- damage ----------------------------------------------------------------------------------------------------------------


def entry_file(cache):
    (path,) = (cache.folder / "passes").iterdir()
    return path


def test_a_damaged_entry_is_a_miss_and_is_replaced(cache, runs):
    first = compiled(cache)(X)
    whole = entry_file(cache).read_bytes()
    for at in range(0, len(whole), len(whole) // 7):
        entry_file(cache).write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        assert torch.equal(compiled(cache)(X), first)
    entry_file(cache).write_bytes(whole[:-1])
    assert torch.equal(compiled(cache)(X), first)
    runs.clear()
    assert torch.equal(compiled(cache)(X), first) and runs == []


@pytest.mark.parametrize("value", [b"", b"\0" * 8, (2**40).to_bytes(8, "little"), b"\4\0\0\0\0\0\0\0abcd"])
def test_an_entry_whose_content_is_none_is_a_miss(cache, runs, value):
    first = compiled(cache)(X)
    cache.put("passes", cache.entries("passes")[0].key, value)
    assert torch.equal(compiled(cache)(X), first) and len(runs) == 2


def test_on_a_full_disk_compiling_works(cache, monkeypatch):
    def full(path, mode):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(cache_module, "atomic_write", full)
    module = Net()
    assert torch.allclose(compiled(cache, module)(X), module(X), atol=1e-5)
    assert cache.entries() == []


# --- what is asked for later -----------------------------------------------------------------------------------------------


def test_the_history_of_what_is_found_is_that_of_the_run(cache, runs):
    first, second = compiled(cache), compiled(cache)
    assert len(second.history) == len(first.history)
    assert second.history[-1] is second.program and len(runs) == 1, "nothing between was asked for"
    assert list(map(text, second.history)) == list(map(text, first.history))
    assert list(map(text, second.history[1:3])) == list(map(text, first.history[1:3]))
    assert second.program.pipeline == first.program.pipeline
    with pytest.raises(IndexError):
        second.history[99]


def test_the_history_of_weights_that_were_changed_since_is_an_error(cache):
    compiled(cache)
    module = Net()
    found = compiled(cache, module)
    with torch.no_grad():
        module.table.mul_(2)
    assert found.history[0] is not None
    with pytest.raises(gw.InputError, match="what passes made of weights that were changed since is not known: compile the model again"):
        found.history[1]


def test_folded_weights_have_their_float64_values_after_a_hit(cache):
    compiled(cache)
    found = compiled(cache)
    again = gw.compile(found, [gw.ShareSubexpressions()], verify="numeric", backend="aten", cache=cache)
    assert torch.allclose(again(X), Net()(X), atol=1e-5)
    made = compiled(False).program.weights
    folded = [name for name in made if name not in capture(Net(), (X,)).weights]
    assert folded
    for name in folded:
        value = exact_value(found.program.weights[name])
        assert value.dtype == torch.float64 and torch.equal(value, exact_value(made[name]))


def test_what_is_found_is_saved_and_loaded_as_what_was_made(cache, tmp_path):
    for n in range(2):
        compiled(cache).save(tmp_path / f"{n}.gw")
    models = [gw.load(tmp_path / f"{n}.gw", backend="aten") for n in range(2)]
    assert text(models[0].program) == text(models[1].program)
    assert torch.equal(models[0](X), models[1](X))


def test_folded_weights_keep_their_layout(cache):
    class Folding(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("table", torch.randn(2, 3, 4, 5).contiguous(memory_format=torch.channels_last))

        def forward(self, x):
            return x.sum() + self.table.sin(), self.table.cos().to(torch.bfloat16) + x.sum(), self.table[:0].sin() + x.sum()

    module = Folding()
    first, second = compiled(cache, module), compiled(cache, module)
    assert text(first.program) == text(second.program)
    assert [w.stride for w in first.program.weights.values()] == [w.tensor.stride() for w in second.program.weights.values()]
    assert all(torch.equal(a, b) for a, b in zip(first(X), second(X), strict=True))
