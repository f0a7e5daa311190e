"""CPU kernels of ours against the bodies of their operators, in float64."""

import pytest
import torch
import torch.nn.functional as F

from graphwright.codegen.cpu_kernels import conv3d, norm_apply, norm_stats
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
    assert kernel == (3, 1, 1) or y.stride() == expected.stride()


def test_convolutions_keep_to_a_user_who_turns_onednn_off() -> None:
    x, weight = torch.randn(1, 4, 4, 6, 6), torch.randn(4, 4, 3, 3, 3)
    with torch.backends.mkldnn.flags(enabled=False):
        assert torch.equal(conv3d(x, weight), torch.conv3d(x, weight))
