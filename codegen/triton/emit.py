"""One plan -> one file of Triton: header, kernel, `run`, a plain PyTorch `reference`, and a check of one against the other.

The file stands alone: `python kernel_x.py` checks itself, in Triton's interpreter where there is no GPU. Equal plans give equal bytes
below the header, whatever layer they come from.
"""

import hashlib
import keyword
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import sympy
import torch

from ...ir import Node, SymbolTable
from .addresses import RESERVED, Addresses, unique
from .body import KernelBody
from .index import Size, size_of
from .pointwise import HELPERS, NotFusible
from .reference import gw_functions, in_order, reference_lines
from .roofline import Roofline, bytes_before, known_sizes, roofline
from .tiles import Tile, default_tile
from .values import Plan

_WIDTH = 120
_IMPORTS = """import os

import torch

if __name__ == "__main__" and not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before triton is imported

import triton
import triton.language as tl

aten = torch.ops.aten
"""
_LAID_OUT = '''def laid_out(x, stride):
    """`x`, copied if its strides are not those that the addresses were written for."""
    if all(n <= 1 or a == b for n, a, b in zip(x.shape, x.stride(), stride)):
        return x
    return torch.empty_strided(x.shape, stride, dtype=x.dtype, device=x.device).copy_(x)
'''
_CHECK = '''def check(device):
    """Random inputs, outputs poisoned with NaN, against the reference in float64."""
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True)  # makes fresh memory NaN, so what is never written shows
    inputs = example_inputs(device)
    results = run(*inputs)
    expected = reference(*(x.double() if x.is_floating_point() else x for x in inputs))
    for n, (y, exact) in enumerate(zip(results, expected)):
        y, exact = y.double(), exact.double()
        difference = torch.where(y == exact, 0.0, (y - exact).abs()).masked_fill(y.isnan() & exact.isnan(), 0.0)
        scale = exact.abs().nan_to_num(0.0, 0.0, 0.0).max().clamp(min=1.0) if y.numel() else 1.0
        error = (difference / scale).max().item() if y.numel() else 0.0
        if not error <= TOLERANCE:  # NaN as well
            raise AssertionError(f"output {n} differs by {error:.3g}, more than {TOLERANCE:.3g}")
        print(f"output {n}: error {error:.3g} of at most {TOLERANCE:.3g} on {device}")


if __name__ == "__main__":
    check("cuda" if torch.cuda.is_available() else "cpu")
'''
# Relative to the largest element: a few roundings of the coarsest type that a group computes or casts to.
_TOLERANCES = {torch.float64: 1e-12, torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}


@dataclass(frozen=True)
class Parameter:
    """One parameter of a kernel function: a pointer to `dtype`, or a size, here at its hint; `is_constant` if compiled in."""

    name: str
    dtype: torch.dtype | None = None
    size: int = 0
    is_constant: bool = False


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
    tile: Tile
    plan: Plan
    parameters: tuple[Parameter, ...]

    @property
    def file_name(self) -> str:
        return f"kernel_{self.name}_{self.digest}.py"


def emit(plan: Plan, symbols: SymbolTable, ir_lines: Mapping[Node, str] | None = None) -> Kernel:
    """The kernel of `plan`. `ir_lines` are the lines of its nodes, and of the views between them, as the program's text has them.

    Raises:
        NotFusible: a size is known from no input.
    """
    writer = _File(plan, symbols)
    body = writer.body()
    digest = hashlib.sha256(body.encode()).hexdigest()[:16]
    ir = tuple((ir_lines or {}).get(node, str(node)).strip() for node in in_order(plan.nodes, plan.outputs))
    cost = roofline(plan)
    header = _header(writer, plan, ir, digest, cost)
    return Kernel(writer.name, header + body, digest, ir, bytes_before(plan.nodes), cost, writer.tile, plan, writer.parameters())


def _header(writer: "_File", plan: Plan, ir: Sequence[str], digest: str, cost: Roofline) -> str:
    places = dict.fromkeys(str(node.meta["where"]) for node in plan.nodes if str(node.meta.get("where") or ""))
    lines = [f'"""{writer.name}: {len(plan.nodes)} operation{"s" if len(plan.nodes) != 1 else ""} in one kernel.', "", "Computes:"]
    lines += [f"    {_plain(line.partition('  # ')[0])}" for line in ir]
    if places:
        lines += ["From:", *(f"    {_plain(place)}" for place in places)]
    lines += [f"Content: sha256 {digest}", f"Tuning: {writer.tile}", f"Roofline: {cost.line()}", '"""', ""]
    return "\n".join(lines) + "\n"


def _plain(text: str) -> str:
    return text.replace("\\", "/").replace('"""', "'''")


