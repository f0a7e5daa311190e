"""Scratch of convolutions: oneDNN's blocked copies, or the unfolded images of ATen's own kernels, and which of the two runs.

`at::native::ConvParams::use_mkldnn` chooses, for float32 by sizes, as measured with torch 2.13 for one to three dims:

    oneDNN  <=>  (is strided or dilated, or B >= 16, or the last two kernel sizes are not 1, or threads > 1)
                 and (groups > 1, or the last two kernel sizes > 3, or B > 1, or the first four sizes of the input > 20480 in all)

where a 1-d convolution is the 2-d one over [B, C, 1, L]. Of a video's five sizes the width does not count.
"""

from typing import Any

import torch

from ..program import Node
from ..symbols import hint
from .operands import (
    WHOLE,
    Part,
    Workspace,
    is_channels_last,
    is_contiguous,
    is_dense_channels_last,
    is_one_dim,
    nbytes,
    numel,
    product,
    sizes,
    strides,
    tensor,
)

_BLOCK = 16  # channels of a block where vectors have 512 bits
_SMALL_INPUT = 20480
_TRANSPOSED = (torch.ops.aten.conv_transpose1d.default, torch.ops.aten.conv_transpose2d.input, torch.ops.aten.conv_transpose3d.input)


def convolution(a: dict[str, Any], node: Node, threads: int, part: Part = WHOLE) -> Workspace:
    """The scratch of `conv1d` to `conv3d`, our own kernel of the latter included."""
    call = _Call(a, node, part)
    if not _is_ours(node, call):
        return call.blocked(threads) if call.takes_onednn(threads, call.input) else call.unfolded()
    if call.is_pointwise and call.groups == 1:
        return Workspace(call.copied_to_flatten(2))
    if not call.is_temporal:
        return call.blocked(threads, holds_copy=call.input[0] > 1 or call.groups > 1)
    call.copied = call.copied_to_flatten(3) or call.copied
    return call.blocked(threads) if call.takes_onednn(threads, call.flat) else call.unfolded()


