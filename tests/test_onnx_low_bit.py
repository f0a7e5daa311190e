"""Low-bit layers as ONNX models: weights as the standard has them; and operators that torch's exporter has no form for, bit for bit."""

import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto
from torch import nn

import graphwright as gw
from graphwright.ir.low_bit.elements import E2M1_VALUES, decode
from graphwright.ir.low_bit.formats import format_of
from graphwright.passes.low_rank.formats import WEIGHTS
from graphwright.tests.onnx_models import Function, compiled_of

STORED = {"int4": TensorProto.INT4, "int8": TensorProto.INT8, "fp8": TensorProto.FLOAT8E4M3FN, "fp4": TensorProto.UINT4}


@pytest.fixture(scope="module")
def layer():
    torch.manual_seed(0)
    return nn.Linear(512, 256, bias=False), torch.randn(3, 512)


@pytest.mark.parametrize("weight", [name for name in WEIGHTS if name not in ("int4-g16", "int4-g64", "int4-g128")])
def test_weights_are_the_standards_and_as_large_as_in_the_artifact(weight, layer, tmp_path):
    module, x = layer
    compiled = compiled_of(module, x, passes=f"quantize{{weight={weight},min_numel=0,budget=1.0}}")
    assert compiled.export_onnx(tmp_path / "m.onnx").verdict.kind == "right"
    kinds = {each.data_type for each in onnx.load(tmp_path / "m.onnx").graph.initializer}
    assert next(kind for name, kind in STORED.items() if name in weight) in kinds
    compiled.save(tmp_path / "m.gw")
    assert (tmp_path / "m.onnx").stat().st_size < 1.1 * (tmp_path / "m.gw").stat().st_size


@pytest.mark.parametrize("act", ["int8-token", "u8-tensor", "mxint4", "mxfp8", "nvfp4"])
def test_activations_are_rounded_as_in_the_program(act, layer, tmp_path):
    module, x = layer
    quantize = gw.Quantize(weight="int4-g64", act=act, min_numel=0, budget=1.0, calibration=[(x,)])
    assert compiled_of(module, x, passes=[quantize]).export_onnx(tmp_path / "m.onnx").verdict.kind == "right"


def test_codes_of_e2m1_are_its_numbers():
    values = decode(torch.arange(16, dtype=torch.uint8), format_of("mxfp4"), torch.float32)
    assert values.tolist() == [*E2M1_VALUES, *(-value for value in E2M1_VALUES)]
    assert not torch.signbit(values[8])


# --- operators that torch's exporter has no form for ------------------------------------------------------------------------------------


def in_onnxruntime(function, x, folder):
    compiled_of(Function(function), x).export_onnx(folder / "m.onnx")
    session = onnxruntime.InferenceSession(str(folder / "m.onnx"), providers=["CPUExecutionProvider"])
    return [torch.from_numpy(each) for each in session.run(None, {session.get_inputs()[0].name: x.numpy()})]


def any_bits():
    """Numbers of every exponent, the smallest and largest, both zeros, infinities and NaN."""
    drawn = torch.randint(-(2**31), 2**31, (4096,), generator=torch.Generator().manual_seed(0))
    ends = torch.tensor([0, 1, 0x7FFFFF, 0x800000, 0x7F7FFFFF, 0x7F800000, 0x7FC00000])
    bits = torch.cat([drawn, ends, ends - 2**31, torch.arange(255) << 23])
    return torch.where(bits >= 2**31, bits - 2**32, bits).to(torch.int32)


def test_numbers_are_put_together_of_their_bits(tmp_path):
    bits = any_bits()
    (found,) = in_onnxruntime(lambda x: x.view(torch.float32), bits, tmp_path)
    numbers = bits.view(torch.float32)
    assert torch.equal(found.isnan(), numbers.isnan())
    assert torch.equal(found.view(torch.int32)[~numbers.isnan()], bits[~numbers.isnan()])


def test_numbers_are_taken_apart_into_mantissa_and_exponent(tmp_path):
    numbers = any_bits().view(torch.float32)
    mantissa, exponent = in_onnxruntime(lambda x: torch.frexp(x), numbers, tmp_path)
    finite = numbers.isfinite()
    assert torch.equal(mantissa[finite], torch.frexp(numbers).mantissa[finite])
    assert torch.equal(exponent[finite], torch.frexp(numbers).exponent[finite])


@pytest.mark.parametrize("function", [lambda x: x.amin(), lambda x: x.amax(), lambda x: x.amax((0, 2), keepdim=True)])
def test_the_least_and_greatest_of_all_elements(function, tmp_path):
    x = torch.randn(2, 3, 4)
    assert torch.equal(in_onnxruntime(function, x, tmp_path)[0], function(x))


@pytest.mark.parametrize("descending", [False, True])
def test_equal_elements_stay_in_their_order(descending, tmp_path):
    x = torch.randint(0, 5, (3, 40, 2)).float()
    values, places = in_onnxruntime(lambda x: torch.sort(x, dim=1, descending=descending, stable=True), x, tmp_path)
    expected = torch.sort(x, dim=1, descending=descending, stable=True)
    assert torch.equal(values, expected.values) and torch.equal(places, expected.indices)


@pytest.mark.parametrize("dtype", [torch.int64, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("divisor", [lambda x: 3, lambda x: -3, lambda x: x.size(0)], ids=["3", "-3", "size"])
def test_what_a_division_leaves_has_the_sign_of_its_divisor(divisor, dtype, tmp_path):
    rows = torch.export.Dim("rows", min=2)
    function = Function(lambda x: x % divisor(x))
    x = torch.arange(-7, 8).to(dtype)
    compiled = gw.compile(function, example_inputs=(x[:9],), dynamic_shapes={"x": {0: rows}}, backend="aten", cache=False)
    compiled.export_onnx(tmp_path / "m.onnx")
    session = onnxruntime.InferenceSession(str(tmp_path / "m.onnx"), providers=["CPUExecutionProvider"])
    assert torch.equal(torch.from_numpy(session.run(None, {"x": x.numpy()})[0]), function(x))


def test_bits_of_other_types_are_refused(tmp_path):
    with pytest.raises(gw.CaptureError, match="aten.view.dtype .*has no ONNX form|bits are read as another type"):
        compiled_of(Function(lambda x: x.view(torch.int16)), torch.randn(2, 4)).export_onnx(tmp_path / "m.onnx")
