"""The only way to change a program: typed edits, grouped into steps that are recorded, timed and paid for with fuel.

A step is one application of one rule. It spends one unit of fuel; when none is left it raises `OutOfFuel`, which the pass
manager catches, so a bisection can stop the compiler after rewrite N with a program that is whole.
"""

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from .build import add_call, add_placeholder, add_weight, set_outputs
from .calls import GETITEM, draws, is_pure, name_of
from .errors import VerifyError
from .infer import InferenceError, infer, same_type, storage_key, tensors_of
from .program import Function, Node, Program, Weight, Where, region_of
from .region import Region, memory_order, sliced
from .symbols import SymbolTable
from .where import relative_file


class OutOfFuel(Exception):
    """No rewrite may happen any more; the program is as the last whole step left it."""


@dataclass
class Fuel:
    """How many more rewrites may happen (None: any number), and how many did."""

    left: int | None = None
    spent: int = 0

    def spend(self) -> None:
        """Counts one rewrite. Raises OutOfFuel before one that may not happen."""
        if self.left is not None and self.spent >= self.left:
            raise OutOfFuel
        self.spent += 1


@dataclass(frozen=True)
class RewriteRecord:
    """One rewrite: which pass and rule, where the rule stands, what it took away and put there, and how long it took."""

    pass_name: str
    rule: str
    file: str
    line: int
    before: tuple[str, ...]
    after: tuple[str, ...]
    microseconds: float


