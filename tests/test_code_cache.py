"""Compiled code that is kept: the second process runs what the first one compiled, and only that."""

import json
import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import nn

import graphwright as gw
from graphwright.codegen import cpu_inductor
from graphwright.codegen.stored_code import restore, source_of, store
from graphwright.ir import capture
from graphwright.runtime import cache_key, lowering
from graphwright.runtime.backend import has_cpp_compiler
from graphwright.runtime.cache import default_cache
from graphwright.runtime.cache_key import code_environment, environment, graph_text

needs_compiler = pytest.mark.skipif(not has_cpp_compiler(), reason="no C++ compiler: install g++")
X = torch.linspace(-2, 2, 24).view(4, 6)


class Layers(nn.Module):
    """Two layers of one form: a product, and elementwise operations that Inductor fuses."""

    def __init__(self, scale=3.0):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second, self.scale = nn.Linear(6, 6), nn.Linear(6, 6), scale

    def forward(self, x):
        x = (self.first(x).sin() * self.scale).relu()
        return x, (self.second(x).sin() * self.scale).relu()


@pytest.fixture
def compilations(monkeypatch):
    """The graphs that Inductor was given, in order."""
    seen = []
    real = cpu_inductor._compile

    def counted(graph, inputs):
        seen.append(graph)
        return real(graph, inputs)

    monkeypatch.setattr(cpu_inductor, "_compile", counted)
    return seen


def compiled(cache, module=None, x=X, **options):
    return gw.compile(module or Layers(), example_inputs=(x,), cache=cache, **{"backend": "inductor"} | options)


def same(a, b):
    return all(torch.equal(p, q) for p, q in zip(a, b, strict=True))


# --- the second start ------------------------------------------------------------------------------------------------------


@needs_compiler
@pytest.mark.parametrize("passes", ["", "slice-groups{memory_budget=25%}"])
def test_a_second_process_computes_the_same_bits_without_a_compiler(cache, passes):
    source = f"""
    import json, sys, torch, graphwright as gw
    module, args, kwargs = gw.models.load("decoder", "tiny")
    model = gw.compile(module, {passes!r}, example_inputs=args, example_kwargs=kwargs, backend="inductor", cache=sys.argv[1])
    leaves = torch.utils._pytree.tree_leaves(model(*args, **kwargs))
    print(json.dumps({{"sums": [leaf.double().sum().item() for leaf in leaves], "compiler": "torch._inductor.compile_fx" in sys.modules}}))
    """
    command = [sys.executable, "-c", "\n".join(line.strip() for line in source.splitlines()), str(cache.folder)]
    first, second = (json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout) for _ in range(2))
    assert first["sums"] == second["sums"]
    assert (first["compiler"], second["compiler"]) == (True, False)


@needs_compiler
def test_code_is_found_again_and_gives_the_same_bits(cache, compilations):
    first = compiled(cache)(X)
    assert compilations
    compilations.clear()
    assert same(compiled(cache)(X), first)
    assert compilations == []


@needs_compiler
def test_code_does_not_depend_on_the_values_of_weights(cache, compilations):
    compiled(cache)
    compilations.clear()
    other = Layers()
    with torch.no_grad():
        other.first.weight.mul_(2)
    assert torch.allclose(compiled(cache, other)(X)[1], other(X)[1], atol=1e-6)
    assert compilations == []


@needs_compiler
@pytest.mark.parametrize(
    ("module", "x"),
    [(Layers(2.0), X), (Layers(), X[:3]), (Layers(), X.t().contiguous().t()), (nn.Sequential(nn.Linear(6, 6), nn.Tanh()), X)],
    ids=["a constant", "a shape", "strides", "an operation"],
)
def test_another_graph_is_compiled(cache, compilations, module, x):
    compiled(cache)
    compilations.clear()
    ours, theirs = compiled(cache, module, x)(x), module(x)
    assert torch.allclose(ours[0], theirs[0], atol=1e-6)
    assert compilations


