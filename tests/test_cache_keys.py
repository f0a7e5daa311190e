"""No stale result: one thing of a compile is changed at a time, the cache knows the one before, and what it gives is held to what is
computed without a cache, bit for bit, before it counts whether it was a hit (specs/trust.md, R20).

`tests/test_code_cache.py` has the parts of the keys of compiled code, `tests/test_cache.py` what entries and folders may be.
"""

import contextlib
import os
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import graphwright as gw
from graphwright.ir import Program, capture
from graphwright.runtime import cache_key, pass_cache
from graphwright.runtime.cache import Cache

X = torch.linspace(-2, 2, 2 * 3 * 8 * 8).view(2, 3, 8, 8)
PASSES = "slice-groups{memory_budget=50%},quantize{weight=int8-channel,min_numel=0,budget=1}"
EPS = 1e-5


class Net(nn.Module):
    """What passes fold, quantise, share, slice and leave: each argument changes one thing of it."""

    def __init__(self, *, eps=EPS, zero=0.0, swapped=False, bias=True, p=0.1, dim=-1, tied=True, start=0.0, alpha=1):
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.norm, self.linear = nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.Linear(8, 8)
        self.second, self.drop = nn.Linear(8, 8, bias=bias), nn.Dropout(p)
        self.norm.running_mean.normal_()
        if tied:
            self.second.weight = self.linear.weight
        self.register_buffer("table", torch.randn(8))
        self.register_buffer("offset", torch.randn(8))
        self.register_buffer("count", torch.tensor(start))
        self.eps, self.zero, self.swapped, self.dim, self.alpha = eps, zero, swapped, dim, alpha
        self.eval()

    def forward(self, x):
        self.count.add_(1)
        y = self.drop(self.second(self.linear(self.norm(self.conv(x))).relu())) * self.table.sin().cos() + self.offset
        a, b = y.sin(), F.layer_norm(y, (8,), eps=self.eps)
        difference = b - a if self.swapped else a - b
        return torch.add(difference.softmax(self.dim), self.count, alpha=self.alpha), x.mean() * self.zero


def untied_alike():
    """A model of equal weights, where only the tie is broken."""
    net = Net()
    net.second.weight = nn.Parameter(net.linear.weight.detach().clone())
    return net


def tied_apart():
    """One whose two weights are equal and apart, and then one tensor."""
    net = untied_alike()
    net.second.weight = net.linear.weight
    return net


