"""Which storages are live at each operation, and so the peak of memory that a program needs for its activations.

The unit of account is the storage: views, `getitem` and casts to the same type share their source's, which the fake storages of
the metadata show. A storage lives from the operation that makes it to the last use of any of its views, where the runtime frees
it; outputs live to the end. Weights and inputs are reported apart. For each operation i

    live(i) = bytes of storages with born <= i <= dies + workspace(i)
    workspace(region) = max over its body of the storages live there, which exist once for all slices

Source: "Fast and Memory-Efficient Video Diffusion Using Streamlined Inference" (arXiv 2411.01171); AutoChunk (arXiv 2401.10652).
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import fx

from .appends import plan_appends
from .calls import name_of
from .donation import plan_donations
from .infer import storage_key, tensors_of
from .program import Function, Node, region_of
from .region_call import RegionCall
from .symbols import hint
from .workspace import NOMINAL_THREADS, workspace


@dataclass(eq=False)
class Storage:
    """One allocation: made at position `born` by `maker`, last used at position `dies` (positions count the calls)."""

    maker: Node
    nbytes: int
    born: int
    dies: int
    values: list[Node]


@dataclass
class MemoryProfile:
    """`live[i]` is the bytes live while call i runs; `nodes[i]` is that call."""

    nodes: list[Node]
    storages: list[Storage]
    live: np.ndarray
    workspaces: np.ndarray
    storage_of: dict[int, Storage]
    input_bytes: int
    weight_bytes: int

    @property
    def peak_bytes(self) -> int:
        """The most bytes of intermediates and outputs live at one call."""
        return int(self.live.max()) if len(self.live) else 0

    @property
    def peak_at(self) -> int:
        """The position of the first call at the peak."""
        return int(self.live.argmax()) if len(self.live) else 0

    def live_at(self, position: int) -> list[Storage]:
        """The storages live while call `position` runs, largest first."""
        found = [s for s in self.storages if s.born <= position <= s.dies]
        return sorted(found, key=lambda s: (-s.nbytes, s.born))

    def storages_of(self, value: Any) -> list[Storage]:
        """The counted storages behind a metadata value; none for weights and inputs."""
        return [self.storage_of[key] for key in storage_keys(value) if key in self.storage_of]


def profile(function: Function, threads: int = NOMINAL_THREADS) -> MemoryProfile:
    """The memory profile of a function, at the hints of its symbols; region outputs take donated storages as the runtime does."""
    return profile_graph(function.graph, threads)


def profile_graph(
    graph: fx.Graph,
    threads: int = NOMINAL_THREADS,
    donors: Mapping[Node, Mapping[int, Node]] | None = None,
    workspace_of: Callable[[Node], int] | None = None,
) -> MemoryProfile:
    """The memory profile of a graph or region body. A graph of other calls than the dialect's comes with its `donors`, call ->
    {output index: the operand whose storage it takes}, and what `workspace_of` says of each call."""
    if donors is None:
        donations = plan_donations(graph)
        donors = {node: {j: RegionCall.of(node).operands[i] for j, i in taken.items()} for node, taken in donations.items()}
        donors |= plan_appends(graph)
    nodes = [node for node in graph.nodes if node.op == "call_function"]
    position = {node: i for i, node in enumerate(nodes)}
    outside: set[int] = set()
    input_bytes = weight_bytes = 0
    for node in graph.nodes:
        if node.op in ("placeholder", "get_attr"):
            for key in storage_keys(node.meta["val"]):
                if key not in outside:
                    outside.add(key)
                    size = storage_bytes(node.meta["val"])
                    input_bytes += size if node.op == "placeholder" else 0
                    weight_bytes += size if node.op == "get_attr" else 0
    storages: list[Storage] = []
    by_key: dict[int, Storage] = {}
    for i, node in enumerate(nodes):
        taken = donors.get(node, {})
        for index, value in enumerate(tensors_of(node.meta["val"])):
            key = storage_key(value)
            if key in outside:
                continue
            if index in taken and storage_key(taken[index].meta["val"]) in outside:
                outside.add(key)
                continue
            if key not in by_key and index in taken:
                by_key[key] = by_key[storage_key(taken[index].meta["val"])]
            if key not in by_key:
                by_key[key] = Storage(node, storage_bytes(value), i, i, [])
                storages.append(by_key[key])
            storage = by_key[key]
            storage.values.append(node)
            last = max((position.get(user, len(nodes)) for user in node.users), default=i)
            storage.dies = max(storage.dies, last, i)
    workspaces = np.array([workspace_of(node) if workspace_of else node_workspace(node, threads) for node in nodes], dtype=np.int64)
    live = live_bytes(storages, len(nodes)) + workspaces
    return MemoryProfile(nodes, storages, live, workspaces, by_key, input_bytes, weight_bytes)


def live_bytes(storages: Sequence[Storage], length: int) -> np.ndarray:
    """Bytes of storages live at each of `length` positions."""
    delta = np.zeros(length + 2, dtype=np.int64)
    for storage in storages:
        delta[storage.born] += storage.nbytes
        delta[min(storage.dies, length) + 1] -= storage.nbytes
    return np.cumsum(delta)[:length]


def node_workspace(node: Node, threads: int = NOMINAL_THREADS) -> int:
    """Bytes that a call needs beside operands and results; for a region, the peak inside its body."""
    body = region_of(node)
    return profile_graph(body.graph, threads).peak_bytes if body is not None else workspace(node, threads).total


def storage_keys(value: Any) -> list[int]:
    return [storage_key(tensor) for tensor in tensors_of(value)]


def storage_bytes(value: Any) -> int:
    """Bytes of the storage behind a metadata value, symbols at their hints."""
    return sum(hint(tensor.untyped_storage().nbytes()) for tensor in tensors_of(value))


def last_uses(graph: fx.Graph) -> dict[Node, list[Node]]:
    """Call -> the values used last by it, a value that nothing uses by the call that makes it; what is returned never dies."""
    last: dict[Node, Node] = {}
    for node in graph.nodes:
        if node.op == "call_function":
            last[node] = node
        for operand in node.all_input_nodes:
            last[operand] = node
    dying: dict[Node, list[Node]] = {}
    for value, user in last.items():
        if user.op != "output":
            dying.setdefault(user, []).append(value)
    return dying


def describe(storage: Storage) -> str:
    """One line: bytes, type-less name of the maker and the user's line."""
    where = str(storage.maker.meta.get("where") or "")
    shape = tensors_of(storage.maker.meta["val"])[0].shape if tensors_of(storage.maker.meta["val"]) else ()
    return f"{name_of(storage.maker.target)} {[hint(n) for n in shape]} {format_bytes(storage.nbytes)} {where}".rstrip()


def format_bytes(count: int) -> str:
    """`1536` -> "1.50 KiB"."""
    value = float(count)
    for unit in ("B", "KiB", "MiB"):
        if abs(value) < 1024:
            return f"{count} B" if unit == "B" else f"{value:.2f} {unit}"
        value /= 1024
    return f"{value:.2f} GiB"
