"""Products of matrices with what comes before and after them, as the plan of one kernel.

A program computes tiles [m, n] of the result. What comes before is computed as the operands are loaded, on blocks [m, k] and [k, n];
what comes after, on the tile before it is stored. Several products of one left operand (gate and up of SwiGLU) share its blocks.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from ...ir import Node
from ...ir.low_bit.formats import longest_sum
from .addresses import runs, unique
from .contraction import Contraction, contraction
from .index import Index, Size, Var, divides, linear, product
from .plan import Root, Tracer
from .pointwise import NotFusible, pointwise
from .values import FLOAT8, Domain, Ref, Store, Value, compute_dtype, num_stages, packet_of
from .views import Indices, broadcast, shape_of

MAX_PRODUCTS = 2  # each has an accumulator, which fills the registers of a program
MULTIPLIED = {torch.bfloat16, torch.float16, torch.float32, torch.int8, *FLOAT8}
_MOST_TERMS = longest_sum(128, 128)  # of a sum of products of 8-bit integers in 32 bits
_CHEAP = 4  # flops an element that may be computed again for each tile of columns
_FEW_ROWS = 64  # a product of no more is bound by its weights, whatever its operand costs


@dataclass(frozen=True)
class Blocks:
    """An operand whose blocks the hardware copies as a whole: input number `input` from element `offset`, seen as a tensor of sizes
    `shape` and steps `stride`. `axes` names its dims: "batch", "m", "n", "k"."""

    input: int
    axes: tuple[str, ...]
    shape: tuple[Size, ...]
    stride: tuple[Size, ...]
    offset: Size


@dataclass(frozen=True)
class Side:
    """What is computed over one domain; `result` is the value that a product takes, in `dtype`."""

    domain: Domain
    values: tuple[Value, ...]
    result: Any = None
    dtype: torch.dtype | None = None
    blocks: Blocks | None = None

    @property
    def num_stages(self) -> int:
        """One more than the reductions that follow one another."""
        return num_stages(self.values)


@dataclass(frozen=True)
class MatmulPlan:
    """One kernel: products of `left` and each of `rights`, then `after` and `stores`. `nodes`, `inputs` and `outputs` are as a Plan's.

    `accumulator` is the type that sums have; `precision` what Triton's dot takes for float32: "ieee", or "tf32" where the user asked;
    `is_fast` lets the hardware sum 8-bit floats as it does. Input number `ends`, where there is one, tells where each of `num_groups`
    groups of rows ends.
    """

    nodes: tuple[Node, ...]
    inputs: tuple[Node, ...]
    outputs: tuple[Node, ...]
    products: tuple[Node, ...]
    left: Side
    rights: tuple[Side, ...]
    after: Side
    stores: tuple[Store, ...]
    k: Size
    accumulator: torch.dtype
    precision: str
    is_fast: bool = False
    ends: int | None = None
    num_groups: int = 1

    kind = "matmul"

    @property
    def domain(self) -> Domain:
        return self.after.domain

    @property
    def sides(self) -> tuple[Side, ...]:
        return (self.left, *self.rights, self.after)

    @property
    def values(self) -> tuple[Value, ...]:
        """All that is loaded or computed, of all sides."""
        return tuple(value for side in self.sides for value in side.values)

    def by_addresses(self) -> "MatmulPlan":
        """The same for hardware that copies no blocks."""
        return replace(self, left=replace(self.left, blocks=None), rights=tuple(replace(side, blocks=None) for side in self.rights))

    @property
    def num_batch(self) -> Size:
        return product(v.size for v in self.domain.batch)

    @property
    def product_terms(self) -> Size:
        """Products that are summed."""
        return product([self.num_batch, self.m, self.n, self.k, len(self.products)])

    @property
    def product_kind(self) -> str:
        """The type of operands, "tf32" for float32 that is rounded to it."""
        return "tf32" if self.precision == "tf32" else str(self.left.dtype).removeprefix("torch.")

    @property
    def m(self) -> Size:
        return self.domain.num_rows

    @property
    def n(self) -> Size:
        return self.domain.num_columns


def block_names(plan: MatmulPlan, inputs: Sequence[str]) -> dict[Blocks, str]:
    """The kernel's name for each way in which it sees a tensor as blocks: two operands may lie in one tensor."""
    names: dict[Blocks, str] = {}
    taken = set(inputs)
    for side in (plan.left, *plan.rights):
        if side.blocks is not None and side.blocks not in names:
            names[side.blocks] = unique(f"{inputs[side.blocks.input]}_blocks", taken)
    return names


