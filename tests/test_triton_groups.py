"""Groups are legal, save the bytes that they say, and a program runs with them as it does without."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import hypothesis.strategies as st
import networkx as nx
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings

sys.path.insert(0, str(Path(__file__).parent))

from triton_kernels import capture  # noqa: E402

import graphwright as gw  # noqa: E402
from graphwright import models  # noqa: E402
from graphwright.codegen.triton import emit  # noqa: E402
from graphwright.codegen.triton.groups import Group, find_groups  # noqa: E402
from graphwright.codegen.triton.launch import load  # noqa: E402
from graphwright.codegen.triton.views import base, is_split, is_view  # noqa: E402
from graphwright.ir.calling import Call  # noqa: E402
from graphwright.ir.errors import TargetError  # noqa: E402
from graphwright.runtime.backend import choose_backend  # noqa: E402
from graphwright.runtime.compiled import Compilation, CompiledModel  # noqa: E402
from graphwright.runtime.executor import Executor  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")
NETWORKS = ("video_unet", "dit", "decoder", "vit")


@pytest.fixture(autouse=True)
def seeded(one_thread):
    torch.manual_seed(0)


@pytest.fixture(scope="module", params=NETWORKS)
def network(request):
    module, args, kwargs = models.load(request.param, "tiny")
    return gw.ir.capture(module, args, kwargs), args, kwargs


def assert_legal(program: gw.ir.Program, groups: list[Group]) -> None:
    """Nodes lie in one group at most, and the graph of groups and other calls has an order."""
    members = [node for group in groups for node in group.nodes]
    assert len(members) == len(set(members))
    unit = {node: group for group in groups for node in group.nodes}
    order = nx.DiGraph()
    for node in program.main.calls:
        if is_view(node) or is_split(node):
            continue
        for operand in map(base, node.all_input_nodes):
            if unit.get(operand, operand) is not unit.get(node, node):
                order.add_edge(unit.get(operand, operand), unit.get(node, node))
    assert nx.is_directed_acyclic_graph(order)
    for group in groups:
        inside = set(group.nodes)
        read = {base(operand) for node in group.nodes for operand in node.all_input_nodes} - inside
        assert set(group.inputs) <= read, "a group reads what its nodes read"
        assert group.bytes_after < group.bytes_before


def as_aten(program: gw.ir.Program, inputs) -> tuple[list, list]:
    """The outputs of a program by library kernels and with Triton's kernels, memory NaN before the latter."""
    expected, _ = Executor(program, backend="aten")(inputs)
    executor = Executor(program, backend="triton_interpreter")
    torch.use_deterministic_algorithms(True)
    try:
        actual, _ = executor(inputs)
    finally:
        torch.use_deterministic_algorithms(False)
    return expected, actual


def test_groups_of_a_network_are_legal_and_save_bytes(network):
    program, _, _ = network
    groups = find_groups(program.main.graph)
    assert_legal(program, groups)
    assert len(groups) >= 3
    assert sum(g.bytes_after for g in groups) < 0.75 * sum(g.bytes_before for g in groups)


def test_a_network_computes_what_library_kernels_compute(network):
    program, args, kwargs = network
    expected, actual = as_aten(program, Call(program, program.main, ()).bind(args, kwargs)[0])
    for y, exact in zip(actual, expected, strict=True):
        # Sums in another order, through tens of layers in float32: the worst seen is 6e-6 of values up to 4.
        assert y.stride() == exact.stride()
        torch.testing.assert_close(y, exact, rtol=1e-5, atol=3e-5)


def test_bfloat16_networks_err_no_more_than_library_kernels():
    module, args, kwargs = models.load("decoder", "tiny")
    program = gw.ir.capture(module.bfloat16(), args, kwargs)
    exact = module.double()(*args, **kwargs)
    expected, actual = as_aten(program, Call(program, program.main, ()).bind(args, kwargs)[0])
    errors = [(y[0].double() - exact).abs().mean() for y in (actual, expected)]
    # Kernels round less often than the operations one by one, but the interpreter's bfloat16 rounds towards zero: twice the error.
    assert errors[0] <= 2 * errors[1]


