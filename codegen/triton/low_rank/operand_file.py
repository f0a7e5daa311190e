"""The kernel that gives what a product takes of x, as a file.

A program owns rows and visits all of k, once, or twice where a scale belongs to a whole row: the sums of the branch need no atomics.
"""

import torch

from ....ir import Node
from ....ir.low_bit.formats import Format
from ..file import CHECK, ERROR_OF, File
from ..index import Index, Size, linear
from ..statements import Statements, tuple_text
from ..values import TL_TYPES
from .helpers import with_needed
from .plan import OperandPlan
from .reference import quantized_text, rotated_text
from .tiles import OperandTile, default_operand_tile

INTERPRETED = 'INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")'
_ERROR_OF = '''def error_of(y, exact):
    """The largest difference, in terms of the largest element, but for one element in ten thousand: sums in another order may lie on the
    other side of a tie of two codes. NaN where one has NaN and the other has not."""
    y, exact = y.double(), exact.double()
    difference = torch.where(y == exact, 0.0, (y - exact).abs()).masked_fill(y.isnan() & exact.isnan(), 0.0).flatten()
    if not y.numel() or difference.isnan().any():
        return float("nan") if y.numel() else 0.0
    scale = exact.abs().nan_to_num(0.0, 0.0, 0.0).max().clamp(min=1.0)
    return (difference.sort().values[difference.numel() - 1 - difference.numel() // 10000] / scale).item()


'''


