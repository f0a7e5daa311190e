"""The predicted peak of one operation is what its kernel is seen to allocate, on contiguous operands and on strided ones.

Kernels keep tiles for each thread and plans are made for two, so these run on two.
"""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import graphwright as gw
from graphwright.ir.workspace import slice_workspace

# Small blocks that the model leaves out: padded biases, buffers of a transposing copy.
SLACK = 64 * 1024

needs_wide_vectors = pytest.mark.skipif(
    torch.backends.cpu.get_cpu_capability() != "AVX512", reason="blocks of 16 channels are those of AVX-512: run on a CPU that has it"
)


class Call(nn.Module):
    def __init__(self, function: Callable[..., Any], weights: tuple[Tensor, ...] = ()):
        super().__init__()
        self.function = function
        self.names = [f"weight{i}" for i in range(len(weights))]
        for name, weight in zip(self.names, weights, strict=True):
            self.register_buffer(name, weight)

    def forward(self, *operands: Tensor) -> Any:
        return self.function(*operands, *(getattr(self, name) for name in self.names))


@pytest.fixture(autouse=True)
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def assert_foreseen(model: nn.Module, operands: tuple[Tensor, ...], passes: Any = ()) -> gw.CompiledModel:
    compiled = gw.compile(model.eval(), list(passes), example_inputs=operands, backend="aten")
    measured, planned = compiled.measure(*operands).peak_bytes, compiled.report().memory.planned
    assert planned is not None
    assert abs(planned - measured) <= max(0.05 * measured, SLACK), f"predicted {planned}, measured {measured}"
    return compiled


def strided(x: Tensor) -> Tensor:
    """The same values with the last two dims the other way round in memory."""
    return x.mT.contiguous().mT if x.dim() > 1 and x.is_floating_point() else x


def channels_last(x: Tensor) -> Tensor:
    """The same values with dim 1 innermost in memory."""
    return x.movedim(1, -1).contiguous().movedim(-1, 1)


X1, X2, X3 = (2, 32, 4096), (2, 32, 48, 48), (1, 32, 16, 32, 32)  # the video has 16384 = 1 * 32 * 16 * 32, below the cliff

CONVOLUTIONS = {
    "conv1d": (nn.Conv1d(32, 32, 3, padding=1), X1),
    "conv1d, one short row": (nn.Conv1d(32, 32, 3, padding=1), (1, 32, 640)),
    "conv1d, pointwise": (nn.Conv1d(32, 64, 1), X1),
    "conv1d, pointwise with a stride": (nn.Conv1d(32, 32, 1, stride=2), (1, 32, 8192)),
    "conv2d": (nn.Conv2d(32, 32, 3, padding=1), X2),
    "conv2d to more channels": (nn.Conv2d(32, 96, 3, padding=1), X2),
    "conv2d, pointwise": (nn.Conv2d(32, 64, 1), X2),
    "conv2d, one small image": (nn.Conv2d(32, 32, 3, padding=1), (1, 32, 24, 24)),
    "conv2d, one small image, pointwise": (nn.Conv2d(32, 96, 1), (1, 32, 24, 24)),
    "conv2d, dilated": (nn.Conv2d(32, 32, 3, padding="same", dilation=2), X2),
    "conv2d, groups": (nn.Conv2d(24, 24, 3, padding=1, groups=3), (4, 24, 48, 48)),
    "conv2d, depthwise": (nn.Conv2d(32, 32, 3, padding=1, groups=32), X2),
    "conv3d, one video": (nn.Conv3d(32, 32, 3, padding=1), X3),
    "conv3d, one video, spatial": (nn.Conv3d(32, 32, (1, 3, 3), padding=(0, 1, 1)), X3),
    "conv3d, one video, temporal": (nn.Conv3d(32, 32, (3, 1, 1), padding=(1, 0, 0)), X3),
    "conv3d, one video, pointwise": (nn.Conv3d(32, 4, 1), X3),
    "conv3d, one video, stride": (nn.Conv3d(32, 32, 3, padding=1, stride=2), X3),
    "conv3d, one video, padding by name": (nn.Conv3d(16, 16, 3, padding="same"), (1, 16, 16, 32, 32)),
    "conv3d, one large video": (nn.Conv3d(32, 32, 3, padding=1), (1, 32, 24, 32, 32)),
    "conv3d, two videos": (nn.Conv3d(32, 32, 3, padding=1), (2, 32, 8, 16, 16)),
    "conv3d, depthwise": (nn.Conv3d(32, 32, 3, padding=1, groups=32), (1, 32, 8, 32, 32)),
    "conv_transpose1d": (nn.ConvTranspose1d(32, 32, 3, padding=1), X1),
    "conv_transpose2d": (nn.ConvTranspose2d(32, 16, 2, stride=2), X2),
    "conv_transpose2d, one small image": (nn.ConvTranspose2d(32, 32, 3, padding=1), (1, 32, 24, 24)),
    "conv_transpose3d": (nn.ConvTranspose3d(32, 32, 3, padding=1), (2, 32, 8, 16, 16)),
    "conv_transpose3d, one video": (nn.ConvTranspose3d(16, 16, 3, padding=1), (1, 16, 8, 16, 16)),
}


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_convolutions(name: str) -> None:
    convolution, shape = CONVOLUTIONS[name]
    assert_foreseen(convolution, (torch.randn(shape),))


