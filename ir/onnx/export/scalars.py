"""Float64 scalars as float64 constants: torch's exporter writes a scalar as a float32, and x * (1 + 1e-9) as x * 1.0."""

from typing import Any

import torch

from ...infer import fake_like
from ...symbols import SymbolTable
from .translate import Piece

aten = torch.ops.aten

# Overloads that take tensors where those of a program may take scalars.
_OF_TENSORS = {
    aten.add.Scalar: aten.add.Tensor,
    aten.sub.Scalar: aten.sub.Tensor,
    aten.mul.Scalar: aten.mul.Tensor,
    aten.div.Scalar: aten.div.Tensor,
    aten.pow.Tensor_Scalar: aten.pow.Tensor_Tensor,
    aten.pow.Scalar: aten.pow.Tensor_Tensor,
    aten.remainder.Scalar: aten.remainder.Tensor,
    aten.clamp.default: aten.clamp.Tensor,
    aten.clamp_min.default: aten.clamp_min.Tensor,
    aten.clamp_max.default: aten.clamp_max.Tensor,
    aten.masked_fill.Scalar: aten.masked_fill.Tensor,
    aten.eq.Scalar: aten.eq.Tensor,
    aten.ne.Scalar: aten.ne.Tensor,
    aten.lt.Scalar: aten.lt.Tensor,
    aten.le.Scalar: aten.le.Tensor,
    aten.gt.Scalar: aten.gt.Tensor,
    aten.ge.Scalar: aten.ge.Tensor,
}
# Tensors of one number: their last argument, before which stands their shape.
_FILLED = (aten.full.default, aten.new_full.default, aten.scalar_tensor.default)


def exact(piece: Piece, symbols: SymbolTable, target: Any, args: Any, kwargs: Any) -> tuple[Any, Any, Any]:
    """A call on float64 values with its float scalars as constants, where it has a form that takes tensors for them."""

    def constant(value: float) -> Any:
        tensor = torch.tensor(value, dtype=torch.float64)
        return piece.constant("scalar", tensor, fake_like(symbols, torch.float64, (), (), torch.device("cpu")))

    if target in _FILLED and isinstance(args[-1], float):
        shape = [] if len(args) == 1 else args[-2]
        return aten.expand.default, (constant(args[-1]), shape), {}
    form = _OF_TENSORS.get(target, target)
    schema = getattr(form, "_schema", None)
    if schema is None:
        return target, args, kwargs
    takes_tensor = {argument.name: str(argument.type).startswith(("Tensor", "Optional[Tensor")) for argument in schema.arguments}
    named = dict(zip(takes_tensor, args)) | kwargs
    scalars = {name for name, value in named.items() if type(value) in (float, int) and takes_tensor.get(name)}
    if not scalars:
        return target, args, kwargs
    made = {name: constant(named[name]) for name in scalars}
    places = list(takes_tensor)
    exact_args = tuple(made.get(places[place], value) for place, value in enumerate(args))
    return form, exact_args, {name: made.get(name, value) for name, value in kwargs.items()}
