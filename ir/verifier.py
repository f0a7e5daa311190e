"""What must hold of every program, after every pass.

Structure (uses after definitions, one output), vocabulary (known, functional operations), metadata (what is stored is what
inference gives), weights (they exist and fit), regions (closed, not nested, shapes scale with the slice). A node whose
operation, arguments and operand metadata are the very objects checked before is not inferred again.
"""

import json
from collections.abc import Iterable
from typing import Any

import torch
from torch import fx

from .calls import draws, is_mutating, name_of, written_statistics
from .errors import VerifyError
from .infer import InferenceError, infer, operands_of, same_tensor_type, same_type, sealed, storage_key, tensors_of
from .links.sizes import same
from .printer import node_lines
from .program import Function, Node, Program, Signature, Weight, region_of
from .region import Region, narrow, slice_bounds, slice_count, sliced, units_of
from .region_rules import check_region
from .symbols import SymbolTable, hint
from .tree import is_call
from .types import type_text


def verify(program: Program) -> None:
    """Raises VerifyError naming the first broken rule, with the lines around it as a note."""
    if "main" not in program.functions:
        raise VerifyError("a program needs a function main")
    for name, data in program.schedules.items():
        _verify_schedule(name, data)
    for function in program.functions.values():
        _verify_function(program, function)


