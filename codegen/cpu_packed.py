"""Products and convolutions by oneDNN on copies of their weights in its own layout, with the operation that follows them in the same
call.

oneDNN lays a weight out anew on every call, and ATen gives float32 products to MKL. Two threads, here and by ATen: rows [16, 1024] to
[16, 3072] 0.75 ms and 1.43 (AMD Zen 4), one row [1, 512] to [1, 8192] 0.78 ms and 1.23; a 3 x 3 convolution of [1, 512, 8, 8] 1.39 ms
and 2.30.

`torch.ops.mkldnn` is private: what Inductor calls when it freezes weights. `is_available` says whether all that is used is there.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..ir.infer import contiguous_stride, is_channels_last
from ..ir.symbols import hint
from .library_call import LibraryCall

# What oneDNN applies to a result, and its names for it. ReLU is not among them: there it makes 0 of a NaN.
ACTIVATIONS: dict[str, tuple[str, str]] = {
    "none": ("none", ""),
    "silu": ("swish", ""),
    "gelu": ("gelu", "none"),
    "gelu_tanh": ("gelu", "tanh"),
    "sigmoid": ("sigmoid", ""),
    "tanh": ("tanh", ""),
}
_USED = ("_linear_pointwise", "_reorder_linear_weight", "_convolution_pointwise", "_reorder_convolution_weight")


def is_available() -> bool:
    """Whether this torch has oneDNN, its user has not turned it off, and it has the operators that are used here."""
    return bool(torch.backends.mkldnn.is_available() and torch.backends.mkldnn.enabled) and _operators_exist()


def takes(dtype: torch.dtype) -> bool:
    """Whether it is there for products of this type."""
    if dtype == torch.bfloat16:
        return is_available() and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return dtype == torch.float32 and is_available()


@functools.cache
def _operators_exist() -> bool:
    return all(hasattr(torch.ops.mkldnn, name) for name in _USED)


class Pack:
    """A weight in a layout of oneDNN's, as large as the weight: made once, and again when the weight was written to since. Writes through
    `.data` are not seen."""

    def __init__(self, weight: Tensor, lay_out: Callable[[Tensor], Any]):
        self.nbytes = weight.nbytes
        self._lay_out = lay_out
        self._made = self._make(weight)

    def __call__(self, weight: Tensor) -> Any:
        """`weight` as it is now."""
        known, version, packed = self._made
        if known is weight and version == _version(weight):
            return packed
        self._made = made = self._make(weight)
        return made[2]

    def _make(self, weight: Tensor) -> tuple[Tensor, int | None, Any]:
        """One tuple, so that a thread sees the old copy or the new one. What is written meanwhile is seen by the next call."""
        version = _version(weight)
        with torch.no_grad(), torch.inference_mode(False):
            return weight, version, self._lay_out(weight.detach())


def _version(weight: Tensor) -> int | None:
    """How often a tensor was written to, which one made in inference mode does not count."""
    return None if weight.is_inference() else weight._version


class PackedCall(LibraryCall):
    """A library call whose weight is packed: `call(x, weight, bias)`, or `call(x, weight, bias, other)` with what is added or
    multiplied."""

    kind: str
    pack: Pack

    @property
    def packs(self) -> tuple[Pack, ...]:
        """The packs of all its weights."""
        return (self.pack,)

    def layout(self) -> tuple[Any, ...]:
        """Equal for two calls that can share the pack of one weight."""
        raise NotImplementedError

    def lay_out(self, weight: Tensor) -> Tensor:
        raise NotImplementedError

    def __call__(self, x: Tensor, weight: Tensor, bias: Tensor | None = None, other: Tensor | None = None) -> Tensor:
        raise NotImplementedError

    def with_activation(self, activation: str) -> "PackedCall":
        raise NotImplementedError

    def with_operand(self, binary: str) -> "PackedCall | None":
        """The call with one more operand, which is added or multiplied; None where oneDNN has none."""
        raise NotImplementedError

    def alone(self, channels_last: bool) -> "PackedCall":
        """The call without what follows; the channels of images innermost or outside."""
        raise NotImplementedError


class PackedLinear(PackedCall):
    """activation(x W' + bias), or x W' + bias with `other` added ("add") or multiplied ("mul") in, x: [..., K] -> [..., N].

    The weight is W [N, K], or W' [K, N] where `transposed`; its copy is made for `rows` rows of x and serves any number.
    """

    kind = "linear"

    def __init__(self, rows: int, transposed: bool, activation: str = "none", binary: str = "none"):
        assert activation == "none" or binary == "none", "oneDNN takes one of the two"
        self.rows, self.transposed, self.activation, self.binary = rows, transposed, activation, binary
        name, algorithm = ACTIVATIONS[activation]
        self._unary: tuple[Any, ...] = (name, [], algorithm)
        overloads = torch.ops.mkldnn._linear_pointwise
        self._op = overloads.default._op if binary == "none" else overloads.binary._op

    def layout(self) -> tuple[Any, ...]:
        return "linear", self.transposed

    def lay_out(self, weight: Tensor) -> Tensor:
        matrix = weight.t() if self.transposed else weight
        return torch.ops.mkldnn._reorder_linear_weight(matrix.contiguous(), self.rows)

    def __call__(self, x: Tensor, weight: Tensor, bias: Tensor | None = None, other: Tensor | None = None) -> Tensor:
        if other is None:
            return self._op(x, self.pack(weight), bias, *self._unary)
        return self._op(x, other, self.pack(weight), bias, self.binary)

    def scratch(self, x: Tensor, result: Tensor) -> int:
        return 0 if is_dense(x) else hinted_bytes(x)

    def with_activation(self, activation: str) -> "PackedLinear":
        return PackedLinear(self.rows, self.transposed, activation)

    def with_operand(self, binary: str) -> "PackedLinear":
        return PackedLinear(self.rows, self.transposed, binary=binary)

    def alone(self, channels_last: bool) -> "PackedLinear":
        return PackedLinear(self.rows, self.transposed)

    def __str__(self) -> str:
        return f"oneDNN's linear{_suffix(self.activation, self.binary)}"


class PackedConvolution(PackedCall):
    """activation(convolution(x, weight) + bias), over 2 or 3 dims, for images of the size `image` ([B, C, places...]) or any other.

    oneDNN gives its channels innermost; the result stays so where `channels_last`, and is copied to have them outside where not. Only
    the first form takes `other`, which is added.
    """

    kind = "convolution"

    def __init__(
        self,
        image: tuple[int, ...],
        stride: tuple[int, ...],
        padding: tuple[int, ...],
        dilation: tuple[int, ...],
        groups: int,
        activation: str = "none",
        binary: str = "none",
        channels_last: bool = False,
    ):
        assert binary == "none" or (binary == "add" and channels_last and activation == "none")
        self.image, self.activation, self.binary, self.channels_last = image, activation, binary, channels_last
        self._settings = (list(padding), list(stride), list(dilation), groups)
        name, algorithm = ACTIVATIONS[activation]
        self._unary: tuple[Any, ...] = (name, [], algorithm)
        overloads = torch.ops.mkldnn._convolution_pointwise
        self._op = overloads.default._op if binary == "none" else overloads.binary._op
        self._format = torch.channels_last if len(image) == 4 else torch.channels_last_3d

    def layout(self) -> tuple[Any, ...]:
        padding, stride, dilation, groups = self._settings
        return "convolution", self.image, tuple(padding), tuple(stride), tuple(dilation), groups

    def lay_out(self, weight: Tensor) -> Tensor:
        return torch.ops.mkldnn._reorder_convolution_weight(weight.contiguous(), *self._settings, list(self.image))

    def __call__(self, x: Tensor, weight: Tensor, bias: Tensor | None = None, other: Tensor | None = None) -> Tensor:
        if other is not None:
            other = other.contiguous(memory_format=self._format)
            return self._op(x, other, self.pack(weight), bias, *self._settings, "add", 1.0, None, [], None)
        y = self._op(x.contiguous(memory_format=self._format), self.pack(weight), bias, *self._settings, *self._unary)
        return y if self.channels_last else y.contiguous()

    def scratch(self, x: Tensor, result: Tensor) -> int:
        """The copy of the input, or that of the result, which are not there at once; neither where the layout is oneDNN's."""
        if self.channels_last:
            return 0 if is_channels_last(*hinted(x)) else hinted_bytes(x)
        return max(hinted_bytes(x), hinted_bytes(result))

    def with_activation(self, activation: str) -> "PackedConvolution":
        return self._form(activation, "none", self.channels_last)

    def with_operand(self, binary: str) -> "PackedConvolution | None":
        return self._form("none", binary, True) if binary == "add" and len(self.image) == 4 else None

    def with_channels_last(self) -> "PackedConvolution":
        """The call that leaves the channels of its result innermost."""
        return self._form(self.activation, self.binary, True)

    def alone(self, channels_last: bool) -> "PackedConvolution":
        return self._form("none", "none", channels_last)

    def _form(self, activation: str, binary: str, channels_last: bool) -> "PackedConvolution":
        padding, stride, dilation, groups = self._settings
        settings = (tuple(stride), tuple(padding), tuple(dilation), groups)
        return PackedConvolution(self.image, *settings, activation, binary, channels_last)

    def __str__(self) -> str:
        return f"oneDNN's convolution{_suffix(self.activation, self.binary)}"


def hinted(value: Tensor) -> tuple[list[int], list[int]]:
    """Sizes and strides, symbols at their hints."""
    return [hint(n) for n in value.shape], [hint(n) for n in value.stride()]


def is_dense(value: Tensor) -> bool:
    """Whether the elements lie in row-major order without gaps."""
    shape, stride = hinted(value)
    return all(n <= 1 or a == b for n, a, b in zip(shape, stride, contiguous_stride(shape), strict=True))


def is_channels_innermost(value: Tensor) -> bool:
    """Whether images lie with their channels innermost, without gaps, and not as well with these outside."""
    if value.dim() not in (4, 5) or is_dense(value):
        return False
    return is_dense(value.movedim(1, -1))


def hinted_bytes(value: Tensor) -> int:
    """Bytes of a tensor's elements, symbols at their hints."""
    return value.element_size() * torch.Size([hint(n) for n in value.shape]).numel()


def _suffix(activation: str, binary: str) -> str:
    follows = next((name for name in (activation, binary) if name != "none"), None)
    return "" if follows is None else f" with {follows}"
