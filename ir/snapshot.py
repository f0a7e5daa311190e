"""A program of static sizes as plain data, with its types, which are taken as they are written: nothing is inferred.

The text form infers every type again, which takes most of the time of reading it (1.3 s of 1.4 for 2,200 nodes). A snapshot is for data
that this very version wrote, unchanged since: it is the key and the value of what is kept between processes. It tells more than text
does: strides of dims of size 1, and which values share a storage.

    program   = {"wheres": [[file, line, module]], "functions": [{"name", "takes", "gives", "nodes"}], "schedules", "pipeline": [text]}
    node      = ["placeholder", name, role, value] | ["get_attr", name, value] | ["output", argument, [new state]]
              | ["call_function", name, argument, {name: argument}, value, [origin], where]
    argument  = plain value | ["%", node] | ["[", argument..] | ["(", argument..] | ["region", node..] | ["torch", name] | ...
    value     = argument | ["tensor", dtype, shape, stride, device, storage, offset, bytes of the storage]
"""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensor

from .calls import name_of, target_of
from .infer import storage_key
from .program import Function, Program, Stage, Weight, Where
from .region import Region
from .symbols import SymbolTable
from .tree import Tree

Data = dict[str, Any]


class NoSnapshot(Exception):
    """The program has what plain data of fixed sizes cannot hold (symbols, lazy conjugates, storages seen as two dtypes), or is broken."""


def take(program: Program) -> Data:
    """The snapshot of `program`, equal for programs that are equal in every respect but the values of weights.

    Raises:
        NoSnapshot: it has none.
    """
    if len(program.symbols):
        raise NoSnapshot("it has symbols")
    writer = _Writer()
    try:
        functions = [
            {"name": f.name, "takes": _tree_data(f.in_tree), "gives": _tree_data(f.out_tree), "nodes": writer.graph(f.graph)}
            for f in program.functions.values()
        ]
    except (KeyError, TypeError) as error:
        raise NoSnapshot("it is no program that the verifier accepts") from error
    wheres = [[where.file, where.line, where.module] for where in writer.wheres]
    pipeline = [stage.pipeline for stage in program.history]
    return {"wheres": wheres, "functions": functions, "schedules": program.schedules, "pipeline": pipeline}


def rebuild(data: Data, weights: Mapping[str, Weight], symbols: SymbolTable) -> Program:
    """The program of a snapshot over `weights`; its types live in the mode of `symbols`."""
    reader = _Reader([Where(*each) for each in data["wheres"]], symbols)
    functions = [
        Function(each["name"], reader.graph(each["nodes"]), _tree(each["takes"]), _tree(each["gives"])) for each in data["functions"]
    ]
    return Program(functions, dict(weights), symbols, data["schedules"], tuple(map(Stage, data["pipeline"])))


def _tree_data(tree: Tree) -> list[Any]:
    return [tree.kind, list(map(_tree_data, tree.children)), list(tree.keys), tree.type_name, tree.context]


def _tree(data: list[Any]) -> Tree:
    kind, children, keys, type_name, context = data
    return Tree(kind, tuple(map(_tree, children)), tuple(keys), type_name, context)


