"""Products of matrices as a file: what differs from that of other kernels is how tensors are passed, and how programs are counted."""

import torch

from ...ir import Node, SymbolTable
from .file import IMPORTS, File, Parameter
from .index import Size
from .matmul_body import NAMES, MatmulBody
from .matmul_plan import Blocks, MatmulPlan, block_names
from .matmul_tiles import MatmulTile, default_matmul_tile
from .pointwise import NotFusible
from .targets import Target
from .values import FLOAT8

_INTERPRETED = 'INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")'
_PROGRAMS = '''def programs(tiles, device):
    """As many as the multiprocessors hold, which take the tiles in turns; or one for each tile."""
    if PER_MULTIPROCESSOR == 0:
        return tiles
    count = torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2
    return min(tiles, count * PER_MULTIPROCESSOR)
'''
_BLOCKS_OF = '''def blocks_of(x, shape, stride, offset, block):
    """`x`, seen from element `offset`, as blocks that the hardware copies; it wants addresses that are multiples of 16 bytes."""
    if x.data_ptr() % 16:
        reach = 1 + sum((n - 1) * step for n, step in zip(x.shape, x.stride()))
        x = torch.as_strided(x, (reach,), (1,)).clone().as_strided(x.shape, x.stride())
    return TensorDescriptor(torch.as_strided(x, shape, stride, x.storage_offset() + offset), shape, stride, block)
'''


class MatmulFile(File):
    """The text of one plan below the header."""

    own_names = NAMES

    def __init__(self, plan: MatmulPlan, symbols: SymbolTable, tile: MatmulTile | None, target: Target):
        if not target.copies_blocks and any(side.dtype in FLOAT8 for side in (plan.left, *plan.rights)):
            raise NotFusible(f"{target.name} multiplies no 8-bit floats")
        super().__init__(plan if target.copies_blocks else plan.by_addresses(), symbols, tile, target)

    def default_tile(self) -> MatmulTile:
        return default_matmul_tile(self.plan, self.target)

    def imports(self) -> str:
        if not self._blocks():
            return IMPORTS
        line = "import triton.language as tl\n"
        return IMPORTS.replace(line, line + "from triton.tools.tensor_descriptor import TensorDescriptor\n")

    def functions(self) -> list[str]:
        return [*super().functions(), *([_BLOCKS_OF] if self._blocks() else []), _PROGRAMS]

    def constants(self) -> list[str]:
        tile = self.tile
        return [
            f"BLOCK_M, BLOCK_N, BLOCK_K, GROUP = {tile.m}, {tile.n}, {tile.k}, {tile.group}",
            f"PER_MULTIPROCESSOR, FLATTEN = {tile.per_multiprocessor}, {tile.flatten}",
            f"NUM_WARPS, NUM_STAGES = {tile.num_warps}, {tile.num_stages}",
            *([_INTERPRETED] if self.plan.left.dtype in (torch.bfloat16, *FLOAT8) else []),
        ]

    def blocks(self) -> dict[str, int]:
        tile = self.tile
        return {"BLOCK_M": tile.m, "BLOCK_N": tile.n, "BLOCK_K": tile.k, "GROUP": tile.group, "FLATTEN": tile.flatten}

    def statements(self) -> list[str]:
        self._writer = MatmulBody(self.plan, self.addresses.arguments, self.symbols, *self.named())
        self._writer.lines()  # a first time for the variables that its positions use, which it defines at its head
        return self._writer.lines()

    def counts(self) -> dict[str, Size]:
        plan = self.plan
        return {"M": plan.m, "N": plan.n, "K": plan.k} | ({"BATCH": plan.num_batch} if plan.domain.batch else {})

    def pointers(self) -> list[Parameter]:
        return [self._parameter(name) for name in self._passed()]

    def launch(self) -> list[str]:
        counts = self.counts()
        lines = [f"    {name} = {self.size(size)}" for name, size in counts.items()]
        arguments = [*map(self._argument, self._passed()), *(f"{name}={name}" for name in counts)]
        arguments += [f"{name}={self.size(size)}" for name, size in self.addresses.arguments.sizes.items()]
        batch = "BATCH * " if "BATCH" in counts else ""
        device = f"{self.inputs[0]}.device"
        arguments += [*(f"{name}={name}" for name in self.blocks()), "num_warps=NUM_WARPS", "num_stages=NUM_STAGES"]
        launch = f"{self.name}[(programs(tiles, {device}),)]({', '.join(arguments)})"
        rows = "triton.cdiv(M, BLOCK_M)" if self.plan.ends is None else f"(triton.cdiv(M, BLOCK_M) + {self.plan.num_groups})"
        count = f"    tiles = {batch}{rows} * triton.cdiv(N, BLOCK_N)"
        return [*lines, count, "    if tiles > 0:", f"        {launch}"]

    def random(self, node: Node, shape: str) -> str:
        if self.plan.ends is None or node is not self.plan.inputs[self.plan.ends]:
            return super().random(node, shape)
        groups, rows = self.plan.num_groups, self.size(self.plan.m)
        # Equal groups, but for the first, which has no rows.
        return f"torch.arange({groups}) * {rows} // {groups - 1}" if groups > 1 else f"torch.full((1,), {rows})"

    def _blocks(self) -> dict[str, Blocks]:
        """How the inputs that the hardware copies by blocks are seen, by the names that the kernel has for them."""
        return {name: blocks for blocks, name in block_names(self.plan, self.inputs).items()}

    def _passed(self) -> list[str]:
        """The kernel's names for the tensors that it takes; one that is read in both ways comes twice."""
        plan = self.plan
        loaded = {v.input for side in plan.sides if side.blocks is None for v in side.values if v.kind == "load"} | {plan.ends}
        pointers = [f"{name}_ptr" for n, name in enumerate(self.inputs) if n in loaded]
        return [*self._blocks(), *pointers, *(f"{name}_ptr" for name in self.outputs)]

    def _tensor(self, parameter: str) -> str:
        found = self._blocks().get(parameter)
        return parameter.removesuffix("_ptr") if found is None else self.inputs[found.input]

    def _parameter(self, name: str) -> Parameter:
        nodes = {**self.named()[0], **self.named()[1]}
        dtype = nodes[self._tensor(name)].meta["val"].dtype
        found = self._blocks().get(name)
        return Parameter(name, dtype) if found is None else Parameter(name, dtype, block=tuple(map(self._extent, found.axes)))

    def _argument(self, name: str) -> str:
        found = self._blocks().get(name)
        if found is None:
            return self._tensor(name)
        block = ", ".join("1" if axis == "batch" else f"BLOCK_{axis.upper()}" for axis in found.axes)
        seen = ", ".join([self.tuple(found.shape), self.tuple(found.stride), self.size(found.offset)])
        return f"blocks_of({self._tensor(name)}, {seen}, [{block}])"

    def _extent(self, axis: str) -> int:
        return {"batch": 1, "m": self.tile.m, "n": self.tile.n, "k": self.tile.k}[axis]