@pytest.mark.parametrize(
    "name",
    ["conv1d", "conv1d, pointwise", "conv2d", "conv2d, pointwise", "conv2d, one small image", "conv_transpose2d", "conv3d, two videos"]
    + ["conv3d, one video" + form for form in ("", ", temporal", ", pointwise", ", padding by name")],
)
def test_convolutions_of_strided_operands(name: str) -> None:
    convolution, shape = CONVOLUTIONS[name]
    assert_foreseen(convolution, (strided(torch.randn(shape)),))


@pytest.mark.parametrize("name", [name for name, (_, shape) in CONVOLUTIONS.items() if len(shape) > 3])
def test_convolutions_of_channels_that_lie_innermost(name: str) -> None:
    convolution, shape = CONVOLUTIONS[name]
    assert_foreseen(convolution, (channels_last(torch.randn(shape)),))


@needs_wide_vectors
@pytest.mark.parametrize(
    ("convolution", "shape"),
    [
        (nn.Conv2d(4, 32, 3, padding=1), (2, 4, 64, 64)),
        (nn.Conv2d(32, 4, 3, padding=1), (2, 32, 64, 64)),
        (nn.Conv2d(20, 20, 3, padding=1), (2, 20, 64, 64)),
        (nn.Conv3d(4, 32, (1, 3, 3), padding=(0, 1, 1)), (1, 4, 16, 32, 32)),
        (nn.Conv3d(32, 4, 3, padding=1), (1, 32, 16, 32, 32)),
    ],
    ids=["few in", "few out", "a block and a quarter", "video, few in", "video, few out"],
)
def test_channels_that_fill_no_block(convolution: nn.Module, shape: tuple[int, ...]) -> None:
    assert_foreseen(convolution, (torch.randn(shape),))


@pytest.mark.parametrize("dilation", [1, 2])
@pytest.mark.parametrize("groups", [1, 2])
def test_convolutions_in_float64_unfold_their_images(dilation: int, groups: int) -> None:
    convolution = nn.Conv2d(32, 32, 3, padding=dilation, dilation=dilation, groups=groups).double()
    assert_foreseen(convolution, (torch.randn(2, 32, 32, 32).double(),))


QUERY = (2, 4, 512, 64)


@pytest.mark.parametrize("dtype", [torch.bool, torch.float32], ids=["bool", "float32"])
@pytest.mark.parametrize("shape", [(512, 512), (2, 1, 512, 512), (2, 4, 512, 512), (2, 1, 1, 512)], ids=str)
def test_masks_of_attention(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    operands = [torch.randn(QUERY) for _ in range(3)]
    assert_foreseen(Call(F.scaled_dot_product_attention), (*operands, (torch.rand(shape) > 0.2).to(dtype)))


def test_a_mask_that_is_expanded() -> None:
    def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, mask.expand(2, 1, 512, 512))

    assert_foreseen(Call(attend), (*(torch.randn(QUERY) for _ in range(3)), torch.rand(2, 1, 1, 512) > 0.2))


