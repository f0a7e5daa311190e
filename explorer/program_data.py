"""A program as data: its lines with what each reads and where it comes from, its functions, and the memory of each."""

from collections.abc import Mapping
from functools import cached_property
from typing import Any

from torch import fx

from ..ir import Node, Program
from ..ir.calls import name_of
from ..ir.liveness import profile, storage_bytes
from ..ir.printer import Line, program_lines
from ..ir.program import Function, Where, region_of
from ..ir.region_call import RegionCall
from ..ir.rewriter import label


class Wheres:
    """The user's lines that programs refer to, each once, known by a number."""

    def __init__(self) -> None:
        self.known: list[Where] = []
        self._number: dict[Where, int] = {}

    def number(self, where: Where) -> int:
        if where not in self._number:
            self._number[where] = len(self.known)
            self.known.append(where)
        return self._number[where]


class ProgramData:
    """`data` is the program as the document holds it. Lines are known by their place; those that say which passes made the program are
    left out, so that a pass that changed nothing has no program of its own."""

    def __init__(self, program: Program, wheres: Wheres):
        self.bare = Program(program.functions.values(), program.weights, program.symbols, program.schedules)
        self.lines = program_lines(self.bare)
        self.index: dict[Node, int] = {}
        self._weights: dict[str, int] = {}
        self._operand_of: dict[Node, Node] = {}  # a region's input -> what it is a slice of
        for index, line in enumerate(self.lines):
            if line.kind == "weight":
                self._weights[line.name] = index
            elif line.node is not None and line.kind != "close":
                self.index[line.node] = index
                region = region_of(line.node)
                if region is not None:
                    self._operand_of |= zip(region.placeholders, RegionCall.of(line.node).operands, strict=True)
        self._wheres = wheres
        self.data: dict[str, Any] = {
            "lines": [self._line(line) for line in self.lines],
            "functions": [self._function(function) for function in program.functions.values()],
        }

    def stands_for(self, program: Program) -> None:
        """Nodes of `program`, which is equal, are known by the same lines from here on."""
        pairs = zip(self.bare.nodes(), program.nodes(), strict=True)
        self.index |= {other: self.index[node] for node, other in pairs if node in self.index}

    @cached_property
    def labelled(self) -> dict[str, list[int]]:
        """What records of rewrites call a call -> the lines that are called so."""
        found: dict[str, list[int]] = {}
        for node, index in self.index.items():
            if node.op == "call_function":
                found.setdefault(label(node), []).append(index)
        return found

    def line_of(self, what: str, where: str) -> int:
        """The first line of that operation, or else of any, that came from the user's line `where`; -1 where there is none."""
        return self._placed.get((what, where), self._placed.get(("", where), -1) if where else -1)

    @cached_property
    def _placed(self) -> dict[tuple[str, str], int]:
        """(operation, user's line) -> its first line; an operation "" stands for any."""
        found: dict[tuple[str, str], int] = {}
        for node, index in self.index.items():
            what = name_of(node.target) if node.op == "call_function" else str(node.target)  # type: ignore[arg-type]
            for key in (what, ""):
                found.setdefault((key, str(node.meta.get("where") or "")), index)
        return found

    def _line(self, line: Line) -> dict[str, Any]:
        data: dict[str, Any] = {"text": line.text, "kind": line.kind}
        node = line.node
        if node is None or line.kind == "close":
            return data
        if node.op == "call_function":
            data["op"] = name_of(node.target)  # type: ignore[arg-type]
        operands = [self._operand_of[node]] if node in self._operand_of else node.all_input_nodes
        reads = [place for operand in operands if (place := self._place(operand)) is not None]
        if reads:
            data["reads"] = list(dict.fromkeys(reads))
        where = node.meta.get("where")
        if where is not None and str(where):
            data["where"] = self._wheres.number(where)
        if node.meta.get("origin"):
            data["origin"] = list(node.meta["origin"])
        if line.region is not None:
            data["region"] = self.index[line.region]
        if node.op in ("call_function", "placeholder") and region_of(node) is None:
            data["bytes"] = storage_bytes(node.meta["val"])
        return data

    def _place(self, node: fx.Node) -> int | None:
        return self._weights.get(str(node.target)) if node.op == "get_attr" else self.index.get(node)

    def _function(self, function: Function) -> dict[str, Any]:
        own = [index for index, line in enumerate(self.lines) if line.function == function.name and line.kind != "blank"]
        return {"name": function.name, "first": own[0], "last": own[-1], "memory": self._memory(function)}

    def _memory(self, function: Function) -> dict[str, Any]:
        memory = profile(function)
        index: Mapping[Node, int] = self.index
        storages = [
            {"line": index[storage.maker], "bytes": storage.nbytes, "born": storage.born, "dies": storage.dies}
            for storage in memory.storages
            if storage.nbytes
        ]
        return {
            "peak_bytes": memory.peak_bytes,
            "peak_at": memory.peak_at,
            "input_bytes": memory.input_bytes,
            "weight_bytes": memory.weight_bytes,
            "lines": [index[node] for node in memory.nodes],
            "live": [int(count) for count in memory.live],
            "scratch": [int(count) for count in memory.workspaces],
            "storages": storages,
        }
