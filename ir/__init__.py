"""What a program is, and everything that reads or edits one. Imports no other floor of the house."""

from . import ops
from .capture import capture, from_exported
from .op import op
from .parser import parse
from .program import Function, Node, Program, Stage, Weight, Where
from .region import Region, sliced
from .rewriter import Fuel, OutOfFuel, Rewriter, RewriteRecord
from .symbols import Symbol, SymbolTable
from .verifier import verify

__all__ = [
    "Fuel",
    "Function",
    "Node",
    "OutOfFuel",
    "Program",
    "Region",
    "RewriteRecord",
    "Rewriter",
    "Stage",
    "Symbol",
    "SymbolTable",
    "Weight",
    "Where",
    "capture",
    "from_exported",
    "op",
    "ops",
    "parse",
    "sliced",
    "verify",
]
