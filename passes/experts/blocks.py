"""The blocks of a graph where tokens choose experts: two products by expert with a gate between them, weighted and summed for each token.

    up = product(tokens by expert, gate_up);  down = product(act(up[.., :I]) * up[.., I:], down);  sum over k (or E) of down * weight

A block is matched from its second product, backwards to the tokens and the chosen experts, and forwards to the sum. Whatever router chose
will do. How rows are sorted, repeated and put back is not matched: the self-check of `regroup-experts` runs it.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from ...ir import Function, Node
from ...ir.calls import GETITEM, name_of
from ...ir.infer import same_size
from ...ir.pattern import NoMatch, named_arguments
from .gates import Gated, gated_of, is_gated
from .products import ExpertProduct, only_user, operation, product_of
from .region import Region, region_of

aten = torch.ops.aten

_VIEWS = (aten.view.default, aten.reshape.default, aten._unsafe_view.default, aten.unsqueeze.default)
_ON_THE_WAY = (*_VIEWS, aten.index.Tensor, aten.mul.Tensor, aten.clone.default)  # from a product to the sum
_SWAPPED = (aten.transpose.int, aten.t.default, aten.permute.default)
_CHOICES = (aten.topk.default, aten.sort.default, aten.sort.stable)


@dataclass(frozen=True)
class MoEBlock:
    """`result` [T, D] is gw.token_choice_moe of x [T, D], index [T, k] and weight [T, k], summed in `combine_dtype`."""

    result: Node
    x: Node
    index: Node
    weight: Node
    gated: Gated
    down: ExpertProduct
    combine_dtype: torch.dtype
    region: Region

    @property
    def form(self) -> str:
        return self.down.form

    @property
    def experts(self) -> int:
        return int(self.down.weight.meta["val"].size(0))


def find_blocks(function: Function) -> tuple[list[MoEBlock], list[NoMatch]]:
    """The blocks of a function, in order, and why other products by expert belong to none."""
    found = [(node, product_of(node)) for node in function.calls]
    products = {product.result: product for _, product in found if isinstance(product, ExpertProduct)}
    failures = [product for _, product in found if isinstance(product, NoMatch)] + _loops(function)
    blocks = []
    for product in products.values():
        if is_gated(product) or _takes_tokens(product):
            continue  # the first of two
        block = _block(product, products)
        if isinstance(block, NoMatch):
            failures.append(block)
        else:
            blocks.append(block)
    return blocks, failures


def _loops(function: Function) -> list[NoMatch]:
    """Experts that are layers of their own, in a list: each adds what it makes of its tokens to the results of those before."""
    failures = []
    for last in function.calls:
        if last.target is not aten.index_add.default or any(user.target is aten.index_add.default for user in last.users):
            continue
        count, node = 0, last
        while operation(node) is aten.index_add.default and _is_expert(node):
            count, node = count + 1, _first(node)
        if count > 1:
            advice = "stack their weights into [experts, 2 * inner, width] and [experts, width, inner], and multiply as transformers 5 does"
            failures.append(NoMatch(f"its {count} experts are layers of their own that a loop runs one by one: {advice}", last))
    return failures


def _is_expert(added: Node) -> bool:
    """Whether what is added to rows is the result of a layer, weighted."""
    value: Any = added.args[3]
    value = _first(value) if operation(value) is aten._to_copy.default else value
    return operation(value) is aten.mul.Tensor and any(operation(factor) is aten.linear.default for factor in value.args)


def _block(down: ExpertProduct, products: Mapping[Node, ExpertProduct]) -> MoEBlock | NoMatch:
    gated = gated_of(down, products)
    if isinstance(gated, NoMatch):
        return gated
    total = _sum_behind(down)
    if isinstance(total, NoMatch):
        return total
    x = _tokens(gated.product)
    chosen = _choice(down, total)
    if isinstance(chosen, NoMatch):
        return chosen
    index, weight = chosen
    result = _in_dtype_of(x, total.node)
    if isinstance(result, NoMatch):
        return result
    problem = _misfit(x, index, weight, result, gated, down)
    if problem is not None:
        return problem
    region = region_of(result, (x, index, weight, gated.product.weight, down.weight), inside=gated.product.result)
    if isinstance(region, NoMatch):
        return region
    return MoEBlock(result, x, index, weight, gated, down, total.dtype, region)


@dataclass(frozen=True)
class _Sum:
    """The sum of weighted results; `factor` is what they were multiplied with, `dtype` that of the product."""

    node: Node
    factor: Node
    dtype: torch.dtype


def _sum_behind(down: ExpertProduct) -> _Sum | NoMatch:
    node, factor, dtype = down.result, None, down.result.meta["val"].dtype
    while True:
        user = only_user(node)
        if user is None:
            return NoMatch(f"the results of its experts are read {len(node.users)} times, not weighted and summed alone", node)
        if user.target is aten.sum.dim_IntList:
            break
        if user.target in (aten.add.Tensor, aten.add_.Tensor):
            return NoMatch("its experts have a bias", user)
        if user.target not in _ON_THE_WAY or (user.target is aten.mul.Tensor and factor is not None):
            return NoMatch(f"the results of its experts go through {_shown(user)} before they are weighted and summed", user)
        if user.target is aten.mul.Tensor:
            factor, dtype = next(operand for operand in user.args if operand is not node), user.meta["val"].dtype
        node = user
    named, dim = named_arguments(user), 0 if down.form == "dense" else 1
    if named["dim"] is None or [each % 3 for each in named["dim"]] != [dim] or named["keepdim"] or node.meta["val"].dim() != 3:
        return NoMatch("its results are not summed over the experts of a token", user)
    if not isinstance(factor, Node):
        return NoMatch("the results of its experts are summed without weights", user)
    return _Sum(user, factor, dtype)


def _tokens(up: ExpertProduct) -> Node:
    """What a product's rows are copies of, in whatever order."""
    node = up.x
    if up.form == "dense":
        node = _first(node) if operation(node) is aten.expand.default else node
        return _first(node) if operation(node) is aten.unsqueeze.default and node.args[1] in (0, -3) else node
    return _first(node) if operation(node) in (aten.index.Tensor, aten.repeat_interleave.self_int) else node


