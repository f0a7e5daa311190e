"""From the nodes of a group to the plan of one kernel: which positions a program covers, what it loads, computes and stores.

The domain of a pointwise kernel is the shape of its outputs; of a row kernel, rows times columns, where reductions run over the
columns. Each output is traced back at its own position of the domain; views change the position, so no view is computed. A set of
nodes that has no such kernel raises `NotFusible` with the reason, which is how grouping finds out what may be fused.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch

from ...ir import Node
from ...ir.infer import tensors_of
from .contraction import contraction
from .index import Index, Size, Var, product, size_of
from .low_rank.ops import low_bit_product
from .pointwise import NotFusible, Pointwise, arguments_of, pointwise
from .reductions import REDUCTIONS, Rows, correction, eps_of, keeps_shape, rows_of
from .special import SPECIAL
from .values import FLOAT8, TL_TYPES, Condition, Count, Domain, Plan, Ref, Store, Value, compute_dtype, packet_of
from .views import Indices, broadcast, index_of, is_view, shape_of, source

if TYPE_CHECKING:
    from .low_rank.plan import ProductPlan
    from .matmul_plan import MatmulPlan

aten, gw = torch.ops.aten, torch.ops.gw

MAX_VALUES = 160  # of one kernel; more would spill registers, and rotations of rotations double what they read
MAX_INPUTS = 16
_MANY_ROWS = 256  # about two programs for each multiprocessor of a large GPU


def plan(nodes: Sequence[Node], outputs: Sequence[Node]) -> "Plan | MatmulPlan | ProductPlan":
    """The kernel that computes `outputs` from what lies outside of `nodes`, which are in the order of their graph.

    Raises:
        NotFusible: there is none; the message says why.
    """
    if any(node.target is low_bit_product for node in nodes):
        from .low_rank.plan import product_plan  # which is built on this module

        return product_plan(nodes, outputs)
    if any(contraction(node) is not None for node in nodes):
        from .matmul_plan import matmul_plan  # likewise

        return matmul_plan(nodes, outputs)
    reason: NotFusible | None = None
    for domain, root in _domains(nodes, outputs):
        try:
            return Tracer(nodes, domain, root).plan(outputs)
        except NotFusible as error:
            reason = reason or error
    raise reason or NotFusible("no output spans a domain")


@dataclass(frozen=True)
class Root:
    """Where outputs of the domain's own shape, and those with one element a row, are stored."""

    shape: tuple[Size, ...]
    index: Indices
    row_shape: tuple[Size, ...] | None
    row_index: Indices


def _domains(nodes: Sequence[Node], outputs: Sequence[Node]) -> list[tuple[Domain, Root]]:
    found: dict[Any, tuple[Domain, Root]] = {}
    for node in nodes:
        rows = rows_of(node)
        if rows is not None:
            found.setdefault((rows.shape, rows.dims, rows.groups), _row_domain(rows))
    if found:
        return list(found.values())
    domains = [_row_domain(rows) for node in nodes if (rows := _rows_of_groups(node)) is not None]
    for output in outputs:
        value = output.meta["val"]
        if not isinstance(value, torch.Tensor):
            raise NotFusible("an output that is no tensor")
    shape = max((shape_of(output) for output in outputs), key=len)
    variables = tuple(Var(f"i{d}", size) for d, size in enumerate(shape))
    return [*domains, (Domain((), variables, False), Root(shape, tuple(map(Index.of, variables)), None, ()))]


def _rows_of_groups(node: Node) -> Rows | None:
    """The groups of channels that `norm_apply` has statistics of, as rows: each reads its own once. None where there are too few to
    fill a GPU with a program for each."""
    if node.target is not gw.norm_apply.default:
        return None
    arguments = arguments_of(node)
    shape, groups = shape_of(arguments["x"]), arguments["groups"]
    known = isinstance(shape[0], int) and isinstance(shape[1], int)
    return Rows(arguments["x"], shape, (), groups) if known and shape[0] * groups >= _MANY_ROWS else None


def _row_domain(rows: Rows) -> tuple[Domain, Root]:
    row_vars = tuple(Var(f"r{d}", size) for d, size in enumerate(rows.kept))
    column_vars = tuple(Var(f"c{d}", size) for d, size in enumerate(rows.reduced))
    count, num_rows = product(rows.reduced), product(rows.kept)
    if isinstance(count, int) and isinstance(num_rows, int) and num_rows < 8 and count > 2**16:
        raise NotFusible("few rows, each too long for one program")
    row_index, columns = tuple(map(Index.of, row_vars)), tuple(map(Index.of, column_vars))
    return Domain(row_vars, column_vars, True), Root(rows.shape, operand_index(rows, row_index, columns), rows.kept, row_index)


