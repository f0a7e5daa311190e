"""The kernel that multiplies codes, as a file: a program computes one tile of the result, and unpacks the weight in registers.

Three forms. Integers: s8 codes of both operands, whose s32 sums are scaled once a row and column, or block by block. Numbers: the weight is
scaled to the model's dtype, in which it is multiplied. With neither block nor tensor scales, codes are multiplied as numbers and scaled
at the end.
"""

import torch

from ....ir import Node
from ..addresses import Addresses
from ..file import File, Parameter, input_name
from ..index import Index, Size, linear
from ..matmul_tiles import MatmulTile
from ..statements import Statements, single_blanks
from ..values import FLOAT8, TL_TYPES
from .helpers import with_needed
from .operand_file import INTERPRETED, loaded
from .plan import ProductPlan
from .reference import product_text
from .tiles import default_product_tile

NAMES = frozenset(
    """tile tiles_m tiles_n group height m n m_start n_start in_m in_n n_row in_n_row k in_k k_start byte packed w b acc sums r in_r
    step part block M N K R BLOCK_M BLOCK_N BLOCK_K BLOCK_R GROUP NUM_STAGES INTERPRETED unpacked halves e2m1 e4m3 e8m0""".split()
)


class ProductFile(File):
    """The text of one plan below the header."""

    own_names = NAMES
    plan: ProductPlan
    tile: MatmulTile

    def default_tile(self) -> MatmulTile:
        return default_product_tile(self.plan, self.target)

    def input_names(self) -> list[str]:
        roles = {number: role for role, number in self.plan.roles.items()}
        return [roles.get(number) or input_name(node) for number, node in enumerate(self.plan.inputs)]

    def constants(self) -> list[str]:
        tile = self.tile
        return [
            f"BLOCK_M, BLOCK_N, BLOCK_K, GROUP = {tile.m}, {tile.n}, {tile.k}, {tile.group}",
            *([f"BLOCK_R = {self._block_r}"] if self.plan.rank else []),
            f"NUM_WARPS, NUM_STAGES = {tile.num_warps}, {tile.num_stages}",
            *([INTERPRETED] if self._is_widened else []),
        ]

    def blocks(self) -> dict[str, int]:
        tile = self.tile
        blocks = {"BLOCK_M": tile.m, "BLOCK_N": tile.n, "BLOCK_K": tile.k, "GROUP": tile.group}
        return blocks | ({"BLOCK_R": self._block_r} if self.plan.rank else {})

    def counts(self) -> dict[str, Size]:
        plan = self.plan
        return {"M": plan.m, "N": plan.n, "K": plan.k} | ({"R": plan.rank} if plan.rank else {})

    def pointers(self) -> list[Parameter]:
        return [
            Parameter(each.name, torch.uint8) if each.dtype in FLOAT8 else each  # taken apart as bits
            for each in super().pointers()
        ]

    def helpers(self) -> list[str]:
        form = self.plan.form
        decoded = {"int": ["unpacked"] if form.is_packed else [], "e2m1": ["halves", "e2m1"], "e4m3": ["e4m3"]}[form.element]
        return [*super().helpers(), *with_needed([*decoded, *({"e8m0": ["e8m0"], "nv": ["e4m3"]}.get(form.scale, []))])]

    # --- the kernel ---

    def statements(self) -> list[str]:
        inputs, outputs = self.named()
        arguments = self.addresses.arguments
        before, after = Addresses(self.plan.left.domain, self.symbols, arguments), self.addresses
        in_k = "" if self._is_even else "in_k"
        masks = {(True, True): self._inside_k("in_m", "in_k"), (True, False): "in_m", (False, True): in_k, (False, False): ""}
        self._left = Statements(self.plan.left.values, before, inputs, outputs, masks, set(NAMES))
        load = loaded(self._left)
        masks = {(True, True): "in_m & in_n", (True, False): "in_m", (False, True): "in_n", (False, False): ""}
        self._after = Statements(self.plan.after.values, after, inputs, outputs, masks, {*NAMES, *self._left.names})
        last = self._last()
        variables = {**before.row_variables, **after.row_variables}
        lines = [*self._position(variables), *(f"{name} = {text}" for name, text in after.column_variables.items()), ""]
        lines += [*self._loop(before, load), "", *self._scaled(), *self._branch(), "", *last]
        return ["    " + line if line else "" for line in single_blanks(lines)]

    def _inside_k(self, rows: str, k: str) -> str:
        """What is true inside of a block of an operand: without the part along k where blocks end with it."""
        return rows if self._is_even else f"{rows} & {k}"

    @property
    def _is_even(self) -> bool:
        return self.plan.k % self.tile.k == 0

    def _position(self, variables: dict[str, str]) -> list[str]:
        wide = ".to(tl.int64)" if self._is_wide() else ""
        return [
            "tiles_m, tiles_n = tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N)",
            "tile = tl.program_id(0)",
            "# A group of tiles, whose operands stay in L2, has GROUP rows of tiles.",
            "group = tile // (GROUP * tiles_n)",
            "height = tl.minimum(tiles_m - group * GROUP, GROUP)",
            "m_start = (group * GROUP + tile % (GROUP * tiles_n) % height) * BLOCK_M",
            "n_start = tile % (GROUP * tiles_n) // height * BLOCK_N",
            f"m = (m_start + tl.arange(0, BLOCK_M)){wide}[:, None]",
            "in_m = m < M",
            *(f"{name} = {text}" for name, text in variables.items()),
            f"n = (n_start + tl.arange(0, BLOCK_N)){wide}[None, :]",
            "in_n = n < N",
            f"n_row = (n_start + tl.arange(0, BLOCK_N)){wide}[:, None]",
            "in_n_row = n_row < N",
        ]

    def _is_wide(self) -> bool:
        plan = self.plan
        rows = [v.size for v in plan.left.domain.rows]
        steps = linear([Index.of(v) for v in plan.left.domain.rows], rows)
        reach = [value.index for value in plan.values] + [store.index for store in plan.stores]
        weight = plan.n * plan.k >= 2**31 if isinstance(plan.n, int) else True
        return weight or self.addresses.needs_int64([*reach, steps])

    def _loop(self, before: Addresses, load: list[str]) -> list[str]:
        plan = self.plan
        inside = ["k = (k_start + tl.arange(0, BLOCK_K))[None, :]"]
        inside += [] if self._is_even else ["in_k = k < K"]
        inside += [*(f"{name} = {text}" for name, text in before.column_variables.items()), *load, *self._weight()]
        kind = "tl.int32" if plan.has_codes and not plan.sum_block else "tl.float32"
        lines = [f"acc = tl.zeros([BLOCK_M, BLOCK_N], {kind})", "for k_start in range(0, K, BLOCK_K):"]
        return [*lines, *("    " + line for line in [*inside, *self._dot()])]

    def _weight(self) -> list[str]:
        """b [BLOCK_K, BLOCK_N], as it is multiplied."""
        plan, form = self.plan, self.plan.form
        name = self._input("weight")
        if form.is_packed:
            lines = ["byte = (k_start // 2 + tl.arange(0, BLOCK_K // 2))[None, :]"]
            mask = self._inside_k("in_n_row", "(byte < K // 2)")
            lines += [f"packed = tl.load({name}_ptr + n_row * (K // 2) + byte, mask={mask}, other=0)"]
            codes = f"{'unpacked' if form.element == 'int' else 'halves'}(packed, BLOCK_N, BLOCK_K)"
        else:
            lines = [f"packed = tl.load({name}_ptr + n_row * K + k, mask={self._inside_k('in_n_row', 'in_k')}, other=0)"]
            codes = "packed"
        if plan.has_codes:
            return [*lines, f"b = {codes}.T"]
        lines += [f"w = {self._number(codes)}"]
        if self._scales_weight:
            lines += self._steps()
            count = f"BLOCK_K // {plan.weight_block}"
            if self._steps_in_block == 1:
                lines += ["w = w * step"]
            else:
                lines += [f"w = tl.reshape(w, [BLOCK_N, {count}, {plan.weight_block}]) * tl.expand_dims(step, 2)"]
                lines += ["w = tl.reshape(w, [BLOCK_N, BLOCK_K])"]
        cast = f".to({TL_TYPES[plan.dtype]})" if plan.dtype != torch.float32 else ""
        return [*lines, f"b = w{cast}.T"]

    def _number(self, codes: str) -> str:
        """Codes as the float32 that they stand for."""
        return {"int": f"{codes}.to(tl.float32)", "e2m1": f"e2m1({codes})", "e4m3": f"e4m3({codes})"}[self.plan.form.element]

    @property
    def _scales_weight(self) -> bool:
        """Whether a weight is scaled before it is multiplied: where a row has more than one scale."""
        return self.plan.weight_block > 0

    @property
    def _steps_in_block(self) -> int:
        """Scales that a row of a block of the weight has."""
        return max(1, self.tile.k // self.plan.weight_block)

    def _steps(self) -> list[str]:
        """step [BLOCK_N, scales of a row of the block]: what codes of the weight are multiplied by."""
        block, name = self.plan.weight_block, self._input("weight_scale")
        count = self._steps_in_block
        if count == 1:
            load = f"tl.load({name}_ptr + n_row * (K // {block}) + k_start // {block}, mask=in_n_row, other=0)"
            return [f"step = {self._scale(load)}"]
        lines = [f"block = (k_start // {block} + tl.arange(0, {count}))[None, :]"]
        mask = self._inside_k("in_n_row", f"(block < K // {block})")
        load = f"tl.load({name}_ptr + n_row * (K // {block}) + block, mask={mask}, other=0)"
        return [*lines, f"step = {self._scale(load)}"]

    def _scale(self, load: str) -> str:
        """Scales as the float32 that they stand for; of formats with a tensor's scale, without that."""
        form = self.plan.form
        if form.scale in ("e8m0", "nv"):
            return f"{'e8m0' if form.scale == 'e8m0' else 'e4m3'}({load})"
        dtype = self.plan.inputs[self.plan.roles["weight_scale"]].meta["val"].dtype
        return load if dtype == torch.float32 else f"{load}.to(tl.float32)"

    def _dot(self) -> list[str]:
        plan, a = self.plan, self._left.names[0]
        if plan.has_codes and not plan.sum_block:
            return [f"acc = tl.dot({a}, b, acc, out_dtype=tl.int32)"]
        if plan.has_codes:
            return [f"sums = tl.dot({a}, b, out_dtype=tl.int32).to(tl.float32)", *self._block_scales(), "acc += sums"]
        if self._is_widened:
            return [
                "if INTERPRETED:  # there, these would be multiplied as integers",
                f"    acc = tl.dot({a}.to(tl.float32), b.to(tl.float32), acc)",
                "else:",
                f"    acc = tl.dot({a}, b, acc)",
            ]
        precision = ', input_precision="ieee"' if plan.dtype == torch.float32 else ""
        return [f"acc = tl.dot({a}, b, acc{precision})"]

    def _block_scales(self) -> list[str]:
        """The sums of a block times the scales that it alone has."""
        plan, lines = self.plan, []
        if plan.a_block:
            block, name = plan.a_block, self._input("a_scale")
            lines += [f"sums *= tl.load({name}_ptr + m * (K // {block}) + k_start // {block}, mask=in_m, other=0.0)"]
        if plan.weight_block:
            block, name = plan.weight_block, self._input("weight_scale")
            load = f"tl.load({name}_ptr + n * (K // {block}) + k_start // {block}, mask=in_n, other=0)"
            lines += [f"sums *= {self._scale(load)}"]
        return lines

    def _scaled(self) -> list[str]:
        """The sums times the scales of whole rows and columns."""
        plan, lines = self.plan, []
        if plan.has_codes and not plan.a_block:
            lines += [f"acc = acc * tl.load({self._input('a_scale')}_ptr + m, mask=in_m, other=0.0)"]
        if not plan.weight_block:
            load = f"tl.load({self._input('weight_scale')}_ptr + n, mask=in_n, other=0)"
            lines += [f"acc = acc * {self._scale(load)}"]
        if "weight_scale2" in plan.roles:
            name = self._input("weight_scale2")
            is_whole = plan.inputs[plan.roles["weight_scale2"]].meta["val"].numel() == 1
            lines += [f"acc = acc * tl.load({name}_ptr)" if is_whole else f"acc = acc * tl.load({name}_ptr + n, mask=in_n, other=0.0)"]
        return lines

    def _branch(self) -> list[str]:
        """acc += half @ up.T, the half of the branch rounded to the model's dtype."""
        plan = self.plan
        if not plan.rank:
            return []
        kind = TL_TYPES[plan.branch_dtype]
        up = plan.inputs[plan.roles["up"]].meta["val"].dtype
        casts = [f".to({kind})" if dtype != plan.branch_dtype else "" for dtype in (torch.float32, up)]
        lines = [
            "r = tl.arange(0, BLOCK_R)[None, :]",
            "in_r = r < R",
            *self._half(casts[0]),
            f"up = tl.load({self._input('up')}_ptr + n_row * R + r, mask=in_n_row & in_r, other=0.0){casts[1]}",
        ]
        if plan.branch_dtype == torch.bfloat16:
            lines += ["if INTERPRETED:", "    half, up = half.to(tl.float32), up.to(tl.float32)"]
        precision = ', input_precision="ieee"' if plan.branch_dtype == torch.float32 else ""
        return [*lines, f"acc = tl.dot(half, up.T, acc{precision})"]

    def _half(self, cast: str) -> list[str]:
        """The half of the branch that the first kernel gave, its parts added in order."""
        name, parts = self._input("half"), self.plan.parts
        if parts == 1:
            return [f"half = tl.load({name}_ptr + m * R + r, mask=in_m & in_r, other=0.0){cast}"]
        lines = ["half = tl.zeros([BLOCK_M, BLOCK_R], tl.float32)", f"for part in range({parts}):"]
        lines += [f"    half += tl.load({name}_ptr + (part * M + m) * R + r, mask=in_m & in_r, other=0.0)"]
        return [*lines, *([f"half = half{cast}"] if cast else [])]

    def _last(self) -> list[str]:
        """What follows the product, and where it goes."""
        write, values = self._after, self.plan.after.values
        lines = [write.define(n) for n, value in enumerate(values) if value.kind == "load"]
        lines += ["", *(write.define(n) for n, value in enumerate(values) if value.kind != "load"), ""]
        return [*lines, *map(write.store_tile, self.plan.stores)]

    # --- its launch and its reference ---

    def launch(self) -> list[str]:
        counts = {name: self.size(size) for name, size in self.counts().items()}
        sizes = [f"{name}={name}" if name in "MN" else f"{name}={text}" for name, text in counts.items()]
        sizes += [f"{name}={self.size(size)}" for name, size in self.addresses.arguments.sizes.items()]
        tensors = [f"{name}.view(torch.uint8)" if node.meta["val"].dtype in FLOAT8 else name for name, node in self.tensors()]
        blocks = [*(f"{name}={name}" for name in self.blocks()), "num_warps=NUM_WARPS", "num_stages=NUM_STAGES"]
        call = f"{self.name}[(tiles,)]({', '.join([*tensors, *self.outputs, *sizes, *blocks])})"
        count = "    tiles = triton.cdiv(M, BLOCK_M) * triton.cdiv(N, BLOCK_N)"
        return [f"    M, N = {counts['M']}, {counts['N']}", count, "    if tiles > 0:", f"        {call}"]

    def reference_functions(self) -> list[str]:
        return [product_text(self.plan)]

    def random(self, node: Node, shape: str) -> str:
        role = {number: role for role, number in self.plan.roles.items()}.get(self.plan.inputs.index(node))
        form = self.plan.form
        if role in ("a", "weight") and not node.meta["val"].dtype.is_floating_point:
            return f"torch.randint(0, 256, {shape})" if form.is_packed and role == "weight" else f"torch.randint(-127, 128, {shape})"
        if role == "weight_scale" and form.scale == "e8m0":
            return f"torch.randint(118, 123, {shape})"
        if role in ("a_scale", "weight_scale"):
            scale = 1 / 127 if role == "a_scale" else 1.0 if form.scale == "nv" else 1 / form.qmax
            return f"(torch.rand({shape}) + 0.5) * {scale:.3g}"
        if role == "weight_scale2":
            return f"(torch.rand({shape}) + 0.5) / {form.qmax!r}"
        return super().random(node, shape)

    @property
    def _block_r(self) -> int:
        return max(16, 1 << (self.plan.rank - 1).bit_length())

    @property
    def _is_widened(self) -> bool:
        """Whether the interpreter needs float32 to multiply."""
        return torch.bfloat16 in (self.plan.dtype, self.plan.branch_dtype)

    def _input(self, role: str) -> str:
        return self.inputs[self.plan.roles[role]]