def matmul_plan(nodes: Sequence[Node], outputs: Sequence[Node]) -> MatmulPlan:
    """The kernel that computes `outputs` from products among `nodes` and what surrounds them.

    Raises:
        NotFusible: there is none; the message says why.
    """
    products = [found for node in nodes if (found := contraction(node)) is not None]
    first = products[0]
    if len(products) > MAX_PRODUCTS:
        raise NotFusible(f"more than {MAX_PRODUCTS} products")
    dtype = _multiplied(products)
    shape = _shape(first, outputs)
    # The first output settles how positions are counted: the product's may be a view of it.
    batch, m, n = row_and_column_variables(shape, first.num_batch)
    index = tuple(map(Index.of, (*batch, *m, *n)))
    inputs: list[Node] = []
    after = AfterTracer(nodes, Domain(m, n, True, batch, ("m", "n")), Root(shape, index, None, ()), inputs, products)
    stores = [store for number, output in enumerate(outputs) for store in after.stores(number, output)]
    if set(after.seen) != {c.node for c in products}:
        raise NotFusible("a product of a product, or one that no output needs")
    at = after.seen[first.node]
    k = (Var("k", first.k),)
    term = Index.of(k[0])
    left = _LeftTracer(nodes, Domain(m, k, True, batch, ("m", "k_row")), None, inputs)
    position = first.left_at(at, term)
    if any(
        c.left is not first.left or c.left_at(after.seen[c.node], term) != position or c.k != first.k or c.ends is not first.ends
        for c in products[1:]
    ):
        raise NotFusible("products of other operands")
    lefts = _side(left, first.left, position, ("m", "k"), dtype)
    rights = []
    for c in products:
        own = batch if c.group is None else (c.group,)
        tracer = SideTracer(nodes, Domain(k, n, True, own, ("k_col", "n")), None, inputs)
        rights.append(_side(tracer, c.right, c.right_at(after.seen[c.node], term), ("k", "n"), dtype))
    sides = [lefts, *rights, Side(after.domain, tuple(after.values))]
    order = list(dict.fromkeys(value.input for side in sides for value in side.values if value.kind == "load"))
    if first.ends is not None:
        order = [number for number in order if inputs[number] is not first.ends] + [_number(first.ends, inputs)]
    sides = [_renumbered(side, order) for side in sides]
    return MatmulPlan(
        nodes=tuple(nodes),
        inputs=tuple(inputs[number] for number in order),
        outputs=tuple(outputs),
        products=tuple(c.node for c in products),
        left=sides[0],
        rights=tuple(sides[1:-1]),
        after=sides[-1],
        stores=tuple(stores),
        k=first.k,
        accumulator=torch.int32 if dtype == torch.int8 else torch.float32,
        precision=_precision(dtype),
        is_fast=all(c.is_fast for c in products),
        ends=None if first.ends is None else len(order) - 1,
        num_groups=1 if first.group is None else first.group.size,
    )


def _number(node: Node, inputs: list[Node]) -> int:
    """The number of `node` among `inputs`, which it joins."""
    if node not in inputs:
        inputs.append(node)
    return inputs.index(node)


