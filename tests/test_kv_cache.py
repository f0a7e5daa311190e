"""`kv-cache` and `compile_decoder`: decoders of fourteen families as prefill, decode and verify over explicit caches, equal to the whole
forward for every split of the sequence, and refused by name where tokens meet elsewhere."""

import functools
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

import graphwright as gw
from graphwright.ir.float64 import to_float64
from graphwright.ir.layers import find_layers
from graphwright.ir.run import run
from graphwright.models.decoder import Rotation
from graphwright.passes.experts.blocks import find_blocks
from graphwright.passes.kv_cache.stepping import empty_caches, largest_difference
from graphwright.tests import decoders

ops = torch.ops.gw


@functools.cache
def wide(family: str) -> gw.Program:
    return to_float64(decoders.compiled(family).program)


def step(program: gw.Program, function: str, held: dict[str, torch.Tensor], *inputs: torch.Tensor) -> torch.Tensor:
    outputs, new = run(program, [*inputs, *held.values()], function=function)
    held.update({name.removeprefix("input:"): value for name, value in new.items()})
    return outputs[0]


def whole(program: gw.Program, tokens: torch.Tensor) -> torch.Tensor:
    positions = torch.arange(tokens.shape[1]).repeat(tokens.shape[0], 1)
    given = [tokens, positions, *(node.meta["val"] for node in program.main.placeholders[2:])]
    return run(program, given)[0][0]


def tokens_of(rows: int, length: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, decoders.VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(seed))


def at(*values: int) -> torch.Tensor:
    return torch.tensor(values)


def off(got: torch.Tensor, expected: torch.Tensor) -> float:
    # A prompt of padding tokens, whose embedding is zero, has logits that are all zero.
    return largest_difference(got, expected, float(expected.abs().max()))


# --- every family --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["zoo", "llama", "gemma2", "mixtral"])
def test_every_split_of_a_sequence_is_the_whole_forward_in_float64(family: str) -> None:
    tokens = tokens_of(2, 7)
    for prompt in range(1, 7):
        # The exact contract's figure.
        assert _worst_of_split(wide(family), tokens, prompt) <= 1e-10, prompt


@pytest.mark.parametrize("family", decoders.FAMILIES)
def test_every_family_in_steps_is_its_whole_forward(family: str) -> None:
    program = decoders.compiled(family).program
    assert list(program.functions) == ["main", "prefill", "decode", "verify"]
    assert str(gw.parse(str(program))) == str(program)
    for prompt in (1, 4, 6):
        # float32 against itself in another order of sums
        assert _worst_of_split(program, tokens_of(2, 7), prompt) <= 2e-5, prompt
    for name in ("main", "decode", "verify"):
        function = program.functions[name]
        layers = find_layers(function, function.placeholders[0]).layers
        assert len(layers) == (decoders.LAYERS if family in decoders.DEEPER else 2)
        assert all(layer.bypass() for layer in layers), "each is a residual around branches"
        assert all(a.result is b.source for a, b in zip(layers, layers[1:], strict=False))


@pytest.mark.parametrize("family", decoders.FAMILIES)
def test_experts_are_found_in_the_family_that_has_some_and_in_no_other(family: str) -> None:
    blocks, failures = find_blocks(decoders.compiled(family).program.main)
    assert (len(blocks), failures) == (2 if family == "mixtral" else 0, [])


def _worst_of_split(program: gw.Program, tokens: torch.Tensor, prompt: int) -> float:
    """The largest difference of a step's logits from the whole forward's, relative to these: a prompt of that many tokens, then one by one."""
    expected, held, rows = whole(program, tokens), empty_caches(program, 3, 8), at(2, 0)
    logits = step(program, "prefill", held, tokens[:, :prompt], at(0, 0), rows, at(prompt, prompt))
    differences = [off(logits, expected[:, prompt - 1])]
    for place in range(prompt, tokens.shape[1]):
        logits = step(program, "decode", held, tokens[:, place : place + 1], at(place, place), rows)
        differences.append(off(logits, expected[:, place]))
    return max(differences)


def test_layers_that_attend_to_windows_and_to_all_are_of_two_kinds() -> None:
    main = decoders.compiled("gemma2").program.main
    assert [layer.kind for layer in find_layers(main, main.placeholders[0]).layers] == [0, 1, 0]


def test_the_functions_of_a_decoder_read_one_weight_table() -> None:
    program, captured = decoders.compiled("llama").program, decoders.compiled("llama").history[0]
    assert {w.name: w.digest for w in program.weights.values()} == {w.name: w.digest for w in captured.weights.values()}


