"""CPU kernels of ours against the bodies of their operators, in float64."""

import pytest
import torch
import torch.nn.functional as F

from graphwright.codegen.cpu_convolutions import conv1d, conv2d, conv3d
from graphwright.codegen.cpu_kernels import linear, norm_apply, norm_stats
from graphwright.ir.infer import same_strides
from graphwright.ir.ops.norm import norm_apply as apply_op
from graphwright.ir.ops.norm import norm_stats as stats_op

# float64: sums of at most 1e5 terms in another order.
CLOSE = {"rtol": 1e-11, "atol": 1e-11}


@pytest.mark.parametrize("shape", [(1, 8, 4, 5, 3), (2, 64, 7, 16, 16), (1, 32, 63, 123)])
@pytest.mark.parametrize("strided", [False, True])
def test_the_norm_pair_is_its_body_and_group_norm(shape: tuple[int, ...], strided: bool) -> None:
    x = torch.randn(shape).double()
    if strided:
        x = x.transpose(-1, -2).contiguous().transpose(-1, -2)
    weight, bias = torch.randn(shape[1]).double(), torch.randn(shape[1]).double()
    stats = norm_stats(x, 4)
    torch.testing.assert_close(stats, stats_op(x, 4), **CLOSE)
    y = norm_apply(x, stats, weight, bias, 4, 1e-5)
    torch.testing.assert_close(y, apply_op(x, stats, weight, bias, 4, 1e-5), **CLOSE)
    torch.testing.assert_close(y, F.group_norm(x, 4, weight, bias, 1e-5), **CLOSE)


@pytest.mark.parametrize("rows", [1, 2, 16, 32])
@pytest.mark.parametrize("stride", [1, 2])
def test_a_temporal_convolution_is_conv3d_on_slices_of_any_size(rows: int, stride: int) -> None:
    x = torch.randn(2, 6, 7, 32, 5).double()[:, :, :, :rows]
    weight, bias = torch.randn(4, 6, 3, 1, 1).double(), torch.randn(4).double()
    arguments = (x, weight, bias, [stride, 1, 1], [1, 0, 0])
    y, expected = conv3d(*arguments), torch.conv3d(*arguments)
    torch.testing.assert_close(y, expected, **CLOSE)
    assert y.stride() == expected.stride()


def test_other_convolutions_pass_through() -> None:
    x, weight = torch.randn(1, 2, 4, 5, 6).double(), torch.randn(3, 2, 3, 3, 3).double()
    torch.testing.assert_close(conv3d(x, weight), torch.conv3d(x, weight), **CLOSE)


