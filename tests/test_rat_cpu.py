"""`gw.rat_attention` and `gw.rat_cached_attention` on CPUs: the kernel in C++ against the operators' bodies in float64, steps against
the whole sequence, what does not change a result, and caches that are written where they lie."""

import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import graphwright as gw
from graphwright.codegen.native import library as native
from graphwright.codegen.rat import kernels
from graphwright.codegen.rat.library import library
from graphwright.ir.appends import plan_appends
from graphwright.ir.run import run as reference_run
from graphwright.runtime.backend import has_cpp_compiler
from graphwright.runtime.executor import Executor
from graphwright.tests.native_targets import TARGETS, library_for
from graphwright.tests.rat_cases import DTYPES, ODD, Case, assert_close, attention, cached, cases, double

needs_compiler = pytest.mark.skipif(not has_cpp_compiler(), reason="no C++ compiler: install g++")
BACKENDS = ["aten", *(["inductor"] if has_cpp_compiler() else []), "tuned"]


@pytest.fixture(params=TARGETS)
def kernel(request, monkeypatch):
    """The kernel for this machine, and for older ones that this can play."""
    native = library_for(library, request.param)
    monkeypatch.setattr(kernels, "library", lambda: native)
    for name in ("attention_by_body", "cached_by_body"):
        monkeypatch.setattr(kernels, name, None)  # is not what is tested


# --- the numbers -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", ODD.values(), ids=ODD)
def test_attention_is_that_of_the_body(kernel, case, dtype):
    case = replace(case, dtype=dtype)
    y = kernels.rat_attention(*case.operands, **case.options)
    assert y.transpose(1, 2).is_contiguous()
    assert_close(y, *case.exact(), dtype)


@needs_compiler
@given(cases())
def test_attention_is_that_of_the_body_whatever_the_sizes(case):
    assert_close(kernels.rat_attention(*case.operands, **case.options), *case.exact(), case.dtype)


@st.composite
def stepped_cases(draw):
    """A case, and steps of its ragged rows until all have all tokens: (tokens before, tokens now, width of the step) of each."""
    case = draw(cases(most=40))
    done, steps = [0] * case.batch, []
    while min(done) < case.tokens:
        most = draw(st.sampled_from([1, 9, 40]))
        counts = [draw(st.integers(0 if n else 1, most)) for n in done]
        counts = [min(count, case.tokens - n) for count, n in zip(counts, done, strict=True)]
        if sum(counts) == 0:
            counts = [min(1, case.tokens - n) for n in done]
        steps.append((list(done), counts, max(counts) + draw(st.sampled_from([0, 0, 2]))))
        done = [n + count for n, count in zip(done, counts, strict=True)]
    return case, steps


def arguments(case, step, caches):
    """Of one step of some of the caches' rows."""
    first, counts, width = step
    rows = torch.tensor([3, 0, 2][: case.batch])
    return [*case.taken(first, counts, width), *caches, torch.tensor(first), rows, torch.tensor(counts)]


@needs_compiler
@given(stepped_cases())
def test_steps_at_any_split_give_what_the_body_gives_and_keep_what_it_keeps(stepped):
    case, steps = stepped
    caches = case.caches()
    exact, bound = case.exact()
    for step in steps:
        given_ = arguments(case, step, caches)
        wide = list(map(double, given_))
        expected = cached(*wide, **case.options)
        y, *caches = kernels.rat_cached_attention(*given_, **case.options)
        for cache, kept in zip(caches, expected[1:], strict=True):  # numbers of about 1, turned, and rounded to the caches' type
            torch.testing.assert_close(cache.double(), kept, rtol=torch.finfo(cache.dtype).eps, atol=2e-6, equal_nan=True)
        terms = cached(*wide[:2], wide[2].abs(), *wide[3:8], wide[8].abs(), wide[9], wide[10].abs(), *wide[11:], **case.options)[0]
        for b, (first, count) in enumerate(zip(*step[:2], strict=True)):
            assert_close(y[b, :, :count], expected[0][b, :, :count], terms[b, :, :count], case.dtype)
            if case.dtype == torch.float32:
                assert_close(y[b, :, :count], *(each[b, :, first : first + count] for each in (exact, bound)), torch.float32)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("local", ["state", "raw"])
def test_steps_of_one_token_follow_a_prompt(kernel, dtype, local):
    case = Case(dtype, tokens=70, window=9, sinks=3, local=local, chunk=7, group=4)
    exact, bound = case.exact()
    caches, first = case.caches(), [0, 0]
    for counts in ([50, 61], *([1, 1],) * 9):
        y, *caches = kernels.step_in_place(*arguments(case, (first, counts, max(counts)), caches), **case.options)
        for b in range(2):
            parts = [each[b, :, first[b] : first[b] + counts[b]] for each in (exact, bound)]
            # What was rounded to the caches' type counts once more, for keys as the weights' share of 6 (see `assert_close`).
            slack = (1 if dtype == torch.float32 else 8) * parts[1] * torch.finfo(dtype).eps
            assert ((y[b, :, : counts[b]].double() - parts[0]).abs() <= slack + 24 * torch.finfo(torch.float32).eps * parts[1]).all()
        first = [n + count for n, count in zip(first, counts, strict=True)]


