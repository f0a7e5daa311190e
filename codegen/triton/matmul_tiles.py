"""Tiles of products of matrices: the default, and those worth a try.

The default is the one with the least work in the busiest multiprocessor: tiles are dealt out in rounds, and a small tile reads its
operands more often than a large one.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch

from .matmul_plan import MatmulPlan, Side
from .roofline import known_sizes
from .targets import Target
from .values import FLOAT8


@dataclass(frozen=True)
class MatmulTile:
    """[m, n] elements of the result a tile, k at a time. `group`: rows of tiles that are visited together. `per_multiprocessor`: as
    many programs as that take the tiles in turns; 0 for a program a tile. `flatten`: the next tile's loads begin before this one ends.
    """

    m: int
    n: int
    k: int
    num_warps: int = 4
    num_stages: int = 3
    group: int = 8
    per_multiprocessor: int = 1
    flatten: bool = False

    @property
    def options(self) -> dict[str, int]:
        """What triton takes beside the blocks."""
        return {"num_warps": self.num_warps, "num_stages": self.num_stages}

    def __str__(self) -> str:
        return (
            f"BLOCK_M={self.m} BLOCK_N={self.n} BLOCK_K={self.k} GROUP={self.group} num_warps={self.num_warps} "
            f"num_stages={self.num_stages} per_multiprocessor={self.per_multiprocessor} flatten={self.flatten}"
        )


# By the elements that a tile has: [m, n, k] for 16-bit operands, warps of 32 lanes, stages.
_HOPPER = (
    MatmulTile(128, 256, 64, 8, 3),
    MatmulTile(128, 128, 64, 8, 4, flatten=True),
    MatmulTile(64, 128, 64, 4, 4, per_multiprocessor=2),
    MatmulTile(64, 64, 128, 4, 3, per_multiprocessor=0),
    MatmulTile(64, 32, 128, 4, 4, per_multiprocessor=0),
)
_BLACKWELL = tuple(replace(tile, num_warps=8) if tile.m * tile.n >= 4096 else tile for tile in _HOPPER)  # of 128 registers a thread
_AMPERE = (
    MatmulTile(128, 128, 32, 8, 3, per_multiprocessor=0),
    MatmulTile(64, 128, 32, 4, 4, per_multiprocessor=0),
    MatmulTile(64, 64, 64, 4, 3, per_multiprocessor=0),
    MatmulTile(64, 32, 64, 4, 4, per_multiprocessor=0),
    MatmulTile(64, 64, 32, 4, 2, per_multiprocessor=0),
    MatmulTile(32, 32, 32, 4, 2, per_multiprocessor=0),
)
_FEW_ROWS = (
    MatmulTile(16, 32, 256, 4, 4, 1, 0),
    MatmulTile(16, 32, 128, 4, 4, 1, 0),
    MatmulTile(16, 64, 128, 4, 4, 1, 0),
    MatmulTile(16, 16, 256, 4, 4, 1, 0),
    MatmulTile(16, 16, 128, 4, 4, 1, 0),
)
_FLOAT32 = (MatmulTile(64, 64, 16, 8, 3, per_multiprocessor=0), MatmulTile(32, 32, 16, 4, 3, per_multiprocessor=0))
_SMALLEST = MatmulTile(16, 16, 32, 4, 2, per_multiprocessor=0)  # fits everywhere
_BARRIERS = 4096  # bytes of shared memory beside operands
# Time of a tile's element, in units of the largest tile's.
_PRICE = {(128, 256): 1.0, (128, 128): 1.1, (64, 128): 1.4, (64, 64): 1.8, (64, 32): 2.8}


def default_matmul_tile(plan: MatmulPlan, target: Target) -> MatmulTile:
    """The tile that is used when nothing was tuned."""
    known = known_sizes(plan)
    m, n, batch = known(plan.m), known(plan.n), known(plan.num_batch)
    fitting = [tile for tile in _candidates(plan, m, target) if _fits(plan, tile, target) and _is_roomy(plan, tile, target)]
    fitting = fitting or [_SMALLEST]
    if _has_few_rows(m):
        wide = [tile for tile in fitting if tile.n > 16]
        return wide[0] if wide and n >= 16 * target.multiprocessors else fitting[-1]
    if _is_exact_float32(plan):
        return fitting[0] if min(m, n) > 32 else fitting[-1]

    def time(tile: MatmulTile) -> float:
        tiles = batch * -(-m // tile.m) * -(-n // tile.n)
        return -(-tiles // target.multiprocessors) * tile.m * tile.n * _PRICE.get((tile.m, tile.n), 4.0)

    return min(fitting, key=time)


def candidate_tiles(plan: MatmulPlan, target: Target) -> Iterator[MatmulTile]:
    """What a tuner tries, the default first."""
    default = default_matmul_tile(plan, target)
    tiles = _candidates(plan, known_sizes(plan)(plan.m), target)
    more = [replace(tile, num_stages=tile.num_stages + 1) for tile in tiles]
    more += [replace(tile, num_warps=tile.num_warps // 2) for tile in tiles if tile.num_warps == 8]
    more += [replace(tile, flatten=not tile.flatten) for tile in tiles if tile.per_multiprocessor]
    more += [replace(tile, per_multiprocessor=0, flatten=False) for tile in tiles if tile.per_multiprocessor]
    # Two programs on a multiprocessor: what one computes after its product hides behind the product of the other.
    more += [replace(tile, num_stages=3, per_multiprocessor=2, flatten=False) for tile in tiles if tile.m * tile.n == 128 * 128]
    if tiles is _HOPPER or tiles is _BLACKWELL:
        more += [MatmulTile(128, 128, 64, 4, 3, per_multiprocessor=2), MatmulTile(128, 64, 64, 4, 4, per_multiprocessor=2)]
    yield from dict.fromkeys(tile for tile in (default, *tiles, *more) if tile == default or _fits(plan, tile, target))


def _candidates(plan: MatmulPlan, m: int, target: Target) -> tuple[MatmulTile, ...]:
    if _is_exact_float32(plan):
        return _FLOAT32
    if _has_few_rows(m):
        return _FEW_ROWS
    return _AMPERE if not target.copies_blocks else _BLACKWELL if target.has_tensor_memory else _HOPPER


def _has_few_rows(m: int) -> bool:
    return m <= 16


def _is_exact_float32(plan: MatmulPlan) -> bool:
    """Whether the product is one for ordinary arithmetic units."""
    return plan.left.dtype == torch.float32 and plan.precision == "ieee"


def _fits(plan: MatmulPlan, tile: MatmulTile, target: Target) -> bool:
    """Whether operands in flight have room in shared memory, and accumulators in registers."""
    itemsize = max(side_itemsize(side) for side in (plan.left, *plan.rights))
    shared = (tile.m + len(plan.rights) * tile.n) * tile.k * itemsize * tile.num_stages
    return shared + _BARRIERS <= target.shared_bytes and _accumulators(plan, tile, target) <= 128


def _is_roomy(plan: MatmulPlan, tile: MatmulTile, target: Target) -> bool:
    """Whether there is room for what comes after the product: a thread has 255 registers, and blocks of operands want theirs."""
    computes = any(value.kind == "load" and value.rows and value.columns or value.text.count("{0}") > 1 for value in plan.after.values)
    if plan.left.blocks is None:
        return _accumulators(plan, tile, target) <= 64
    return _accumulators(plan, tile, target) <= (64 * len(plan.rights) if computes else 128)


def _accumulators(plan: MatmulPlan, tile: MatmulTile, target: Target) -> int:
    """Registers of a thread that hold sums; those of 8-bit floats are gathered in a second set."""
    sets = len(plan.rights) * (2 if plan.left.dtype in FLOAT8 and not plan.is_fast else 1)
    return tile.m * tile.n * sets // (target.lanes * tile.num_warps)


def side_itemsize(side: Side) -> int:
    """Bytes of an element of an operand as it is multiplied."""
    assert side.dtype is not None
    return side.dtype.itemsize
