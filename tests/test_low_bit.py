"""Low-bit formats and gw.lowrank_linear: the quantizers against their definition, what is promised of their errors, and what the
operator computes and refuses.

The definition here is a list of the numbers that a format has, of which the nearest is taken; nothing of it is shared with the code.
"""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import graphwright as gw
from graphwright.ir.low_bit import FORMATS, dequantize, fake_quantize, format_of, hadamard, quantize, rotate
from graphwright.ir.low_bit.elements import pack, unpack
from graphwright.ir.low_bit.quantize import encode_on, step_of

pytestmark = pytest.mark.usefixtures("one_thread")

WEIGHTS = [name for name, form in FORMATS.items() if form.weight]
ACTIVATIONS = [name for name, form in FORMATS.items() if form.activation]
BY_ROW = [name for name in ACTIVATIONS if name != "u8-tensor"]
FEW = settings(max_examples=20)  # for each of the formats
lowrank_linear = torch.ops.gw.lowrank_linear.default


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def quantized(values, name, dtype=torch.float32, scale2=1.0):
    """What `values` [N, K] become in a format, as a weight where it may be one."""
    if not FORMATS[name].weight:
        return fake_quantize(values, name, dtype, scale2)
    q = quantize(values, name, dtype)
    return dequantize(q.codes, q.scale, q.scale2, name, torch.float32)


# --- the definition --------------------------------------------------------------------------------------------------------


def minifloats(mantissa, bias, largest):
    """The numbers of a float format from 0 up, in the order of their codes."""
    numbers, code = [], 0
    while not numbers or numbers[-1] < largest:
        exponent, fraction = divmod(code, 2**mantissa)
        numbers.append(
            fraction * 2.0 ** (1 - bias - mantissa) if exponent == 0 else (1 + fraction / 2**mantissa) * 2.0 ** (exponent - bias)
        )
        code += 1
    return numbers


MAGNITUDES = {
    "e4m3": minifloats(3, 7, 448.0),
    "e2m3": minifloats(3, 1, 7.5),
    "e2m1": minifloats(1, 1, 6.0),
    "int": [float(n) for n in range(128)],
    "uint": [float(n) for n in range(16)],
}
SIGN_BIT = {"e4m3": 128, "e2m3": 32, "e2m1": 8}


def nearest(y, magnitudes):
    """The code of the number nearest to y >= 0: the even one of two, the last one beyond the end."""
    code = int(np.searchsorted(magnitudes, y))
    if code == 0 or code == len(magnitudes):
        return min(code, len(magnitudes) - 1)
    below, above = y - magnitudes[code - 1], magnitudes[code] - y
    return code if above < below or (above == below and code % 2 == 0) else code - 1


def scale_of(amax, form, dtype, scale2):
    """The scale of a block, as stored, in float64."""
    if amax == 0:
        return 1.0 * (scale2 if form.scale == "nv" else 1)
    wanted = float(np.float32(amax) / np.float32(form.qmax))
    if form.scale == "e8m0":
        exponent = next(e for e in range(-127, 128) if 2.0**e >= wanted or e == 127)
        return 2.0 ** (exponent if wanted else 0)
    if form.scale == "nv":
        relative = float(np.float32(wanted) / np.float32(scale2))
        stored = MAGNITUDES["e4m3"][max(1, nearest(relative, MAGNITUDES["e4m3"]))]
        return float(np.float32(stored) * np.float32(scale2))
    stored = torch.float32 if form.scale == "f32" else dtype
    return (
        min(float(torch.tensor(wanted).to(stored)), torch.finfo(stored).max)
        or {torch.float32: 2.0**-149, torch.bfloat16: 2.0**-133, torch.float16: 2.0**-24}[stored]
    )


