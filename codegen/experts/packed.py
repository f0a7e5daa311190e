"""`gw.token_choice_moe` and `gw.expert_mlp` by oneDNN on copies of their experts' weights in oneDNN's own layout, one an expert.

`torch.ops.mkldnn` is private: what Inductor calls when it freezes weights. `cpu_packed` says whether what is used of it is there.
"""

from typing import Any

import torch
from torch import Tensor

from ...ir import Node
from ...ir.pattern import named_arguments
from ...ir.symbols import hint
from ...ir.workspace.experts import experts_at_once
from .. import cpu_packed
from ..cpu_packed import PackedCall, hinted_bytes
from .expert_choice import BatchedProduct, in_turns
from .token_choice import Product, Runs, by_expert, by_matrices, check_range, every_expert


class PackedExperts(PackedCall):
    """`call(x, index, weight, gate_up, down)` is the operation; `rows` are those of an expert that the copies are made for, and they serve
    any number. The two copies are in `both`. `options` are the operation's attributes."""

    kind = "experts"
    both: tuple[cpu_packed.Pack, ...]

    def __init__(self, index: Tensor, down: Tensor, **options: Any):
        self.experts, self.width, self.inner = down.shape
        self.rows = max(_count(index) // self.experts, 1)
        self.last, self.options = hint(index.size(-1)), options  # experts of a token, or positions of an expert

    @property
    def packs(self) -> tuple[cpu_packed.Pack, ...]:
        return self.both

    def layout(self) -> tuple[Any, ...]:
        return ("experts",)

    def lay_out(self, weight: Tensor) -> Any:
        return [torch.ops.mkldnn._reorder_linear_weight(matrix.contiguous(), self.rows) for matrix in weight.unbind(0)]

    def example_index(self, x: Tensor) -> Tensor:
        """A choice at random, for an operand like x."""
        raise NotImplementedError

    def others(self) -> "dict[str, PackedExperts]":
        """Other ways to the same on copies of the weights, or on none, by name; they share `both`."""
        return {}

    def __str__(self) -> str:
        return "oneDNN's linear for each expert"


class PackedTokenChoice(PackedExperts):
    """`gw.token_choice_moe`: rows are sorted by expert."""

    def __call__(self, x: Tensor, index: Tensor, weight: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:  # type: ignore[override]
        if index.numel() == 0:
            return torch.empty_like(x)  # of no tokens
        check_range(index, gate_up.size(0))
        up_pack, down_pack = self.both
        up, back = _product(up_pack(gate_up)), _product(down_pack(down))
        return by_expert(x, index, weight, up, back, self.options["activation"], self.options["combine_dtype"])

    def example_index(self, x: Tensor) -> Tensor:
        return _drawn((hint(x.size(0)), self.experts), self.last)

    def others(self) -> "dict[str, PackedExperts]":
        """Each expert on every token, where tokens choose half of them or more: sorting costs what fewer products save."""
        if self.experts > 2 * self.last or type(self) is not PackedTokenChoice:
            return {}
        ways: dict[str, PackedExperts] = {"dense": EveryExpert.like(self), "onednn dense": PackedEveryExpert.like(self)}
        return ways

    def scratch(self, x: Tensor, result: Tensor) -> int:
        """Rows sorted by expert, and at the first product its parts and all of them, or at the second what both made."""
        rows = hint(x.size(0)) * self.last
        return max(_row_bytes(self, rows, x) + 8 * rows - hinted_bytes(result), 0)


class PackedEveryExpert(PackedTokenChoice):
    """`gw.token_choice_moe` by each expert on every token."""

    @classmethod
    def like(cls, call: PackedTokenChoice) -> "PackedEveryExpert":
        made = cls.__new__(cls)
        made.__dict__.update(call.__dict__)
        return made

    def __call__(self, x: Tensor, index: Tensor, weight: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:  # type: ignore[override]
        if index.numel() == 0:
            return torch.empty_like(x)  # of no tokens
        check_range(index, gate_up.size(0))
        up, back = self._products(gate_up, down)
        return every_expert(x, index, weight, self.experts, up, back, self.options["activation"], self.options["combine_dtype"])

    def _products(self, gate_up: Tensor, down: Tensor) -> tuple[Product, Product]:
        up_pack, down_pack = self.both
        return _product(up_pack(gate_up)), _product(down_pack(down))

    def scratch(self, x: Tensor, result: Tensor) -> int:
        """That of one expert's rows, and the sums and weights of all."""
        rows = hint(x.size(0))
        return _row_bytes(self, rows, x) + rows * (4 * self.width + 5 * self.experts)

    def __str__(self) -> str:
        return "oneDNN's linear for each expert, on every token"


class EveryExpert(PackedEveryExpert):
    """The same by the weights as they are."""

    @property
    def packs(self) -> tuple[cpu_packed.Pack, ...]:
        return ()

    def _products(self, gate_up: Tensor, down: Tensor) -> tuple[Product, Product]:
        return by_matrices(gate_up), by_matrices(down)

    def __str__(self) -> str:
        return "each expert on every token"


class PackedExpertChoice(PackedExperts):
    """`gw.expert_mlp`: all experts have as many rows, and a few run at a time."""

    def __call__(self, x: Tensor, index: Tensor, gate: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:  # type: ignore[override]
        up_pack, down_pack = self.both
        if index.numel() == 0:
            return x.new_zeros(*x.shape[:2], self.width)
        up, back = _batched(up_pack(gate_up)), _batched(down_pack(down))
        return in_turns(x, index, gate, up, back, (self.width, self.inner), self.options["activation"])

    def example_index(self, x: Tensor) -> Tensor:
        return _drawn((hint(x.size(0)), self.experts, hint(x.size(1))), self.last)

    def scratch(self, x: Tensor, result: Tensor) -> int:
        """That of the experts that run at once, where each row stands and weighs, and the sums."""
        at_once = min(experts_at_once(self.rows, 2 * self.inner, x.element_size()), self.experts)
        sums = hinted_bytes(result) // x.element_size() * 4
        return _row_bytes(self, at_once * self.rows, x) + self.experts * self.rows * 13 + sums - hinted_bytes(result)


def packed_experts(node: Node) -> PackedExperts | None:
    """The packed form of a call; None where it has none here."""
    form = _FORMS.get(node.target)
    if form is None or not cpu_packed.is_available():
        return None
    named = named_arguments(node)
    values = [named[name].meta["val"] for name in ("x", "gate_up", "down")]
    dtype = values[0].dtype
    if any(value.device.type != "cpu" or value.dtype != dtype for value in values) or not _multiplies(dtype) or 0 in values[2].shape:
        return None
    return form(named["index"].meta["val"], values[2], **node.kwargs)


_FORMS: dict[Any, type[PackedExperts]] = {
    torch.ops.gw.token_choice_moe.default: PackedTokenChoice,
    torch.ops.gw.expert_mlp.default: PackedExpertChoice,
}


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


def _batched(matrices: Any) -> BatchedProduct:
    linear = torch.ops.mkldnn._linear_pointwise.default._op

    def product(rows: Tensor, some: slice) -> Tensor:
        parts = [linear(part, matrix, None, "none", [], "") for part, matrix in zip(rows.unbind(0), matrices[some], strict=True)]
        return torch.cat(parts).unflatten(0, rows.shape[:2])

    return product


def _row_bytes(call: PackedExperts, rows: int, x: Tensor) -> int:
    """Bytes of so many rows: gathered, and at the first product its parts and all of them, or at the second what both made."""
    return rows * max(call.width + 4 * call.inner, 3 * call.width + 3 * call.inner) * x.element_size()


def _drawn(shape: tuple[int, ...], count: int) -> Tensor:
    """For each row, `count` places of its last dim."""
    return torch.rand(shape, generator=torch.Generator().manual_seed(0)).argsort(-1)[..., :count].contiguous()


def _count(value: Tensor) -> int:
    return torch.Size([hint(n) for n in value.shape]).numel()
