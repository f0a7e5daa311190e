"""Products of a few rows by the kernel that reads weights where they lie, each where the probe finds that it wins.

Against a loop of compiled code for one row, which has what surrounds it in the same code, so that only large weights are worth a call
of their own: float32, one row by the [32000, 768] of a vocabulary 3.1 ms, by the loop 6.4. Against ATen and oneDNN for more.
"""

import math
from collections.abc import Callable, Mapping, Sequence
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
from .code_cache import load_native
from .probe import Probe
from .segments import cut_out
from .tuned_segments import random_like

Bound = Callable[[Node], torch.Tensor]  # gives the values of a weight
Loop = Callable[[fx.Graph, Sequence[Any]], Callable[[list[Any]], Any]]  # compiles a graph for inputs of these types
LARGE = 2**24  # bytes of a weight that is worth a call for one row


class FewRows:
    """Asks `probe` for each product with one of the weights that are `bound`. Compiled kernels may come from `cache`; `loop` compiles a
    product of one row, None where nothing does."""

    def __init__(self, probe: Probe, bound: Bound, cache: Cache | None, loop: Loop | None):
        self._probe, self._bound, self._cache, self._loop = probe, bound, cache, loop
        self._call = FewRowsLinear()

    def chosen(self, graph: fx.Graph) -> set[Node]:
        """The products of `graph` that the kernel is to run."""
        found = {node for node in graph.nodes if node.op == "call_function" and is_few_rows(node)}
        if not found or load_native(library, self._cache) is None:
            return set()
        with torch.no_grad(), torch._C._DisableAutocast():
            return {node for node in found if self._wins(node)}

    def put(self, graph: fx.Graph, source: Mapping[Node, Node], chosen: set[Node]) -> None:
        """Makes calls of the kernel of those in `graph` that come from `chosen`."""
        for node in graph.nodes:
            if source.get(node) in chosen:
                node.target = self._call

    def _wins(self, node: Node) -> bool:
        operands = [operand for operand in node.args if isinstance(operand, Node)]
        values = [self._value(operand) for operand in operands]
        x, weight, bias = [*values, None][:3]
        assert x is not None and weight is not None
        is_row = x.numel() == x.size(-1)
        if weight.numel() == 0 or not is_fit(x, weight, bias) or (is_row and (weight.nbytes < LARGE or self._loop is None)):
            return False
        question = f"{x.dtype} {tuple(x.shape)} {x.stride()} {tuple(weight.shape)} {weight.stride()} {bias is not None}"
        verdict = self._probe.known("few rows", question)
        if verdict is None:
            ways = {"loop": self._compiled(node, operands, values)} if is_row else _library_calls(x, weight, bias)
            verdict = self._probe.fastest("few rows", question, ways | {"few rows": lambda: self._call(x, weight, bias)})
        return verdict == "few rows"

    def _compiled(self, node: Node, operands: Sequence[Node], values: Sequence[torch.Tensor]) -> Callable[[], object]:
        assert self._loop is not None
        try:
            run = self._loop(cut_out([node], operands, [node]), [operand.meta["val"] for operand in operands])
        except Exception:  # a compiler that fails on it is not asked for more: then ATen's is what else there is
            return lambda: linear(*values)
        return lambda: run(list(values))

    def _value(self, operand: Any) -> torch.Tensor:
        return self._bound(operand) if operand.op == "get_attr" else random_like(operand.meta["val"])


def _library_calls(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> dict[str, Callable[[], object]]:
    ways: dict[str, Callable[[], object]] = {"aten": lambda: linear(x, weight, bias)}
    if x.dtype == torch.float32 and cpu_packed.is_available():
        packed = PackedLinear(x.numel() // x.size(-1), transposed=False)
        packed.pack = Pack(weight, packed.lay_out)
        ways["onednn"] = lambda: packed(x, weight, bias)
    return ways


def is_few_rows(node: Node) -> bool:
    """Whether a call is a product of a known number of rows, 1 to 8, with a constant weight [N, K]."""
    found = product_of(node)
    if found is None or found[3]:
        return False
    x, weight, bias, _ = found
    shape = x.meta["val"].shape
    if not (isinstance(weight, Node) and weight.op == "get_attr" and all(isinstance(n, int) for n in shape)):
        return False
    return 1 <= math.prod(shape[:-1]) <= MOST_ROWS and (bias is None or (isinstance(bias, Node) and bias.op == "get_attr"))