def operand_index(rows: Rows, kept: Indices, reduced: Indices) -> Indices:
    """The position in the operand of a reduction of row `kept` and column `reduced`."""
    if rows.groups is not None:
        return (kept[0], kept[1] * rows.channels + reduced[0], *reduced[1:])
    remaining, columns = iter(kept), iter(reduced)
    return tuple(next(columns) if d in rows.dims else next(remaining) for d in range(len(rows.shape)))


def _without_ones(sizes: Sequence[Size]) -> tuple[Size, ...]:
    return tuple(size for size in sizes if size != 1)


class Tracer:
    """Follows outputs back to loads, one domain at a time."""

    def __init__(self, nodes: Sequence[Node], domain: Domain, root: Root | None):
        self.nodes = tuple(nodes)
        self.inside = set(nodes)
        self.domain = domain
        self.root = root
        self.inputs: list[Node] = []
        self.values: list[Value] = []
        self.ids: dict[Value, int] = {}
        self.memo: dict[Any, Any] = {}
        self.guard: tuple[Condition, ...] = ()
        self.device = tensors_of(nodes[0].meta["val"])[0].device

    def plan(self, outputs: Sequence[Node]) -> Plan:
        if any(tensor.device != self.device for node in self.nodes for tensor in tensors_of(node.meta["val"])):
            raise NotFusible("results on several devices")
        stores = [store for n, output in enumerate(outputs) for store in self.stores(n, output)]
        if not self.inputs:
            raise NotFusible("no input to read")
        return Plan(self.nodes, tuple(self.inputs), tuple(outputs), self.domain, tuple(self.values), tuple(stores))

    # --- outputs ---

    def stores(self, number: int, output: Node) -> list[Store]:
        """Where output number `number` goes."""
        if not isinstance(output.meta["val"], torch.Tensor) or output.meta["val"].dtype not in TL_TYPES.keys() - FLOAT8:
            raise NotFusible("an output of a type that no kernel stores")
        if output.target is gw.norm_stats.default:
            return self._stores_of_stats(number, output)
        shape, root = shape_of(output), self.root
        if _without_ones(shape) == _without_ones(root.shape):
            index, columns = _at(shape, root.shape, root.index), True
        elif root.row_shape is not None and _without_ones(shape) == _without_ones(root.row_shape):
            index, columns = _at(shape, root.row_shape, root.row_index), False
        else:
            raise NotFusible(f"an output of shape {list(shape)} in a kernel over {list(root.shape)}")
        return [Store(number, self._address(output, index), self.value(output, index), columns)]

    def _stores_of_stats(self, number: int, output: Node) -> list[Store]:
        if self.root.row_shape != shape_of(output)[1:3]:
            raise NotFusible("statistics of other rows")
        indices = [(Index(), *self.root.row_index, Index((), part)) for part in range(3)]
        return [Store(number, self._address(output, index), self.value(output, index), False) for index in indices]

    def _address(self, node: Node, index: Indices) -> Index:
        value, result = node.meta["val"], Index()
        for i, stride in zip(index, value.stride(), strict=True):
            result = result + i * size_of(stride)
        return result

    # --- values ---

    def value(self, node: Node, index: Indices) -> Any:
        """What `node` is at `index`: a Ref or a number."""
        key = (node, index, self.guard)
        if key not in self.memo:
            self.memo[key] = self._value(node, index)
        return self.memo[key]

    def _value(self, node: Node, index: Indices) -> Any:
        if is_view(node):
            return self.value(source(node), index_of(node, index))
        if node not in self.inside:
            return self._load(node, index)
        if node.target in SPECIAL:
            result = SPECIAL[node.target](self, node, index)
        elif node.target in REDUCTIONS:
            result = self._reduction(node, index)
        else:
            rule = pointwise(node)
            if rule is None:
                raise NotFusible(f"{node.target} is no pointwise operation")
            result = self._apply_rule(node, rule, index)
        return self._rounded(node, result)

    def _rounded(self, node: Node, result: Any) -> Any:
        """A cast that the program asks for loses what it loses; others wait for the store."""
        dtype = node.meta["val"].dtype
        if node.target is not aten._to_copy.default or compute_dtype(dtype) == dtype:
            return result
        if dtype in FLOAT8:
            raise NotFusible("a cast to 8 bits, which saturates otherwise")
        return self.cast(self.cast(result, dtype, node), compute_dtype(dtype), node)

    def _load(self, node: Node, index: Indices) -> Any:
        value = node.meta.get("val")
        if not isinstance(value, torch.Tensor) or value.dtype not in TL_TYPES or value.layout != torch.strided:
            raise NotFusible("an operand of a type that no kernel loads")
        if value.device != self.device:
            raise NotFusible("operands on several devices")
        if node not in self.inputs:
            if len(self.inputs) == MAX_INPUTS:
                raise NotFusible(f"more than {MAX_INPUTS} inputs")
            self.inputs.append(node)
        number, address = self.inputs.index(node), self._address(node, index)
        return self.add(Value("load", compute_dtype(value.dtype), input=number, index=address, guard=self._guard_of(address)))

    def _guard_of(self, address: Index) -> tuple[Condition, ...]:
        """The conditions on which `address` depends; under others it is the same element."""
        guard = []
        for condition in self.guard:
            shared = condition.at.variables & address.variables
            if shared and shared != condition.at.variables:
                raise NotFusible("a piece of a concatenation that is read along some of its dims")
            guard += [condition] if shared else []
        return tuple(guard)

    def _apply_rule(self, node: Node, rule: Pointwise, index: Indices) -> Any:
        value = node.meta["val"]
        if rule.is_expensive:
            self._refuse_repetition(node, index)
        dtype = compute_dtype(value.dtype)
        if rule.compares:
            dtype = compute_dtype(_common_dtype(rule.operands))
        if (
            not dtype.is_floating_point
            and (rule.helpers or "tl." in rule.text and "tl.where" not in rule.text)
            and "tl.abs" not in rule.text
        ):
            raise NotFusible("a function of floats on integers")
        operands = []
        for position, operand in enumerate(rule.operands):
            is_condition = rule.text.startswith("tl.where({0},") and position == 0
            operands.append(self._operand(operand, index, torch.bool if is_condition else dtype, node))
        if rule.text == "{0}":
            return operands[0]
        if not any(isinstance(operand, Ref) for operand in operands):
            raise NotFusible("a computation without tensors")
        return self.apply(rule.text, operands, torch.bool if rule.compares else dtype, node, helpers=rule.helpers)

    def _operand(self, operand: Any, index: Indices, dtype: torch.dtype, node: Node) -> Any:
        if not isinstance(operand, Node):
            return self.number(operand, dtype)
        if not isinstance(operand.meta["val"], torch.Tensor):
            raise NotFusible("a size as an operand")
        return self.cast(self.value(operand, broadcast(index, shape_of(operand))), dtype, node)

    def number(self, value: Any, dtype: torch.dtype) -> Any:
        if not isinstance(value, int | float):
            raise NotFusible("an operand that is no number")
        return float(value) if dtype.is_floating_point else bool(value) if dtype == torch.bool else value

    def cast(self, operand: Any, dtype: torch.dtype, node: Node | None) -> Any:
        if isinstance(operand, Count):
            return operand
        if not isinstance(operand, Ref):
            return self.number(operand, dtype)
        value = self.values[operand.id]
        if value.dtype == dtype:
            return operand
        if dtype == torch.bool:
            return self.apply("{0} != 0", [operand], dtype, node, name=value.name)
        return self.apply(f"{{0}}.to({TL_TYPES[dtype]})", [operand], dtype, node, name=value.name)

    def apply(
        self, text: str, operands: Sequence[Any], dtype: torch.dtype, node: Node | None, name: str = "", helpers: tuple[str, ...] = ()
    ) -> Ref:
        """The value `text` of `operands`."""
        name = name or (packet_of(node).strip("_") if node is not None else "value")
        return self.add(Value("apply", dtype, tuple(operands), text, name=name, node=node, helpers=helpers))

    def reduce(self, kind: str, operand: Any, node: Node, name: str) -> Ref:
        """The sum ("sum"), maximum ("max") or minimum ("min") of `operand` over the columns."""
        if not isinstance(operand, Ref):
            raise NotFusible("a reduction of a constant")
        return self.add(Value("reduce", self.values[operand.id].dtype, (operand,), kind, name=name, node=node))

    def add(self, value: Value) -> Ref:
        if value in self.ids:
            return Ref(self.ids[value])
        if len(self.values) == MAX_VALUES:
            raise NotFusible(f"more than {MAX_VALUES} values")
        row_names = {v.name for v in self.domain.rows}
        variables = value.index.variables | frozenset(n for c in value.guard for n in c.at.variables)
        operands = [self.values[o.id] for o in value.operands if isinstance(o, Ref)]
        rows = bool(variables & row_names) or any(o.rows for o in operands)
        columns = bool(variables & {v.name for v in self.domain.columns}) or any(o.columns for o in operands)
        stage = max((o.stage for o in operands), default=0)
        if value.kind == "reduce":
            columns, stage = False, stage + 1
        self.values.append(replace(value, rows=rows, columns=columns, stage=stage))
        self.ids[value] = len(self.values) - 1
        return Ref(self.ids[value])

    def _refuse_repetition(self, node: Node, index: Indices) -> None:
        """A function that is dear is not computed again for each element of a broadcast, only for each row."""
        own, all_ = product(shape_of(node)), product([self.domain.num_rows, self.domain.num_columns])
        variables = frozenset[str]().union(*(i.variables for i in index))
        if not variables & {v.name for v in self.domain.columns} and self.domain.by_rows:
            return
        if isinstance(own, int) and isinstance(all_, int) and 0 < own * 4 <= all_:
            raise NotFusible(f"{packet_of(node)} would be computed {all_ // max(own, 1)} times")

    # --- reductions ---

    def _reduction(self, node: Node, index: Indices) -> Any:
        rows = rows_of(node)
        assert rows is not None
        if _without_ones(rows.reduced) != _without_ones([v.size for v in self.domain.columns]):
            raise NotFusible("reductions over different columns")
        kept = _kept_index(node, rows, index)
        names = {v.name for v in self.domain.columns}
        if any(i.variables & names for i in kept):
            raise NotFusible("a reduction whose row depends on the column")
        if any(c.at.variables & names and not c.at.variables <= names for c in self.guard):
            raise NotFusible("a piece of a concatenation along rows and columns")
        real = iter([v for v in self.domain.columns if v.size != 1])
        columns = tuple(Index.of(next(real)) if size != 1 else Index() for size in rows.reduced)
        return self._reduced(node, rows, kept, operand_index(rows, kept, columns), index)

    def _reduced(self, node: Node, rows: Rows, kept: Indices, at: Indices, index: Indices) -> Any:
        arguments = arguments_of(node)
        dtype = compute_dtype(node.meta["val"].dtype)
        count = rows.count

        def operand(position: Indices) -> Any:
            return self.cast(self.value(rows.operand, position), dtype, node)

        def row_operand() -> Any:
            # A row is reduced as a whole, whichever of its columns the result is wanted for.
            names, guard = {v.name for v in self.domain.columns}, self.guard
            self.guard = tuple(c for c in guard if not c.at.variables & names)
            try:
                return operand(at)
            finally:
                self.guard = guard

        if not dtype.is_floating_point and node.target not in (aten.sum.dim_IntList, aten.sum.default):
            raise NotFusible("a float reduction of integers")
        name = packet_of(node)
        if name == "sum":
            return self.reduce("sum", row_operand(), node, "total")
        if name in ("amax", "amin"):
            return self._extreme(name[1:], row_operand(), node)
        if name == "mean":
            return self._mean(row_operand(), count, node)
        if name == "rms_norm":
            eps = eps_of(node)
            square = self._mean(self.apply("{0} * {0}", [row_operand()], dtype, node, name="square"), count, node, "mean_square")
            scale = self.apply("tl.rsqrt({0} + {1})", [square, eps], dtype, node, name="rstd")
            return self._affine(node, self.apply("{0} * {1}", [operand(index), scale], dtype, node), index[len(index) - len(rows.dims) :])
        if name in ("softmax", "_softmax", "log_softmax", "_log_softmax"):
            return self._softmax(node, row_operand(), operand(index), dtype, is_log="log" in name)
        mean = self._mean(row_operand(), count, node)
        centered = self.apply("{0} - {1}", [row_operand(), mean], dtype, node, name="centered")
        squares = self.reduce("sum", self.apply("{0} * {0}", [centered], dtype, node, name="square"), node, "m2")
        if name == "var":
            less = correction(arguments)
            text = "{0} / ({1} - {2})" if less else "{0} / {1}"
            return self.apply(text, [squares, Count(count), less][: 3 if less else 2], dtype, node)
        if name == "norm_stats":
            part = index[3].constant if not index[3].terms else None
            if part not in (0, 1, 2):
                raise NotFusible("statistics in a loop over their parts")
            return (Count(count), mean, squares)[part]
        rstd = self.apply("tl.rsqrt({0} / {1} + {2})", [squares, Count(count), eps_of(node)], dtype, node, name="rstd")
        here = self.apply("{0} - {1}", [operand(index), mean], dtype, node, name="centered")
        normed = self.apply("{0} * {1}", [here, rstd], dtype, node)
        return self._affine(node, normed, index[1:2] if rows.groups is not None else index[len(index) - len(rows.dims) :])

    def _mean(self, operand: Any, count: Size, node: Node, name: str = "mean") -> Ref:
        total = self.reduce("sum", operand, node, "total")
        return self.apply("{0} / {1}", [total, Count(count)], self.values[total.id].dtype, node, name=name)

    def _extreme(self, kind: str, operand: Any, node: Node) -> Ref:
        """ATen's amax and amin of a row with a NaN are NaN; tl.max and tl.min ignore it."""
        dtype = self.values[operand.id].dtype
        extreme = self.reduce(kind, operand, node, kind)
        nans = self.reduce("sum", self.apply("tl.where({0} != {0}, 1.0, 0.0)", [operand], dtype, node, name="is_nan"), node, "nans")
        return self.apply('tl.where({0} > 0.0, float("nan"), {1})', [nans, extreme], dtype, node)

    def _softmax(self, node: Node, row: Any, here: Any, dtype: torch.dtype, is_log: bool) -> Ref:
        highest = self.reduce("max", row, node, "highest")
        row_power = self.apply("tl.exp({0} - {1})", [row, highest], dtype, node, name="power")
        total = self.reduce("sum", row_power, node, "total")
        if is_log:
            return self.apply("{0} - {1} - tl.log({2})", [here, highest, total], dtype, node)
        here_power = self.apply("tl.exp({0} - {1})", [here, highest], dtype, node, name="power")
        return self.apply("{0} / {1}", [here_power, total], dtype, node)

    def _affine(self, node: Node, normed: Ref, index: Indices) -> Ref:
        arguments, dtype = arguments_of(node), self.values[normed.id].dtype
        for name, text in (("weight", "{0} * {1}"), ("bias", "{0} + {1}")):
            parameter = arguments.get(name)
            if parameter is not None:
                normed = self.apply(text, [normed, self.cast(self.value(parameter, index), dtype, node)], dtype, node)
        return normed


