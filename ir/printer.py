"""`str(program)`: one operation a line, results typed, weights by name and hash, symbols with ranges, user line as comment.

Equal programs print equal bytes. The grammar is in the parser's docstring.
"""

import json
import math
import re
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from .calls import name_of
from .program import Function, Program, Weight, region_of
from .region import Region
from .symbols import UNBOUNDED, SymbolTable
from .tree import Tree
from .types import DTYPE_NAMES, tensor_type_text, type_text

VERSION = 1
PLAIN_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*(\.[A-Za-z0-9_]+)*")


@dataclass(frozen=True)
class Line:
    """One line of a program's text and what it prints: `node` of `function`, and the region call in whose body it stands.

    `kind` is head, symbol, weight, blank, function, takes, gives, input, call, return, close (of a region), end (of a function),
    schedule or pipeline. `name` is that of the symbol, weight, function or schedule.
    """

    text: str
    kind: str
    name: str = ""
    node: fx.Node | None = None
    function: str = ""
    region: fx.Node | None = None


def print_program(program: Program) -> str:
    """The text of `program`. `gw.parse` reads it back to an equal program."""
    return "\n".join(line.text for line in program_lines(program)) + "\n"


def program_lines(program: Program) -> list[Line]:
    """The text of `program`, line by line."""
    lines = [Line(f"graphwright {VERSION}", "head")]
    lines += [Line(_symbol_line(symbol), "symbol", symbol.name) for symbol in program.used_symbols()]
    lines += [Line(_weight_line(weight, program.symbols), "weight", weight.name) for weight in program.weights.values()]
    for function in program.functions.values():
        lines += [Line("", "blank", function=function.name), *_FunctionPrinter(function, program.symbols).lines()]
    for name, data in sorted(program.schedules.items()):
        text = f"schedule {_quoted_name(name)} = {json.dumps(data, sort_keys=True)}"
        lines += [Line("", "blank", name), Line(text, "schedule", name)]
    if program.history:
        lines += [Line("", "blank"), *(Line(f"pipeline {json.dumps(stage.pipeline)}", "pipeline") for stage in program.history)]
    return lines


def node_lines(function: Function, symbols: SymbolTable) -> dict[fx.Node, str]:
    """Each top-level node of `function` with the line that prints it (a region's body is left out)."""
    lines = _FunctionPrinter(function, symbols).lines()
    return {line.node: line.text for line in lines if line.node is not None and line.region is None and line.kind != "close"}


def named_values(function: Function, symbols: SymbolTable) -> dict[str, fx.Node]:
    """The top-level values of `function` by the names that its text gives them: `%x`, `%12`."""
    printer = _FunctionPrinter(function, symbols)
    printer.lines()
    return {name: node for node, name in printer.names.items() if node.graph is function.graph and node.op != "get_attr"}


def _symbol_line(symbol: Any) -> str:
    high = "inf" if symbol.high >= UNBOUNDED else symbol.high
    return f"symbol {symbol.name} in [{symbol.low}, {high}] hint {symbol.hint}"


def _weight_line(weight: Weight, symbols: SymbolTable) -> str:
    type_ = tensor_type_text(weight.dtype, weight.shape, weight.stride, weight.device, symbols)
    return f'weight {weight_name(weight.name)} : {type_} {weight.kind} "{weight.digest[:12]}"'


def weight_name(name: str) -> str:
    return "@" + _quoted_name(name)


def _quoted_name(name: str) -> str:
    return name if PLAIN_NAME.fullmatch(name) else json.dumps(name)


def tree_text(tree: Tree) -> str:
    """`*` is a leaf; (..) tuple; [..] list; {"k": ..} dict; object "class" "context" (..)."""
    children = [tree_text(child) for child in tree.children]
    if tree.kind == "leaf":
        return "*"
    if tree.kind == "list":
        return f"[{', '.join(children)}]"
    if tree.kind == "dict":
        return "{" + ", ".join(f"{json.dumps(key)}: {child}" for key, child in zip(tree.keys, children, strict=True)) + "}"
    body = f"({', '.join(children)})"
    return body if tree.kind == "tuple" else f"object {json.dumps(tree.type_name)} {json.dumps(tree.context)} {body}"


