"""The two kernels of a low-rank linear layer as plans: which positions they visit, and what they load, compute and store."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from ....ir import Node
from ....ir.low_bit.formats import FORMATS, Format, longest_sum
from ..contraction import Contraction
from ..index import Index, Size, Var
from ..matmul_plan import AfterTracer, Side, SideTracer, row_and_column_variables
from ..plan import Root
from ..pointwise import NotFusible, arguments_of
from ..values import Domain, Store, Value
from ..views import Indices, shape_of
from .ops import low_bit_operand, low_bit_product

_MOST_CODES = longest_sum(127, 127)  # whose products are summed in 32 bits before they are scaled
_ROLES = ("a_scale", "weight", "weight_scale", "weight_scale2", "half", "up")  # of inputs of a product, beside "a" and "bias"


@dataclass(frozen=True)
class OperandPlan:
    """One kernel that gives what a product takes of x: `left` is x over rows and k; `roles` are the numbers of inputs by what they are
    for. `outputs` are the results of the call, by `results`: "codes" and "steps", or "values", and "half" of the branch. A
    program takes `part` neighbours along k, all where it is 0."""

    nodes: tuple[Node, ...]
    inputs: tuple[Node, ...]
    outputs: tuple[Node, ...]
    results: tuple[str, ...]
    roles: Mapping[str, int]
    left: Side
    k: int
    rank: int
    form: Format | None
    scale2: float
    shift: float
    rotate: int
    part: int

    kind = "operand"

    @property
    def domain(self) -> Domain:
        return self.left.domain

    @property
    def values(self) -> tuple[Value, ...]:
        return self.left.values

    @property
    def m(self) -> Size:
        return self.domain.num_rows

    @property
    def dtype(self) -> torch.dtype:
        """Of x."""
        return self.inputs[0].meta["val"].dtype

    @property
    def block(self) -> int:
        """Neighbours along k that share a scale; 0 where a row does."""
        return 0 if self.form is None else self.form.group

    @property
    def needs_scale(self) -> bool:
        """Whether all of a row has to be seen before an element is quantized."""
        return self.form is not None and self.block == 0

    @property
    def product_terms(self) -> Size:
        """Products that are summed."""
        return self.m * self.k * self.rank

    @property
    def product_kind(self) -> str:
        return str(self.dtype).removeprefix("torch.")


@dataclass(frozen=True)
class ProductPlan:
    """One kernel that multiplies a left operand and a weight of few bits: `left` is the operand over rows and k, `after` what follows.

    `has_codes` where the operand comes as codes, of which `a_block` neighbours share a scale (0: all of a row), else as numbers. `rank`
    is 0 without a branch.
    """

    nodes: tuple[Node, ...]
    inputs: tuple[Node, ...]
    outputs: tuple[Node, ...]
    products: tuple[Node, ...]
    roles: Mapping[str, int]
    left: Side
    after: Side
    stores: tuple[Store, ...]
    k: int
    rank: int
    parts: int
    form: Format
    has_codes: bool
    a_block: int

    kind = "low_bit"

    @property
    def domain(self) -> Domain:
        return self.after.domain

    @property
    def values(self) -> tuple[Value, ...]:
        return (*self.left.values, *self.after.values)

    @property
    def m(self) -> Size:
        return self.domain.num_rows

    @property
    def n(self) -> Size:
        return self.domain.num_columns

    @property
    def dtype(self) -> torch.dtype:
        """What is multiplied: the model's dtype where codes are not."""
        return torch.int8 if self.has_codes else self.branch_dtype

    @property
    def branch_dtype(self) -> torch.dtype:
        """The model's dtype."""
        return self.products[0].meta["val"].dtype

    @property
    def weight_block(self) -> int:
        """Neighbours along k of a weight that share a scale; 0 where a row does."""
        return 0 if self.form.group >= self.k else self.form.group

    @property
    def sum_block(self) -> int:
        """Neighbours along k whose codes are summed before they are scaled; 0 for a whole row, and for numbers."""
        if not self.has_codes:
            return 0
        return min((block for block in (self.a_block, self.weight_block) if block), default=0)

    @property
    def product_terms(self) -> Size:
        """Products that are summed, those of the branch at their share."""
        return self.m * self.n * (self.k + self.rank)

    @property
    def product_kind(self) -> str:
        return str(self.dtype).removeprefix("torch.")


