"""GPTQ on the residual: the codes are those of the published procedure, on scales that stand, and no input makes it raise."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from graphwright.ir.low_bit import FORMATS, dequantize, quantize
from graphwright.ir.low_bit.elements import round_to_values, unpack
from graphwright.ir.low_bit.quantize import encode_on, step_of
from graphwright.passes.low_rank import gptq
from graphwright.passes.low_rank.gptq import gptq_codes

pytestmark = pytest.mark.usefixtures("one_thread")

WEIGHT_FORMATS = [name for name, form in FORMATS.items() if form.weight]


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def correlated(n, k, seed=0):
    """Rows whose channels go together, and some of which are large."""
    rows = normal(n, k // 8, seed=seed) @ normal(k // 8, k, seed=seed + 1) + normal(n, k, seed=seed + 2)
    return rows * torch.where(torch.arange(k) % 17 == 0, 8.0, 1.0)


def bits(codes):
    return codes.view(torch.uint8)


def naive(weight, rows, name, scale, scale2):
    """GPTQ as it is told: the inverse of H is kept, and one column at a time is rounded and taken out of it."""
    form, k = FORMATS[name], weight.size(1)
    h = 2 / len(rows) * rows.double().T @ rows.double()
    order = h.diagonal().argsort(descending=True, stable=True).tolist()
    inverse = torch.linalg.inv(h + 0.01 * h.diagonal().mean() * torch.eye(k, dtype=torch.float64))
    left, elements = weight.double().clone(), torch.empty_like(weight)
    step = step_of(scale, scale2, name)
    for number, j in enumerate(order):
        s = step[:, j // form.group_of(k)]
        elements[:, j] = round_to_values(left[:, j].float() / s, form)
        error = (left[:, j] - elements[:, j] * s.double()) / inverse[j, j]
        later = order[number + 1 :]
        left[:, later] -= error.unsqueeze(1) * inverse[j, later]
        inverse -= inverse[:, j].unsqueeze(1) * inverse[j] / inverse[j, j]
    return elements * step.repeat_interleave(form.group_of(k), 1)


@pytest.mark.parametrize("name", WEIGHT_FORMATS)
def test_codes_are_those_of_the_procedure_column_by_column(name):
    weight, rows = normal(12, 256), correlated(300, 256)
    q = quantize(weight, name)
    found = gptq_codes(weight, rows, name, q.scale, q.scale2)
    assert found.shape == q.codes.shape and found.dtype == q.codes.dtype
    values = dequantize(found, q.scale, q.scale2, name, torch.float32)
    # Another order of the same float64 sums: they differ where a quotient is within 1e-12 of a tie, and in no code here.
    assert torch.equal(values, naive(weight, rows, name, q.scale, q.scale2))


@pytest.mark.parametrize("name", WEIGHT_FORMATS)
def test_error_on_correlated_rows_is_below_that_of_rounding(name):
    weight, rows = normal(32, 256), correlated(1000, 256)
    q = quantize(weight, name)

    def error(codes):
        return (rows @ (dequantize(codes, q.scale, q.scale2, name, torch.float32) - weight).T).norm()

    assert error(gptq_codes(weight, rows, name, q.scale, q.scale2)) < 0.8 * error(q.codes)


@pytest.mark.parametrize("name", WEIGHT_FORMATS)
@settings(max_examples=20)  # for each of 13 formats
@given(seed=st.integers(0, 2**31), spread=st.floats(0, 6), dead=st.integers(0, 128))
def test_inputs_without_correlation_give_rounding_to_nearest(name, seed, spread, dead):
    k = 128
    weight = normal(5, k, seed=seed)
    q = quantize(weight, name)
    sizes = 10 ** (spread * torch.rand(k, generator=torch.Generator().manual_seed(seed)))
    rows = torch.diag(torch.where(torch.arange(k) < dead, 0.0, sizes))
    assert torch.equal(bits(gptq_codes(weight, rows, name, q.scale, q.scale2)), bits(q.codes))


@given(st.integers(0, 2**31), st.sampled_from(["int4-g16", "mxint4", "nvint4", "int8-channel"]))
def test_codes_are_in_range_and_scales_stay(seed, name):
    form, rows = FORMATS[name], correlated(9, 64, seed=seed) * 1e3
    weight = normal(4, 64, seed=seed) ** 3
    q = quantize(weight, name)
    before = [each.clone() for each in (weight, rows, q.scale)]
    codes = gptq_codes(weight, rows, name, q.scale, q.scale2)
    values = unpack(codes, signed=True) if form.is_packed else codes
    assert values.abs().max() <= form.qmax
    assert all(torch.equal(bits(a), bits(b)) for a, b in zip(before, (weight, rows, q.scale), strict=True))


@pytest.mark.parametrize(
    "rows",
    [
        torch.zeros(5, 64),
        torch.zeros(0, 64),
        torch.ones(1, 64),
        normal(3, 64),
        torch.cat([normal(50, 32)] * 2, 1),  # each channel twice
        torch.full((3, 64), 1e-30),
        torch.full((3, 64), 1e18),
        torch.eye(64)[:1] * 1e15 + 1e-15,
    ],
    ids=["zero", "none", "one", "few", "twice", "tiny", "huge", "one channel"],
)
def test_singular_inputs_do_not_raise(rows):
    weight = normal(6, 64)
    q = quantize(weight, "int4-g32")
    codes = gptq_codes(weight, rows, "int4-g32", q.scale)
    assert codes is not None and codes.shape == q.codes.shape


def test_a_channel_that_no_row_uses_is_rounded_to_nearest_and_does_not_count_for_the_damping():
    weight, rows = normal(6, 64), correlated(200, 64) * 1e-4
    rows[:, 5] = 0
    q = quantize(weight, "int4-g32")
    with_dead = unpack(gptq_codes(weight, rows, "int4-g32", q.scale), signed=True)
    assert torch.equal(with_dead[:, 5], unpack(q.codes, signed=True)[:, 5])
    scaled = unpack(gptq_codes(weight, rows * 2**10, "int4-g32", q.scale), signed=True)
    assert torch.equal(with_dead, scaled)


def test_where_no_damping_helps_there_are_no_codes(monkeypatch):
    attempts = []
    original = torch.linalg.cholesky_ex
    monkeypatch.setattr(gptq.torch.linalg, "cholesky_ex", lambda h: (attempts.append(float(h[0, 0])), original(-h))[1])
    weight, rows = normal(6, 64), normal(100, 64)
    q = quantize(weight, "int4-g32")
    assert gptq_codes(weight, rows, "int4-g32", q.scale) is None
    assert len(attempts) == 250 and attempts == sorted(attempts)


def test_damping_grows_until_the_matrix_is_positive(monkeypatch):
    attempts = []
    original = torch.linalg.cholesky_ex

    def failing(h):
        attempts.append(h)
        return original(-h if len(attempts) < 4 else h)

    monkeypatch.setattr(gptq.torch.linalg, "cholesky_ex", failing)
    weight, rows = normal(6, 64), normal(100, 64)
    q = quantize(weight, "int4-g32")
    assert gptq_codes(weight, rows, "int4-g32", q.scale) is not None and len(attempts) == 4


def test_the_order_of_columns_follows_the_inputs_and_each_keeps_its_block():
    """Two blocks of very different scales, the second with the larger inputs."""
    weight = torch.cat([normal(8, 32), normal(8, 32, seed=1) * 100], 1)
    rows = correlated(300, 64)
    rows[:, 32:] *= 4
    q = quantize(weight, "int4-g32")
    values = dequantize(gptq_codes(weight, rows, "int4-g32", q.scale), q.scale, None, "int4-g32", torch.float32)
    assert torch.equal(values, naive(weight, rows, "int4-g32", q.scale, None))
    assert (values[:, :32].abs().amax() < 10) and (values[:, 32:].abs().amax() > 100)


def test_scales_of_a_narrow_dtype_and_of_joined_weights_are_taken_as_stored():
    weight, rows = normal(8, 64), correlated(300, 64)
    q = quantize(weight, "int4-g32", torch.bfloat16)
    values = dequantize(gptq_codes(weight, rows, "int4-g32", q.scale), q.scale, None, "int4-g32", torch.float32)
    assert torch.equal(values, naive(weight, rows, "int4-g32", q.scale, None))
    parts = [quantize(weight[:4], "nvfp4"), quantize(weight[4:] * 50, "nvfp4")]
    joined = torch.cat([weight[:4], weight[4:] * 50])
    scale, scale2 = (
        torch.cat([p.scale.view(torch.uint8) for p in parts]).view(torch.float8_e4m3fn),
        torch.cat([p.scale2.expand(4) for p in parts]),
    )
    together = gptq_codes(joined, rows, "nvfp4", scale, scale2)
    apart = [gptq_codes(joined[4 * i : 4 * i + 4], rows, "nvfp4", p.scale, p.scale2) for i, p in enumerate(parts)]
    assert torch.equal(together, torch.cat(apart))
    assert encode_on(joined, "nvfp4", scale, scale2).shape == together.shape


def test_float64_weights_and_rows_are_taken_as_they_are():
    weight, rows = normal(8, 64).double(), correlated(300, 64).double()
    q = quantize(weight, "int4-g32")
    assert torch.equal(gptq_codes(weight, rows, "int4-g32", q.scale), gptq_codes(weight.float(), rows.float(), "int4-g32", q.scale))