# --- properties ----------------------------------------------------------------------------------------------------------------


@given(data=st.data())
@settings(max_examples=25, deadline=None)
def test_a_prompt_in_any_chunks_of_ragged_rows_is_the_prompt_at_once(data: Any) -> None:
    program = wide("llama")
    lengths = data.draw(st.lists(st.integers(1, 9), min_size=1, max_size=3))
    longest = max(lengths)
    cuts = sorted(data.draw(st.sets(st.integers(1, longest), max_size=3)) | {longest})
    order = data.draw(st.permutations(range(4)))
    tokens = tokens_of(len(lengths), longest, seed=sum(lengths))
    expected = whole(program, tokens)
    held, start = empty_caches(program, 4, longest + 1), 0
    for end in cuts:
        inside = [b for b, length in enumerate(lengths) if length > start]
        part = torch.tensor([min(lengths[b], end) - start for b in inside])
        rows = torch.tensor([order[b] for b in inside])
        logits = step(program, "prefill", held, tokens[inside, start:end], torch.full((len(inside),), start), rows, part)
        for place, b in enumerate(inside):
            assert off(logits[place], expected[b, start + int(part[place]) - 1]) <= 1e-10
        start = end
    following = tokens_of(len(lengths), 1, seed=9)
    logits = step(program, "decode", held, following, torch.tensor(lengths), torch.tensor(order[: len(lengths)]))
    for b, length in enumerate(lengths):
        alone = whole(program, torch.cat([tokens[b : b + 1, :length], following[b : b + 1]], 1))
        assert off(logits[b], alone[0, -1]) <= 1e-10


def test_verify_gives_the_logits_of_each_token_at_positions_of_each_row() -> None:
    program = wide("gemma2")
    tokens = tokens_of(2, 8)
    expected = whole(program, tokens)
    held = empty_caches(program, 2, 9)
    step(program, "prefill", held, tokens[:, :4], at(0, 0), at(0, 1), at(4, 3))
    part = torch.stack([tokens[0, 4:7], tokens[1, 3:6]])
    logits = step(program, "verify", held, part, at(4, 3), at(0, 1))
    assert off(logits[0], expected[0, 4:7]) <= 1e-10
    assert off(logits[1], expected[1, 3:6]) <= 1e-10


