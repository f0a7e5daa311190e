"""The chunked recurrence in Triton's interpreter, against the operators' bodies in float64; its place in a program."""

from dataclasses import replace

import pytest
import torch

from graphwright.codegen.triton.rat import launch
from graphwright.ir.run import run
from graphwright.runtime.executor import Executor
from graphwright.tests.rat_cases import DTYPES, ODD, Case, attention, cached, double
from graphwright.tests.test_rat_cpu import OUTSIDE, UNFIT, arguments, operands, program_of

pytestmark = [pytest.mark.filterwarnings("ignore::RuntimeWarning"), pytest.mark.usefixtures("one_thread")]
SHORT = {name: case for name, case in ODD.items() if case.tokens < 100}


def assert_close(y, exact, bound, dtype):
    """Within 24 float32 eps of the absolute terms (rat_cases.py), and in half precision the rounding of states, queries, weights and the
    result: scores are sums of terms up to 6, and the interpreter rounds bfloat16 towards zero, which is twice its eps."""
    assert y.dtype == dtype and y.shape == exact.shape
    rounding = 0.0 if dtype == torch.float32 else 8 * torch.finfo(dtype).eps
    assert ((y.double() - exact).abs() <= (24 * torch.finfo(torch.float32).eps + rounding) * (bound + exact.abs())).all()


@pytest.mark.parametrize("case", SHORT.values(), ids=SHORT)
def test_attention_is_that_of_the_body(case):
    y = launch.rat_attention(*case.operands, **case.options)
    assert y.transpose(1, 2).is_contiguous()
    assert_close(y, *case.exact(), case.dtype)


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
@pytest.mark.parametrize("local", ["state", "raw"])
def test_attention_in_half_precision_is_that_of_the_body(dtype, local):
    case = Case(dtype, tokens=23, chunk=4, window=5, sinks=3, local=local, depth=32, kv_heads=1)
    assert_close(launch.rat_attention(*case.operands, **case.options), *case.exact(), dtype)


STEPS = [([0, 0], [11, 3], 11), ([11, 3], [1, 1], 1), ([12, 4], [0, 1], 1), ([12, 5], [5, 0], 6), ([17, 5], [1, 1], 1)]


@pytest.mark.parametrize("splits", [1, 3])
@pytest.mark.parametrize("local", ["state", "raw"])
@pytest.mark.parametrize(("window", "sinks", "reset"), [(0, 0, True), (5, 3, False), (5, 7, True)])
def test_steps_give_what_the_body_gives_and_keep_what_it_keeps(monkeypatch, splits, local, window, sinks, reset):
    monkeypatch.setattr(launch, "splits_of", lambda *sizes: splits)
    case = Case(
        tokens=24, chunk=4, window=window, sinks=sinks, local=local, depth=16, turned=8, reset=reset, rope_style="interleaved", kv_heads=1
    )  # fmt: skip
    caches = case.caches(capacity=16)
    for step in STEPS:
        given = arguments(case, step, caches)
        wide = list(map(double, given))
        expected = cached(*wide, **case.options)
        terms = cached(*wide[:2], wide[2].abs(), *wide[3:8], wide[8].abs(), wide[9], wide[10].abs(), *wide[11:], **case.options)[0]
        y, *caches = launch.step_in_place(*given, **case.options)
        assert all(cache is old for cache, old in zip(caches, given[7:11], strict=True))
        for b, count in enumerate(step[1]):
            assert_close(y[b, :, :count], expected[0][b, :, :count], terms[b, :, :count], case.dtype)
        for cache, kept in zip(caches, expected[1:], strict=True):  # numbers of about 1, turned
            torch.testing.assert_close(cache.double(), kept, rtol=1e-6, atol=2e-6, equal_nan=True)


def test_without_lengths_all_tokens_are_real():
    case = Case(tokens=6, chunk=4, depth=16, turned=8, kv_heads=1, bias=None)
    for tokens in (6, 1):
        given = arguments(case, ([0, 0], [tokens, tokens], tokens), case.caches())
        given[13] = None
        expected = cached(*map(double, given), **case.options)
        for got, wanted in zip(launch.step_in_place(*given, **case.options), expected, strict=True):
            torch.testing.assert_close(got.double(), wanted, rtol=1e-5, atol=1e-5, equal_nan=True)


@pytest.mark.parametrize("tokens", [1, 5])
@pytest.mark.parametrize("name", ["a row behind the last", "a negative row", "a negative position"])
def test_what_lies_outside_of_the_caches_is_neither_read_nor_written(name, tokens):
    case = Case(tokens=5, depth=16, turned=8, kv_heads=1, chunk=4)
    step = arguments(case, ([0, 0], [tokens] * 2, tokens), [torch.ones_like(each) for each in case.caches()])
    place, values = OUTSIDE[name]
    step[place] = torch.tensor(values)
    is_inside = [0 <= int(row) < 4 and int(position) >= 0 for row, position in zip(step[12], step[11], strict=True)]
    y = launch.step_in_place(*step, **case.options)[0]
    for b, inside in enumerate(is_inside):
        assert y[b].isfinite().all() if inside else y[b].isnan().all()
    touched = {int(row) for row, inside in zip(step[12], is_inside, strict=True) if inside}
    assert all((each[row] == 1).all() for each in step[7:11] for row in range(4) if row not in touched)


@pytest.mark.parametrize("change", UNFIT.values(), ids=UNFIT)
def test_sizes_that_do_not_fit_are_the_body_s_error_and_no_other_memory_s_numbers(change):
    case = Case(tokens=5)
    with pytest.raises((RuntimeError, ValueError)):
        launch.rat_attention(*change(case.operands), **case.options)


@pytest.mark.parametrize(("dtype", "depth"), [(torch.float64, 64), (torch.float32, 300)], ids=str)
def test_what_the_kernels_have_no_form_for_is_left_to_the_body(dtype, depth):
    case = replace(ODD["five tokens"], dtype=dtype, depth=depth)
    assert torch.equal(launch.rat_attention(*case.operands, **case.options), attention(*case.operands, **case.options))
    step = arguments(case, ([0, 0], [5, 2], 5), case.caches())
    expected = cached(*step, **case.options)
    y, *caches = launch.step_in_place(*step, **case.options)
    assert all(cache is old for cache, old in zip(caches, step[7:11], strict=True))
    torch.testing.assert_close([y, *caches], list(expected), rtol=0, atol=0, equal_nan=True)


def test_a_program_attends_by_the_kernels_and_writes_where_its_caches_lie():
    program, given = program_of(), operands()
    expected, states = run(program, operands())
    executor = Executor(program, backend="triton_interpreter")
    assert launch.step_in_place in {node.target for node in executor._lowered.nodes}
    leaves, new = executor(list(given))
    assert all(value is cache for value, cache in zip(new.values(), given[5:], strict=True))
    torch.testing.assert_close(leaves, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(new, states, rtol=1e-5, atol=1e-5)