def _verify_schedule(name: str, data: Any) -> None:
    try:
        json.dumps(data, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise VerifyError(f"schedule {name} is no plain data, and cannot be written as text: {error}") from error


def _verify_function(program: Program, function: Function) -> None:
    try:
        _verify_graph(function.graph, program.symbols, program.weights, region=False)
        _verify_signature(function)
    except VerifyError as error:
        _attach_lines(error, function, program.symbols)
        raise


class _Broken(VerifyError):
    def __init__(self, message: str, node: Node):
        where = str(node.meta.get("where") or "")
        super().__init__(f"{message}" + (f" (from {where})" if where else ""))
        self.node = node


def _verify_graph(graph: fx.Graph, symbols: SymbolTable, weights: dict[str, Weight], *, region: bool) -> None:
    defined: set[Node] = set()
    seen_output = False
    for node in graph.nodes:
        if seen_output:
            raise _Broken("a node follows the output", node)
        for operand in operands_of((node.args, node.kwargs)):
            if operand not in defined:
                raise _Broken(f"{_name(node)} uses {_name(operand)} before it is defined, or from outside its function", node)
        if node.op == "call_function":
            _verify_call(node, symbols, region)
        elif node.op == "get_attr":
            _verify_weight(node, weights, region)
        elif node.op == "output":
            seen_output = True
        elif node.op != "placeholder":
            raise _Broken(f"a node of kind {node.op} has no place in the IR", node)
        elif node.meta.get("role") == "state":
            _verify_state(node, weights, region)
        defined.add(node)
    if not seen_output:
        raise VerifyError("a function has no output")


def _verify_call(node: Node, symbols: SymbolTable, in_region: bool) -> None:
    try:
        name = name_of(node.target)
    except (KeyError, TypeError):
        raise _Broken(f"{node.target} is not an operation of the IR", node) from None
    if is_mutating(node.target) or written_statistics(node.target, node.args, node.kwargs):
        raise _Broken(f"{name} writes to an operand: programs are functional", node)
    if in_region and (node.target is sliced or draws(node)):
        raise _Broken(f"{name} may not stand inside a region", node)
    if "val" not in node.meta:
        raise _Broken(f"{name} has no metadata", node)
    seal = sealed(node.target, node.args, node.kwargs)
    if _same_seal(node.meta.get("seal"), seal, node):
        return
    try:
        if node.target is sliced:
            _verify_region(node, symbols)
        value = infer(symbols, node.target, node.args, node.kwargs)
    except InferenceError as error:
        raise _Broken(f"{name} does not type-check: {symbols.named(str(error))}", node) from error
    if not same_type(value, node.meta["val"]):
        stored = type_text(node.meta["val"], symbols)
        raise _Broken(f"{name} is stored as {stored} but computes {type_text(value, symbols)}", node)
    if _aliased(node, value) != _aliased(node, node.meta["val"]):
        raise _Broken(f"{name} is stored as aliasing other operands than it does", node)
    node.meta["seal"] = (*seal, node.meta["val"])


def _aliased(node: Node, value: Any) -> list[bool]:
    """For each operand, whether `value` shares a storage with it."""
    keys = {storage_key(tensor) for tensor in tensors_of(value)}
    return [any(storage_key(tensor) in keys for tensor in tensors_of(operand.meta["val"])) for operand in node.all_input_nodes]


def _same_seal(seal: Any, now: tuple[Any, ...], node: Node) -> bool:
    if seal is None or seal[0] is not now[0] or seal[3] is not node.meta["val"] or len(seal[2]) != len(now[2]):
        return False
    return all(a is b for a, b in zip(seal[2], now[2], strict=True)) and _same_constants(seal[1], now[1])


def _same_constants(a: Any, b: Any) -> bool:
    """Equality that tells 2 from 2.0, 1 from True and 0.0 from -0.0, which mean other things to an operation."""
    if isinstance(a, tuple | list):
        return isinstance(b, tuple | list) and len(a) == len(b) and all(map(_same_constants, a, b))
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(_same_constants(a[key], b[key]) for key in a)
    if isinstance(a, float | complex):
        return type(a) is type(b) and repr(a) == repr(b)
    return type(a) is type(b) and a == b


def _verify_region(node: Node, symbols: SymbolTable) -> None:
    body = region_of(node)
    if body is None:
        raise _Broken("gw.sliced has no body", node)
    _verify_graph(body.graph, symbols, {}, region=True)
    check_region(symbols, node.args, node.kwargs)
    _, in_dims, _, count, *operands = node.args
    units = units_of(in_dims, [operand.meta["val"] for operand in operands], _known(node.kwargs.get("units")))
    count = _known(count)
    reached = _reachable(body, in_dims)
    for j, output in enumerate(body.outputs):
        if output not in reached:
            raise _Broken(f"output {j} of gw.sliced does not depend on the slice: compute it outside", node)
    if not isinstance(units, int) or not isinstance(count, int):
        _verify_lengths(node, body, (1, 2), units, count, symbols)
    elif units % count:
        _verify_lengths(node, body, {end - begin for begin, end in slice_bounds(units, count)}, units, count, symbols)


def _known(size: Any) -> Any:
    """The value of a size that may be computed by a node."""
    return size.meta["val"] if isinstance(size, fx.Node) else size


def _reachable(body: Region, in_dims: list[int]) -> set[Node]:
    reached = {placeholder for placeholder, dim in zip(body.placeholders, in_dims, strict=True) if dim >= 0}
    for node in body.graph.nodes:
        if any(operand in reached for operand in node.all_input_nodes):
            reached.add(node)
    return reached


def _verify_lengths(node: Node, body: Region, lengths: Iterable[int], units: Any, count: Any, symbols: SymbolTable) -> None:
    """The body was typed for slices of one length; it must hold for those of other `lengths` too."""
    _, in_dims, out_dims, _, *operands = node.args
    for length in lengths:
        if length > hint(units):
            continue
        try:
            with symbols.inference():
                values = [narrow(operand.meta["val"], dim, 0, length, units) for operand, dim in zip(operands, in_dims, strict=True)]
                parts = body(*values)
        except Exception as error:
            raise _Broken(f"the body of gw.sliced fails on a slice of {length} units: {str(error).splitlines()[0]}", node) from error
        for j, (part, dim) in enumerate(zip(parts, out_dims, strict=True)):
            whole = node.meta["val"][j].size(dim)
            is_partial = same(part.size(dim), 1) and same(whole, slice_count(count, units))
            expected = 1 if is_partial else whole // units * length
            if not same(part.size(dim), expected):
                raise _Broken(f"output {j} of gw.sliced has {part.size(dim)} rows for a slice of {length} units, not {expected}", node)


def _verify_weight(node: Node, weights: dict[str, Weight], region: bool) -> None:
    if region:
        raise _Broken(f"a region reads weight {node.target} directly: pass it as an operand", node)
    weight = weights.get(str(node.target))
    if weight is None:
        raise _Broken(f"weight {node.target} is not in the table", node)
    value = node.meta["val"]
    if value.dtype != weight.dtype or tuple(value.shape) != weight.shape or tuple(value.stride()) != weight.stride:
        raise _Broken(f"weight {node.target} is {weight.dtype}{list(weight.shape)} in the table but not in the graph", node)
    if weight.tensor is not None and (weight.tensor.dtype != weight.dtype or tuple(weight.tensor.shape) != weight.shape):
        raise _Broken(f"weight {node.target} has a tensor that its entry does not describe", node)


def _verify_state(node: Node, weights: dict[str, Weight], region: bool) -> None:
    _verify_weight(node, weights, region)
    kind = weights[str(node.target)].kind
    if kind != "state":
        raise _Broken(f"state {node.target} is a {kind} in the table", node)


def _verify_signature(function: Function) -> None:
    output = function.graph.output_node()
    signature = function.signature()
    if len(signature.inputs) != function.in_tree.num_leaves:
        raise _Broken(f"{function.name} has {len(signature.inputs)} inputs but its tree has {function.in_tree.num_leaves}", output)
    if len(signature.outputs) != function.out_tree.num_leaves:
        raise _Broken(f"{function.name} returns {len(signature.outputs)} values but its tree has {function.out_tree.num_leaves}", output)
    if not is_call(function.in_tree):
        raise _Broken(f"{function.name} takes no call: its tree is a tuple of arguments and a dict of named ones", output)
    for leaf in function.outputs:
        if not isinstance(leaf, fx.Node) and operands_of(leaf):
            raise _Broken(f"{function.name} returns a list of values: each is an output of its own", output)
    _verify_new_states(function, signature)
    names = [argument.name for argument in (*signature.inputs, *signature.states)]
    if len(set(names)) != len(names):
        raise _Broken(f"{function.name} has two inputs of one name", output)


def _verify_new_states(function: Function, signature: Signature) -> None:
    output = function.graph.output_node()
    states = {state.name: state.value for state in signature.states}
    states |= {f"input:{argument.name}": argument.value for argument in signature.inputs}
    new_values = function.outputs[len(signature.outputs) :]
    for name, leaf in zip(signature.new_states, new_values, strict=True):
        if name not in states:
            raise _Broken(f"{function.name} gives a new value to {name}, which is no state of it", output)
        old, new = states[name], leaf.meta["val"] if isinstance(leaf, fx.Node) else leaf
        if not isinstance(old, torch.Tensor) or not isinstance(new, torch.Tensor) or not same_tensor_type(old, new):
            raise _Broken(f"{function.name} gives {name} a new value that is not of its dtype, shape and device", output)
    if len(states.keys() & set(signature.new_states)) != len(signature.new_states):
        raise _Broken(f"{function.name} gives two new values to one state", output)


def _name(node: Node) -> str:
    if node.op != "call_function":
        return f"{node.op} {node.target}"
    try:
        return name_of(node.target)
    except (KeyError, TypeError):
        return str(node.target)


def _attach_lines(error: VerifyError, function: Function, symbols: SymbolTable) -> None:
    """The failing node's line and two either side, as a note."""
    node = getattr(error, "node", None)
    try:
        lines = node_lines(function, symbols)
    except Exception:  # a broken program may not print
        return
    printed = list(lines)
    if node in lines:
        at = printed.index(node)
        error.add_note("\n".join(lines[n] for n in printed[max(0, at - 2) : at + 3]))
