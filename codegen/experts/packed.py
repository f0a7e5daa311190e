"""`gw.token_choice_moe` by oneDNN on copies of its experts' weights in oneDNN's own layout, one an expert.

`torch.ops.mkldnn` is private: what Inductor calls when it freezes weights. `cpu_packed` says whether what is used of it is there.
"""

from typing import Any

import torch
from torch import Tensor

from ...ir import Node
from ...ir.pattern import named_arguments
from ...ir.symbols import hint
from .. import cpu_packed
from ..cpu_packed import PackedCall, hinted_bytes
from .token_choice import Product, Runs, by_expert, check_range


class PackedExperts(PackedCall):
    """`call(x, index, weight, gate_up, down)` is `gw.token_choice_moe`; `rows` are those of an expert that the copies are made for, and
    they serve any number. The two copies are in `both`."""

    kind = "experts"
    both: tuple[cpu_packed.Pack, ...]

    def __init__(self, rows: int, activation: str, combine_dtype: torch.dtype, k: int, inner: int):
        self.rows, self.activation, self.combine_dtype = rows, activation, combine_dtype
        self._k, self._inner = k, inner

    @property
    def packs(self) -> tuple[cpu_packed.Pack, ...]:
        return self.both

    def layout(self) -> tuple[Any, ...]:
        return ("experts",)

    def lay_out(self, weight: Tensor) -> Any:
        return [torch.ops.mkldnn._reorder_linear_weight(matrix.contiguous(), self.rows) for matrix in weight.unbind(0)]

    def __call__(self, x: Tensor, index: Tensor, weight: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:  # type: ignore[override]
        if index.numel() == 0:
            return torch.empty_like(x)  # of no tokens
        check_range(index, gate_up.size(0))
        up_pack, down_pack = self.both
        up, back = _product(up_pack(gate_up)), _product(down_pack(down))
        return by_expert(x, index, weight, up, back, self.activation, self.combine_dtype)

    def scratch(self, x: Tensor, result: Tensor) -> int:
        """Rows sorted by expert, and at the first product its parts and all of them, or at the second what both made."""
        depth = result.size(1)
        elements = max(depth + 4 * self._inner, 3 * depth + 3 * self._inner)
        return max(hint(x.size(0)) * self._k * (elements * x.element_size() + 8) - hinted_bytes(result), 0)

    def __str__(self) -> str:
        return "oneDNN's linear for each expert"


def packed_experts(node: Node) -> PackedExperts | None:
    """The packed form of a call; None where it has none here."""
    if node.target is not torch.ops.gw.token_choice_moe.default or not cpu_packed.is_available():
        return None
    named = named_arguments(node)
    values = [named[name].meta["val"] for name in ("x", "gate_up", "down")]
    dtype = values[0].dtype
    if any(value.device.type != "cpu" or value.dtype != dtype for value in values) or not _multiplies(dtype) or 0 in values[2].shape:
        return None
    tokens, k = (hint(n) for n in named["index"].meta["val"].shape)
    rows = max(tokens * k // values[1].size(0), 1)
    return PackedExperts(rows, named["activation"], named["combine_dtype"], k, values[2].size(2))


def _multiplies(dtype: torch.dtype) -> bool:
    """Whether oneDNN has products of a dtype here."""
    if dtype == torch.bfloat16:
        supported = getattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", None)
        return supported is not None and bool(supported())
    return dtype == torch.float32


def _product(matrices: Any) -> Product:
    linear = torch.ops.mkldnn._linear_pointwise.default._op

    def product(rows: Tensor, runs: Runs) -> Tensor:
        parts = rows.split([count for _, count in runs])
        return torch.cat([linear(part, matrices[expert], None, "none", [], "") for (expert, _), part in zip(runs, parts, strict=True)])

    return product
