"""`gw.rat_attention` and `gw.rat_cached_attention`: equal to the loop over tokens that defines them, whole and in any parts, causal to the
bit, and plain attention where specs/rat.md says so."""

import math
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.export import Dim, export
from torch.nn import functional as F

import graphwright.ir.ops  # noqa: F401

ops = torch.ops.gw
CLOSED = -40.0  # a gate's logit at which 1 - g is 1
E = 6


# --- the definition, token by token ---------------------------------------------------------------------------------------------


def turned(x: torch.Tensor, cos: torch.Tensor | None, sin: torch.Tensor | None, style: str) -> torch.Tensor:
    """x [.., E] by cos and sin [.., dr] of its time."""
    if cos is None:
        return x
    dr = cos.size(-1)
    pairs = [(i, i + dr // 2) for i in range(dr // 2)] if style == "half" else [(2 * i, 2 * i + 1) for i in range(dr // 2)]
    y = x.clone()
    for a, b in pairs:
        y[..., a] = x[..., a] * cos[..., a] - x[..., b] * sin[..., a]
        y[..., b] = x[..., b] * cos[..., b] + x[..., a] * sin[..., b]
    return y


def loop(
    q, k, v, gate, chunk_bias, cos, sin, *, chunk, scale, window=0, sinks=0, local="state", reset=True, rope_style="half", summary_bias=0.0
):
    """specs/rat.md, section 2: [B, H, T, E], one time after another, in the dtype of its operands."""
    tokens, shared = q.size(2), q.size(1) // k.size(1)

    def at(t, x):
        row = [None if each is None else each[:, t].unsqueeze(1) for each in (cos, sin)]
        return turned(x, *row, rope_style)

    ks, vs, kr, vr, out = [], [], [], [], []
    for t in range(tokens):
        logits = gate[:, :, t] if chunk_bias is None else gate[:, :, t] + chunk_bias[t % chunk]
        g = logits.sigmoid()
        if t == 0 or (reset and t % chunk == 0):
            sk = sv = torch.zeros_like(g)
        sk, sv = g * sk + (1 - g) * k[:, :, t], g * sv + (1 - g) * v[:, :, t]
        ks, vs, kr, vr = [*ks, at(t, sk)], [*vs, sv], [*kr, at(t, k[:, :, t])], [*vr, v[:, :, t]]
    near_k, near_v = (ks, vs) if local == "state" else (kr, vr)
    for t in range(tokens):
        chunks = max(0, (t - window) // chunk)
        low = max(sinks, t - window) if local == "state" else max(sinks, chunks * chunk)
        far = [end for c in range(chunks) if (end := c * chunk + chunk - 1) >= sinks]
        near = [*range(min(sinks, t + 1)), *range(low, t + 1)]
        keys = torch.stack([ks[j] for j in far] + [near_k[j] for j in near], 2).repeat_interleave(shared, 1)
        values = torch.stack([vs[j] for j in far] + [near_v[j] for j in near], 2).repeat_interleave(shared, 1)
        scores = (keys @ at(t, q[:, :, t]).unsqueeze(-1)).squeeze(-1) * scale
        scores[..., : len(far)] += summary_bias
        out.append((scores.softmax(-1).unsqueeze(2) @ values).squeeze(2))
    return torch.stack(out, 2)


@dataclass
class Case:
    """Operands over a whole sequence, and attributes."""

    operands: list[torch.Tensor | None]
    attributes: dict[str, Any]
    cached: dict[str, Any] = field(default_factory=dict)

    def to(self, dtype: torch.dtype) -> "Case":
        return Case([None if each is None else each.to(dtype) for each in self.operands], self.attributes)

    def __call__(self) -> torch.Tensor:
        return ops.rat_attention(*self.operands, **self.attributes)

    def loop(self) -> torch.Tensor:
        return loop(*self.operands, **self.attributes)


def case(tokens: int, chunk: int, *, batch=2, kv_heads=2, shared=2, rope: int | None = 4, bias=True, rows=1, seed=0, **attributes) -> Case:
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    q, kvg = draw(batch, kv_heads * shared, tokens, E), [draw(batch, kv_heads, tokens, E) for _ in range(3)]
    angles = None if rope is None else draw(rows, tokens, rope)
    tables = [None, None] if angles is None else [angles.cos(), angles.sin()]
    return Case([q, *kvg, draw(chunk, 1, 1) if bias else None, *tables], {"chunk": chunk, "scale": 0.4, **attributes})


@st.composite
def cases(draw, longest=200) -> Case:
    tokens = draw(st.integers(1, longest))
    return case(
        tokens,
        draw(st.integers(1, tokens)),
        shared=draw(st.sampled_from([1, 3])),
        rope=draw(st.sampled_from([None, 2, 6])),
        bias=draw(st.booleans()),
        rows=draw(st.sampled_from([1, 2])),
        window=draw(st.integers(0, tokens + 2)),
        sinks=draw(st.integers(0, min(tokens + 2, 20))),
        local=draw(st.sampled_from(["state", "raw"])),
        reset=draw(st.booleans()),
        rope_style=draw(st.sampled_from(["half", "interleaved"])),
        summary_bias=draw(st.sampled_from([0.0, 0.7])),
        seed=tokens,
    )


def off(got: torch.Tensor, expected: torch.Tensor) -> float:
    difference = float((got.double() - expected).abs().max())
    return difference if difference == difference else math.inf


# --- whole, and in parts --------------------------------------------------------------------------------------------------------


@given(each=cases())
@settings(max_examples=40, deadline=None)
def test_of_any_length_and_chunk_the_operation_is_the_loop(each: Case) -> None:
    expected = each.loop()
    assert off(each(), expected) <= 1e-12
    # float32: rounding of sums of up to 200 numbers of the order of one
    assert off(each.to(torch.float32)(), expected) <= 1e-5


class Parts:
    """A case computed a few tokens of each row at a time, over caches that hold NaN where nothing was written."""

    def __init__(self, each: Case, rows: list[int], cache_rows: int, dtype: torch.dtype = torch.float64):
        self.case, self.rows, self.dtype = each.to(dtype), torch.tensor(rows), dtype
        k, attributes = self.case.operands[1], each.attributes
        ring = attributes.get("window", 0) + (1 if attributes.get("local", "state") == "state" else attributes["chunk"])
        self.summaries = -(-k.size(2) // attributes["chunk"])
        slots = attributes.get("sinks", 0) + self.summaries + ring
        kv = (cache_rows, k.size(1), slots, E), (cache_rows, k.size(1), E)
        self.caches = [torch.full(shape, torch.nan, dtype=dtype) for shape in (kv[0], kv[0], kv[1], kv[1])]
        self.done = [0] * len(rows)

    def __call__(self, counts: list[int], padding: int = 0, junk: float = 7.0) -> list[torch.Tensor]:
        """The outputs of `counts[b]` more tokens of each row, all rows padded to one length with `junk`."""
        length = max(counts) + padding

        def part(x: torch.Tensor, dim: int) -> torch.Tensor:
            x = x.expand(len(counts), *x.shape[1:]).movedim(dim, 1)
            taken = torch.full((len(counts), length, *x.shape[2:]), junk, dtype=x.dtype)
            for b, count in enumerate(counts):
                taken[b, :count] = x[b, self.done[b] : self.done[b] + count]
            return taken.movedim(1, dim)

        *tensors, bias, cos, sin = self.case.operands
        tables = [None if each is None else part(each, 1) for each in (cos, sin)]
        start, lengths = torch.tensor(self.done), torch.tensor(counts)
        operands = [*(part(each, 2) for each in tensors), bias, *tables, *self.caches, start, self.rows, lengths]
        out, *self.caches = ops.rat_cached_attention(*operands, **self.case.attributes)
        self.done = [before + count for before, count in zip(self.done, counts)]
        return [out[b, :, :count] for b, count in enumerate(counts)]


@given(each=cases(longest=40), data=st.data())
@settings(max_examples=60, deadline=None)
def test_rows_in_any_parts_over_caches_are_the_whole(each: Case, data: Any) -> None:
    tokens, expected = each.operands[0].size(2), each.loop()
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 1e-5)):
        parts = Parts(each, [3, 1], 5, dtype)
        while min(parts.done) < tokens:
            left = [tokens - done for done in parts.done]
            counts = [data.draw(st.integers(0, most)) for most in left]
            if not any(counts):
                counts = left
            before = parts.done
            for b, out in enumerate(parts(counts, padding=data.draw(st.integers(0, 2)))):
                if counts[b]:
                    assert off(out, expected[b, :, before[b] : before[b] + counts[b]]) <= tolerance


@pytest.mark.parametrize("chunk", [1, 4, 5, 13, 20])
def test_a_prompt_of_any_length_then_token_by_token_is_the_whole(chunk: int) -> None:
    each = case(13, chunk, window=3, sinks=4, local="raw")
    expected = each.loop()
    for prompt in range(13):
        parts = Parts(each, [0, 1], 2)
        outs = [parts([prompt] * 2)] if prompt else []
        outs += [parts([1, 1]) for _ in range(prompt, 13)]
        assert off(torch.stack([torch.cat(rows, 1) for rows in zip(*outs)]), expected) <= 1e-12, prompt


def test_the_first_prompt_of_a_row_reads_nothing_of_the_one_before() -> None:
    old, new = case(11, 4, window=2, sinks=4, local="raw", seed=1), case(11, 4, window=2, sinks=4, local="raw", seed=2)
    used, fresh = Parts(old, [0, 1], 2), Parts(new, [0, 1], 2)
    used([11, 11])
    caches = used.caches
    used = Parts(new, [0, 1], 2)
    used.caches = caches
    for counts in ([3, 6], [4, 5], [4, 0]):
        for a, b in zip(used(counts), fresh(counts)):
            assert torch.equal(a, b)


def test_a_row_is_what_it_is_alone_and_junk_behind_its_length_does_nothing() -> None:
    each = case(12, 4, window=3, sinks=2)
    together, other_junk = Parts(each, [0, 1], 2), Parts(each, [0, 1], 2)
    first, second = together([7, 3], padding=2), other_junk([7, 3], padding=2, junk=-1e3)
    torch.testing.assert_close(first + together.caches, second + other_junk.caches, rtol=0, atol=0, equal_nan=True)
    alone = Case([None if x is None else x[-1:] if x.dim() == 4 else x for x in each.operands[:4]] + each.operands[4:], each.attributes)
    assert off(Parts(alone, [0], 1)([3])[0], first[1]) <= 1e-15


@pytest.mark.parametrize("local", ["state", "raw"])
def test_slots_that_no_token_was_put_into_stay_as_they_were(local: str) -> None:
    parts = Parts(case(23, 4, window=2, sinks=4, local=local), [1, 0], 3)
    for position in range(1, 23):
        parts([1, 1])
        written = parts.caches[0][:2].isfinite().all(-1).all(1).sum(1)  # [rows]
        ring = 3 if local == "state" else 6
        assert written.tolist() == [min(position, 4) + position // 4 + min(position, ring)] * 2
        assert not parts.caches[0][2].isfinite().any()
    assert parts.summaries == math.ceil(23 / 4)


# --- causality ------------------------------------------------------------------------------------------------------------------


@given(each=cases(longest=60))
@settings(max_examples=25, deadline=None)
def test_no_output_changes_by_a_bit_with_a_later_token(each: Case) -> None:
    before = each()
    for tensor in each.operands[:4]:
        tensor[:, :, -1] += 3.0
    assert torch.equal(each()[:, :, :-1], before[:, :, :-1])


@pytest.mark.parametrize("reset", [True, False])
def test_with_reset_no_state_knows_of_the_chunk_before(reset: bool) -> None:
    each = case(8, 4, reset=reset)
    value = each.operands[2].requires_grad_()
    parts = Parts(each, [0, 1], 2)
    parts([8, 8])
    (gradient,) = torch.autograd.grad(parts.caches[3].sum(), value)
    assert (gradient[:, :, :4].abs().sum() == 0) == reset
    assert (gradient[:, :, 4:] != 0).all()


# --- where it is something known -----------------------------------------------------------------------------------------------


def attention(each: Case, mask: torch.Tensor | None = None) -> torch.Tensor:
    """Plain attention on the turned q, k and v: causal, or with a mask bool[T, T]."""
    q, k, v, _, _, cos, sin = each.operands
    style = each.attributes.get("rope_style", "half")
    tables = [None if t is None else t.unsqueeze(1) for t in (cos, sin)]
    options = {"is_causal": mask is None, "attn_mask": mask, "scale": each.attributes["scale"], "enable_gqa": True}
    return F.scaled_dot_product_attention(turned(q, *tables, style), turned(k, *tables, style), v, **options)


def with_gates(each: Case, logit: float) -> Case:
    each.operands[3] = torch.full_like(each.operands[3], logit)
    each.operands[4] = None
    return each


@pytest.mark.parametrize("attributes", [{}, {"window": 3, "sinks": 2}, {"local": "raw", "window": 1}, {"reset": False, "window": 4}])
@pytest.mark.parametrize("style", ["half", "interleaved"])
def test_closed_gates_and_chunks_of_one_token_are_attention(attributes: dict, style: str) -> None:
    each = with_gates(case(17, 1, rope_style=style, **attributes), CLOSED)
    assert off(each(), attention(each)) <= 1e-12


def test_gates_that_average_chunks_of_one_token_are_attention() -> None:
    each = with_gates(case(17, 1), 0.0)
    each.operands[4] = torch.full((1, 1, 1), CLOSED, dtype=torch.float64)
    assert off(each(), attention(each)) <= 1e-12


def test_states_in_a_window_over_the_whole_sequence_are_attention_at_closed_gates() -> None:
    each = with_gates(case(17, 5, window=16), CLOSED)
    assert off(each(), attention(each)) <= 1e-12


@given(chunk=st.integers(1, 9), window=st.integers(0, 9), chunks_of_sinks=st.integers(0, 2))
@settings(max_examples=30, deadline=None)
def test_raw_local_tokens_are_attention_up_to_the_window_a_chunk_and_the_sinks_whatever_the_gates(chunk, window, chunks_of_sinks) -> None:
    sinks = chunk * chunks_of_sinks
    each = case(window + chunk + sinks + 1, chunk, window=window, sinks=sinks, local="raw")
    got, expected = each(), attention(each)
    assert off(got[:, :, :-1], expected[:, :, :-1]) <= 1e-12
    assert chunk == 1 or off(got[:, :, -1], expected[:, :, -1]) > 1e-6


def test_of_averaging_gates_each_token_weighs_once_near_and_a_share_of_its_summary_beyond() -> None:
    tokens, chunk, window, sinks = 23, 4, 3, 4
    each = case(tokens, chunk, window=window, sinks=sinks, local="raw", rope=None, batch=1, kv_heads=1, shared=1)
    q, k = each.operands[0], torch.zeros_like(each.operands[1])
    values = torch.eye(tokens, dtype=torch.float64).reshape(1, 1, tokens, tokens)
    gate, averaging = torch.zeros_like(values), mean_bias(chunk)
    pad = [F.pad(x, (0, tokens - E)) for x in (q, k)]
    weights = ops.rat_attention(*pad, values, gate, averaging, None, None, **each.attributes)[0, 0]
    for t in range(tokens):
        chunks = max(0, (t - window) // chunk)
        near = [*range(min(sinks, t + 1)), *range(max(sinks, chunks * chunk), t + 1)]
        count = len(near) + max(0, chunks - sinks // chunk)
        assert off(weights[t, near], torch.full((len(near),), 1 / count).double()) <= 1e-7
        rest = [j for j in range(t + 1) if j not in near]
        assert off(weights[t, rest], torch.full((len(rest),), 1 / (count * chunk)).double()) <= 1e-7 if rest else True


def mean_bias(chunk: int) -> torch.Tensor:
    """Logits of gates n / (n + 1), with which a state is the mean of its chunk so far."""
    return torch.tensor([CLOSED, *(math.log(n) for n in range(1, chunk))], dtype=torch.float64).reshape(chunk, 1, 1)


def test_without_reset_it_is_attention_to_states_that_end_chunks_or_are_near_or_first() -> None:
    tokens, chunk, window, sinks = 19, 4, 3, 2
    each = case(tokens, chunk, window=window, sinks=sinks, reset=False)
    t, j = torch.arange(tokens).unsqueeze(1), torch.arange(tokens)
    mask = (j <= t) & (((j + 1) % chunk == 0) | (t - j <= window) | (j < sinks))
    q, k, v, gate, bias, *tables = each.operands
    g = (gate + bias[torch.arange(tokens) % chunk].transpose(0, 1)).sigmoid()
    states = [torch.zeros_like(k), torch.zeros_like(v)]
    for x, state in zip((k, v), states):
        for time in range(tokens):
            before = state[:, :, time - 1] if time else 0.0
            state[:, :, time] = g[:, :, time] * before + (1 - g[:, :, time]) * x[:, :, time]
    assert off(each(), attention(Case([q, *states, None, None, *tables], each.attributes), mask)) <= 1e-12


def test_closed_gates_are_attention_to_the_last_tokens_of_chunks_and_oneself() -> None:
    each = with_gates(case(14, 4), CLOSED)
    t, j = torch.arange(14).unsqueeze(1), torch.arange(14)
    assert off(each(), attention(each, (j == t) | ((j < t) & ((j + 1) % 4 == 0)))) <= 1e-12


def test_a_chunk_over_the_whole_sequence_gives_its_running_values_and_reads_no_queries() -> None:
    each = with_gates(case(9, 16, shared=1), 0.0)
    each.operands[4] = mean_bias(16)
    v = each.operands[2].requires_grad_()
    q = each.operands[0].requires_grad_()
    out = each()
    assert off(out.detach(), v.detach().cumsum(2) / torch.arange(1, 10).reshape(-1, 1)) <= 1e-12
    gradient = torch.autograd.grad(out.sum(), q)[0]
    assert float(gradient.abs().max()) <= 1e-15


def test_a_bias_of_the_chunks_logarithm_is_attention_where_chunks_hold_one_key_and_value() -> None:
    each = with_gates(case(20, 4, rope=None, window=2, local="raw", summary_bias=math.log(4)), 0.0)
    each.operands[4] = mean_bias(4)
    for n in (1, 2):
        each.operands[n] = each.operands[n][:, :, ::4].repeat_interleave(4, 2)
    assert off(each(), attention(each)) <= 1e-12


# --- in a graph, and gradients ------------------------------------------------------------------------------------------------


class Layer(torch.nn.Module):
    def __init__(self, local: str, *, reset: bool = True):
        super().__init__()
        self.form = {"local": local, "reset": reset}

    def forward(self, q, k, v, gate, cos, sin):
        return ops.rat_attention(q, k, v, gate, None, cos, sin, chunk=4, scale=0.4, window=3, sinks=4, **self.form)


@pytest.mark.parametrize(("local", "reset"), [("state", True), ("raw", True), ("state", False)])
def test_one_exported_graph_serves_all_lengths(local: str, reset: bool) -> None:
    def operands(tokens: int) -> list[torch.Tensor]:
        each = case(tokens, 4, bias=False)
        return [x for x in each.operands if x is not None]

    length = Dim("length", min=2, max=512)
    shapes = [{2: length}] * 4 + [{1: length}] * 2
    layer = Layer(local, reset=reset)
    exported = export(layer, tuple(operands(9)), dynamic_shapes=tuple(shapes)).run_decompositions({})
    assert [n for n in exported.graph.nodes if n.target is ops.rat_attention.default], "it stays whole"
    for tokens in (2, 4, 31, 512):
        given = operands(tokens)
        assert torch.equal(exported.module()(*given), layer(*given))


@pytest.mark.parametrize("logit", [-math.inf, -40.0, 0.0, 40.0])
@pytest.mark.parametrize("local", ["state", "raw"])
def test_gradients_are_finite_at_gates_of_any_logit(logit: float, local: str) -> None:
    each = with_gates(case(9, 4, local=local, window=1), logit)
    leaves = [x.requires_grad_() for x in each.operands[:4]]
    assert all(gradient.isfinite().all() for gradient in torch.autograd.grad(each().square().sum(), leaves))


@pytest.mark.parametrize("local", ["state", "raw"])
def test_gradients_are_those_of_the_loop(local: str) -> None:
    each = case(11, 4, local=local, window=1, sinks=4)
    leaves = [x.requires_grad_() for x in each.operands[:5]]
    ours, theirs = (torch.autograd.grad(out.square().sum(), leaves) for out in (each(), each.loop()))
    assert max(off(a, b) for a, b in zip(ours, theirs)) <= 1e-12


def test_the_result_lies_as_batch_length_heads_width() -> None:
    out = case(7, 4)()
    assert out.transpose(1, 2).is_contiguous()


# --- refusals -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("attributes", "message"),
    [
        ({"chunk": 0}, "a chunk has at least one token, not 0"),
        ({"window": -1}, "a window and sinks are numbers of tokens, not -1 and 0"),
        ({"sinks": -2}, "a window and sinks are numbers of tokens, not 0 and -2"),
        ({"local": "both"}, "near tokens are read as one of state, raw, not both"),
        ({"rope_style": "whole"}, "channels are paired in one of the styles half, interleaved, not whole"),
    ],
)
def test_attributes_that_say_nothing_are_refused(attributes: dict, message: str) -> None:
    each = case(5, 2)
    with pytest.raises(ValueError, match=message):
        ops.rat_attention(*each.operands, **(each.attributes | attributes))


def test_operands_that_do_not_fit_are_refused() -> None:
    each = case(5, 2)
    *tensors, cos, sin = each.operands
    with pytest.raises(ValueError, match="cos and sin come together"):
        ops.rat_attention(*tensors, cos, None, **each.attributes)
    with pytest.raises(ValueError, match="a rotation turns pairs of channels, and 3 is odd"):
        ops.rat_attention(*tensors, cos[..., :3], sin[..., :3], **each.attributes)
    tensors[0] = tensors[0][:, :3]
    with pytest.raises(ValueError, match="3 heads cannot share 2 of keys"):
        ops.rat_attention(*tensors, cos, sin, **each.attributes)


def test_caches_without_room_for_sinks_and_ring_are_refused() -> None:
    parts = Parts(case(5, 2, window=3, sinks=2), [0, 1], 2)
    parts.caches[:2] = [cache[:, :, :5] for cache in parts.caches[:2]]
    with pytest.raises(ValueError, match="5 slots are too few for 2 sinks and a ring of 4"):
        parts([2, 2])