def with_weight(name: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Net:
    """A weight of which `change` makes another."""
    net = Net()
    owner, _, leaf = name.rpartition(".")
    holder, old = net.get_submodule(owner), dict([*net.named_parameters(), *net.named_buffers()])[name]
    new = change(old.detach().clone())
    if isinstance(old, nn.Parameter):
        setattr(holder, leaf, nn.Parameter(new))
    else:
        holder.register_buffer(leaf, new)
    if name == "linear.weight":
        net.second.weight = net.linear.weight
    return net


def one_more(tensor: torch.Tensor) -> torch.Tensor:
    """The last element, one unit of its dtype more."""
    last = tensor.flatten()
    last[-1] = torch.nextafter(last[-1], torch.tensor(float("inf")))
    return last.view(tensor.shape)


def double(net: nn.Module) -> nn.Module:
    return net.double()


def frozen(net: nn.Module) -> nn.Module:
    return net.requires_grad_(False)


@dataclass(frozen=True)
class Case:
    """What is changed. `during` holds around the second compile and its call."""

    model: Callable[[], Any] = Net
    passes: Any = PASSES
    x: torch.Tensor = X
    during: Callable[[], contextlib.AbstractContextManager[Any]] = contextlib.nullcontext
    options: Any = None


@contextlib.contextmanager
def setting(now: Callable[[], Any], change: Callable[[Any], Any], value: Any) -> Iterator[None]:
    before = now()
    change(value)
    try:
        yield
    finally:
        change(before)


@contextlib.contextmanager
def environment(part: str) -> Iterator[None]:
    """Another version, processor or setting."""
    real = pass_cache.environment
    pass_cache.environment = lambda: real() | {part: "another"}  # type: ignore[attr-defined]
    try:
        yield
    finally:
        pass_cache.environment = real  # type: ignore[attr-defined]


@contextlib.contextmanager
def flushing() -> Iterator[None]:
    torch.set_flush_denormal(True)
    try:
        yield
    finally:
        torch.set_flush_denormal(False)


BACKENDS = torch.backends
CHANNELS_LAST = torch.channels_last

MISSES: dict[str, Case] = {
    # weights
    "an element of a weight that is folded": Case(lambda: with_weight("conv.weight", one_more)),
    "an element of a weight that is quantised": Case(lambda: with_weight("linear.weight", lambda w: w * 1.5)),
    "the last bit of a bias": Case(lambda: with_weight("second.bias", one_more)),
    "the last bit of a statistic that is folded": Case(lambda: with_weight("norm.running_var", one_more)),
    "the last bit of a buffer that is folded": Case(lambda: with_weight("table", one_more)),
    "the last bit of a buffer that stays": Case(lambda: with_weight("offset", one_more)),
    "the sign of a zero in a weight": Case(lambda: with_weight("offset", lambda w: w.index_fill(0, torch.tensor(0), -0.0))),
    "a state's first value": Case(partial(Net, start=1.0)),
    "the dtype of weights and input": Case(lambda: double(Net()), x=X.double()),
    "the layout of a weight": Case(lambda: with_weight("conv.weight", lambda w: w.contiguous(memory_format=CHANNELS_LAST))),
    "a weight that is transposed": Case(lambda: with_weight("linear.weight", lambda w: w.t().contiguous().t())),
    "a tie that is broken": Case(untied_alike),
    "two weights that trade their names": Case(lambda: _traded(Net())),
    # inputs
    "a size of the input": Case(x=X[:1]),
    "the rank of the input": Case(x=X[0]),
    "the dtype of the input": Case(lambda: _casting(Net()), x=X.double()),
    "strides of the input": Case(x=X.transpose(2, 3).contiguous().transpose(2, 3)),
    "an input of channels last": Case(x=X.contiguous(memory_format=CHANNELS_LAST)),
    "an input with gaps": Case(x=torch.stack([X, X], dim=-1)[..., 0]),
    # the program
    "an attribute": Case(partial(Net, dim=1)),
    "the last bit of eps": Case(partial(Net, eps=float(torch.nextafter(torch.tensor(EPS, dtype=torch.float64), torch.tensor(1.0))))),
    "eps at all": Case(partial(Net, eps=1e-2)),
    "the sign of zero": Case(partial(Net, zero=-0.0)),
    "a number's kind": Case(partial(Net, zero=0)),
    "the order of operands": Case(partial(Net, swapped=True)),
    "a keyword": Case(partial(Net, alpha=2)),
    "a bias": Case(partial(Net, bias=False)),
    "train in place of eval": Case(lambda: Net(p=0.0).train()),
    # passes
    "a pass more": Case(passes=f"{PASSES},remove-dead-code"),
    "a pass less": Case(passes=PASSES.partition(",")[0] + "}" if False else "slice-groups{memory_budget=50%}"),
    "passes in another order": Case(passes=",".join(reversed(["slice-groups{memory_budget=50%}", PASSES.split("},")[1]]))),
    "no clean-ups": Case(options={"cleanups": False}),
    "the budget of slices": Case(passes=PASSES.replace("50%", "40%")),
    "the most slices": Case(passes=PASSES.replace("50%", "50%,max_slices=3")),
    "the format of codes": Case(passes=PASSES.replace("int8-channel", "int4-g64")),
    "the budget of codes": Case(passes=PASSES.replace("budget=1}", "budget=0}")),
    "the least weight that is quantised": Case(passes=PASSES.replace("min_numel=0", "min_numel=65")),
    "what is not quantised": Case(passes=PASSES.replace("min_numel=0", 'min_numel=0,skip=["linear"]')),
    # the process
    "another graphwright": Case(during=partial(environment, "graphwright")),
    "another torch": Case(during=partial(environment, "torch")),
    "another Python": Case(during=partial(environment, "python")),
    "another library": Case(during=partial(environment, "libraries")),
    "another processor": Case(during=partial(environment, "cpu")),
    "threads": Case(during=partial(setting, torch.get_num_threads, torch.set_num_threads, 3)),
    "the default dtype": Case(during=partial(setting, torch.get_default_dtype, torch.set_default_dtype, torch.float64)),
    "the precision of products": Case(
        during=partial(setting, torch.get_float32_matmul_precision, torch.set_float32_matmul_precision, "medium")
    ),
    "deterministic algorithms": Case(
        during=partial(setting, torch.are_deterministic_algorithms_enabled, torch.use_deterministic_algorithms, True)
    ),
    "denormal numbers": Case(during=flushing),
    "whether oneDNN is used": Case(during=partial(BACKENDS.mkldnn.flags, enabled=False)),
    "autocast": Case(during=partial(torch.autocast, "cpu", dtype=torch.bfloat16)),
}

HITS: dict[str, Case] = {
    "an equal model built anew": Case(),
    "a tie that is made again": Case(tied_apart),
    "a dropout that is not used": Case(partial(Net, p=0.5)),
    "an option spelled out": Case(passes=PASSES.replace("50%", "50%,insist=false,max_slices=64")),
    "passes as a list": Case(passes=[gw.SliceGroups("50%"), gw.Quantize(weight="int8-channel", min_numel=0, budget=1)]),
    "options in another order": Case(passes=PASSES.replace("weight=int8-channel,min_numel=0", "min_numel=0,weight=int8-channel")),
    "values of the input": Case(x=X * 3 + 1),
    "an input at another address": Case(x=torch.cat([X[:1], X])[1:]),
    "an input that asks for gradients": Case(x=X.clone().requires_grad_()),
    "weights that ask for none": Case(lambda: frozen(Net())),
    "no gradients": Case(during=torch.no_grad),
    "inference mode": Case(during=torch.inference_mode),
    "another seed": Case(during=lambda: _seeded(1234)),
}


def _seeded(seed: int) -> contextlib.AbstractContextManager[Any]:
    scope = contextlib.ExitStack()
    scope.enter_context(torch.random.fork_rng())
    torch.manual_seed(seed)
    return scope


def _traded(net: Net) -> Net:
    net.table, net.offset = net.offset, net.table
    return net


class _Casting(nn.Module):
    def __init__(self, net):
        super().__init__()
        self.net = net.eval()
        self.eval()

    def forward(self, x):
        return self.net(x.float())


def _casting(net: Net) -> nn.Module:
    return _Casting(net)


@pytest.fixture(scope="module")
def known(tmp_path_factory):
    """A cache that has the result for `Net()` on X under PASSES."""
    cache = Cache(tmp_path_factory.mktemp("known") / "cache")
    first = compiled(Case(), cache)
    assert cache.entries("passes") and not first.compilation.reports[0].kept
    assert {report.name for report in first.compilation.reports if report.records} >= {"fold-batch-norm", "slice-groups", "quantize"}
    return cache


def compiled(case: Case, cache: Cache | bool) -> gw.CompiledModel:
    return gw.compile(case.model(), case.passes, example_inputs=(case.x,), backend="aten", cache=cache, **(case.options or {}))


def bits(value: torch.Tensor) -> tuple[Any, ...]:
    value = value.detach()
    return value.dtype, tuple(value.shape), value.stride(), value.contiguous().view(torch.uint8).flatten().tolist()


def results(model: gw.CompiledModel, case: Case) -> list[Any]:
    """The bits of two calls: the second tells the state that the first left."""
    torch.manual_seed(0)
    return [bits(each) for _ in range(2) for each in model(case.x)]


def held_to_a_fresh_one(case: Case, cache: Cache) -> bool:
    """Whether the cache had it, once what it gave is what is computed without a cache."""
    with case.during():
        found, fresh = compiled(case, cache), compiled(case, False)
        assert results(found, case) == results(fresh, case)
        assert str(found.program) == str(fresh.program)
        assert found.compilation.contract == fresh.compilation.contract
    return found.compilation.reports[0].kept


@pytest.mark.parametrize("case", MISSES.values(), ids=MISSES)
def test_what_changes_a_result_is_a_miss(known, case):
    assert not held_to_a_fresh_one(case, known)


@pytest.mark.parametrize("case", HITS.values(), ids=HITS)
def test_what_changes_none_is_a_hit(known, case):
    assert held_to_a_fresh_one(case, known)


# --- what is in no key, since it is not kept -------------------------------------------------------------------------------------


@pytest.mark.parametrize("high", [7, 8])
def test_ranges_of_symbols_and_symbols_that_are_one_are_never_stale(known, high):
    n = torch.export.Dim("n", min=1, max=high)
    other = torch.export.Dim("m", min=1, max=high) if high == 8 else n

    class Sizes(nn.Module):
        def forward(self, a, b):
            return a.sum(0) + b.sum(0)

    inputs = torch.ones(3, 4), torch.ones(3, 4)
    shapes = {"a": {0: n}, "b": {0: other}}
    model = gw.compile(Sizes(), example_inputs=inputs, dynamic_shapes=shapes, backend="aten", cache=known)
    assert not model.compilation.reports[0].kept
    assert torch.equal(model(torch.ones(high, 4), torch.ones(high, 4)), torch.full((4,), 2.0 * high))
    with pytest.raises(gw.InputError):
        model(torch.ones(high + 1, 4), torch.ones(high + 1, 4))


def test_a_schedule_is_part_of_the_program(known):
    def scheduled(value: int) -> Program:
        program = capture(Net(), (X,))
        program.schedules["rows"] = [value]
        return program

    for value in (1, 2):
        model = gw.compile(scheduled(value), PASSES, backend="aten", cache=known)
        assert model.program.schedules["rows"] == [value] and not model.compilation.reports[0].kept


@pytest.mark.parametrize("scale", [1.0, 100.0])
def test_what_is_calibrated_is_never_stale(known, scale):
    each = gw.AbsorbOutliers(calibration=[(X * scale,)], weight="int8-channel", act="int8-token", min_numel=0, rank=1, budget=1)
    case = Case(passes=[each])
    assert not held_to_a_fresh_one(case, known)


# --- other processes -------------------------------------------------------------------------------------------------------------

NETWORK = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x, **scales):
        return self.b(self.a(x).relu()) * scales["first"] + scales["second"]