@pytest.mark.parametrize("shape", [(512, 512), (2, 1, 512, 512), (2, 4, 512, 512), (2, 1, 1, 512)], ids=str)
def test_slices_of_a_boolean_mask(shape: tuple[int, ...]) -> None:
    def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q.relu(), k, v, mask) * 2

    operands = (*(torch.randn(QUERY) for _ in range(3)), torch.rand(shape) > 0.2)
    compiled = assert_foreseen(Call(attend), operands, [gw.SliceGroups(memory_budget="50%")])
    assert any(line.startswith("region 0") for line in compiled.report().passes[-1].lines)


def test_slices_of_the_channels_of_a_convolution_have_slices_of_its_weight() -> None:
    """Fewer slices of the input than channels would leave none of it."""

    def workspace_of(channels: int) -> int:
        program = gw.capture(nn.Conv2d(4, channels, 3), (torch.randn(2, 4, 32, 32),))
        (node,) = program.main.calls
        return slice_workspace(node, dim=1, length=8, units=channels)

    assert workspace_of(64) == workspace_of(16) == workspace_of(8)


@pytest.mark.parametrize("window", [0, 300])
@pytest.mark.parametrize("queries", [1, 40, 600])
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("width", [64, 40])
def test_attention_over_full_caches(batch: int, queries: int, window: int, width: int) -> None:
    def attend(q: Tensor, k: Tensor, v: Tensor, position: Tensor, rows: Tensor) -> Tensor:
        return torch.ops.gw.cached_attention(q, k, v, position, rows, scale=0.1, window=window)

    caches = torch.randn(4, 2, 2000, 64), torch.randn(4, 2, 2000, width)
    position = torch.full((batch,), 2000 - queries)
    assert_foreseen(Call(attend), (torch.randn(batch, 6, queries, 64), *caches, position, torch.arange(batch)))


