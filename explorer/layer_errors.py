"""How far each layer is from float64: of the program as captured, and of what the passes made of it.

    error = RMS(v - r) / RMS(r)

r is what the layer gives in the float64 program of the captured one, v the same in the working dtype. A layer is a module of the user's;
its result is the last call of it. The errors of one layer include those of all before it: the runs are whole runs.
"""

import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..ir import Node, Program
from ..ir.diff import compare
from ..ir.float64 import WIDENING, to_float64, widened
from ..ir.run import run
from ..ir.strides import laid_out
from ..ir.symbols import hint

_MOST_HELD = 2**30


@dataclass(frozen=True)
class LayerError:
    """One layer: its module path, its result in the captured program and in the final one (None where no call there is the same), and the
    errors of both; `before` is what the working dtype costs, `after` that and what the passes do."""

    module: str
    source: Node
    result: Node | None
    before: float
    after: float | None


def layer_errors(captured: Program, final: Program, inputs: Sequence[Any]) -> tuple[LayerError, ...]:
    """The errors of main's layers on flat `inputs`, in the order in which the captured program runs. The float64 results of all layers are
    held at once.

    Raises:
        NoFloat64: the captured program has no float64 form.
        InputError: a program has no weights, or the inputs do not fit.
    """
    return _errors(captured, final, inputs, list(_layers(captured).values()), all_at_once=True)


def call_errors(captured: Program, final: Program, inputs: Sequence[Any]) -> tuple[LayerError, ...]:
    """The same for each call of main that gives floats, those of which the final program has none the same included. The programs run as
    often as it takes to hold at most 1 GiB of float64 results at once.

    Raises:
        NoFloat64: the captured program has no float64 form.
        InputError: a program has no weights, or the inputs do not fit.
    """
    return _errors(captured, final, inputs, [node for node in captured.main.calls if _gives_floats(node)], all_at_once=False)


def _errors(
    captured: Program, final: Program, inputs: Sequence[Any], nodes: Sequence[Node], *, all_at_once: bool
) -> tuple[LayerError, ...]:
    partners = _partners(captured, final, nodes, inputs)
    wide_program = to_float64(captured)
    wide_nodes, wide_inputs = _same_places(captured, wide_program), [_wide(value) for value in inputs]
    own, made = dict[Node, float](), dict[Node, float]()
    for some in [nodes] if all_at_once else _batches(nodes):
        wide = _observed(wide_program, wide_inputs, {node: wide_nodes[node] for node in some})
        error = functools.partial(_error_of, wide)
        own |= _observed(captured, inputs, {node: node for node in some}, error)
        made |= _observed(final, inputs, {node: partners[node] for node in some if node in partners}, error)
    return tuple(LayerError(node.meta["where"].module, node, partners.get(node), own[node], made.get(node)) for node in nodes)


def _batches(nodes: Sequence[Node]) -> Iterator[list[Node]]:
    """The nodes in order, in runs of which the float64 values fit."""
    some, held = list[Node](), 0
    for node in nodes:
        nbytes = 8 * math.prod(map(hint, node.meta["val"].shape))
        if some and held + nbytes > _MOST_HELD:
            yield some
            some, held = [], 0
        some.append(node)
        held += nbytes
    if some:
        yield some


def _layers(program: Program) -> dict[str, Node]:
    """Module path -> its last call that gives floats."""
    found: dict[str, Node] = {}
    for node in program.main.calls:
        if _gives_floats(node):
            module = node.meta["where"].module
            found.pop(module, None)
            found[module] = node
    return found


def _gives_floats(node: Node) -> bool:
    value = node.meta["val"]
    return node.meta.get("where") is not None and isinstance(value, torch.Tensor) and value.dtype.is_floating_point


def _partners(captured: Program, final: Program, nodes: Sequence[Node], inputs: Sequence[Any]) -> dict[Node, Node]:
    """Call of the captured program -> the value of the final one's main, outside of regions, that is the same.

    A call that came from several has the value of the last of them, as a convolution that a norm was folded into; it is that of one
    before where the run shows that the calls between change nothing, as a dropout in eval mode.
    """
    pairing = compare(captured, final).pairing
    before, after = pairing.before, pairing.after
    found = {before.lines[i].node: after.lines[j].node for j, i in pairing.partner.items()}
    by_origin = {operation: call for call in final.main.calls for operation in call.meta.get("origin", ())}
    ends = _Ends(captured)
    partners, in_doubt = dict[Node, Node](), dict[Node, Node]()
    for node in nodes:
        partner = _partner(node, found.get(node), by_origin, final)
        if partner is None:
            continue
        partners[node] = partner
        end = ends.of(partner, node)
        if end is not node:
            in_doubt[node] = end
    same = _of_equal_values(captured, inputs, in_doubt)
    return {node: partner for node, partner in partners.items() if node not in in_doubt or node in same}


