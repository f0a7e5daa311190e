"""`gw.kv_append` and `gw.cached_attention` on CPUs: the kernels in C++ against the operators' bodies in float64, what does not change a
result, and caches that are written where they lie."""

import functools
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import graphwright as gw
from graphwright.codegen import cpu_kernels
from graphwright.codegen.attention import cached
from graphwright.codegen.attention.library import library
from graphwright.ir.appends import plan_appends
from graphwright.ir.run import run as reference_run
from graphwright.runtime.backend import has_cpp_compiler
from graphwright.runtime.executor import Executor
from graphwright.tests import decoders
from graphwright.tests.native_targets import TARGETS, library_for

needs_compiler = pytest.mark.skipif(not has_cpp_compiler(), reason="no C++ compiler: install g++")
attention, append = torch.ops.gw.cached_attention.default, torch.ops.gw.kv_append.default
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
BACKENDS = ["aten", *(["inductor"] if has_cpp_compiler() else []), "tuned"]
NAN = float("nan")


@dataclass
class Step:
    """A step on some rows of a cache, every slot behind what they hold poisoned; `queries` and `keys` are laid out [B, T, H, E]."""

    dtype: torch.dtype = torch.float32
    kv_heads: int = 2
    group: int = 3
    depth: int = 64
    width: int = 64
    positions: tuple[int, ...] = (70, 0, 301)
    rows: tuple[int, ...] = (3, 0, 2)
    queries: int = 1
    capacity: int = 350
    window: int = 0
    softcap: float = 0.0
    seed: int = 0

    def __post_init__(self):
        draw = torch.Generator().manual_seed(self.seed)

        def normal(*shape):
            return torch.randn(*shape, generator=draw).to(self.dtype)

        heads, batch = self.kv_heads * self.group, len(self.rows)
        self.q = normal(batch, self.queries, heads, self.depth).transpose(1, 2)
        self.k = normal(batch, self.queries, self.kv_heads, self.depth).transpose(1, 2)
        self.v = normal(batch, self.queries, self.kv_heads, self.width).transpose(1, 2)
        self.cache_k = normal(max(self.rows) + 1, self.kv_heads, self.capacity, self.depth)
        self.cache_v = normal(max(self.rows) + 1, self.kv_heads, self.capacity, self.width)
        self.position, self.row = torch.tensor(self.positions), torch.tensor(self.rows)
        for cache in (self.cache_k, self.cache_v):
            live = dict(zip(self.rows, self.positions))
            for row in range(cache.size(0)):
                cache[row, :, live[row] + self.queries if row in live else 0 :] = NAN
        self.options = {"scale": self.depth**-0.5, "window": self.window, "softcap": self.softcap}

    def attend(self, function=cached.cached_attention, **changes):
        operands = {"q": self.q, "cache_k": self.cache_k, "cache_v": self.cache_v, "position": self.position, "rows": self.row} | changes
        return function(*operands.values(), **self.options)

    def exact(self):
        """The body in float64, and the bound of an error: the sizes of what is summed, and what a score's own rounding makes of them."""
        q, k, v = (each.double() for each in (self.q, self.cache_k, self.cache_v))
        y = attention(q, k, v, self.position, self.row, **self.options)
        bound = attention(q, k, v.abs(), self.position, self.row, **self.options)
        return y, bound

    def alone(self, b, first, count):
        """The arguments of a call for some queries of one row."""
        part = slice(b, b + 1)
        return {"q": self.q[part, :, first : first + count], "position": self.position[part] + first, "rows": self.row[part]}


def assert_close(step, y):
    """Within the rounding of the result, and in float32 16 eps more of the absolute terms: a score of normal vectors is at most about 6,
    and a weight moves by its absolute error, some eps of 6, where sums are of 64 to 128 terms."""
    exact, bound = step.exact()
    assert y.dtype == step.dtype and y.shape == exact.shape and y.transpose(1, 2).is_contiguous()
    slack = torch.finfo(step.dtype).eps * exact.abs() + 16 * torch.finfo(torch.float32).eps * (bound + exact.abs())
    tiny = 2.0**-24 if step.dtype == torch.float16 else 0.0  # the distance of subnormal float16
    assert ((y.double() - exact).abs() <= slack + tiny).all()


