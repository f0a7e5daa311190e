"""What must hold of the arguments of a `gw.sliced` call, whether it was read, built or edited.

Its numbers fit its operands (dims, count, units, orders), and each input of the body has the type of a slice of its operand.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from .infer import InferenceError, same_type
from .links.sizes import quotient
from .region import Region, narrow, units_of
from .symbols import SymbolTable, ceil_div
from .types import type_text


def check_region(symbols: SymbolTable, args: Sequence[Any], kwargs: dict[str, Any]) -> None:
    """Raises InferenceError naming the first rule that the arguments of a `gw.sliced` call break."""
    body, in_dims, out_dims, count, *operands = args
    values = [_tensor_or_size(operand) for operand in operands]
    if not _are_dims(in_dims) or not _are_dims(out_dims):
        raise InferenceError(f"in_dims and out_dims are lists of integers, and these are {in_dims} and {out_dims}")
    if len(body.placeholders) != len(operands) or len(in_dims) != len(operands) or len(out_dims) != len(body.outputs):
        raise InferenceError("it has other numbers of operands, dims or outputs than its body")
    _check_in_dims(in_dims, values)
    _check_out_dims(out_dims, kwargs.get("orders"), body)
    units, count = units_of(in_dims, values, _size(kwargs.get("units"), "units")), _size(count, "count")
    _check_count(in_dims, values, units, count)
    _check_inputs(symbols, body, in_dims, values, units, count)


def _tensor_or_size(operand: Any) -> Any:
    value = operand.meta["val"] if isinstance(operand, fx.Node) else None
    if not isinstance(value, torch.Tensor | torch.SymInt | int):
        raise InferenceError("an operand is neither a tensor nor a size of the program")
    return value


def _are_dims(dims: Any) -> bool:
    return isinstance(dims, list) and all(type(dim) is int for dim in dims)


def _size(size: Any, name: str) -> Any:
    """The value of a size that may be computed by a node."""
    value = size.meta["val"] if isinstance(size, fx.Node) else size
    if type(value) is int or isinstance(value, torch.SymInt) or (value is None and name == "units"):
        return value
    raise InferenceError(f"{name} is an integer or a size of the program, not a {type(value).__name__}")


def _check_in_dims(in_dims: list[int], values: Sequence[Any]) -> None:
    for dim, value in zip(in_dims, values, strict=True):
        rank = value.dim() if isinstance(value, torch.Tensor) else 0
        if not -1 <= dim < rank:
            raise InferenceError(f"in_dims has {dim} for an operand of {rank} dims, and it is -1 where an operand is passed whole")
    if all(dim < 0 for dim in in_dims):
        raise InferenceError("it slices no operand")


def _check_out_dims(out_dims: list[int], orders: Any, body: Region) -> None:
    orders = [None] * len(out_dims) if orders is None else orders
    if not isinstance(orders, list) or len(orders) != len(out_dims):
        raise InferenceError(f"orders has a list of dims for each of {len(out_dims)} outputs, and this is {orders}")
    for j, (output, dim, order) in enumerate(zip(body.outputs, out_dims, orders, strict=True)):
        value = output.meta["val"] if isinstance(output, fx.Node) else None
        if not isinstance(value, torch.Tensor):
            raise InferenceError(f"output {j} of its body is no tensor")
        if not 0 <= dim < value.dim():
            raise InferenceError(f"out_dims has {dim} for output {j}, which has {value.dim()} dims")
        if order is not None and not (_are_dims(order) and sorted(order) == list(range(value.dim()))):
            raise InferenceError(f"orders has {order} for output {j}, which has {value.dim()} dims: each stands in it once")


def _check_count(in_dims: list[int], values: Sequence[Any], units: Any, count: Any) -> None:
    if isinstance(units, int) and units < 1:
        raise InferenceError(f"it has {units} units, and it needs at least one")
    for value, dim in zip(values, in_dims, strict=True):
        if dim >= 0 and quotient(value.size(dim), units) is None:
            raise InferenceError(f"it cuts dim {dim} of size {value.size(dim)} into {units} units")
    if isinstance(count, int) and (count < 1 or (isinstance(units, int) and count > units)):
        raise InferenceError(f"it has count {count} for {units} units")


def _check_inputs(symbols: SymbolTable, body: Region, in_dims: list[int], values: Sequence[Any], units: Any, count: Any) -> None:
    length = _length(body, in_dims, values, units, count)
    for k, (placeholder, value, dim) in enumerate(zip(body.placeholders, values, in_dims, strict=True)):
        try:
            with symbols.inference():
                expected = narrow(value, dim, 0, length, units)
        except RuntimeError as error:
            raise InferenceError(f"input {k} of its body is no slice of {units} units") from error
        if not same_type(placeholder.meta["val"], expected):
            found, wanted = type_text(placeholder.meta["val"], symbols), type_text(expected, symbols)
            raise InferenceError(f"input {k} of its body is {found}, but its operand has {wanted} there")


def _length(body: Region, in_dims: list[int], values: Sequence[Any], units: Any, count: Any) -> Any:
    """The units of the slice that the body is typed for: the longest, or the first input's where no number is the longest."""
    longest = ceil_div(units, count)
    if isinstance(longest, int):
        return longest
    first = next(k for k, dim in enumerate(in_dims) if dim >= 0)
    found, dim = body.placeholders[first].meta["val"], in_dims[first]
    if not isinstance(found, torch.Tensor) or dim >= found.dim():
        return longest
    per_unit = values[first].size(dim) // units
    return quotient(found.size(dim), per_unit) or longest
