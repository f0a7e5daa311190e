"""Plans as files of Triton, one a kernel, each of which stands alone: `python kernel_x.py` checks itself, in Triton's interpreter where
there is no GPU. Equal plans give equal bytes below the header, whatever layer they come from.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ...ir import Node, SymbolTable
from .file import File, Parameter
from .low_rank.operand_file import OperandFile
from .low_rank.plan import OperandPlan, ProductPlan
from .low_rank.product_file import ProductFile
from .low_rank.tiles import OperandTile
from .matmul_file import MatmulFile
from .matmul_plan import MatmulPlan
from .matmul_tiles import MatmulTile
from .reference import in_order
from .roofline import Roofline, bytes_before, roofline
from .targets import DEFAULT, Target
from .tiles import Tile
from .values import Plan

AnyPlan = Plan | MatmulPlan | OperandPlan | ProductPlan
AnyTile = Tile | MatmulTile | OperandTile
_FILES: dict[type, type[File]] = {Plan: File, MatmulPlan: MatmulFile, OperandPlan: OperandFile, ProductPlan: ProductFile}


@dataclass(frozen=True)
class Kernel:
    """A kernel as text: `source` is the file, `digest` the content hash of what is below its header, `ir` the lines that it
    computes, views among them.

    `bytes_before` is what its operations would move one by one, `roofline` what it moves and how long that takes at least.
    """

    name: str
    source: str
    digest: str
    ir: tuple[str, ...]
    bytes_before: int
    roofline: Roofline
    tile: AnyTile
    plan: AnyPlan
    parameters: tuple[Parameter, ...]

    @property
    def file_name(self) -> str:
        return f"kernel_{self.name}_{self.digest}.py"


def emit(
    plan: AnyPlan,
    symbols: SymbolTable,
    ir_lines: Mapping[Node, str] | None = None,
    tile: AnyTile | None = None,
    target: Target = DEFAULT,
) -> Kernel:
    """The kernel of `plan` for `target`, with its default tile or `tile`. `ir_lines` are the lines of its nodes, and of the views
    between them, as the program's text has them.

    Raises:
        NotFusible: a size is known from no input.
    """
    writer = _FILES[type(plan)](plan, symbols, tile, target)
    body = writer.body()
    digest = hashlib.sha256(body.encode()).hexdigest()[:16]
    ir = tuple((ir_lines or {}).get(node, str(node)).strip() for node in in_order(plan.nodes, plan.outputs) or plan.nodes)
    cost = roofline(plan)
    header = _header(writer, plan, ir, digest, cost)
    return Kernel(writer.name, header + body, digest, ir, bytes_before(plan.nodes), cost, writer.tile, writer.plan, writer.parameters())


def _header(writer: File, plan: AnyPlan, ir: Sequence[str], digest: str, cost: Roofline) -> str:
    places = dict.fromkeys(str(node.meta["where"]) for node in plan.nodes if str(node.meta.get("where") or ""))
    lines = [f'"""{writer.name}: {len(plan.nodes)} operation{"s" if len(plan.nodes) != 1 else ""} in one kernel.', "", "Computes:"]
    lines += [f"    {_plain(line.partition('  # ')[0])}" for line in ir]
    if places:
        lines += ["From:", *(f"    {_plain(place)}" for place in places)]
    lines += [
        f"Content: sha256 {digest}",
        f"Tuning: {writer.tile}{' (default)' if writer.is_default else ''}",
        f"Roofline: {cost.line()}",
        '"""',
        "",
    ]
    return "\n".join(lines) + "\n"


def _plain(text: str) -> str:
    return text.replace("\\", "/").replace('"""', "'''")