@pytest.mark.parametrize("name", ["decoder", "dit", "vit"])
def test_products_of_bfloat16_networks_take_in_what_surrounds_them(name):
    module, args, kwargs = models.load(name, "tiny")
    halves = [tuple(x.bfloat16() if x.is_floating_point() else x for x in args), {k: v.bfloat16() for k, v in kwargs.items()}]
    program = gw.ir.capture(module.bfloat16(), *halves)
    groups = find_groups(program.main.graph)
    assert_legal(program, groups)
    products = [group for group in groups if group.kind == "matmul"]
    assert len(products) >= 4
    try:
        for group in {emit(group.plan, program.symbols).digest: group for group in products}.values():
            load(emit(group.plan, program.symbols)).check("cpu")
    finally:
        torch.use_deterministic_algorithms(False)


def test_every_kernel_of_the_networks_checks_itself(network):
    program, _, _ = network
    try:
        for group in find_groups(program.main.graph):
            load(emit(group.plan, program.symbols)).check("cpu")
    finally:
        torch.use_deterministic_algorithms(False)


def test_a_file_runs_alone(tmp_path):
    program = capture(lambda x: F.silu(F.layer_norm(x, (63,))) * 2.5, [torch.randn(5, 63)])
    (group,) = find_groups(program.main.graph)
    kernel = emit(group.plan, program.symbols)
    file = tmp_path / kernel.file_name
    file.write_text(kernel.source)
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "TRITON_INTERPRET")}
    done = subprocess.run([sys.executable, str(file)], capture_output=True, text=True, cwd=tmp_path, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.startswith("output 0: error")


def test_a_wrong_kernel_fails_its_own_check():
    program = capture(lambda x: F.silu(x) * 2.5, [torch.randn(5, 63)])
    (group,) = find_groups(program.main.graph)
    kernel = emit(group.plan, program.symbols)
    for right, wrong in (("silu * 2.5", "silu * 2.6"), ("i < n", "i < n - 1")):
        assert kernel.source.count(right) == 1
        broken = replace(kernel, source=kernel.source.replace(right, wrong), digest=f"wrong {wrong}")
        try:
            with pytest.raises(AssertionError, match="output 0 differs"):
                load(broken).check("cpu")
        finally:
            torch.use_deterministic_algorithms(False)


def test_the_text_is_the_same_in_another_process():
    script = (
        "import graphwright as gw; from graphwright import models; from graphwright.codegen.triton import emit;"
        "from graphwright.codegen.triton.groups import find_groups; m, a, k = models.load('dit', 'tiny'); p = gw.ir.capture(m, a, k);"
        "print([emit(g.plan, p.symbols).digest for g in find_groups(p.main.graph)])"
    )
    environment = {**os.environ, "PYTHONHASHSEED": "1"}
    there = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, env=environment).stdout.strip()
    module, args, kwargs = models.load("dit", "tiny")
    program = gw.ir.capture(module, args, kwargs)
    assert there == str([emit(g.plan, program.symbols).digest for g in find_groups(program.main.graph)])


def test_two_groups_do_not_wait_for_each_other():
    # a -> matmul -> d and c -> matmul -> b: {a, b} and {c, d} are each convex, and together they wait for each other.
    def function(x, y, w):
        a, c = F.silu(x) * 2, F.silu(y) * 3
        return F.gelu(a + c @ w), F.gelu(c + a @ w)

    args = [torch.randn(8, 8) for _ in range(3)]
    program = capture(function, args)
    groups = find_groups(program.main.graph)
    assert_legal(program, groups)
    expected, actual = as_aten(program, args)
    for y, exact in zip(actual, expected, strict=True):
        torch.testing.assert_close(y, exact, rtol=1e-5, atol=1e-5)


def test_a_value_that_others_need_is_stored_and_views_of_it_are_made():
    def function(x, w):
        h = x * 2 + 1
        return F.silu(h) @ w, h.transpose(0, 1)[1:].reshape(-1), h

    args = [torch.randn(5, 7), torch.randn(7, 3)]
    program = capture(function, args)
    (group,) = find_groups(program.main.graph)
    assert len(group.outputs) == 2 and group.kind == "pointwise"
    for y, exact in zip(*as_aten(program, args), strict=True):
        torch.testing.assert_close(y, exact)


def test_dear_functions_are_not_repeated_along_a_broadcast():
    program = capture(lambda x, y: torch.exp(y) * x, [torch.randn(64, 63), torch.randn(63)])
    assert find_groups(program.main.graph) == []
    program = capture(lambda x, y: (y + 1) * x, [torch.randn(64, 63), torch.randn(63)])
    assert len(find_groups(program.main.graph)) == 1


def test_bytes_are_counted_once_for_each_tensor():
    program = capture(lambda x, y: F.silu(x) * y, [torch.randn(64, 63), torch.randn(64, 63)])
    (group,) = find_groups(program.main.graph)
    size = 64 * 63 * 4
    assert (group.bytes_before, group.bytes_after) == (5 * size, 3 * size)