def _multiplied(products: Sequence[Contraction]) -> torch.dtype:
    """The type of all operands."""
    operands = [operand.meta["val"] for c in products for operand in (c.left, c.right)]
    dtypes = {value.dtype for value in operands}
    if len(dtypes) != 1 or not dtypes <= MULTIPLIED:
        raise NotFusible("operands of types that no kernel multiplies")
    if any(c.k == 0 or not isinstance(c.k, int) and not c.k.is_positive for c in products):
        raise NotFusible("sums that may be empty")
    if dtypes == {torch.int8} and any(isinstance(c.k, int) and c.k > _MOST_TERMS for c in products):
        raise NotFusible("sums that 32 bits may not hold")
    return dtypes.pop()


def _precision(dtype: torch.dtype) -> str:
    """tf32 where the user asked torch for it."""
    backends: Any = torch.backends
    setting = backends.cuda.matmul.fp32_precision
    setting = backends.fp32_precision if setting == "none" else setting
    return "tf32" if dtype == torch.float32 and setting == "tf32" else "ieee"


def _shape(first: Contraction, outputs: Sequence[Node]) -> tuple[Size, ...]:
    """The sizes of the result, by the names that outputs give to its rows."""
    shape = shape_of(outputs[0])
    if len(shape) <= first.num_batch or shape[-1] != shape_of(first.node)[-1]:
        raise NotFusible("an output of other columns than the product's")
    return shape


def row_and_column_variables(shape: Sequence[Size], num_batch: int) -> tuple[tuple[Var, ...], tuple[Var, ...], tuple[Var, ...]]:
    """(batch, rows, columns)."""
    batch = tuple(Var(f"b{d}", size) for d, size in enumerate(shape[:num_batch]))
    m = tuple(Var(f"m{d}", size) for d, size in enumerate(shape[num_batch:-1]))
    return batch, m, (Var("n", shape[-1]),)


class SideTracer(Tracer):
    """Follows one operand, or the result, of products; `inputs` are those of the whole kernel."""

    def __init__(self, nodes: Sequence[Node], domain: Domain, root: Root | None, inputs: list[Node]):
        super().__init__(nodes, domain, root)
        self.inputs = inputs

    def _value(self, node: Node, index: Indices) -> Any:
        if node in self.inside and contraction(node) is not None:
            raise NotFusible("a product of a product")
        return super()._value(node, index)

    def reduce(self, kind: str, operand: Any, node: Node, name: str) -> Ref:
        raise NotFusible("a reduction next to a product")


class _LeftTracer(SideTracer):
    """What comes before the left operand is computed again for each tile of columns, so it is cheap or there are few rows."""

    def __init__(self, nodes: Sequence[Node], domain: Domain, root: Root | None, inputs: list[Node]):
        super().__init__(nodes, domain, root, inputs)
        rows = domain.num_rows
        self.has_few_rows = isinstance(rows, int) and rows <= _FEW_ROWS

    def _value(self, node: Node, index: Indices) -> Any:
        if node in self.inside and not self.has_few_rows:
            rule = pointwise(node)
            if rule is None or rule.flops > _CHEAP:
                raise NotFusible(f"{packet_of(node)} would be computed again for each tile of columns")
        return super()._value(node, index)

    def reduce(self, kind: str, operand: Any, node: Node, name: str) -> Ref:
        return Tracer.reduce(self, kind, operand, node, name)