class _File:
    """The text of one plan below the header."""

    def __init__(self, plan: Plan, symbols: SymbolTable):
        self.plan = plan
        self.symbols = symbols
        self.tile = default_tile(plan)
        self.name = kernel_name(plan.nodes)
        self.addresses = Addresses(plan.domain, symbols)
        taken = {*RESERVED, self.name, *self.addresses.symbol_names.values()}
        self.inputs = [unique(_input_name(node), taken) for node in plan.inputs]
        self.outputs = [unique("y" if len(plan.outputs) == 1 else f"y{n}", taken) for n in range(len(plan.outputs))]

    def body(self) -> str:
        named = [dict(zip(self.inputs, self.plan.inputs)), dict(zip(self.outputs, self.plan.outputs))]
        writer = KernelBody(self.plan, self.tile, self.addresses, *named)
        writer.lines()  # a first time for the variables that its positions use, which it defines at its head
        statements = writer.lines()
        helpers = dict.fromkeys(h for value in self.plan.values for h in value.helpers)
        parts = [_IMPORTS, self._constants()]
        parts += [HELPERS[helper] for helper in sorted(helpers)]
        parts += [self._kernel(statements), _LAID_OUT, self._run()]
        parts += [*gw_functions(self.plan.nodes), self._reference(), self._example_inputs(), _CHECK]
        return "\n\n".join(part.rstrip("\n") + "\n" for part in parts).replace("\n\n\n\n", "\n\n\n")

    def _constants(self) -> str:
        tile = self.tile
        lines = [f"ROWS, COLS = {tile.rows}, {tile.columns}"] if tile.rows else [f"BLOCK = {tile.columns}"]
        return "\n".join([*lines, f"NUM_WARPS = {tile.num_warps}", f"TOLERANCE = {_tolerance(self.plan)!r}"])

    @property
    def blocks(self) -> list[str]:
        return ["ROWS", "COLS"] if self.tile.rows else ["BLOCK"]

    def _sizes(self) -> dict[str, Size]:
        """What the kernel takes beside pointers and blocks."""
        domain = self.plan.domain
        counts = {"n_rows": domain.num_rows, "n_cols": domain.num_columns} if domain.by_rows else {"n": domain.num_columns}
        return counts | self.addresses.arguments.sizes

    def parameters(self) -> tuple[Parameter, ...]:
        """The parameters of the kernel function, in order."""
        constants, known = self.addresses.arguments.constants, known_sizes(self.plan)
        tensors = zip((*self.inputs, *self.outputs), (*self.plan.inputs, *self.plan.outputs), strict=True)
        pointers = [Parameter(f"{name}_ptr", node.meta["val"].dtype) for name, node in tensors]
        sizes = [Parameter(name, None, known(size), name in constants) for name, size in self._sizes().items()]
        sizes.sort(key=lambda parameter: parameter.is_constant)
        blocks = {"ROWS": self.tile.rows, "COLS": self.tile.columns, "BLOCK": self.tile.columns}
        return (*pointers, *sizes, *(Parameter(name, None, blocks[name], True) for name in self.blocks))

    def _kernel(self, statements: Sequence[str]) -> str:
        constants = self.addresses.arguments.constants
        pointers = [f"{name}_ptr" for name in (*self.inputs, *self.outputs)]
        plain = [name for name in self._sizes() if name not in constants]
        fixed = [f"{name}: tl.constexpr" for name in self._sizes() if name in constants]
        blocks = [f"{name}: tl.constexpr" for name in self.blocks]
        head = _wrapped(f"def {self.name}(", [pointers, plain, [*fixed, *blocks]], "):")
        return "\n".join(["@triton.jit", *head, *statements])

    def _run(self) -> str:
        sizes, domain = self._sizes(), self.plan.domain
        lines = [f"def run({', '.join(self.inputs)}):", f'    """The outputs of one launch, as a tuple: {", ".join(self.outputs)}."""']
        checks = [
            f"    {name} = laid_out({name}, {self._tuple(map(size_of, node.meta['val'].stride()))})" for name, node in self._tensors()
        ]
        makes = []
        for name, node in zip(self.outputs, self.plan.outputs, strict=True):
            value = node.meta["val"]
            shape, stride = self._tuple(map(size_of, value.shape)), self._tuple(map(size_of, value.stride()))
            makes.append(f"    {name} = torch.empty_strided({shape}, {stride}, dtype={value.dtype}, device={self.inputs[0]}.device)")
        total, block = (domain.num_rows, "ROWS") if domain.by_rows else (domain.num_columns, "BLOCK")
        count = "n_rows" if domain.by_rows else "n"
        arguments = [f"{name}={self._size(size)}" for name, size in sizes.items() if name != count]
        launch = _wrapped(
            f"    {self.name}[(triton.cdiv({count}, {block}),)](",
            [[*self.inputs, *self.outputs], [f"{count}={count}", *arguments], [*(f"{b}={b}" for b in self.blocks), "num_warps=NUM_WARPS"]],
            ")",
        )
        guard = [f"    {count} = {self._size(total)}", f"    if {count} > 0:", *("    " + line for line in launch)]
        texts = [*checks, *makes, *guard]
        return "\n".join([*lines, *self._bindings(texts), *texts, f"    return ({', '.join(self.outputs)},)"])

    def _tensors(self) -> Iterable[tuple[str, Node]]:
        return zip(self.inputs, self.plan.inputs, strict=True)

    def _size(self, size: Size) -> str:
        return self.addresses.symbolic(size).replace("Max(", "max(").replace("Min(", "min(")

    def _tuple(self, sizes: Iterable[Size]) -> str:
        texts = [self._size(size) for size in sizes]
        return f"({texts[0]},)" if len(texts) == 1 else f"({', '.join(texts)})"

    def _bindings(self, texts: Sequence[str]) -> list[str]:
        """Reads the symbols that `texts` use off the shapes of the inputs."""
        used = set(re.findall(r"[A-Za-z_]\w*", "\n".join(texts)))
        lines = []
        for symbol in self.symbols:
            name = self.addresses.symbol_names[symbol.name]
            if name in used:
                expr: Any = self.symbols.size(symbol.name).node.expr
                lines.append(f"    {name} = {self._place(expr)}")
        return lines

    def _place(self, symbol: sympy.Symbol) -> str:
        for name, node in self._tensors():
            for dim, size in enumerate(node.meta["val"].shape):
                if size_of(size) == symbol:
                    return f"{name}.shape[{dim}]"
        raise NotFusible(f"no input tells the size {symbol}")

    def _reference(self) -> str:
        named = {node: name for name, node in self._tensors()}
        lines = reference_lines(self.plan.nodes, self.plan.outputs, named, self.addresses)
        head = [f"def reference({', '.join(self.inputs)}):", '    """The same in plain PyTorch."""']
        return "\n".join([*head, *self._bindings(lines), *lines])

    def _example_inputs(self) -> str:
        lines = ["def example_inputs(device):", '    """Random tensors of the types that the program has."""']
        hints = [f"    {self.addresses.symbol_names[s.name]} = {s.hint}" for s in self.symbols]
        makes = []
        for name, node in self._tensors():
            value = node.meta["val"]
            shape, stride = self._tuple(map(size_of, value.shape)), self._tuple(map(size_of, value.stride()))
            makes.append(f"    {name} = torch.empty_strided({shape}, {stride}, dtype={value.dtype}, device=device)")
            makes.append(f"    {name}.copy_({_random(self.plan, value, shape)})")
        used = set(re.findall(r"[A-Za-z_]\w*", "\n".join(makes)))
        hints = [line for line in hints if line.split()[0] in used]
        return "\n".join([*lines, *hints, *makes, f"    return [{', '.join(self.inputs)}]"])


