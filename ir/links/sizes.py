"""Questions about sizes that are ints or SymInts, answered only when provable; no question adds a guard."""

from math import gcd

import torch
from torch.fx.experimental.symbolic_shapes import statically_known_true

Size = int | torch.SymInt


def same(a: Size, b: Size) -> bool:
    """a = b is proved."""
    if type(a) is int and type(b) is int:
        return a == b
    return a is b or statically_known_true(a == b)


def differ(a: Size, b: Size) -> bool:
    """a != b is proved. With symbols, `not same` and `not differ` may both hold."""
    if type(a) is int and type(b) is int:
        return a != b
    return statically_known_true(a != b)


def plain(a: Size) -> Size:
    """An int where `a` is a SymInt of a known value."""
    if type(a) is int:
        return a
    known = a.node.maybe_as_int()
    return a if known is None else known


def quotient(a: Size, n: Size) -> Size | None:
    """a / n if n | a is proved, else None."""
    if type(a) is int and type(n) is int:
        return a // n if n and a % n == 0 else None
    if same(a, n):
        return 1
    q = plain(a // n)
    return q if same(q * n, a) else None


def common(a: Size, n: Size) -> Size | None:
    """The largest proved N' > 1 that divides both, else None: the units to retry with.

    With symbols `a` itself if it divides n, which may turn out to be 1: an axis of one unit is cut into one slice.
    """
    if type(a) is int and type(n) is int:
        return gcd(a, n) if gcd(a, n) > 1 else None
    return a if not same(a, 1) and quotient(n, a) is not None else None


def identity(a: Size) -> object:
    """Hashable, and equal for sizes that are written alike (a SymInt has no hash of its own)."""
    return a if type(a) is int else a.node.expr


def product(sizes) -> Size:
    result = 1
    for size in sizes:
        result = result * size
    return result
