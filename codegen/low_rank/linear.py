"""`gw.lowrank_linear` by the kernel in C++, or by the operator's body where the kernel has no form for its operands.

Weights are read where they lie, in the layout of the file: nothing is packed, so nothing has to follow when a weight is written to, and
the process holds the bits that the format says.
"""

import struct
from array import array
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...ir.low_bit.formats import FORMATS, Format, longest_sum
from ...ir.low_bit.hadamard import rotate as rotated
from ...ir.low_bit.quantize import fake_quantize
from .library import library
from .without_compiler import int8_product

_CALL = struct.Struct("=30qd")  # `Call` in native/call.h, and where in it lies what differs between two calls of a layer:
_X, _X_STRIDE, _PREPARED, _ROWS, _Y, _THREADS, _SCRATCH = 0, 2, 5, 6, 9, 28, 29
_TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.uint8: 2, torch.float8_e4m3fn: 3}
_FLOATS = (torch.float32, torch.bfloat16)
_CODES = {("int", 8): 0, ("int", 4): 1, ("e2m1", 4): 2, ("e4m3", 8): 3}
_WEIGHTS = {name: form for name, form in FORMATS.items() if form.weight and (form.element, form.bits) in _CODES}
# Activations that the kernel quantizes itself, to codes that meet those of integer weights: sums are exact.
_ACTIVATIONS = {name: FORMATS[name] for name in ("int8-token", "int4-g16", "int4-g32", "int4-g64", "int4-g128", "uint4-g64")}
_body = torch.ops.gw.lowrank_linear.default
_MOST_CODES = longest_sum(127, 127)  # of a block: their products are summed in 32 bits
_LINE = 64  # bytes of a line of the cache, where scratch begins


def lowrank_linear(
    x: Tensor, weight_q: Tensor, weight_scale: Tensor, down: Tensor | None, up: Tensor | None, bias: Tensor | None, **options: Any
) -> Tensor:
    """`gw.lowrank_linear`, its attributes and the rarer operands in `options`. Codes of activations are the reference's; what the kernel
    does not quantize or rotate, the reference does, and the kernel multiplies."""
    told = _DEFAULTS | options
    smooth, scale2 = told["smooth"], told["weight_scale2"]
    if not is_fit(x, weight_q, weight_scale, down, up, bias, told["weight_format"], smooth, scale2):
        return _body(x, weight_q, weight_scale, down, up, bias, **options)
    if library() is None:
        found = int8_product(x, weight_q, weight_scale, down, up, bias, **told)
        return _body(x, weight_q, weight_scale, down, up, bias, **options) if found is None else found
    layer = Columns(weight_q, weight_scale, scale2, up, bias)
    return products(x, smooth, down, [layer], Options(*(told[name] for name in Options._fields)))[0]


_DEFAULTS = {"act_format": "none", "smooth": None, "weight_scale2": None, "act_scale2": 1.0, "act_shift": 0.0, "rotate": 0}


