"""Attention over caches and appends in Triton's interpreter, against the operators' bodies in float64; their place in a program."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from graphwright.codegen.triton.attention import launch
from graphwright.codegen.triton.attention.launch import splits_of, tile_of
from graphwright.codegen.triton.targets import DEFAULT
from graphwright.ir.run import run
from graphwright.runtime.executor import Executor
from graphwright.tests.test_kv_cache_cpu import UNFIT, Step, append, operands, program_of

pytestmark = [pytest.mark.filterwarnings("ignore::RuntimeWarning"), pytest.mark.usefixtures("one_thread")]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def assert_close(step, y):
    """Within 16 float32 eps of the absolute terms, as scores are sums of 64 terms up to 6, and the rounding of weights and of the result to
    the values' type, twice that for bfloat16, which the interpreter rounds towards zero."""
    exact, bound = step.exact()
    assert y.dtype == step.dtype and y.shape == exact.shape and y.transpose(1, 2).is_contiguous()
    rounding = 0.0 if step.dtype == torch.float32 else 2 * torch.finfo(step.dtype).eps
    tiny = 2.0**-24 if step.dtype == torch.float16 else 0.0  # the distance of subnormal float16
    assert ((y.double() - exact).abs() <= (16 * torch.finfo(torch.float32).eps + rounding) * (bound + exact.abs()) + tiny).all()


@pytest.fixture(params=[1, 3])
def splits(request, monkeypatch):
    """How many programs share the slots of a row."""
    monkeypatch.setattr(launch, "splits_of", lambda *sizes: request.param)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("window", "softcap"), [(0, 0.0), (5, 0.0), (120, 3.0)])
@pytest.mark.parametrize("queries", [1, 5, 23])
def test_attention_is_that_of_the_body(splits, dtype, queries, window, softcap):
    step = Step(dtype, queries=queries, window=window, softcap=softcap)
    assert_close(step, step.attend(launch.cached_attention))


@settings(max_examples=12, deadline=None)
@given(
    depth=st.integers(1, 130),
    width=st.integers(1, 130),
    group=st.sampled_from([1, 2, 7, 20]),
    queries=st.integers(1, 40),
    position=st.integers(0, 200),
    rows=st.permutations([0, 1, 2, 3]),
)
def test_attention_is_that_of_the_body_whatever_the_sizes(depth, width, group, queries, position, rows):
    step = Step(
        depth=depth, width=width, group=group, queries=queries, positions=(position, 3), rows=tuple(rows[:2]), capacity=position + queries + 9
    )  # fmt: skip
    assert_close(step, step.attend(launch.cached_attention))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("queries", [1, 5, 40])
def test_an_append_is_that_of_the_body_bit_for_bit(dtype, queries):
    step = Step(dtype, queries=queries, depth=33, width=64)
    caches = step.cache_k.clone(), step.cache_v.clone()
    new = launch.append_in_place(*caches, step.k, step.v, step.position, step.row)
    assert all(a is b for a, b in zip(new, caches, strict=True))
    expected = append(step.cache_k, step.cache_v, step.k, step.v, step.position, step.row)
    for got, wanted in zip(new, expected, strict=True):
        torch.testing.assert_close(got, wanted, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize(
    "change", [{"rows": torch.tensor([9, 0, -1])}, {"position": torch.tensor([2**40, 0, -400])}], ids=["rows", "positions"]
)
def test_what_lies_outside_of_the_cache_is_neither_read_nor_written(change):
    step = Step(queries=4)
    told = {"position": step.position, "rows": step.row} | change
    expected = step.attend(launch.cached_attention)
    y = step.attend(launch.cached_attention, **change)
    assert torch.equal(y[1], expected[1])
    assert "rows" not in change or (y[0].isnan().all() and y[2].isnan().all())
    caches = step.cache_k.clone(), step.cache_v.clone()
    launch.append_in_place(*caches, step.k, step.v, **told)
    for cache, before, new in ((caches[0], step.cache_k, step.k), (caches[1], step.cache_v, step.v)):
        assert torch.equal(cache[0, :, :4], new[1])
        torch.testing.assert_close(cache[1:], before[1:], rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_what_the_kernels_have_no_form_for_is_left_to_aten(dtype):
    step = Step(dtype, queries=3, depth=300 if dtype == torch.float32 else 64)
    assert torch.equal(step.attend(launch.cached_attention), step.attend(torch.ops.gw.cached_attention.default))
    caches = [torch.zeros_like(each.mT.contiguous().mT) for each in (step.cache_k, step.cache_v)]
    launch.append_in_place(*caches, step.k, step.v, step.position, step.row)
    assert torch.equal(caches[0], append(*map(torch.zeros_like, caches), step.k, step.v, step.position, step.row)[0])


@pytest.mark.parametrize("change", UNFIT.values(), ids=UNFIT)
def test_sizes_that_do_not_fit_are_the_body_s_error_and_no_other_memory_s_numbers(change):
    step = Step(queries=4)
    with pytest.raises((RuntimeError, IndexError)):
        step.attend(launch.cached_attention, **change(step))


def test_an_append_of_fewer_rows_than_places_is_an_error():
    step = Step(queries=4)
    with pytest.raises((RuntimeError, IndexError), match="shape mismatch"):
        launch.append_in_place(step.cache_k, step.cache_v, step.k, step.v[:2], step.position, step.row)


def test_one_row_of_a_long_cache_is_split_until_the_gpu_is_full():
    tile = tile_of(1, 3, 64, 64, 2, DEFAULT)
    assert tile.q == 16
    assert splits_of(4, 32768, tile, DEFAULT) == 64
    assert splits_of(4, 512, tile, DEFAULT) == 2
    assert splits_of(4 * DEFAULT.multiprocessors, 32768, tile, DEFAULT) == 1


def test_a_program_attends_by_the_kernel_and_writes_where_its_caches_lie():
    program, given = program_of(), operands()
    expected, states = run(program, operands())
    executor = Executor(program, backend="triton_interpreter")
    assert {launch.cached_attention, launch.append_in_place} <= {node.target for node in executor._lowered.nodes}
    leaves, new = executor(list(given))
    assert new["input:cache_k"] is given[5] and new["input:cache_v"] is given[6]
    torch.testing.assert_close(leaves, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(new, states, rtol=1e-5, atol=1e-5)
