"""The smallest program that still fails: outputs, then what lies behind and before the fault, then single calls, are taken away as long as
the trial ends as it did.

A value whose call is taken away becomes an input, with the numbers that it had in the program that failed, so that what is left meets
the values of the real run. Sources: delta debugging (Zeller and Hildebrandt, 2002); specs/trust.md, section 4.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from ..ir import Node, Program
from ..ir.build import set_outputs
from ..ir.errors import GraphwrightError, PassError
from ..ir.program import new_function
from ..ir.run import run
from ..ir.strides import laid_out
from ..passes import Pass, Verdict, parse_pipeline
from ..passes.pipeline import Pipeline
from .verdict import try_passes

Fails = Callable[[Program, Sequence[Any]], bool]


@dataclass(frozen=True)
class Smallest:
    """What is left of a trial, and how it ends."""

    program: Program
    passes: tuple[Pass, ...]
    inputs: list[Any]
    verdict: Verdict


def reduce(program: Program, passes: Pipeline, inputs: Sequence[Any]) -> Smallest:
    """A part of `program` and of `passes`, with inputs, that fails as the whole does on `inputs` (flat, a value for each leaf): by the same
    kind of verdict, about the same (numbers, shared memory, a rule of the IR, ..).

    Raises:
        ValueError: it does not fail.
    """
    pipeline = parse_pipeline(passes)
    verdict = try_passes(program, pipeline, [inputs]).verdict
    if not verdict.fails:
        raise ValueError(f"the trial is {verdict.kind}, so that there is nothing to reduce")
    symptom = _symptom(verdict)

    def fails(part: Program, values: Sequence[Any]) -> bool:
        return _symptom(try_passes(part, pipeline, [values]).verdict) == symptom

    small, values = reduced(program, inputs, fails)
    for each in reversed(pipeline):
        fewer = tuple(other for other in pipeline if other is not each)
        if _ends_as(symptom, small, fewer, values):
            pipeline = fewer
    return Smallest(small, pipeline, values, try_passes(small, pipeline, [values]).verdict)


def _symptom(verdict: Verdict) -> tuple[str, str]:
    """The kind of a verdict and what it is about, so that a part which fails for another reason is not taken for the fault: where a call
    is the last one left, a pass that drops it gives an input back as the output, whatever was wrong with it before."""
    if verdict.worst is not None:
        return verdict.kind, "numbers"
    said = ("shares memory", "breaks a rule of the IR", "its text", "fails to run", " failed: ")
    return verdict.kind, next((each for each in said if each in verdict.reason), "")


def _ends_as(symptom: tuple[str, str], program: Program, passes: tuple[Pass, ...], inputs: Sequence[Any]) -> bool:
    try:
        return _symptom(try_passes(program, passes, [inputs]).verdict) == symptom
    except PassError:  # one needs another before it
        return False


def reduced(program: Program, inputs: Sequence[Any], fails: Fails) -> tuple[Program, list[Any]]:
    """The same for any `fails(program, inputs)`, which holds for the whole. Functions beside main are left out."""
    search = _Search(program, inputs, fails)
    search.fewer_outputs()
    search.cut_behind()
    search.cut_before()
    search.single_calls()
    return search.part(search.kept, search.outputs)


class _Search:
    """`kept` are the calls of main that are left, `outputs` what is given; a part is tried by building it."""

    def __init__(self, program: Program, inputs: Sequence[Any], fails: Fails):
        self.program, self.fails = program, fails
        self.values: dict[Node, Any] = dict(zip(_inputs(program), inputs, strict=True))
        states = [node for node in program.main.placeholders if node.meta.get("role", "input") == "state"]
        self.values |= {node: program.weights[str(node.target)].tensor for node in states}
        run(program, list(inputs), observe=self._record)
        self.calls = [node for node in program.main.graph.nodes if node.op == "call_function"]
        self.kept = set(self.calls)
        self.outputs: list[Any] = list(program.main.outputs)

    def _record(self, node: Node, value: Any) -> Any:
        self.values[node] = laid_out(value.detach().clone(), value.stride()) if isinstance(value, torch.Tensor) else value
        return value

    def still_fails(self, kept: set[Node], outputs: list[Any]) -> bool:
        try:
            part, inputs = self.part(kept, outputs)
            return bool(part.main.calls) and self.fails(part, inputs)
        except (GraphwrightError, _Whole):
            return False

    def accept(self, kept: set[Node], outputs: list[Any]) -> bool:
        kept = _needed(outputs, kept)
        if (kept, outputs) != (self.kept, self.outputs) and self.still_fails(kept, outputs):
            self.kept, self.outputs = kept, outputs
            return True
        return False

    def fewer_outputs(self) -> None:
        nodes = [leaf for leaf in self.outputs if isinstance(leaf, Node)]
        if any(self.accept(self.kept, [leaf]) for leaf in dict.fromkeys(nodes)):
            return
        for leaf in nodes:
            self.accept(self.kept, [each for each in self.outputs if each is not leaf])

    def cut_behind(self) -> None:
        """The earliest call whose value, given as the only output, shows the fault: found by halves, then one by one."""
        tensors = [node for node in self.calls if node in self.kept and isinstance(node.meta["val"], torch.Tensor)]
        low, high = 0, len(tensors)
        while low < high:
            middle = (low + high) // 2
            if self.accept(set(tensors[: middle + 1]) | self._others(tensors[: middle + 1]), [tensors[middle]]):
                high = middle
            else:
                low = middle + 1

    def _others(self, tensors: Sequence[Node]) -> set[Node]:
        """Calls that give no tensor, which those before the last of `tensors` may need."""
        end = self.calls.index(tensors[-1])
        return {node for node in self.calls[:end] if not isinstance(node.meta["val"], torch.Tensor)}

    def cut_before(self) -> None:
        """The latest call from which on the rest fails alone, found by halves."""
        order = [node for node in self.calls if node in self.kept]
        low, high = 0, len(order)
        while low < high:
            middle = (low + high + 1) // 2
            if self.accept(set(order[middle:]), self.outputs):
                low = middle
            else:
                high = middle - 1

    def single_calls(self) -> None:
        """Calls one by one, from the end, until none can go."""
        changed = True
        while changed:
            changed = False
            for node in reversed(self.calls):
                if node in self.kept and node not in self.outputs:
                    changed |= self.accept(self.kept - {node}, self.outputs)
            tensors = [node for node in self.calls if node in self.kept and isinstance(node.meta["val"], torch.Tensor)]
            for node in tensors:
                if [node] != self.outputs:
                    changed |= self.accept(self.kept, [node])

    def part(self, kept: set[Node], outputs: list[Any]) -> tuple[Program, list[Any]]:
        """The program of `kept` that gives `outputs`, and its inputs."""
        kept = _needed(outputs, kept)
        graph, copies, inputs = fx.Graph(), dict[Node, Node](), list[Any]()
        read = {operand for node in kept for operand in node.all_input_nodes} | {leaf for leaf in outputs if isinstance(leaf, Node)}
        for node in self.program.main.graph.nodes:  # inputs stand first
            if node in read and node not in kept and node.op != "get_attr":
                if node not in self.values or not isinstance(node.meta["val"], torch.Tensor | torch.SymInt | int | float | bool):
                    raise _Whole
                copies[node] = graph.placeholder(f"v{len(copies)}" if node.op != "placeholder" else str(node.target))
                copies[node].meta.update(val=node.meta["val"], role="input")
                inputs.append(self.values[node])
        for node in self.program.main.graph.nodes:
            if (node.op == "get_attr" and node in read) or node in kept:
                copies[node] = graph.node_copy(node, copies.__getitem__)
                copies[node].meta = dict(node.meta)
        set_outputs(graph, [copies[leaf] if isinstance(leaf, Node) else leaf for leaf in outputs])
        weights = {str(node.target): self.program.weights[str(node.target)] for node in graph.nodes if node.op == "get_attr"}
        part = Program([new_function("main", graph)], weights, self.program.symbols).copy()
        return part, inputs


class _Whole(Exception):
    """A value cannot be an input: it is a list of tensors, or of the program's state."""


def _needed(outputs: Sequence[Any], kept: set[Node]) -> set[Node]:
    """Those of `kept` that outputs are computed from."""
    found: set[Node] = set()
    pending = [leaf for leaf in outputs if isinstance(leaf, Node)]
    while pending:
        node = pending.pop()
        if node in kept and node not in found:
            found.add(node)
            pending += node.all_input_nodes
    return found


def _inputs(program: Program) -> Iterator[Node]:
    return (node for node in program.main.placeholders if node.meta.get("role", "input") == "input")