@pytest.mark.parametrize("local", ["state", "raw"])
def test_tokens_behind_the_capacity_lose_their_summaries_alone(kernel, local):
    case = Case(tokens=50, chunk=4, window=5, local=local)
    caches = case.caches(capacity=24)
    for step in (([0, 0], [30, 41], 41), ([30, 41], [2, 1], 2), ([32, 42], [18, 8], 18)):
        given_ = arguments(case, step, caches)
        expected = cached(*map(double, given_), **case.options)
        y, *caches = kernels.step_in_place(*given_, **case.options)
        for b, count in enumerate(step[1]):
            torch.testing.assert_close(y[b, :, :count].double(), expected[0][b, :, :count], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close([each.double() for each in caches], list(expected[1:]), rtol=1e-5, atol=1e-5, equal_nan=True)


def test_operands_may_lie_in_any_order(kernel):
    case = ODD["no resets"]
    y = kernels.rat_attention(*case.operands, **case.options)
    for layout in (
        lambda x: x.contiguous(),
        lambda x: x.mT.contiguous().mT,
        lambda x: x[:, :, :, None].expand(-1, -1, -1, 2, -1)[:, :, :, 1],
    ):
        others = [layout(x) for x in case.operands[:4]]
        assert torch.equal(kernels.rat_attention(*others, *case.operands[4:], **case.options), y)
    heads_first = [each.permute(1, 2, 0, 3).contiguous().permute(2, 0, 1, 3) for each in case.caches()[:2]]
    step = arguments(case, ([0, 0], [123, 99], 123), case.caches())
    expected = kernels.step_in_place(*step, **case.options)
    got = kernels.step_in_place(*step[:7], *heads_first, *case.caches()[2:], *step[11:], **case.options)
    torch.testing.assert_close(got, expected, rtol=0, atol=0, equal_nan=True)


# --- what does not change a result -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("tokens", [3, 200])
@pytest.mark.parametrize("reset", [True, False])
def test_bits_repeat_on_any_number_of_threads(kernel, tokens, reset):
    case, before = Case(tokens=tokens, window=30, batch=3, reset=reset, group=2), torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 3, 7):
            torch.set_num_threads(threads)
            results.append(kernels.rat_attention(*case.operands, **case.options))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(results[0], each) for each in results[1:])


@needs_compiler
@given(cases())
@settings(max_examples=20)
def test_a_later_token_changes_no_bit_of_those_before(case):
    y = kernels.rat_attention(*case.operands, **case.options)
    for x in (case.q, case.k, case.v):
        x[:, :, -1] += 1
    assert torch.equal(kernels.rat_attention(*case.operands, **case.options)[:, :, :-1], y[:, :, :-1])


@pytest.mark.parametrize("counts", [[5, 0, 7], [1, 1, 0]])
def test_a_row_does_not_depend_on_the_others_nor_on_what_pads_it(kernel, counts):
    case = Case(tokens=60, batch=3, window=5, sinks=2, local="raw")
    caches = kernels.step_in_place(*arguments(case, ([0, 0, 0], [31, 50, 0], 50), case.caches()), **case.options)[1:]
    first = [31, 50, 0]
    together = arguments(case, (first, counts, 7), [each.clone() for each in caches])
    y = kernels.step_in_place(*together, **case.options)[0]
    for b, count in enumerate(counts):
        others = arguments(case, (first, counts, 7), [each.clone() for each in caches])
        others[:4] = [torch.cat([x[b : b + 1, :, :count], torch.full_like(x[b : b + 1, :, count:], -2.0)], 2) for x in others[:4]]
        others[5:7] = [x[b : b + 1] for x in others[5:7]]
        others[11:] = [x[b : b + 1] for x in others[11:]]
        assert torch.equal(kernels.step_in_place(*others, **case.options)[0][0, :, :count], y[b, :, :count])
        row = int(others[12])
        torch.testing.assert_close([x[row] for x in others[7:11]], [x[row] for x in together[7:11]], rtol=0, atol=0, equal_nan=True)


def test_rows_that_a_step_does_not_pick_stay(kernel):
    case = Case(tokens=40)
    caches = [torch.ones_like(each) for each in case.caches()]
    kernels.step_in_place(*arguments(case, ([0, 0], [40, 3], 40), caches), **case.options)
    assert all((each[row] == 1).all() for each in caches for row in (1, 2))


