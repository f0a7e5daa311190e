"""`gw.lowrank_linear` as two kernels: what a row becomes before it is multiplied, and the product.

The first reads x for the branch's half, x @ down.T, and quantizes it; the second multiplies codes, which it unpacks in registers, and adds
the branch's other half and what follows. Source: SVDQuant (arXiv 2411.05007), section 4.3, whose kernels add the first half by atomics;
these have no atomics, so that a result repeats bit by bit.
"""

from .split import split

__all__ = ["split"]