def transposed_convolution(a: dict[str, Any], node: Node, threads: int, part: Part = WHOLE) -> Workspace:
    """The scratch of `conv_transpose1d` to `conv_transpose3d`: oneDNN's result exists twice in blocks; ATen's own kernel has a
    column [C_out / groups * prod(k)] for each place of the input, for all images, or for one video and a one for each place."""
    call = _Call(a, node, part)
    call.is_plain = False
    if call.takes_onednn(threads, call.input):
        return call.transposed_blocked(threads)
    columns = call.input_places * call.weight_sizes[1] * product(call.kernel) * call.itemsize
    if len(call.kernel) < 3:
        return Workspace(columns + call.copied)
    return Workspace((columns + call.places * call.itemsize) // call.images + call.copied)


def _is_ours(node: Node, call: "_Call") -> bool:
    """Whether `codegen.cpu_convolutions` serves the call, and not as ATen would."""
    aten = torch.ops.aten
    is_matrix = call.is_pointwise and call.groups == 1 and node.target in (aten.conv1d.default, aten.conv2d.default)
    is_float = call.dtype is torch.float32 and call.is_batched and not call.is_channels_last
    return is_float and (is_matrix or node.target is aten.conv3d.default)


class _Call:
    """One call on a slice, its sizes with the batch dim that an input may lack."""

    def __init__(self, a: dict[str, Any], node: Node, part: Part):
        x, weight = a["input"], a["weight"]
        self.x = x
        self.weight_sizes = sizes(weight)
        self.kernel = self.weight_sizes[2:]
        channels_dim = len(sizes(node)) - len(self.kernel) - 1
        is_feature = part.dim == channels_dim and part.length < part.units  # a slice of channels has one of the weight
        if is_feature:
            of_weight = 1 if node.target in _TRANSPOSED else 0
            self.weight_sizes[of_weight] = part.of(self.weight_sizes[of_weight])
        self.input = sizes(x) if is_feature else part.sizes(x)
        self.is_batched = len(self.input) == len(self.weight_sizes)
        self.input = [1] * (len(self.weight_sizes) - len(self.input)) + self.input
        self.images = max(self.input[0], 1)  # what a call on none of them takes is 0 all the same
        self.flat = [*self.input[:3], product(self.input[3:])]
        self.dtype, self.itemsize = tensor(x).dtype, tensor(x).dtype.itemsize
        self.groups = hint(a["groups"])
        self.is_strided = _is_not(a["stride"], 1)
        self.is_dilated = _is_not(a["dilation"], 1)
        self.is_padded = a["padding"] == "same" or _is_not(a["padding"], 0)
        self.is_pointwise = product(self.kernel) == 1 and not self.is_strided and not self.is_padded
        rest = [_is_not(_tail(a[name]), neutral) for name, neutral in (("stride", 1), ("padding", 0))]
        self.is_temporal = self.kernel[1:] == [1, 1] and not any(rest) and a["padding"] != "same"
        channels = sizes(node)[channels_dim]
        places = numel(node) // channels
        self.channels = part.of(channels) if is_feature else channels
        self.places = places if is_feature else part.of(places)  # of the results of all images
        self.input_places = product(self.input) // self.input[1]
        self.input_bytes = product(self.input) * self.itemsize
        self.result_bytes = self.places * self.channels * self.itemsize
        self.is_channels_last = len(self.kernel) > 1 and (is_channels_last(x) or is_channels_last(weight))
        is_as_wanted = is_dense_channels_last(x) if self.is_channels_last else is_contiguous(x)
        self.part = part
        self.copied = 0 if is_as_wanted and not part.is_strided(x) else self.input_bytes
        self.is_plain = self.groups == 1 and self.input[1] < _BLOCK and product(self.kernel) > 1
        self.is_depthwise = self.groups > 1 and self.weight_sizes[1] == 1
        self.weight_bytes = part.of(nbytes(weight)) if is_feature else nbytes(weight)

    def copied_to_flatten(self, start: int) -> int:
        """Bytes of the copy that views the dims from `start` on as one, where strides do not."""
        is_cut = self.part.is_strided(self.x) and self.part.dim > start
        return 0 if is_one_dim(sizes(self.x)[start:], strides(self.x)[start:]) and not is_cut else self.input_bytes

    def takes_onednn(self, threads: int, input_sizes: list[int]) -> bool:
        if self.dtype in (torch.bfloat16, torch.float16):
            return True
        if self.dtype is not torch.float32:
            return False
        last = ([1, *self.kernel])[-2:]
        is_worth_it = self.is_strided or self.is_dilated or input_sizes[0] >= 16 or last != [1, 1] or threads > 1
        is_large = self.groups > 1 or min(last) > 3 or input_sizes[0] > 1 or product(input_sizes[:4]) > _SMALL_INPUT
        return is_worth_it and is_large

    @property
    def input_blocks(self) -> int:
        return self.input_places * self._padded(self.input[1]) * self.itemsize

    @property
    def result_blocks(self) -> int:
        return self.places * self._padded(self.channels) * self.itemsize

    @property
    def weight_blocks(self) -> int:
        if self.groups > 1:
            return self.weight_bytes
        inputs = self.input[1] if self.is_plain else self._padded(self.weight_sizes[1])
        return self._padded(self.weight_sizes[0]) * inputs * product(self.kernel) * self.itemsize

    def _padded(self, channels: int) -> int:
        """Channels with those that fill the last block; groups of several channels take blocks that fit."""
        return channels if self.groups > 1 and not self.is_depthwise else -(-channels // _BLOCK) * _BLOCK

    def blocked(self, threads: int, holds_copy: bool = True) -> Workspace:
        """oneDNN: input, weight and result in blocks of channels, then the result laid out densely beside its blocks, for depthwise
        kernels over three dims twice. An input of fewer channels than a block is read as it is, by kernels that see more than one
        place; channels that lie innermost always are. A pointwise kernel with a stride over one or two dims has the places that it
        sees gathered first, an image a thread. A copy made because of strides lives to the end where the caller of oneDNN `holds` it."""
        if self.is_channels_last:
            return Workspace(self.copied, self.weight_blocks + (self.weight_bytes if product(self.kernel) > 1 else 0))
        source = 0 if self.is_plain else self.input_blocks
        if product(self.kernel) == 1 and self.is_strided and len(self.kernel) < 3:
            source += threads * (self.places // self.images) * self.input[1] * self.itemsize
        source += 0 if holds_copy else self.copied
        dense = 2 if self.is_depthwise and len(self.kernel) == 3 and self.channels == self.input[1] else 1
        after = dense * self.result_blocks
        during = source + self.result_blocks - self.result_bytes
        kept = self.copied if holds_copy else 0
        return Workspace(during + kept, self.weight_blocks) if during + self.weight_blocks > after else Workspace(after + kept)

    def transposed_blocked(self, threads: int) -> Workspace:
        """oneDNN: the result in blocks, and once more laid out. Channels that lie innermost are read and written as they lie, with a
        stride by way of an image a thread."""
        if self.is_channels_last:
            images = threads * self.input_bytes // self.images if self.is_strided else 0
            return Workspace(self.copied, 2 * self.weight_bytes + images)
        after = 2 * self.result_blocks
        during = self.input_blocks + after - self.result_bytes
        if during + self.weight_blocks > after:
            return Workspace(during + self.copied, self.weight_blocks)
        return Workspace(after + self.copied)

    def unfolded(self) -> Workspace:
        """ATen: a column [C_in * prod(k)] for each place of the result; of one image at a time where the kernel is dilated. All
        but the plain 3-d kernel take groups one by one, each with its copy of the input, and join the results. Where channels lie
        innermost, the weight of a 2-d kernel is laid out like them, and for a 3-d kernel the input as if they did not."""
        columns = 0 if self.is_pointwise and not self.is_dilated else self.places * self.input[1] * product(self.kernel) * self.itemsize
        columns //= self.images if self.is_dilated else 1
        if self.is_channels_last and len(self.kernel) == 3:
            columns += self.input_bytes
        weight = self.weight_bytes if self.is_channels_last and product(self.kernel) > 1 and len(self.kernel) < 3 else 0
        if self.groups == 1 or (len(self.kernel) == 3 and not self.is_dilated):
            return Workspace(columns + self.copied, weight)
        return Workspace(max((columns + self.input_bytes) // self.groups, self.result_bytes) + self.copied)


def _is_not(value: Any, neutral: int) -> bool:
    return any(hint(n) != neutral for n in (value if isinstance(value, (list, tuple)) else [value]) if not isinstance(n, str))


def _tail(value: Any) -> Any:
    """A setting of the dims after the first; one number is that of all."""
    return value[1:] if isinstance(value, (list, tuple)) and len(value) > 1 else value