def is_fit(
    x: Tensor,
    weight_q: Tensor,
    weight_scale: Tensor,
    down: Tensor | None,
    up: Tensor | None,
    bias: Tensor | None,
    weight_format: str,
    smooth: Tensor | None,
    weight_scale2: Tensor | None,
) -> bool:
    """Whether the operands have the types and the very shapes that the kernel reads; the body also takes what broadcasts to them."""
    form = _WEIGHTS.get(weight_format)
    if form is None or x.device.type != "cpu" or x.dtype not in _FLOATS or x.dim() == 0 or x.size(-1) == 0:
        return False
    k, n = x.size(-1), weight_q.size(0)
    group = form.group_of(k)
    if weight_q.shape != (n, k // 2 if form.is_packed else k) or weight_scale.shape != (n, k // group) or k % group:
        return False
    if group > _MOST_CODES:
        return False
    if weight_q.element_size() != 1 or weight_scale.dtype not in _TYPES:
        return False
    if weight_scale2 is not None and (weight_scale2.dtype != torch.float32 or weight_scale2.shape not in ((1,), (n,))):
        return False
    rank = 0 if down is None else down.size(0)
    expected = ((down, (rank, k)), (up, (n, rank)), (bias, (n,)), (smooth, (k,)))
    return all(tensor is None or (tensor.dtype in _FLOATS and tensor.shape == shape) for tensor, shape in expected)


class Columns(NamedTuple):
    """What of a layer has output columns: weight [N, K] with its scales, up [N, r], bias [N]."""

    codes: Tensor
    scale: Tensor
    scale2: Tensor | None
    up: Tensor | None
    bias: Tensor | None


class Options(NamedTuple):
    """What layers of a site have in common beside their operands, as `gw.lowrank_linear` names it."""

    weight_format: str
    act_format: str
    act_scale2: float
    act_shift: float
    rotate: int


def products(x: Tensor, smooth: Tensor | None, down: Tensor | None, layers: Sequence[Columns], options: Options) -> list[Tensor]:
    """The results of layers that read the same rows through the same `smooth` and `down`, in formats that are the same: rows are
    quantized and multiplied by `down` once. The library is there, and the operands are fit."""
    return Products(x, smooth, down, layers, options)(x)


class Products:
    """`products` of rows that are typed like x, for other rows: what the kernel is told of all else is put together once.

    It holds for the tensors as they lie now: `lie_as` says whether others are these. Of those that lie otherwise than the kernel reads
    there are copies, which are of one call."""

    def __init__(self, x: Tensor, smooth: Tensor | None, down: Tensor | None, layers: Sequence[Columns], options: Options):
        operands = (smooth, down, *(each for layer in layers for each in layer))
        self._lie = _places(operands) if all(each is None or each.is_contiguous() for each in operands) else None
        self._widths = [layer.codes.size(0) for layer in layers]
        form = _WEIGHTS[options.weight_format]
        codes = _ACTIVATIONS.get(options.act_format) if form.element == "int" and form.scale in ("f32", "model") else None
        is_prepared = bool(options.rotate) or (codes is None and options.act_format != "none")
        self._prepare = (smooth, options, "none" if codes else options.act_format) if is_prepared else None
        of_kernel, shift = (None, 0.0) if is_prepared else (_dense(smooth), options.act_shift)
        down = _dense(down)
        self._layers = [Columns(*map(_dense, layer)) for layer in layers]  # held, as is what their addresses stand for
        self._held = (of_kernel, down)
        depth = x.size(-1)
        told = [
            (
                0, _TYPES[x.dtype], 0, *_typed(of_kernel), 0, 0, depth, layer.codes.size(0), 0, *_columns(layer, form, depth, down),
                *_quantizer(codes, x.dtype, depth), 0, 0,
            )
            for layer in self._layers
        ]  # fmt: skip
        self._told = [array("q", _CALL.pack(*fields, shift)) for fields in told]
        self._scratch: dict[tuple[int, int], int] = {}

    def lie_as(self, operands: Sequence[Tensor | None]) -> bool:
        """Whether smooth, down and the layers' columns are those that it was made for."""
        return _places(operands) == self._lie

    def __call__(self, x: Tensor) -> list[Tensor]:
        results = [torch.empty(*x.shape[:-1], width, dtype=x.dtype) for width in self._widths]
        rows = x if x.dim() == 2 else x.reshape(-1, x.size(-1))
        count, threads = rows.size(0), torch.get_num_threads()
        if count == 0:
            return results
        if rows.stride(1) != 1:
            rows = rows.contiguous()
        prepared = None if self._prepare is None else _prepared(rows, *self._prepare)
        place, stride = rows.data_ptr(), rows.stride(0)
        calls = [array("q", told) for told in self._told]
        for call, y in zip(calls, results, strict=True):
            call[_X], call[_X_STRIDE], call[_ROWS], call[_Y], call[_THREADS] = place, stride, count, y.data_ptr(), threads
            if prepared is not None:
                call[_PREPARED] = prepared.data_ptr()
        native = library()
        needed = self._scratch.get((count, threads))
        if needed is None:
            needed = self._scratch[count, threads] = native.scratch_bytes(b"".join(calls), len(calls)) + _LINE
        scratch = torch.empty(needed, dtype=torch.uint8)
        begin = -(-scratch.data_ptr() // _LINE) * _LINE
        for call in calls:
            call[_SCRATCH] = begin
        native.lowrank_linear(b"".join(calls), len(calls))
        return results


def _places(operands: Sequence[Tensor | None]) -> list[int]:
    """What tells tensors apart from others that lie elsewhere or otherwise; those of a model do not change in size or type."""
    return [0 if tensor is None else tensor.data_ptr() for tensor in operands]


def _prepared(x: Tensor, smooth: Tensor | None, options: Options, act_format: str) -> Tensor:
    """float32 [M, K]: what meets the weight, as the operator's body has it."""
    xs = x.float() + options.act_shift if options.act_shift else x.float()
    if smooth is not None:
        xs = xs * smooth.float()
    if options.rotate:
        xs = rotated(xs, options.rotate, weight=False)
    return fake_quantize(xs, act_format, x.dtype, options.act_scale2).contiguous()


def _columns(layer: Columns, form: Format, k: int, down: Tensor | None) -> tuple[int, ...]:
    scale2 = (0, 0) if layer.scale2 is None else (layer.scale2.data_ptr(), layer.scale2.numel())
    branch = (0, 0, 0, 0, 0) if down is None or layer.up is None else (*_typed(down), *_typed(layer.up), down.size(0))
    code = _CODES[form.element, form.bits]
    return layer.codes.data_ptr(), code, *_typed(layer.scale), form.group_of(k), *scale2, *branch, *_typed(layer.bias)


def _quantizer(form: Format | None, dtype: torch.dtype, depth: int) -> tuple[int, int, int, int]:
    """The largest code, whether codes are unsigned, the elements of a block, and how its scale is stored."""
    if form is None:
        return 0, 0, 0, 0
    scale = dtype if form.scale == "model" else torch.float32
    return int(form.qmax), form.element == "uint", form.group_of(depth), _TYPES[scale]


def _typed(tensor: Tensor | None) -> tuple[int, int]:
    return (0, 0) if tensor is None else (tensor.data_ptr(), _TYPES[tensor.dtype])


def _dense(tensor: Tensor | None) -> Tensor | None:
    return tensor if tensor is None or tensor.is_contiguous() else tensor.contiguous()
