"""Tiles of the two kernels: the defaults, and those worth a try."""

from collections.abc import Iterator
from dataclasses import dataclass, replace

from ..matmul_tiles import MatmulTile
from ..roofline import known_sizes
from ..targets import Target
from .formats import FEW_ROWS
from .plan import OperandPlan, ProductPlan


@dataclass(frozen=True)
class OperandTile:
    """`m` rows a program, which visits all of k, `k` at a time."""

    m: int
    k: int
    num_warps: int = 4
    num_stages: int = 2

    @property
    def options(self) -> dict[str, int]:
        """What triton takes beside the blocks."""
        return {"num_warps": self.num_warps, "num_stages": self.num_stages}

    def __str__(self) -> str:
        return f"BLOCK_M={self.m} BLOCK_K={self.k} num_warps={self.num_warps} num_stages={self.num_stages}"


def default_operand_tile(plan: OperandPlan, target: Target) -> OperandTile:
    """The tile that is used when nothing was tuned: as many rows as leave a program for each multiprocessor. A rotation takes the
    registers of more."""
    rows = known_sizes(plan)(plan.m)
    if rows <= FEW_ROWS:
        return OperandTile(16, _width(plan, 128 if plan.rotate else 256), 8, 3)
    height = 32 if rows >= 32 * target.multiprocessors and not plan.rotate else 16
    return OperandTile(height, _width(plan, 128), 8 if plan.rotate else 4)


def operand_tiles(plan: OperandPlan, target: Target) -> Iterator[OperandTile]:
    """What a tuner tries, the default first."""
    default = default_operand_tile(plan, target)
    heights = (16,) if known_sizes(plan)(plan.m) <= FEW_ROWS else (16, 32, 64)
    tiles = [OperandTile(m, _width(plan, k), warps, 2) for m in heights for k in (64, 128, 256) for warps in (4, 8) if m * k <= 8192]
    more = [replace(tile, num_stages=3) for tile in tiles if tile.num_warps == 4]
    yield from dict.fromkeys((default, *tiles, *more))


def _width(plan: OperandPlan, k: int) -> int:
    """Blocks of scales and of rotations are whole."""
    return max(k, plan.block, plan.rotate)


def default_product_tile(plan: ProductPlan, target: Target) -> MatmulTile:
    """The tile that is used when nothing was tuned."""
    known = known_sizes(plan)
    m, n = known(plan.m), known(plan.n)
    fitting = [tile for tile in _candidates(plan, target) if _fits(plan, tile, target)]
    if m <= FEW_ROWS:
        return fitting[0]

    def time(tile: MatmulTile) -> float:
        tiles = -(-m // tile.m) * -(-n // tile.n)
        return -(-tiles // target.multiprocessors) * tile.m * tile.n * _PRICE[tile.m, tile.n]

    return min(fitting, key=time)


def product_tiles(plan: ProductPlan, target: Target) -> Iterator[MatmulTile]:
    """What a tuner tries, the default first."""
    default = default_product_tile(plan, target)
    tiles = list(_candidates(plan, target))
    more = [replace(tile, num_stages=tile.num_stages + 1) for tile in tiles]
    more += [replace(tile, num_warps=tile.num_warps // 2) for tile in tiles if tile.num_warps > 4]
    if plan.has_codes and not plan.sum_block and target.copies_blocks:
        more += [MatmulTile(128, 256, 128, 8, 3, per_multiprocessor=0)]
    yield from dict.fromkeys(tile for tile in (default, *tiles, *more) if tile == default or _fits(plan, tile, target))


# Time of a tile's element, in units of the largest tile's: a small tile unpacks its weights more often.
_PRICE = {(128, 128): 1.0, (64, 128): 1.3, (64, 64): 1.7, (32, 64): 2.5, (32, 32): 4.0}


def _candidates(plan: ProductPlan, target: Target) -> Iterator[MatmulTile]:
    if known_sizes(plan)(plan.m) <= FEW_ROWS:
        for columns, k in ((32, 256), (32, 128), (16, 256), (64, 128), (16, 128)):
            yield MatmulTile(16, columns, plan.sum_block or k, 4, 4, per_multiprocessor=0)
        return
    for shape in [shape for shape in _PRICE if shape != (128, 128) or not plan.sum_block]:
        for k in (plan.sum_block,) if plan.sum_block else (128, 64) if plan.has_codes else (64, 128):
            yield MatmulTile(*shape, k, _warps(plan, shape, target), 3, per_multiprocessor=0)


def _warps(plan: ProductPlan, shape: tuple[int, int], target: Target) -> int:
    """A thread has registers for 64 sums: two sets of 32 where those of a block are scaled before they are added."""
    area = shape[0] * shape[1] * (2 if plan.sum_block else 1)
    return 8 if area >= 128 * 128 or target.has_tensor_memory and area >= 64 * 64 else 4


def _fits(plan: ProductPlan, tile: MatmulTile, target: Target) -> bool:
    """Whether operands in flight have room in shared memory, and the weight, unpacked, beside them."""
    in_flight = (tile.m * plan.dtype.itemsize * 8 + tile.n * plan.form.bits) * tile.k * tile.num_stages // 8
    unpacked = tile.n * tile.k * plan.dtype.itemsize if plan.form.is_packed or not plan.has_codes else 0
    return in_flight + unpacked + 4096 <= target.shared_bytes
