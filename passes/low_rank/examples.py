"""Calibration items as flat inputs of a function, each bound when its turn has come."""

from collections.abc import Iterable, Iterator, Mapping
from itertools import chain
from typing import Any

from torch import Tensor

from ...ir import Function, Program
from ...ir.calling import Call
from ...ir.errors import InputError
from ..calibration import given

# What loaders give of themselves, by class, and how it becomes what is expected.
_INSTEAD = {list: "[tuple(item) for item in loader]", Mapping: "[((), dict(item)) for item in loader]"}
_EXPECTED = "a tuple of the positional arguments, such as (x,), or a pair (args, kwargs)"


class Examples:
    """The items of `calibration`: tuples of positional arguments or pairs `(args, kwargs)`, as `function` is called.

    Raises:
        InputError: `calibration` is no iterable of items.
    """

    def __init__(self, calibration: Iterable[Any], program: Program, function: Function):
        if isinstance(calibration, str | Mapping | Tensor) or not isinstance(calibration, Iterable):
            raise InputError(
                f"calibration is a {type(calibration).__name__}, but must be a list, or another iterable, of items: {_EXPECTED}"
            )
        self._items = calibration
        self._call = Call(program, function)
        positional, named = function.in_tree.children
        self._takes_a_pair = [child.kind for child in positional.children] == ["tuple", "dict"] and not named.children

    @property
    def is_one_pass(self) -> bool:
        """Whether the items can be had once only."""
        return isinstance(self._items, Iterator)

    @property
    def size(self) -> int | None:
        """How many items there are, where this is known beforehand."""
        try:
            return len(self._items)  # type: ignore[arg-type]
        except TypeError:
            return None

    def __iter__(self) -> Iterator[Any]:
        """Raises CalibrationError where the user's own iterable raises."""
        return given(self._items)

    def first(self) -> list[Any]:
        """The inputs of the first item, which an iterator gives again afterwards.

        Raises:
            InputError: there is none, or it does not fit.
            CalibrationError: the user's own iterable raises.
        """
        for item in given(self._items):
            if self.is_one_pass:
                self._items = chain([item], self._items)
            return self.inputs(0, item)
        raise self.none()

    def inputs(self, number: int, item: Any) -> list[Any]:
        """Item `number` as the function takes it, one value a leaf.

        Raises:
            InputError: it does not fit the signature.
        """
        if not isinstance(item, tuple):
            instead = next((f": of those that a loader gives make {made}" for kind, made in _INSTEAD.items() if isinstance(item, kind)), "")
            raise InputError(f"calibration item {number} is a {type(item).__name__}, but must be {_EXPECTED}{instead}")
        is_pair = len(item) == 2 and isinstance(item[0], tuple) and isinstance(item[1], dict) and not self._takes_a_pair
        args, kwargs = item if is_pair else (item, {})
        try:
            return self._call.bind(args, kwargs)[0]
        except InputError as error:
            raise InputError(f"calibration item {number} does not fit the model: {error}") from error

    def none(self) -> InputError:
        """The error where there is no item."""
        if self.is_one_pass:
            return InputError("calibration is an iterator that has no items, or none left after an earlier run over it: give a list")
        return InputError(f"calibration has no items: give at least one, {_EXPECTED}")
