"""Makers: each draws operands from a builder and adds one call, or a few that belong together. A family is a room of them."""

from collections.abc import Callable, Collection
from typing import Any

from ...ir.calls import target_of
from ...ir.errors import InputError
from ..builder import Builder
from .named import maker_of

Maker = Callable[[Builder], object]
MAKERS: dict[str, list[Maker]] = {}


def maker(family: str, *, weight: int = 1) -> Callable[[Maker], Maker]:
    """Decorator: the function makes calls of `family`, and is drawn `weight` times as often as another of that family."""

    def register(function: Maker) -> Maker:
        MAKERS.setdefault(family, []).extend([function] * weight)
        return function

    return register


def makers_of(ops: Collection[str] | None) -> dict[str, list[Maker]]:
    """The makers of `ops`, which are families, single makers of them (`motifs.attention_block`) or operations as text names them
    (`aten.relu.default`); of all families when None.

    Raises:
        InputError: there is no such family, maker or operation.
    """
    if ops is None:
        return dict(MAKERS)
    return {name: MAKERS[name] if name in MAKERS else [_maker(name)] for name in ops}


def _maker(name: str) -> Maker:
    family, _, function = name.partition(".")
    found = next((each for each in MAKERS.get(family, ()) if each.__name__ == function), None)
    return maker_of(_operation(name)) if found is None else found


def _operation(name: str) -> Callable[..., Any]:
    try:
        return target_of(name)
    except KeyError:
        families = ", ".join(sorted(MAKERS))
        raise InputError(f"{name} is neither an operation, such as aten.relu.default, nor a family: these are {families}") from None
