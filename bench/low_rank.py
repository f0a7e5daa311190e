"""`gw.lowrank_linear` against what a user would pick in its place.

Section "kernels": one layer on a CPU. Rows are named FORMAT ACTIVATIONS, x's dtype, rows, [N, K]. Ours has a branch of rank 32 and a bias
where the name says "branch"; peers have none, only the bias, so that ratios to them say what the whole layer costs. Peers: `F.linear` in
bfloat16, eager and compiled (weights frozen, so that oneDNN packs them), and in float32; "onednn int8": rows quantized by eager calls, then
oneDNN's u8 x s8 product on a packed weight; "int4pack": ATen's product of bfloat16 rows by int4 weights; "no branch": ours without.

Sections "networks", "sampler", "language" and "calibration": `low_rank_networks.py` says what they are.

    python bench/low_rank.py [--quick] [--section kernels|networks|sampler|language|calibration] [--network TEXT] [--json FILE]
"""

import argparse
import multiprocessing
import os
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial

import low_rank_networks
import torch
import torch.nn.functional as F
from harness import Bench
from torch import Tensor

from graphwright.codegen.low_rank.library import library
from graphwright.codegen.low_rank.linear import Columns, Options, Products, lowrank_linear
from graphwright.ir.low_bit import quantize

PEERS = ("bf16 eager", "bf16 compiled", "fp32 eager", "onednn int8", "int4pack", "no branch", "bf16 weights")
RANK = 32
ROWS = (1, 16, 64, 512, 2048)
SHAPES = ((3072, 3072), (768, 3072))  # [N, K]
DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16}
Call = Callable[[], object]


def main() -> None:
    peers = dict.fromkeys(PEERS, "torch") | low_rank_networks.PEERS
    bench = Bench("low_rank", peers=peers, add_arguments=_arguments)
    for section in bench.options.section or SECTIONS:
        SECTIONS[section](bench)
    bench.finish()


def _arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--section", action="append", choices=SECTIONS, help="only this one (may be repeated)")
    parser.add_argument("--network", action="append", metavar="TEXT", help="only networks with TEXT in their names (may be repeated)")


# --- kernels ---------------------------------------------------------------------------------------------------------------


def kernels(bench: Bench) -> None:
    """One layer: time by rows, what the branch costs, and the memory of weights."""
    if library() is None:
        bench.note("kernels: no C++ compiler, so there is no kernel of ours: install g++")
        return
    torch.manual_seed(0)
    shapes, rows = (SHAPES[1:], (1, 64)) if bench.quick else (SHAPES, ROWS)
    for n, k in shapes:
        weight = torch.randn(n, k) / k**0.5
        for m in rows:
            for dtype in DTYPES:
                _int8_case(bench, weight, m, dtype)
        _int4_case(bench, weight, 1, "none")
        _int4_case(bench, weight, rows[-1] if bench.quick else 512, "int4-g64")
    _memory_of_weights(bench, 2 if bench.quick else 8, *shapes[0])


@dataclass(frozen=True)
class Layer:
    """A layer in a format with a bias; `call(x)` with its branch or without."""

    weight_format: str
    act_format: str
    weight: Tensor
    dtype: torch.dtype

    def calls(self, x: Tensor) -> tuple[Call, Call]:
        """With the branch, and without."""
        quantized = quantize(self.weight.to(self.dtype), self.weight_format)
        n, k = self.weight.shape
        down, up, bias = (torch.randn(*shape).to(self.dtype) / 8 for shape in ((RANK, k), (n, RANK), (n,)))
        options = Options(self.weight_format, self.act_format, 1.0, 0.0, 0)

        def call(down: Tensor | None, up: Tensor | None) -> Call:
            columns = Columns(quantized.codes, quantized.scale, None, up, bias)
            return partial(_as_compiled, Products(x, None, down, [columns], options), (None, down, *columns), x)

        return call(down, up), call(None, None)


def _as_compiled(products: Products, operands: tuple[Tensor | None, ...], x: Tensor) -> Tensor:
    """A call as compiled programs make it."""
    assert products.lie_as(operands)
    return products(x)[0]


def _int8_case(bench: Bench, weight: Tensor, m: int, dtype: str) -> None:
    x = torch.randn(m, weight.size(1)).to(DTYPES[dtype])
    branched, plain = Layer("int8-channel", "int8-token", weight, x.dtype).calls(x)
    peers = {"no branch": plain, **_floats(weight, x), "onednn int8": _onednn(weight, x)}
    bench.time(f"int8 int8 branch, {dtype}, {m}, {list(weight.shape)}", branched, peers)