def test_logits_at_either_end_are_gates_that_are_shut_or_open(kernel):
    case = Case(tokens=40, bias=None, gate="channels", window=3)
    for logit in (-float("inf"), -40.0, 15.0, float("inf")):  # from 37 on float64's own 1 - g is 0
        case.logits = torch.full_like(case.k, logit)
        assert_close(kernels.rat_attention(*case.operands, **case.options), *case.exact(), torch.float32)


# --- what is refused -------------------------------------------------------------------------------------------------------

OUTSIDE = {
    "a row behind the last": (12, [4, 0]),
    "a negative row": (12, [3, -1]),
    "a negative position": (11, [-1, 0]),
    "a position that would overflow": (11, [0, 2**63 - 1]),
    "more real tokens than tokens": (13, [3, 6]),
    "fewer real tokens than none": (13, [3, -1]),
}


@pytest.mark.parametrize(("place", "values"), OUTSIDE.values(), ids=OUTSIDE)
def test_what_lies_outside_of_the_caches_is_an_error_and_nothing_is_written(kernel, place, values):
    case = Case(tokens=5)
    step = arguments(case, ([0, 0], [5, 5], 5), case.caches())
    step[place] = torch.tensor(values)
    with pytest.raises(IndexError, match="are no step over caches of 4 rows: rows and positions count from 0"):
        kernels.step_in_place(*step, **case.options)
    assert all(each.isnan().all() for each in step[7:11])


WRONG = {
    "chunks of none": ({"chunk": 0}, "a chunk has at least one token"),
    "another local": ({"local": "both"}, "near tokens are read as one of"),
    "another style of rotation": ({"rope_style": "thirds"}, "channels are paired in one of"),
    "a negative window": ({"window": -1}, "are numbers of tokens"),
}


@pytest.mark.parametrize(("change", "message"), WRONG.values(), ids=WRONG)
def test_attributes_that_are_none_are_the_body_s_error(change, message):
    case = Case(tokens=5)
    with pytest.raises(ValueError, match=message):
        kernels.rat_attention(*case.operands, **case.options | change)


UNFIT = {
    "values of fewer tokens": lambda given_: [*given_[:2], given_[2][:, :, :4], *given_[3:]],
    "gates of fewer tokens": lambda given_: [*given_[:3], given_[3][:, :, :4], *given_[4:]],
    "queries of another depth": lambda given_: [given_[0][..., :32], *given_[1:]],
    "heads that cannot share": lambda given_: [given_[0][:, :5], *given_[1:]],
    "cos of fewer tokens": lambda given_: [*given_[:5], *(x[:, :2] for x in given_[5:])],
    "cos alone": lambda given_: [*given_[:6], None],
    "an odd number of turned channels": lambda given_: [*given_[:5], *(x[..., :3] for x in given_[5:])],
}


@pytest.mark.parametrize("change", UNFIT.values(), ids=UNFIT)
def test_sizes_that_do_not_fit_are_the_body_s_error_and_no_other_memory_s_numbers(change):
    case = Case(tokens=5)
    with pytest.raises((RuntimeError, ValueError)):
        kernels.rat_attention(*change(case.operands), **case.options)


def test_caches_of_too_few_slots_are_the_body_s_error():
    case = Case(tokens=5, window=30)
    short = [each[:, :, :20] for each in case.caches()[:2]]
    with pytest.raises(ValueError, match="20 slots are too few for 0 sinks and a ring of 31"):
        kernels.step_in_place(*arguments(case, ([0, 0], [5, 5], 5), [*short, *case.caches()[2:]]), **case.options)


# --- without a kernel ------------------------------------------------------------------------------------------------------


def test_without_a_compiler_the_body_runs_and_the_caches_are_written_where_they_lie(monkeypatch):
    monkeypatch.setattr(kernels, "library", lambda: None)
    case = Case(tokens=20)
    assert torch.equal(kernels.rat_attention(*case.operands, **case.options), attention(*case.operands, **case.options))
    step = arguments(case, ([0, 0], [20, 11], 20), case.caches())
    expected = cached(*step, **case.options)
    y, *caches = kernels.step_in_place(*step, **case.options)
    assert all(cache is given_ for cache, given_ in zip(caches, step[7:11], strict=True))
    torch.testing.assert_close((y, *caches), expected, rtol=0, atol=0, equal_nan=True)


def test_float64_is_left_to_the_body():
    case = Case(torch.float64, tokens=20)
    assert torch.equal(kernels.rat_attention(*case.operands, **case.options), attention(*case.operands, **case.options))