class _FunctionPrinter:
    """Prints one function; values are numbered in order across it and the regions inside."""

    def __init__(self, function: Function, symbols: SymbolTable):
        self.function = function
        self.symbols = symbols
        self.names: dict[fx.Node, str] = {}
        self.counter = 0

    def lines(self) -> list[Line]:
        function = self.function
        body: list[Line] = []
        for node in function.graph.nodes:
            if node.op == "placeholder":
                self.names[node] = self._argument_name(node)
                body.append(self._line(f"  {node.meta.get('role', 'input')} {self._argument(node)}", "input", node))
            elif node.op == "get_attr":
                self.names[node] = weight_name(node.target)
            elif node.op == "call_function":
                body += self._call(node, "  ", None)
            else:
                body.append(self._line(self._return(node), "return", node))
        takes = self._line(f"  takes {tree_text(function.in_tree)}", "takes")
        gives = self._line(f"  gives {tree_text(function.out_tree)}", "gives")
        return [self._line(f"function {function.name} {{", "function"), takes, gives, *body, self._line("}", "end")]

    def _line(self, text: str, kind: str, node: fx.Node | None = None, region: fx.Node | None = None) -> Line:
        return Line(text, kind, self.function.name if node is None else "", node, self.function.name, region)

    def _argument_name(self, node: fx.Node) -> str:
        return "%" + _quoted_name(str(node.target))

    def _argument(self, node: fx.Node) -> str:
        value = node.meta["val"]
        if isinstance(value, torch.Tensor | torch.SymInt):
            return f"{self.names[node]} : {type_text(value, self.symbols)}"
        return f"{self.names[node]} = {literal(value)}"

    def _fresh(self, node: fx.Node) -> str:
        self.names[node] = f"%{self.counter}"
        self.counter += 1
        return self.names[node]

    def _call(self, node: fx.Node, indent: str, inside: fx.Node | None) -> list[Line]:
        region = region_of(node)
        if region is None:
            arguments = ", ".join([*map(self.literal, node.args), *(f"{k}={self.literal(v)}" for k, v in node.kwargs.items())])
            text = f"{name_of(node.target)}({arguments}) : {type_text(node.meta['val'], self.symbols)}{_comment(node)}"
            return [self._line(f"{indent}{self._fresh(node)} = {text}", "call", node, inside)]
        _, in_dims, out_dims, count, *operands = node.args
        attributes = f"in_dims={self.literal(in_dims)} out_dims={self.literal(out_dims)} count={self.literal(count)}"
        for name in ("units", "orders"):
            if node.kwargs.get(name) is not None:
                attributes += f" {name}={self.literal(node.kwargs[name])}"
        body = self._region(node, region, indent + "  ")
        type_ = type_text(node.meta["val"], self.symbols)
        head = f"gw.sliced({', '.join(map(self.literal, operands))}) {attributes} : {type_} {{{_comment(node)}"
        first = self._line(f"{indent}{self._fresh(node)} = {head}", "call", node, inside)
        return [first, *body, self._line(f"{indent}}}", "close", node, inside)]

    def _region(self, call: fx.Node, region: Region, indent: str) -> list[Line]:
        lines: list[Line] = []
        for node in region.graph.nodes:
            if node.op == "placeholder":
                self._fresh(node)
                text = f"{indent}input {self.names[node]} : {type_text(node.meta['val'], self.symbols)}"
                lines.append(self._line(text, "input", node, call))
            elif node.op == "call_function":
                lines += self._call(node, indent, call)
            else:
                lines.append(self._line(f"{indent}return {', '.join(map(self.literal, node.args[0]))}", "return", node, call))
        return lines

    def _return(self, node: fx.Node) -> str:
        new_states = node.meta.get("new_states", ())
        leaves = [self.literal(leaf) for leaf in node.args[0]]
        split = len(leaves) - len(new_states)
        states = [f"{_quoted_name(name)} = {leaf}" for name, leaf in zip(new_states, leaves[split:], strict=True)]
        text = f"  return {', '.join(leaves[:split])}".rstrip()
        return f"{text} state {', '.join(states)}" if states else text

    def literal(self, value: Any) -> str:
        if isinstance(value, fx.Node):
            return self.names[value]
        if isinstance(value, tuple | list):
            return "[" + ", ".join(map(self.literal, value)) + "]"
        return literal(value)


def literal(value: Any) -> str:
    """A constant argument of any kind that ATen uses."""
    if value is None or isinstance(value, bool):
        return {None: "none", True: "true", False: "false"}[value]
    if isinstance(value, int):
        return str(value)
    if isinstance(value, float):
        return repr(value) if math.isfinite(value) else {"inf": "inf", "-inf": "-inf", "nan": "nan"}[repr(value)]
    if isinstance(value, complex):
        return f"complex({literal(value.real)}, {literal(value.imag)})"
    if isinstance(value, str):
        return json.dumps(value)
    if isinstance(value, torch.dtype):
        return DTYPE_NAMES[value]
    if isinstance(value, torch.device):
        return f'device("{value}")'
    if isinstance(value, torch.layout):
        return f'layout("{str(value).removeprefix("torch.")}")'
    if isinstance(value, torch.memory_format):
        return f'memory_format("{str(value).removeprefix("torch.")}")'
    if isinstance(value, tuple | list):
        return "[" + ", ".join(map(literal, value)) + "]"
    raise TypeError(f"no literal is written for a {type(value).__name__}")


def comment(text: str) -> str:
    """`text` made safe to follow a `#`: printable ASCII on one line."""
    return "".join(c if " " <= c <= "~" else "?" for c in text)


def _comment(node: fx.Node) -> str:
    origin = node.meta.get("origin", ())
    where = node.meta.get("where")
    parts = []
    if origin:
        parts.append(f"[{','.join(map(str, origin))}]")
    if where is not None and str(where):
        parts.append(comment(str(where)))
    return "  # " + " ".join(parts) if parts else ""