class Rewriter:
    """Edits one function of `program` in place.

    Edits happen inside `with rewriter.step("rule"):`. With `checked=True` a step that changes the program without an edit, or
    edits without a change, is a VerifyError.
    """

    def __init__(self, program: Program, *, pass_name: str = "", function: str = "main", fuel: Fuel | None = None, checked: bool = False):
        self.program = program
        self.function: Function = program.functions[function]
        self.graph: fx.Graph = self.function.graph
        self.pass_name = pass_name
        self.fuel = fuel if fuel is not None else Fuel()
        self.checked = checked
        self.records: list[RewriteRecord] = []
        self._removed: list[str] | None = None
        self._added: list[Node] = []
        self._edited = False
        self._erased: set[Node] = set()
        self._weight_nodes: dict[str, Node] = {node.target: node for node in self.graph.nodes if node.op == "get_attr"}

    @property
    def symbols(self) -> SymbolTable:
        """The sizes that a call decides, of the whole program."""
        return self.program.symbols

    @property
    def changed(self) -> bool:
        """Whether a step has changed something."""
        return bool(self.records)

    def nodes(self) -> Iterator[Node]:
        """The calls of the function in order; nodes erased or inserted while iterating are skipped."""
        for node in list(self.graph.nodes):
            if node.op == "call_function" and node not in self._erased:
                yield node

    @contextmanager
    def step(self, rule: str) -> Iterator[None]:
        """One application of `rule`; without an edit inside it is none, and costs nothing.

        Raises:
            OutOfFuel: before anything changed.
        """
        if self._removed is not None:
            raise VerifyError(f"rule {rule} starts inside another rule of {self.pass_name}: steps do not nest")
        self.fuel.spend()
        frame = sys._getframe(2)
        fingerprint = str(self.program) if self.checked else ""
        self._removed, self._added, self._edited = [], [], False
        start = time.perf_counter()
        place = relative_file(frame.f_code.co_filename), frame.f_lineno
        try:
            yield
        except Exception as error:
            error.add_note(f"in rewrite {rule} at {place[0]}:{place[1]}")
            raise
        finally:
            removed, self._removed = self._removed, None
        microseconds = (time.perf_counter() - start) * 1e6
        after = tuple(label(node) for node in self._added if node not in self._erased)
        if self.checked:
            self._check_step(rule, fingerprint, bool(removed or after))
        if not self._edited:
            self.fuel.spent -= 1
            return
        self.records.append(RewriteRecord(self.pass_name, rule, *place, tuple(removed), after, microseconds))

    def _check_step(self, rule: str, fingerprint: str, claimed: bool) -> None:
        changed = str(self.program) != fingerprint
        if changed and not claimed:
            raise VerifyError(f"rule {rule} of {self.pass_name} changed the program without the Rewriter")
        if claimed and not changed:
            raise VerifyError(f"rule {rule} of {self.pass_name} reports a rewrite but the program is the same")

    def _in_step(self) -> list[str]:
        if self._removed is None:
            raise VerifyError(f"pass {self.pass_name} edits the program outside a step: write `with rewriter.step(rule):`")
        self._edited = True
        return self._removed

    # --- edits ---

    def insert(
        self,
        target: Callable[..., Any],
        args: Sequence[Any] = (),
        kwargs: dict[str, Any] | None = None,
        *,
        before: Node,
        origin: "Node | Sequence[Node]" = (),
    ) -> Node:
        """A new call placed before `before`, its metadata inferred. It descends from the node(s) `origin`.

        Raises:
            VerifyError: the call does not type-check, or `target` is no operation of the IR.
        """
        self._in_step()
        self._check_target(target)
        parents = [origin] if isinstance(origin, fx.Node) else list(origin)
        try:
            with self.graph.inserting_before(before):
                node = add_call(
                    self.graph, self.symbols, target, tuple(args), kwargs, origin=merged_origin(parents), where=first_where(parents)
                )
        except InferenceError as error:
            raise VerifyError(f"pass {self.pass_name} inserts a {name_of(target)} that does not type-check: {error}") from error
        self._added.append(node)
        return node

    def _check_target(self, target: Any) -> None:
        try:
            name_of(target)
        except (KeyError, TypeError):
            overload = "torch.ops.aten.relu.default"
            if isinstance(target, torch._ops.OpOverloadPacket):
                overload = f"torch.ops.{target}.{target.overloads()[0]}"
            given = getattr(target, "__name__", target)
            raise VerifyError(f"pass {self.pass_name} inserts {given}: give an overload, such as {overload}") from None

    def weight(self, weight: Weight) -> Node:
        """A use of `weight`, which joins the program's table under its name.

        Raises:
            VerifyError: another weight has that name.
        """
        self._in_step()
        known = self.program.weights.get(weight.name)
        if known is not None and known is not weight and known.digest != weight.digest:
            raise VerifyError(f"pass {self.pass_name} adds a weight {weight.name}, but the program has another of that name")
        self.program.weights.setdefault(weight.name, weight)
        if weight.name not in self._weight_nodes:
            first = next(iter(self.graph.nodes))
            with self.graph.inserting_before(first):
                self._weight_nodes[weight.name] = add_weight(self.graph, self.program.weights[weight.name], self.symbols)
        return self._weight_nodes[weight.name]

    def record(self, weight: Weight) -> None:
        """Keeps a weight of kind "record" in the program's table, under its name, in the place of one that was there.

        Raises:
            VerifyError: it is of another kind, or a weight that calls read has its name.
        """
        self._in_step()
        known = self.program.weights.get(weight.name)
        if weight.kind != "record" or (known is not None and known.kind != "record"):
            raise VerifyError(f"pass {self.pass_name} keeps a record {weight.name}, which is no record or stands for another weight")
        self.program.weights[weight.name] = weight

    def forget(self, name: str) -> None:
        """Takes the record of that name out of the table, where there is one.

        Raises:
            VerifyError: it is no record.
        """
        self._in_step()
        known = self.program.weights.get(name)
        if known is not None and known.kind != "record":
            raise VerifyError(f"pass {self.pass_name} forgets {name}, which is no record")
        self.program.weights.pop(name, None)

    def replace(self, old: Node, new: Node, *, retype: bool = False) -> None:
        """Redirects every use of `old` to `new` and erases `old` with what only it needed.

        Raises:
            VerifyError: the two differ in dtype, shape, device or strides (allowed with `retype` when all users were re-made), or `new`
                is computed from `old`, which then would be computed from itself.
        """
        removed = self._in_step()
        if _needs(new, old):
            raise VerifyError(
                f"pass {self.pass_name} replaces {label(old)} by {label(new)}, which needs it: compute the new value from the operands "
                "of the old one, or give its users the new one with set_arguments"
            )
        if not retype and not same_type(old.meta["val"], new.meta["val"]):
            types = [_shown(node, self.symbols) for node in (old, new)]
            raise VerifyError(f"pass {self.pass_name} replaces {label(old)} of type {types[0]} by {label(new)} of type {types[1]}")
        users = list(old.users)
        old.replace_all_uses_with(new)
        self._refresh_aliases(old, users)
        if old.op == "call_function":
            if new.op == "call_function":
                new.meta["origin"] = tuple(sorted({*new.meta.get("origin", ()), *old.meta.get("origin", ())}))
                if not str(new.meta.get("where") or ""):
                    new.meta["where"] = old.meta.get("where", Where())
            self._erase_dead(old, removed)

    def _refresh_aliases(self, old: Node, users: Sequence[Node]) -> None:
        """Views of a replaced value show its storage in their metadata; infer them again so that they show the new one's."""
        stale = {storage_key(tensor) for tensor in tensors_of(old.meta["val"])}
        pending = list(users)
        while pending:
            node = pending.pop(0)
            if node.op != "call_function" or not stale & {storage_key(tensor) for tensor in tensors_of(node.meta["val"])}:
                continue
            node.meta["val"] = infer(self.symbols, node.target, node.args, node.kwargs)
            pending += node.users

    def erase(self, node: Node) -> None:
        """Removes an unused call, and the calls that only it used.

        Raises:
            VerifyError: the node is used.
        """
        removed = self._in_step()
        if node.users:
            raise VerifyError(f"pass {self.pass_name} erases {label(node)}, which is still used")
        self._erase_dead(node, removed)

    def _erase_dead(self, root: Node, removed: list[str]) -> None:
        stack = [root]
        while stack:
            node = stack.pop()
            if node in self._erased or node.users or node.op == "placeholder":
                continue
            if node is not root and node.op == "call_function" and not is_pure(node):
                continue
            sources = node.all_input_nodes
            if node.op == "call_function":
                removed.append(label(node))
            elif node.op == "get_attr":
                self._weight_nodes.pop(node.target, None)
            self._erased.add(node)
            self.graph.erase_node(node)
            stack += sources

    def set_arguments(self, node: Node, args: Sequence[Any], kwargs: dict[str, Any] | None = None) -> Node:
        """Replaces `node` by the same operation on other arguments, of the same type. Returns the new node."""
        new = self.insert(node.target, args, kwargs, before=node, origin=node)
        self.replace(node, new)
        return new

    def add_function(self, function: Function) -> None:
        """A new function of the program, made with a `Derivation`; it takes the place of one of its name.

        Raises:
            VerifyError: it would take that of the function that is edited here.
        """
        self._in_step()
        if function.name == self.function.name:
            raise VerifyError(f"pass {self.pass_name} puts another function in the place of {function.name} while it edits that")
        self.program.functions[function.name] = function
        self._added += function.calls

    def schedule(self, name: str, data: Any) -> None:
        """Sets a schedule of the program: plain data under a name."""
        self._in_step()
        self.program.schedules[name] = data

    def outline(self, members: Sequence[Node], body: "RegionBuilder", outputs: Sequence[tuple[Node, Node, int]], count: Any) -> Node:
        """Replaces `members` by one `gw.sliced` call of `body` and returns it.

        `outputs` holds, for each value used outside, (member, its node in the body, dim along which slices are laid). Nodes that
        depend on members and stand between them move behind the region, in order.

        Raises:
            VerifyError: the members are not convex, or an output would change its type.
        """
        removed = self._in_step()
        inside = set(members)
        region = body.finish([inner for _, inner, _ in outputs])
        anchor = self._make_room(members)
        args = [region, body.in_dims, [dim for _, _, dim in outputs], count, *body.operands]
        kwargs: dict[str, Any] = {} if body.units is None else {"units": body.units}
        # A view that stays outside is in the body all the same, so the body says what the region descends from.
        ancestors = [*members, *(node for node in region.graph.nodes if node.op == "call_function")]
        call = self.insert(sliced, args, kwargs, before=anchor, origin=ancestors)
        if not all(same_type(m.meta["val"], value) for (m, _, _), value in zip(outputs, call.meta["val"], strict=True)):
            # Where a slice is one unit long, or a dim is, its strides do not tell how the whole lay; say it.
            kwargs["orders"] = [memory_order(member.meta["val"]) for member, _, _ in outputs]
            self._erase_dead(call, [])
            call = self.insert(sliced, args, kwargs, before=anchor, origin=ancestors)
        results = [self.insert(GETITEM, (call, j), before=anchor, origin=member) for j, (member, _, _) in enumerate(outputs)]
        for (member, _, _), result in zip(outputs, results, strict=True):
            if not same_type(member.meta["val"], result.meta["val"]):
                raise VerifyError(
                    f"region output for {label(member)} is {_shown(result, self.symbols)}, not {_shown(member, self.symbols)}"
                )
            users = list(member.users)
            member.replace_all_uses_with(result)
            self._refresh_aliases(member, [user for user in users if user not in inside])
        for member in reversed(members):
            removed.append(label(member))
            self._erased.add(member)
            self.graph.erase_node(member)
        return call

    def _make_room(self, members: Sequence[Node]) -> Node:
        """Moves dependants that stand among the members behind the last one; returns the node before which the region goes."""
        inside = set(members)
        dependants: list[Node] = []
        tainted = set(members)
        node, last = members[0], members[-1]
        while node is not last:
            node = node.next
            if not any(source in tainted for source in node.all_input_nodes):
                continue
            if node in inside:
                if any(source in tainted and source not in inside for source in node.all_input_nodes):
                    culprit = next(source for source in node.all_input_nodes if source in tainted and source not in inside)
                    raise VerifyError(f"the members are not convex: {label(node)} needs {label(culprit)}, which needs a member")
                continue
            if draws(node):
                raise VerifyError(f"{label(node)} draws random numbers and would move")
            tainted.add(node)
            dependants.append(node)
        anchor = last.next
        for node in dependants:
            anchor.prepend(node)
        return dependants[0] if dependants else anchor

    def inline(self, call: Node) -> None:
        """Replaces a region call by its body on whole operands.

        That is the same function where slicing is a schedule only: where no call of the body reduces over the sliced axis, or knows its
        place on it, as in every region that `slice-groups` made. This is not checked: of a body by hand, its author knows.
        """
        self._in_step()
        region = region_of(call)
        if region is None:
            raise VerifyError(f"{label(call)} is no region")
        operands = call.args[4:]
        values: dict[Node, Any] = dict(zip(region.placeholders, operands, strict=True))
        for inner in region.graph.nodes:
            if inner.op == "call_function":
                args, kwargs = fx.map_arg((inner.args, inner.kwargs), values.__getitem__)
                values[inner] = self.insert(inner.target, args, kwargs, before=call, origin=())
                values[inner].meta.update(origin=inner.meta.get("origin", ()), where=inner.meta.get("where", Where()))
        for user in list(call.users):
            self.replace(user, values[region.outputs[user.args[1]]])