def operand_plan(call: Node, results: Sequence[Node]) -> OperandPlan:
    """The kernel of a `low_bit_operand` call, whose results are `results`.

    Raises:
        NotFusible: x is of a form that no kernel loads.
    """
    a = arguments_of(call)
    x, shape = a["x"], shape_of(a["x"])
    k = shape[-1]
    rows = tuple(Var(f"m{d}", size) for d, size in enumerate(shape[:-1]))
    inputs: list[Node] = []
    left = _left([call], rows, x, tuple(map(Index.of, rows)), inputs)
    roles = {"x": 0} | {role: _number(a[role], inputs) for role in ("smooth", "down") if a[role] is not None}
    names = {"codes": ("codes", "steps"), "values": ("values",), "nothing": ()}[a["gives"]]
    return OperandPlan(
        nodes=(call,),
        inputs=tuple(inputs),
        outputs=tuple(results),
        results=(*names, *(("half",) if a["down"] is not None else ())),
        roles=roles,
        left=left,
        k=k,
        rank=0 if a["down"] is None else shape_of(a["down"])[0],
        form=None if a["act_format"] == "none" else FORMATS[a["act_format"]],
        scale2=a["act_scale2"],
        shift=a["act_shift"],
        rotate=a["rotate"],
        part=a["part"],
    )


def product_plan(nodes: Sequence[Node], outputs: Sequence[Node]) -> ProductPlan:
    """The kernel of a `low_bit_product` among `nodes` with what follows it.

    Raises:
        NotFusible: there is none; the message says why.
    """
    call, *more = [node for node in nodes if node.target is low_bit_product]
    if more:
        raise NotFusible("several products of low-bit weights")
    a = arguments_of(call)
    shape = shape_of(outputs[0])
    if not shape or shape[-1] != shape_of(call)[-1]:
        raise NotFusible("an output of other columns than the product's")
    _, m, n = row_and_column_variables(shape, 0)
    index = tuple(map(Index.of, (*m, *n)))
    k = shape_of(a["a"])[-1]
    inputs: list[Node] = []
    product = Contraction(call, a["a"], a["weight"], 0, True, a["bias"])
    after = AfterTracer(nodes, Domain(m, n, True, (), ("m", "n")), Root(shape, index, None, ()), inputs, [product])
    stores = [store for number, output in enumerate(outputs) for store in after.stores(number, output)]
    if call not in after.seen:
        raise NotFusible("a product that no output needs")
    left = _left(nodes, m, a["a"], after.seen[call][:-1], inputs)
    if any(node.target in (low_bit_product, low_bit_operand) for node in nodes if node is not call):
        raise NotFusible("another half of a low-rank layer")
    roles = {role: _number(a[role], inputs) for role in ("a", *_ROLES) if a[role] is not None}
    roles |= {"bias": inputs.index(a["bias"])} if a["bias"] in inputs else {}
    plan = ProductPlan(
        nodes=tuple(nodes),
        inputs=tuple(inputs),
        outputs=tuple(outputs),
        products=(call,),
        roles=roles,
        left=left,
        after=Side(after.domain, tuple(after.values)),
        stores=tuple(stores),
        k=k,
        rank=0 if a["half"] is None else shape_of(a["half"])[-1],
        parts=1 if a["half"] is None or len(shape_of(a["half"])) == len(shape_of(a["a"])) else shape_of(a["half"])[0],
        form=FORMATS[a["weight_format"]],
        has_codes=a["a_scale"] is not None,
        a_block=0 if a["a_scale"] is None or shape_of(a["a_scale"])[-1] == 1 else k // shape_of(a["a_scale"])[-1],
    )
    if plan.has_codes and (plan.sum_block or k) > _MOST_CODES:
        raise NotFusible(f"a sum of the products of {k} codes, which 32 bits may not hold")
    return plan


class _OperandTracer(SideTracer):
    """Loads one tensor as it is."""

    def loaded(self, node: Node, index: Indices) -> Side:
        result = self._load(node, index)
        return Side(self.domain, (replace(self.values[0], dtype=node.meta["val"].dtype),), result, node.meta["val"].dtype)


def _left(nodes: Sequence[Node], rows: tuple[Var, ...], node: Node, at: Indices, inputs: list[Node]) -> Side:
    """`node` over rows and k, as it is stored."""
    k = Var("k", shape_of(node)[-1])
    return _OperandTracer(nodes, Domain(rows, (k,), True, (), ("m", "k")), None, inputs).loaded(node, (*at, Index.of(k)))


def _number(node: Node, inputs: list[Node]) -> int:
    """The number of `node` among `inputs`, which it joins."""
    if node not in inputs:
        inputs.append(node)
    return inputs.index(node)
