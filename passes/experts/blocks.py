"""The blocks of a graph where tokens choose experts: two products by expert with a gate between them, weighted and summed for each token.

    up = product(tokens by expert, gate_up);  down = product(act(up[.., :I]) * up[.., I:], down);  sum over k (or E) of down * weight

A block is matched from its second product, backwards to the tokens and the chosen experts, and forwards to the sum. Whatever router chose
will do. How rows are sorted, repeated and put back is not matched: the self-check of `regroup-experts` runs it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ...ir import Function, Node
from ...ir.calls import GETITEM, name_of
from ...ir.infer import same_size
from ...ir.pattern import NoMatch, named_arguments
from .choices import CHOICES, chosen_behind, dispatched_tokens, dropped
from .gates import Gated, gated_of, is_gated
from .products import ExpertProduct, only_user, operation, product_of
from .region import Region, region_of

aten = torch.ops.aten

_VIEWS = (aten.view.default, aten.reshape.default, aten._unsafe_view.default, aten.unsqueeze.default, aten.squeeze.dim)
_ON_THE_WAY = (*_VIEWS, aten.index.Tensor, aten.mul.Tensor, aten.clone.default)  # from a product to the sum
_SWAPPED = (aten.transpose.int, aten.t.default, aten.permute.default)


@dataclass(frozen=True)
class MoEBlock:
    """`result` [T, D] is gw.token_choice_moe of x [T, D], index [T, k] and weight [T, k], summed in `combine_dtype`. Where tokens have one
    expert, index and weight may be [T] as well."""

    result: Node
    x: Node
    index: Node
    weight: Node
    gated: Gated
    down: ExpertProduct
    combine_dtype: torch.dtype
    region: Region

    @property
    def k(self) -> int:
        return _experts_of_a_token(self.index)

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
    x = _tokens(gated.product)
    if x is None:
        return NoMatch("what its experts read is not seen to be tokens [tokens, width] that were sent to them", gated.product.x)
    total = _sum_behind(down, x)
    if isinstance(total, NoMatch):
        return total
    result = _in_dtype_of(x, total.node)
    if isinstance(result, NoMatch):
        return result
    given = (x, gated.product.weight, down.weight)
    chosen = _choice(down, total, result, given, gated.product.result)
    if isinstance(chosen, NoMatch):
        return chosen
    index, weight = chosen
    problem = _misfit(x, index, weight, result, gated, down)
    if problem is not None:
        return problem
    region = region_of(result, (index, weight, *given), inside=gated.product.result)
    if isinstance(region, NoMatch):
        return region
    return MoEBlock(result, x, index, weight, gated, down, total.dtype, region)


@dataclass(frozen=True)
class _Sum:
    """The sum of weighted results; `factor` is what they were multiplied with, `dtype` that of the product. Where tokens have one expert,
    there need be no sum, and it is the last of the weighted results."""

    node: Node
    factor: Node
    dtype: torch.dtype


def _sum_behind(down: ExpertProduct, x: Node) -> _Sum | NoMatch:
    node, factor, dtype, row = down.result, None, down.result.meta["val"].dtype, None
    while True:
        user = only_user(node)
        if user is not None and user.target is aten.sum.dim_IntList:
            break
        if user is not None and user.target is aten.einsum.default and down.form == "einsum" and factor is None:
            return _Sum(user, next(operand for operand in user.args[1] if operand is not node), user.meta["val"].dtype)  # type: ignore
        is_weight = user is not None and user.target is aten.mul.Tensor and factor is None
        if user is None or not (is_weight or user.target in _ON_THE_WAY) or (user.target is aten.mul.Tensor and not is_weight):
            is_row = isinstance(factor, Node) and row is not None and down.form in ("batched", "grouped") and _same_shape(row, x)
            return _Sum(row, factor, dtype) if is_row else _stray(node, user, factor)  # type: ignore[arg-type]
        if is_weight:
            factor, dtype = next(operand for operand in user.args if operand is not node), user.meta["val"].dtype
        node = user
        row = node if factor is not None and node.meta["val"].dim() == 2 else row
    named, dims = named_arguments(user), {"dense": (0,), "einsum": (0, 1)}.get(down.form, (1,))
    if (
        named["dim"] is None
        or [each % 3 for each in named["dim"]] not in [[dim] for dim in dims]
        or named["keepdim"]
        or node.meta["val"].dim() != 3
    ):
        return NoMatch("its results are not summed over the experts of a token", user)
    if not isinstance(factor, Node):
        return NoMatch("the results of its experts are summed without weights", user)
    return _Sum(user, factor, dtype)


def _stray(node: Node, user: Node | None, factor: Any) -> NoMatch:
    """Why results of experts that `node` holds and `user` reads are not on the way to a weighted sum."""
    weighted = "before they are weighted and summed" if factor is None else "after they are weighted and before they are summed"
    if user is None:
        return NoMatch(f"the results of its experts are read {len(node.users)} times {weighted}", node)
    if user.op == "output":
        return NoMatch(f"the results of its experts are returned {weighted}", node)
    if user.target in (aten.add.Tensor, aten.add_.Tensor) and factor is None:
        return NoMatch("its experts have a bias", user)
    return NoMatch(f"the results of its experts go through {_shown(user)} {weighted}", user)


def _tokens(up: ExpertProduct) -> Node | None:
    """What a product's rows are copies of, in whatever order; None where that is not seen."""
    node = up.x
    if up.form == "einsum":
        return dispatched_tokens(node)
    if up.form == "dense":
        node = _first(node) if operation(node) is aten.expand.default else node
        return _first(node) if operation(node) is aten.unsqueeze.default and node.args[1] in (0, -3) else node
    return _first(node) if operation(node) in (aten.index.Tensor, aten.repeat_interleave.self_int) else node