@pytest.mark.parametrize("kernel", [(3, 3, 3), (1, 3, 3), (5, 3, 3), (3, 1, 1), (1, 1, 1)], ids=str)
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("layout", ["contiguous", "strided", "channels last"])
def test_convolutions_of_a_video_are_conv3d(kernel: tuple[int, int, int], stride: int, layout: str) -> None:
    x, weight, bias = torch.randn(1, 20, 5, 12, 9), torch.randn(7, 20, *kernel), torch.randn(7)
    if layout == "strided":
        x = x.transpose(-1, -2).contiguous().transpose(-1, -2)
    elif layout == "channels last":
        x = x.contiguous(memory_format=torch.channels_last_3d)
    arguments = (bias, stride, [n // 2 for n in kernel])
    y, expected = conv3d(x, weight, *arguments), torch.conv3d(x, weight, *arguments)
    exact = torch.conv3d(x.double(), weight.double(), bias.double(), *arguments[1:])
    # float32: sums of 1500 terms at most, near 1e-7 each way of summing.
    assert torch.linalg.vector_norm(y - exact) <= 2e-6 * torch.linalg.vector_norm(exact)
    assert y.shape == expected.shape
    assert y.stride() == expected.stride()


@pytest.mark.parametrize("kernel", [(3, 1, 1), (3, 3, 1), (1, 1, 3), (1, 1, 1)], ids=str)
@pytest.mark.parametrize("of_input", [torch.contiguous_format, torch.channels_last_3d], ids=["", "input"])
@pytest.mark.parametrize("of_weight", [torch.contiguous_format, torch.channels_last_3d], ids=["", "weight"])
def test_one_channel_lies_where_aten_takes_it_to_lie(
    kernel: tuple[int, int, int], of_input: torch.memory_format, of_weight: torch.memory_format
) -> None:
    x = torch.randn(2, 1, 5, 4, 8).contiguous(memory_format=of_input)
    weight = torch.randn(6, 1, *kernel).contiguous(memory_format=of_weight)
    expected = torch.conv3d(x, weight)
    y = conv3d(x, weight)
    assert y.stride() == expected.stride()
    torch.testing.assert_close(y, expected)


def test_convolutions_keep_to_a_user_who_turns_onednn_off() -> None:
    x, weight = torch.randn(1, 4, 4, 6, 6), torch.randn(4, 4, 3, 3, 3)
    with torch.backends.mkldnn.flags(enabled=False):
        assert torch.equal(conv3d(x, weight), torch.conv3d(x, weight))


OPERATORS = {1: (conv1d, torch.conv1d), 2: (conv2d, torch.conv2d), 3: (conv3d, torch.conv3d)}


@pytest.mark.parametrize("dims", OPERATORS)
@pytest.mark.parametrize("shape", [(2, 20, 8), (1, 20, 1), (3, 1, 5), (0, 4, 3)], ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "strided", "channels last", "part of the channels", "channels last weight"])
def test_pointwise_convolutions_give_what_aten_gives_where_aten_lays_it(dims: int, shape: tuple[int, ...], layout: str) -> None:
    kernel, reference = OPERATORS[dims]
    x, weight, bias = torch.randn(shape[0], shape[1], *[shape[2]] * dims), torch.randn(7, shape[1], *[1] * dims), torch.randn(7)
    innermost = {1: torch.contiguous_format, 2: torch.channels_last, 3: torch.channels_last_3d}[dims]
    if layout == "strided":
        x = x.transpose(-1, -2).contiguous().transpose(-1, -2)
    elif layout == "channels last":
        x = x.contiguous(memory_format=innermost)
    elif layout == "part of the channels":
        x = x.repeat_interleave(2, 1).contiguous(memory_format=innermost)[:, ::2]
    elif layout == "channels last weight":
        weight = weight.contiguous(memory_format=innermost)
    for b in (bias, None):
        y, expected = kernel(x, weight, b), reference(x, weight, b)
        exact = reference(x.double(), weight.double(), None if b is None else b.double())
        # float32: sums of 21 terms.
        assert torch.linalg.vector_norm(y - exact) <= 1e-6 * torch.linalg.vector_norm(exact)
        assert same_strides(y, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("shape", [(40, 6, 10), (6, 6, 1), (4, 9, 5), (8, 1, 5)], ids=str)
@pytest.mark.parametrize("order", [(0, 1, 2), (1, 0, 2), (2, 0, 1), (2, 1, 0), (0, 2, 1)], ids=str)
def test_linear_takes_rows_however_they_lie(dtype: torch.dtype, shape: tuple[int, ...], order: tuple[int, ...]) -> None:
    inverse = [order.index(d) for d in range(3)]
    x = torch.randn([shape[d] for d in inverse], dtype=dtype).permute(order).expand(shape)
    weight, bias = torch.randn(7, shape[2], dtype=dtype), torch.randn(7, dtype=dtype)
    for b in (bias, None):
        y, expected = linear(x, weight, b), F.linear(x, weight, b)
        exact = F.linear(x.double(), weight.double(), None if b is None else b.double())
        # Sums of 11 terms, some of which cancel.
        assert torch.linalg.vector_norm(y - exact) <= 8 * torch.finfo(dtype).eps * torch.linalg.vector_norm(exact)
        assert same_strides(y, expected)
