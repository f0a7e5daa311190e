"""What a plan is made of: the blocks that one program of a kernel loads, computes, reduces and stores, and the positions that it visits."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch

from ...ir import Node
from .index import Index, Size, Var, product

TL_TYPES = {
    torch.float64: "tl.float64",
    torch.float32: "tl.float32",
    torch.bfloat16: "tl.bfloat16",
    torch.float16: "tl.float16",
    torch.int64: "tl.int64",
    torch.int32: "tl.int32",
    torch.int16: "tl.int16",
    torch.int8: "tl.int8",
    torch.uint8: "tl.uint8",
    torch.bool: "tl.int1",
    torch.float8_e4m3fn: "tl.float8e4nv",
    torch.float8_e5m2: "tl.float8e5",
}
FLOAT8 = {torch.float8_e4m3fn, torch.float8_e5m2}  # loaded and multiplied, not stored: ATen and Triton saturate otherwise


@dataclass(frozen=True)
class Ref:
    """A value of the plan, as an operand."""

    id: int


@dataclass(frozen=True)
class Count:
    """A number of elements as an operand: known when the kernel runs where a size is symbolic."""

    size: Size


class Condition(NamedTuple):
    """low <= at < high; None where the bound holds anyway."""

    at: Index
    low: Size | None
    high: Size | None


@dataclass(frozen=True)
class Value:
    """One block: loaded, computed from others (`text` with `{0}` for the first operand), or reduced over the columns.

    `rows` and `columns` say along which axes it varies. `stage` is how many reductions must have ended before it is known.
    """

    kind: str  # "load", "index", "inside", "apply", "reduce"
    dtype: torch.dtype
    operands: tuple[Any, ...] = ()
    text: str = ""
    input: int = -1
    index: Index = Index()
    guard: tuple[Condition, ...] = ()
    rows: bool = field(default=False, compare=False)
    columns: bool = field(default=False, compare=False)
    stage: int = field(default=0, compare=False)
    name: str = field(default="", compare=False)
    node: Node | None = field(default=None, compare=False)
    helpers: tuple[str, ...] = field(default=(), compare=False)


@dataclass(frozen=True)
class Store:
    """Value `ref` goes to `index` (in elements) of output number `output`; `columns` is False for one element a row."""

    output: int
    index: Index
    ref: Any
    columns: bool


@dataclass(frozen=True)
class Domain:
    """The positions that a kernel visits: all pairs of a row and a column. A pointwise kernel has columns alone.

    `batch` is one position for all of a block. `names` are the names of the kernel's variables that count rows and columns.
    """

    rows: tuple[Var, ...]
    columns: tuple[Var, ...]
    by_rows: bool
    batch: tuple[Var, ...] = ()
    names: tuple[str, str] = ("row", "col")

    @property
    def num_rows(self) -> Size:
        return product(v.size for v in self.rows)

    @property
    def num_columns(self) -> Size:
        return product(v.size for v in self.columns)


@dataclass(frozen=True)
class Plan:
    """One kernel: `inputs` and `outputs` are nodes, `values` in an order in which each follows its operands."""

    nodes: tuple[Node, ...]
    inputs: tuple[Node, ...]
    outputs: tuple[Node, ...]
    domain: Domain
    values: tuple[Value, ...]
    stores: tuple[Store, ...]

    @property
    def kind(self) -> str:
        """ "pointwise" or "rows"."""
        return "rows" if self.domain.by_rows else "pointwise"

    @property
    def num_stages(self) -> int:
        return num_stages(self.values)


def num_stages(values: Sequence[Value]) -> int:
    """One more than the reductions that follow one another."""
    return max((value.stage for value in values), default=0) + 1


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """What elements of `dtype` are computed in."""
    return torch.float32 if dtype in (torch.bfloat16, torch.float16, *FLOAT8) else dtype


def packet_of(node: Node) -> str:
    """An operator's name without namespace and overload: "layer_norm"."""
    return str(node.target._schema.name).partition("::")[2]  # type: ignore[union-attr]