def test_symbolic_sizes_run_at_any_size():
    rows = torch.export.Dim("rows", min=1, max=512)

    def function(x, w):
        h = F.layer_norm(x @ w + x, (16,))
        return F.silu(h) * 2, h.mean(-1)

    program = capture(function, [torch.randn(4, 16), torch.randn(16, 16)], ({0: rows}, None))
    assert find_groups(program.main.graph)
    for n in (1, 3, 65):
        args = [torch.randn(n, 16), torch.randn(16, 16)]
        for y, exact in zip(*as_aten(program, args), strict=True):
            torch.testing.assert_close(y, exact, rtol=1e-5, atol=1e-5)


def test_kernels_are_listed_with_their_sources():
    program = capture(lambda x, w: F.layer_norm(x + 1, (16,)) @ w, [torch.randn(4, 16), torch.randn(16, 16)])
    compiled = CompiledModel(Compilation(program, "triton_interpreter"))
    (kernel,) = compiled.kernels()
    assert "layer_norm" in kernel.name and "@triton.jit" in kernel.source
    assert [line.partition(" = ")[2].partition("(")[0] for line in kernel.ir] == ["aten.add.Tensor", "aten.layer_norm.default"]
    assert kernel.roofline.bytes_moved == 2 * 4 * 16 * 4 and kernel.roofline.bound() == "memory"
    report = str(compiled.report())
    assert "kernels: 1 calls of 1, which move 512 B where their operations move 1.00 KiB" in report
    assert f"1 x {kernel.name}: 512 bytes" in report
    assert CompiledModel(Compilation(program, "aten")).kernels() == ()


@pytest.mark.skipif(torch.cuda.is_available(), reason="tells what happens without a GPU, and there is one")
def test_triton_without_a_gpu_says_so():
    with pytest.raises(TargetError, match="needs a GPU"):
        choose_backend("triton")
    with pytest.raises(TargetError, match="unknown backend"):
        choose_backend("triton_interpreter")


# --- random programs ---

UNARY = (torch.sin, F.silu, torch.tanh, lambda x: x * 0.5 + 0.1, lambda x: x.transpose(-1, -2), lambda x: x.flip(-1), torch.relu)
BINARY = (torch.add, torch.mul, torch.maximum, lambda a, b: torch.where(a > b, a, b * 0.3))
REDUCTIONS = (
    lambda x: x.sum(-1, keepdim=True),
    lambda x: x.mean(-2, keepdim=True),
    lambda x: F.softmax(x, -1),
    lambda x: F.layer_norm(x, x.shape[-1:]),
    lambda x: x.amax(-1, keepdim=True),
)
STEPS = st.lists(st.tuples(st.integers(0, 3), st.integers(0, 30), st.integers(0, 30), st.integers(0, 30)), min_size=2, max_size=9)


def random_function(steps):
    def function(x, y, w):
        values = [x, y, x + w]
        for kind, which, a, b in steps:
            a, b = values[a % len(values)], values[b % len(values)]
            if kind == 0:
                values.append(UNARY[which % len(UNARY)](a))
            elif kind == 1 and broadcasts(a, b):
                values.append(BINARY[which % len(BINARY)](a, b))
            elif kind == 2:
                values.append(REDUCTIONS[which % len(REDUCTIONS)](a))
            elif kind == 3 and a.shape[-1] == a.shape[-2]:
                values.append(a @ a * 0.2)
        return tuple(value + 0 for value in values[-2:])

    return function


def broadcasts(a, b):
    return all(m == n or 1 in (m, n) for m, n in zip(reversed(a.shape), reversed(b.shape)))


@settings(max_examples=20)
@given(steps=STEPS, shape=st.sampled_from([(2, 5, 5), (3, 1, 7), (1, 6, 6), (2, 3, 4)]))
def test_a_random_program_computes_what_library_kernels_compute(steps, shape):
    torch.manual_seed(0)
    args = [torch.randn(shape).double(), torch.randn(1, shape[-1]).double(), torch.randn(()).double()]
    program = capture(random_function(steps), args)
    assert_legal(program, find_groups(program.main.graph))
    for y, exact in zip(*as_aten(program, args), strict=True):
        # float64, a few operations each within some units in the last place; the series of tanh is good to 1e-12.
        torch.testing.assert_close(y, exact, rtol=1e-9, atol=1e-9)