class _Writer:
    """Storages and places are numbered as they appear, over all functions."""

    def __init__(self) -> None:
        self.wheres: dict[Where, int] = {}
        self.storages: dict[int, tuple[int, torch.dtype]] = {}

    def graph(self, graph: fx.Graph) -> list[Any]:
        index: dict[fx.Node, int] = {}
        nodes = []
        for node in graph.nodes:
            nodes.append(self._node(node, index))
            index[node] = len(index)
        return nodes

    def _node(self, node: fx.Node, index: Mapping[fx.Node, int]) -> list[Any]:
        if node.op == "placeholder":
            return [node.op, str(node.target), node.meta.get("role", "input"), self.argument(node.meta["val"], index)]
        if node.op == "get_attr":
            return [node.op, str(node.target), self.argument(node.meta["val"], index)]
        if node.op == "output":
            return [node.op, self.argument(node.args[0], index), list(node.meta.get("new_states", ()))]
        args, kwargs = self.argument(list(node.args), index), {key: self.argument(value, index) for key, value in node.kwargs.items()}
        where = self.wheres.setdefault(node.meta.get("where") or Where(), len(self.wheres))
        value = self.argument(node.meta["val"], index)
        return [node.op, name_of(node.target), args, kwargs, value, list(node.meta.get("origin", ())), where]

    def argument(self, value: Any, index: Mapping[fx.Node, int]) -> Any:
        if value is None or isinstance(value, bool | int | str):
            return value
        if isinstance(value, fx.Node):
            return ["%", index[value]]
        if isinstance(value, list | tuple):
            return ["[" if isinstance(value, list) else "(", *(self.argument(item, index) for item in value)]
        if isinstance(value, float):
            return value if math.isfinite(value) else ["float", repr(value)]
        if isinstance(value, complex):
            return ["complex", self.argument(value.real, index), self.argument(value.imag, index)]
        if isinstance(value, torch.Tensor):
            return self._tensor(value)
        if isinstance(value, torch.dtype | torch.layout | torch.memory_format):
            return ["torch", str(value).removeprefix("torch.")]
        if isinstance(value, torch.device):
            return ["device", str(value)]
        if isinstance(value, Region):
            return ["region", *self.graph(value.graph)]
        raise NoSnapshot(f"it has a {type(value).__name__}")

    def _tensor(self, value: torch.Tensor) -> list[Any]:
        shape, stride, offset = list(value.shape), list(value.stride()), value.storage_offset()
        storage, dtype = self.storages.setdefault(storage_key(value), (len(self.storages), value.dtype))
        if not all(type(n) is int for n in (*shape, *stride, offset)):
            raise NoSnapshot("it has a size that only the data tell")
        if value.is_conj() or value.is_neg() or dtype != value.dtype:
            raise NoSnapshot("it sees elements in another way than they are stored")
        name = str(value.dtype).removeprefix("torch.")
        return ["tensor", name, shape, stride, str(value.device), storage, offset, value.untyped_storage().nbytes()]


class _Reader:
    def __init__(self, wheres: list[Where], symbols: SymbolTable):
        self.wheres, self.mode = wheres, symbols.mode
        self.owners: dict[int, torch.Tensor] = {}

    def graph(self, data: list[Any]) -> fx.Graph:
        graph = fx.Graph()
        nodes: list[fx.Node] = []
        for each in data:
            nodes.append(self._node(graph, each, nodes))
        return graph

    def _node(self, graph: fx.Graph, data: list[Any], nodes: list[fx.Node]) -> fx.Node:
        op = data[0]
        if op == "placeholder":
            node = graph.placeholder(data[1])
            node.meta.update(val=self.argument(data[3], nodes), role=data[2])
        elif op == "get_attr":
            node = graph.create_node("get_attr", data[1])
            node.meta["val"] = self.argument(data[2], nodes)
        elif op == "output":
            node = graph.output(self.argument(data[1], nodes))
            node.meta["new_states"] = tuple(data[2])
        else:
            _, name, args, kwargs, value, origin, where = data
            keywords = {key: self.argument(each, nodes) for key, each in kwargs.items()}
            node = graph.call_function(target_of(name), tuple(self.argument(args, nodes)), keywords)
            node.meta.update(val=self.argument(value, nodes), origin=tuple(origin), where=self.wheres[where])
        return node

    def argument(self, data: Any, nodes: list[fx.Node]) -> Any:
        if not isinstance(data, list):
            return data
        kind = data[0]
        if kind == "%":
            return nodes[data[1]]
        if kind == "tensor":
            return self._tensor(*data[1:])
        if kind in ("[", "("):
            items = [self.argument(item, nodes) for item in data[1:]]
            return items if kind == "[" else tuple(items)
        if kind == "torch":
            return getattr(torch, data[1])
        if kind == "region":
            return Region(self.graph(data[1:]))
        if kind == "complex":
            return complex(*(self.argument(part, nodes) for part in data[1:]))
        return float(data[1]) if kind == "float" else torch.device(data[1])

    def _tensor(self, dtype: str, shape: list[int], stride: list[int], device: str, storage: int, offset: int, nbytes: int) -> torch.Tensor:
        """The type; the first of a storage makes it, which `nbytes` is to have (a snapshot of the result tells whether it does)."""
        if storage in self.owners:
            meta = torch.as_strided(self.owners[storage], shape, stride, offset)
        else:
            meta = self.owners[storage] = torch.empty_strided(shape, stride, dtype=getattr(torch, dtype), device="meta")
        # What the mode does with the result of every call, without the call: 20 us instead of 140.
        return FakeTensor(self.mode, meta, torch.device(device))
