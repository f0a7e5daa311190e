"""`str(program)`: one operation a line, results typed, weights by name and hash, symbols with ranges, user line as comment.

Equal programs print equal bytes. The grammar is in the parser's docstring.
"""

import json
import math
import re
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


def print_program(program: Program) -> str:
    """The text of `program`. `gw.parse` reads it back to an equal program."""
    lines = [f"graphwright {VERSION}"]
    lines += [_symbol_line(symbol) for symbol in program.symbols]
    lines += [_weight_line(weight, program.symbols) for weight in program.weights.values()]
    for function in program.functions.values():
        lines += ["", *_FunctionPrinter(function, program.symbols).lines()]
    lines += [f"\nschedule {_quoted_name(name)} = {json.dumps(data, sort_keys=True)}" for name, data in sorted(program.schedules.items())]
    if program.history:
        lines += ["", *(f"pipeline {json.dumps(stage.pipeline)}" for stage in program.history)]
    return "\n".join(lines) + "\n"


def node_lines(function: Function, symbols: SymbolTable) -> dict[fx.Node, str]:
    """Each top-level node of `function` with the line that prints it (a region's body is left out)."""
    printer = _FunctionPrinter(function, symbols)
    printer.lines()
    return printer.line_of


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
        self.line_of: dict[fx.Node, str] = {}
        self.counter = 0

    def lines(self) -> list[str]:
        function = self.function
        head = f"function {function.name}"
        body: list[str] = []
        for node in function.graph.nodes:
            if node.op == "placeholder":
                self.names[node] = self._argument_name(node)
                body.append(self._record(node, f"  {node.meta.get('role', 'input')} {self._argument(node)}"))
            elif node.op == "get_attr":
                self.names[node] = weight_name(node.target)
            elif node.op == "call_function":
                body += self._call(node, "  ")
            else:
                body.append(self._record(node, self._return(node)))
        trees = [f"  takes {tree_text(function.in_tree)}", f"  gives {tree_text(function.out_tree)}"]
        return [f"{head} {{", *trees, *body, "}"]

    def _record(self, node: fx.Node, line: str) -> str:
        self.line_of[node] = line
        return line

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

    def _call(self, node: fx.Node, indent: str) -> list[str]:
        region = region_of(node)
        if region is None:
            arguments = ", ".join([*map(self.literal, node.args), *(f"{k}={self.literal(v)}" for k, v in node.kwargs.items())])
            text = f"{name_of(node.target)}({arguments}) : {type_text(node.meta['val'], self.symbols)}{_comment(node)}"
            return [self._record(node, f"{indent}{self._fresh(node)} = {text}")]
        _, in_dims, out_dims, count, *operands = node.args
        attributes = f"in_dims={self.literal(in_dims)} out_dims={self.literal(out_dims)} count={self.literal(count)}"
        for name in ("units", "orders"):
            if node.kwargs.get(name) is not None:
                attributes += f" {name}={self.literal(node.kwargs[name])}"
        body = self._region(region, indent + "  ")
        type_ = type_text(node.meta["val"], self.symbols)
        head = f"gw.sliced({', '.join(map(self.literal, operands))}) {attributes} : {type_} {{{_comment(node)}"
        return [self._record(node, f"{indent}{self._fresh(node)} = {head}"), *body, f"{indent}}}"]

    def _region(self, region: Region, indent: str) -> list[str]:
        lines = []
        for node in region.graph.nodes:
            if node.op == "placeholder":
                self._fresh(node)
                lines.append(f"{indent}input {self.names[node]} : {type_text(node.meta['val'], self.symbols)}")
            elif node.op == "call_function":
                lines += self._call(node, indent)
            else:
                lines.append(f"{indent}return {', '.join(map(self.literal, node.args[0]))}")
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
