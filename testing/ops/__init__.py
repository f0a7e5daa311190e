"""What random programs call: a room for each family of ATen operations, the dialect's, and motifs of networks that rules look for."""

from . import (
    attention,
    before_layers,
    convolutions,
    creation,
    dialect,
    elementwise,
    indexing,
    motifs,
    norms,
    outputs,
    products,
    reductions,
    rule_sites,
    shapes,
    sizes,
    state,
    wide,
)
from .registry import MAKERS, makers_of

__all__ = [
    "MAKERS",
    "attention",
    "before_layers",
    "convolutions",
    "creation",
    "dialect",
    "elementwise",
    "indexing",
    "makers_of",
    "motifs",
    "norms",
    "outputs",
    "products",
    "reductions",
    "rule_sites",
    "shapes",
    "sizes",
    "state",
    "wide",
]
