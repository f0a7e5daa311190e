"""Caches of attention with a window as rings: the last positions alone are kept, and nothing of a result changes."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

import graphwright as gw
from graphwright.codegen.attention import cached
from graphwright.codegen.triton.attention import launch
from graphwright.ir import caches as caches_module
from graphwright.ir.errors import InputError
from graphwright.runtime.backend import has_cpp_compiler
from graphwright.runtime.decoding.caches import Caches, CacheType
from graphwright.tests.decoding_models import poisoned_caches  # noqa: F401  (pytest finds it here)
from graphwright.tests.test_kv_cache_cpu import Step, append, attention

needs_compiler = pytest.mark.skipif(not has_cpp_compiler(), reason="no C++ compiler: install g++")
VOCABULARY = 24
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


# --- the operators ---------------------------------------------------------------------------------------------------------


@given(data=st.data())
@settings(max_examples=60, deadline=None)
def test_steps_on_a_ring_are_those_on_a_cache_of_all_positions(data: Any) -> None:
    """Steps of up to `most` tokens, of which a row keeps any number, as of padding and refused drafts; slots never written are NaN."""
    window, most = data.draw(st.integers(1, 9)), data.draw(st.integers(1, 6))
    slots = window + most - 1 + data.draw(st.integers(0, 3))
    rings = [torch.full((3, 2, slots, 4), torch.nan, dtype=torch.float64) for _ in range(2)]
    wholes = [torch.full((3, 2, 80, 4), torch.nan, dtype=torch.float64) for _ in range(2)]
    position, rows = torch.zeros(2, dtype=torch.int64), torch.tensor([2, 0])
    options = {"scale": 0.5, "window": window}
    for seed in range(data.draw(st.integers(1, 10))):
        count = data.draw(st.integers(1, most))
        q, k, v = (normal(2, heads, count, 4, seed=3 * seed + n) for n, heads in enumerate((4, 2, 2)))
        rings = list(append(*rings, k, v, position, rows, ring=True))
        wholes = list(append(*wholes, k, v, position, rows))
        got = attention(q, *rings, position, rows, ring=True, **options)
        # The same numbers, summed in the order of slots.
        torch.testing.assert_close(got, attention(q, *wholes, position, rows, **options), rtol=1e-12, atol=1e-12)
        position = position + torch.tensor([data.draw(st.integers(1, count)) for _ in range(2)])


def test_a_ring_needs_a_window() -> None:
    step = Step()
    for function in (attention, cached.cached_attention):
        with pytest.raises(ValueError, match="a window is a number of slots, or 0 for all, which no ring has"):
            function(step.q, step.cache_k, step.cache_v, step.position, step.row, scale=1.0, ring=True)


def ring_of(step: Step, slots: int) -> list[torch.Tensor]:
    """The caches of `step` with their last positions alone; what lies in no slot of theirs is NaN."""
    rings = []
    for cache in (step.cache_k, step.cache_v):
        ring = torch.full((*cache.shape[:2], slots, cache.size(3)), torch.nan, dtype=cache.dtype)
        for row, position in zip(step.rows, step.positions, strict=True):
            end = position + step.queries
            held = torch.arange(max(0, end - slots), end)
            ring[row, :, held % slots] = cache[row, :, held]
        rings.append(ring)
    return rings


@needs_compiler
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("window", "queries", "slots"), [(5, 1, 64), (60, 5, 64), (130, 17, 192), (100, 40, 256)])
def test_the_kernel_of_cpus_gives_the_same_bits_on_a_ring(
    monkeypatch: Any, dtype: torch.dtype, window: int, queries: int, slots: int
) -> None:
    monkeypatch.setattr(cached, "reference", None)  # is not what is tested
    step = Step(dtype, queries=queries, window=window)
    keys, values = ring_of(step, slots)
    got = cached.cached_attention(step.q, keys, values, step.position, step.row, ring=True, **step.options)
    assert torch.equal(got, step.attend())


@pytest.mark.parametrize("compiles", [pytest.param(True, marks=needs_compiler), False], ids=["kernel", "no compiler"])
def test_rings_that_are_no_whole_blocks_and_machines_without_a_compiler_are_left_to_the_body(monkeypatch: Any, compiles: bool) -> None:
    if not compiles:
        monkeypatch.setattr(cached, "library", lambda: None)
    step = Step(queries=3, window=9)
    keys, values = ring_of(step, 11)
    got = cached.cached_attention(step.q, keys, values, step.position, step.row, ring=True, **step.options)
    torch.testing.assert_close(got, step.attend(attention), rtol=1e-5, atol=1e-5)  # float32 in another order of sums


@needs_compiler
def test_a_ring_as_large_as_all_positions_needs_no_whole_blocks(monkeypatch: Any) -> None:
    monkeypatch.setattr(cached, "reference", None)
    step = Step(queries=4, window=70, capacity=305)
    got = cached.cached_attention(step.q, step.cache_k, step.cache_v, step.position, step.row, ring=True, **step.options)
    assert torch.equal(got, step.attend())


@pytest.mark.parametrize("function", [cached.append_in_place, launch.append_in_place], ids=["cpu", "triton"])
@pytest.mark.parametrize("queries", [1, 5, 40])
@pytest.mark.usefixtures("one_thread")
def test_an_append_to_a_ring_is_that_of_the_body_bit_for_bit(function: Any, queries: int) -> None:
    step = Step(queries=queries, window=5)
    rings = ring_of(step, 44)
    expected = append(*rings, step.k, step.v, step.position, step.row, ring=True)
    for got, wanted in zip(
        function(*(each.clone() for each in rings), step.k, step.v, step.position, step.row, ring=True), expected, strict=True
    ):
        torch.testing.assert_close(got, wanted, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("splits", [1, 3])
@pytest.mark.parametrize(("window", "queries", "slots"), [(5, 1, 70), (60, 5, 64), (100, 23, 130)])
@pytest.mark.usefixtures("one_thread")
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_the_triton_kernel_gives_the_same_on_a_ring(monkeypatch: Any, splits: int, window: int, queries: int, slots: int) -> None:
    monkeypatch.setattr(launch, "splits_of", lambda *sizes: splits)
    step = Step(queries=queries, window=window)
    keys, values = ring_of(step, slots)
    got = launch.cached_attention(step.q, keys, values, step.position, step.row, ring=True, **step.options)
    assert torch.equal(got, step.attend(launch.cached_attention))


def test_a_ring_that_a_block_would_go_around_more_than_once_is_left_to_the_body_on_gpus() -> None:
    step = Step(window=5)
    operands = (step.q, *ring_of(step, 5), step.position, step.row)
    assert torch.equal(launch.cached_attention(*operands, ring=True, **step.options), attention(*operands, ring=True, **step.options))


@pytest.mark.parametrize("compiles", [pytest.param(True, marks=needs_compiler), False], ids=["kernel", "no compiler"])
def test_a_ring_that_is_too_small_for_a_step_is_an_error(monkeypatch: Any, compiles: bool) -> None:
    if not compiles:
        monkeypatch.setattr(cached, "library", lambda: None)
    step = Step(queries=3, window=63)
    keys, values = ring_of(step, 64)
    with pytest.raises(IndexError, match="lies outside of a cache of 4 rows and 64 slots"):
        cached.cached_attention(step.q, keys, values, step.position, step.row, ring=True, **step.options)


# --- decoders --------------------------------------------------------------------------------------------------------------


def test_a_layer_with_a_window_keeps_what_a_step_can_see() -> None:
    whole = CacheType(0, 2, 4, torch.float32, torch.device("cpu"))
    ring = replace(whole, layer=1, window=100)
    caches = Caches([whole, ring], rows=1, capacity=1000, most_tokens=20)
    assert [each.size(2) for each in caches.tensors] == [1000, 128]  # 100 + 20 - 1, in blocks of 64
    assert Caches([ring], rows=1, capacity=90, most_tokens=20).tensors[0].size(2) == 90
    with pytest.raises(InputError, match=r"caches of 1 rows x 9223372036854775807 positions take \d+"):
        Caches([whole, ring], rows=1, capacity=2**63 - 1)


class Windows(nn.Module):
    """Three layers, the first and the last with windows of 4."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.places, self.head = nn.Embedding(VOCABULARY, 8), nn.Embedding(40, 8), nn.Linear(8, VOCABULARY)
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(3))

    def forward(self, input_ids: torch.Tensor, position_ids: torch.Tensor) -> torch.Tensor:
        x, at = self.table(input_ids) + self.places(position_ids), torch.arange(input_ids.size(1))
        causal = at <= at.unsqueeze(1)
        for number, layer in enumerate(self.layers):
            q = layer(F.layer_norm(x, (8,))).unsqueeze(1)
            mask = causal if number == 1 else causal & (at > at.unsqueeze(1) - 4)
            x = x + F.scaled_dot_product_attention(q, q, q, attn_mask=mask).squeeze(1)
        return self.head(x)


