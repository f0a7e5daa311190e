"""Whether a block is the operation that it was taken for: both run once on random tokens, choices and weights."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ...ir import Node, Program
from ...ir.symbols import hint
from .blocks import MoEBlock

aten, gw = torch.ops.aten, torch.ops.gw

_ROWS = 32  # tokens that are compared: the operation's body runs all experts on each
_PERIOD = 100_003  # random numbers that weights repeat: large ones take as long to draw as to copy so often; a prime, so no row is another
# Relative to the largest result. A block of another meaning differs by about 1; of the same, by the rounding of its dtype.
_LIMIT = {torch.float64: 1e-10, torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 1e-2}


def disagreement(program: Program, block: MoEBlock) -> str | None:
    """By how much the two differ, in words; None where they agree."""
    draw = torch.Generator().manual_seed(0)
    # Where tokens are sent to slots of experts, all to the same ones shows whether there is room.
    crowds = (False, True) if block.form == "einsum" else (False,)
    found = [_differs(program, block, _operands(block, draw, is_crowd)) for is_crowd in crowds]
    return next((each for each in found if each is not None), None)


def _differs(program: Program, block: MoEBlock, operands: Mapping[Node, Tensor]) -> str | None:
    try:
        expected = block.region.run(program, operands, {aten._grouped_mm.default: _grouped, gw.grouped_mm.default: _grouped})
    except (RuntimeError, IndexError) as error:
        return f"it fails on a choice that a router may make ({(str(error).splitlines() or [type(error).__name__])[0]})"
    x = operands[block.x][:_ROWS]
    index, weight = (operands[node].reshape(-1, block.k)[:_ROWS] for node in (block.index, block.weight))
    matrices = [
        operands[product.weight].transpose(1, 2) if product.transposed else operands[product.weight]
        for product in (block.gated.product, block.down)
    ]
    got = gw.token_choice_moe(x, index, weight, *matrices, activation=block.gated.activation, combine_dtype=block.combine_dtype)
    expected = expected[:_ROWS]
    largest = float(expected.abs().max()) if expected.numel() else 0.0
    difference = float((got - expected).abs().max()) / (largest or 1.0) if expected.numel() else 0.0
    limit = _LIMIT.get(got.dtype, 0.0)
    return None if difference <= limit else f"its results differ by {difference:.2g} of the largest, where {limit:g} is rounding"


def _operands(block: MoEBlock, draw: torch.Generator, is_crowd: bool) -> dict[Node, Tensor]:
    """Random tokens, weights and choices; the same choice of all tokens where it `is_crowd`."""
    shape = [hint(n) for n in block.index.meta["val"].shape]
    scores = torch.rand(1 if is_crowd else shape[0], block.experts, generator=draw).expand(shape[0], -1)
    chosen = scores.argsort(1)[:, : block.k].reshape(shape)
    values: dict[Node, Tensor] = {block.index: chosen.contiguous().to(block.index.meta["val"].device)}
    for node, product in ((block.gated.product.weight, block.gated.product), (block.down.weight, block.down)):
        depth = node.meta["val"].size(1 if product.transposed else 2)
        values[node] = _random(node.meta["val"], draw) / depth**0.5
    for node in (block.x, block.weight):
        values[node] = _random(node.meta["val"], draw)
    return values


def _random(like: Any, draw: torch.Generator) -> Tensor:
    shape = [hint(n) for n in like.shape]
    count = torch.Size(shape).numel()
    numbers = torch.randn(min(count, _PERIOD), generator=draw).to(like.dtype)
    return numbers.repeat(-(-count // max(len(numbers), 1)))[:count].reshape(shape).to(like.device)


def _grouped(x: Tensor, weight: Tensor, offs: Tensor) -> Tensor:
    """`gw.grouped_mm`, whose body multiplies each row with each matrix."""
    y = x.new_zeros(x.size(0), weight.size(2))
    start = 0
    for matrix, end in zip(weight.unbind(0), offs.tolist(), strict=True):
        torch.mm(x[start:end], matrix, out=y[start:end])
        start = end
    return y
