"""What random programs call: a room for each family of ATen operations, the dialect's, and motifs of networks that rules look for."""

from . import (
    attention,
    convolutions,
    creation,
    dialect,
    elementwise,
    indexing,
    motifs,
    norms,
    products,
    reductions,
    rule_sites,
    shapes,
    sizes,
    state,
)
from .registry import MAKERS, makers_of

__all__ = [
    "MAKERS",
    "attention",
    "convolutions",
    "creation",
    "dialect",
    "elementwise",
    "indexing",
    "makers_of",
    "motifs",
    "norms",
    "products",
    "reductions",
    "rule_sites",
    "shapes",
    "sizes",
    "state",
]