def test_experts_of_the_tokens_that_chose_them() -> None:
    def experts(x: Tensor, index: Tensor, weight: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
        return torch.ops.gw.token_choice_moe(x, index, weight, gate_up, down, activation="silu", combine_dtype=torch.float32)

    index = torch.rand(700, 8).argsort(1)[:, :3].contiguous()
    assert_foreseen(Call(experts), (torch.randn(700, 64), index, torch.rand(700, 3), torch.randn(8, 96, 64), torch.randn(8, 64, 48)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_experts_that_choose_tokens(dtype: torch.dtype) -> None:
    def experts(x: Tensor, index: Tensor, gate: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
        return torch.ops.gw.expert_mlp(x, index, gate, gate_up, down, activation="silu")

    index = torch.rand(2, 8, 700).argsort(-1)[..., :300].contiguous()
    floats = [torch.randn(*shape).to(dtype) for shape in ((2, 700, 64), (8, 96, 64), (8, 64, 48))]
    assert_foreseen(Call(experts), (floats[0], index, torch.rand(2, 8, 300), *floats[1:]))


def test_choices_of_experts() -> None:
    def choice(logits: Tensor) -> tuple[Tensor, Tensor]:
        return torch.ops.gw.expert_choice(logits, None, None, capacity=64, rule="orig")

    assert_foreseen(Call(choice), (torch.randn(4, 512, 64),))


@pytest.mark.parametrize("local", ["state", "raw"])
@pytest.mark.parametrize(("batch", "tokens"), [(1, 1500), (3, 40)])
def test_attention_over_a_chunked_recurrence_has_nothing_for_each_two_tokens(batch: int, tokens: int, local: str) -> None:
    def attend(q: Tensor, k: Tensor, v: Tensor, gate: Tensor) -> Tensor:
        return torch.ops.gw.rat_attention(q, k, v, gate, None, None, None, chunk=16, scale=0.1, window=64, local=local)

    assert_foreseen(Call(attend), (torch.randn(batch, 6, tokens, 64), *(torch.randn(batch, 2, tokens, 64) for _ in range(3))))


@pytest.mark.parametrize(("batch", "tokens"), [(1, 1), (3, 1), (2, 300)])
def test_steps_over_full_caches_of_a_chunked_recurrence(batch: int, tokens: int) -> None:
    def attend(q: Tensor, k: Tensor, v: Tensor, gate: Tensor, *caches: Tensor) -> Tensor:
        return torch.ops.gw.rat_cached_attention(q, k, v, gate, None, None, None, *caches, None, chunk=4, scale=0.1, window=64)[0]

    caches = *(torch.randn(4, 2, 1065, 64) for _ in range(2)), *(torch.randn(4, 2, 64) for _ in range(2))
    given = (torch.randn(batch, 6, tokens, 64), *(torch.randn(batch, 2, tokens, 64) for _ in range(3)))
    assert_foreseen(Call(attend), (*given, *caches, torch.full((batch,), 4000 - tokens), torch.arange(batch)))


@pytest.mark.parametrize("layout", [torch.clone, strided], ids=["contiguous", "strided"])
@pytest.mark.parametrize(
    ("attend", "shapes"),
    [
        (F.scaled_dot_product_attention, [QUERY] * 3),
        (lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True), [QUERY] * 3),
        (lambda q, k, v: F.scaled_dot_product_attention(q, k, v, enable_gqa=True), [QUERY, (2, 2, 512, 64), (2, 2, 512, 64)]),
        (F.scaled_dot_product_attention, [(2, 4, 1, 64), QUERY, QUERY]),
        (F.scaled_dot_product_attention, [(4, 512, 64)] * 3),
        (F.scaled_dot_product_attention, [QUERY, QUERY, (2, 4, 512, 32)]),
    ],
    ids=["plain", "causal", "shared heads", "one query", "three dims", "narrow values"],
)
def test_attention(attend: Callable[..., Tensor], shapes: list[tuple[int, ...]], layout: Callable[[Tensor], Tensor]) -> None:
    assert_foreseen(Call(attend), tuple(layout(torch.randn(shape)) for shape in shapes))


ROWS = (256, 1024)
INDEX = torch.randint(0, 256, ROWS, generator=torch.Generator().manual_seed(0))

OPERATIONS: dict[str, tuple[Callable[..., Any], tuple[int, ...]]] = {
    "max_pool1d": (lambda x: F.max_pool1d(x, 2), X1),
    "max_pool2d": (lambda x: F.max_pool2d(x, 2), X2),
    "max_pool3d": (lambda x: F.max_pool3d(x, 2), X3),
    "avg_pool2d": (lambda x: F.avg_pool2d(x, 2), X2),
    "adaptive_avg_pool2d": (lambda x: F.adaptive_avg_pool2d(x, 4), X2),
    "batch_norm": (nn.BatchNorm2d(32).eval(), X2),
    "instance_norm": (nn.InstanceNorm2d(32), X2),
    "group_norm": (nn.GroupNorm(4, 32), X2),
    "layer_norm": (nn.LayerNorm(1024), ROWS),
    "rms_norm": (nn.RMSNorm(1024), ROWS),
    "softmax": (lambda x: x.softmax(-1), ROWS),
    "log_softmax": (lambda x: x.log_softmax(-1), ROWS),
    "logsumexp": (lambda x: x.logsumexp(-1), ROWS),
    "logsigmoid": (F.logsigmoid, ROWS),
    "cumsum": (lambda x: x.cumsum(0), ROWS),
    "sort": (lambda x: x.sort(-1), ROWS),
    "argsort": (lambda x: x.argsort(-1), ROWS),
    "topk": (lambda x: x.topk(128, -1), ROWS),
    "kthvalue": (lambda x: x.kthvalue(4, -1), ROWS),
    "quantile": (lambda x: x.quantile(0.5, dim=-1), ROWS),
    "var": (lambda x: x.var(-1), ROWS),
    "std": (lambda x: x.std(0), ROWS),
    "gelu": (F.gelu, ROWS),
    "glu": (F.glu, ROWS),
    "cat": (lambda x: torch.cat([x, x], 1), ROWS),
    "stack": (lambda x: torch.stack([x, x]), ROWS),
    "repeat": (lambda x: x.repeat(2, 2), ROWS),
    "gather": (lambda x: x.gather(0, INDEX), ROWS),
    "scatter_add": (lambda x: x.scatter_add(0, INDEX, x), ROWS),
    "index": (lambda x: x[INDEX[0]], ROWS),
    "bucketize": (lambda x: torch.bucketize(x, torch.linspace(-1, 1, 64)), ROWS),
    "cdist": (lambda x: torch.cdist(x, x), ROWS),
    "cosine_similarity": (lambda x: F.cosine_similarity(x, x.flip(0), -1), ROWS),
    "rfft": (lambda x: torch.fft.rfft(x), ROWS),
    "irfft": (lambda x: torch.fft.irfft(x), ROWS),
    "nearest, small": (lambda x: F.interpolate(x, scale_factor=2, mode="nearest"), (2, 32, 32, 32)),
    "nearest": (lambda x: F.interpolate(x, scale_factor=2, mode="nearest"), X2),
    "nearest-exact": (lambda x: F.interpolate(x, scale_factor=2, mode="nearest-exact"), X2),
    "bilinear": (lambda x: F.interpolate(x, scale_factor=2, mode="bilinear"), X2),
    "antialias": (lambda x: F.interpolate(x, size=(24, 24), mode="bilinear", antialias=True), X2),
    "bicubic": (lambda x: F.interpolate(x, scale_factor=2, mode="bicubic"), X2),
    "pad": (lambda x: F.pad(x, (1, 1, 1, 1)), X2),
    "pad, reflect": (lambda x: F.pad(x, (1, 1, 1, 1), mode="reflect"), X2),
    "pad, replicate": (lambda x: F.pad(x, (1, 1, 1, 1), mode="replicate"), X2),
    "pad, circular": (lambda x: F.pad(x, (1, 1, 1, 1), mode="circular"), X2),
    "bmm": (lambda x: torch.bmm(x, x.mT), (8, 128, 256)),
    "matmul": (lambda x: x @ x[0].mT, (8, 128, 256)),
    "matmul of heads": (lambda x: x.unflatten(2, (4, -1)).transpose(1, 2) @ x.unflatten(2, (4, -1)).transpose(1, 2).mT, (4, 128, 256)),
    "matmul of shared heads": (lambda x: x.unflatten(1, (4, -1)) @ x.unflatten(1, (4, -1))[:, :1].mT, (4, 512, 128)),
    "linear": (nn.Linear(1024, 512), ROWS),
    "roll": (lambda x: x.roll(1, 0), ROWS),
    "roll of two dims": (lambda x: x.roll((1, 2), (0, 1)), ROWS),
    "pixel_shuffle": (lambda x: F.pixel_shuffle(x, 2), X2),
}


def run(name: str, layout: Callable[[Tensor], Tensor]) -> None:
    function, shape = OPERATIONS[name]
    model = function if isinstance(function, nn.Module) else Call(function)
    assert_foreseen(model, (layout(torch.randn(shape)),))


@pytest.mark.parametrize("name", OPERATIONS)
def test_operations(name: str) -> None:
    run(name, torch.clone)


@pytest.mark.parametrize(
    "name",
    ["max_pool1d", "max_pool2d", "avg_pool2d", "adaptive_avg_pool2d", "instance_norm", "group_norm", "layer_norm", "rms_norm", "softmax"]
    + ["logsigmoid", "bucketize", "cdist", "nearest", "nearest, small", "bilinear", "pad, reflect", "pad, replicate", "bmm", "linear"],
)
def test_operations_on_strided_operands(name: str) -> None:
    run(name, strided)


@pytest.mark.parametrize("name", [name for name, (_, shape) in OPERATIONS.items() if len(shape) > 3])
def test_operations_on_channels_that_lie_innermost(name: str) -> None:
    run(name, channels_last)


class TokensAsImages(nn.Module):
    """[B, N, C_in] -> [B, C, H, W]: tokens become the places of an image, whose channels lie innermost; any batch stride serves one image."""

    def __init__(self, of_image: nn.Module):
        super().__init__()
        self.embed, self.of_image = nn.Linear(16, 64), of_image

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        return self.of_image(x.transpose(1, 2).reshape(x.size(0), 64, 24, 24))


@pytest.mark.parametrize("images", [1, 4])
@pytest.mark.parametrize(
    "of_image",
    [
        nn.Conv2d(64, 64, 3, padding=1, groups=64),
        nn.Conv2d(64, 64, 3, padding=1),
        nn.GroupNorm(8, 64),
        nn.MaxPool2d(2),
        nn.Upsample(scale_factor=2),
    ],
    ids=["depthwise", "convolution", "group_norm", "max_pool", "upsample"],
)
def test_tokens_that_become_an_image(of_image: nn.Module, images: int) -> None:
    assert_foreseen(TokensAsImages(of_image), (torch.randn(images, 576, 16),))
    slicing = gw.SliceGroups(memory_budget="30%")
    compiled = assert_foreseen(TokensAsImages(of_image), (torch.randn(images, 576, 16),), [slicing])
    assert images == 1 or "sliced" in str(compiled.program)