def _takes_tokens(product: ExpertProduct) -> bool:
    """Whether a product's rows are tokens that were sorted, repeated or given to all."""
    tokens = _tokens(product)
    is_given_to_all = product.form in ("dense", "einsum") and product.x.meta["val"].dim() == 2
    return tokens is not None and (tokens is not product.x or is_given_to_all)


def _choice(down: ExpertProduct, total: _Sum, result: Node, given: Sequence[Node], inside: Node) -> tuple[Node, Node] | NoMatch:
    """The experts of each token, [T, k], and the weights that it gives them."""
    if down.form == "dense":
        scatter = _gates(total)
        if operation(scatter) is aten.scatter.src:
            return _scattered(scatter)
        spread = chosen_behind(total.factor, result, given, inside, None)
        reason = NoMatch("the weights of its experts are not scattered, nor spread by one_hot, from those that a token chose", scatter)
        return reason if isinstance(spread, NoMatch) else spread
    if down.form == "einsum":
        few = dropped(down, given[0].meta["val"].size(0))
        return chosen_behind(total.factor, result, given, inside, down.experts) if few is None else few
    index: Any = down.experts
    while isinstance(index, Node) and not _is_choice(index):
        index = _source(index)
    if index is None:
        return NoMatch("which expert a row has is not read off an index [tokens, k]", down.experts)
    weight: Any = total.factor
    if _experts_of_a_token(index) == 1:
        return index, _weight_of_one(weight, index.meta["val"].size(0))
    while operation(weight) in (*_VIEWS, aten.index.Tensor) and not _same_shape(weight, index):
        weight = _first(weight)
    return index, weight


def _is_choice(node: Node) -> bool:
    """Whether `node` is integers [T, k], or [T] that were made of scores."""
    value = node.meta["val"]
    if not isinstance(value, torch.Tensor) or value.dtype != torch.int64:
        return False
    source = _source(node)
    return value.dim() == 2 or (value.dim() == 1 and source is not None and source.meta["val"].dtype.is_floating_point)


def _experts_of_a_token(index: Node) -> int:
    return int(index.meta["val"].size(1)) if index.meta["val"].dim() == 2 else 1


def _weight_of_one(factor: Node, tokens: Any) -> Node:
    """The weight of the one expert of each token, before rows are put into another order and given other dims."""
    node = weight = factor
    while operation(node) in _VIEWS or (operation(node) is aten.index.Tensor and len(node.args[1]) == 1):  # type: ignore[arg-type]
        node = _first(node)
        weight = node if _is_of_each(node, tokens, 1) else weight
    return weight


def _gates(total: _Sum) -> Node:
    """The weights [T, E] of all experts, before they are turned and converted."""
    weight: Any = total.factor
    while operation(weight) in (*_VIEWS, *_SWAPPED) or (
        operation(weight) is aten._to_copy.default and weight.meta["val"].dtype == total.dtype
    ):
        weight = _first(weight)
    return weight


def _scattered(scatter: Node) -> tuple[Node, Node] | NoMatch:
    """(index, weight) of weights [T, E] into which those of chosen experts were scattered."""
    dim, index, source = scatter.args[1:4]
    if dim not in (1, -1):
        return NoMatch("the weights of its experts are scattered over tokens, not over experts", scatter)
    if _experts_of_a_token(index) > 1 and (operation(index) is not GETITEM or operation(index.args[0]) not in CHOICES):  # type: ignore
        return NoMatch("the experts of a token are not chosen by topk, so one may be there twice, and would count once", index)  # type: ignore
    return index, source  # type: ignore[return-value]


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
    tokens, k = x.meta["val"].size(0), _experts_of_a_token(index)
    if not all(_is_of_each(node, tokens, k) for node in (index, weight)):
        return NoMatch("there is not one weight for each expert of each token", weight)
    return None


def _is_of_each(node: Node, tokens: Any, k: int) -> bool:
    """Whether a value is [tokens, k], or [tokens] where k is 1."""
    shape = node.meta["val"].shape
    fits = len(shape) == 2 and same_size(shape[1], k) or (len(shape) == 1 and k == 1)
    return fits and same_size(shape[0], tokens)


def _oriented(shape: torch.Size, transposed: bool) -> tuple[int, int, int]:
    return (shape[0], shape[2], shape[1]) if transposed else tuple(shape)  # type: ignore[return-value]


def _same_shape(a: Node, b: Node) -> bool:
    first, second = a.meta["val"].shape, b.meta["val"].shape
    return len(first) == len(second) and all(same_size(m, n) for m, n in zip(first, second, strict=True))


def _first(node: Node) -> Node:
    return node.args[0]  # type: ignore[return-value]


def _shown(node: Node) -> str:
    return name_of(node.target) if node.op == "call_function" else "what the function returns"  # type: ignore[arg-type]