class AfterTracer(SideTracer):
    """What comes after products; `seen` holds the position in each product of the element at (batch, m, n)."""

    def __init__(self, nodes: Sequence[Node], domain: Domain, root: Root, inputs: list[Node], products: Sequence[Contraction]):
        super().__init__(nodes, domain, root, inputs)
        self.products = {c.node: c for c in products}
        self.seen: dict[Node, Indices] = {}

    def _value(self, node: Node, index: Indices) -> Any:
        if node not in self.products:
            return super()._value(node, index)
        self._check_position(node, index)
        found, dtype = self.products[node], compute_dtype(node.meta["val"].dtype)
        number = list(self.products).index(node)
        here = sum((i for i in self.root.index), start=Index())  # says along which axes it varies
        acc = "acc" if number == 0 else f"acc_{number + 1}"
        kind = torch.int32 if dtype == torch.int32 else torch.float32
        result = self.add(Value("apply", kind, (), acc, index=here, name=packet_of(node).strip("_"), node=node))
        for scale in found.scales:
            size = shape_of(scale)
            at = broadcast(index, size) if len(size) == len(index) else tuple(Index() for _ in size)
            result = self.apply("{0} * {1}", [result, self.value(scale, at)], kind, node)
        if found.alpha != 1:
            result = self.apply("{0} * {1}", [result, found.alpha], kind, node)
        if found.addend is not None:
            addend = self.cast(self.value(found.addend, found.addend_at(index)), kind, node)
            if found.beta != 1:
                addend = self.apply("{0} * {1}", [addend, found.beta], kind, node)
            result = self.apply("{0} + {1}", [result, addend], kind, node)
        return result

    def _check_position(self, node: Node, index: Indices) -> None:
        """The tile of the accumulator is where it is: no element of another is in reach."""
        num_batch, shape, root = self.products[node].num_batch, shape_of(node), self.root
        rows = linear(index[num_batch:-1], shape[num_batch:-1]), linear(root.index[num_batch:-1], root.shape[num_batch:-1])
        is_elsewhere = index[:num_batch] != root.index[:num_batch] or rows[0] != rows[1] or index[-1] != root.index[-1]
        # Of a product that is a piece of what is stored, a tile would reach beyond.
        sizes = [(*s[:num_batch], product(s[num_batch:-1]), s[-1]) for s in (shape, root.shape)]
        if is_elsewhere or sizes[0] != sizes[1]:
            raise NotFusible("an element of the product that another tile has")
        self.seen[node] = index


def _side(tracer: SideTracer, node: Node, index: Indices, axes: tuple[str, str], dtype: torch.dtype) -> Side:
    result = tracer.value(node, index)
    if not isinstance(result, Ref):
        raise NotFusible("a product of a constant")
    values = tuple(tracer.values)
    if len(values) == 1 and values[0].kind == "load":  # what is not computed with goes as it is
        values = (replace(values[0], dtype=dtype),)
    side = Side(tracer.domain, values, result, dtype)
    return replace(side, blocks=_blocks(side, tracer.inputs, axes))


def _renumbered(side: Side, order: Sequence[int]) -> Side:
    """The side, with inputs by their places in `order`."""
    values = tuple(replace(v, input=order.index(v.input)) if v.kind == "load" else v for v in side.values)
    return replace(side, values=values, blocks=side.blocks and replace(side.blocks, input=order.index(side.blocks.input)))


def _blocks(side: Side, inputs: Sequence[Node], axes: tuple[str, str]) -> Blocks | None:
    """The side as blocks that the hardware copies: one tensor as it is, dense along one axis, steps of multiples of 16 bytes."""
    value = side.values[0]
    if len(side.values) != 1 or value.kind != "load" or value.guard or any(not isinstance(atom, Var) for atom, _ in value.index.terms):
        return None
    terms, found = dict(value.index.terms), []
    for name, variables in (("batch", side.domain.batch), (axes[0], side.domain.rows), (axes[1], side.domain.columns)):
        steps = runs(terms, [v for v in variables if v.size != 1])
        if name == "batch" and not steps:
            continue
        if len(steps) != 1 or len(steps[0][0]) != sum(v.size != 1 for v in variables):
            return None
        found.append((name, product(v.size for v in variables), steps[0][1]))
    found.sort(key=lambda axis: axis[2] == 1)  # the dense axis comes last, the others stay in order
    names, shape, stride = zip(*found, strict=True)
    granule = 16 // inputs[value.input].meta["val"].dtype.itemsize
    if stride[-1] != 1 or any(step == 1 for step in stride[:-1]):
        return None
    if not all(divides(granule, step) for step in stride[:-1]) or not divides(granule, value.index.constant):
        return None
    return Blocks(value.input, names, shape, stride, value.index.constant)
