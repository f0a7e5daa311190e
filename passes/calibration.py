"""The user's calibration inputs, as passes iterate them."""

from collections.abc import Iterable, Iterator
from typing import Any

from ..ir.errors import CalibrationError, first_line


def given(calibration: Iterable[Any]) -> Iterator[Any]:
    """The items of `calibration`, one after another.

    Raises:
        CalibrationError: the iterable itself raised; its own exception is the cause.
    """
    number, items = 0, None
    while True:
        try:
            items = iter(calibration) if items is None else items
            item = next(items)
        except StopIteration:
            return
        except Exception as error:
            raise CalibrationError(
                f"the iterator of the calibration inputs raised {type(error).__name__} at sample {number}: {first_line(error)}"
            ) from error
        yield item
        number += 1