class RegionBuilder:
    """Builds the body of a region: operands become placeholders of slice size, calls are re-inferred at that size."""

    def __init__(self, symbols: SymbolTable, units: Any, length: Any):
        self.symbols = symbols
        self.units = units
        self.length = length
        self.graph = fx.Graph()
        self.operands: list[Node] = []
        self.in_dims: list[int] = []
        self._placeholders: dict[tuple[Node, int], Node] = {}

    def operand(self, node: Node, dim: int = -1) -> Node:
        """The body's view of an outside value: sliced along `dim`, or whole (-1)."""
        key = (node, dim)
        if key not in self._placeholders:
            value = node.meta["val"]
            if dim >= 0:
                with self.symbols.inference():
                    value = value.narrow(dim, 0, self.length * (value.size(dim) // self.units))
            self.operands.append(node)
            self.in_dims.append(dim)
            first_call = next((n for n in self.graph.nodes if n.op == "call_function"), self.graph._root)
            with self.graph.inserting_before(first_call):
                self._placeholders[key] = add_placeholder(self.graph, f"v{len(self.operands)}", value)
        return self._placeholders[key]

    def call(self, target: Callable[..., Any], args: Any, kwargs: dict[str, Any] | None = None, *, like: Node | None = None) -> Node:
        """A call inside the body; `like` gives its provenance.

        Raises:
            InferenceError: the call does not type-check at slice size.
        """
        meta = like.meta if like is not None else {}
        return add_call(
            self.graph, self.symbols, target, tuple(args), kwargs, origin=meta.get("origin", ()), where=meta.get("where") or Where()
        )

    def finish(self, outputs: Sequence[Node]) -> Region:
        """The region that gives `outputs`, calls of this builder; what none of them needs is left out."""
        set_outputs(self.graph, list(outputs))
        for node in reversed(list(self.graph.nodes)):
            if node.op == "call_function" and not node.users:
                self.graph.erase_node(node)
        return Region(self.graph)


def _needs(node: Node, source: Node) -> bool:
    """Whether `node` is `source` or computed from it."""
    seen, pending = {node}, [node]
    while pending:
        each = pending.pop()
        if each is source:
            return True
        for operand in each.all_input_nodes:
            if operand not in seen and not operand < source:  # what stands before it does not need it
                seen.add(operand)
                pending.append(operand)
    return False


def merged_origin(nodes: Sequence[Node]) -> tuple[int, ...]:
    """The captured nodes that any of `nodes` descends from."""
    return tuple(sorted({index for node in nodes for index in node.meta.get("origin", ())}))


def first_where(nodes: Sequence[Node]) -> Where:
    """The first known user line among `nodes`."""
    return next((node.meta["where"] for node in nodes if str(node.meta.get("where") or "")), Where())


def label(node: Node) -> str:
    """What records and messages call a node: its operation, the captured operations that it came from, the user's line."""
    name = name_of(node.target) if node.op == "call_function" else str(node.target)
    origin = node.meta.get("origin", ())
    where = str(node.meta.get("where") or "")
    shown = ",".join(map(str, origin[:4])) + (",.." if len(origin) > 4 else "")
    return f"{name} [{shown}]" + (f" {where}" if where else "")


def _shown(node: Node, symbols: SymbolTable) -> str:
    from .types import type_text

    return type_text(node.meta["val"], symbols)
