"""One plan as a file of Triton below its header: kernel, `run`, a plain PyTorch `reference`, and a check of one against the other."""

import keyword
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import sympy
import torch

from ...ir import Node, SymbolTable
from .addresses import RESERVED, Addresses, unique
from .body import KernelBody
from .index import Size, size_of
from .line_breaks import with_breaks
from .pointwise import HELPERS, NotFusible
from .reference import gw_functions, reference_lines
from .roofline import known_sizes
from .statements import tuple_text
from .targets import Target
from .tiles import default_tile

IMPORTS = """import os

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
ERROR_OF = '''def error_of(y, exact):
    """The largest difference, in terms of the largest element; NaN where one has NaN and the other has not."""
    y, exact = y.double(), exact.double()
    difference = torch.where(y == exact, 0.0, (y - exact).abs()).masked_fill(y.isnan() & exact.isnan(), 0.0)
    scale = exact.abs().nan_to_num(0.0, 0.0, 0.0).max().clamp(min=1.0) if y.numel() else 1.0
    return (difference / scale).max().item() if y.numel() else 0.0


'''
CHECK = '''def check(device):
    """Random inputs, outputs poisoned with NaN, against the reference in float64."""
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True)  # makes fresh memory NaN, so what is never written shows
    inputs = example_inputs(device)
    results = run(*inputs)
    expected = reference(*(x.double() if x.is_floating_point() else x for x in inputs))
    for n, (y, exact) in enumerate(zip(results, expected)):
        error = error_of(y, exact)
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
    """One parameter of a kernel function: a pointer to `dtype` (or, with `block`, a descriptor of such blocks), or a size, here at its
    hint; `is_constant` if compiled in."""

    name: str
    dtype: torch.dtype | None = None
    size: int = 0
    is_constant: bool = False
    block: tuple[int, ...] = ()


class File:
    """The text of one plan for `target` below the header, with its default tile if `tile` is None."""

    own_names: frozenset[str] = frozenset()  # that no input may have

    def __init__(self, plan: Any, symbols: SymbolTable, tile: Any, target: Target):
        self.plan = plan
        self.target = target
        self.symbols = symbols
        self.is_default = tile is None
        self.tile = self.default_tile() if tile is None else tile
        self.name = kernel_name(plan.nodes)
        self.addresses = Addresses(plan.domain, symbols)
        taken = {*RESERVED, *self.own_names, self.name, *self.addresses.symbol_names.values()}
        self.inputs = [unique(name, taken) for name in self.input_names()]
        self.outputs = [unique(name, taken) for name in self.output_names()]

    def default_tile(self) -> Any:
        return default_tile(self.plan)

    def input_names(self) -> list[str]:
        """What inputs are called where nothing else has that name."""
        return [input_name(node) for node in self.plan.inputs]

    def output_names(self) -> list[str]:
        """What outputs are called where nothing else has that name."""
        return ["y"] if len(self.plan.outputs) == 1 else [f"y{n}" for n in range(len(self.plan.outputs))]

    def body(self) -> str:
        statements = self.statements()
        parts = [self.imports(), "\n".join([*self.constants(), f"TOLERANCE = {self.tolerance()!r}"]), *self.helpers()]
        parts += [self._kernel(statements), *self.functions(), self.run()]
        parts += [*self.reference_functions(), self.reference(), self._example_inputs(), self.check()]
        return with_breaks("\n\n".join(part.rstrip("\n") + "\n" for part in parts).replace("\n\n\n\n", "\n\n\n"))

    def imports(self) -> str:
        return IMPORTS

    def helpers(self) -> list[str]:
        """What the kernel calls."""
        return [HELPERS[helper] for helper in sorted({helper for value in self.plan.values for helper in value.helpers})]

    def tolerance(self) -> float:
        """How far results may be from the reference in float64."""
        return _tolerance(self.plan)

    def reference_functions(self) -> list[str]:
        """What `reference` calls."""
        return gw_functions(self.plan.nodes)

    def check(self) -> str:
        """The functions that compare results with the reference."""
        return ERROR_OF + CHECK

    def functions(self) -> list[str]:
        """What `run` calls."""
        return [_LAID_OUT]

    def statements(self) -> list[str]:
        """Those of the kernel function."""
        writer = KernelBody(self.plan, self.tile, self.addresses, *self.named())
        writer.lines()  # a first time for the variables that its positions use, which it defines at its head
        return writer.lines()

    def named(self) -> tuple[dict[str, Node], dict[str, Node]]:
        """Inputs and outputs by their names."""
        return dict(zip(self.inputs, self.plan.inputs)), dict(zip(self.outputs, self.plan.outputs))

    def constants(self) -> list[str]:
        """The definitions of what the tile settles."""
        tile = self.tile
        lines = [f"ROWS, COLS = {tile.rows}, {tile.columns}"] if tile.rows else [f"BLOCK = {tile.columns}"]
        return [*lines, f"NUM_WARPS = {tile.num_warps}"]

    def blocks(self) -> dict[str, int]:
        """The compile-time constants that the tile settles."""
        return {"ROWS": self.tile.rows, "COLS": self.tile.columns} if self.tile.rows else {"BLOCK": self.tile.columns}

    def pointers(self) -> list[Parameter]:
        """How the kernel takes tensors."""
        tensors = zip((*self.inputs, *self.outputs), (*self.plan.inputs, *self.plan.outputs), strict=True)
        return [Parameter(f"{name}_ptr", node.meta["val"].dtype) for name, node in tensors]

    def sizes(self) -> dict[str, Size]:
        """What the kernel takes beside tensors and blocks."""
        return self.counts() | self.addresses.arguments.sizes

    def counts(self) -> dict[str, Size]:
        """How many positions there are, by name."""
        domain = self.plan.domain
        return {"n_rows": domain.num_rows, "n_cols": domain.num_columns} if domain.by_rows else {"n": domain.num_columns}

    def parameters(self) -> tuple[Parameter, ...]:
        """The parameters of the kernel function, in order."""
        constants, known = self.addresses.arguments.constants, known_sizes(self.plan)
        sizes = [Parameter(name, None, known(size), name in constants) for name, size in self.sizes().items()]
        sizes.sort(key=lambda parameter: parameter.is_constant)
        return (*self.pointers(), *sizes, *(Parameter(name, None, value, True) for name, value in self.blocks().items()))

    def _kernel(self, statements: Sequence[str]) -> str:
        constants = self.addresses.arguments.constants
        pointers = [parameter.name for parameter in self.pointers()]
        plain = [name for name in self.sizes() if name not in constants]
        fixed = [f"{name}: tl.constexpr" for name in self.sizes() if name in constants]
        parameters = [*pointers, *plain, *fixed, *(f"{name}: tl.constexpr" for name in self.blocks())]
        return "\n".join(["@triton.jit", f"def {self.name}({', '.join(parameters)}):", *statements])

    def run(self) -> str:
        lines = [f"def run({', '.join(self.inputs)}):", f'    """The outputs of one launch, as a tuple: {", ".join(self.outputs)}."""']
        checks = [f"    {name} = laid_out({name}, {self.tuple(map(size_of, node.meta['val'].stride()))})" for name, node in self.tensors()]
        makes = []
        for name, node in zip(self.outputs, self.plan.outputs, strict=True):
            value = node.meta["val"]
            shape, stride = self.tuple(map(size_of, value.shape)), self.tuple(map(size_of, value.stride()))
            makes.append(f"    {name} = torch.empty_strided({shape}, {stride}, dtype={value.dtype}, device={self.inputs[0]}.device)")
        texts = [*checks, *makes, *self.launch()]
        return "\n".join([*lines, *self.bindings(texts), *texts, f"    return {tuple_text(self.outputs)}"])

    def launch(self) -> list[str]:
        """The statements of `run` that launch the kernel."""
        domain = self.plan.domain
        total, block, count = (domain.num_rows, "ROWS", "n_rows") if domain.by_rows else (domain.num_columns, "BLOCK", "n")
        sizes = [f"{name}={self.size(size)}" for name, size in self.sizes().items() if name != count]
        arguments = [*self.inputs, *self.outputs, f"{count}={count}", *sizes, *(f"{b}={b}" for b in self.blocks()), "num_warps=NUM_WARPS"]
        launch = f"{self.name}[(triton.cdiv({count}, {block}),)]({', '.join(arguments)})"
        return [f"    {count} = {self.size(total)}", f"    if {count} > 0:", f"        {launch}"]

    def tensors(self) -> Iterable[tuple[str, Node]]:
        """Inputs by their names."""
        return zip(self.inputs, self.plan.inputs, strict=True)

    def size(self, size: Size) -> str:
        return self.addresses.symbolic(size).replace("Max(", "max(").replace("Min(", "min(")

    def tuple(self, sizes: Iterable[Size]) -> str:
        return tuple_text(map(self.size, sizes))

    def bindings(self, texts: Sequence[str]) -> list[str]:
        """Statements that read the symbols in `texts` off the shapes of the inputs."""
        used = set(re.findall(r"[A-Za-z_]\w*", "\n".join(texts)))
        lines = []
        for symbol in self.symbols:
            name = self.addresses.symbol_names[symbol.name]
            if name in used:
                expr: Any = self.symbols.size(symbol.name).node.expr
                lines.append(f"    {name} = {self._place(expr)}")
        return lines

    def _place(self, symbol: sympy.Symbol) -> str:
        for name, node in self.tensors():
            for dim, size in enumerate(node.meta["val"].shape):
                if size_of(size) == symbol:
                    return f"{name}.shape[{dim}]"
        raise NotFusible(f"no input tells the size {symbol}")

    def reference(self) -> str:
        """The function that results are compared with."""
        named = {node: name for name, node in self.tensors()}
        lines = reference_lines(self.plan.nodes, self.plan.outputs, named, self.addresses)
        head = [f"def reference({', '.join(self.inputs)}):", '    """The same in plain PyTorch."""']
        return "\n".join([*head, *self.bindings(lines), *lines])

    def random(self, node: Node, shape: str) -> str:
        """Random values for an input."""
        return _random(self.plan, node.meta["val"], shape)

    def _example_inputs(self) -> str:
        lines = ["def example_inputs(device):", '    """Random tensors of the types that the program has."""']
        hints = [f"    {self.addresses.symbol_names[s.name]} = {s.hint}" for s in self.symbols]
        makes = []
        for name, node in self.tensors():
            value = node.meta["val"]
            shape, stride = self.tuple(map(size_of, value.shape)), self.tuple(map(size_of, value.stride()))
            makes.append(f"    {name} = torch.empty_strided({shape}, {stride}, dtype={value.dtype}, device=device)")
            makes.append(f"    {name}.copy_({self.random(node, shape)})")
        used = set(re.findall(r"[A-Za-z_]\w*", "\n".join(makes)))
        hints = [line for line in hints if line.split()[0] in used]
        return "\n".join([*lines, *hints, *makes, f"    return [{', '.join(self.inputs)}]"])


def _random(plan: Any, value: Any, shape: str) -> str:
    if not value.dtype.is_floating_point:
        return f"torch.randint(0, 2, {shape})"
    domain = {"log", "log2", "sqrt", "rsqrt", "norm_apply", "pow"}
    is_positive = any(str(node.target).split(".")[1] in domain for node in plan.nodes)
    return f"torch.rand({shape}) + 0.5" if is_positive else f"torch.randn({shape})"


def _tolerance(plan: Any) -> float:
    dtypes = {node.meta["val"].dtype for node in (*plan.nodes, *plan.outputs)}
    return max((_TOLERANCES.get(dtype, 0.0) for dtype in dtypes), default=0.0)


def input_name(node: Node) -> str:
    """The last part of the name of an input, or the operation that made it."""
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