def _random(plan: Plan, value: Any, shape: str) -> str:
    if not value.dtype.is_floating_point:
        return f"torch.randint(0, 2, {shape})"
    domain = {"log", "log2", "sqrt", "rsqrt", "norm_apply", "pow"}
    is_positive = any(str(node.target).split(".")[1] in domain for node in plan.nodes)
    return f"torch.rand({shape}) + 0.5" if is_positive else f"torch.randn({shape})"


def _tolerance(plan: Plan) -> float:
    dtypes = {node.meta["val"].dtype for node in (*plan.nodes, *plan.outputs)}
    return max((_TOLERANCES.get(dtype, 0.0) for dtype in dtypes), default=0.0)


def _wrapped(head: str, groups: Sequence[Sequence[str]], tail: str) -> list[str]:
    """`head` arguments `tail`, on one line where it fits, else a line for each group of arguments (more where it is long)."""
    line = f"{head}{', '.join(a for group in groups for a in group)}{tail}"
    if len(line) <= _WIDTH:
        return [line]
    indent = " " * (len(head) - len(head.lstrip()))
    lines = [head]
    for group in groups:
        current = f"{indent}   "
        for argument in group:
            if len(current) + len(argument) + 2 > _WIDTH:
                lines.append(current)
                current = f"{indent}   "
            current += f" {argument},"
        if group:
            lines.append(current)
    return [*lines, indent + tail]


def _input_name(node: Node) -> str:
    if node.op == "call_function":
        name = str(node.target).split(".")[1] if "." in str(node.target) else "x"
    else:
        name = str(node.target).rpartition(".")[2]
    name = re.sub(r"\W", "_", name).strip("_") or "x"
    return f"x_{name}" if keyword.iskeyword(name) or not name.isidentifier() else name


def kernel_name(nodes: Sequence[Node]) -> str:
    """The operations in order, the first four that differ from the one before."""
    packets: list[str] = []
    for node in nodes:
        packet = str(node.target).split(".")[1].strip("_")
        if not packets or packets[-1] != packet:
            packets.append(packet)
    return "_".join(packets[:4]) + ("_and_more" if len(packets) > 4 else "_kernel" if len(packets) == 1 else "")
