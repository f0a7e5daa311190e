"""Backend "tuned": oneDNN on packed weights where it wins, the same numbers within the exact contract, and weights that may change."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import graphwright as gw
from graphwright.codegen.cpu_packed import PackedCall, is_available
from graphwright.codegen.cpu_rows import with_rows_spelled_out
from graphwright.ir.float64 import Widening
from graphwright.ir.run import run
from graphwright.runtime.backend import has_cpp_compiler
from graphwright.runtime.cache import Cache
from graphwright.runtime.probe import MARGIN, Probe
from graphwright.runtime.segments import Segment

needs_onednn = pytest.mark.skipif(not is_available(), reason="this torch has no oneDNN: install a wheel that has it")


@pytest.fixture
def onednn_wins(monkeypatch):
    """Every question of a product or a convolution is answered with oneDNN, however fast it is here."""
    monkeypatch.setattr(Probe, "fastest", lambda self, kind, question, ways: "onednn" if kind in ("few rows", "linear") else list(ways)[-1])


class Linear(nn.Module):
    def __init__(self, then=lambda y, x: y, width=24, out=24, bias=True):
        super().__init__()
        self.linear, self.then = nn.Linear(width, out, bias=bias), then

    def forward(self, x):
        return self.then(self.linear(x), x)


class Product(nn.Module):
    """x W + b, the weight [in, out] as transformers' Conv1D has it."""

    def __init__(self, form):
        super().__init__()
        self.weight, self.bias, self.form = nn.Parameter(torch.randn(24, 40) / 5), nn.Parameter(torch.randn(40)), form

    def forward(self, x):
        return self.form(self, x)


class Conv(nn.Module):
    def __init__(self, conv, then=lambda y: y):
        super().__init__()
        self.conv, self.then = conv, then

    def forward(self, x):
        return self.then(self.conv(x))


def packed_calls(model):
    """The packed calls of a compiled model and of its regions, as text."""
    found = []
    for node in model._present.executor._lowered.nodes:
        if isinstance(node.target, PackedCall):
            found.append(str(node.target))
        elif type(node.target).__name__ == "SlicedRun":
            found += [str(inner.target) for inner in node.target.call.body.graph.nodes if isinstance(inner.target, PackedCall)]
    return found


def tuned(net, *inputs, passes=(), **options):
    return gw.compile(net.eval(), passes, example_inputs=inputs, backend="tuned", **options)


def assert_exact(model, net, *inputs):
    """The exact contract: an error against float64 of at most 4 times eager's own, or of 8 roundings where eager has next to none."""
    program = model.history[0]
    exact = run(Widening().program(program), [value.double() for value in inputs])[0][0]
    y, eager = model(*inputs), net(*inputs)
    assert y.shape == eager.shape and y.stride() == eager.stride()

    def error(values):
        return torch.linalg.vector_norm(values.double() - exact)

    floor = 8 * torch.finfo(torch.float32).eps * torch.linalg.vector_norm(exact)
    assert error(y) <= torch.maximum(4 * error(eager), floor)


def assert_same(y, expected):
    """Equal but for the order of sums of some tens of float32 terms."""
    assert torch.linalg.vector_norm(y - expected) <= 1e-6 * torch.linalg.vector_norm(expected)


FOLLOWED = {
    "": lambda y, x: y,
    " with silu": lambda y, x: F.silu(y),
    " with gelu": lambda y, x: F.gelu(y),
    " with gelu_tanh": lambda y, x: F.gelu(y, approximate="tanh"),
    " with sigmoid": lambda y, x: torch.sigmoid(y),
    " with tanh": lambda y, x: torch.tanh(y),
    " with add": lambda y, x: x + y,
    " with mul": lambda y, x: y * x,
}


@needs_onednn
@pytest.mark.parametrize("shape", [(5, 24), (2, 7, 24), (1, 63, 24), (2, 3, 4, 24)], ids=str)
@pytest.mark.parametrize("suffix", FOLLOWED)
def test_a_linear_takes_what_follows_it(onednn_wins, suffix, shape):
    net, x = Linear(FOLLOWED[suffix]), torch.randn(shape)
    model = tuned(net, x)
    assert packed_calls(model) == [f"oneDNN's linear{suffix}"]
    assert_exact(model, net, x)