"""

PROCESS = """
import sys, torch, graphwright as gw
from network import Net
scales = {"first": torch.tensor(2.0), "second": torch.tensor(3.0)}
x = torch.linspace(-1, 1, 64).view(8, 8)
model = gw.compile(Net(), "slice-groups", example_inputs=(x,), example_kwargs=scales, backend="aten", cache=sys.argv[1])
scales = dict(reversed(scales.items()))
print(model.compilation.reports[0].kept, model(x, **scales).flatten().view(torch.int32).tolist(), str(model.program).encode().hex())
"""


def test_another_process_hash_seed_folder_home_time_zone_and_place_of_the_users_file_are_a_hit(tmp_path, cache):
    def run(place: str, **variables: str) -> list[str]:
        folder = tmp_path / place
        (folder / "code").mkdir(parents=True)
        (folder / "code" / "network.py").write_text(NETWORK)
        path = os.pathsep.join([str(folder / "code"), *filter(None, sys.path)])
        command = [sys.executable, "-c", textwrap.dedent(PROCESS), str(cache.folder)]
        environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", **variables}
        done = subprocess.run(command, capture_output=True, text=True, cwd=folder, env=environment, check=True)
        return done.stdout.split(maxsplit=1)

    first = run("here", PYTHONHASHSEED="1", TZ="UTC")
    second = run("somewhere/else", PYTHONHASHSEED="2", HOME=str(tmp_path), TZ="Asia/Tokyo", LC_ALL="C")
    assert (first[0], second[0]) == ("False", "True")
    assert first[1] == second[1]


# --- entries ---------------------------------------------------------------------------------------------------------------------


def _of_another_key(path):
    other = path.with_name("0" * 64)
    shutil.copy(path, other)
    os.replace(other, path)
    content = path.read_bytes()
    path.write_bytes(content.replace(b'"threads":"', b'"threads":"9', 1))


ENTRIES = {
    "cut off": lambda path: path.write_bytes(path.read_bytes()[:-1]),
    "empty": lambda path: path.write_bytes(b""),
    "a bit of its value flipped": lambda path: path.write_bytes(path.read_bytes()[:-9] + b"\xff" + path.read_bytes()[-8:]),
    "another version of entries": lambda path: path.write_bytes(path.read_bytes().replace(b"graphwright cache 1", b"graphwright cache 2", 1)),
    "another key": _of_another_key,
    "writable by others": lambda path: path.chmod(0o666),
}


@pytest.mark.parametrize("damage", ENTRIES.values(), ids=ENTRIES)
def test_an_entry_that_is_not_as_it_was_written_is_a_miss(cache, damage):
    compiled(Case(), cache)
    (path,) = (cache.folder / "passes").iterdir()
    damage(path)
    assert not held_to_a_fresh_one(Case(), cache)
    assert held_to_a_fresh_one(Case(), cache), "it was put there again"


def test_parts_of_the_environment_are_the_ones_that_are_tried():
    tried = {"graphwright", "torch", "python", "libraries", "cpu", "threads", "settings"}
    assert set(cache_key.environment()) == tried
