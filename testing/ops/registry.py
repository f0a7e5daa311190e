"""Makers: each draws operands from a builder and adds one call, or a few that belong together. A family is a room of them."""

from collections.abc import Callable, Collection

from ...ir.errors import InputError
from ..builder import Builder

Maker = Callable[[Builder], object]
MAKERS: dict[str, list[Maker]] = {}


def maker(family: str, *, weight: int = 1) -> Callable[[Maker], Maker]:
    """Decorator: the function makes calls of `family`, and is drawn `weight` times as often as another of that family."""

    def register(function: Maker) -> Maker:
        MAKERS.setdefault(family, []).extend([function] * weight)
        return function

    return register


def makers_of(families: Collection[str] | None) -> dict[str, list[Maker]]:
    """The makers of `families`, of all when None.

    Raises:
        InputError: a family is unknown.
    """
    unknown = sorted(set(families or ()) - MAKERS.keys())
    if unknown:
        raise InputError(f"no operations are called {unknown[0]}: the families are {', '.join(sorted(MAKERS))}")
    return {name: makers for name, makers in MAKERS.items() if families is None or name in families}