def by_definition(values, name, dtype=torch.float32, scale2=None):
    """(codes as numbers from 0, what they stand for) of `values` [N, K]."""
    form = FORMATS[name]
    magnitudes = [m for m in MAGNITUDES[form.element] if m <= form.qmax]
    codes, numbers = np.zeros(values.shape, np.int64), np.zeros(values.shape)
    group = form.group_of(values.shape[1])
    rows = values.float().numpy()
    if form.scale == "nv" and scale2 is None:
        largest = np.abs(rows).max()
        scale2 = float(np.float32(np.float32(largest) / np.float32(form.qmax)) / np.float32(448)) or 1.0
    for n in range(rows.shape[0]):
        for start in range(0, rows.shape[1], group):
            block = rows[n, start : start + group]
            amax = float(max(0.0, block.max()) if form.element == "uint" else np.abs(block).max())
            scale = scale_of(amax, form, dtype, scale2)
            for k, v in enumerate(block, start):
                y = float(v / np.float32(scale))
                negative = y < 0
                index = nearest(0.0 if negative and form.element == "uint" else abs(y), magnitudes)
                negative = negative and index > 0 and form.element != "uint"
                numbers[n, k] = np.float32((-1 if negative else 1) * magnitudes[index]) * np.float32(scale)
                codes[n, k] = (
                    (-index if negative else index) if form.element in ("int", "uint") else index + SIGN_BIT[form.element] * negative
                )
    return codes, numbers


@st.composite
def blocks(draw, k=64, exponents=(-20, 20)):
    """[2, k] of normal values, ties, steps of one block's scale, zeros and outliers, at any size."""
    seed, kind, exponent = (
        draw(st.integers(0, 2**31)),
        draw(st.sampled_from(["normal", "ties", "sparse", "heavy"])),
        draw(st.integers(*exponents)),
    )
    values = normal(2, k, seed=seed)
    if kind == "ties":
        values = (values * 16).round() / 8
        values[:, ::16] = draw(st.sampled_from([7.0, 6.0, 15.0, 127.0, 448.0, 7.5]))
    elif kind == "sparse":
        values = values * (values > 1)
    elif kind == "heavy":
        values = values**5
    return values * 2.0**exponent