@pytest.fixture(params=TARGETS)
def kernel(request, monkeypatch):
    """The kernels for this machine, and for older ones that this can play."""
    native = library_for(library, request.param)
    monkeypatch.setattr(cached, "library", lambda: native)
    monkeypatch.setattr(cached, "reference", None)  # is not what is tested


# --- the numbers -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("window", "softcap"), [(0, 0.0), (5, 0.0), (300, 0.0), (0, 3.0)])
@pytest.mark.parametrize("queries", [1, 2, 17, 40])
def test_attention_is_that_of_the_body(kernel, dtype, queries, window, softcap):
    step = Step(dtype, queries=queries, window=window, softcap=softcap)
    assert_close(step, step.attend())


def test_more_heads_than_a_tile_has_queries_may_share_keys(kernel):
    step = Step(kv_heads=1, group=80, queries=3)
    assert_close(step, step.attend())


@st.composite
def steps(draw):
    queries = draw(st.integers(1, 40))
    capacity = queries + draw(st.integers(0, 600))
    rows = draw(st.lists(st.integers(0, 5), min_size=1, max_size=4, unique=True))
    return Step(
        dtype=draw(st.sampled_from(DTYPES)),
        kv_heads=draw(st.integers(1, 3)),
        group=draw(st.sampled_from([1, 2, 3, 7])),
        depth=draw(st.integers(1, 130)),
        width=draw(st.integers(1, 130)),
        positions=tuple(draw(st.integers(0, capacity - queries)) for _ in rows),
        rows=tuple(rows),
        queries=queries,
        capacity=capacity,
        window=draw(st.sampled_from([0, 0, 1, 3, 63, 64, 65, 400])),
        softcap=draw(st.sampled_from([0.0, 0.0, 0.5, 30.0])),
        seed=draw(st.integers(0, 2**20)),
    )


@needs_compiler
@given(steps())
def test_attention_is_that_of_the_body_whatever_the_sizes(step):
    assert_close(step, step.attend())


@needs_compiler
@given(steps())
def test_an_append_is_that_of_the_body_bit_for_bit(step):
    operands = (step.cache_k, step.cache_v, step.k, step.v, step.position, step.row)
    for got, expected in zip(cached.kv_append(*operands), append(*operands), strict=True):
        torch.testing.assert_close(got, expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_operands_may_lie_in_any_order(kernel, dtype):
    step = Step(dtype, queries=5)
    expected = step.attend()
    for order in ((0, 1, 2, 3), (0, 2, 1, 3), (2, 1, 0, 3)):  # of the caches' dims in memory
        caches = [each.permute(order).contiguous().permute(order) for each in (step.cache_k, step.cache_v)]
        assert torch.equal(step.attend(cache_k=caches[0], cache_v=caches[1], q=step.q.mT.contiguous().mT), expected)
        appended = [torch.zeros_like(each) for each in caches]
        cached.append_in_place(*appended, step.k.mT.contiguous().mT, step.v, step.position, step.row)
        plain = append(*(each.contiguous() for each in map(torch.zeros_like, caches)), step.k, step.v, step.position, step.row)
        assert all(torch.equal(a, b) for a, b in zip(appended, plain, strict=True))


@pytest.mark.parametrize("softcap", [0.0, 2.0])
def test_scores_that_differ_widely_give_the_weights_of_the_largest(kernel, softcap):
    step = Step(queries=3, softcap=softcap)
    step.q *= 200
    exact, bound = step.exact()
    # The terms of a score are up to 1000: their rounding moves a weight by 1000 times 16 eps.
    assert ((step.attend().double() - exact).abs() <= 16_000 * torch.finfo(torch.float32).eps * bound).all()


@pytest.mark.parametrize("poison", [NAN, float("inf")])
def test_a_live_slot_that_is_not_finite_is_seen_by_those_that_it_is_visible_to(kernel, poison):
    step = Step(queries=4)
    step.cache_v[3, 0, 71] = poison  # position of query 1 of the first row, heads 0 to 2
    y = step.attend()
    assert not y[0, :3, 1:].isfinite().any() and y[1:].isfinite().all() and y[0, 3:].isfinite().all()
    if poison != poison:
        step.cache_v[3, 0, 71], step.cache_k[3, 0, 71] = 0.0, NAN
        y = step.attend()
        assert y[0, :3, 1:].isnan().all() and y[0, :3, 0].isfinite().all()


# --- what does not change a result -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("window", [0, 70])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_query_does_not_depend_on_those_beside_it(kernel, dtype, window):
    step = Step(dtype, queries=40, window=window, capacity=400)
    together = step.attend()
    for b in range(3):
        assert torch.equal(step.attend(**step.alone(b, 0, 40)), together[b : b + 1])
        for first, count in ((0, 1), (7, 1), (39, 1), (3, 5), (20, 20)):
            assert torch.equal(step.attend(**step.alone(b, first, count)), together[b : b + 1, :, first : first + count])


@pytest.mark.parametrize("queries", [1, 200])
def test_bits_repeat_on_any_number_of_threads(kernel, queries):
    step, before = Step(queries=queries, capacity=1100, positions=(900, 3, 555)), torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 3, 7):
            torch.set_num_threads(threads)
            results.append(step.attend())
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(results[0], each) for each in results[1:])


