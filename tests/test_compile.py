"""`compile` gives a model that is called like the original, says exactly what does not fit, and leaves the original as it was."""

import copy
import dataclasses
import io
import json
import random
import subprocess
import sys
import threading
import warnings
from collections import defaultdict, namedtuple

import numpy as np
import pytest
import torch
from torch import nn

import graphwright as gw
from graphwright.runtime import backend as backend_module
from graphwright.runtime.backend import has_cpp_compiler


class Net(nn.Module):
    """A linear layer, an optional mask, a keyword-only scale, and a counter that each call increases."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(6, 6)
        self.register_buffer("count", torch.zeros(()))

    def forward(self, x, mask=None, *, scale=2.0):
        self.count.add_(1)
        y = self.linear(x) * scale
        if mask is not None:
            y = y * mask
        return {"y": y, "more": (y + self.count, x.shape[0])}


X = torch.randn(5, 6)
BATCH = {"x": {0: torch.export.Dim("batch", min=2, max=9)}}


def compiled(module=None, *args, **options):
    options = {"example_inputs": args or (X,), "backend": "aten"} | options
    return gw.compile(module if module is not None else Net(), **options)


def dynamic():
    return compiled(dynamic_shapes=BATCH)


# --- calling ---------------------------------------------------------------------------------------------------------------


def test_a_call_returns_what_the_module_returns_in_the_same_nesting():
    net = Net()
    ours, theirs = compiled(net)(X), net(X)
    assert torch.equal(ours["y"], theirs["y"]) and torch.equal(ours["more"][0], theirs["more"][0])
    assert list(ours) == ["y", "more"] and ours["more"][1] == 5 and isinstance(ours["more"], tuple)


def test_arguments_may_be_named_in_any_order_and_defaults_may_be_spelled_out():
    mask = torch.rand(5, 6)
    net, call = Net(), (X, mask)
    model = compiled(net, *call, example_kwargs={"scale": 3.0})
    expected = net(X, mask, scale=3.0)["y"]
    assert torch.equal(model(scale=3.0, mask=mask, x=X)["y"], expected)
    assert torch.equal(model(X, mask=mask, scale=3.0)["y"], expected)
    assert torch.equal(compiled()(X, None, scale=2.0)["more"][0][:0], X[:0])


def test_dynamic_sizes_range_over_their_symbol():
    net, model = Net(), dynamic()
    net.load_state_dict(model.state_dict())
    for rows in (2, 3, 9):
        x = torch.randn(rows, 6)
        ours, theirs = model(x), net(x)
        assert torch.equal(ours["y"], theirs["y"]) and ours["more"][1] == rows


MISFITS = {
    "missing": ((), {}, "argument x is missing"),
    "unknown": ((X,), {"z": 1}, "argument z was not there when the model was captured, which takes x"),
    "too many": ((X, None, 3), {}, "the call has 3 positional arguments, but the model takes 2 \\(x, mask\\)"),
    "twice": ((X,), {"x": X}, "argument x is given twice, by position and by name"),
    "not the default": ((X, X), {}, "argument mask is a tensor .*, but the model was captured with its default None"),
    "another constant": ((X,), {"scale": 3.0}, "argument scale is 3.0, but the model was captured with its default 2.0"),
    "another kind": ((3,), {}, r"argument x is 3, but the model takes a tensor float32\[batch, 6\] there"),
    "another tree": (([X],), {}, "argument x is a list, but the model was captured with a single value there"),
    "another dtype": ((X.double(),), {}, "argument x is torch.float64, but the model was captured for torch.float32"),
    "another device": ((X.to("meta"),), {}, "argument x is on meta, but the model was captured for cpu"),
    "another layout": ((X.to_sparse(),), {}, "argument x has layout torch.sparse_coo"),
    "another rank": ((X[0],), {}, r"argument x has 1 dims, \[6\], but the model takes float32\[batch, 6\]"),
    "another static size": ((X[:, :4],), {}, "argument x dim 1 is 4, but the model was captured for 6"),
    "below the range": ((X[:1],), {}, "argument x dim 0 is 1, but batch ranges from 2 to 9"),
    "above the range": ((torch.randn(10, 6),), {}, "argument x dim 0 is 10, but batch ranges from 2 to 9"),
}


@pytest.fixture(scope="module")
def dynamic_model():
    return dynamic()


@pytest.mark.parametrize("name", MISFITS)
def test_a_misfit_is_one_sentence_that_names_the_argument(name, dynamic_model):
    args, kwargs, message = MISFITS[name]
    with pytest.raises(gw.InputError, match=f"^{message}") as failure:
        dynamic_model(*args, **kwargs)
    assert "\n" not in str(failure.value)


class Nested(nn.Module):
    def forward(self, batch, pair):
        return batch["a"] + batch["b"] + pair[0] * pair[1]


@pytest.mark.parametrize(
    ("batch", "pair", "message"),
    [
        ({"a": X}, (X, X), r"argument batch has the keys 'a', but the model was captured with 'a', 'b'"),
        ({"a": X, "b": X[:2]}, (X, X), r"argument batch\['b'\] dim 0 is 2, but the model was captured for 5"),
        ({"a": X, "b": X}, [X, X], "argument pair is a list, but the model was captured with a tuple there"),
        ({"a": X, "b": X}, (X,), "argument pair has 1 items, but the model was captured with 2"),
        (X, (X, X), "argument batch is a Tensor, but the model was captured with a dict there"),
    ],
)
def test_a_misfit_inside_a_nested_argument_names_its_path(batch, pair, message):
    model = compiled(Nested(), {"a": X, "b": X}, (X, X))
    with pytest.raises(gw.InputError, match=f"^{message}"):
        model(batch, pair)


def test_two_arguments_that_are_one_tensor_in_the_example_stay_two():
    class Difference(nn.Module):
        def forward(self, a, b):
            return a - b

    for model in (compiled(Difference(), X, X), gw.compile(Difference(), backend="aten")):
        assert torch.equal(model(X, X), X - X)
        assert torch.equal(model(X, 3 * X), X - 3 * X)


def test_a_dict_may_come_in_another_order():
    model, y = compiled(Nested(), {"a": X, "b": 2 * X}, (X, X)), torch.rand(5, 6)
    assert torch.equal(model({"b": y, "a": X}, (X, X)), Nested()({"a": X, "b": y}, (X, X)))


def test_an_input_may_be_a_lazy_conjugate():
    class Model(nn.Module):
        def forward(self, x):
            return (x * 2).abs().exp()

    x = torch.randn(64, 32, dtype=torch.complex64)
    model = compiled(Model(), x, passes=[gw.SliceGroups("25%")])
    assert "gw.sliced" in str(model.program) and torch.equal(model(x.conj()), Model()(x.conj()))


def test_sizes_of_one_symbol_must_agree():
    class Sum(nn.Module):
        def forward(self, a, b):
            return a + b

    rows = torch.export.Dim("rows", max=20)
    model = compiled(Sum(), X, X, dynamic_shapes={"a": {0: rows}, "b": {0: rows}})
    with pytest.raises(gw.InputError, match="^argument b dim 0 is 4, but rows is 5 already, from a dim 0"):
        model(X, X[:4])


def test_sizes_that_are_multiples_of_a_symbol_must_agree():
    class Pairs(nn.Module):
        def forward(self, a, b):
            return a + b.reshape(a.shape[0], 2, 6).sum(1)

    rows = torch.export.Dim("rows", max=20)
    model = compiled(Pairs(), X, torch.randn(10, 6), dynamic_shapes={"a": {0: rows}, "b": {0: 2 * rows}})
    assert model(X[:3], torch.randn(6, 6)).shape == (3, 6)
    with pytest.raises(gw.InputError, match=r"^argument b dim 0 is 7, but 2\*rows is 6"):
        model(X[:3], torch.randn(7, 6))


def test_inputs_may_lie_in_memory_in_another_order():
    class View(nn.Module):
        def forward(self, x):
            return x.reshape(30) * 2

    assert torch.equal(compiled(View())(X.t().contiguous().t()), View()(X))


@dataclasses.dataclass
class Output:
    first: torch.Tensor
    second: torch.Tensor | None


torch.utils._pytree.register_dataclass(Output, serialized_type_name="tests.Output")


def test_a_dataclass_comes_back_as_itself():
    class Net(nn.Module):
        def forward(self, pair: Output) -> Output:
            return Output(pair.first + pair.second, None)

    output = compiled(Net(), Output(X, X))(Output(X, 2 * X))
    assert type(output) is Output and torch.equal(output.first, 3 * X) and output.second is None


# --- states ----------------------------------------------------------------------------------------------------------------


def test_states_are_the_models_own_and_move_with_each_call():
    net = Net()
    model = compiled(net)
    for call in (1, 2, 3):
        output = model(X)
        assert torch.equal(output["more"][0] - output["y"], (output["y"] + call) - output["y"])
    assert net.count == 0 and model.state_dict()["count"] == 3


@pytest.mark.parametrize("norm", [nn.BatchNorm2d, nn.InstanceNorm2d])
def test_a_norm_in_training_moves_its_own_statistics_and_not_the_modules(norm):
    module = norm(4, track_running_stats=True).train()
    theirs, x = copy.deepcopy(module), torch.randn(2, 4, 5, 5)
    compiled = gw.compile(module, example_inputs=(x,), backend="aten", verify="numeric")
    for _ in range(2):
        torch.testing.assert_close(compiled(x), theirs(x))
    torch.testing.assert_close(compiled.state_dict()["running_var"], theirs.running_var)
    assert torch.equal(module.running_var, torch.ones(4))


def test_an_input_that_the_model_writes_to_is_written_to():
    class Append(nn.Module):
        def forward(self, cache, x):
            cache[1].copy_(x)
            return cache.sum(0)

    cache, theirs, x = torch.zeros(3, 6), torch.zeros(3, 6), torch.randn(6)
    model = compiled(Append(), torch.zeros(3, 6), x)
    assert torch.equal(model(cache, x), Append()(theirs, x)) and torch.equal(cache, theirs)
    strided = torch.zeros(6, 3).t()
    model(strided, x)
    assert torch.equal(strided, theirs)


def test_an_output_does_not_change_when_a_later_call_moves_the_state_that_it_shows():
    class Show(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("count", torch.zeros(2))

        def forward(self, x):
            self.count.add_(x)
            return self.count

    model = compiled(Show(), torch.ones(2))
    first, second = model(torch.ones(2)), model(torch.ones(2))
    assert first.tolist() == [1, 1] and second.tolist() == [2, 2]


def test_a_model_made_in_inference_mode_moves_its_states_outside():
    with torch.inference_mode():
        model = compiled(Net(), torch.randn(5, 6))
        model(torch.randn(5, 6))
    model(X)
    assert model.state_dict()["count"] == 2


@pytest.mark.parametrize("order", [("current", "previous"), ("previous", "current")])
def test_a_state_may_become_what_another_was(order):
    class ShiftRegister(nn.Module):
        def __init__(self):
            super().__init__()
            for name in order:
                self.register_buffer(name, torch.zeros(2))

        def forward(self, x):
            oldest = self.previous + 0
            self.previous.copy_(self.current)
            self.current.copy_(x)
            return oldest

    model = compiled(ShiftRegister(), torch.ones(2))
    assert [model(torch.full((2,), float(n)))[0] for n in range(1, 6)] == [0, 0, 1, 2, 3]


def test_inputs_that_the_model_swaps_are_swapped():
    class Swap(nn.Module):
        def forward(self, a, b):
            before = a.clone()
            a.copy_(b)
            b.copy_(before)
            return a + 0

    a, b = torch.ones(2), torch.zeros(2)
    compiled(Swap(), torch.ones(2), torch.zeros(2))(a, b)
    assert a.tolist() == [0, 0] and b.tolist() == [1, 1]


# --- as a module -----------------------------------------------------------------------------------------------------------


def test_parameters_and_buffers_keep_their_names_and_share_memory():
    net = Net()
    model = compiled(net)
    assert list(model.state_dict()) == ["linear.weight", "linear.bias", "count"]
    assert dict(model.named_parameters()).keys() == {"linear.weight", "linear.bias"}
    assert model.state_dict()["linear.weight"].data_ptr() == net.linear.weight.data_ptr()


def test_what_a_compiled_model_cannot_do_says_what_to_do():
    model = compiled(Net().eval())
    for attempt, error, message in (
        (lambda: model.half(), gw.TargetError, "convert the original module and compile it again"),
        (lambda: model.to("meta"), gw.TargetError, "convert the original module and compile it again"),
        (lambda: model.train(), gw.InputError, r"captured in eval mode: compile the original after .train\(\)"),
        (lambda: model.load_state_dict({}), gw.InputError, "load them into the original module and compile it again"),
        (lambda: torch.save(model, io.BytesIO()), gw.ArtifactError, r"compiled.save\('model.gw'\)"),
        (lambda: copy.deepcopy(model), gw.ArtifactError, "share it"),
    ):
        with pytest.raises(error, match=message):
            attempt()
    assert model.float().to("cpu").eval() is model


@pytest.mark.parametrize("training", [False, True])
def test_a_model_stays_in_the_mode_it_was_captured_in(training, tmp_path):
    net = Net().train(training)
    model = compiled(net)
    model.save(tmp_path / "net.gw")
    lazy = gw.compile(net.train(not training), backend="aten")
    net.train(training)
    lazy(X)
    for each in (model, lazy, compiled(model), gw.load(tmp_path / "net.gw", backend="aten"), compiled(tmp_path / "net.gw")):
        assert each.training == training and each.train(training) is each


def test_measuring_keeps_states_and_fills_in_the_report():
    model = compiled()
    assert "not measured" in str(model.report())
    measured = model.measure(X)
    assert model.state_dict()["count"] == 0 and measured.seconds > 0
    text = str(model.report())
    assert "contract: exact." in text and "predicted, planned" in text and "measured" in text and "backend: aten" in text


def test_measuring_leaves_inputs_as_they_are():
    class Append(nn.Module):
        def forward(self, caches, x):
            caches["a"][1].copy_(x)
            return caches["a"].sum(0)

    caches = {"a": torch.zeros(3, 6)}
    compiled(Append(), {"a": torch.zeros(3, 6)}, torch.ones(6)).measure(caches, torch.ones(6))
    assert torch.equal(caches["a"], torch.zeros(3, 6))


# --- what may be compiled ----------------------------------------------------------------------------------------------------


def test_a_module_is_captured_on_its_first_call():
    net = Net()
    model = gw.compile(net, backend="aten")
    with pytest.raises(gw.InputError, match="captured on its first call"):
        print(model.program)
    assert torch.equal(model(X, scale=4.0)["y"], net(X, scale=4.0)["y"])
    assert "aten.linear" in str(model.program)


def test_an_exported_program_a_program_and_files_are_compiled_too(tmp_path):
    net = Net()
    exported = torch.export.export(net, (X,), strict=False)
    model = gw.compile(exported, backend="aten")
    model.save(tmp_path / "net.gw")
    torch.export.save(exported, tmp_path / "net.pt2")
    expected = net(X)["y"]
    for source in (exported, model.program, model, tmp_path / "net.gw", str(tmp_path / "net.gw")):
        assert torch.equal(gw.compile(source, backend="aten")(X)["y"], expected)
    assert torch.equal(gw.compile(tmp_path / "net.pt2", backend="aten", trusted=True)(X)["y"], expected)
    with pytest.raises(gw.ArtifactError, match="can run code when it is read: pass trusted=True"):
        gw.compile(tmp_path / "net.pt2")


def test_what_is_no_model_is_refused(tmp_path, capfd):
    with pytest.raises(gw.InputError, match="not a int"):
        gw.compile(3)
    with pytest.raises(gw.InputError, match="net.bin is no model file: these are .gw, .onnx and .pt2"):
        gw.compile(tmp_path / "net.bin")
    (tmp_path / "bad.pt2").write_bytes(b"nothing")
    with pytest.raises(gw.ArtifactError, match="bad.pt2 is not read by torch.export"):
        gw.compile(tmp_path / "bad.pt2", trusted=True)
    assert capfd.readouterr().err == ""


def test_weights_without_a_shape_are_told_before_anything_gives_them_one():
    net = nn.Sequential(nn.Linear(4, 4), nn.LazyLinear(2)).eval()
    with pytest.raises(gw.InputError, match="weight 1.weight has no shape before the model's first call: call the model once"):
        gw.compile(net, example_inputs=(torch.ones(3, 4),))
    assert nn.parameter.is_lazy(net[1].weight)


def test_a_nested_tensor_is_told_what_to_be_instead():
    ragged = torch.nested.nested_tensor([torch.ones(2, 4), torch.ones(3, 4)], layout=torch.jagged)
    with pytest.raises(gw.InputError, match="an input is a nested tensor, which no program can hold: pad it"):
        gw.compile(nn.Linear(4, 4).eval(), example_inputs=(ragged,))


def test_progress_is_a_function():
    with pytest.raises(gw.InputError, match="progress is a function of .*, not 3"):
        gw.compile(Net(), example_inputs=(X,), progress=3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"verify": "certain"}, "verify is 'certain', but must be one of"),
        ({"passes": "slice-groups,fold-constants", "cleanups": False}, "pass fold-constants must stand before pass slice-groups"),
    ],
)
def test_what_no_pipeline_can_be_is_refused_before_the_first_call(options, message):
    with pytest.raises(gw.PassError, match=message):
        gw.compile(nn.Linear(6, 6), backend="aten", **options)


def test_passes_run_are_held_to_their_contract_and_leave_their_programs():
    seen = []
    model = compiled(passes="remove-dead-code,fold-constants", cleanups=False, verify="numeric", progress=lambda *args: seen.append(args))
    assert model.program.pipeline == "remove-dead-code,fold-constants" and len(model.history) == 3
    assert seen[-1][0] == seen[-1][1] == 2
    assert "fold-constants" in str(model.report())


# --- backends --------------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(not has_cpp_compiler(), reason="no C++ compiler: install g++")
def test_inductor_serves_every_size_in_the_range_and_leaves_program_and_configuration_alone():
    import torch._dynamo.config
    import torch._inductor.config

    configs = [torch._dynamo.config, torch._inductor.config]
    before = [config.save_config_portable() for config in configs]
    net = Net()
    model = compiled(net, dynamic_shapes={"x": {0: torch.export.Dim("batch", max=64)}}, backend="inductor")
    text = str(model.program)
    for rows in (1, 2, 5, 64):
        x = torch.randn(rows, 6)
        # Fused code reassociates sums of 6 float32 terms.
        torch.testing.assert_close(model(x)["more"][0], net(x)["more"][0], rtol=1e-6, atol=1e-6)
    assert str(model.program) == text
    assert [config.save_config_portable() for config in configs] == before


def test_a_backend_that_cannot_run_here_says_what_to_do(monkeypatch):
    monkeypatch.setattr(backend_module, "has_cpp_compiler", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for name, message in (
        ("inductor", "install g\\+\\+ or clang\\+\\+, or use backend='aten'"),
        ("triton", "needs a GPU and found none"),
        ("tpu", "it is one of auto, aten, inductor, tuned, triton"),
    ):
        with pytest.raises(gw.TargetError, match=message):
            compiled(backend=name)
    assert backend_module.choose_backend("auto") == "tuned"  # which compiles nothing then


# --- threads ---------------------------------------------------------------------------------------------------------------


def in_threads(count, work):
    """Runs `work(n)` in `count` threads that start together; their results, or the first failure."""
    results, barrier = [None] * count, threading.Barrier(count)

    def body(n):
        barrier.wait()
        try:
            results[n] = work(n)
        except Exception as error:
            results[n] = error

    threads = [threading.Thread(target=body, args=(n,), daemon=True) for n in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive(), "a call hangs"
    return results


def test_calls_from_threads_equal_calls_in_turn():
    model = compiled(nn.Sequential(nn.Linear(6, 8), nn.GELU(), nn.Linear(8, 6)), dynamic_shapes=({0: torch.export.Dim("batch", max=40)},))
    inputs = [torch.randn(2 + n, 6) for n in range(16)]
    expected = [model(x) for x in inputs]
    results = in_threads(16, lambda n: [model(inputs[n]) for _ in range(50)])
    for outputs, wanted in zip(results, expected, strict=True):
        assert all(torch.equal(output, wanted) for output in outputs)


def test_no_call_loses_a_state_update():
    model = compiled()
    in_threads(8, lambda n: [model(X) for _ in range(25)])
    assert model.state_dict()["count"] == 200


def test_measuring_loses_no_state_update_of_another_thread():
    model = compiled()
    in_threads(4, lambda n: [model(X) for _ in range(100)] if n else [model.measure(X) for _ in range(5)])
    assert model.state_dict()["count"] == 300


def test_threads_that_call_first_share_one_capture():
    model = gw.compile(nn.Linear(6, 6), backend="aten")
    programs = in_threads(8, lambda n: (model(X), model.program)[1])
    assert all(program is programs[0] for program in programs)


def test_threads_may_compile_at_once():
    modules = [nn.Sequential(nn.Linear(6, 8 + n), nn.GELU(), nn.Linear(8 + n, 6)) for n in range(6)]
    results = in_threads(6, lambda n: compiled(modules[n])(X))
    for module, result in zip(modules, results, strict=True):
        torch.testing.assert_close(result, module(X))


# --- untouched -------------------------------------------------------------------------------------------------------------


def surroundings():
    """Every global that compiling must leave alone."""
    return {
        "torch rng": torch.get_rng_state().tolist(),
        "numpy rng": str(np.random.get_state()),
        "random": random.getstate(),
        "dtype": torch.get_default_dtype(),
        "grad": torch.is_grad_enabled(),
        "threads": torch.get_num_threads(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "precision": torch.get_float32_matmul_precision(),
        "tf32": torch.backends.cuda.matmul.allow_tf32,
        "filters": list(warnings.filters),
        "path": list(sys.path),
    }


def portrait(module):
    """Everything of a module that a user can see."""
    return {
        name: (
            m.training,
            sorted(m.__dict__),
            {k: (id(v), v.requires_grad, v.tolist()) for k, v in m._parameters.items() if v is not None},
            {k: (id(v), v.tolist()) for k, v in m._buffers.items() if v is not None},
            [len(hooks) for key, hooks in sorted(m.__dict__.items()) if key.endswith("_hooks")],
        )
        for name, m in module.named_modules()
    }


@pytest.mark.parametrize("training", [False, True])
def test_compiling_and_calling_leaves_the_module_and_the_process_as_they_were(training, tmp_path):
    net = Net().train(training)
    net.linear.weight.requires_grad_(False)
    net.linear.register_forward_hook(lambda module, args, output: output * 1)
    compiled(net)(X)  # imports what is imported late
    before, around = portrait(net), surroundings()
    model = compiled(net)
    model(X)
    model.save(tmp_path / "net.gw")
    with pytest.raises(gw.InputError):
        model(X[:2])
    assert portrait(net) == before
    assert surroundings() == around


def test_a_failed_capture_leaves_the_module_as_it_was():
    class Branch(Net):
        def forward(self, x):
            return x if x.sum() > 0 else -x

    net = Branch()
    before, around = portrait(net), surroundings()
    with pytest.raises(gw.CaptureError):
        compiled(net)
    assert portrait(net) == before and surroundings() == around


# --- import ----------------------------------------------------------------------------------------------------------------


def test_importing_the_package_imports_none_of_torch_and_public_names_resolve():
    program = "import sys, graphwright; print([m for m in sys.modules if m.split('.')[0] == 'torch'])"
    assert subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout.strip() == "[]"
    assert set(gw.__all__) <= set(dir(gw))
    for name in gw.__all__:
        assert getattr(gw, name) is not None
    with pytest.raises(AttributeError, match="has no attribute 'missing'"):
        _ = gw.missing


# --- sizes that are expressions, and memory that is shared -----------------------------------------------------------------


class Doubled(nn.Module):
    def forward(self, a):
        return a * 2


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (13, r"argument a dim 0 is 13, but the model takes 4\*batch there, for an integer batch"),
        (36, "argument a dim 0 is 36, which makes batch 9, but batch ranges from 0 to 8"),
    ],
)
def test_a_symbol_that_stands_in_no_dim_alone_keeps_its_range(rows, message):
    shapes = {"a": {0: 4 * torch.export.Dim("batch", max=8)}}
    model = compiled(Doubled(), torch.randn(16, 4), dynamic_shapes=shapes)
    assert [model(torch.randn(n, 4)).shape[0] for n in (0, 4, 32)] == [0, 4, 32]
    with pytest.raises(gw.InputError, match=f"^{message}$"):
        model(torch.randn(rows, 4))


def test_a_dim_keeps_the_capitals_of_its_name_in_a_text_that_parses():
    model = compiled(Doubled(), torch.randn(16, 4), dynamic_shapes={"a": {0: torch.export.Dim("Batch")}})
    text = str(model.program)
    assert "symbol Batch in" in text and str(gw.parse(text)) == text


def test_an_input_that_is_written_to_may_not_share_memory_with_another():
    class Writes(nn.Module):
        def forward(self, a, b):
            a.add_(1)
            return b * 2

    model = compiled(Writes(), torch.zeros(4, 4), torch.zeros(4, 4))
    halves = torch.zeros(8, 4)
    assert torch.equal(model(halves[:4], halves[4:]), halves[4:])
    with pytest.raises(gw.InputError, match="^argument a is written to and shares memory with b: pass a copy of one$"):
        model(halves[:4], halves[2:6])
    with pytest.raises(gw.CaptureError, match="shares memory with another$"):
        compiled(Writes(), halves, halves)


# --- wrong kinds of arguments ----------------------------------------------------------------------------------------------


WRONG_KINDS = {
    "a bare tensor": (lambda: gw.compile(Doubled(), example_inputs=X), gw.InputError, r"example_inputs is a tuple .*: write \(x,\)"),
    "a list of kwargs": (lambda: gw.compile(Doubled(), example_kwargs=[1]), gw.InputError, "example_kwargs is a dict .*, not a list"),
    "no passes": (lambda: gw.compile(Doubled(), None), gw.PassError, "a pipeline is text, .*, not a NoneType"),
    "a number of passes": (lambda: gw.compile(Doubled(), 5), gw.PassError, "a pipeline is text, .*, not a int"),
    "a class": (lambda: gw.compile(Doubled(), gw.SliceGroups), gw.PassError, r"a pipeline is .*: write SliceGroups\(\)"),
    "no text": (lambda: gw.parse(None), gw.ParseError, "line 1, column 1: a program is read from text, not from a NoneType"),
    "bytes": (lambda: gw.parse(b"graphwright 1"), gw.ParseError, "line 1, column 1: a program is read from text, not from a bytes"),
    "a number for a weight": (
        lambda: gw.parse(str(gw.capture(nn.Linear(6, 6), (X,))), weights={"weight": 3, "bias": 3}),
        gw.ParseError,
        ".* is a int in the weight table, not a tensor",
    ),
    "a diff of text": (lambda: gw.diff("a", 3), gw.InputError, "diff compares two programs, .*, not a str"),
    "no path": (lambda: gw.load(None), gw.ArtifactError, "an artifact is named by a path, .*, not by a NoneType"),
    "no path to save": (lambda: compiled().save(None), gw.ArtifactError, "an artifact is named by a path, .*, not by a NoneType"),
    "a number for a digest": (lambda: gw.load("k.gw", sha256=3), gw.ArtifactError, "sha256 is the digest as text .*, not a int"),
    "a nested tensor": (
        lambda: compiled(Doubled(), X)(torch.nested.nested_tensor([X[0], X[1]])),
        gw.InputError,
        r"argument a is a nested tensor, but the model takes float32\[5, 6\]: call .to_padded_tensor",
    ),
    "dynamic shapes of a program": (
        lambda: gw.compile(gw.capture(Doubled(), (X,)), dynamic_shapes=BATCH),
        gw.InputError,
        "dynamic_shapes is for capturing a module, not for Program, whose sizes stand",
    ),
    "no file": (lambda: gw.compile("none.pt2", trusted=True), gw.ArtifactError, "none.pt2 does not exist"),
}


@pytest.mark.parametrize("name", WRONG_KINDS)
def test_a_wrong_kind_of_argument_is_one_typed_sentence(name):
    wrong, error, message = WRONG_KINDS[name]
    with pytest.raises(error, match=f"^{message}") as failure:
        wrong()
    assert type(failure.value) is error


@pytest.mark.parametrize(
    ("module", "example", "message"),
    [
        (nn.Linear(6, 6), X.double(), "linear .* input input of torch.float64 and weight weight of torch.float32"),
        (nn.Sequential(nn.ReLU(), nn.Linear(6, 6)), X.double(), "linear at 1 is given a value of torch.float64, as is input input, and"),
        (nn.LayerNorm(6), X.double(), "layer_norm .* input input of torch.float64 and weight weight of torch.float32"),
        (nn.Linear(6, 6), X.long(), "linear .* input input of torch.int64 and weight weight of torch.float32"),
        (nn.Linear(6, 6, bias=False), X.bool(), "linear .* input input of torch.bool and weight weight of torch.float32"),
        (nn.BatchNorm1d(6).eval(), X.long(), "batch_norm .* input input of torch.int64 and weight weight of torch.float32"),
        (nn.InstanceNorm1d(6, affine=True), torch.ones(1, 6, 5).double(), "instance_norm .* torch.float64 and .* of torch.float32"),
        (nn.Sequential(nn.ReLU(), nn.GELU()), X.long(), "gelu at 1 is given a value of torch.int64, .* floating-point values only"),
        (nn.Softmax(-1), X.long(), "softmax .* input input of torch.int64, and takes floating-point values only"),
        (nn.Conv1d(3, 4, 1), torch.ones(1, 3, 5).long(), "the model itself fails .*Input type"),
        (nn.Embedding(6, 4), X, "the model itself fails .*indices"),
    ],
)
def test_an_example_of_another_dtype_than_the_weights_is_refused_at_compile(module, example, message):
    with pytest.raises(gw.InputError, match=f"^{message}"):
        compiled(module, example)


def test_operations_that_convert_integers_take_them():
    class Converts(nn.Module):
        def forward(self, x):
            return torch.softmax(x, -1, dtype=torch.float32) + torch.sigmoid(x) + torch.matmul(x, x.T).sum()

    assert torch.equal(compiled(Converts(), X.long())(X.long()), Converts()(X.long()))


def test_norms_of_half_precision_take_parameters_of_single():
    x = X.bfloat16()
    assert compiled(nn.LayerNorm(6), x)(x).dtype == torch.bfloat16


# --- named tuples ----------------------------------------------------------------------------------------------------------


Pair = namedtuple("Pair", "left right")


class Named(nn.Module):
    def forward(self, pair):
        return Pair(pair.left + 1, pair.right), pair.left.topk(2), torch.var_mean(pair.right)


def test_named_tuples_come_back_as_what_they_were(tmp_path):
    model = compiled(Named(), Pair(X, X))
    model.save(tmp_path / "named.gw")
    for each in (model, gw.load(tmp_path / "named.gw", backend="aten")):
        pair, top, _ = each(Pair(X, X))
        assert type(pair) is Pair and type(top) is torch.return_types.topk and torch.equal(top.indices, X.topk(2).indices)
    with pytest.raises(gw.InputError, match="^argument pair is a tuple, but the model was captured with a .*:Pair there$"):
        model((X, X))
    with pytest.raises(gw.ArtifactError, match="elsewhere:Pair, which is not known in this process"):
        gw.compile(gw.parse(str(model.program).replace(f"{__name__}:Pair", "elsewhere:Pair")), backend="aten")


@pytest.mark.parametrize(
    ("kind", "context", "message"),
    [
        ("collections.OrderedDict", "7", "the program's outputs do not fit the classes that they are returned in"),
        ("collections.OrderedDict", '["a", "b"]', "the program's outputs do not fit the classes that they are returned in"),
        ("collections.OrderedDict", "[", "a collections.OrderedDict of unreadable context"),
        ("collections.defaultdict", "{}", "a collections.defaultdict of unreadable context"),
        (
            "collections.defaultdict",
            '{"default_factory_module": "this", "default_factory_name": "s", "dict_context": ["a"]}',
            "its missing items are made by this.s, and a program calls none but list",
        ),
    ],
)
def test_a_class_that_the_text_describes_wrongly_is_an_error_of_the_artifact(kind, context, message):
    text = (
        f"graphwright 1\nfunction main {{\n  takes ((*), {{}})\n  gives object {json.dumps(kind)} {json.dumps(context)} (*)\n"
        "  input %x : f32[2]\n  %0 = aten.relu.default(%x)\n  return %0\n}\n"
    )
    with pytest.raises(gw.ArtifactError, match=message):
        gw.compile(gw.parse(text), [], backend="aten")(torch.ones(2))
    assert "this" not in sys.modules, "the text of a program imported a module"


def test_a_defaultdict_of_lists_comes_back_as_one():
    class Net(nn.Module):
        def forward(self, x):
            return defaultdict(list, {"a": x + 1})

    output = compiled(Net(), X)(X)
    assert type(output) is defaultdict and output.default_factory is list and torch.equal(output["a"], X + 1)


def test_a_named_tuple_that_cannot_be_found_again_is_refused():
    hidden = namedtuple("Hidden", "x")

    class Returns(nn.Module):
        def forward(self, x):
            return hidden(x + 1)

    with pytest.raises(gw.CaptureError, match="^the named tuple Hidden .* top level of a module, or return a tuple or dict$"):
        compiled(Returns())


# --- wrong dynamic_shapes --------------------------------------------------------------------------------------------------


Dim = torch.export.Dim
MISSHAPEN = {
    "a number": (3, "dynamic_shapes is a dict by argument name, .*, not a int"),
    "an unknown argument": ({"y": {0: Dim("b")}}, "dynamic_shapes names argument y, but the example has a"),
    "an unknown dim": ({"a": {5: Dim("b")}}, "dynamic_shapes names dim 5 of a, which has 2 dims, numbered from 0"),
    "a dim by name": ({"a": {"0": Dim("b")}}, "dynamic_shapes names dim '0' of a, which has 2 dims, numbered from 0"),
    "too many arguments": (({0: Dim("b")}, None), "dynamic_shapes has 2 entries for the arguments, but the example has 1"),
    "too few dims": ({"a": (Dim("b"),)}, "dynamic_shapes gives 1 entries for a, which has 2 dims: write a dict by dim"),
    "no dim": ({"a": {0: "b"}}, "dynamic_shapes of a dim 0: the example has 5, but 'b' is given there, which must be an int"),
    "above the range": (({0: Dim("b", min=2, max=4)},), "dynamic_shapes of a dim 0: the example has 5, but b ranges from 2 to 4"),
    "below the range": ({"a": {0: Dim("b", min=9)}}, "dynamic_shapes of a dim 0: the example has 5, but b is at least 9"),
    "no multiple": ({"a": {0: 3 * Dim("b")}}, r"dynamic_shapes of a dim 0: the example has 5, but 3\*b is never 5"),
    "another size": ({"a": {0: 6}}, "dynamic_shapes of a dim 0: the example has 5, but the size given is 6"),
}


@pytest.mark.parametrize("name", MISSHAPEN)
def test_dynamic_shapes_that_do_not_fit_name_the_argument_and_the_dim(name):
    shapes, message = MISSHAPEN[name]
    with pytest.raises(gw.InputError, match=f"^{message}"):
        compiled(Doubled(), X, dynamic_shapes=shapes)


def test_a_failure_to_capture_is_all_that_is_said(capfd):
    class Branches(nn.Module):
        def forward(self, x):
            return x + 1 if x.sum() > 0 else x

    with pytest.raises(gw.CaptureError, match="control flow depends on tensor values"):
        compiled(Branches())
    with pytest.raises(gw.InputError, match="the model itself fails on the example inputs"):
        compiled(nn.Linear(4, 4))
    assert capfd.readouterr().err == ""


class Normed(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)

    def forward(self, x):
        return self.norm(self.conv(x))


def test_a_call_after_a_folded_weight_has_changed_is_refused(tmp_path):
    net, x = Normed().eval(), torch.randn(2, 3, 8, 8)
    model = gw.compile(net, example_inputs=(x,), backend="aten")
    torch.testing.assert_close(model(x), net(x))
    with torch.no_grad():
        net.norm.weight.add_(1)
    with pytest.raises(gw.InputError, match=r"weight norm\.weight was changed after compiling, and passes have folded it"):
        model(x)
    model.save(tmp_path / "net.gw")
    gw.load(tmp_path / "net.gw", backend="aten")(x)  # an artifact has its own


@pytest.mark.parametrize("name", ["conv.weight", "norm.bias", "norm.running_mean"])
def test_a_call_after_a_folded_weight_was_replaced_is_refused(name):
    net, x = Normed().eval(), torch.randn(2, 3, 8, 8)
    model = gw.compile(net, example_inputs=(x,), backend="aten")
    owner, key = net.get_submodule(name.split(".")[0]), name.split(".")[1]
    old = getattr(owner, key)
    setattr(owner, key, type(old)(old.detach() * 2))
    with pytest.raises(gw.InputError, match=f"weight {name} was changed after compiling, and passes have folded it"):
        model(x)


def test_weights_that_nothing_was_computed_from_follow_the_module():
    net, x = nn.Linear(3, 4), torch.randn(2, 3)
    model = gw.compile(net.eval(), example_inputs=(x,), backend="aten")
    with torch.no_grad():
        net.weight.mul_(2)
    torch.testing.assert_close(model(x), net(x).detach())


def test_the_report_says_that_a_model_was_captured_in_train_mode():
    net, x = nn.Sequential(nn.Linear(3, 4), nn.Dropout()), torch.randn(2, 3)
    said = [str(gw.compile(net.train(mode), example_inputs=(x,), backend="aten").report()) for mode in (True, False)]
    assert ["captured in train mode" in text for text in said] == [True, False]


class Cache:
    pass


def test_an_output_that_torch_does_not_know_is_a_capture_error_that_says_what_to_do():
    class Cached(nn.Module):
        def forward(self, x):
            return x + 1, Cache()

    with pytest.raises(gw.CaptureError, match=r"^the model cannot be captured: .* returns a Cache, .* call it with use_cache=False"):
        gw.compile(Cached(), example_inputs=(torch.ones(2),))


@pytest.mark.parametrize(
    ("convert", "reason"),
    [
        (lambda x: x.to_sparse(), "gives a sparse tensor"),
        (lambda x: torch.quantize_per_tensor(x, 0.1, 0, torch.qint8), "quantize_per_tensor.default has no place in the IR"),
    ],
    ids=["sparse", "quantized"],
)
def test_a_tensor_that_is_not_strided_is_a_capture_error(convert, reason):
    class Converted(nn.Module):
        def forward(self, x):
            return convert(x + 1)

    with pytest.raises(gw.CaptureError, match=rf"test_compile\.py:\d+.*{reason}"):
        gw.compile(Converted(), example_inputs=(torch.ones(2, 2),))


def test_an_argument_that_was_captured_expanded_is_wanted_so():
    net = nn.Linear(4, 4)
    model = gw.compile(net, example_inputs=(torch.randn(1, 4).expand(3, 4),), backend="aten")
    x = torch.randn(1, 4).expand(3, 4)
    torch.testing.assert_close(model(x), net(x))
    with pytest.raises(gw.InputError, match="argument input was captured as an expanded tensor.*compile with a contiguous example"):
        model(torch.randn(3, 4))
