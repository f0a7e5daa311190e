"""Where the channels of a value come from: walks back from a layer's input to parameters whose rows can carry its factors.

Views, a split of a wider product, attention's values and the other factor of a product leave the channels of a value those of
what they show. Which channel is which is found by running the same views on channel numbers. Everything on the way must be read by
nothing else, since its reader would see scaled values.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from ...ir import Node
from ...ir.calls import GETITEM, draws
from ...ir.pattern import named_arguments
from ...ir.symbols import hint
from .layers import aten

_VIEWS = {
    aten.view.default,
    aten.reshape.default,
    aten._unsafe_view.default,
    aten.flatten.using_ints,
    aten.unflatten.int,
    aten.transpose.int,
    aten.permute.default,
    aten.unsqueeze.default,
    aten.squeeze.dim,
    aten.select.int,
    aten.slice.Tensor,
    aten.clone.default,
    aten.contiguous.default,
    aten.alias.default,
    aten.expand.default,
    aten.dropout.default,
    aten._to_copy.default,
    aten.to.dtype,
    aten.type_as.default,
}
_SAME_SHAPE = {
    aten.alias.default,
    aten.clone.default,
    aten.contiguous.default,
    aten.dropout.default,
    aten._to_copy.default,
    aten.to.dtype,
    aten.type_as.default,
}
_MATMULS = {aten.matmul.default, aten.bmm.default}
_SPLITS = {aten.split.Tensor, aten.split_with_sizes.default, aten.chunk.default, aten.unbind.int}
_ATTENTION = aten.scaled_dot_product_attention.default
_MAX_ELEMENTS = 2**24  # of channel numbers: a value larger than that is not traced


class Untraceable(Exception):
    """Why the channels of a value are not those of parameters, in words that end a sentence."""


@dataclass(frozen=True)
class Path:
    """From `base` to the value whose channels were asked for: the calls between, first to last."""

    base: Node
    steps: tuple[Node, ...]

    def channels(self) -> torch.Tensor:
        """For each channel of the last value, the channel of `base` (its last dim) that it is: i64[K].

        Raises:
            Untraceable: a row of the value mixes channels, rows differ in theirs, or another part of a split shows them too.
        """
        shape = _sizes(self.base)
        if torch.Size(shape).numel() > _MAX_ELEMENTS:
            raise Untraceable("the value before it is too large to trace its channels")
        numbers = torch.arange(shape[-1]).expand(shape).contiguous()
        values: dict[Node, Any] = {self.base: numbers}
        for step in self.steps:
            values[step] = _on_numbers(step, values)
        last = values[self.steps[-1]] if self.steps else numbers
        rows = last.reshape(-1, last.size(-1))
        if rows.size(0) == 0 or not torch.equal(rows, rows[:1].expand_as(rows)):
            raise Untraceable("its channels are not the same in all rows")
        for step in self.steps:
            if step.target in _SPLITS and any(torch.isin(part, rows[0]).any() for part in self._other_parts(step, values)):
                raise Untraceable("another part of what is before it shows its channels too")
        return rows[0].clone()

    def _other_parts(self, split: Node, values: dict[Node, Any]) -> list[torch.Tensor]:
        """The channel numbers of the parts of `split` that are read and do not lead to the value."""
        parts = {user.args[1] for user in split.users if user not in values}
        return [values[split][part] for part in parts]


def path_to(value: Node, readers: Sequence[Node], stops: Any, *, views_only: bool = False) -> Path:
    """The way back from `value` to the first node of which `stops(node)` is true; only `readers` may read `value`. With `views_only`
    nothing on it may multiply or sum.

    Raises:
        Untraceable: an operation on the way mixes channels, or something else reads what would be scaled.
    """
    steps: list[Node] = []
    allowed = set(readers)
    node = value
    while True:
        part = steps[-1] if steps and steps[-1].target is GETITEM else None  # the parts of a split are read apart
        if any(user not in allowed and not (part is not None and _is_another_part(user, part)) for user in node.users):
            raise Untraceable("something else reads what is before it")
        if stops(node):
            return Path(node, tuple(reversed(steps)))
        if views_only and node.target not in _VIEWS | _SPLITS | {GETITEM}:
            raise Untraceable(f"there is a {_named(node)} between it and a layer" if node.op == "call_function" else "its scale is given")
        steps.append(node)
        allowed = {node}
        node = _operand(node, stops)


def _is_another_part(user: Node, part: Node) -> bool:
    return user.target is GETITEM and user.args[1] != part.args[1]


def _operand(node: Node, stops: Any) -> Node:
    """The operand whose channels `node` shows."""
    if node.op != "call_function":
        raise Untraceable("its input comes from outside")
    if node.target in _VIEWS and not draws(node) and _keeps_dtype(node):
        return node.all_input_nodes[0]
    if node.target is GETITEM or node.target in _SPLITS:
        return node.all_input_nodes[0]
    if node.target is _ATTENTION and not draws(node):
        value: Node = named_arguments(node)["value"]
        if any(named_arguments(node)[name] is value for name in ("query", "key", "attn_mask")):
            raise Untraceable("attention reads its values as keys too")
        return value
    if node.target in _MATMULS and node.args[0] is not node.args[1]:
        weighted: Any = node.args[1]  # attention spelled out: rows are sums of rows of its values
        if weighted.op == "call_function":
            return weighted
    if node.target is aten.mul.Tensor and len(node.all_input_nodes) == 2:
        factor = next((operand for operand in _factors(node) if _leads_to(operand, stops)), None)
        if factor is not None:
            return factor
    raise Untraceable(f"the {_named(node)} before it takes no factors")


def _factors(node: Node) -> list[Node]:
    """The operands of a product that have its shape, so that its channels are theirs."""
    shape = tuple(node.meta["val"].shape)
    return [operand for operand in node.all_input_nodes if tuple(getattr(operand.meta["val"], "shape", ())) == shape]


def _leads_to(node: Node, stops: Any) -> bool:
    """Whether views alone lie between `node` and what `stops`."""
    while not stops(node):
        if node.op != "call_function" or not (node.target in _VIEWS or node.target in _SPLITS or node.target is GETITEM):
            return False
        node = node.all_input_nodes[0]
    return True


def _on_numbers(step: Node, values: dict[Node, Any]) -> Any:
    """What `step` makes of channel numbers."""
    if step.target is aten.mul.Tensor:
        return next(values[operand] for operand in step.all_input_nodes if operand in values)
    if step.target is _ATTENTION:
        return _attended(step, values[named_arguments(step)["value"]])
    if step.target in _SAME_SHAPE:
        return values[step.all_input_nodes[0]]
    if step.target in _MATMULS:
        return _weighted(step, values[step.args[1]])  # type: ignore[index]
    target: Any = aten.reshape.default if step.target in (aten.view.default, aten._unsafe_view.default) else step.target
    args, kwargs = fx.map_arg((step.args, step.kwargs), lambda operand: values[operand] if operand in values else hint(operand.meta["val"]))
    return target(*_plain(args), **_plain(kwargs))


def _weighted(node: Node, value: torch.Tensor) -> torch.Tensor:
    """Sums of rows show the channels of the rows."""
    if value.dim() < 2 or not torch.equal(value, value[..., :1, :].expand_as(value)):
        raise Untraceable("the rows that are summed before it differ in their channels")
    return value[..., :1, :].expand(_sizes(node))


def _attended(node: Node, value: torch.Tensor) -> torch.Tensor:
    """Rows of attention show the channels of its values' head: query head h those of head h // (H/Hk)."""
    if value.dim() < 3 or not torch.equal(value, value[..., :1, :].expand_as(value)):
        raise Untraceable("the rows of its attention's values differ in their channels")
    shape = _sizes(node)
    head = value[..., :1, :]
    if head.size(-3) != shape[-3]:
        head = head.repeat_interleave(shape[-3] // head.size(-3), -3)
    return head.expand(shape)


def _sizes(node: Node) -> list[int]:
    return [hint(size) for size in node.meta["val"].shape]


def _plain(value: Any) -> Any:
    if isinstance(value, tuple | list):
        return type(value)(_plain(item) for item in value)
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return value if isinstance(value, torch.Tensor) or value is None else hint(value) if isinstance(value, torch.SymInt) else value


def _keeps_dtype(node: Node) -> bool:
    return bool(node.meta["val"].dtype == node.all_input_nodes[0].meta["val"].dtype)


def _named(node: Node) -> str:
    return str(node.target).removeprefix("aten.").partition(".")[0]
