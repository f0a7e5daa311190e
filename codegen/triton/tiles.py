"""The default tile of a kernel: how much of the domain one program covers, and with how many warps.

A row that fits one block is read once and kept in registers; a longer one, or one of unknown length, is read in a loop for each
reduction. 8192 float32 on 16 warps are 16 registers a thread and value, which leaves room for the values of a normalisation.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

from .values import Plan

LONGEST_ROW = 8192
_POINTWISE_BLOCK = 1024
_LOOP_BLOCK = 2048
_ROW_TILE = 2048  # elements of a program that takes several short rows


@dataclass(frozen=True)
class Tile:
    """`rows` x `columns` elements a program; a pointwise kernel has one row. `looped`: columns are visited block by block."""

    rows: int
    columns: int
    num_warps: int
    looped: bool

    @property
    def options(self) -> dict[str, int]:
        """What triton takes beside the blocks."""
        return {"num_warps": self.num_warps}

    def __str__(self) -> str:
        shape = f"ROWS={self.rows} COLS={self.columns}" if self.rows else f"BLOCK={self.columns}"
        return f"{shape} num_warps={self.num_warps}"


def default_tile(plan: Plan) -> Tile:
    """The tile that is used when nothing was tuned."""
    columns, rows = plan.domain.num_columns, plan.domain.num_rows
    if not plan.domain.by_rows:
        block = min(_POINTWISE_BLOCK, power_of_two(columns)) if isinstance(columns, int) else _POINTWISE_BLOCK
        return Tile(0, block, 4, False)
    if not isinstance(columns, int) or columns > LONGEST_ROW:
        return Tile(1, _LOOP_BLOCK, 8, True)
    block = power_of_two(columns)
    height = max(1, _ROW_TILE // block)
    if isinstance(rows, int):
        height = min(height, power_of_two(rows))
    return Tile(height, block, min(16, max(4, power_of_two(height * block // 512))), False)


def other_tiles(plan: Plan) -> Iterator[Tile]:
    """What a tuner tries beside the default."""
    tile = default_tile(plan)
    if not plan.domain.by_rows:
        yield from (Tile(0, block, warps, False) for block, warps in ((512, 4), (1024, 8), (2048, 4), (2048, 8), (4096, 8)))
        return
    yield from (replace(tile, num_warps=warps) for warps in (tile.num_warps // 2, tile.num_warps * 2) if 1 <= warps <= 32)
    if tile.looped:
        yield from (replace(tile, columns=columns, num_warps=16) for columns in (1024, 4096, 8192))
        if isinstance(plan.domain.num_columns, int) and plan.domain.num_columns <= 2**16:  # once, and into all registers that there are
            yield from (Tile(1, power_of_two(plan.domain.num_columns), warps, False) for warps in (16, 32))
        return
    for rows in (tile.rows // 4, tile.rows // 2, tile.rows * 2):
        if rows >= 1:
            yield from (replace(tile, rows=rows, num_warps=warps) for warps in {tile.num_warps, max(1, tile.num_warps // 2)})


def power_of_two(size: int) -> int:
    """The smallest power of two that is at least `size`."""
    return 1 << max(size - 1, 0).bit_length()