def test_no_rows_have_no_result():
    case = Case(tokens=5)
    operands = [x[:0] if n < 4 else x for n, x in enumerate(case.operands)]
    assert kernels.rat_attention(*operands, **case.options).shape == (0, 6, 5, 64)
    caches, none = [torch.ones_like(each) for each in case.caches()], torch.zeros(0, dtype=torch.int64)
    y, *new = kernels.step_in_place(*operands, *caches, none, none, None, **case.options)
    assert y.shape == (0, 6, 5, 64) and all((each == 1).all() for each in new)


# --- in a program ----------------------------------------------------------------------------------------------------------

TEXT = """graphwright 1
function main {{
  takes ((*, *, *, *, *, *, *, *, *), {{}})
  gives {gives}
  input %q : f32[2, 6, 3, 64]
  input %k : f32[2, 2, 3, 64]
  input %v : f32[2, 2, 3, 64]
  input %position : i64[2]
  input %rows : i64[2]
  input %slots_k : f32[4, 2, 9, 64]
  input %slots_v : f32[4, 2, 9, 64]
  input %state_k : f32[4, 2, 64]
  input %state_v : f32[4, 2, 64]
  %g = aten.exp.default(%k)
  %n = gw.rat_cached_attention.default(%q, %k, %v, %g, none, none, none, %slots_k, %slots_v, %state_k, %state_v, %position, %rows, none, chunk=4, scale=0.125)
  %y = getitem(%n, 0)
  %a = getitem(%n, 1)
  %b = getitem(%n, 2)
  %c = getitem(%n, 3)
  %d = getitem(%n, 4)
  {after}
  return {leaves} state "input:slots_k" = {new}, "input:slots_v" = %b, "input:state_k" = %c, "input:state_v" = %d
}}
"""


def program_of(after="%z = aten.exp.default(%y)", leaves="%z", gives="*", new="%a"):
    return gw.parse(TEXT.format(after=after, leaves=leaves, gives=gives, new=new))


def operands():
    draw = torch.Generator().manual_seed(0)
    shapes = ((2, 6, 3, 64), (2, 2, 3, 64), (2, 2, 3, 64))
    caches = [torch.randn(shape, generator=draw) for shape in ((4, 2, 9, 64), (4, 2, 9, 64), (4, 2, 64), (4, 2, 64))]
    return [*(torch.randn(shape, generator=draw) for shape in shapes), torch.tensor([21, 0]), torch.tensor([1, 3]), *caches]


@pytest.mark.parametrize("backend", BACKENDS)
def test_caches_that_are_given_up_are_written_where_they_lie(backend):
    program, given_ = program_of(), operands()
    expected, states = reference_run(program, operands())
    leaves, new = Executor(program, backend=backend)(list(given_))
    assert all(value is cache for value, cache in zip(new.values(), given_[5:], strict=True))
    torch.testing.assert_close(leaves, expected)
    torch.testing.assert_close(given_[5:], list(states.values()))


KEPT = {
    "an old cache is read": {"after": "%z = aten.sum.default(%slots_k)"},
    "an old cache is returned": {"leaves": "%y, %state_v", "gives": "(*, *)"},
    "a new value is another": {"after": "%z = aten.neg.default(%a)", "new": "%z"},
}


@pytest.mark.parametrize("change", KEPT.values(), ids=KEPT)
@pytest.mark.parametrize("backend", BACKENDS)
def test_caches_that_somebody_reads_stay(backend, change):
    program, given_ = program_of(**change), operands()
    assert not plan_appends(program.main.graph)
    expected, states = reference_run(program, operands())
    leaves, new = Executor(program, backend=backend)(list(given_))
    torch.testing.assert_close(given_, operands(), rtol=0, atol=0)
    torch.testing.assert_close(leaves, expected)
    torch.testing.assert_close(new, states)


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (subprocess.TimeoutExpired(["g++", "-O3"], 120), "it was still at it after 120 s and was stopped"),
        (subprocess.CalledProcessError(1, ["g++", "-O3"], stderr=""), "it ended with code 1 and said nothing"),
        (subprocess.CalledProcessError(1, ["g++", "-O3"], stderr="no such header"), "no such header"),
        (OSError("no memory"), "no memory"),
    ],
)
def test_a_compiler_that_fails_is_told_by_its_reason_and_not_by_the_command(error, reason, monkeypatch, caplog):
    def fails(*args, **kwargs):
        raise error

    monkeypatch.setattr(native.subprocess, "run", fails)
    monkeypatch.setattr(native, "compiler", lambda: "g++")
    folder = Path(native.__file__).parent.parent / "rat" / "native"
    make = native.NativeLibrary(folder, "gw.rat_attention", "computes a score for each two tokens", lambda opened: None)
    assert make(None, (("-fopenmp",),)) is None
    assert [record.getMessage() for record in caplog.records] == [f"g++ does not compile the kernel of gw.rat_attention: {reason}"]