@needs_compiler
def test_sliced_bodies_of_equal_layers_are_compiled_once(cache, compilations):
    class Stack(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList(nn.Sequential(nn.Linear(32, 128), nn.GELU(), nn.Linear(128, 32)) for _ in range(4))

        def forward(self, x):
            for layer in self.layers:
                x = x + layer(x)
            return x

    x = torch.randn(512, 32)
    model = compiled(cache, Stack(), x, passes=[gw.SliceGroups("10%")])
    bodies = [text for text in (graph_text(graph, (), model.program.symbols) for graph in compilations) if "copy_" in text]
    assert bodies and len(bodies) == len(set(bodies))


@needs_compiler
def test_pieces_that_give_way_to_library_kernels_are_not_measured_again(cache, monkeypatch):
    module, args, kwargs = gw.models.load("decoder", "tiny")
    options = {"passes": [gw.SliceGroups("25%")], "example_inputs": args, "example_kwargs": kwargs, "backend": "inductor", "cache": cache}
    first = gw.compile(module, **options)
    assert cache.entries("pieces")
    monkeypatch.setattr(lowering, "lowered_profile", None)
    second = gw.compile(module, **options)
    assert [str(n.target).partition(" at ")[0] for n in first._runner.executor._lowered.nodes] == [
        str(n.target).partition(" at ")[0] for n in second._runner.executor._lowered.nodes
    ]


# --- what is not kept ------------------------------------------------------------------------------------------------------


@needs_compiler
def test_code_for_dynamic_sizes_is_not_kept_and_serves_them(cache):
    class Net(nn.Module):
        def forward(self, x):
            return (x.sin() * 3).relu(), x.cos()

    shapes = {"x": {0: torch.export.Dim("batch", min=2, max=64)}}
    for _ in range(2):
        model = compiled(cache, Net(), dynamic_shapes=shapes)
        assert all(torch.allclose(model(x)[0], Net()(x)[0], atol=1e-6) for x in (X, torch.randn(9, 6)))
    assert cache.entries("code") == []


@needs_compiler
def test_without_a_cache_nothing_is_written(compilations, monkeypatch, tmp_path):
    monkeypatch.setenv("GRAPHWRIGHT_CACHE_DIR", str(tmp_path / "cache"))
    compiled(False)
    assert compilations and default_cache().entries() == [] and not default_cache().folder.exists()


def test_the_cache_is_the_users_by_default_and_may_be_a_folder(tmp_path):
    assert gw.compile(Layers(), example_inputs=(X,), backend="aten").compilation.cache.folder == default_cache().folder
    assert compiled(str(tmp_path / "a"), backend="aten").compilation.cache.folder == tmp_path / "a"
    assert compiled(tmp_path / "a", backend="aten").compilation.cache.folder == tmp_path / "a"
    with pytest.raises(gw.InputError, match="cache is True, False, a folder or a Cache, not a int"):
        compiled(3, backend="aten")


# --- damage ----------------------------------------------------------------------------------------------------------------


@needs_compiler
@pytest.mark.parametrize("content", [b"", b"no code", "flipped"])
def test_code_that_cannot_be_restored_is_compiled_again_and_replaced(cache, compilations, content):
    first = compiled(cache)(X)
    for entry in cache.entries("code"):
        code = cache.get("code", entry.key)
        cache.put("code", entry.key, code[:-9] + bytes([code[-9] ^ 1]) + code[-8:] if content == "flipped" else content)
    compilations.clear()
    assert same(compiled(cache)(X), first) and compilations
    compilations.clear()
    assert same(compiled(cache)(X), first) and not compilations


@needs_compiler
def test_damaged_entries_are_compiled_again(cache, compilations):
    first = compiled(cache)(X)
    for path in (cache.folder / "code").iterdir():
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1
        path.write_bytes(content)
    compilations.clear()
    assert same(compiled(cache)(X), first) and compilations


@needs_compiler
def test_without_room_for_temporary_files_code_is_compiled(cache, compilations, monkeypatch):
    first = compiled(cache)(X)
    compilations.clear()

    def full(*arguments, **keywords):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(tempfile, "TemporaryDirectory", full)
    assert same(compiled(cache)(X), first) and compilations


@needs_compiler
def test_no_library_stays_in_the_temporary_folder(cache, monkeypatch, tmp_path):
    compiled(cache)
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    compiled(cache)(X)
    assert list((tmp_path / "temporary").iterdir()) == []


# --- the function alone ----------------------------------------------------------------------------------------------------

FACTOR = 3
SETTINGS = {"opened": open(__file__)}  # what no other process has
SETTINGS["opened"].close()


def scaled(values):
    (x,) = values
    values.clear()
    return [torch.ops.aten.mul.Tensor(y, FACTOR) for y in (x, torch.sin(x))]


def test_a_function_is_restored_with_the_globals_that_it_uses():
    assert same(restore(store(scaled))([X]), scaled([X]))
    assert source_of(store(scaled, "// scaled")) == "// scaled"


def with_state(values):
    return SETTINGS["opened"]


def with_default(values, factor=2):
    return values * factor


def with_closure():
    factor = 2
    return lambda values: values * factor


@pytest.mark.parametrize("function", [with_state, with_default, with_closure(), len, print], ids=lambda f: getattr(f, "__name__", ""))
def test_a_function_that_is_more_than_code_over_torch_is_not_stored(function):
    assert store(function) is None


# --- keys ------------------------------------------------------------------------------------------------------------------


def key_text(function, *inputs):
    class Net(nn.Module):
        def forward(self, *args):
            return function(*args)

    program = capture(Net(), inputs)
    return graph_text(program.main.graph, (), program.symbols)


def test_a_graph_has_one_text_whatever_its_nodes_are_called():
    program = capture(Layers(), (X,))
    before = graph_text(program.main.graph, (), program.symbols)
    for n, node in enumerate(program.main.graph.nodes):
        node.name = f"renamed_{n}"
    assert graph_text(program.main.graph, (), program.symbols) == before


DIFFERENT = {
    "a number": (lambda x: x * 2, lambda x: x * 3),
    "its kind": (lambda x: x * 2, lambda x: x * 2.0),
    "the sign of zero": (lambda x: x * 0.0, lambda x: x * -0.0),
    "an operation": (lambda x: x.sin(), lambda x: x.cos()),
    "a keyword": (lambda x: x.div(x, rounding_mode="floor"), lambda x: x.div(x, rounding_mode="trunc")),
    "the order of operands": (lambda x: x.sin() - x, lambda x: x - x.sin()),
    "which value is read": (lambda x: x.sin().cos() + x, lambda x: x.sin().cos() + x.sin()),
    "an output": (lambda x: (x.sin(), x), lambda x: (x.sin(), x.sin())),
    "a dtype": (lambda x: x.to(torch.float64), lambda x: x.to(torch.float16)),
}


@pytest.mark.parametrize(("a", "b"), DIFFERENT.values(), ids=DIFFERENT)
def test_graphs_that_differ_have_other_texts(a, b):
    assert key_text(a, X) != key_text(b, X)


@pytest.mark.parametrize(
    "other", [X[:2], X.double(), X.t().contiguous().t(), X.unsqueeze(0)[:, ::2].squeeze(0)], ids=["shape", "dtype", "strides", "gaps"]
)
def test_inputs_of_another_type_have_another_text(other):
    assert key_text(torch.sin, X) != key_text(torch.sin, other)


def test_strides_of_dims_of_size_one_are_in_the_text():
    a, b = torch.empty_strided((2, 3, 1, 1), (3, 1, 1, 1)), torch.empty_strided((2, 3, 1, 1), (3, 1, 3, 3))
    assert key_text(torch.sin, a) != key_text(torch.sin, b)


def test_the_range_of_a_symbol_is_in_the_text():
    def text(high):
        program = capture(nn.ReLU(), (X,), dynamic_shapes={"input": {0: torch.export.Dim("n", min=2, max=high)}})
        return graph_text(program.main.graph, (), program.symbols)

    assert text(8) != text(9)


BACKENDS = torch.backends
SETTERS = {
    "threads": (torch.get_num_threads, torch.set_num_threads, 1),
    "default dtype": (torch.get_default_dtype, torch.set_default_dtype, torch.float64),
    "matmul precision": (torch.get_float32_matmul_precision, torch.set_float32_matmul_precision, "medium"),
    "deterministic": (torch.are_deterministic_algorithms_enabled, torch.use_deterministic_algorithms, True),
    "precision of products": (
        lambda: BACKENDS.cuda.matmul.fp32_precision,
        partial(setattr, BACKENDS.cuda.matmul, "fp32_precision"),
        "tf32",
    ),
    "precision of convolutions": (
        lambda: BACKENDS.mkldnn.conv.fp32_precision,
        partial(setattr, BACKENDS.mkldnn.conv, "fp32_precision"),
        "bf16",
    ),
    "denormals": (lambda: False, torch.set_flush_denormal, True),
}


@pytest.fixture
def two_threads():
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize(("now", "change", "other"), SETTERS.values(), ids=SETTERS)
def test_a_setting_that_changes_numbers_is_in_the_key(now, change, other, two_threads):
    before, old = environment(), now()
    change(other)
    try:
        assert environment() != before
    finally:
        change(old)
    assert environment() == before


def test_versions_processor_compiler_and_inductors_settings_are_in_the_key(monkeypatch, tmp_path):
    import torch._inductor.config as inductor

    keys = [code_environment()]
    monkeypatch.setattr(torch, "__version__", "2.11.0")
    keys.append(code_environment())
    monkeypatch.setattr(cache_key, "_cpu", lambda: "another")
    keys.append(code_environment())
    monkeypatch.setattr(cache_key, "_version", lambda name: "0.0")
    cache_key._libraries.cache_clear()
    keys.append(code_environment())
    cache_key._libraries.cache_clear()
    (tmp_path / "g++").write_text("#!/bin/sh\n")
    (tmp_path / "g++").chmod(0o755)
    monkeypatch.setenv("CXX", str(tmp_path / "g++"))
    keys.append(code_environment())
    with inductor.patch(epilogue_fusion=False):
        keys.append(code_environment())
    assert len({json.dumps(key, sort_keys=True) for key in keys}) == len(keys)


def test_the_sources_of_graphwright_are_in_the_key():
    assert environment()["graphwright"] == cache_key.digest(
        *(
            text
            for path in sorted(
                p for room in ("codegen", "ir", "passes", "runtime") for p in (Path(gw.__file__).resolve().parent / room).rglob("*.py")
            )
            for text in (str(path.relative_to(Path(gw.__file__).resolve().parent)), path.read_text())
        )
    )


@needs_compiler
def test_where_inductors_settings_cannot_be_told_code_is_not_kept(cache, monkeypatch):
    from torch.utils._config_module import ConfigModule

    monkeypatch.delattr(ConfigModule, "save_config_portable")
    with torch._inductor.config.patch(fx_graph_cache=False):  # it asks for them too
        assert code_environment() is None
        compiled(cache)
    assert {entry.kind for entry in cache.entries()} == {"passes"}