class OperandFile(File):
    """The text of one plan below the header."""

    plan: OperandPlan
    tile: OperandTile

    def default_tile(self) -> OperandTile:
        return default_operand_tile(self.plan, self.target)

    def input_names(self) -> list[str]:
        return sorted(self.plan.roles, key=self.plan.roles.__getitem__)

    def output_names(self) -> list[str]:
        return list(self.plan.results)

    def constants(self) -> list[str]:
        tile = self.tile
        lines = [f"BLOCK_M, BLOCK_K = {tile.m}, {tile.k}", f"NUM_WARPS, NUM_STAGES = {tile.num_warps}, {tile.num_stages}"]
        lines += [f"BLOCK_R = {self._block_r}"] if self.plan.rank else []
        return [*lines, *([INTERPRETED] if self._is_widened else [])]

    def blocks(self) -> dict[str, int]:
        return {"BLOCK_M": self.tile.m, "BLOCK_K": self.tile.k} | ({"BLOCK_R": self._block_r} if self.plan.rank else {})

    def counts(self) -> dict[str, Size]:
        return {"M": self.plan.m, "K": self.plan.k} | ({"R": self.plan.rank} if self.plan.rank else {})

    def helpers(self) -> list[str]:
        form, names = self.plan.form, ["turned"] if self.plan.rotate else []
        if form is not None:
            names += ["magnitude_bits", _STORED.get(form.scale) or _MODEL_STORED[self.plan.dtype]]
            names += [{"int": "nearest", "uint": "nearest"}.get(form.element, f"{form.element}_nearest")]
        return with_needed(names)

    def tolerance(self) -> float:
        # Sums of float32 terms in another order; beside them, one rounding to the model's dtype.
        return {torch.bfloat16: 1e-2, torch.float16: 2e-3}.get(self.plan.dtype, 2e-5) if "values" in self.plan.results else 2e-5

    def check(self) -> str:
        return (_ERROR_OF if self.plan.form is not None else ERROR_OF) + CHECK

    # --- the kernel ---

    def statements(self) -> list[str]:
        inputs, outputs = self.named()
        masks = {(True, True): "in_m & in_k", (True, False): "in_m", (False, True): "in_k", (False, False): ""}
        load = loaded(Statements(self.plan.left.values, self.addresses, inputs, outputs, masks, set()))
        lines = [*self._rows(), *self._before()]
        if self.plan.needs_scale:
            lines += ["for k_start in range(0, K, BLOCK_K):", *_inside([*self._loaded(load), *self._branch(), *self._largest()])]
            lines += [*self._step("amax"), *self._row_step_stored(), *self._branch_stored()]
            lines += ["for k_start in range(0, K, BLOCK_K):", *_inside([*self._loaded(load), *self._turned(), *self._quantized()])]
        else:
            inside = [*self._loaded(load), *self._branch(), *self._turned(), *self._quantized()]
            lines += [self._visit(), *_inside(inside), *self._branch_stored()]
        return _inside(lines)

    def _visit(self) -> str:
        if not self.plan.part:
            return "for k_start in range(0, K, BLOCK_K):"
        return f"for k_start in range(part * {self.plan.part}, tl.minimum(K, (part + 1) * {self.plan.part}), BLOCK_K):"

    def _rows(self) -> list[str]:
        wide = ".to(tl.int64)" if self._is_wide() else ""
        rows = f"(tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)){wide}"
        lines = ["part = tl.program_id(1)"] if self.plan.part else []
        lines += [f"m = {rows}[:, None]", "in_m = m < M"]
        return [*lines, *(f"{name} = {text}" for name, text in self.addresses.row_variables.items())]

    def _is_wide(self) -> bool:
        domain = self.plan.domain
        variables = (*domain.rows, *domain.columns)
        stored = linear([Index.of(v) for v in variables], [v.size for v in variables])
        return self.addresses.needs_int64([self.plan.left.values[0].index, stored])

    def _before(self) -> list[str]:
        lines = []
        if self.plan.rank:
            lines += ["r = tl.arange(0, BLOCK_R)[None, :]", "in_r = r < R", "half = tl.zeros([BLOCK_M, BLOCK_R], tl.float32)"]
        if self.plan.needs_scale:
            lines += ["amax = tl.zeros([BLOCK_M, 1], tl.int32)"]
        return lines

    def _loaded(self, load: list[str]) -> list[str]:
        columns = self.addresses.column_variables.items()
        lines = ["k = (k_start + tl.arange(0, BLOCK_K))[None, :]", "in_k = k < K", *(f"{name} = {text}" for name, text in columns)]
        return [*lines, *load]

    def _branch(self) -> list[str]:
        """half += x @ down.T, of the numbers as they are."""
        if not self.plan.rank:
            return []
        down = self.plan.inputs[self.plan.roles["down"]].meta["val"].dtype
        name = self._input("down")
        cast = "" if down == self.plan.dtype else f".to({TL_TYPES[self.plan.dtype]})"
        lines = [
            "k_down = k_start + tl.arange(0, BLOCK_K)[:, None]",
            f"branch = tl.load({name}_ptr + r * K + k_down, mask=(k_down < K) & in_r, other=0.0){cast}",
        ]
        x = self._input("x")
        if self._is_widened:
            lines += ["if INTERPRETED:  # there, these would be multiplied as integers"]
            lines += [f"    half = tl.dot({x}.to(tl.float32), branch.to(tl.float32), half)", "else:"]
            return [*lines, f"    half = tl.dot({x}, branch, half)"]
        precision = ', input_precision="ieee"' if self.plan.dtype == torch.float32 else ""
        return [*lines, f"half = tl.dot({x}, branch, half{precision})"]

    def _branch_stored(self) -> list[str]:
        if not self.plan.rank:
            return []
        row = "(part * M + m)" if self.plan.part else "m"
        return [f"tl.store({self._output('half')}_ptr + {row} * R + r, half, mask=in_m & in_r)"]

    def _turned(self) -> list[str]:
        """xs: x shifted, smoothed and turned."""
        plan = self.plan
        if not {"codes", "values"} & set(plan.results):
            return []
        lines = [f"xs = {self._input('x')}.to(tl.float32)" if plan.dtype != torch.float32 else f"xs = {self._input('x')}"]
        lines += [f"xs = xs + {plan.shift!r}"] if plan.shift else []
        if "smooth" in plan.roles:
            lines += [f"xs = xs * tl.load({self._input('smooth')}_ptr + k, mask=in_k, other=0.0).to(tl.float32)"]
        elif plan.shift:
            lines += ["xs = tl.where(in_k, xs, 0.0)"]
        if plan.rotate:
            steps = plan.rotate.bit_length() - 1
            lines += [f"xs = turned(xs, {plan.rotate}, {steps}, {2.0 ** -(steps // 2)!r})"]
        return lines

    def _largest(self) -> list[str]:
        """The largest magnitude so far, of a scale that belongs to a row."""
        return [*self._turned(), f"amax = tl.maximum(amax, tl.max({self._magnitude('xs')}, 1, keep_dims=True))"]

    def _magnitude(self, value: str) -> str:
        assert self.plan.form is not None
        return f"magnitude_bits({value})" if self.plan.form.element != "uint" else f"magnitude_bits(tl.where({value} < 0.0, 0.0, {value}))"

    def _step(self, amax: str) -> list[str]:
        """What codes are multiplied by."""
        form = self.plan.form
        assert form is not None
        lines = [f"scale = tl.div_rn({amax}.to(tl.float32, bitcast=True), {float(form.qmax)!r})"]
        if form.scale == "nv":
            scale2 = f"{self.plan.scale2!r}"
            return [*lines, f"step = tl.where({amax} == 0, 1.0, stored(tl.div_rn(scale, {scale2}))) * {scale2}"]
        return [*lines, f"step = tl.where({amax} == 0, 1.0, stored(scale))"]

    def _row_step_stored(self) -> list[str]:
        return [f"tl.store({self._output('steps')}_ptr + m, step, mask=in_m)"] if "steps" in self.plan.results else []

    def _quantized(self) -> list[str]:
        """Stores what becomes of xs."""
        plan, form = self.plan, self.plan.form
        if form is None:
            return self._values_stored("xs") if plan.results[:1] == ("values",) else []
        if plan.block == 0:
            lines, blocks = [], "xs"
        else:
            lines = [f"blocks = tl.reshape(xs, [BLOCK_M, BLOCK_K // {plan.block}, {plan.block}])"]
            lines += [f"amax = tl.max({self._magnitude('blocks')}, 2, keep_dims=True)", *self._step("amax")]
            blocks = "blocks"
        lines += [f"y = {_clamped(f'tl.div_rn({blocks}, tl.broadcast_to(step, {blocks}.shape))', form)}"]
        rounded = {"int": "nearest(y)", "uint": "nearest(y)"}.get(form.element, f"{form.element}_nearest(y)")
        if plan.results[0] == "values":
            return [*lines, *self._values_stored(f"tl.reshape({rounded} * step, [BLOCK_M, BLOCK_K])")]
        lines += [f"code = tl.reshape({rounded}, [BLOCK_M, BLOCK_K]).to(tl.int8)"]
        lines += [f"tl.store({self._output('codes')}_ptr + m * K + k, code, mask=in_m & in_k)"]
        if plan.block == 0:
            return lines
        count = f"BLOCK_K // {plan.block}"
        lines += [f"block = (k_start // {plan.block} + tl.arange(0, {count}))[None, :]", f"in_block = block < K // {plan.block}"]
        address = f"{self._output('steps')}_ptr + m * (K // {plan.block}) + block"
        return [*lines, f"tl.store({address}, tl.reshape(step, [BLOCK_M, {count}]), mask=in_m & in_block)"]

    def _values_stored(self, text: str) -> list[str]:
        cast = "" if self.plan.dtype == torch.float32 else f".to({TL_TYPES[self.plan.dtype]})"
        return [f"values = {text}", f"tl.store({self._output('values')}_ptr + m * K + k, values{cast}, mask=in_m & in_k)"]

    # --- its launch and its reference ---

    def launch(self) -> list[str]:
        counts = {name: self.size(size) for name, size in self.counts().items()}
        sizes = [f"{name}={name}" if name == "M" else f"{name}={text}" for name, text in counts.items()]
        sizes += [f"{name}={self.size(size)}" for name, size in self.addresses.arguments.sizes.items()]
        parts = f" {-(-self.plan.k // self.plan.part)}" if self.plan.part else ""
        blocks = [*(f"{name}={name}" for name in self.blocks()), "num_warps=NUM_WARPS", "num_stages=NUM_STAGES"]
        call = f"{self.name}[(triton.cdiv(M, BLOCK_M),{parts})]({', '.join([*self.inputs, *self.outputs, *sizes, *blocks])})"
        return [f"    M = {counts['M']}", "    if M > 0:", f"        {call}"]

    def reference(self) -> str:
        plan, form = self.plan, self.plan.form
        x, results = self._input("x"), []
        lines = [
            f"def reference({', '.join(self.inputs)}):",
            '    """The same in plain PyTorch: codes and scales are formed in float32."""',
        ]
        if form is not None or "values" in plan.results:
            lines += [f"    xs = {x}.float()" + (f" + {plan.shift!r}" if plan.shift else "")]
            lines += [f"    xs = xs * {self._input('smooth')}.float()"] if "smooth" in plan.roles else []
            lines += [f"    xs = rotated(xs, {plan.rotate})"] if plan.rotate else []
            if form is None:
                results = ["xs"]
            else:
                lines += ["    codes, steps = quantized(xs)"]
                results = (
                    ["codes.flatten(-2).to(torch.int8)", "steps"]
                    if "codes" in plan.results
                    else ["(codes * steps.unsqueeze(-1)).flatten(-2)"]
                )
        if plan.rank:
            text = f"{x}.double() @ {self._input('down')}.double().T"
            if plan.part:
                lines += [f"    pieces = zip(*(tensor.double().split({plan.part}, -1) for tensor in ({x}, {self._input('down')})))"]
                text = "torch.stack([piece @ factor.T for piece, factor in pieces])"
            results += [text]
        return "\n".join([*lines, f"    return {tuple_text(results)}"])

    def reference_functions(self) -> list[str]:
        rotated = [rotated_text(self.plan.rotate)] if self.plan.rotate else []
        return [*rotated, *([quantized_text(self.plan)] if self.plan.form is not None else [])]

    def random(self, node: Node, shape: str) -> str:
        if node is self.plan.inputs[0]:
            return f"torch.randn({shape})"
        if self.plan.roles.get("smooth") == self.plan.inputs.index(node):
            return f"torch.rand({shape}) + 0.5"
        return f"torch.randn({shape}) / {self.plan.k}**0.5"

    @property
    def _block_r(self) -> int:
        return max(16, 1 << (self.plan.rank - 1).bit_length())

    @property
    def _is_widened(self) -> bool:
        """Whether the interpreter needs float32 to multiply."""
        return self.plan.dtype == torch.bfloat16 and self.plan.rank > 0

    def _input(self, role: str) -> str:
        return self.inputs[self.plan.roles[role]]

    def _output(self, name: str) -> str:
        return self.outputs[self.plan.results.index(name)]


# The functions that round scales to how they are stored.
_STORED = {"f32": "float32_scale", "e8m0": "power_scale", "nv": "e4m3_scale"}
_MODEL_STORED = {torch.bfloat16: "bfloat16_scale", torch.float16: "float16_scale", torch.float32: "float32_scale"}


def loaded(write: Statements) -> list[str]:
    """Statements that load a block of a left operand; one that is the same for all rows, or all of k, becomes a whole block."""
    value, name = write.values[0], write.names[0]
    whole = [] if value.rows and value.columns else [f"{name} = tl.broadcast_to({name}, [BLOCK_M, BLOCK_K])"]
    return [write.define(0), *whole]


def _inside(lines: list[str]) -> list[str]:
    return ["    " + line for line in lines]


def _clamped(text: str, form: Format) -> str:
    low = 0.0 if form.element == "uint" else -float(form.qmax)
    return f"tl.clamp({text}, {low!r}, {float(form.qmax)!r})"