def test_a_decode_step_as_text() -> None:
    class Tiny(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Embedding(5, 4)
            self.head = nn.Linear(4, 5, bias=False)

        def forward(self, input_ids: torch.Tensor, position_ids: torch.Tensor) -> torch.Tensor:
            x = self.table(input_ids).unsqueeze(1)
            return self.head((x + F.scaled_dot_product_attention(x, x, x, is_causal=True, scale=0.5)).squeeze(1))

    text = str(gw.compile_decoder(Tiny(), backend="aten", cache=False).program)
    decode = text[text.index("function decode") : text.index("function verify")]
    lines = [line.partition("  #")[0].rstrip() for line in decode.strip().splitlines()]
    assert lines == [
        "function decode {",
        "  takes ((*, *, *, *, *), {})",
        "  gives (*)",
        "  input %tokens : i64[batch, 1]",
        "  input %position : i64[batch]",
        "  input %rows : i64[batch]",
        "  input %cache_k_0 : f32[cache_rows, 1, capacity, 4]",
        "  input %cache_v_0 : f32[cache_rows, 1, capacity, 4]",
        "  %0 = aten.embedding.default(@table.weight, %tokens) : f32[batch, 1, 4]",
        "  %1 = aten.unsqueeze.default(%0, 1) : f32[batch, 1, 1, 4]",
        "  %2 = gw.kv_append.default(%cache_k_0, %cache_v_0, %1, %1, %position, %rows) :"
        " (f32[cache_rows, 1, capacity, 4], f32[cache_rows, 1, capacity, 4])",
        "  %3 = getitem(%2, 0) : f32[cache_rows, 1, capacity, 4]",
        "  %4 = getitem(%2, 1) : f32[cache_rows, 1, capacity, 4]",
        "  %5 = gw.cached_attention.default(%1, %3, %4, %position, %rows, scale=0.5) : f32[batch, 1, 1, 4]",
        "  %6 = aten.add.Tensor(%1, %5) : f32[batch, 1, 1, 4]",
        "  %7 = aten.squeeze.dim(%6, 1) : f32[batch, 1, 4]",
        "  %8 = aten.linear.default(%7, @head.weight) : f32[batch, 1, 5]",
        "  %9 = aten.select.int(%8, 1, 0) : f32[batch, 5]",
        '  return %9 state "input:cache_k_0" = %3, "input:cache_v_0" = %4',
        "}",
    ]


def test_prefill_computes_what_is_behind_the_last_attention_for_one_token_of_each_row() -> None:
    program = decoders.compiled("llama").program
    heads = [node for node in program.functions["prefill"].calls if node.target is torch.ops.aten.linear.default][-3:]
    assert [str(node.meta["val"].shape[1]) for node in heads] == ["1", "1", "1"], "up, down and the head"


def test_the_numeric_check_runs_the_steps() -> None:
    model = decoders.FAMILIES["zoo"]()
    report = gw.compile_decoder(model, backend="aten", verify="numeric", cache=False).report()
    assert "right" in str(report) and "2 attentions with caches, 512 bytes a token and row" in str(report)


# --- refusals ------------------------------------------------------------------------------------------------------------------


class Small(nn.Module):
    """A decoder of one layer whose parts tests replace."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(16, 8)
        self.mix = nn.Conv1d(8, 8, 3, padding=2)

    def attend(self, x: torch.Tensor, position_ids: torch.Tensor) -> torch.Tensor:
        return F.scaled_dot_product_attention(x, x, x, is_causal=True)

    def forward(self, input_ids: torch.Tensor, position_ids: torch.Tensor) -> Any:
        x = self.table(input_ids)
        rotation = Rotation.of_positions(position_ids.unsqueeze(1), 4, 100.0, like=x)
        heads = rotation.apply(x.unflatten(-1, (2, 4)).transpose(1, 2))
        return x + self.attend(heads, position_ids).transpose(1, 2).flatten(2)


def _refused(model: nn.Module, error: type[Exception] = gw.PassError) -> str:
    with pytest.raises(error) as caught:
        gw.compile_decoder(model.eval(), backend="aten", cache=False)
    return str(caught.value)


def test_attention_that_sees_the_future_is_refused() -> None:
    class Open(Small):
        def attend(self, x: torch.Tensor, position_ids: torch.Tensor) -> torch.Tensor:
            return F.scaled_dot_product_attention(x, x, x)

    message = _refused(Open())
    assert "sees positions that are yet to come" in message and "test_kv_cache.py" in message


def test_a_mask_that_is_not_causal_is_refused() -> None:
    class Strided(Small):
        def attend(self, x: torch.Tensor, position_ids: torch.Tensor) -> torch.Tensor:
            q, k = position_ids[:, None, :, None], position_ids[:, None, None, :]
            return F.scaled_dot_product_attention(x, x, x, attn_mask=(k <= q) & ((q - k) % 3 != 1))

    assert "its mask is not causal, with or without a window" in _refused(Strided())


def test_a_bias_of_positions_is_refused() -> None:
    class Slopes(Small):
        def attend(self, x: torch.Tensor, position_ids: torch.Tensor) -> torch.Tensor:
            q, k = position_ids[:, None, :, None], position_ids[:, None, None, :]
            bias = torch.where(k <= q, (k - q) * 0.5, float("-inf"))
            return F.scaled_dot_product_attention(x, x, x, attn_mask=bias)

    assert "positions have a bias" in _refused(Slopes())


def test_tokens_that_meet_in_a_convolution_are_refused() -> None:
    class Convolved(Small):
        def forward(self, input_ids: torch.Tensor, position_ids: torch.Tensor) -> Any:
            y = super().forward(input_ids, position_ids)
            return y + self.mix(y.transpose(1, 2))[:, :, : input_ids.shape[1]].transpose(1, 2)

    assert "tokens meet elsewhere than in attentions" in _refused(Convolved())


@pytest.mark.parametrize("window", [70, 8300])
def test_windows_longer_than_any_mask_that_is_looked_at_are_found(window: int) -> None:
    class Windowed(Small):
        def attend(self, x: torch.Tensor, position_ids: torch.Tensor) -> torch.Tensor:
            q, k = position_ids[:, None, :, None], position_ids[:, None, None, :]
            return F.scaled_dot_product_attention(x, x, x, attn_mask=(k <= q) & (k > q - window))

    program = gw.compile_decoder(Windowed().eval(), backend="aten", cache=False, cleanups=False).program
    reads = [node for node in program.functions["decode"].calls if node.target is ops.cached_attention.default]
    assert [node.kwargs["window"] for node in reads] == [window]


def test_a_large_number_that_is_no_window_is_refused() -> None:
    class Blocked(Small):
        def attend(self, x: torch.Tensor, position_ids: torch.Tensor) -> torch.Tensor:
            q, k = position_ids[:, None, :, None], position_ids[:, None, None, :]
            return F.scaled_dot_product_attention(x, x, x, attn_mask=(k <= q) & (k // 100 == q // 100))

    assert "is not causal, with or without a window" in _refused(Blocked())


def test_dropout_is_refused_for_what_it_is() -> None:
    class Dropping(Small):
        def forward(self, input_ids: torch.Tensor, position_ids: torch.Tensor) -> Any:
            return F.dropout(super().forward(input_ids, position_ids), 0.1, training=True)

    assert "it draws random numbers (aten.native_dropout.default): capture the model after .eval()" in _refused(Dropping())


def test_a_softmax_over_more_than_keys_is_refused_with_its_line() -> None:
    class Sinks(Small):
        def attend(self, x: torch.Tensor, position_ids: torch.Tensor) -> torch.Tensor:
            q, k = position_ids[:, None, :, None], position_ids[:, None, None, :]
            scores = (x @ x.transpose(-1, -2)).masked_fill(k > q, float("-inf"))
            sink = torch.zeros_like(scores[..., :1])
            return torch.cat([scores, sink], -1).softmax(-1)[..., :-1] @ x

    message = _refused(Sinks())
    assert "its softmax stands in no attention of a known form" in message and "test_kv_cache.py" in message


def test_a_state_is_named() -> None:
    class Counting(Small):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, input_ids: torch.Tensor, position_ids: torch.Tensor) -> Any:
            self.calls.add_(1)
            return super().forward(input_ids, position_ids) * self.calls

    assert "it updates a state of its own, calls" in _refused(Counting())


def test_a_second_kv_cache_finds_the_functions_there() -> None:
    program = decoders.compiled("llama").program
    again = gw.PassManager("kv-cache").run(program)
    assert again.program.functions.keys() == program.functions.keys()
    assert "its functions of one step are there already" in str(again)


def test_few_positions_are_a_limit() -> None:
    class Short(Small):
        def __init__(self) -> None:
            super().__init__()
            self.places = nn.Embedding(4, 8)
            self.config = SimpleNamespace(max_position_embeddings=4)

        def forward(self, input_ids: torch.Tensor, position_ids: torch.Tensor) -> Any:
            return super().forward(input_ids, position_ids) + self.places(position_ids)

    model = gw.compile_decoder(Short().eval(), backend="aten", cache=False)
    assert len(model.generate([[1, 2]], 3).tokens[0]) == 3
    with pytest.raises(gw.InputError, match="4 positions"):
        model.generate([[1, 2, 3]], 20)


def test_other_outputs_are_refused() -> None:
    class Two(Small):
        def forward(self, input_ids: torch.Tensor, position_ids: torch.Tensor) -> Any:
            y = super().forward(input_ids, position_ids)
            return y, y * 2

    assert "it gives 2 tensors, not logits alone" in _refused(Two())


def test_fixed_sizes_are_refused_with_the_way_out() -> None:
    tokens = tokens_of(2, 5) % 16
    with pytest.raises(gw.PassError, match=r"sizes that are fixed.*gw\.compile_decoder"):
        gw.compile(Small().eval(), "kv-cache", example_inputs=(tokens, torch.arange(5).repeat(2, 1)), backend="aten", cache=False)


def test_a_network_without_tokens_is_refused() -> None:
    with pytest.raises(gw.PassError, match=r"no \[batch, length\] of tokens or positions"):
        gw.compile(nn.Linear(3, 3), "kv-cache", example_inputs=(torch.randn(2, 3),), backend="aten", cache=False)


def test_a_decoder_without_positions_is_refused() -> None:
    class Unplaced(nn.Module):
        def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
            return input_ids

    assert "takes no position_ids" in _refused(Unplaced(), gw.CaptureError)


def test_an_encoder_decoder_is_refused() -> None:
    import transformers

    sizes = {"vocab_size": 64, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4, "decoder_start_token_id": 0}
    assert "is an encoder-decoder" in _refused(transformers.T5ForConditionalGeneration(transformers.T5Config(**sizes)), gw.CaptureError)


def test_an_example_of_ones_own_is_refused() -> None:
    with pytest.raises(gw.InputError, match="leave example_inputs out"):
        gw.compile_decoder(Small(), example_inputs=(tokens_of(2, 5),))
    with pytest.raises(gw.InputError, match="takes a module, not a str"):
        gw.compile_decoder("model.gw")  # type: ignore[arg-type]


def test_low_bits_come_before_caches() -> None:
    with pytest.raises(gw.PassError, match="kv-cache"):
        gw.PassManager("kv-cache,quantize")


# --- the operators -------------------------------------------------------------------------------------------------------------


@given(data=st.data())
@settings(max_examples=40, deadline=None)
def test_cached_attention_is_attention_over_the_live_slots_alone(data: Any) -> None:
    draw = lambda low, high: data.draw(st.integers(low, high))  # noqa: E731
    batch, kv_heads, shared, length, width = draw(1, 3), draw(1, 2), draw(1, 3), draw(1, 5), draw(1, 5)
    positions = [draw(0, 6) for _ in range(batch)]
    capacity = max(positions) + length + draw(0, 3)
    window, softcap = draw(0, 4), data.draw(st.sampled_from([0.0, 3.0]))
    generator = torch.Generator().manual_seed(draw(0, 99))
    normal = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)  # noqa: E731
    rows = torch.tensor(data.draw(st.permutations(range(batch + 1)))[:batch])
    held_k, held_v = (torch.full((batch + 1, kv_heads, capacity, n), float("nan"), dtype=torch.float64) for n in (width, width + 1))
    pasts = [(normal(kv_heads, p, width), normal(kv_heads, p, width + 1)) for p in positions]
    for row, (past_k, past_v) in zip(rows.tolist(), pasts, strict=True):
        held_k[row, :, : past_k.size(1)], held_v[row, :, : past_v.size(1)] = past_k, past_v
    q, k, v = (
        normal(batch, kv_heads * shared, length, width),
        normal(batch, kv_heads, length, width),
        normal(batch, kv_heads, length, width + 1),
    )
    held_k, held_v = ops.kv_append(held_k, held_v, k, v, torch.tensor(positions), rows)
    got = ops.cached_attention(q, held_k, held_v, torch.tensor(positions), rows, scale=0.3, window=window, softcap=softcap)
    assert got.transpose(1, 2).is_contiguous()
    for b, past in enumerate(positions):
        for h in range(kv_heads * shared):
            keys, values = (
                torch.cat([old, new])
                for old, new in zip((each[h // shared] for each in pasts[b]), (k[b, h // shared], v[b, h // shared]), strict=True)
            )
            for i in range(length):
                low = max(0, past + i + 1 - window) if window else 0
                scores = keys[low : past + i + 1] @ q[b, h, i] * 0.3
                scores = softcap * torch.tanh(scores / softcap) if softcap else scores
                assert torch.allclose(got[b, h, i], scores.softmax(0) @ values[low : past + i + 1], rtol=1e-10, atol=1e-12)


def test_a_position_beyond_the_capacity_is_an_index_error() -> None:
    cache, new = torch.zeros(1, 1, 3, 2), torch.zeros(1, 1, 2, 2)
    with pytest.raises(IndexError):
        ops.kv_append(cache, cache, new, new, at(2), at(0))


def test_a_negative_row_is_an_index_error_of_attention_and_counts_from_the_end_in_the_body_of_an_append() -> None:
    cache, new = torch.zeros(2, 1, 3, 2), torch.ones(1, 1, 1, 2)
    with pytest.raises(IndexError):
        ops.cached_attention(new, cache, cache, at(0), at(-1), scale=1.0)
    appended, _ = ops.kv_append(cache, cache, new, new, at(-1), at(-2))
    assert appended[0, 0, 2].eq(1).all() and appended.sum() == 2


def test_a_negative_window_is_a_value_error() -> None:
    cache, q = torch.zeros(1, 1, 3, 2), torch.ones(1, 1, 1, 2)
    with pytest.raises(ValueError, match="a window is a number of slots, or 0 for all, which no ring has, not -1"):
        ops.cached_attention(q, cache, cache, at(0), at(0), scale=1.0, window=-1)


@pytest.mark.parametrize("batch, length", [(0, 2), (2, 0), (0, 0)])
def test_no_rows_and_no_queries_have_no_result(batch: int, length: int) -> None:
    q, k, v = torch.ones(batch, 4, length, 3), torch.ones(2, 2, 6, 3), torch.ones(2, 2, 6, 5)
    none = torch.zeros(batch, dtype=torch.int64)
    assert ops.cached_attention(q, k, v, none, none, scale=1.0).shape == (batch, 4, length, 5)
    appended = ops.kv_append(k, v, q[:, :2], torch.ones(batch, 2, length, 5), none, none)
    assert torch.equal(appended[0], k) and torch.equal(appended[1], v)