def _int4_case(bench: Bench, weight: Tensor, m: int, act_format: str) -> None:
    x = torch.randn(m, weight.size(1)).bfloat16()
    branched, plain = Layer("int4-g64", act_format, weight, x.dtype).calls(x)
    peers = {"no branch": plain, **_floats(weight, x), "int4pack": _int4pack(weight, x)}
    bench.time(f"int4-g64 {act_format} branch, bf16, {m}, {list(weight.shape)}", branched, peers)


def _floats(weight: Tensor, x: Tensor) -> dict[str, Call]:
    """The float layer, eager and compiled; rows in bfloat16 for bfloat16 weights, and in float32 for float32 ones."""
    bias = torch.randn(weight.size(0))
    x32, x16, w16, b16 = x.float(), x.bfloat16(), weight.bfloat16(), bias.bfloat16()
    return {
        "bf16 eager": lambda: F.linear(x16, w16, b16),
        "bf16 compiled": _compiled(w16, b16, x16),
        "fp32 eager": lambda: F.linear(x32, weight, bias),
    }


def _compiled(weight: Tensor, bias: Tensor, x: Tensor) -> Call:
    linear = torch.nn.Linear(weight.size(1), weight.size(0)).to(weight.dtype).requires_grad_(False)
    linear.weight.copy_(weight)
    linear.bias.copy_(bias)
    compiled = torch.compile(linear, options={"freezing": True})

    def call() -> object:
        with torch.no_grad():
            return compiled(x)

    call()
    return call


def _onednn(weight: Tensor, x: Tensor) -> Call:
    """Per token: u8 with zero point 128 (s8 rows run oneDNN's reference), x_scale 1, and the rows scaled afterwards."""
    quantized = quantize(weight, "int8-channel")
    packed = torch.ops.onednn.qlinear_prepack(quantized.codes, list(x.shape))
    scale, zeros = quantized.scale.flatten(), torch.zeros(weight.size(0), dtype=torch.int32)
    bias = torch.randn(weight.size(0))

    def call() -> Tensor:
        f = x.float()
        of_row = f.abs().amax(1, keepdim=True) / 127
        codes = (f / of_row).round_().add_(128).to(torch.uint8)
        y = torch.ops.onednn.qlinear_pointwise(codes, 1.0, 128, packed, scale, zeros, None, 1.0, 0, torch.float32, "none", [], "")
        return y.mul_(of_row).add_(bias).to(x.dtype)

    return call


def _int4pack(weight: Tensor, x: Tensor) -> Call:
    n, k = weight.shape
    codes = torch.randint(0, 16, (n, k), dtype=torch.int32)
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 1)
    scales = torch.rand(k // 64, n, 2).bfloat16()
    return lambda: torch.ops.aten._weight_int4pack_mm_for_cpu(x, packed, 64, scales)


def _memory_of_weights(bench: Bench, count: int, n: int, k: int) -> None:
    """Resident bytes of `count` layers that have been called, against the same in bfloat16, each in a process of its own."""
    ours, theirs = (_apart(_resident, make, count, n, k) for make in (_low_layer, _float_layer))
    bench.row(f"{count} layers int4-g64 branch, {[n, k]}", "resident bytes", "B", ours, {"bf16 weights": theirs})


def _apart(function: Callable[..., int], *arguments: object) -> int:
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def _resident(make: Callable[[int, int], list[Tensor]], count: int, n: int, k: int) -> int:
    """What `count` layers add to the process once they have been called."""
    make(64, 64)  # loads what a first call does
    before = _resident_bytes()
    held = [make(n, k) for _ in range(count)]
    grown = _resident_bytes() - before
    del held
    return grown


def _low_layer(n: int, k: int) -> list[Tensor]:
    codes, scale = torch.randint(0, 256, (n, k // 2), dtype=torch.uint8), torch.ones(n, k // 64, dtype=torch.bfloat16)
    up, down, bias = (torch.ones(*shape, dtype=torch.bfloat16) for shape in ((n, RANK), (RANK, k), (n,)))
    lowrank_linear(torch.ones(1, k, dtype=torch.bfloat16), codes, scale, down, up, bias, weight_format="int4-g64")
    return [codes, scale, up, down, bias]


def _float_layer(n: int, k: int) -> list[Tensor]:
    weight = torch.ones(n, k, dtype=torch.bfloat16)
    F.linear(torch.ones(1, k, dtype=torch.bfloat16), weight)
    return [weight]


def _resident_bytes() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


SECTIONS: dict[str, Callable[[Bench], None]] = {
    "kernels": kernels,
    "networks": low_rank_networks.networks,
    "sampler": low_rank_networks.sampler,
    "language": low_rank_networks.language,
    "calibration": low_rank_networks.calibration,
}

if __name__ == "__main__":
    main()
