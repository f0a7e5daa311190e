"""Products of a few rows by the kernel that reads weights where they lie, each where the probe finds that it wins."""

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import fx

from ..codegen import cpu_packed
from ..codegen.cpu_groups import product_of
from ..codegen.cpu_kernels import linear
from ..codegen.cpu_packed import Pack, PackedLinear
from ..codegen.few_rows.library import library
from ..codegen.few_rows.linear import MOST_ROWS, FewRowsLinear, is_fit
from ..ir import Node
from .cache import Cache
from .cache_key import native_environment
from .code_cache import Shelf
from .probe import Probe
from .tuned_segments import random_like

Bound = Callable[[Node], torch.Tensor]  # gives the values of a weight


class FewRows:
    """Asks `probe` for each product with one of the weights that are `bound`. Compiled kernels may come from `cache`."""

    def __init__(self, probe: Probe, bound: Bound, cache: Cache | None):
        self._probe, self._bound, self._cache = probe, bound, cache
        self._call = FewRowsLinear()

    def chosen(self, graph: fx.Graph) -> set[Node]:
        """The products of `graph` that the kernel is to run."""
        found = {node for node in graph.nodes if node.op == "call_function" and is_few_rows(node)}
        if not found or library(None if self._cache is None else Shelf(self._cache, "native", native_environment(library.source))) is None:
            return set()
        with torch.no_grad(), torch._C._DisableAutocast():
            return {node for node in found if self._wins(node)}

    def put(self, graph: fx.Graph, source: Mapping[Node, Node], chosen: set[Node]) -> None:
        """Makes calls of the kernel of those in `graph` that come from `chosen`."""
        for node in graph.nodes:
            if source.get(node) in chosen:
                node.target = self._call

    def _wins(self, node: Node) -> bool:
        x, weight, bias = [None if each is None else self._value(each) for each in (*node.args, None)[:3]]
        if x is None or weight is None or not is_fit(x, weight, bias):
            return False
        rows = x.numel() // x.size(-1)
        ways: dict[str, Callable[[], object]] = {"aten": lambda: linear(x, weight, bias)}
        question = f"{x.dtype} {tuple(x.shape)} {x.stride()} {tuple(weight.shape)} {weight.stride()} {bias is not None}"
        verdict = self._probe.known("few rows", question)
        if verdict is not None:
            return verdict == "few rows"
        if x.dtype == torch.float32 and cpu_packed.is_available():
            packed = PackedLinear(rows, transposed=False)
            packed.pack = Pack(weight, packed.lay_out)
            ways["onednn"] = lambda: packed(x, weight, bias)
        ways["few rows"] = lambda: self._call(x, weight, bias)
        return self._probe.fastest("few rows", question, ways) == "few rows"

    def _value(self, operand: Any) -> torch.Tensor:
        return self._bound(operand) if operand.op == "get_attr" else random_like(operand.meta["val"])


def is_few_rows(node: Node) -> bool:
    """Whether a call is a product of a known number of rows, 2 to 8, with a constant weight [N, K]."""
    found = product_of(node)
    if found is None or found[3]:
        return False
    x, weight, bias, _ = found
    shape = x.meta["val"].shape
    if not (isinstance(weight, Node) and weight.op == "get_attr" and all(isinstance(n, int) for n in shape)):
        return False
    return 1 < math.prod(shape[:-1]) <= MOST_ROWS and (bias is None or (isinstance(bias, Node) and bias.op == "get_attr"))