@needs_onednn
@pytest.mark.parametrize(
    "form",
    [
        lambda self, x: torch.addmm(self.bias, x, self.weight),
        lambda self, x: torch.mm(x, self.weight),
        lambda self, x: torch.matmul(x[None], self.weight),
        lambda self, x: F.gelu(torch.addmm(self.bias, x, self.weight)),
    ],
    ids=["addmm", "mm", "matmul", "addmm, gelu"],
)
def test_products_with_a_constant_matrix_are_linears(onednn_wins, form):
    net, x = Product(form), torch.randn(9, 24)
    model = tuned(net, x)
    assert len(packed_calls(model)) == 1
    assert_exact(model, net, x)


@needs_onednn
@pytest.mark.parametrize(
    ("then", "why"),
    [
        (lambda y, x: F.relu(y), "oneDNN's ReLU makes 0 of a NaN"),
        (lambda y, x: F.silu(y) + y, "two read the product"),
        (lambda y, x: y + x[:1], "the other operand is broadcast"),
        (lambda y, x: torch.add(y, x, alpha=2), "the sum has a factor"),
        (lambda y, x: y * y, "the other operand is the product itself"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_is_no_form_of_onednn_stays_an_operation_of_its_own(onednn_wins, then, why):
    net, x = Linear(then), torch.randn(6, 24)
    model = tuned(net, x)
    assert packed_calls(model) == ["oneDNN's linear"], why
    assert_exact(model, net, x)
    assert model(torch.full_like(x, torch.nan)).isnan().all()


@needs_onednn
@pytest.mark.parametrize("join", [torch.add, torch.mul], ids=["sum", "product"])
def test_of_two_products_that_are_joined_one_takes_the_other(onednn_wins, join):
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x):
            return join(self.first(x), self.second(x))

    net, x = Two(), torch.randn(4, 8)
    model = tuned(net, x)
    assert sorted(packed_calls(model)) == ["oneDNN's linear", f"oneDNN's linear with {join.__name__}"]
    assert_exact(model, net, x)


@needs_onednn
def test_a_product_of_two_activations_is_left_alone(onednn_wins):
    class Net(nn.Module):
        def forward(self, x):
            return torch.mm(x, x.t())

    assert packed_calls(tuned(Net(), torch.randn(4, 4))) == []


@needs_onednn
@pytest.mark.parametrize(
    ("conv", "shape"),
    [
        (nn.Conv2d(6, 8, 3, padding=1), (2, 6, 9, 7)),
        (nn.Conv2d(6, 8, 3, stride=2, padding=(1, 0), bias=False), (1, 6, 9, 7)),
        (nn.Conv2d(8, 8, 5, padding=4, dilation=2, groups=8), (1, 8, 12, 12)),
        (nn.Conv2d(6, 8, 1), (2, 6, 5, 5)),
        (nn.Conv3d(4, 6, 3, padding=1), (1, 4, 5, 6, 7)),
        (nn.Conv3d(4, 6, (3, 1, 1), padding=(1, 0, 0)), (1, 4, 5, 6, 7)),
    ],
    ids=lambda value: str(value),
)
@pytest.mark.parametrize("then", [lambda y: y, F.silu], ids=["", "silu"])
def test_convolutions_are_packed(onednn_wins, conv, shape, then):
    net, x = Conv(conv, then), torch.randn(shape)
    model = tuned(net, x)
    assert packed_calls(model) == ["oneDNN's convolution" + (" with silu" if then is F.silu else "")]
    assert_exact(model, net, x)


@needs_onednn
@pytest.mark.parametrize("then", [lambda y, x: y, lambda y, x: F.silu(y), lambda y, x: y + x], ids=["", "silu", "add"])
def test_convolutions_whose_channels_are_innermost_keep_them_there(onednn_wins, then):
    class Tokens(nn.Module):
        """Tokens [B, HW, C] as images, as transformers with convolutions have them."""

        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(12, 12, 3, padding=1)

        def forward(self, tokens):
            x = tokens.unflatten(1, (5, 7)).permute(0, 3, 1, 2)
            return then(self.conv(x), x)

    net, tokens = Tokens(), torch.randn(2, 35, 12)
    model = tuned(net, tokens)
    assert len(packed_calls(model)) == 1 and not clones(model)
    assert_exact(model, net, tokens)


@needs_onednn
@pytest.mark.parametrize("net", [Linear(), Conv(nn.Conv2d(4, 4, 3, padding=1))], ids=["linear", "convolution"])
def test_a_weight_that_changes_is_packed_again(onednn_wins, net):
    x = torch.randn(6, 24) if isinstance(net, Linear) else torch.randn(1, 4, 6, 6)
    model = tuned(net, x)
    (weight, *_) = net.parameters()
    with torch.no_grad():
        weight.mul_(3)
        assert_same(model(x), net(x))
        net.load_state_dict({name: value + 1 for name, value in net.state_dict().items()})
        assert_same(model(x), net(x))
    optimizer = torch.optim.SGD(net.parameters(), lr=0.5)
    net(x).square().sum().backward()
    optimizer.step()
    assert_same(model(x), net(x))


@needs_onednn
def test_one_copy_serves_two_calls_with_one_weight_and_the_report_says_its_bytes(onednn_wins):
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(32, 32, bias=False)

        def forward(self, x):
            return self.linear(torch.cos(self.linear(x)))

    net, x = Twice(), torch.randn(4, 32)
    model = tuned(net, x)
    assert len(packed_calls(model)) == 2
    assert "packed weights: 1, copies of 4.00 KiB beside the weights" in str(model.report())
    assert "packed" not in str(gw.compile(net, example_inputs=(x,), backend="aten").report())


@needs_onednn
def test_weights_made_in_inference_mode_are_packed(onednn_wins):
    with torch.inference_mode():
        net, x = Linear(), torch.randn(4, 24)
        model = tuned(net, x)
        torch.testing.assert_close(model(x), net(x))


@needs_onednn
@pytest.mark.parametrize("rows", [0, 1, 5, 64])
def test_a_packed_linear_serves_any_number_of_rows(onednn_wins, rows):
    net = Linear(FOLLOWED[" with gelu"])
    model = tuned(net, torch.randn(5, 24), dynamic_shapes={"x": {0: torch.export.Dim("rows", min=0, max=64)}})
    assert packed_calls(model)
    x = torch.randn(rows, 24)
    torch.testing.assert_close(model(x), net(x))


class FeedForward(nn.Module):
    def __init__(self, width=32, hidden=128):
        super().__init__()
        self.up, self.down = nn.Linear(width, hidden), nn.Linear(hidden, width)

    def forward(self, x):
        return x + self.down(F.gelu(self.up(x)))


@needs_onednn
def test_weights_of_region_bodies_are_packed(onednn_wins):
    net, x = FeedForward(), torch.randn(257, 32)
    model = tuned(net, x, passes=[gw.SliceGroups(memory_budget="30%")])
    assert packed_calls(model) == ["oneDNN's linear with gelu", "oneDNN's linear"]
    assert_exact(model, net, x)
    with torch.no_grad():
        net.up.weight.add_(1)
    assert_exact(model, net, x)


@needs_onednn
@pytest.mark.parametrize("passes", [(), (gw.SliceGroups(memory_budget="40%"),)], ids=["whole", "sliced"])
@pytest.mark.parametrize(
    ("net", "shape"),
    [(FeedForward(64, 256), (512, 64)), (nn.Sequential(Conv(nn.Conv2d(8, 32, 3, padding=1), F.silu), nn.Conv2d(32, 8, 1)), (4, 8, 32, 32))],
    ids=["linear", "convolution"],
)
def test_the_prediction_knows_what_packed_calls_allocate(onednn_wins, net, shape, passes):
    x = torch.randn(shape)
    model = tuned(copy.deepcopy(net), x, passes=passes)
    measured = model.measure(x)
    predicted = model.report().memory.compiled
    # oneDNN takes some KiB a thread for a convolution beside the copies.
    assert predicted == pytest.approx(measured.peak_bytes, abs=2**14 * torch.get_num_threads())


# --- the probe ---


@pytest.fixture
def seconds(monkeypatch):
    """What each way of a question takes, in the place of a clock."""
    times = {}
    monkeypatch.setattr(Probe, "_sample", lambda self, call: times[call()])
    monkeypatch.setattr("graphwright.runtime.probe._verdicts", {})
    return times


def ways(*names):
    return {name: lambda name=name: name for name in names}


def test_the_fastest_way_is_taken_where_it_wins_by_more_than_the_clock_does(seconds):
    seconds |= {"aten": 1.0, "onednn": 0.5, "close": MARGIN + 0.01}
    assert Probe(0).fastest("linear", "a", ways("aten", "onednn")) == "onednn"
    assert Probe(0).fastest("linear", "b", ways("aten", "close")) == "aten"


@pytest.mark.parametrize("error", [RuntimeError("no such kernel"), IndexError("index 9 is out of bounds")])
def test_a_way_that_fails_is_out(seconds, error):
    def broken():
        raise error

    seconds["aten"] = 1.0
    assert Probe(0).fastest("linear", "a", {"aten": lambda: "aten", "onednn": broken}) == "aten"


def test_a_verdict_holds_until_the_threads_change(seconds):
    seconds |= {"aten": 1.0, "onednn": 0.5}
    assert Probe(0).fastest("linear", "a", ways("aten", "onednn")) == "onednn"
    seconds["aten"] = 0.1
    assert Probe(0).fastest("linear", "a", ways("aten", "onednn")) == "onednn"
    threads = torch.get_num_threads()
    torch.set_num_threads(threads + 1)
    try:
        assert Probe(0).fastest("linear", "a", ways("aten", "onednn")) == "aten"
    finally:
        torch.set_num_threads(threads)


def test_a_verdict_is_kept_for_other_processes(seconds, monkeypatch, tmp_path):
    tmp_path.chmod(0o700)
    seconds |= {"aten": 1.0, "onednn": 0.5}
    Probe(0, cache=Cache(tmp_path / "cache")).fastest("linear", "a", ways("aten", "onednn"))
    monkeypatch.setattr("graphwright.runtime.probe._verdicts", {})  # as another process has it
    assert Probe(0).known("linear", "a") is None
    assert Probe(0, cache=Cache(tmp_path / "cache")).known("linear", "b") is None
    assert Probe(0, cache=Cache(tmp_path / "cache")).known("linear", "a") == "onednn"


def test_when_the_time_is_up_a_question_takes_what_its_like_took(seconds):
    seconds |= {"aten": 1.0, "onednn": 0.5}
    probe = Probe(0, seconds=0.0)
    assert probe.fastest("linear", "a", ways("aten", "onednn")) == "aten"  # nothing is known yet
    Probe(0).fastest("linear", "b", ways("aten", "onednn"))
    assert probe.fastest("linear", "b", ways("aten", "onednn")) == "onednn"  # known already
    assert probe.fastest("linear", "c", ways("aten", "onednn")) == "onednn"
    assert probe.fastest("convolution", "c", ways("aten", "onednn")) == "aten"


# --- compiled segments between library calls ---

needs_compiler = pytest.mark.skipif(not has_cpp_compiler(), reason="no C++ compiler: install g++")


@pytest.fixture
def compiled_wins(monkeypatch, onednn_wins):
    """Like `onednn_wins`, and no verdict of another test is known."""
    monkeypatch.setattr("graphwright.runtime.probe._verdicts", {})


class Block(nn.Module):
    """Pre-norm attention of one head and a feed-forward: products with norms, rotations and splits between them."""

    def __init__(self, width=32):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out, self.mlp = nn.Linear(width, 3 * width), nn.Linear(width, width), FeedForward(width)

    def forward(self, x):
        q, k, v = self.qkv(self.norm1(x)).chunk(3, -1)
        x = x + self.out(F.scaled_dot_product_attention(q.cos(), k.sin(), v))
        return self.mlp(self.norm2(x))


def segments(model):
    return [node.target for node in model._present.executor._lowered.nodes if isinstance(node.target, Segment)]


@needs_onednn
@needs_compiler
def test_segments_that_are_alike_are_compiled_once(compiled_wins):
    net, x = nn.Sequential(Block(), Block(), Block()), torch.randn(2, 7, 32)
    model = tuned(net, x)
    assert len(segments(model)) == 9  # a norm, attention and a norm each
    assert len(set(segments(model))) <= 4  # the norms of a width are alike, but for what else they give
    assert_exact(model, net, x)


@needs_onednn
@needs_compiler
def test_what_only_later_calls_need_waits_for_them(compiled_wins):
    class Projections(nn.Module):
        def __init__(self):
            super().__init__()
            self.q, self.k, self.out = nn.Linear(32, 32), nn.Linear(32, 32), nn.Linear(32, 32)

        def forward(self, x):
            q = self.q(x).cos()
            k = self.k(x).sin()
            return self.out(q * k)

    net, x = Projections(), torch.randn(5, 32)
    model = tuned(net, x)
    assert len(segments(model)) == 1  # cos, sin and the product between them
    assert_exact(model, net, x)


@needs_onednn
@needs_compiler
def test_results_of_a_call_that_has_several_stay_together(compiled_wins):
    class Split(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x):
            a, b = x.exp().split(8, -1)
            return self.second(self.first(a).exp() + b)

    net, x = Split(), torch.randn(4, 16)
    assert_exact(tuned(net, x), net, x)


@needs_onednn
@needs_compiler
def test_random_calls_keep_their_order(compiled_wins):
    net, x = nn.Sequential(nn.Dropout(), nn.Linear(8, 8), nn.Dropout(), nn.Linear(8, 8)).train(), torch.ones(4, 8)
    model = gw.compile(net, example_inputs=(x,), backend="tuned")
    order = [type(node.target).__name__ for node in model._present.executor._lowered.nodes if node.op == "call_function"]
    assert [name for name in order if name != "builtin_function_or_method"] == ["Segment", "PackedLinear"] * 2


@needs_compiler
@pytest.mark.parametrize("form", ["linear", "addmm"])
@pytest.mark.parametrize(
    "dtype, bias, shape",
    [
        (torch.float32, True, (1, 48)),
        (torch.float32, False, (1, 1, 48)),
        (torch.bfloat16, True, (1, 1, 48)),
        (torch.float16, False, (1, 48)),
    ],
    ids=str,
)
def test_a_product_of_one_row_is_a_loop_of_compiled_code(compiled_wins, form, bias, shape, dtype):
    class Row(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.randn(*((40, 48) if form == "linear" else (48, 40))))
            self.bias = nn.Parameter(torch.randn(40)) if bias else None

        def forward(self, x):
            if form == "linear":
                return F.silu(F.linear(x, self.weight, self.bias))
            flat = x.view(1, 48)
            return F.silu(torch.addmm(self.bias, flat, self.weight) if bias else torch.mm(flat, self.weight))

    net, x = Row().to(dtype), torch.randn(shape).to(dtype)
    model = tuned(net, x)
    assert len(segments(model)) == 1 and not packed_calls(model)
    assert not any("linear" in str(n.target) or "mm" in str(n.target) for n in with_rows_spelled_out(segments(model)[0].graph).nodes)
    assert_exact(model, net, x)
    with torch.no_grad():
        net.weight.add_(1)  # nothing is copied, so nothing can be stale
    assert_exact(model, net, x)


@needs_compiler
def test_what_products_of_one_row_read_is_computed_once_and_wherever_it_lies(compiled_wins):
    class Pair(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(48, 40), nn.Linear(48, 24)

        def forward(self, x, y):
            z = F.silu(x)
            return self.first(z).sum() + self.second(z) + self.second(y)

    net, x, y = Pair(), torch.randn(1, 48), torch.randn(48, 3)[:, 1].unsqueeze(0)
    model = tuned(net, x, y)
    spelled = [str(node.target) for node in with_rows_spelled_out(segments(model)[0].graph).nodes]
    assert spelled.count("aten.as_strided.default") == 2  # of z and of y
    assert_exact(model, net, x, y)


@needs_compiler
def test_expanded_operands_are_probed_as_they_are(monkeypatch):
    class Expanded(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(8, 8)

        def forward(self, x, row):
            return self.linear(row.expand(4, 8)) + x.exp()

    monkeypatch.setattr("graphwright.runtime.probe._verdicts", {})
    net, inputs = Expanded(), (torch.randn(4, 8), torch.randn(8))
    model = tuned(net, *inputs)
    torch.testing.assert_close(model(*inputs), net(*inputs))


class Sorted(nn.Module):
    """Rows in the order of keys, and back, as mixtures of experts have them: the order is inverted in memory that nothing else writes."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(32, 32)

    def forward(self, x, keys):
        order = keys.sort().indices.view(2, 12).view(-1)
        y = self.linear(x[order])
        inverse = torch.empty_like(order).index_put((order,), torch.arange(24))
        return y.exp()[inverse] + 1


@needs_onednn
@needs_compiler
def test_the_order_that_a_sort_gives_is_probed_as_one(monkeypatch, compiled_wins):
    asked = []

    def ask_all(self, kind, question, ways):
        asked.append([way() for way in ways.values()] if kind == "segment" else None)
        return list(ways)[-1]

    monkeypatch.setattr(Probe, "fastest", ask_all)
    torch.use_deterministic_algorithms(True)  # memory that is not written is then filled, with what points beyond all operands
    try:
        net, inputs = Sorted().eval(), (torch.randn(24, 32), torch.randn(24))
        model = tuned(net, *inputs)
        torch.testing.assert_close(model(*inputs), net(*inputs))
        assert any("index_put" in str(segment.graph) and "sort" not in str(segment.graph) for segment in segments(model))
    finally:
        torch.use_deterministic_algorithms(False)
    assert len([results for results in asked if results is not None]) == 2


@needs_compiler
def test_a_segment_that_does_not_win_is_left_to_its_kernels(monkeypatch):
    monkeypatch.setattr("graphwright.runtime.probe._verdicts", {})
    monkeypatch.setattr(Probe, "fastest", lambda self, kind, question, ways: "aten")
    net, x = Block(), torch.randn(2, 7, 32)
    model = tuned(net, x)
    assert not segments(model) and not packed_calls(model)
    assert_exact(model, net, x)


@needs_compiler
def test_a_segment_that_is_known_to_lose_is_not_compiled_again(monkeypatch):
    asked = []
    monkeypatch.setattr(Probe, "known", lambda self, kind, question: "aten")
    monkeypatch.setattr("graphwright.codegen.cpu_inductor.CompiledGraph", lambda *_: asked.append(1))
    tuned(Block(), torch.randn(2, 7, 32))
    assert not asked


@needs_compiler
def test_a_segment_that_inductor_fails_on_stays_with_library_kernels(monkeypatch, caplog):
    def broken(*_):
        raise AssertionError("a defect of the compiler")

    monkeypatch.setattr("graphwright.runtime.probe._verdicts", {})
    monkeypatch.setattr("graphwright.codegen.cpu_inductor.CompiledGraph", broken)
    net, x = Block(), torch.randn(2, 7, 32)
    model = tuned(net, x)
    assert not segments(model) and "a defect of the compiler" in caplog.text
    assert_exact(model, net, x)


# --- channels innermost ---


class Residual(nn.Module):
    """Group norm, SiLU, a convolution, and the input added; `first` and `last` are what a network has around such blocks."""

    def __init__(self, channels=16):
        super().__init__()
        self.norm, self.conv = nn.GroupNorm(4, channels), nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x):
        return x + self.conv(F.silu(self.norm(x)))


class Joined(nn.Module):
    """Two convolutions whose results are added, one of them read again."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Conv2d(6, 16, 3, padding=1), nn.Conv2d(6, 16, 1)

    def forward(self, x):
        y = self.first(x)
        return y + self.second(x), y.flatten(2).transpose(1, 2)


def clones(model):
    return [node for node in model._present.executor._lowered.nodes if node.target is torch.ops.aten.clone.default]


@needs_onednn
@needs_compiler
@pytest.mark.parametrize("size", [(1, 6, 8, 8), (2, 6, 5, 7)], ids=str)
def test_channels_stay_innermost_from_convolution_to_convolution(compiled_wins, size):
    net, x = nn.Sequential(nn.Conv2d(6, 16, 3, padding=1), Residual(), Residual(), nn.Conv2d(16, 6, 1)), torch.randn(size)
    model = tuned(net, x)
    assert packed_calls(model) == ["oneDNN's convolution", *["oneDNN's convolution with add"] * 2, "oneDNN's convolution"]
    assert not clones(model)  # those at either end are part of compiled code
    assert_exact(model, net, x)


@needs_onednn
@needs_compiler
def test_whoever_reads_a_convolution_otherwise_has_its_channels_outside(compiled_wins):
    net, x = Joined().eval(), torch.randn(2, 6, 8, 8)
    for y, expected in zip(tuned(net, x)(x), net(x), strict=True):
        assert y.stride() == expected.stride()
        assert_same(y, expected)


@needs_onednn
@needs_compiler
def test_a_program_with_regions_keeps_its_layouts(compiled_wins):
    net, x = nn.Sequential(Residual(), Residual()), torch.randn(6, 16, 16, 16)
    model = tuned(net, x, passes=[gw.SliceGroups(memory_budget="40%")])
    assert not any(getattr(node.target, "channels_last", False) for node in model._present.executor._lowered.nodes)
    assert_exact(model, net, x)


@needs_onednn
def test_a_layer_of_no_features_is_no_question(onednn_wins):
    net, x = nn.Linear(8, 0), torch.randn(3, 8)
    assert tuned(net, x)(x).shape == (3, 0)
