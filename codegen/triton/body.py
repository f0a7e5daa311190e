"""The kernel function of a plan, as text.

Blocks are [ROWS, COLS]; what varies along one axis alone is [ROWS, 1] or [1, COLS]. Where a row is longer than a block, each reduction
is a loop over its blocks, and what later loops need of the columns is loaded and computed again.
"""

import itertools
from collections.abc import Mapping

from ...ir import Node
from .addresses import Addresses
from .statements import Statements, single_blanks, without_unread
from .tiles import Tile
from .values import Plan, Ref, Store

_ROW_MASKS = {(True, True): "mask", (True, False): "in_rows", (False, True): "in_cols", (False, False): ""}
_POINTWISE_MASKS = {(rows, columns): "mask" if columns else "" for rows in (False, True) for columns in (False, True)}


class KernelBody:
    """Writes one kernel. `inputs` and `outputs` are nodes by their names; `addresses.arguments` lists what else it takes."""

    def __init__(self, plan: Plan, tile: Tile, addresses: Addresses, inputs: Mapping[str, Node], outputs: Mapping[str, Node]):
        self.plan = plan
        self.tile = tile
        self.addresses = addresses
        self.by_rows = plan.domain.by_rows
        self.is_wide = addresses.needs_int64([v.index for v in plan.values] + [s.index for s in plan.stores])
        masks = _ROW_MASKS if self.by_rows else _POINTWISE_MASKS
        self.statements = Statements(plan.values, addresses, inputs, outputs, masks, set())

    def lines(self) -> list[str]:
        """The statements of the kernel, indented by four."""
        body = self._looped() if self.tile.looped else self._straight()
        head = self._rows_head() if self.by_rows else self._pointwise_head()
        return ["    " + line if line else "" for line in single_blanks([*without_unread(head, body), *body])]

    # --- positions ---

    def _pointwise_head(self) -> list[str]:
        program = "tl.program_id(0).to(tl.int64)" if self.is_wide else "tl.program_id(0)"
        lines = [f"i = {program} * BLOCK + tl.arange(0, BLOCK)", "mask = i < n"]
        return [*lines, *(f"{name} = {text}" for name, text in self.addresses.column_variables.items())]

    def _rows_head(self) -> list[str]:
        program = "tl.program_id(0).to(tl.int64)" if self.is_wide else "tl.program_id(0)"
        lines = [f"row = {program} * ROWS + tl.arange(0, ROWS)[:, None]", "in_rows = row < n_rows"]
        lines += [f"{name} = {text}" for name, text in self.addresses.row_variables.items()]
        return lines if self.tile.looped else [*lines, *self._columns_head("")]

    def _columns_head(self, start: str) -> list[str]:
        column = f"{start}tl.arange(0, COLS)[None, :]"
        column = f"({column}).to(tl.int64)" if self.is_wide else column
        lines = [f"col = {column}", "in_cols = col < n_cols", "mask = in_rows & in_cols"]
        return [*lines, *(f"{name} = {text}" for name, text in self.addresses.column_variables.items())]

    # --- order of statements ---

    def _straight(self) -> list[str]:
        lines: list[str] = []
        loads = [n for n, value in enumerate(self.plan.values) if value.kind == "load"]
        lines += ["", *map(self.statements.define, loads), ""]
        rest = [n for n, value in enumerate(self.plan.values) if value.kind != "load"]
        for node, numbers in itertools.groupby(rest, key=lambda n: self.plan.values[n].node):
            statements = [*map(self.statements.define, numbers)]
            # One statement has the operation's name already.
            lines += ["", f"# {node.target}", *statements, ""] if node is not None and len(statements) > 1 else statements
        lines.append("")
        return lines + [self.statements.store(store, self.by_rows) for store in self.plan.stores]

    def _looped(self) -> list[str]:
        values, write, lines = self.plan.values, self.statements, [""]
        done: set[int] = set()
        for stage in range(self.plan.num_stages):
            lines += map(write.define, write.ready(stage, done))
            reduces = write.reductions(stage)
            stores = [s for s in self.plan.stores if s.columns and self._stage(s) == stage]
            if not reduces and not stores:
                continue
            lines += [write.accumulator(n, "ROWS, COLS") for n in reduces]
            lines.append("for start in range(0, n_cols, COLS):")
            inside = [*map(write.define, write.needed([*(values[n].operands[0] for n in reduces), *(s.ref for s in stores)]))]
            inside += map(write.accumulate, reduces)
            inside += [write.store(store, self.by_rows) for store in stores]
            lines += ["    " + line for line in [*without_unread(self._columns_head("start + "), inside), *inside]]
            lines += [*map(write.total, reduces), ""]
        return lines + [write.store(store, self.by_rows) for store in self.plan.stores if not store.columns]

    def _stage(self, store: Store) -> int:
        return self.plan.values[store.ref.id].stage if isinstance(store.ref, Ref) else 0