@pytest.fixture(scope="module")
def models() -> dict[bool, gw.CompiledModel]:
    """Plainly, and with drafts."""
    torch.manual_seed(0)
    plain = gw.compile_decoder(Windows().double().eval(), backend="aten", cache=False)
    drafts = "layer-skip{mode=speculative,draft=[0,2],gamma=2,reuse_prefix=true}"
    return {False: plain, True: gw.compile(plain, drafts, backend="aten", cache=False)}


@given(
    st.lists(st.integers(1, 12), min_size=1, max_size=3),
    st.integers(1, 16),
    st.none() | st.integers(1, 5),
    st.booleans(),
    st.integers(0, 9),
)
@settings(max_examples=25, deadline=None)
def test_tokens_are_those_of_caches_of_all_positions(
    models: Any, lengths: list[int], new: int, chunk: int | None, drafts: bool, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    prompts = [torch.randint(0, VOCABULARY, (length,), generator=generator).tolist() for length in lengths]
    made = []
    for block in (1, 10**6):  # rings go around after a few tokens, or never
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(caches_module, "RING_BLOCK", block)
            made.append(models[drafts].generate(prompts, new, chunk=chunk, batch=2, speculative=drafts).tokens)
    assert made[0] == made[1]


def test_a_decoder_s_text_says_which_caches_are_rings(models: Any) -> None:
    text = str(models[False].program)
    assert "input %cache_k_0 : f64[cache_rows, 1, slots_4, 8]" in text and "input %cache_k_1 : f64[cache_rows, 1, capacity, 8]" in text
    assert text.count("window=4") == text.count("window=4, ring=") > 0
    assert str(gw.parse(text)) == text
    assert {each.layer: each.window for each in models[False]._present.decoder.cache_types} == {0: 4, 1: 0, 2: 4}
    assert "rings of caches for windows of 4" in str(models[False].report())