@needs_compiler
@given(steps(), st.integers(0, 600))
@settings(max_examples=20)
def test_capacity_does_not_change_a_result(step, more):
    longer = [torch.cat([each, torch.full_like(each[:, :, :1], NAN).expand(-1, -1, more, -1)], 2) for each in (step.cache_k, step.cache_v)]
    assert torch.equal(step.attend(cache_k=longer[0], cache_v=longer[1]), step.attend())


# --- what is refused -------------------------------------------------------------------------------------------------------


OUTSIDE = {
    "a row behind the last": {"rows": torch.tensor([3, 0, 4])},
    "a negative row": {"rows": torch.tensor([3, -1, 2])},
    "a position behind the last": {"position": torch.tensor([70, 0, 350])},
    "positions that end behind the last": {"position": torch.tensor([347, 0, 70])},
    "a negative position": {"position": torch.tensor([70, -1, 301])},
    "a position that would overflow": {"position": torch.tensor([70, 2**63 - 1, 301])},
}


@pytest.mark.parametrize("compiles", [pytest.param(True, marks=needs_compiler), False], ids=["kernel", "no compiler"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("change", OUTSIDE.values(), ids=OUTSIDE)
def test_what_lies_outside_of_the_cache_is_an_error_and_nothing_is_written(monkeypatch, change, dtype, compiles):
    if not compiles:
        monkeypatch.setattr(cached, "library", lambda: None)
    step = Step(dtype, queries=4)
    with pytest.raises(IndexError, match="lies outside of a cache of 4 rows and 350 slots"):
        step.attend(**change)
    caches = step.cache_k.clone(), step.cache_v.clone()
    with pytest.raises(IndexError, match="lies outside of a cache of 4 rows and 350 slots"):
        told = {"position": step.position, "rows": step.row} | change
        cached.append_in_place(*caches, step.k, step.v, **told)
    for cache, before in zip(caches, (step.cache_k, step.cache_v), strict=True):
        torch.testing.assert_close(cache, before, rtol=0, atol=0, equal_nan=True)


UNFIT = {
    "values of fewer heads": lambda step: {"cache_v": step.cache_v[:, :1]},
    "values of fewer rows": lambda step: {"cache_v": step.cache_v[:2], "rows": torch.tensor([1, 0, 2])},
    "values of fewer slots": lambda step: {"cache_v": step.cache_v[:, :, :80]},
    "queries of another depth": lambda step: {"q": step.q[..., :32]},
    "fewer positions than queries": lambda step: {"position": step.position[:2]},
    "fewer rows than queries": lambda step: {"rows": step.row[:2]},
}


@pytest.mark.parametrize("change", UNFIT.values(), ids=UNFIT)
@pytest.mark.parametrize("softcap", [0.0, 2.0])
def test_sizes_that_do_not_fit_are_the_body_s_error_and_no_other_memory_s_numbers(change, softcap):
    step = Step(queries=4, softcap=softcap)
    with pytest.raises((RuntimeError, IndexError)):
        step.attend(**change(step))


def test_a_negative_window_is_the_body_s_error():
    with pytest.raises(ValueError, match="not -3"):
        Step(window=-3).attend()


@pytest.mark.parametrize("change", [{"k": slice(0, 2)}, {"v": slice(0, 2)}], ids=["keys", "values"])
def test_an_append_of_fewer_rows_than_places_is_an_error(change):
    step = Step(queries=4)
    new = {name: getattr(step, name)[change.get(name, slice(None))] for name in "kv"}
    with pytest.raises((RuntimeError, IndexError), match="shape mismatch"):
        cached.append_in_place(step.cache_k, step.cache_v, new["k"], new["v"], step.position, step.row)


@pytest.mark.parametrize("name", ["position", "row"])
def test_places_may_be_int32(name):
    step = Step(queries=4)
    expected = step.attend(attention), append(step.cache_k, step.cache_v, step.k, step.v, step.position, step.row)
    setattr(step, name, getattr(step, name).int())
    assert torch.equal(step.attend(), expected[0])
    appended = cached.kv_append(step.cache_k, step.cache_v, step.k, step.v, step.position, step.row)
    torch.testing.assert_close(appended, expected[1], rtol=0, atol=0, equal_nan=True)


# --- without a kernel ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("window", "softcap"), [(0, 0.0), (5, 0.0), (0, 3.0), (5, 3.0)])
@pytest.mark.parametrize("queries", [1, 17])
def test_without_a_compiler_aten_attends(monkeypatch, dtype, queries, window, softcap):
    monkeypatch.setattr(cached, "library", lambda: None)
    step = Step(dtype, queries=queries, window=window, softcap=softcap)
    y, (exact, bound) = step.attend(), step.exact()
    # ATen rounds weights to the type of the values before it sums.
    assert ((y.double() - exact).abs() <= (16 * torch.finfo(torch.float32).eps + 2 * torch.finfo(dtype).eps) * bound).all()


def test_float64_is_left_to_the_body():
    step = Step(torch.float64, queries=3)
    assert torch.equal(step.attend(), step.attend(attention))


def test_no_queries_have_no_result():
    step = Step()
    assert step.attend(q=step.q[:, :, :0]).shape == (3, 6, 0, 64)
    assert step.attend(q=step.q[:0], position=step.position[:0], rows=step.row[:0]).shape == (0, 6, 1, 64)
    caches = step.cache_k.clone(), step.cache_v.clone()
    cached.append_in_place(*caches, step.k[:, :, :0], step.v[:, :, :0], step.position, step.row)
    torch.testing.assert_close(caches[0], step.cache_k, rtol=0, atol=0, equal_nan=True)


# --- in a program ----------------------------------------------------------------------------------------------------------

TEXT = """graphwright 1
function main {{
  takes ((*, *, *, *, *, *, *), {{}})
  gives {gives}
  input %q : f32[2, 6, 3, 64]
  input %k : f32[2, 2, 3, 64]
  input %v : f32[2, 2, 3, 64]
  input %position : i64[2]
  input %rows : i64[2]
  input %cache_k : f32[4, 2, 16, 64]
  input %cache_v : f32[4, 2, 16, 64]
  {before}
  %n = gw.kv_append.default(%cache_k, %cache_v, {new}, %v, %position, %rows)
  %nk = getitem(%n, 0)
  %nv = getitem(%n, 1)
  %y = gw.cached_attention.default(%q, %nk, %nv, %position, %rows, scale=0.125)
  {after}
  return {leaves} state "input:cache_k" = {new_k}, "input:cache_v" = {new_v}
}}
"""


def program_of(before="%a = aten.exp.default(%k)", after="%z = aten.exp.default(%y)", leaves="%z", gives="*", **others):
    others = {"new": "%a", "new_k": "%nk", "new_v": "%nv"} | others
    return gw.parse(TEXT.format(before=before, after=after, leaves=leaves, gives=gives, **others))


def operands(seed=0):
    draw = torch.Generator().manual_seed(seed)
    shapes = ((2, 6, 3, 64), (2, 2, 3, 64), (2, 2, 3, 64))
    caches = [torch.randn(4, 2, 16, 64, generator=draw) for _ in range(2)]
    return [*(torch.randn(shape, generator=draw) for shape in shapes), torch.tensor([4, 0]), torch.tensor([1, 3]), *caches]


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_cache_that_is_given_up_is_written_where_it_lies(backend):
    program, given = program_of(), operands()
    expected, states = reference_run(program, operands())
    leaves, new = Executor(program, backend=backend)(list(given))
    assert new["input:cache_k"] is given[5] and new["input:cache_v"] is given[6]
    torch.testing.assert_close(leaves, expected)
    torch.testing.assert_close(given[5:], list(states.values()))
    torch.testing.assert_close(given[:5], operands()[:5], rtol=0, atol=0)


KEPT = {
    "the old cache is read": {"after": "%z = aten.sum.default(%cache_k)"},
    "the old cache is returned": {"leaves": "%y, %cache_v", "gives": "(*, *)"},
    "the new value is another": {"after": "%z = aten.neg.default(%nk)", "new_k": "%z"},
    "the caches change places": {"new_k": "%nv", "new_v": "%nk"},
    "a cache is what is appended": {
        "before": "%a = aten.slice.Tensor(%cache_k, 2, 0, 3)\n  %b = aten.slice.Tensor(%a, 0, 0, 2)",
        "new": "%b",
    },
}


@pytest.mark.parametrize("change", KEPT.values(), ids=KEPT)
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_cache_that_somebody_reads_stays(backend, change):
    program = program_of(**change)
    assert not plan_appends(program.main.graph)
    given = operands()
    expected, states = reference_run(program, operands())
    leaves, new = Executor(program, backend=backend)(list(given))
    torch.testing.assert_close(given, operands(), rtol=0, atol=0)
    torch.testing.assert_close(leaves, expected)
    torch.testing.assert_close(new, states)


def test_sizes_of_a_cache_may_be_read():
    program = program_of(after="%s = aten.sym_size.int(%cache_k, 2)\n  %z = aten.mul.Scalar(%y, %s)")
    assert len(plan_appends(program.main.graph)) == 1


class Decoder(nn.Module):
    """One attention between products and pointwise operations; its caches are arguments, or buffers of its own."""

    def __init__(self, owns_caches=False, returns_cache=False):
        super().__init__()
        self.q, self.k, self.v, self.o = nn.Linear(48, 6 * 64), nn.Linear(48, 2 * 64), nn.Linear(48, 2 * 64), nn.Linear(6 * 64, 48)
        self.returns_cache = returns_cache
        if owns_caches:
            self.register_buffer("own_k", torch.zeros(4, 2, 128, 64))
            self.register_buffer("own_v", torch.zeros(4, 2, 128, 64))

    def forward(self, x, position, rows, cache_k=None, cache_v=None):
        if cache_k is None:
            cache_k, cache_v = self.own_k, self.own_v
        q, k, v = (f(x).unflatten(-1, (-1, 64)).transpose(1, 2) for f in (self.q, self.k, self.v))
        new_k, new_v = append(cache_k, cache_v, k * torch.sin(k), v, position, rows)
        y = attention(q * torch.cos(q), new_k, new_v, position, rows, scale=0.125)
        cache_k.copy_(new_k)
        cache_v.copy_(new_v)
        y = self.o(y.transpose(1, 2).flatten(2)).relu()
        return (y, new_k) if self.returns_cache else y


def arguments(queries=3, owns_caches=False):
    draw = torch.Generator().manual_seed(1)
    caches = [] if owns_caches else [torch.randn(4, 2, 128, 64, generator=draw) for _ in range(2)]
    return [torch.randn(2, queries, 48, generator=draw), torch.tensor([4, 0]), torch.tensor([1, 3]), *caches]


@pytest.fixture
def calls(monkeypatch):
    """The queries of each call of the kernel of attention."""
    seen = []

    def counted(q, *others, **options):
        seen.append(q.size(2))
        return cached.cached_attention(q, *others, **options)

    monkeypatch.setitem(cpu_kernels.KERNELS, attention, counted)
    monkeypatch.setattr(cached, "reference", None)
    return seen


@needs_compiler
@pytest.mark.parametrize("backend", BACKENDS)
def test_every_backend_calls_the_kernels_and_copies_no_cache(calls, backend):
    net, given, expected = Decoder().eval(), arguments(), arguments()
    model = gw.compile(net, example_inputs=tuple(arguments()), backend=backend)
    places = [each.data_ptr() for each in given]
    with torch.no_grad():
        torch.testing.assert_close(model(*given), net(*expected), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(given, expected, rtol=1e-5, atol=1e-5)
    assert calls == [3] and [each.data_ptr() for each in given] == places
    cache_bytes = 2 * given[3].nbytes
    assert model.measure(*given).peak_bytes < cache_bytes and model.report().memory.planned < cache_bytes


@functools.cache
def zoo():
    return decoders.compiled("zoo").program


def step_of(tokens, position, capacity=48):
    """The inputs of a decoder's function for two of three rows, slots that were never written poisoned."""
    caches = [a.value for a in zoo().functions["verify"].signature().inputs if a.name.startswith("cache_")]
    shapes = [(3, int(cache.size(1)), capacity, int(cache.size(3))) for cache in caches]
    return [tokens, torch.tensor(position), torch.tensor([2, 0]), *(torch.full(shape, NAN) for shape in shapes)]


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_number_of_queries_may_be_known_at_the_call_only(backend):
    executor, draw = Executor(zoo(), "verify", backend=backend), torch.Generator().manual_seed(0)
    for queries in (1, 5, 40):
        tokens = torch.randint(0, 50, (2, queries), generator=draw)
        given = step_of(tokens, [0, 0])
        expected, states = reference_run(zoo(), step_of(tokens, [0, 0]), function="verify")
        leaves, new = executor(list(given))
        torch.testing.assert_close(leaves, expected, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(new, states, rtol=1e-4, atol=1e-4, equal_nan=True)
        assert all(a is b for a, b in zip(new.values(), given[3:], strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
def test_states_of_the_model_are_written_where_they_lie(backend):
    net = Decoder(owns_caches=True).eval()
    x, position, rows = arguments(owns_caches=True)
    model = gw.compile(net, example_inputs=(x, position, rows), backend=backend)
    state, place = model.state_dict()["own_k"], model.state_dict()["own_k"].data_ptr()
    with torch.no_grad():
        for step in range(3):
            torch.testing.assert_close(model(x, position + 3 * step, rows), net(x, position + 3 * step, rows), rtol=1e-5, atol=1e-5)
    assert model.state_dict()["own_k"].data_ptr() == place
    torch.testing.assert_close(state, net.own_k, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_new_cache_that_is_an_output_too_does_not_change_with_the_next_call(backend):
    model = gw.compile(Decoder(returns_cache=True).eval(), example_inputs=tuple(arguments()), backend=backend)
    given = arguments()
    _, first = model(*given)
    before = first.clone()
    torch.testing.assert_close(given[3], first, rtol=0, atol=0)
    model(given[0], given[1] + 3, *given[2:])
    assert torch.equal(first, before) and not torch.equal(given[3], first)


def test_decoding_step_by_step_is_one_pass():
    executor = Executor(zoo(), "verify", backend="aten")
    tokens = torch.randint(0, 50, (2, 20), generator=torch.Generator().manual_seed(1))
    (whole,), _ = executor(step_of(tokens, [0, 0]))
    (_, position, rows, *caches), parts, first = step_of(tokens, [0, 0]), [], 0
    for count in (7, 1, 1, 4, 1, 1, 5):
        (part,), _ = executor([tokens[:, first : first + count].contiguous(), position + first, rows, *caches])
        parts.append(part)
        first += count
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_error_names_the_call_and_leaves_the_caches(backend):
    model = gw.compile(Decoder().eval(), example_inputs=tuple(arguments()), backend=backend)
    given = arguments()
    given[1][1] = 126
    with pytest.raises(IndexError, match="positions 126 to 128"):
        model(*given)
    torch.testing.assert_close(given[3:], arguments()[3:], rtol=0, atol=0)