def _takes_tokens(product: ExpertProduct) -> bool:
    """Whether a product's rows are tokens that were sorted, repeated or given to all."""
    return _tokens(product) is not product.x or (product.form == "dense" and product.x.meta["val"].dim() == 2)


def _choice(down: ExpertProduct, total: _Sum) -> tuple[Node, Node] | NoMatch:
    """The experts of each token, [T, k], and the weights that it gives them."""
    if down.form == "dense":
        return _scattered(total)
    index: Any = down.experts
    while isinstance(index, Node) and not (index.meta["val"].dim() == 2 and index.meta["val"].dtype == torch.int64):
        index = _source(index)
    if index is None:
        return NoMatch("which expert a row has is not read off an index [tokens, k]", down.experts)
    weight: Any = total.factor
    while operation(weight) in (*_VIEWS, aten.index.Tensor) and not _same_shape(weight, index):
        weight = _first(weight)
    return index, weight


def _scattered(total: _Sum) -> tuple[Node, Node] | NoMatch:
    """(index, weight) of weights [T, E] into which those of chosen experts were scattered."""
    weight: Any = total.factor
    while operation(weight) in (*_VIEWS, *_SWAPPED) or (
        operation(weight) is aten._to_copy.default and weight.meta["val"].dtype == total.dtype
    ):
        weight = _first(weight)
    if operation(weight) is not aten.scatter.src or weight.args[1] not in (1, -1):
        return NoMatch("the weights of its experts are not scattered from those that a token chose", weight)
    index, source = weight.args[2:4]
    if operation(index) is not GETITEM or operation(index.args[0]) not in _CHOICES:
        return NoMatch("the experts of a token are not chosen by topk, so one may be there twice, and would count once", index)
    return index, source


def _source(node: Node) -> Node | None:
    """The tensor that a call reads first; past what it takes out of a call with several results."""
    source = node.args[0] if node.op == "call_function" and node.args and isinstance(node.args[0], Node) else None
    return _source(source) if source is not None and not isinstance(source.meta["val"], torch.Tensor) else source


def _in_dtype_of(x: Node, total: Node) -> Node | NoMatch:
    """The sum, or what converts it to the dtype of x."""
    dtype = x.meta["val"].dtype
    if total.meta["val"].dtype == dtype:
        return total
    user = only_user(total)
    if user is None or user.target is not aten._to_copy.default or user.meta["val"].dtype != dtype:
        return NoMatch(f"the sum over experts is not converted to the dtype of tokens, {dtype}", total)
    return user


def _misfit(x: Node, index: Node, weight: Node, result: Node, gated: Gated, down: ExpertProduct) -> NoMatch | None:
    values = [node.meta["val"] for node in (gated.product.weight, down.weight)]
    (experts, inner, depth), (count, width, half) = (
        _oriented(v.shape, p.transposed) for v, p in zip(values, (gated.product, down), strict=True)
    )
    if experts != count or inner != 2 * half or depth != width:
        return NoMatch(
            f"the weights of its experts do not fit one another: {list(values[0].shape)} and {list(values[1].shape)}", down.result
        )
    if values[0].dtype != values[1].dtype or values[0].dtype != x.meta["val"].dtype:
        return NoMatch("tokens and weights of its experts have different dtypes", down.result)
    if not _same_shape(x, result) or result.meta["val"].dim() != 2:
        return NoMatch("its result is not a row for each token", result)
    if not _same_shape(index, weight) or not same_size(index.meta["val"].size(0), x.meta["val"].size(0)):
        return NoMatch("there is not one weight for each expert of each token", weight)
    return None


def _oriented(shape: torch.Size, transposed: bool) -> tuple[int, int, int]:
    return (shape[0], shape[2], shape[1]) if transposed else tuple(shape)  # type: ignore[return-value]


def _same_shape(a: Node, b: Node) -> bool:
    first, second = a.meta["val"].shape, b.meta["val"].shape
    return len(first) == len(second) and all(same_size(m, n) for m, n in zip(first, second, strict=True))


def _first(node: Node) -> Node:
    return node.args[0]  # type: ignore[return-value]


def _shown(node: Node) -> str:
    return name_of(node.target) if node.op == "call_function" else "what the function returns"  # type: ignore[arg-type]
