"""Operators of the dialect as functions of the model, in the domain `graphwright`: standard operators inside, made of the reference body.

There is one function for each set of attributes and types. Its attributes are those of the call, with their values as defaults: they say
what the function is, and `from_onnx` reads it back by them. A float is a float64 tensor there, since ONNX's own float attributes are
float32, and a dtype the number of its element type.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from ...calls import GETITEM
from ...program import Node
from ...symbols import SymbolTable
from ...types import type_text
from ..dialect import DOMAIN, OP_KEY
from ..dtypes import element_type
from .apart import has_float64, taken_apart
from .lower import Site
from .own_sizes import of_own_sizes
from .translate import Piece, Translated


def op_name(site: Site) -> str:
    """The operator's name in the dialect."""
    target: Any = site.call.target
    return target.name().partition("::")[2]


def arguments(site: Site) -> dict[str, Any]:
    """All arguments of the call by name, defaults included."""
    target: Any = site.call.target
    schema = target._schema
    named = dict(zip((argument.name for argument in schema.arguments), site.args)) | site.kwargs
    return {argument.name: named.get(argument.name, argument.default_value) for argument in schema.arguments}


def operands(site: Site) -> list[Node | None]:
    """The tensors of the call in the order of its schema, None for absent ones, which stand at the end of it no more."""
    target: Any = site.call.target
    named = arguments(site)
    found: list[Node | None] = []
    for argument in target._schema.arguments:
        if "Tensor" in str(argument.type):
            value = named[argument.name]
            found += value if isinstance(value, list) else [value]
    while found and found[-1] is None:
        found.pop()
    return found


def attributes(site: Site) -> dict[str, Any]:
    """The other arguments, as ONNX attributes; those that are None are left out."""
    import onnx_ir as ir

    target: Any = site.call.target
    named = arguments(site)
    result = {}
    for argument in target._schema.arguments:
        value = named[argument.name]
        if "Tensor" in str(argument.type) or value is None:
            continue
        result[argument.name] = ir.convenience.convert_attribute(argument.name, _plain(value))
    return result


def _plain(value: Any) -> Any:
    import onnx_ir as ir

    if isinstance(value, float):
        return ir.tensor(torch.tensor(value, dtype=torch.float64).numpy())
    if isinstance(value, torch.dtype):
        return element_type(value)
    return int(value) if isinstance(value, bool) else value


def key(site: Site, symbols: SymbolTable) -> tuple[Any, ...]:
    """Calls with equal keys are calls of one function."""
    named = {name: value for name, value in arguments(site).items() if not isinstance(value, fx.Node | list)}
    types = tuple("" if each is None else type_text(each.meta["val"], symbols) for each in operands(site))
    lists = tuple(
        str(value) for value in arguments(site).values() if isinstance(value, list) and not any(isinstance(x, fx.Node) for x in value)
    )
    return (op_name(site), tuple(named.items()), types, lists)


def body(site: Site, symbols: SymbolTable) -> Piece:
    """The piece of the function's body: the call itself on inputs of its operands' types, which the exporter takes apart."""
    piece = Piece()
    types = of_own_sizes(symbols, [operand.meta["val"] for operand in operands(site) if operand is not None])
    inputs = iter([piece.input("x", value) for value in types])

    def each_its_own(value: Any) -> Any:
        if isinstance(value, list):
            return [each_its_own(item) for item in value]
        return next(inputs) if isinstance(value, fx.Node) else value  # an operand that is read twice here may not be in the next call

    target: Any = site.call.target
    named = {name: each_its_own(value) for name, value in arguments(site).items()}
    args = tuple(named[argument.name] for argument in target._schema.arguments if not argument.kwarg_only)
    kwargs = {argument.name: named[argument.name] for argument in target._schema.arguments if argument.kwarg_only}
    value = site.call.meta["val"]
    if has_float64(value, (args, kwargs)):
        made = taken_apart(piece, symbols, target, args, kwargs, None)
        piece.outputs = made if isinstance(made, list) else [made]
        return piece
    made = piece.call(site.call.target, args, kwargs, value, None)
    single = isinstance(value, torch.Tensor)
    piece.outputs = [made] if single else [piece.call(GETITEM, (made, place), {}, each, None) for place, each in enumerate(value)]
    return piece


@dataclass(frozen=True)
class LocalFunction:
    """A function of the model by its name, and the operator that it is of."""

    name: str
    site: Site

    def defined(self, part: Translated, nodes: list[Any], opset: int) -> Any:
        """The function, with one input for each operand of the schema."""
        import onnx_ir as ir

        made = iter(part.inputs)
        inputs = [ir.Value(name=None) if operand is None else next(made) for operand in operands(self.site)]
        graph = ir.Graph(inputs, part.outputs, nodes=nodes, opset_imports={"": opset}, name=self.name)
        function = ir.Function(DOMAIN, self.name, graph=graph, attributes=attributes(self.site))
        function.metadata_props[OP_KEY] = f"gw.{op_name(self.site)}"
        return function


def call(site: Site, name: str, inputs: dict[Node, Any], **options: Any) -> Any:
    """The node that calls the function, or the operator itself under its own name."""
    import onnx_ir as ir

    target: Any = site.call.target
    count = len(target._schema.returns)
    operands_ = [None if each is None else inputs[each] for each in operands(site)]
    return ir.Node(DOMAIN, name, operands_, num_outputs=count, **options)