@pytest.mark.parametrize("name", FORMATS)
@settings(max_examples=10)
@given(values=blocks(128), dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
def test_codes_and_values_are_those_of_the_definition(name, values, dtype):
    if name == "u8-tensor":
        return  # has a definition and a test of its own
    form = FORMATS[name]
    codes, numbers = by_definition(values, name, dtype, None if form.weight else 1.0)
    assert torch.equal(quantized(values, name, dtype).double(), torch.from_numpy(numbers))
    if form.weight:
        found = quantize(values, name, dtype).codes
        found = unpack(found, signed=form.element == "int") if form.is_packed else found
        found = found.view(torch.uint8) if form.element == "e4m3" else found
        assert torch.equal(found.long(), torch.from_numpy(codes))


@pytest.mark.parametrize("name", [name for name, form in FORMATS.items() if form.weight and form.activation])
@FEW
@given(values=blocks(128))
def test_a_format_rounds_weights_and_activations_alike(name, values):
    scale2 = quantize(values, name).scale2
    as_activation = fake_quantize(values, name, torch.float32, 1.0 if scale2 is None else float(scale2))
    assert torch.equal(as_activation, quantized(values, name))


@given(blocks(32))
def test_u8_of_a_tensor_has_one_scale_and_one_zero_point(values):
    low, high = min(0.0, float(values.min())), max(0.0, float(values.max()))
    scale = (high - low) / 255 or 1.0
    found = fake_quantize(values, "u8-tensor", torch.float32)
    assert float((found - values).abs().max()) <= 0.5 * scale * (1 + 1e-5)  # s in float32
    assert len(found.unique()) <= 256 and 0.0 in fake_quantize(torch.cat([values, torch.zeros(1, 32)]), "u8-tensor", torch.float32)


@pytest.mark.parametrize("name", WEIGHTS)
def test_stored_layouts_are_those_of_the_table(name):
    form, q = FORMATS[name], quantize(normal(3, 256).bfloat16(), name)
    code = {"int": torch.int8, "e4m3": torch.float8_e4m3fn, "e2m3": torch.uint8, "e2m1": torch.uint8}[form.element]
    scale = {"model": torch.bfloat16, "f32": torch.float32, "e8m0": torch.uint8, "nv": torch.float8_e4m3fn}[form.scale]
    assert q.codes.dtype == (torch.uint8 if form.bits == 4 else code) and q.codes.shape == (3, 128 if form.bits == 4 else 256)
    assert q.scale.dtype == scale and q.scale.shape == (3, 256 // form.group_of(256))
    assert (q.scale2 is not None) == (form.scale == "nv")


@pytest.mark.parametrize("name", [name for name in FORMATS if name != "uint4-g64"])
def test_the_error_on_normal_values_is_that_of_the_table(name):
    values = normal(512, 4096)
    error = float((quantized(values, name) - values).norm() / values.norm())
    assert error == pytest.approx(FORMATS[name].gaussian_error, rel=0.02)  # two digits


def test_values_above_zero_lose_less_in_16_codes_than_the_figure_of_the_15_that_they_replace():
    values = normal(512, 4096).abs()
    assert float((quantized(values, "uint4-g64") - values).norm() / values.norm()) < FORMATS["uint4-g64"].gaussian_error


@pytest.mark.parametrize(
    ("name", "k", "bits"),
    [("int4-g64", 512, 4.25), ("int4-g32", 512, 4.5), ("int8-channel", 4096, 8 + 32 / 4096), ("mxint8", 512, 8.25), ("mxfp4", 512, 4.25), ("nvfp4", 512, 4.5), ("mxfp6", 512, 8.25)],
)  # fmt: skip
def test_bits_of_a_weight_are_what_is_stored(name, k, bits):
    assert FORMATS[name].bits_per_weight(k) == bits
    q = quantize(torch.zeros(8, k, dtype=torch.bfloat16), name)
    assert 8 * (q.codes.nbytes + q.scale.nbytes) / (8 * k) == bits


# --- packing ---------------------------------------------------------------------------------------------------------------


def test_packing_keeps_every_pair_of_codes_the_even_column_low():
    pairs = torch.cartesian_prod(torch.arange(16), torch.arange(16)).to(torch.uint8)
    assert torch.equal(unpack(pack(pairs), signed=False), pairs)
    assert torch.equal(pack(pairs).flatten(), pairs[:, 0] + 16 * pairs[:, 1])
    signed = torch.cartesian_prod(torch.arange(-8, 8), torch.arange(-8, 8)).to(torch.int8)
    assert torch.equal(unpack(pack(signed), signed=True), signed)
    assert pack(torch.tensor([[-1, 7]], dtype=torch.int8)).tolist() == [[0x7F]]


@pytest.mark.parametrize("name", [name for name in WEIGHTS if FORMATS[name].element == "int"])
@FEW
@given(values=blocks(128))
def test_codes_are_symmetric(name, values):
    codes = quantize(values, name).codes
    codes = unpack(codes, signed=True) if FORMATS[name].is_packed else codes
    assert int(codes.min()) >= -FORMATS[name].qmax and int(codes.max()) <= FORMATS[name].qmax


@pytest.mark.parametrize("name", WEIGHTS)
@FEW
@given(values=blocks(128), dtype=st.sampled_from([torch.float32, torch.bfloat16]))
def test_codes_on_given_scales_are_those_of_the_quantizer(name, values, dtype):
    q = quantize(values, name, dtype)
    codes = encode_on(values, name, q.scale, q.scale2)
    assert codes.dtype == q.codes.dtype and torch.equal(codes.view(torch.uint8), q.codes.view(torch.uint8))


def test_weights_that_were_joined_keep_a_second_scale_each():
    weights = [normal(2, 32), normal(3, 32, seed=1) * 100]
    parts = [quantize(weight, "nvfp4") for weight in weights]
    codes = torch.cat([part.codes for part in parts])
    scale = torch.cat([part.scale.view(torch.uint8) for part in parts]).view(torch.float8_e4m3fn)
    scale2 = torch.cat([part.scale2.expand(len(part.codes)) for part in parts])
    joined = dequantize(codes, scale, scale2, "nvfp4", torch.float32)
    assert torch.equal(joined, torch.cat([quantized(weight, "nvfp4") for weight in weights]))


# --- what is promised of the values ----------------------------------------------------------------------------------------

# Blocks whose scales are normal numbers of their dtype; smaller ones are rounded by more, or clipped.
NORMAL_SCALES = blocks(128, exponents=(-6, 6)).filter(
    lambda values: (values.unflatten(1, (-1, 16)).abs().amax(-1) > values.abs().max() / 2**14).all()
)


@pytest.mark.parametrize("name", [name for name in FORMATS if name != "u8-tensor"])
@FEW
@given(values=NORMAL_SCALES, dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
def test_quantizing_again_changes_nothing(name, values, dtype):
    values = values.abs() if name == "uint4-g64" else values
    once = quantized(values, name, dtype, scale2=1 / 64)
    torch.testing.assert_close(quantized(once, name, dtype, scale2=1 / 64), once, rtol=1e-6, atol=0)


@pytest.mark.parametrize("name", [name for name in FORMATS])
@FEW
@given(values=blocks(128, exponents=(-4, 4)), power=st.integers(-6, 6))
def test_powers_of_two_pass_through(name, values, power):
    """Unless a scale over- or underflows."""
    factor = 2.0**power
    assert torch.equal(quantized(values * factor, name, scale2=factor), quantized(values, name) * factor)


@pytest.mark.parametrize("name", [name for name in FORMATS if name != "u8-tensor"])
@FEW
@given(values=NORMAL_SCALES, dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
def test_the_error_is_at_most_half_a_step(name, values, dtype):
    form = FORMATS[name]
    values = values.abs() if form.element == "uint" else values
    found = quantized(values, name, dtype)
    if form.weight:
        q = quantize(values, name, dtype)
        step = step_of(q.scale, q.scale2, name)
    else:
        amax = values.unflatten(1, (-1, form.group_of(128))).amax(-1) if form.element == "uint" else values.abs().amax(-1, keepdim=True)
        step = torch.where(amax > 0, amax / form.qmax, 1.0).to(dtype if form.scale == "model" else torch.float32).float()
    blockwise = values.unflatten(1, (-1, form.group_of(128)))
    error = (values - found).unflatten(1, (-1, form.group_of(128))).abs()
    # Division and product are float32: their rounding is some 2^-23 of the value itself.
    assert (error <= form.half_step * step.unsqueeze(-1) + 2**-22 * blockwise.abs()).all()
    if form.scale == "e8m0":
        assert (blockwise.abs().amax(-1) / step <= form.qmax).all()


TINY, HUGE = 2.0**-149, 2.0**125


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("size", [TINY, 3 * TINY, 2.0**-127, 1e-38, 1e-20, 1.0, 65504.0 * 16, 1e30, HUGE])
def test_finite_values_of_any_size_stay_finite_and_no_zero_is_negative(name, dtype, size):
    """HUGE leaves room for rounding up: what is nearest to the largest float32 may be above it."""
    values = torch.tensor([0.0, -0.0, 1.0, -1.0, 0.01, -0.01, 0.3, 1e-9]).repeat(2, 16) * size
    values[1] *= 2.0**-10
    found = quantized(values, name, dtype)
    assert found.isfinite().all()
    assert not (found == 0).logical_and(found.signbit()).any()
    assert (found[values == 0] == 0).all()
    if FORMATS[name].weight:
        codes = quantize(values, name, dtype).codes
        codes = unpack(codes, signed=False) if FORMATS[name].is_packed else codes.view(torch.uint8)
        negative_zero = SIGN_BIT.get(FORMATS[name].element)
        assert negative_zero is None or not (codes == negative_zero).any()


@pytest.mark.parametrize("name", FORMATS)
def test_zeros_stay_zeros_on_a_scale_of_one(name):
    zeros = torch.zeros(2, 128)
    assert torch.equal(quantized(zeros, name), zeros)
    if FORMATS[name].weight:
        q = quantize(zeros, name)
        assert (step_of(q.scale, q.scale2, name) == 1).all()


@pytest.mark.parametrize("name", BY_ROW)
@FEW
@given(first=blocks(128), second=blocks(128), scale2=st.sampled_from([1.0, 2.0**-9]))
def test_each_row_of_activations_is_quantized_by_itself(name, first, second, scale2):
    together = fake_quantize(torch.cat([first, second]), name, torch.float32, scale2)
    apart = [fake_quantize(part, name, torch.float32, scale2) for part in (first, second)]
    assert torch.equal(together, torch.cat(apart))


@pytest.mark.parametrize("name", FORMATS)
def test_float64_values_have_the_codes_of_float32(name):
    values = normal(4, 128)
    narrow, wide = quantized(values, name), quantized(values.double(), name)
    assert torch.equal(wide.float(), narrow)


# --- rotation --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 2, 16, 32, 64])
def test_hadamard_matrices_are_of_signs_and_orthogonal(size):
    h = hadamard(size)
    assert (h.abs() == 1).all() and torch.equal(h @ h.T, size * torch.eye(size)) and torch.equal(h, h.T)


@pytest.mark.parametrize("size", [0, -2, 3, 48])
def test_sizes_without_a_hadamard_matrix_are_refused(size):
    with pytest.raises(ValueError, match="has a power of two rows, not"):
        hadamard(size)


@pytest.mark.parametrize("size", [16, 32, 64])
@FEW
@given(seed=st.integers(0, 2**31))
def test_rotation_changes_no_product_and_no_branch(size, seed):
    x, weight, down, up = (normal(*shape, seed=seed + i).double() for i, shape in enumerate([(5, 128), (7, 128), (3, 128), (7, 3)]))
    plain = lowrank_linear(x, weight, None, down, up, None, weight_format="none")
    turned = lowrank_linear(x, rotate(weight, size, weight=True), None, down, up, None, weight_format="none", rotate=size)
    torch.testing.assert_close(turned, plain, rtol=0, atol=1e-12 * float(plain.abs().max()))
    nothing = torch.zeros_like(weight)
    assert torch.equal(
        lowrank_linear(x, nothing, None, down, up, None, weight_format="none", rotate=size),
        lowrank_linear(x, nothing, None, down, up, None, weight_format="none"),
    )


def test_rotation_undoes_itself_and_spreads_an_outlier():
    outlier = torch.zeros(1, 64)
    outlier[0, 5] = 1.0
    turned = rotate(outlier, 64, weight=False)
    assert (turned.abs() == 2.0**-3).all()
    assert torch.equal(rotate(turned, 64, weight=True), outlier)


# --- the operator ----------------------------------------------------------------------------------------------------------


def error_of(values, name):
    """h * s of each value of a weight or an activation, and what it becomes."""
    form = FORMATS[name]
    if name == "u8-tensor":
        step = (values.amax().clamp(min=0) - values.amin().clamp(max=0)) / 255
        return torch.full_like(values, float(form.half_step * step)), fake_quantize(values, name, torch.float32)
    _, numbers = by_definition(values, name, torch.float32, None if form.weight else 1.0)
    group = form.group_of(values.size(1))
    scale2 = float((values.abs().max() / form.qmax) / 448) if form.scale == "nv" else None
    parts = values.unflatten(1, (-1, group))
    amax = (parts.clamp(min=0) if form.element == "uint" else parts.abs()).amax(-1)
    steps = torch.tensor([[scale_of(float(a), form, torch.float32, scale2) for a in row] for row in amax])
    return form.half_step * steps.repeat_interleave(group, 1).float(), torch.from_numpy(numbers)


@pytest.mark.parametrize("weight_format", WEIGHTS)
def test_the_output_is_within_the_elementwise_bound_for_every_activation_format(weight_format):
    """|dy| <= |x| |ew|^T + |ex| |w|^T + |ex| |ew|^T, e = h * s."""
    weight = normal(6, 128)
    q = quantize(weight, weight_format)
    ew, _ = error_of(weight, weight_format)
    for act_format in ["none", *ACTIVATIONS]:
        x = normal(4, 128, seed=1)
        x = x.abs() if act_format == "uint4-g64" else x
        ex = torch.zeros_like(x) if act_format == "none" else error_of(x, act_format)[0]
        scale2 = float(x.abs().max() / (448 * FORMATS[act_format].qmax)) if act_format in ("nvint4", "nvfp4") else 1.0
        y = lowrank_linear(
            x.double(), q.codes, q.scale, None, None, None, weight_format=weight_format, act_format=act_format, weight_scale2=q.scale2, act_scale2=scale2
        )  # fmt: skip
        ew64, ex64, x64, w64 = (each.double().abs() for each in (ew, ex, x, weight))
        bound = x64 @ ew64.T + ex64 @ w64.T + ex64 @ ew64.T
        assert ((y - x.double() @ weight.double().T).abs() <= bound * (1 + 1e-5)).all(), act_format  # scales are float32


@given(
    st.sampled_from(WEIGHTS), st.sampled_from(["none", *ACTIVATIONS]), st.integers(0, 2**31), st.booleans(), st.sampled_from([0, 16, 64])
)
def test_the_operator_is_its_formula(weight_format, act_format, seed, smoothed, turn):
    x, weight, down, up, bias = (normal(*shape, seed=seed + i) for i, shape in enumerate([(2, 3, 128), (6, 128), (4, 128), (6, 4), (6,)]))
    smooth = normal(128, seed=seed + 9).abs() + 0.5 if smoothed else None
    q = quantize(weight, weight_format)
    shift = 0.25
    y = lowrank_linear(
        x, q.codes, q.scale, down, up, bias,
        weight_format=weight_format, act_format=act_format, smooth=smooth, weight_scale2=q.scale2, act_scale2=0.01, act_shift=shift, rotate=turn,
    )  # fmt: skip
    seen = (x + shift) * (1 if smooth is None else smooth)
    if turn:
        seen = (seen.unflatten(-1, (-1, turn)) @ hadamard(turn)).flatten(-2) * 2.0 ** -math.floor(math.log2(turn) / 2)
    seen = fake_quantize(seen, act_format, torch.float32, 0.01)
    expected = seen.double() @ dequantize(q.codes, q.scale, q.scale2, weight_format, torch.float64).T
    expected = expected + (x.double() @ down.double().T) @ up.double().T + bias.double()
    # float32 sums of 128 terms; a rotation that is summed in another order can move a value over a tie, and so a code by one.
    tolerance = 2e-5 if not turn or act_format == "none" else 0.05
    torch.testing.assert_close(y.double(), expected, rtol=0, atol=tolerance * float(expected.abs().max()))


def test_limit_points_are_the_linear_layer_and_plain_rounding():
    x, weight, bias = normal(5, 128), normal(6, 128), normal(6)
    plain = lowrank_linear(x, weight, None, None, None, bias, weight_format="none")
    torch.testing.assert_close(plain, torch.nn.functional.linear(x, weight, bias))
    on_grid = (normal(6, 128) * 2).round().clamp(-7, 7)
    on_grid[:, ::64] = 7
    q = quantize(on_grid, "int4-g64")
    assert torch.equal(dequantize(q.codes, q.scale, None, "int4-g64", torch.float32), on_grid)
    zero = lowrank_linear(torch.zeros(5, 128), q.codes, q.scale, None, None, bias, weight_format="int4-g64", act_format="int8-token")
    assert torch.equal(zero, bias.expand(5, 6))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_the_output_has_the_dtype_of_the_input_and_sums_are_wide(dtype):
    x, weight = normal(5, 2048).to(dtype), normal(6, 2048).to(dtype)
    q = quantize(weight, "int8-channel")
    y = lowrank_linear(x, q.codes, q.scale, None, None, None, weight_format="int8-channel")
    exact = x.double() @ dequantize(q.codes, q.scale, None, "int8-channel", torch.float64).T
    assert y.dtype == dtype
    torch.testing.assert_close(y.double(), exact, rtol=torch.finfo(dtype).eps, atol=2e-6 * float(exact.abs().max()))


@pytest.mark.parametrize(("weight_format", "act_format"), [("mxfp4", "int8-token"), ("nvfp4", "nvfp4")])
def test_torch_takes_it_for_an_operator(weight_format, act_format):
    q = quantize(normal(6, 128), weight_format)
    args = (normal(3, 128), q.codes, q.scale, normal(4, 128), normal(6, 4), normal(6))
    options = {"weight_format": weight_format, "act_format": act_format, "weight_scale2": q.scale2, "act_scale2": 0.01}
    checks = ["test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic"]
    if q.scale.dtype != torch.float8_e4m3fn:  # which torch.allclose does not take
        checks.append("test_schema")
    torch.library.opcheck(lowrank_linear, args, options, test_utils=checks)


def test_gradients_reach_the_branch_and_the_bias():
    q = quantize(normal(6, 128), "int4-g64")
    x, down, up, bias = (normal(*shape).requires_grad_() for shape in [(3, 128), (4, 128), (6, 4), (6,)])
    lowrank_linear(x, q.codes, q.scale, down, up, bias, weight_format="int4-g64").square().sum().backward()
    assert all(each.grad is not None and each.grad.abs().sum() > 0 for each in (x, down, up, bias))


# --- refusals --------------------------------------------------------------------------------------------------------------


def test_an_unknown_format_is_refused_with_those_that_there_are():
    with pytest.raises(ValueError, match="there is no format 'int3': it is one of int4-g16, .*nvfp4"):
        format_of("int3")


@pytest.mark.parametrize("name", ["uint4-g64", "int8-token", "u8-tensor"])
def test_formats_of_activations_are_none_for_weights(name):
    for attempt in (lambda: quantize(normal(2, 64), name), lambda: encode_on(normal(2, 64), name, torch.ones(2, 1))):
        with pytest.raises(ValueError, match=f"format {name} is none for weights"):
            attempt()
    with pytest.raises(ValueError, match=f"format {name} is none for weights"):
        lowrank_linear(normal(2, 64), torch.zeros(2, 64, dtype=torch.int8), torch.ones(2, 1), None, None, None, weight_format=name)


def test_formats_of_weights_are_none_for_activations():
    with pytest.raises(ValueError, match="format int8-channel is none for activations"):
        fake_quantize(normal(2, 64), "int8-channel", torch.float32)


@pytest.mark.parametrize("name", [name for name, form in FORMATS.items() if form.group])
def test_rows_that_are_no_whole_blocks_are_refused(name):
    form, values = FORMATS[name], normal(2, FORMATS[name].group + 8)
    message = f"format {name} needs K to be a multiple of {form.group}, and it is {form.group + 8}"
    attempt = (lambda: quantize(values, name)) if form.weight else (lambda: fake_quantize(values, name, torch.float32))
    with pytest.raises(RuntimeError, match=message):
        attempt()


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"weight_format": "int3"}, ValueError),
        ({"act_format": "int8-channel"}, ValueError),
        ({"weight_scale": None}, ValueError),
        ({"x": normal(3, 64)}, RuntimeError),
        ({"down": normal(4, 64)}, RuntimeError),
        ({"up": normal(6, 5)}, RuntimeError),
        ({"bias": normal(5)}, RuntimeError),
        ({"smooth": normal(64)}, RuntimeError),
        ({"rotate": 256}, RuntimeError),
        ({"rotate": 3}, (RuntimeError, ValueError)),
        ({"weight_scale": torch.ones(6, 3)}, RuntimeError),
    ],
    ids=str,
)
def test_operands_that_do_not_fit_are_refused(change, error):
    q = quantize(normal(6, 128), "int4-g64")
    operands = {
        "x": normal(3, 128), "weight_q": q.codes, "weight_scale": q.scale, "down": normal(4, 128), "up": normal(6, 4), "bias": normal(6),
        "weight_format": "int4-g64", "act_format": "int8-token", "smooth": normal(128), "rotate": 0,
    }  # fmt: skip
    assert gw.ir is not None and lowrank_linear(**operands).shape == (3, 6)
    with pytest.raises(error):
        lowrank_linear(**{**operands, **change})
