"""The kernel function of products of matrices, as text.

Programs visit tiles in turns, one tile of all batches after the other. Operands come as blocks that the hardware copies where they lie
as it needs them, else by addresses, and what comes before a product is computed on the way.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from ...ir import Node
from .addresses import Addresses, Arguments
from .matmul_plan import Blocks, MatmulPlan, Side, block_names
from .statements import Statements, single_blanks
from .values import FLOAT8, TL_TYPES

# Names that these kernels and their files give a meaning; an input of that name gets another.
NAMES = frozenset(
    """tile tile_in_batch tiles_m tiles_n batch group height m n k_row k_col in_m in_n in_k_row in_k_col m_start n_start k_start M N K a b
    b_2 acc acc_2 BATCH BLOCK_M BLOCK_N BLOCK_K GROUP NUM_STAGES INTERPRETED PER_MULTIPROCESSOR FLATTEN TensorDescriptor blocks_of
    programs tiles g stop begin end row is_here tiles_here tiles_before""".split()
)


@dataclass(frozen=True)
class _Written:
    """A side, and what writes it."""

    side: Side
    addresses: Addresses
    statements: Statements


class MatmulBody:
    """Writes one kernel. `inputs` and `outputs` are nodes by their names; `arguments` collects what else it takes."""

    def __init__(self, plan: MatmulPlan, arguments: Arguments, symbols, inputs: Mapping[str, Node], outputs: Mapping[str, Node]):
        self.plan = plan
        self.inputs = inputs
        self.blocks = block_names(plan, list(inputs))
        taken = {*NAMES, *inputs, *outputs}
        masks = [_masks("in_m", "in_k_row"), *(_masks("in_k_col", "in_n") for _ in plan.rights), _masks("in_m", "in_n")]
        self.sides = []
        for side, inside in zip(plan.sides, masks, strict=True):
            addresses = Addresses(side.domain, symbols, arguments, count_name="K")
            self.sides.append(_Written(side, addresses, Statements(side.values, addresses, inputs, outputs, inside, taken)))
            taken |= {*self.sides[-1].statements.names}
        stores = [store.index for store in plan.stores]
        self.is_wide = any(w.addresses.needs_int64([*stores, *(v.index for v in w.side.values)]) for w in self.sides)

    @property
    def left(self) -> _Written:
        return self.sides[0]

    @property
    def rights(self) -> list[_Written]:
        return self.sides[1:-1]

    @property
    def after(self) -> _Written:
        return self.sides[-1]

    def lines(self) -> list[str]:
        """The statements of the kernel, indented by four."""
        body = [*self._positions(), *self._before(), *self._accumulators(), *self._product(), *self._after()]
        total = "BATCH * tiles_m * tiles_n" if self.plan.domain.batch else "tiles_m * tiles_n"
        head = ["tiles_m, tiles_n = tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N)"]
        if self.plan.ends is not None:  # each group may have a tile that is not full
            head, total = ["tiles_n = tl.cdiv(N, BLOCK_N)"], f"(tl.cdiv(M, BLOCK_M) + {self.plan.num_groups}) * tiles_n"
        head.append(f"for tile in tl.range(tl.program_id(0), {total}, tl.num_programs(0), flatten=FLATTEN):")
        lines = single_blanks([*head, *("    " + line if line else "" for line in body)])
        return ["    " + line if line else "" for line in lines]

    # --- where a tile lies ---

    def _positions(self) -> list[str]:
        if self.plan.ends is not None:
            return self._positions_in_groups()
        tile, lines = "tile", []
        if self.plan.domain.batch:
            batch = "tile // (tiles_m * tiles_n)"
            lines += ["tile_in_batch = tile % (tiles_m * tiles_n)"]
            lines += [f"batch = ({batch}).to(tl.int64)" if self.is_wide else f"batch = {batch}"]
            tile = "tile_in_batch"
        lines += [
            "# A group of tiles, whose operands stay in L2, has GROUP rows of tiles.",
            f"group = {tile} // (GROUP * tiles_n)",
            "height = tl.minimum(tiles_m - group * GROUP, GROUP)",
            f"m_start = (group * GROUP + {tile} % (GROUP * tiles_n) % height) * BLOCK_M",
            f"n_start = {tile} % (GROUP * tiles_n) // height * BLOCK_N",
        ]
        seen = {**self.after.addresses.batch_variables, **self.left.addresses.batch_variables}
        for written in self.rights:
            seen |= written.addresses.batch_variables
        return [*lines, *(f"{name} = {text}" for name, text in seen.items()), ""]

    def _positions_in_groups(self) -> list[str]:
        """Tiles are counted group by group; beyond the last there may be some without rows."""
        ends = list(self.inputs)[self.plan.ends or 0]
        wide = ".to(tl.int64)" if self.is_wide else ""
        return [
            "n_start = tile % tiles_n * BLOCK_N",
            "group, m_start, end = 0, 0, 0",
            "tiles_before, begin = 0, 0",
            f"for g in range({self.plan.num_groups}):",
            f"    stop = tl.load({ends}_ptr + g)",
            "    tiles_here = tl.cdiv(stop - begin, BLOCK_M)",
            "    row = tile // tiles_n - tiles_before",
            "    is_here = (row >= 0) & (row < tiles_here)",
            "    group, end = tl.where(is_here, g, group), tl.where(is_here, stop, end)",
            "    m_start = tl.where(is_here, begin + row * BLOCK_M, m_start)",
            "    tiles_before, begin = tiles_before + tiles_here, stop",
            f"batch = group{wide}",
            "",
        ]

    def _rows(self) -> list[str]:
        lines = [f"m = {self._range('m_start', 'BLOCK_M')}[:, None]", "in_m = m < M" if self.plan.ends is None else "in_m = m < end"]
        variables = {**self.left.addresses.row_variables, **self.after.addresses.row_variables}
        return [*lines, *(f"{name} = {text}" for name, text in variables.items())]

    def _columns(self) -> list[str]:
        lines = [f"n = {self._range('n_start', 'BLOCK_N')}[None, :]", "in_n = n < N"]
        return [*lines, *(f"{name} = {text}" for name, text in self.after.addresses.column_variables.items())]

    def _range(self, start: str, block: str) -> str:
        text = f"({start} + tl.arange(0, {block}))"
        return f"{text}.to(tl.int64)" if self.is_wide else text

    # --- before and in the loop ---

    def _before(self) -> list[str]:
        """Positions that the operands need, and what does not vary along k: reductions of rows take a loop each."""
        lines: list[str] = []
        if self.left.side.blocks is None:
            lines += self._rows()
        if any(written.side.blocks is None for written in self.rights):
            lines += self._columns()
        if self.left.side.blocks is None:
            lines += self._stages()
        for written in self.rights:
            lines += [written.statements.define(n) for n, v in enumerate(written.side.values) if not v.rows and written.side.blocks is None]
        return [*lines, ""]

    def _stages(self) -> list[str]:
        side, write, done = self.left.side, self.left.statements, set[int]()
        lines: list[str] = []
        for stage in range(side.num_stages):
            lines += map(write.define, write.ready(stage, done))
            reduces = write.reductions(stage)
            if not reduces:
                continue
            lines += [write.accumulator(n, "BLOCK_M, BLOCK_K") for n in reduces]
            inside = [*self._k_row(), *map(write.define, write.needed([side.values[n].operands[0] for n in reduces]))]
            inside += map(write.accumulate, reduces)
            lines += ["for k_start in range(0, K, BLOCK_K):", *("    " + line for line in inside), *map(write.total, reduces)]
        return lines

    def _k_row(self) -> list[str]:
        return [f"k_row = {self._range('k_start', 'BLOCK_K')}[None, :]", "in_k_row = k_row < K"]

    def _k_col(self) -> list[str]:
        return [f"k_col = {self._range('k_start', 'BLOCK_K')}[:, None]", "in_k_col = k_col < K"]

    def _accumulators(self) -> list[str]:
        kind = TL_TYPES[self.plan.accumulator]
        return [f"{acc} = tl.zeros([BLOCK_M, BLOCK_N], {kind})" for _, acc in self._names()]

    def _names(self) -> list[tuple[str, str]]:
        """(right operand, accumulator) of each product."""
        return [("b", "acc"), ("b_2", "acc_2")][: len(self.plan.rights)]

    def _product(self) -> list[str]:
        inside: list[str] = self._k_row() if self.left.side.blocks is None else []
        inside += self._k_col() if any(w.side.blocks is None for w in self.rights) else []
        inside += self._operand("a", self.left, {"m": "m_start", "k": "k_start"}, ("m", "k"))
        for written, (name, _) in zip(self.rights, self._names(), strict=True):
            inside += self._operand(name, written, {"n": "n_start", "k": "k_start"}, ("k", "n"))
        precision = f', input_precision="{self.plan.precision}"' if self.plan.left.dtype == torch.float32 else ""
        integer = f", out_dtype={TL_TYPES[self.plan.accumulator]}" if self.plan.accumulator == torch.int32 else ""
        if self.plan.left.dtype in (torch.bfloat16, *FLOAT8):
            names = ["a", *(right for right, _ in self._names())]
            widened = ", ".join(f"{name}.to(tl.float32)" for name in names)
            inside += ["if INTERPRETED:  # there, these would be multiplied as integers", f"    {', '.join(names)} = {widened}"]
        if self.plan.left.dtype in FLOAT8 and not self.plan.is_fast:
            # Hopper's accumulator keeps 14 bits of such sums: each instruction's sum, of 32 terms, is added in float32.
            precision = ", max_num_imprecise_acc=32"
        inside += [f"{acc} = tl.dot(a, {right}, {acc}{precision}{integer})" for right, acc in self._names()]
        terms = "K" if self.plan.ends is None else "tl.where(end > 0, K, 0)"
        return [f"for k_start in range(0, {terms}, BLOCK_K):", *("    " + line for line in inside), ""]

    def _operand(self, name: str, written: _Written, starts: Mapping[str, str], axes: tuple[str, str]) -> list[str]:
        side, write = written.side, written.statements
        if side.blocks is not None:
            return [f"{name} = {self._block(side.blocks, starts, axes)}"]
        result = side.values[side.result.id]
        is_plain = result.kind == "load" and not result.guard
        along_k = result.columns if axes[1] == "k" else result.rows
        lines = [write.define(n) for n in write.needed([side.result], along_rows=axes[0] == "k")]
        text = write.operand(side.result)
        if not (result.rows and result.columns):
            text = f"tl.broadcast_to({text}, [{', '.join(f'BLOCK_{axis.upper()}' for axis in axes)}])"
        if not is_plain or not along_k:  # beyond K there are zeros, whatever comes before makes of them
            text = f"tl.where({'in_k_row' if axes[1] == 'k' else 'in_k_col'}, {text}, {'0' if side.dtype == torch.int8 else '0.0'})"
        cast = f".to({TL_TYPES[side.dtype]})" if side.dtype != result.dtype else ""  # type: ignore[index]
        return [*lines, f"{name} = {f'({text})' if ' ' in text and not text.endswith(')') else text}{cast}"]

    def _block(self, blocks: Blocks, starts: Mapping[str, str], axes: tuple[str, str]) -> str:
        name = self.blocks[blocks]
        offsets = [{"batch": "batch.to(tl.int32)" if self.is_wide else "batch", **starts}[axis] for axis in blocks.axes]
        text = f"{name}.load([{', '.join(offsets)}])"
        if "batch" in blocks.axes:
            text += f".reshape({', '.join(f'BLOCK_{axis.upper()}' for axis in blocks.axes if axis != 'batch')})"
        is_turned = tuple(axis for axis in blocks.axes if axis != "batch") != axes
        return f"{text}.T" if is_turned else text

    # --- after the loop ---

    def _after(self) -> list[str]:
        write, values = self.after.statements, self.after.side.values
        lines = [] if self.left.side.blocks is None else self._rows()
        lines += [] if any(written.side.blocks is None for written in self.rights) else self._columns()
        lines += [write.define(n) for n, value in enumerate(values) if value.kind == "load"]
        lines += ["", *(write.define(n) for n, value in enumerate(values) if value.kind != "load"), ""]
        # By addresses: the copy of a block out of shared memory was seen to race with the next tile's operands (Triton 3.6, sm_90, tiles
        # of 128 x 256 whose left operand came by addresses), and was no faster.
        return [*lines, *map(write.store_tile, self.plan.stores)]


def _masks(rows: str, columns: str) -> dict[tuple[bool, bool], str]:
    """What is true inside, by whether a block varies along rows and along columns."""
    return {(True, True): f"{rows} & {columns}", (True, False): rows, (False, True): columns, (False, False): ""}