def _partner(node: Node, paired: Node | None, by_origin: Mapping[int, Node], final: Program) -> Node | None:
    """The call that the difference pairs with `node`, or else the last that came from the same operations."""
    origin = node.meta.get("origin", ())
    others = [by_origin.get(operation) for operation in origin]
    other = others[0] if others and all(each is others[0] for each in others) else None
    for each in (paired, other):
        if each is not None and each.graph is final.main.graph and _alike(each.meta["val"], node.meta["val"]):
            return each
    return None


class _Ends:
    """Which call of the captured program has the value of a call that came from several."""

    def __init__(self, captured: Program):
        self._last: dict[int, tuple[int, Node]] = {}  # operation -> the last call that came from it, and its place
        for place, call in enumerate(captured.main.calls):
            self._last |= {operation: (place, call) for operation in call.meta.get("origin", ())}

    def of(self, partner: Node, node: Node) -> Node:
        """The last call of those that `partner` came from that can be its value; `node` where none is known."""
        known = [self._last[operation] for operation in partner.meta.get("origin", ()) if operation in self._last]
        alike = [(place, call) for place, call in known if _alike(partner.meta["val"], call.meta["val"])]
        return max(alike, key=lambda each: each[0])[1] if alike else node


def _of_equal_values(program: Program, inputs: Sequence[Any], pairs: Mapping[Node, Node]) -> set[Node]:
    """Those calls whose value in a run of main is that of the later call beside them, to the last bit."""
    waiting, held, same = _by_value(pairs), dict[Node, Any](), set[Node]()

    def observe(node: Node, value: Any) -> Any:
        if node in pairs:
            held[node] = value
        for earlier in waiting.get(node, ()):
            if earlier in held and _equal(held.pop(earlier), value):
                same.add(earlier)
        return value

    if pairs:
        _run(program, inputs, observe)
    return same


def _equal(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.shape == b.shape and a.dtype == b.dtype and torch.allclose(a, b, rtol=0, atol=0, equal_nan=True)


def _alike(a: Any, b: Any) -> bool:
    if not (isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor) and a.dtype.is_floating_point):
        return False
    return list(map(str, a.shape)) == list(map(str, b.shape))


def _same_places(program: Program, wide: Program) -> dict[Node, Node]:
    """Call -> that of the float64 program, which has the same in the same order and casts beside them."""
    others = [node for node in wide.main.calls if not node.meta.get(WIDENING)]
    return dict(zip(program.main.calls, others, strict=True))


def _observed(
    program: Program, inputs: Sequence[Any], places: Mapping[Node, Node], told: Callable[[Node, Any], Any] = lambda node, value: value
) -> dict[Node, Any]:
    """What a run of main has at the call of the program that stands beside each key."""
    seen, asked = dict[Node, Any](), _by_value(places)

    def observe(call: Node, value: Any) -> Any:
        seen.update((node, told(node, value)) for node in asked.get(call, ()))
        return value

    _run(program, inputs, observe)
    return seen


def _by_value(pairs: Mapping[Node, Node]) -> dict[Node, list[Node]]:
    found: dict[Node, list[Node]] = {}
    for key, value in pairs.items():
        found.setdefault(value, []).append(key)
    return found


def _run(program: Program, inputs: Sequence[Any], observe: Callable[[Node, Any], Any]) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        run(program, inputs, observe=observe)


def _wide(value: Any) -> Any:
    return laid_out(value.to(widened(value.dtype)), value.stride()) if isinstance(value, torch.Tensor) else value


def _error_of(wide: Mapping[Node, torch.Tensor], node: Node, value: torch.Tensor) -> float:
    """RMS of the difference over RMS of the exact value; 0 / 0 is 0. Infinities and NaN that both have do not count."""
    exact = wide[node]
    if value.shape != exact.shape:
        return math.inf
    same = (value.isnan() & exact.isnan()) | (value.isinf() & exact.isinf() & (value.sign() == exact.sign()))
    value, exact = value.to(exact.dtype).masked_fill(same, 0), exact.masked_fill(same, 0)
    if not torch.isfinite(value).all():
        return math.inf
    if value.numel() == 0:
        return 0.0
    scale = exact.square().mean().sqrt()
    error = (value - exact).square().mean().sqrt()
    return 0.0 if not error else float(error / scale)