def _kept_index(node: Node, rows: Rows, index: Indices) -> Indices:
    """The row that the element at `index` of a reduction's result belongs to."""
    if node.target is gw.norm_stats.default:
        return index[1:3]
    if rows.groups is not None:
        return index[0], index[1].divided(rows.channels)[0]
    if keeps_shape(node) or len(index) == len(rows.shape):  # the latter: keepdim
        return tuple(i for d, i in enumerate(index) if d not in rows.dims)
    return index


def _at(shape: Sequence[Size], root: Sequence[Size], index: Indices) -> Indices:
    """`index` in a tensor of sizes `root`, as one in a tensor that differs from it by dims of size 1."""
    remaining = iter([i for i, size in zip(index, root, strict=True) if size != 1])
    return tuple(Index() if size == 1 else next(remaining) for size in shape)


def _common_dtype(operands: Sequence[Any]) -> torch.dtype:
    values = [operand.meta["val"] if isinstance(operand, Node) else operand for operand in operands]
    if len(values) == 1:
        return values[0].dtype
    return torch.result_type(values[0], values[1])


def is_known(node: Node) -> bool:
    """Whether `node` is of a kind that kernels compute."""
    if node.op != "call_function" or is_view(node):
        return False
    try:
        return node.target in {low_bit_product, *SPECIAL, *REDUCTIONS} or (pointwise(node) or contraction(node)) is not None
    except NotFusible:
        return False


def flops_of(node: Node) -> int:
    """Floating point operations for each element of the largest tensor that a node reads or makes."""
    if node.target in REDUCTIONS:
        return REDUCTIONS[node.target]
    if node.target is gw.norm_apply.default:
        return 6
    rule = None if node.target in SPECIAL else pointwise(node)
    return rule.flops if rule is not None else 0
