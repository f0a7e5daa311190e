"""The reference run: every operation by its own body, in order, values dropped after their last use.

Constant folding, the numeric checks and the tests run programs this way; the runtime has its own, faster executor.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import fx

from .errors import InputError
from .forks import check_threads
from .liveness import last_uses
from .program import Function, Node, Program


def run(
    program: Program,
    inputs: Sequence[Any],
    *,
    function: str = "main",
    states: Mapping[str, torch.Tensor] | None = None,
    observe: Callable[[Node, Any], Any] | None = None,
    parameters: Mapping[str, torch.Tensor] | None = None,
    instead: Mapping[Any, Callable[..., Any]] | None = None,
) -> tuple[list[Any], dict[str, torch.Tensor]]:
    """The flat outputs and new states of `function` on flat `inputs` (one for each leaf, constants included).

    `observe(node, value)` may return another value to use in its place (noise injection, recording). `parameters` stand for the weights of
    their names, and outputs carry gradients for them; without any no gradients are kept. `instead` has functions that are called in the
    place of operators.

    Raises:
        InputError: the number of inputs is wrong, or a weight has no tensor (a program read from text alone).
        TargetError: this process was forked and lacks the threads that torch would wait for.
    """
    check_threads()
    body, called = program.functions[function], instead or {}
    values = _bind(program, body, inputs, {**(states or {}), **(parameters or {})})
    last_use = last_uses(body.graph)
    with torch.no_grad() if parameters is None else nullcontext():
        for node in body.graph.nodes:
            if node.op == "call_function":
                args, kwargs = fx.map_arg((node.args, node.kwargs), values.__getitem__)
                values[node] = called.get(node.target, node.target)(*args, **kwargs)
                if observe is not None:
                    values[node] = observe(node, values[node])
            for dead in last_use.get(node, ()):
                values.pop(dead, None)
            if node.op == "output":
                leaves = [values[leaf] if isinstance(leaf, fx.Node) else leaf for leaf in node.args[0]]
                new_states = node.meta.get("new_states", ())
                split = len(leaves) - len(new_states)
                return leaves[:split], dict(zip(new_states, leaves[split:], strict=True))
    raise AssertionError("a verified function has an output")


def _bind(program: Program, body: Function, inputs: Sequence[Any], given: Mapping[str, torch.Tensor]) -> dict[Node, Any]:
    values: dict[Node, Any] = {}
    remaining = list(inputs)
    for node in body.graph.nodes:
        if node.op == "placeholder" and node.meta.get("role", "input") == "input":
            if not remaining:
                raise InputError(f"function {body.name} takes more than {len(inputs)} inputs")
            values[node] = remaining.pop(0)
        elif node.op in ("placeholder", "get_attr"):
            name = str(node.target)
            tensor = given[name] if name in given else program.weights[name].tensor
            if tensor is None:
                raise InputError(f"weight {name} has no values: this program was read from text, give parse() a weight table")
            values[node] = tensor
    if remaining:
        raise InputError(f"function {body.name} takes {len(inputs) - len(remaining)} inputs, not {len(inputs)}")
    return values
